"""What a method is: a composition of quant/ parts and a way to spend activation bits."""

from dataclasses import dataclass

from workbench.options import QuantConfig


@dataclass(frozen=True, kw_only=True)
class Method:
    """allocation: "uniform" gives every layer and step the same bits, "plan" spends them by a searched plan."""

    name: str
    label: str
    quant: QuantConfig
    allocation: str
    description: str
