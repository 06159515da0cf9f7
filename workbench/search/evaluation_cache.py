"""Every measurement of a search, made once. Paths that share a prefix share its state; a resumed search reads its
measurements from the cache instead of running the model, so it ends exactly where the uninterrupted one does.

Dimension letters as in `types.py`: T steps, L layers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from workbench.options import BadInput, Cancelled

State = Any
Row = tuple[int, ...]  # activation bits of every layer for one step


class Evaluator(Protocol):
    """Measures paths; the search knows neither model nor prompts. States are opaque and never changed in place."""

    samples: int  # prompts that every score and error is a mean over

    def use_weights(self, weight_bits_L: tuple[int, ...]) -> None:
        """Switch the model's weights; all that follows runs on them."""

    def start(self) -> State:
        """The initial noise of the samples that score a path."""

    def extend(self, state: State, step: int, act_bits_L: Row) -> State:
        """One quantized step, really run."""

    def score(self, state: State, step: int) -> float:
        """After `step`: the predicted effect on the final latent of the deviation so far, or (raw) this step's deviation."""

    def error(self, state: State) -> float:
        """After the last step: normalised squared error of the final latent."""

    def change(self, before: State, after: State) -> float:
        """Relative L1 change of the latent from one state to the next; only asked for by the online switch."""

    def save(self, state: State) -> bytes: ...

    def load(self, blob: bytes) -> State: ...

    def at(self, step: int) -> State:
        """The float model's state before `step`; only asked for when SearchConfig.rollout is "float", and by the online switch."""


class SearchFailed(BadInput):
    """The evaluator gave nothing usable. One line; what had been measured is in the last checkpoint."""


@dataclass(frozen=True)
class Path:
    """Rows for the first steps under some weights. `bits` and `score` are accumulated as far as the path goes."""

    weights: int  # index into Ledger.weights
    rows: tuple[int, ...] = ()  # index into Ledger.rows, one per step
    bits: float = 0.0
    score: float = 0.0

    @property
    def step(self) -> int:
        return len(self.rows)


