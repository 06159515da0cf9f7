"""AdaTSQ on searched smoothing instead of a Hadamard transform: the same Fisher calibration, the same search of activation bits.

The grid of the activations has a level at zero: where outliers stay in an input, most of its values are near there.
"""

from workbench.methods import adatsq
from workbench.methods.method import Method

METHOD = Method(
    name="adatsq_smooth",
    label="AdaTSQ on smoothing",
    quant=adatsq.METHOD.quant.model_copy(update={"transform": "smooth", "smoothing": "search", "act_grid": "symmetric"}),
    allocation="plan",
    description="searched smoothing, Fisher-weighted GPTQ, activation bits by step and layer",
    order=100,
)
