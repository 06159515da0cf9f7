"""The configuration of one part, held against its class in diffusers or transformers: types, sizes and whether it can be built.

Classes are only ever looked up as attributes of these two libraries; nothing that a file names is imported.
"""

from __future__ import annotations

import inspect
import json
import math
import threading
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from workbench import modelfiles
from workbench.modelfiles import shown
from workbench.options import BadInput

MOST_STEPS = 1_000_000  # no number of a scheduler's configuration is larger
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", list: "a list", tuple: "a list", dict: "an object",
         type(None): "null"}


def one_line(error: BaseException) -> str:
    """An error of a library in one line."""
    return shown(" ".join(str(error).split()) or type(error).__name__)


def find_class(library: str, name: str):
    """The class of that name, if the library has one that can be loaded from a folder; BadInput otherwise."""
    import diffusers
    import transformers

    try:
        found = getattr({"diffusers": diffusers, "transformers": transformers}[library], name, None)
    except Exception:  # lazily imported modules raise what they like where something they need is not installed
        found = None
    if not isinstance(found, type) or not hasattr(found, "from_pretrained") or getattr(found, "_backends", None):
        raise BadInput(f"model_index.json: {library} has no class {shown(name)} here; use classes of the installed version")
    return found


def part_classes(index: dict, family: str) -> dict[str, type]:
    """The class of every part of a pipeline, each of the kind that the pipeline asks for."""
    import diffusers

    pipeline = getattr(diffusers, family)
    wanted, optional = pipeline._get_signature_types(), pipeline._optional_components
    found = {}
    for part, (library, name) in modelfiles.parts(index).items():
        if part not in wanted:
            raise BadInput(f"model_index.json: {family} has no part {shown(part)}; its parts are {', '.join(sorted(wanted))}")
        found[part] = find_class(library, name)
        if not _is_kind(found[part], part, wanted[part]):
            names = " or ".join(kind.__name__ for kind in wanted[part])
            raise BadInput(f"model_index.json: {part} is a {shown(name)}; {family} needs a {names}")
    absent = next((part for part in wanted if part not in found and part not in optional), None)
    if absent:
        raise BadInput(f"model_index.json names no {absent}, which {family} needs; {modelfiles.SAVE_AGAIN}")
    return found


def _is_kind(found: type, part: str, wanted: tuple) -> bool:
    from diffusers import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

    if "scheduler" in part:  # any may be asked for; which of them a family can integrate is decided elsewhere
        return issubclass(found, SchedulerMixin)
    if "tokenizer" in part:
        return issubclass(found, PreTrainedTokenizerBase)
    models = tuple(kind for kind in wanted if isinstance(kind, type) and issubclass(kind, torch.nn.Module))
    return issubclass(found, models) if models else not issubclass(found, torch.nn.Module)


# Types.

def check_types(cls: type, config: dict, where: str) -> None:
    """Every setting of a diffusers configuration has the type that its class declares, or that of its default. Annotations there are
    loose, so what contradicts both is refused and nothing else."""
    try:
        hints = typing.get_type_hints(cls.__init__)
    except Exception:  # annotations of names that are only imported for type checkers
        hints = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name not in config:
            continue
        value, default = config[name], parameter.default
        hint = hints.get(name, typing.Any)
        if not _fits(value, hint, default is None) and (default is parameter.empty or not _like(value, default)):
            raise BadInput(f"{where}: {name} is {shown(json.dumps(value))}; {_words(hint, default)} is needed")
        if _infinite(value) and value != default:
            raise BadInput(f"{where}: {name} is {shown(value)}; a finite number is needed")


def _fits(value, hint, loose: bool = False) -> bool:
    """Can a value from JSON be meant by an annotation? `loose`: of a setting without default, where bool is written for a number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, kind, loose) for kind in inner)
    if origin is typing.Literal:
        return any(type(value) is type(choice) for choice in inner)
    kind = origin or hint
    if kind is bool and loose:
        return isinstance(value, int | float)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (int, bool, str, type(None)):
        return type(value) is kind
    if kind in (list, tuple):
        kinds = [kind for kind in inner if kind is not Ellipsis]
        return isinstance(value, list) and all(not kinds or any(_fits(entry, kind) for kind in kinds) for entry in value)
    return isinstance(value, dict) if kind is dict else True


def _like(value, default) -> bool:
    """Has a value from JSON the type of a default, and its entries that of the default's?"""
    if isinstance(default, list | tuple):
        return isinstance(value, list) and all(not default or any(_like(entry, other) for other in default) for entry in value)
    return _fits(value, type(default))


def _words(hint, default) -> str:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    words = [WORDS.get(typing.get_origin(kind) or kind, "") for kind in kinds]
    return " or ".join(filter(None, words)) or WORDS.get(type(default), "another type")


def _infinite(value) -> bool:
    if isinstance(value, list):
        return any(map(_infinite, value))
    return isinstance(value, float) and not math.isfinite(value)


# Sizes.

@contextmanager
def on_meta(tensors: int, where: str) -> Iterator[None]:
    """Modules made here have no memory, and a configuration of many more parameters than the `tensors` stored is stopped
    while it is built."""
    limit, made, thread = 8 * tensors + 2000, 0, threading.get_ident()

    def count(_module, _name, parameter):
        nonlocal made
        made += parameter is not None and threading.get_ident() == thread
        if made > limit:
            raise BadInput(f"{where} describes more than {limit:,} tensors, {tensors:,} are stored; give this model's configuration")

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    except BadInput:
        raise
    except Exception as error:  # whatever a class raises at a configuration that it cannot be built from
        raise BadInput(f"{where} describes no model that can be built ({one_line(error)}); {modelfiles.SAVE_AGAIN}") from error
    finally:
        hook.remove()


# Schedulers.

def check_scheduler(folder: Path, cls: type) -> None:
    """The scheduler can be made: its file is of its class, with settings of the right types, and its noise levels are numbers."""
    where = f"{folder.name}/scheduler_config.json"
    config = modelfiles.read_json(folder / "scheduler_config.json", where)
    if config.get("_class_name") != cls.__name__:
        raise BadInput(f"{where} is of {shown(config.get('_class_name'))}; model_index.json says {cls.__name__}")
    check_types(cls, config, where)
    large = next((name for name, value in config.items() if isinstance(value, int | float) and MOST_STEPS < abs(value) < math.inf), None)
    if large:
        raise BadInput(f"{where}: {shown(large)} is {shown(config[large])}; at most {MOST_STEPS:,} is possible")
    try:
        scheduler = cls.from_config(config)
        levels = [torch.as_tensor(level) for name in ("sigmas", "timesteps") if (level := getattr(scheduler, name, None)) is not None]
    except Exception as error:  # each scheduler raises its own
        raise BadInput(f"{where} describes no {cls.__name__} that can be made ({one_line(error)})") from error
    if any(bool(level.isnan().any()) for level in levels):
        raise BadInput(f"{where}: its noise levels are not numbers; give the settings the model was trained with")
