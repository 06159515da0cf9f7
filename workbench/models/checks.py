"""Whether the parts of a pipeline are what they say they are, checked before they are loaded, and loading them.

Diffusers and transformers fill tensors that a checkpoint lacks with noise, leave out what they do not know and load NaN: each would draw
other images without an error. Here every part is built on the meta device first, so a refusal takes no memory for weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from workbench import modelfiles
from workbench.modelfiles import Checkpoint, label, shown
from workbench.models import configs
from workbench.models.fit import FITS
from workbench.options import BadInput
from workbench.weightformats import FLOATS

OF_ONE_MODEL = "configuration and weights must be of one model"
_PROBE = "a photo of a cat"


def open_pipeline(folder: Path, name: str, dtype: torch.dtype, transformer: torch.nn.Module | None = None):
    """The pipeline in a folder, every part checked and loaded in `dtype`; a `transformer` that is given is taken as it is. BadInput names
    the first fault."""
    import diffusers

    given = {} if transformer is None else {"transformer": transformer}
    index = modelfiles.check_index(folder, name)
    with modelfiles.named(name):
        tokenizers = check_parts(folder, index, given, dtype)
        try:
            pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(
                str(folder), dtype=dtype, use_safetensors=True, local_files_only=True,
                variant=modelfiles.variant_on_disk(folder, index), **given, **tokenizers)
        except Exception as error:  # the libraries raise many kinds at a folder that is not whole
            raise BadInput(f"the pipeline cannot be loaded ({configs.one_line(error)}); "
                           "a complete folder saved by save_pretrained is needed") from error
        _check_loaded(pipeline)
    return pipeline


def check_parts(folder: Path, index: dict, given: Mapping[str, torch.nn.Module], dtype: torch.dtype) -> dict:
    """Check every part that a pipeline's index names and that is not `given`; returns the tokenizers, which are loaded by then."""
    from diffusers import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

    family = index["_class_name"]
    models, tokenizers, checkpoints = dict(given), {}, []
    variant = modelfiles.variant_on_disk(folder, index)
    for part, cls in configs.part_classes(index, family).items():
        if part in given:
            continue
        if not (folder / part).is_dir():
            raise BadInput(f"{part} is missing, which model_index.json names; {modelfiles.SAVE_AGAIN}")
        if issubclass(cls, SchedulerMixin):
            configs.check_scheduler(folder / part, cls)
        elif issubclass(cls, PreTrainedTokenizerBase):
            tokenizers[part] = open_tokenizer(folder / part, cls)
        elif issubclass(cls, torch.nn.Module):
            checkpoints.append(modelfiles.checkpoint(folder / part, index[part][0], variant))
            models[part] = check_model(checkpoints[-1], cls)
    if family in FITS:
        FITS[family](models, tokenizers)
    for checkpoint in checkpoints:  # last: the only check that reads weights
        check_values(checkpoint, dtype)
    return tokenizers


def empty_transformer(folder: Path, tensors: int) -> torch.nn.Module:
    """The transformer that a pipeline's configuration describes, on the meta device. `tensors`: about how many it should have."""
    index = modelfiles.check_index(folder, folder.name)
    cls = configs.part_classes(index, index["_class_name"])["transformer"]
    where = "transformer/config.json"
    config = modelfiles.read_json(folder / where, where)
    configs.check_types(cls, config, where)
    with configs.on_meta(tensors, where):
        return cls.from_config(config)


def check_model(checkpoint: Checkpoint, cls: type) -> torch.nn.Module:
    """The model on the meta device, once names, shapes and types of its tensors are those of the checkpoint."""
    from diffusers import ModelMixin

    where = f"{checkpoint.folder.name}/config.json"
    config = modelfiles.read_json(checkpoint.folder / "config.json", where)
    if not issubclass(cls, ModelMixin):
        model = _check_transformers(checkpoint, cls, where)
    else:
        if config.get("_class_name", cls.__name__) != cls.__name__:
            raise BadInput(f"{where} is of {shown(config['_class_name'])}; model_index.json says {cls.__name__}")
        configs.check_types(cls, config, where)
        with configs.on_meta(len(checkpoint.tensors), where):
            model = cls.from_config(config)
            stored = {name: torch.empty(tensor.shape, device="meta") for name, tensor in checkpoint.tensors.items()}
            if len(checkpoint.files) == 1:
                model._fix_state_dict_keys_on_load(stored)  # as the library itself does for names of older versions
        _compare(checkpoint, model, {name: tuple(tensor.shape) for name, tensor in stored.items()})
    _check_memory(checkpoint, model, where)
    return model


def _compare(checkpoint: Checkpoint, model: torch.nn.Module, stored: Mapping[str, tuple]) -> None:
    """Names and shapes a diffusers model needs against those it would be given."""
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    missing = [name for name in needed if name not in stored]
    extra = [name for name in stored if name not in needed and not any(pattern.search(name) for pattern in ignored)]
    _refuse_names(checkpoint, missing, extra)
    wrong = next((name for name in needed if needed[name] != stored[name]), None)
    if wrong:
        _refuse_shape(checkpoint, wrong, stored[wrong], needed[wrong])
    _check_types(checkpoint, model)


