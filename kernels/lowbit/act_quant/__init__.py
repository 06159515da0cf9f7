"""Per-token dynamic activation quantization: `naive.py` is the reference, `cpu.c` the kernel, `emulated.py` the fast torch version."""

from lowbit.act_quant.naive import act_quant, fake_quantize, quantize_per_token

__all__ = ["act_quant", "fake_quantize", "quantize_per_token"]
