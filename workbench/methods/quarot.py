"""QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (Ashkboos et al., arXiv 2404.00456), its online rotations.

y = Q(xH) Q(WH)^T: a block Hadamard with random signs on every layer's input, since an adaptive norm does not commute with a
rotation of the residual stream. Weights per output channel by GPTQ with one percent damping and searched scales (here 16 ratios
by Hessian-weighted squared error, there 100 by a norm of 2.4); activations per token, symmetric, clipped at 0.9.
"""

from workbench.methods.method import Method
from workbench.options import QuantConfig

METHOD = Method(
    name="quarot",
    label="QuaRot",
    quant=QuantConfig(transform="hadamard", solver="gptq", hessian="uniform", group_size=None, damping=0.01, act_clip=0.9,
                      weight_grid="symmetric", act_grid="symmetric"),
    allocation="uniform",
    description="Hadamard, GPTQ, clipped activations",
    order=30,
)
