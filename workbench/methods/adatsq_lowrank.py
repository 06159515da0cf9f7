"""AdaTSQ on a Hadamard transform with a low-rank branch: SVDQuant's branch of a third of a bit, its residual solved by
Fisher-weighted GPTQ, grouped activations like SVDQuant's, activation bits by step and layer."""

from workbench.methods import adatsq
from workbench.methods.method import Method

METHOD = Method(
    name="adatsq_lowrank",
    label="AdaTSQ, low rank",
    quant=adatsq.METHOD.quant.model_copy(update={"branch_bits": 1 / 3, "act_scale": "group"}),
    allocation="plan",
    description="Hadamard, low-rank branch, Fisher-weighted GPTQ, grouped activations with bits by step and layer",
    order=120,
)
