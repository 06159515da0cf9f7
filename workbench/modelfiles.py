"""What the files of a model folder say, read within bounds: JSON, the headers of safetensors and which files a checkpoint is made of.

Nothing here imports torch or runs a library of models, and no weight is read: model_info is made of the same answers as a load. Every
fault is a BadInput of one line that names the file, relative to the folder, the first tensor at fault and what would be right.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from workbench import folders, weightformats
from workbench.options import BadInput
from workbench.weightformats import shown

CONFIG_LIMIT_BYTES = 4_000_000
HEADER_LIMIT_BYTES = 8_000_000  # also of an index of shards; published ones have 1 MB at most, the format itself allows 100
VOCABULARY_LIMIT_BYTES = 64_000_000
LIBRARIES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # library: name of its weights
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MOST_AXES = 8
ITEM_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16,
             "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
             "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
SAVE_AGAIN = "save the pipeline again with save_pretrained"


class Stored(NamedTuple):
    """One tensor of a checkpoint: its type as safetensors names it, its shape, and the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The files that a library would read for one part, in order, and the tensors they hold. `folder` is the part's; `variant` the
    precision in the files' names, if any."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, Stored]
    variant: str | None = None


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Faults found inside begin with the model's name."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{shown(name)}: {error}") from error.__cause__


def label(path: Path) -> str:
    """A file as messages name it: its part and its name."""
    return f"{path.parent.name}/{shown(path.name)}"


def read_json(path: Path, where: str, limit_bytes: int = CONFIG_LIMIT_BYTES) -> dict:
    """The JSON object in a file; BadInput when there is none, or when it is larger than a file of its kind can be."""
    if not path.is_file():  # also a link to nothing, a folder, a pipe
        raise BadInput(f"{where} is missing; {SAVE_AGAIN}")
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise BadInput(f"{where} has {size:,} bytes; such a file has at most {limit_bytes:,}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{where} cannot be read as JSON ({type(error).__name__}); {SAVE_AGAIN}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{where} is a {type(found).__name__}; an object of names and values is needed")
    return found


def check_index(folder: Path, name: str) -> dict:
    """model_index.json of a pipeline; BadInput for a folder that has none, that is made of pickles, or whose index is malformed."""
    with named(name):
        pickle = _find_pickle(folder)
        if pickle and not list((folder / "transformer").glob("*.safetensors")):
            raise BadInput(f"{shown(pickle.name)} is a pickle, which is never opened; convert it to safetensors")
    if not (folder / folders.INDEX).exists():
        raise BadInput(f"{shown(name)} is no diffusers pipeline ({folders.INDEX} is missing); use a folder saved by save_pretrained")
    return read_index(folder, name)


def read_index(folder: Path, name: str) -> dict:
    """model_index.json, once every part in it is null or a class of a library that may be asked for one. Other files need not be there."""
    with named(name):
        return _read_index(folder)


def _read_index(folder: Path) -> dict:
    index = read_json(folder / folders.INDEX, folders.INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise BadInput(f"{folders.INDEX}: _class_name is {shown(index.get('_class_name'))!r}; the name of a pipeline's class is needed")
    for part, value in index.items():
        if part.startswith("_"):
            continue
        if not isinstance(value, list):
            if part.isidentifier() and (folder / part).is_dir():
                raise BadInput(f"model_index.json: {shown(part)} is {shown(value)!r}; [library, class] is needed")
            continue  # a setting of the pipeline, not a part
        if value == [None, None] or not _looks_like_part(folder, part, value):
            continue
        folders.plain_name(part, folders.INDEX)
        if len(value) != 2 or not all(isinstance(entry, str) and entry.isidentifier() for entry in value):
            raise BadInput(f"model_index.json: {shown(part)} is {shown(value)}; [library, class] is needed")
        if value[0] not in LIBRARIES:
            raise BadInput(f"model_index.json: {shown(part)} comes from {value[0]}; only {' and '.join(LIBRARIES)} are asked for a class")
    return index


def _looks_like_part(folder: Path, part: str, value: list) -> bool:
    return any(isinstance(entry, str) for entry in value) or not value or (part.isidentifier() and (folder / part).is_dir())


def parts(index: dict) -> dict[str, tuple[str, str]]:
    """Library and class of every part that a checked index says is there."""
    return {name: (value[0], value[1]) for name, value in index.items()
            if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)}


