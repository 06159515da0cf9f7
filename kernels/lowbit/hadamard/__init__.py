"""Block Hadamard transform with random signs: `naive.py` is the reference, `emulated.py` the fast torch version."""

from lowbit.hadamard.naive import block_hadamard, block_size, inverse, matrix

__all__ = ["block_hadamard", "block_size", "inverse", "matrix"]
