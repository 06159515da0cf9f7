"""Q-DiT: Accurate Post-Training Quantization for Diffusion Transformers (Chen et al., arXiv 2406.17343).

Weights and activations share a group size along the input features, asymmetric both; weights by GPTQ, activations dynamic per
token and group. The group size of every layer is found by evolutionary search, here on the end-to-end error of the latents, and
within the bytes of the uniform group size below.
"""

from workbench.methods.method import Method
from workbench.options import QuantConfig

METHOD = Method(
    name="qdit",
    label="Q-DiT",
    quant=QuantConfig(transform="none", solver="gptq", hessian="uniform", weight_grid="asymmetric", group_size=64, damping=0.01,
                      act_scale="group", act_grid="asymmetric"),
    allocation="uniform",
    groups="evolved",
    description="asymmetric groups of evolved size, GPTQ",
    order=60,
)