def _find_pickle(folder: Path) -> Path | None:
    """The first pickle in the folder or in one of its parts; nothing below is looked at."""
    places = [folder, *(entry for entry in _entries(folder) if entry.is_dir())]
    return next((path for place in places for path in _entries(place) if path.suffix in PICKLES), None)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise BadInput(f"{shown(folder.name)} cannot be read ({type(error).__name__}); a readable folder is needed") from None


def variant_on_disk(folder: Path, index: dict) -> str | None:
    """What diffusers calls the `variant` of a folder: None where every part has its weights under their plain names."""
    return next(filter(None, (folders.variant(path.name for path in (folder / part).glob("*.safetensors")) for part in parts(index))), None)


def check_lists(folder: Path, index: dict) -> None:
    """Raises BadInput where a list of shards or of a tokenizer's files names one that is not beside it."""
    for part in parts(index):
        for path, listed in _lists(folder / part):
            for name in listed:
                folders.plain_name(name, label(path))


def is_whole(folder: Path) -> bool:
    """Are all parts there, with every shard that their lists name? Downloads stop half-way."""
    try:
        names = parts(_read_index(folder))
        listed = [path.parent / str(name) for part in names for path, found in _lists(folder / part) for name in found]
    except BadInput:
        return False
    weights = list((folder / "transformer").glob("*.safetensors"))
    return bool(weights) and all((folder / part).is_dir() for part in names) and all(path.is_file() for path in listed)


def _lists(folder: Path) -> Iterator[tuple[Path, list]]:
    """Every file of a part that lists others, and what it lists."""
    for path in sorted(folder.glob("*.json")):
        if folders.lists_shards(path.name):
            yield path, list(dict.fromkeys(map(str, _weight_map(path).values())))
        elif path.name == "tokenizer_config.json":
            found = read_json(path, label(path)).get("fast_tokenizer_files") or []
            if not isinstance(found, list):
                raise BadInput(f"{label(path)}: fast_tokenizer_files is {shown(found)}; a list of file names is needed")
            yield path, found


def checkpoint(folder: Path, library: str, variant: str | None = None) -> Checkpoint:
    """The checkpoint of one part as its library would read it, every header checked, and its weights stored as floats. `variant`: the
    precision in its name that is taken first, as diffusers does; without it the plain name."""
    if (folder / "layers.json").is_file():
        raise BadInput(f"{folder.name} is of an exported checkpoint, which has no float weights; give the model it was made from")
    _no_adapter(folder)
    weightformats.refuse_config(read_json(folder / "config.json", f"{folder.name}/config.json"), f"{folder.name}/config.json")
    stem = LIBRARIES[library]
    for suffix in (f".{variant}", "") if variant else ("",):
        plain, index = folder / f"{stem}{suffix}.safetensors", folder / f"{stem}.safetensors.index{suffix}.json"
        if index.is_file() and (library == "diffusers" or not plain.is_file()):
            found = _sharded(index)
        elif plain.is_file():
            found = Checkpoint(folder=folder, files=(plain,), tensors=read_header(plain))
        else:
            continue
        found = replace(found, variant=suffix[1:] or None)
        break
    else:
        raise BadInput(_why_absent(folder, stem))
    weightformats.refuse(found.tensors, lambda name: label(found.tensors[name].file))
    if not found.tensors:
        raise BadInput(f"{label(found.files[0])} holds no tensor; {SAVE_AGAIN}")
    return found


def _no_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"{folder.name}/adapter_config.json belongs to an adapter; fuse it into the weights and save the pipeline again")


