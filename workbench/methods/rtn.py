"""Round to nearest (RTN), the baseline of every paper on the subject.

Weights per output channel, symmetric, on the grid of the channel's largest magnitude; activations per token, dynamic,
symmetric. No transform and no calibration: what remains when every idea is taken away.
"""

from workbench.methods.method import Method
from workbench.options import QuantConfig

METHOD = Method(
    name="rtn",
    label="RTN",
    quant=QuantConfig(transform="none", solver="nearest", hessian="none", group_size=None, weight_grid="symmetric", act_grid="symmetric"),
    allocation="uniform",
    description="nearest rounding, one scale per output channel",
    order=10,
)
