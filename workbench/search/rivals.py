"""Allocations to compare the beam with. Each gives rows of activation bits (T, L) or weight bits (L); nothing is measured here."""

from __future__ import annotations

from workbench.plans import CostTable


def uniform_rows(act_bits: int, steps: int, layers: int) -> tuple[tuple[int, ...], ...]:
    """The same activation bits everywhere."""
    return ((act_bits,) * layers,) * steps


def uniform_weights(costs: CostTable) -> dict[int, int]:
    """Bytes of the transformer with all layers at one width, per width in ascending order."""
    layers = len(costs.macs_L)
    return {bits: costs.total_bytes([bits] * layers) for bits in sorted(costs.weight_bits_C)}
