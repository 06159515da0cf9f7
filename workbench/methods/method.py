"""What a method is: a composition of quant/ parts and a way to spend activation bits."""

from dataclasses import dataclass

from workbench.options import QuantConfig


@dataclass(frozen=True, kw_only=True)
class Method:
    """allocation: "uniform" gives every layer and step the same bits, "plan" spends them by a searched plan. groups: "fixed"
    by the options, or "evolved", searched for every layer. order: its place in tables."""

    name: str
    label: str
    quant: QuantConfig
    allocation: str
    description: str
    order: int
    groups: str = "fixed"
