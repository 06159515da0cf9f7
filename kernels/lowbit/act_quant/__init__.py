"""Per-token dynamic activation quantization: `naive.py` is the reference, `emulated.py` the fast torch version."""

from lowbit.act_quant.naive import fake_quantize, quantize_per_token

__all__ = ["fake_quantize", "quantize_per_token"]
