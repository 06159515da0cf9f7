"""How layers are grouped and named on every screen."""

from __future__ import annotations


def blocks_of(layers) -> dict[str, list[int]]:
    """Block name to the indices of its layers, in forward order."""
    blocks: dict[str, list[int]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer.index)
    return blocks


def layer_labels(layers) -> list[str]:
    """Block and what follows the path that all layers of the block share: single.1 attn.to_q."""
    labels = [""] * len(layers)
    for block, members in blocks_of(layers).items():
        paths = [layers[i].name.split(".")[:-1] for i in members]
        shared = 0
        while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
            shared += 1
        for i in members:
            labels[i] = f"{block} {'.'.join(layers[i].name.split('.')[shared:])}"
    return labels


def spans(numbers) -> str:
    """Whole numbers in words: 17, 18, 19, 3 -> "3, 17–19"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
