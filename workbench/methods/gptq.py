"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar et al., arXiv 2210.17323).

Weights per output channel, symmetric, solved column by column against the Hessian of the calibration inputs with one
percent damping; every calibration token counts alike. Each scale is searched for the least error, as QuaRot's
(arXiv 2404.00456) GPTQ does. Activations per token, dynamic, symmetric.
"""

from workbench.methods.method import Method
from workbench.options import QuantConfig

METHOD = Method(
    name="gptq",
    label="GPTQ",
    quant=QuantConfig(transform="none", solver="gptq", hessian="uniform", group_size=None, damping=0.01, weight_grid="symmetric",
                      act_grid="symmetric"),
    allocation="uniform",
    description="error-compensating rounding with searched scales, one per output channel",
    order=40,
)
