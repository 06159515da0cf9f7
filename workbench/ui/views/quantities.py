"""What the sensitivity map can show: each quantity with its name, how it is known, and how the layers of a block become one value.

Letters: T steps, L layers. Values are lists of rows (steps) of columns (layers); a step that is not known yet is None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PUT_TOGETHER = {"mean": lambda values: sum(values) / len(values), "sum": sum, "max": max}


@dataclass(frozen=True)
class Sources:
    """Where a quantity can come from: the running profile's columns, or the finished profile. `bits` is the width in question."""

    fisher_TL: tuple | list
    found: Any = None
    bits: int = 4


@dataclass(frozen=True)
class Quantity:
    """`block`: how a block's layers are put together; None where the reader chooses."""

    label: str
    known: str
    read: Callable[[Sources], Any]
    block: str | None = None
    needs_bits: bool = False
    risk: bool = True  # does more of it mean that more bits are needed?


def _finished(name: str) -> Callable[[Sources], Any]:
    def read(sources: Sources):
        value = sources.found and getattr(sources.found.sensitivity, name)
        return None if value is None else value.tolist()
    return read


def _error(s: Sources):
    if s.found is None:
        return None
    return s.found.table.error_TLC[..., s.found.table.act_bits_C.index(s.bits)].tolist()


def _gain(s: Sources):
    """Error saved by the next wider width, per bit."""
    if s.found is None:
        return None
    widths = list(s.found.table.act_bits_C)
    here = widths.index(s.bits)
    following = widths[here + 1]
    error_TLC = s.found.table.error_TLC
    return ((error_TLC[..., here] - error_TLC[..., here + 1]).clamp(min=0) / (following - s.bits)).tolist()


QUANTITIES = {
    "fisher": Quantity("Fisher information", "measured", lambda s: s.fisher_TL),
    "error": Quantity("error at b bits", "modelled", _error, needs_bits=True),
    "gain": Quantity("gain of one more bit", "modelled", _gain, needs_bits=True),
    "alpha": Quantity("calibration weight α", "measured", _finished("alpha_TL"), block="mean", risk=False),
    "stderr": Quantity("standard error of Fisher", "measured", _finished("stderr_TL"), block="mean", risk=False),
    "range": Quantity("largest |activation|", "measured", _finished("act_absmax_TL"), block="max", risk=False),
}


def title(name: str, bits: int) -> str:
    """The quantity's name on axes and tables."""
    return {"error": f"predicted error at {bits} activation bits", "gain": f"predicted gain per bit above {bits}"}.get(
        name, QUANTITIES[name].label
    )


def values(name: str, sources: Sources):
    """Rows of the quantity, or None while it is not known."""
    rows = QUANTITIES[name].read(sources)
    return rows if rows is not None and any(row is not None for row in rows) else None


def bits_offered(found) -> list[int]:
    """Widths at which an error can be looked at: all but float."""
    return [bits for bits in (found.table.act_bits_C if found else ()) if bits != 16]


def by_block(rows, members_by_block, how: str):
    """(blocks, steps) values; `how` names an entry of PUT_TOGETHER."""
    together = PUT_TOGETHER[how]
    return [[None if row is None else together([row[i] for i in members]) for row in rows] for members in members_by_block.values()]
