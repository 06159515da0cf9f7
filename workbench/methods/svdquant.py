"""SVDQuant: Absorbing Outliers by Low-Rank Components (Li et al., arXiv 2411.05007).

Smoothing searched by each layer's output error, a low-rank branch of the smoothed weight in 16 bits found by alternation, the
residual rounded to nearest, 64 weights and 64 activations to a scale. The rank is what a third of a bit per weight pays for: the
published 32 at 3072 x 3072, and as small a share of a small model. Layers that read one tensor share vector and branch.
"""

from workbench.methods.method import Method
from workbench.options import QuantConfig

METHOD = Method(
    name="svdquant",
    label="SVDQuant",
    quant=QuantConfig(transform="smooth", smoothing="search", solver="nearest", hessian="none", group_size=64, branch_bits=1 / 3,
                      act_scale="group", weight_grid="symmetric", act_grid="symmetric"),
    allocation="uniform",
    description="searched smoothing, low-rank branch, grouped residual",
    order=70,
)
