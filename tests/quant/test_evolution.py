"""Evolutionary search of group sizes on toy errors whose optimum is known by enumeration."""

import itertools

import pytest

from workbench.options import BadInput, Cancelled, EvolutionConfig
from workbench.quant.evolution import SIZES, evolve

LAYERS = 5
BYTES_LC = [[400, 360, 340, 330]] * LAYERS
BEST = (64, None, 32, 128, 64)  # group size is not monotone: each layer has its own taste


def error_of(group_size_L):
    return sum(abs(SIZES.index(size) - SIZES.index(best)) ** 2 * (i + 1) for i, (size, best) in enumerate(zip(group_size_L, BEST)))


def bytes_of(group_size_L):
    return sum(row[SIZES.index(size)] for row, size in zip(BYTES_LC, group_size_L))


def test_it_finds_the_optimum_within_the_limit():
    limit = 1750
    found = evolve(BYTES_LC, limit, error_of, EvolutionConfig(population=40, generations=25, mutation=0.3))
    fits = [genome for genome in itertools.product(SIZES, repeat=LAYERS) if bytes_of(genome) <= limit]
    assert bytes_of(found.group_size_L) <= limit and bytes_of(BEST) > limit
    assert found.error == error_of(found.group_size_L) == min(map(error_of, fits))


def test_every_genome_it_measures_fits_and_none_is_measured_twice():
    seen = []
    found = evolve(BYTES_LC, 1800, lambda g: seen.append(g) or error_of(g), EvolutionConfig())
    assert len(seen) == len(set(seen)) == found.evaluations
    assert all(bytes_of(genome) <= 1800 for genome in seen)


def test_it_is_never_worse_than_a_uniform_size_and_never_gets_worse():
    for seed in range(5):
        found = evolve(BYTES_LC, 1800, error_of, EvolutionConfig(population=4, generations=3, seed=seed))
        uniform = [error_of((size,) * LAYERS) for size in SIZES if bytes_of((size,) * LAYERS) <= 1800]
        assert found.error <= min(uniform)
        assert list(found.best_by_generation) == sorted(found.best_by_generation, reverse=True)


def test_the_seed_decides_everything():
    def run(seed):
        seen = []
        evolve(BYTES_LC, 1800, lambda g: seen.append(g) or error_of(g), EvolutionConfig(seed=seed))
        return seen

    assert run(1) == run(1) != run(2)


def test_the_budget_of_measurements_is_bounded_by_the_settings():
    config = EvolutionConfig(population=10, generations=4)
    found = evolve(BYTES_LC, 10_000, error_of, config)
    assert found.evaluations <= 10 + 4 * 5


def test_a_limit_nothing_fits_is_refused_and_cancelling_passes_through():
    with pytest.raises(BadInput, match="no group size fits 1000 bytes; the smallest model takes 1650"):
        evolve(BYTES_LC, 1000, error_of, EvolutionConfig())

    def stop(progress):
        if progress.done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        evolve(BYTES_LC, 1800, error_of, EvolutionConfig(), on_progress=stop)
