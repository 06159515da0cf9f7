"""SmoothQuant: Accurate and Efficient Post-Training Quantization (Xiao et al., arXiv 2211.10438, equation 4).

Outliers of the activations are moved into the weights by a fixed alpha of 0.5; then plain rounding, weights per output
channel, activations per token. The largest magnitudes are taken over all steps; layers that read one tensor share the vector.
At four bits an outlier that has been moved is still an outlier: the method was made for eight.
"""

from workbench.methods.method import Method
from workbench.options import QuantConfig

METHOD = Method(
    name="smoothquant",
    label="SmoothQuant",
    quant=QuantConfig(transform="smooth", smoothing="fixed", smooth_alpha=0.5, solver="nearest", hessian="none", group_size=None,
                      weight_grid="symmetric", act_grid="symmetric"),
    allocation="uniform",
    description="outliers moved from activations to weights, nearest rounding",
    order=20,
)
