"""AdaTSQ with Q-DiT's activation quantizer, 64 activations of one token to a scale, asymmetric, instead of a mid-rise grid per
token: weights, calibration and the search of bits are AdaTSQ's."""

from workbench.methods import adatsq
from workbench.methods.method import Method

METHOD = Method(
    name="adatsq_grouped",
    label="AdaTSQ, grouped",
    quant=adatsq.METHOD.quant.model_copy(update={"act_scale": "group", "act_grid": "asymmetric"}),
    allocation="plan",
    description="Hadamard, Fisher-weighted GPTQ, asymmetric grouped activations with bits by step and layer",
    order=110,
)
