"""ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers (Zhao et al., arXiv 2406.02540), at one width.

Smoothing with alpha 0.3, then a Hadamard transform; weights per output channel and activations per token, both asymmetric,
rounded to nearest. Its mixed precision by hand-ranked layer groups is not part of this comparison.
"""

from workbench.methods.method import Method
from workbench.options import QuantConfig

METHOD = Method(
    name="viditq",
    label="ViDiT-Q",
    quant=QuantConfig(transform="smooth_hadamard", smoothing="fixed", smooth_alpha=0.3, solver="nearest", hessian="none",
                      weight_grid="asymmetric", group_size=None, act_grid="asymmetric"),
    allocation="uniform",
    description="smoothing, then Hadamard, asymmetric nearest rounding",
    order=50,
)
