"""Adaptive layer norm in one pass: `naive.py` is the reference, `cpu.c` the kernel."""

from lowbit.modulate.naive import modulate

__all__ = ["modulate"]