def _why_absent(folder: Path, stem: str) -> str:
    """What to say of a part without weights where they belong."""
    needed = f"{folder.name}/{stem}.safetensors"
    if not folder.is_dir():
        return f"{folder.name} is missing, which model_index.json names; {SAVE_AGAIN}"
    names = [path.name for path in _entries(folder)]
    if any(name.startswith(f"{stem}.") and name.endswith(".safetensors") for name in names):
        return (f"{needed} is missing; the variant there ({folders.variant(names)}) lacks its index or is not that of other parts: load "
                "it with diffusers and save the pipeline without one")
    pickle = next((name for name in names if Path(name).suffix in PICKLES), None)
    if pickle:
        return f"{shown(pickle)} is a pickle, which is never opened; convert it to safetensors"
    if any(name.endswith(".gguf") for name in names):
        return f"{needed} is missing; a GGUF file is already quantized; give the float model"
    others = [folder / name for name in names if name.endswith(".safetensors")]
    if others:
        weightformats.refuse(read_header(others[0]), lambda _name: label(others[0]))
        return f"{needed} is missing; {label(others[0])} is not a name that is read; {SAVE_AGAIN}"
    return f"{needed} is missing; {SAVE_AGAIN}"


def _sharded(index: Path) -> Checkpoint:
    """The checkpoint an index describes: every tensor once, in the shard that the index says."""
    where, weight_map = label(index), _weight_map(index)
    tensors: dict[str, Stored] = {}
    files = tuple(_shard(index, name) for name in sorted(set(weight_map.values())))
    for path in files:
        header = read_header(path)
        twice = next((name for name in header if name in tensors), None)
        if twice is not None:
            raise BadInput(f"{shown(twice)} is stored twice, in {label(tensors[twice].file)} and {label(path)}; {SAVE_AGAIN}")
        tensors |= header
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise BadInput(f"{index.parent.name}/{shown(file)} does not hold {shown(name)}, which {where} says; {SAVE_AGAIN}")
    extra = next((name for name in tensors if name not in weight_map), None)
    if extra is not None:
        raise BadInput(f"{label(tensors[extra].file)} holds {shown(extra)}, which {where} does not name; {SAVE_AGAIN}")
    return Checkpoint(folder=index.parent, files=files, tensors=tensors)


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index, label(index), HEADER_LIMIT_BYTES).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise BadInput(f"{label(index)} has no weight_map of tensors to files; {SAVE_AGAIN}")
    return found


def _shard(index: Path, name: str) -> Path:
    if os.path.basename(name) != name or not name.endswith(".safetensors") or "\\" in name or "\0" in name:
        raise BadInput(f"{label(index)} names {shown(name)}; only safetensors files beside it are read")
    if not (index.parent / name).is_file():
        raise BadInput(f"{index.parent.name}/{shown(name)} is missing, which {label(index)} names; download it")
    return index.parent / name


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, once its header and its length agree. At most HEADER_LIMIT_BYTES are read."""
    damaged = f"{label(path)} is damaged"
    if not path.is_file():
        raise BadInput(f"{label(path)} is no file; {SAVE_AGAIN}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(HEADER_LIMIT_BYTES, size - 8):
                raise BadInput(f"{damaged}: its header would have {length:,} bytes, the file has {size:,}; download or save it again")
            header = json.loads(file.read(length))
    except BadInput:
        raise
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise BadInput(f"{damaged}: its header cannot be read ({type(error).__name__}); download or save it again") from None
    if not isinstance(header, dict):
        raise BadInput(f"{damaged}: its header is no object; download or save it again")
    header.pop("__metadata__", None)
    return _placed(header, path, size - 8 - length)


def _placed(header: dict, path: Path, data_bytes: int) -> dict[str, Stored]:
    """The header's tensors, once they fill the file's data without gap or overlap."""
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            few = isinstance(shape, list) and len(shape) <= MOST_AXES
            if not few or not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, start, end)):
                raise ValueError
            if 8 * (end - start) != math.prod(shape) * ITEM_BITS[dtype]:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{label(path)} is damaged: the entry of {shown(name)} is wrong; download or save it again") from None
        tensors[name] = Stored(dtype, tuple(shape), path)
        spans.append((start, end, name))
    reached = 0
    for start, end, name in sorted(spans):
        if start != reached or end > data_bytes:
            raise BadInput(f"{label(path)} is cut short or damaged at {shown(name)}: it lies at bytes {start:,} to {end:,} of "
                           f"{data_bytes:,}; download or save it again")
        reached = end
    if reached != data_bytes:
        raise BadInput(f"{label(path)} is damaged: {data_bytes - reached:,} bytes are of no tensor; download it again")
    return tensors
