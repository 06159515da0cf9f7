"""AdaTSQ with 64 activations to a scale, as Q-DiT and SVDQuant have them, instead of one scale per token."""

from workbench.methods import adatsq
from workbench.methods.method import Method

METHOD = Method(
    name="adatsq_grouped",
    label="AdaTSQ, grouped",
    quant=adatsq.METHOD.quant.model_copy(update={"act_scale": "group"}),
    allocation="plan",
    description="Hadamard, Fisher-weighted GPTQ, grouped activations with bits by step and layer",
    order=110,
)
