"""Weights that are no plain floats under the model's own names: told by the names and types of the tensors, before one is read.

A library would leave scales out, or take codes for values, and draw other images without a word; each form is refused by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from workbench.options import BadInput

FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "BOOL", "U16", "U32", "U64")  # of buffers such as position_ids; never of a weight
WANTED = "give the float model, in 16 or 32 bits"

# what shows it -> whose form it is; the first that fits is named
QUANTIZED = (
    (re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\."), "bitsandbytes (4 bits)"),
    (re.compile(r"\.(SCB|weight_format)$"), "bitsandbytes (8 bits)"),
    (re.compile(r"\.weight\._(data|scale|shift)\b|\.(weight|bias)\._data"), "quanto"),
    (re.compile(r"\.(wscales|wtscale|wcscales|wzeros|smooth_factor|smooth_factor_orig|lora_down|proj_down)$"), "nunchaku (SVDQuant)"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"(_weight_|\.weight:_?)(qdata|scale|zero_point)$"), "torchao"),
)
SCALES = re.compile(r"(^|\.)(scaled_fp8|comfy_quant|scale_weight|scale_input|weight_scale|weight_scale_2|weight_scale_inv|input_scale)$")
ORIGINAL = re.compile(r"(model\.diffusion_model|diffusion_model)\.|double_blocks\.\d+\.(img|txt)_(attn|mod|mlp)\.|"
                      r"single_blocks\.\d+\.(linear1|linear2|modulation)\.")


def shown(value) -> str:
    """Something from a file as it may stand in a line of text: printable and short."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(value)[:101])
    return text if len(text) <= 100 else f"{text[:97]}..."


def refuse(tensors: Mapping, file_of: Callable[[str], str]) -> None:
    """BadInput for the first tensor that is not a plain float, or a plain integer beside the weights. `tensors`: name to an object that
    has a `dtype`; `file_of` says in which file a name is."""
    for pattern, form in QUANTIZED:
        if found := next(filter(pattern.search, tensors), None):
            raise BadInput(f"{file_of(found)}: {shown(found)} shows weights already quantized by {form}; {WANTED}")
    if found := next(filter(SCALES.search, tensors), None):
        raise BadInput(f"{file_of(found)}: {shown(found)} is a scale of quantized weights (scaled FP8), which would be left "
                       f"out; {WANTED}")
    for name, tensor in tensors.items():
        weight = name.rpartition(".")[2] in ("weight", "bias")
        if tensor.dtype not in FLOATS and (weight or tensor.dtype not in INTEGERS):
            raise BadInput(f"{file_of(name)}: {shown(name)} is stored as {tensor.dtype}, already rounded to codes; {WANTED}")
    if found := next(filter(ORIGINAL.match, tensors), None):
        raise BadInput(f"{file_of(found)}: {shown(found)} is an original name (Black Forest Labs, ComfyUI), of a single file; "
                       "give a folder in the layout of diffusers")


def refuse_config(config: dict, where: str) -> None:
    """BadInput for a configuration that says its weights are quantized, or that names files or code outside of its part."""
    form = config.get("quantization_config")
    if form is not None:
        method = form.get("quant_method") if isinstance(form, dict) else None
        raise BadInput(f"{where}: the weights are already quantized by {shown(method or 'another tool')}; {WANTED}")
    if config.get("transformers_weights") is not None:
        raise BadInput(f"{where}: transformers_weights names another file; save the pipeline again with save_pretrained")
    if re.search(r'attn_implementation[^"]*": "[^"]*[/|:]', json.dumps(config)):
        raise BadInput(f"{where}: attn_implementation names code to be downloaded; remove it from the file")