class EvaluationCache:
    """An evaluator that remembers. `on_extend` is called before each step the model runs (or would have run). active_TL: the cells whose
    bits count, by default all."""

    def __init__(self, evaluator: Evaluator, *, summed: bool, on_extend: Callable[[], None], saved: dict | None = None,
                 blobs: dict[str, bytes] | None = None, active_TL=None):
        saved = saved or {"weights": [], "rows": [], "scores": [], "errors": []}
        self.evaluator, self.summed, self.on_extend, self._active_TL = evaluator, summed, on_extend, active_TL
        self.weights: list[Row] = [tuple(w) for w in saved["weights"]]
        self.rows: list[Row] = [tuple(r) for r in saved["rows"]]
        self._score = {tuple(key): _number(value) for key, value in saved["scores"]}
        self._error = {tuple(key): _number(value) for key, value in saved["errors"]}
        self._blob, self._state = dict(blobs or {}), {}
        self._visited: set = set()
        self._current: int | None = None
        self.fresh = 0  # measurements made now rather than read from a checkpoint

    @property
    def evaluations(self) -> int:
        """Distinct model steps this search has asked for, whether run now or read from a checkpoint."""
        return len(self._visited)

    def root(self, weight_bits_L: Row) -> Path:
        return Path(weights=_index(self.weights, tuple(weight_bits_L)))

    def bits_TL(self, path: Path) -> tuple[Row, ...]:
        return tuple(self.rows[row] for row in path.rows)

    def extend(self, path: Path, row_L: Row) -> Path:
        """The path after one more step of the quantized rollout, measured."""
        row = _index(self.rows, row_L)
        key = (path.weights, *path.rows, row)
        self._visit(key)
        if key not in self._score:
            state = self._call(lambda: self.evaluator.extend(self._state_of(path), path.step, row_L), path)
            self._score[key] = self._scored(state, path)
            self._state[key] = state
        return self._longer(path, row, self._score[key], self.summed)

    def extend_at_float(self, path: Path, row_L: Row) -> Path:
        """One more step, scored where the float model stands before it: the same for every path, and additive."""
        row = _index(self.rows, row_L)
        key = ("float", path.weights, path.step, row)
        self._visit(key)
        if key not in self._score:
            self._call(lambda: self._use(path.weights), path)
            state = self._call(lambda: self.evaluator.extend(self.evaluator.at(path.step), path.step, row_L), path)
            self._score[key] = self._scored(state, path)
        return self._longer(path, row, self._score[key], True)

    def rollout(self, weight_bits_L: Row, bits_TL: Iterable[Row]) -> Path:
        """A whole plan, step by step, and its error. Only the states of its own prefixes are kept, for a plan like it may follow."""
        path, rows = self.root(weight_bits_L), [_index(self.rows, row_L) for row_L in bits_TL]
        own = {(path.weights, *rows[:step]) for step in range(len(rows) + 1)}
        self._state = {key: state for key, state in self._state.items() if key in own}
        for row in rows:
            path = self.extend(path, self.rows[row])
        self.error(path)
        return path

    def error(self, path: Path) -> float:
        """Measured error of a complete path."""
        key = (path.weights, *path.rows)
        if key not in self._error:
            self._error[key] = finite_or_inf(self._call(lambda: self.evaluator.error(self._state_of(path)), path))
        return self._error[key]

    def change(self, path: Path) -> float:
        """Relative L1 change of the latent over the last step of a path."""
        key = ("change", path.weights, *path.rows)
        if key not in self._score:
            before = Path(weights=path.weights, rows=path.rows[:-1])
            self._score[key] = finite_or_inf(self._call(
                lambda: self.evaluator.change(self._state_of(before), self._state_of(path)), before))
        return self._score[key]

    def change_at_float(self, step: int) -> float:
        """The same over one step of the float trajectory."""
        key = ("change", "float", step)
        if key not in self._score:
            at = self.evaluator.at
            self._score[key] = finite_or_inf(self._call(lambda: self.evaluator.change(at(step), at(step + 1)), Path(weights=0)))
        return self._score[key]

    def keep(self, alive: Iterable[Path]) -> None:
        """Forget the states of all paths but these; a forgotten one is recomputed if it is asked for again."""
        keys = {(path.weights, *path.rows) for path in alive}
        self._state = {key: state for key, state in self._state.items() if key in keys}
        if self.fresh:  # before that the search only repeats what a checkpoint knows, and its states are yet to be asked for
            names = {_name(key) for key in keys}
            self._blob = {name: blob for name, blob in self._blob.items() if name in names}

    def to_json(self) -> dict:
        """All measurements; `blobs` has the states."""
        return {"weights": self.weights, "rows": self.rows,
                "scores": [[list(key), _text(value)] for key, value in self._score.items()],
                "errors": [[list(key), _text(value)] for key, value in self._error.items()]}

    def blobs(self) -> dict[str, bytes]:
        """The states that are alive, by name."""
        return self._blob | {_name(key): self.evaluator.save(state) for key, state in self._state.items()}

    def _visit(self, key: tuple) -> None:
        if key not in self._visited:
            self._visited.add(key)
            self.on_extend()

    def _use(self, weights: int) -> None:
        if weights != self._current:
            self.evaluator.use_weights(self.weights[weights])
            self._current = weights

    def _state_of(self, path: Path) -> State:
        """The state after a path, from memory, from the checkpoint, or by running it again from what is known of it."""
        self._use(path.weights)
        for known in range(path.step, -1, -1):
            key = (path.weights, *path.rows[:known])
            if key not in self._state and _name(key) in self._blob:
                self._state[key] = self.evaluator.load(self._blob.pop(_name(key)))
            if key in self._state:
                state = self._state[key]
                break
        else:
            known, state = 0, self.evaluator.start()
        for step in range(known, path.step):
            state = self.evaluator.extend(state, step, self.rows[path.rows[step]])
            self._state[(path.weights, *path.rows[:step + 1])] = state
        return state

    def _scored(self, state: State, path: Path) -> float:
        return finite_or_inf(self._call(lambda: self.evaluator.score(state, path.step), path))

    def _longer(self, path: Path, row: int, score: float, summed: bool) -> Path:
        spent = self.rows[row] if self._active_TL is None else itertools.compress(self.rows[row], self._active_TL[path.step])
        bits = path.bits + sum(spent)
        return Path(weights=path.weights, rows=(*path.rows, row), bits=bits, score=path.score + score if summed else score)

    def _call(self, measure: Callable[[], Any], path: Path) -> Any:
        self.fresh += 1
        try:
            return measure()
        except (Cancelled, BadInput):
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise SearchFailed(f"the model failed at step {path.step + 1} of a path: {reason}; "
                               f"{len(self._error)} measured plans are kept") from error


def finite_or_inf(value: float) -> float:
    """A score that is not a finite number is infinitely bad."""
    value = float(value)
    return value if math.isfinite(value) else math.inf


def _index(values: list, value) -> int:
    if value not in values:
        values.append(value)
    return values.index(value)


def _name(key: tuple) -> str:
    return "state-" + hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def _text(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.inf if value is None else float(value)
