"""Evolutionary search of one group size per layer (Q-DiT, arXiv 2406.17343, section 3.2).

Dimension letters: L layers, C group sizes.

Smaller groups are not always better (an asymmetric grid and GPTQ see other numbers), so sizes are searched by the end-to-end error
of whole models. A genome names a size for every layer. Each generation keeps the better half as parents and fills up with
crossovers of two and mutations of one. A genome over the byte limit is repaired: random layers move to the next larger group. The
uniform genomes within the limit start the population, so the result is never worse than the best of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workbench.options import BadInput, EvolutionConfig, OnProgress, Progress, ignore_progress

SIZES = (32, 64, 128, None)  # from most bytes to fewest; None: one scale for a whole row
Genome = tuple[int, ...]  # index into SIZES per layer


@dataclass(frozen=True, kw_only=True)
class Evolved:
    """The best group sizes found, their error, what was spent, and the best error after each generation."""

    group_size_L: tuple[int | None, ...]
    error: float
    evaluations: int
    best_by_generation: tuple[float, ...]


def evolve(bytes_LC: Sequence[Sequence[int]], max_bytes: int, error_of: Callable[[tuple[int | None, ...]], float],
           config: EvolutionConfig, *, on_progress: OnProgress = ignore_progress) -> Evolved:
    """Search the genome of least `error_of` whose bytes are at most `max_bytes`. bytes_LC: of every layer at each of `SIZES`."""
    search = _Search(bytes_LC, max_bytes, error_of, config, on_progress)
    uniform = [genome for c in range(len(SIZES)) if search.fits(genome := (c,) * len(bytes_LC))]
    if not search.fits((len(SIZES) - 1,) * len(bytes_LC)):
        raise BadInput(f"no group size fits {max_bytes} bytes; the smallest model takes {sum(min(row) for row in bytes_LC)}")
    population = list(dict.fromkeys([*uniform, *(search.mutated(search.pick(uniform), 0.5) for _ in range(config.population))]))
    population = sorted(population[: max(config.population, len(uniform))], key=search.error)
    best = [search.error(population[0])]
    for _ in range(config.generations):
        parents = population[: max(1, config.population // 2)]
        children = [search.crossed(search.pick(parents), search.pick(parents)) if i % 2 else
                    search.mutated(search.pick(parents), config.mutation) for i in range(config.population - len(parents))]
        population = sorted(dict.fromkeys([*parents, *children]), key=search.error)
        best.append(search.error(population[0]))
    return Evolved(group_size_L=search.sizes(population[0]), error=best[-1], evaluations=len(search.known),
                   best_by_generation=tuple(best))


class _Search:
    """Random moves, and every error measured once."""

    def __init__(self, bytes_LC, max_bytes: int, error_of, config: EvolutionConfig, on_progress: OnProgress):
        self._bytes_LC, self._max_bytes, self._error_of, self._on_progress = bytes_LC, max_bytes, error_of, on_progress
        self._random = random.Random(config.seed)
        self._most = config.population + len(SIZES) + config.generations * (config.population - config.population // 2)
        self.known: dict[Genome, float] = {}

    def sizes(self, genome: Genome) -> tuple[int | None, ...]:
        return tuple(SIZES[c] for c in genome)

    def fits(self, genome: Genome) -> bool:
        return sum(row[c] for row, c in zip(self._bytes_LC, genome)) <= self._max_bytes

    def pick(self, genomes: list[Genome]) -> Genome:
        return self._random.choice(genomes)

    def error(self, genome: Genome) -> float:
        if genome not in self.known:
            self._on_progress(Progress(stage="evolution", done=len(self.known), total=max(self._most, len(self.known) + 1),
                                       message=f"genome {len(self.known) + 1}"))
            self.known[genome] = self._error_of(self.sizes(genome))
        return self.known[genome]

    def mutated(self, genome: Genome, share: float) -> Genome:
        """Some layers at random get a random size; at least one."""
        changed = list(genome)
        for layer in self._random.sample(range(len(genome)), max(1, round(share * len(genome)))):
            changed[layer] = self._random.randrange(len(SIZES))
        return self._repaired(changed)

    def crossed(self, first: Genome, second: Genome) -> Genome:
        """Each layer from either parent."""
        return self._repaired([self._random.choice(pair) for pair in zip(first, second)])

    def _repaired(self, genome: list[int]) -> Genome:
        while not self.fits(tuple(genome)):
            layer = self._random.choice([layer for layer, c in enumerate(genome) if c + 1 < len(SIZES)])
            genome[layer] += 1
        return tuple(genome)
