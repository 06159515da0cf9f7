"""Bytes before anything is quantized: of a layer under a choice, of what an input's layers share, of the modulation.

Dimension letters: T steps, N out features, K in features, R rank of a branch.

Everything a method stores is counted: codes, scales, zero points, biases, both factors of a branch, smoothing vectors, static
ranges, cached modulation. A test holds these sums against the tensors' storage, to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence

from workbench.options import BadInput, QuantConfig
from workbench.plans import BitChoice
from workbench.quant.calibration import input_groups
from workbench.quant.grids import predicted_bytes
from workbench.quant.lowrank import rank_of
from workbench.types import LayerInfo

MODULATION_GROUP = 64


def choice_of(bits: int, quant: QuantConfig) -> BitChoice:
    """How a layer is stored at a width."""
    return BitChoice(weight_bits=bits, group_size=quant.group_size, symmetric=quant.weight_grid != "asymmetric")


def modulation_choice(quant: QuantConfig) -> BitChoice:
    """How the adaLN linears are stored; their activations stay float."""
    return BitChoice(weight_bits=quant.modulation_bits, group_size=MODULATION_GROUP)


def ranks(layers: Sequence[LayerInfo], quant: QuantConfig) -> dict[str, int]:
    """Rank of every layer's branch, by name. Layers of one input share a branch: its rank follows from all their rows."""
    return {layer.name: rank_of(sum(each.n_out for each in group), layer.k_in, quant.branch_bits)
            for group in input_groups(layers) for layer in group}


def layer_bytes(layer: LayerInfo, choice: BitChoice, quant: QuantConfig, rank: int) -> int:
    """Bytes of a layer's own tensors."""
    up_bytes = 0 if choice.is_float else 2 * layer.n_out * rank
    range_bytes = 4 if quant.act_scale == "tensor" else 0
    return predicted_bytes(layer.n_out, layer.k_in, choice, layer.has_bias) + up_bytes + range_bytes


def shared_bytes(layers: Sequence[LayerInfo], quant: QuantConfig) -> int:
    """Bytes of smoothing vectors and of the branches' factor on the input side, once per input, whatever the layers' widths."""
    rank_of_layer = ranks(layers, quant)
    vectors = 1 if quant.transform.startswith("smooth") else 0
    return sum(2 * group[0].k_in * (vectors + rank_of_layer[group[0].name]) for group in input_groups(layers))


def modulation_bytes(modulation: Sequence[LayerInfo], quant: QuantConfig, steps: int) -> int:
    """Bytes of the adaLN linears: their weights, or with cached modulation their outputs at every step of one image."""
    if quant.modulation == "cached":
        if steps < 1:
            raise BadInput("cached modulation has a size only for a number of steps")
        return 2 * steps * sum(layer.n_out for layer in modulation)
    return sum(predicted_bytes(layer.n_out, layer.k_in, modulation_choice(quant), layer.has_bias) for layer in modulation)
