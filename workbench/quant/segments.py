"""A fused linear whose parts have widths of their own: each part is a layer, and this module stands in the fused one's place.

Letters: K in features, N out features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workbench.types import LayerInfo


class Segments(nn.Module):
    """Parts by output rows run side by side, parts by input columns are added up."""

    def __init__(self, layers: Sequence[LayerInfo], modules: Sequence[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self._columns = [layer.columns for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        if self._columns[0] is None:
            return torch.cat([part(x) for part in self.parts], -1)
        return sum(part(x[..., slice(*columns)]) for part, columns in zip(self.parts, self._columns))


def in_place(layers: Sequence[LayerInfo], modules: dict[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
    """Modules by layer name as modules by tree and dotted name in it, the parts of a fused linear together."""
    parts: dict[tuple[str, str], list[LayerInfo]] = {}
    for layer in layers:
        if layer.name in modules:
            parts.setdefault((layer.module, layer.module_name), []).append(layer)
    placed: dict[str, dict[str, nn.Module]] = {}
    for (tree, name), found in parts.items():
        made = [modules[layer.name] for layer in found]
        whole = found[0].rows is None and found[0].columns is None
        placed.setdefault(tree, {})[name] = made[0] if whole else Segments(found, made)
    return placed
