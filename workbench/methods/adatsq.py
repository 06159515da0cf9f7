"""AdaTSQ: temporal-sensitivity quantization of diffusion transformers (arXiv 2602.09883).

Weights solved by GPTQ against the Hessian weighted by temporal Fisher information, after a block Hadamard with random
signs (the paper does not name its base transform), 64 weights to a scale of either sign. Activations per token on a mid-rise grid, their
bits by step and layer from the Pareto-aware beam search.
"""

from workbench.methods.method import Method
from workbench.options import QuantConfig

METHOD = Method(
    name="adatsq",
    label="AdaTSQ",
    quant=QuantConfig(transform="hadamard", solver="gptq", hessian="fisher", group_size=64),
    allocation="plan",
    description="Hadamard, Fisher-weighted GPTQ, activation bits by step and layer",
    order=90,
)
