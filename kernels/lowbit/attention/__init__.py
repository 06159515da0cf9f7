"""Attention of one or two streams of tokens with its norms and rotations in one pass: `naive.py` is the reference, `cpu.c` the kernel."""

from lowbit.attention.naive import attention

__all__ = ["attention"]
