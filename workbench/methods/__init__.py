"""Every method by name. A method is one short file here: a composition of quant/ parts, nothing else."""

from workbench.methods import adatsq, adatsq_uniform, gptq, rtn
from workbench.methods.method import Method

METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in (rtn, gptq, adatsq_uniform, adatsq)}

__all__ = ["METHODS", "Method"]
