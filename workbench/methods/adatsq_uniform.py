"""AdaTSQ's weights with the same activation bits at every step and layer.

Against `adatsq` it shows what the allocation of bits alone is worth, against `gptq` what transform, groups and Fisher
weighting are worth.
"""

from workbench.methods import adatsq
from workbench.methods.method import Method

METHOD = Method(
    name="adatsq_uniform",
    label="AdaTSQ, uniform bits",
    quant=adatsq.METHOD.quant,
    allocation="uniform",
    description="Hadamard, Fisher-weighted GPTQ, the same activation bits everywhere",
    order=80,
)
