"""Bytes before anything is quantized: of a layer under a choice, of what siblings share, of cached modulation.

Dimension letters: T steps, N out features, K in features, R rank of a branch.

Everything a method stores is counted: codes, scales, zero points, biases, both factors of a branch, smoothing vectors, static
ranges, cached modulation. A test holds these sums against the tensors' storage, to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence

from workbench.options import BadInput, QuantConfig
from workbench.plans import BitChoice
from workbench.quant.calibration import fused_groups
from workbench.quant.grids import predicted_bytes
from workbench.quant.lowrank import rank_of
from workbench.types import LayerInfo


def ranks(layers: Sequence[LayerInfo], quant: QuantConfig) -> dict[str, int]:
    """Rank of every layer's branch, by name. Siblings share a branch: its rank follows from all their rows."""
    return {layer.name: rank_of(sum(each.n_out for each in group), layer.k_in, quant.branch_bits) if layer.has_act_bits else 0
            for group in fused_groups(layers) for layer in group}


def layer_bytes(layer: LayerInfo, choice: BitChoice, quant: QuantConfig, rank: int) -> int:
    """Bytes of a layer's own tensors; none of a modulation layer whose outputs are cached."""
    if not layer.has_act_bits:
        return 0 if quant.modulation == "cached" else predicted_bytes(layer.n_out, layer.k_in, choice, layer.has_bias)
    up_bytes = 0 if choice.is_float else 2 * layer.n_out * rank
    range_bytes = 4 if quant.act_scale == "tensor" else 0
    return predicted_bytes(layer.n_out, layer.k_in, choice, layer.has_bias) + up_bytes + range_bytes


def shared_bytes(layers: Sequence[LayerInfo], quant: QuantConfig) -> int:
    """Bytes of smoothing vectors and of the branches' factor on the input side, once per input, whatever the layers' widths."""
    rank_of_layer = ranks(layers, quant)
    vectors = 1 if quant.transform.startswith("smooth") else 0
    return sum(2 * group[0].k_in * (vectors + rank_of_layer[group[0].name]) for group in fused_groups(layers) if group[0].has_act_bits)


def cached_bytes(layers: Sequence[LayerInfo], quant: QuantConfig, steps: int) -> int:
    """Bytes of the modulation's outputs at every step of one image, where they are cached in place of its weights."""
    if quant.modulation != "cached":
        return 0
    if steps < 1:
        raise BadInput("cached modulation has a size only for a number of steps")
    return 2 * steps * sum(layer.n_out for layer in layers if not layer.has_act_bits)
