"""Linear layer with an n-bit weight and float activations: `naive.py` is the reference."""

from lowbit.linear_wna16.naive import linear_wna16

__all__ = ["linear_wna16"]