def _check_transformers(checkpoint: Checkpoint, cls: type, where: str) -> torch.nn.Module:
    """The same for a model of transformers, which renames and ties tensors as it loads: its own loading, on the meta device, is asked."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing tensors becomes the refusal below
    try:
        with configs.on_meta(len(checkpoint.tensors), where):
            model, info = cls.from_pretrained(str(checkpoint.folder), device_map={"": "meta"}, output_loading_info=True,
                                              ignore_mismatched_sizes=True, local_files_only=True, use_safetensors=True,
                                              variant=checkpoint.variant)
    finally:
        logging.set_verbosity(verbosity)
    buffers = {name for name, _ in model.named_buffers()}  # such as position_ids, which older versions stored
    extra = [name for name in info["unexpected_keys"] if not any(buffer.endswith(name) or name.endswith(buffer) for buffer in buffers)]
    _refuse_names(checkpoint, sorted(info["missing_keys"]), sorted(extra))
    for name, found, needed in sorted(info["mismatched_keys"]):
        _refuse_shape(checkpoint, name, found, needed)
    if info["error_msgs"]:
        raise BadInput(f"{label(checkpoint.files[0])}: {shown(info['error_msgs'][0])}; {OF_ONE_MODEL}")
    _check_types(checkpoint, model)
    return model


def _refuse_names(checkpoint: Checkpoint, missing: list[str], extra: list[str]) -> None:
    if missing:
        raise BadInput(f"{_files(checkpoint)} lacks {shown(missing[0])} ({len(missing)} of the model's tensors); {OF_ONE_MODEL}")
    if extra:
        name = extra[0]
        file = label(checkpoint.tensors[name].file) if name in checkpoint.tensors else _files(checkpoint)
        raise BadInput(f"{file} holds {shown(name)}, which config.json does not describe ({len(extra)} such tensors); {OF_ONE_MODEL}")


def _refuse_shape(checkpoint: Checkpoint, name: str, found, needed) -> None:
    file = label(checkpoint.tensors[name].file) if name in checkpoint.tensors else _files(checkpoint)
    raise BadInput(f"{file}: {shown(name)} is {tuple(found)}, config.json describes {tuple(needed)}; {OF_ONE_MODEL}")


def _files(checkpoint: Checkpoint) -> str:
    files = checkpoint.files
    return label(files[0]) if len(files) == 1 else f"{checkpoint.folder.name} ({len(files)} files)"


def _check_types(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """No integer stands where the model computes with floats, nor the other way round."""
    for name, tensor in model.state_dict().items():
        stored = checkpoint.tensors.get(name)
        if stored is not None and tensor.is_floating_point() != (stored.dtype in FLOATS):
            raise BadInput(f"{label(stored.file)}: {shown(name)} is stored as {stored.dtype}; the model needs {str(tensor.dtype)[6:]}")


def _check_memory(checkpoint: Checkpoint, model: torch.nn.Module, where: str) -> None:
    """What loading makes beside the stored weights (buffers, computed from the configuration) is no more than these and 64 MB."""
    stored = sum(tensor.numel for tensor in checkpoint.tensors.values())
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if buffers > stored + 16_000_000:
        raise BadInput(f"{where} asks for tables of {buffers:,} numbers beside {stored:,} weights; give the configuration of this model")


def check_values(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Every weight is a number and stays one in `dtype`. One tensor is in memory at a time."""
    largest = torch.finfo(dtype).max
    for path in checkpoint.files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    stored = checkpoint.tensors[name]
                    if stored.dtype not in FLOATS or not stored.numel:
                        continue
                    low, high = torch.aminmax(file.get_tensor(name))  # both are NaN where one value is
                    if not -largest <= float(low) <= float(high) <= largest:
                        raise BadInput(f"{label(path)}: {shown(name)} holds NaN or infinity; every weight must be a finite number")
        except (SafetensorError, OSError, RuntimeError, KeyError) as error:
            raise BadInput(f"{label(path)} cannot be read ({configs.one_line(error)}); download or save it again") from error


def open_tokenizer(folder: Path, cls: type):
    """The tokenizer of a folder, once it has a length limit and turns a sentence into ids of its own vocabulary."""
    where = f"{folder.name}/tokenizer_config.json"
    limit = modelfiles.read_json(folder / "tokenizer_config.json", where).get("model_max_length", 1)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 1 <= limit < math.inf:
        raise BadInput(f"{where}: model_max_length is {shown(limit)}; a number of tokens, at least 1, is needed")
    large = next((path for path in folder.iterdir() if path.is_file() and path.stat().st_size > modelfiles.VOCABULARY_LIMIT_BYTES), None)
    if large:
        raise BadInput(f"{label(large)} has {large.stat().st_size:,} bytes; at most {modelfiles.VOCABULARY_LIMIT_BYTES:,} are read")
    try:
        tokenizer = cls.from_pretrained(str(folder), local_files_only=True)
        ids = tokenizer(_PROBE).input_ids
    except Exception as error:  # tokenizers raise many kinds, bare exceptions among them
        raise BadInput(f"{folder.name} is no {cls.__name__} that can be loaded ({configs.one_line(error)}); "
                       f"{modelfiles.SAVE_AGAIN}") from error
    if not ids or not all(isinstance(number, int) and 0 <= number < len(tokenizer) for number in ids):
        raise BadInput(f"{folder.name} turns a sentence into tokens that are not in its vocabulary; {modelfiles.SAVE_AGAIN}")
    return tokenizer


def _check_loaded(pipeline) -> None:
    """No part was left without memory."""
    for part, model in pipeline.components.items():
        if isinstance(model, torch.nn.Module):
            empty = next((name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta), None)
            if empty:
                raise BadInput(f"{part}: {empty} was not loaded; {modelfiles.SAVE_AGAIN}")
