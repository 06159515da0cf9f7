"""Layers that read one tensor, quantized once for all of them: `naive.py` is the reference, and what runs where nothing is fused."""

from lowbit.quant_linears.naive import quant_linears

__all__ = ["quant_linears"]
