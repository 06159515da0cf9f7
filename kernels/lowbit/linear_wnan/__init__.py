"""Linear layer with an n-bit weight and n-bit activations: `naive.py` is the reference, `emulated.py` the fast torch version."""

from lowbit.linear_wnan.naive import dequantize, linear_wnan

__all__ = ["dequantize", "linear_wnan"]
