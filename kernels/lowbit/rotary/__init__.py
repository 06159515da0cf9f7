"""RMS norm and rotary embedding of queries and keys in one pass: `naive.py` is the reference, `cpu.c` the kernel."""

from lowbit.rotary.naive import norm_rotary

__all__ = ["norm_rotary"]
