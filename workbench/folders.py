"""Names in the folder of a diffusers pipeline: which of its files make the pipeline, on the disk and on the hub, and which names may
become paths. Names come from files that others wrote, so only plain ones do: no separator, no leading dot."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from workbench.options import BadInput

INDEX = "model_index.json"
SUFFIXES = (".json", ".txt", ".model", ".safetensors")  # of a part's files
ROOT_FILES = ("license*", "notice*", "attribution.md", "readme.md")  # what says whose the model is, in any case of letters
_PLAIN = re.compile(r"\w[\w.-]*", re.ASCII)
# model.safetensors, model-00001-of-00002.safetensors, and a copy in another precision: model.fp16.safetensors, its shards, its index
_WEIGHTS = re.compile(r"[^.]+(?:\.(?P<variant>.+?))?(?:-\d+-of-\d+)?\.safetensors")
_SHARD_INDEX = re.compile(r"[^.]+\.safetensors\.index(?:\.(?P<variant>.+))?\.json")


def plain_name(name: object, place: str) -> str:
    """The same name, if it can only be that of a file or folder right where it is used; raises BadInput otherwise. `place` wrote it."""
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        raise BadInput(f"{place} names {str(name)[:80]!r}, which is no plain file or folder name; save the pipeline again")
    return name


def read_index(path: Path, label: str) -> dict:
    """model_index.json, its class a text; raises BadInput. `label` names the model."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index["_class_name"], str):
            raise ValueError("its class is no text")
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{label}: {INDEX} cannot be read; save the pipeline again") from None
    return index


def parts_of(index: Mapping, label: str) -> tuple[str, ...]:
    """The pipeline's parts, each a folder: {"vae": ["diffusers", "AutoencoderKL"]}; [null, null] is one that it does without. Raises
    BadInput for a name that is no plain one."""
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    return tuple(plain_name(name, f"{label}: {INDEX}") for name in parts if any(entry is not None for entry in parts[name]))


def wanted(names: Iterable[str], parts: Iterable[str]) -> list[str]:
    """Of a repository's files, those that make the pipeline: what is at the root about its licence, and each part's own files; weights in
    another precision only where a part has no others."""
    names = list(names)
    found = [name for name in names if "/" not in name and (name == INDEX or is_about(name))]
    for part in parts:
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        found += [f"{part}/{name}" for name in _of_part(inside)]
    return found


def is_about(name: str) -> bool:
    """Is it a file that says whose the model is and what may be done with it?"""
    return any(fnmatchcase(name.lower(), pattern) for pattern in ROOT_FILES)


def _of_part(names: Iterable[str]) -> list[str]:
    names = [name for name in names if _PLAIN.fullmatch(name) and name.endswith(SUFFIXES)]
    chosen = variant(names)
    return [name for name in names if _variant_of(name) in (None, chosen)]


def variant(names: Iterable[str]) -> str:
    """The precision of the weights to take among a part's files: the one without a name, else half precision, else the first."""
    found = {_variant_of(name) for name in names if name.endswith(".safetensors")}
    return min(found, key=lambda each: (each != "", each not in ("fp16", "bf16"), each), default="")


def _variant_of(name: str) -> str | None:
    """None for a file that is neither weights nor an index of them."""
    match = _WEIGHTS.fullmatch(name) or _SHARD_INDEX.fullmatch(name)
    return (match["variant"] or "") if match else None


def variant_on_disk(folder: Path) -> str | None:
    """What diffusers calls the `variant` of a folder: None where every part has its weights under their plain names."""
    parts = parts_of(read_index(folder / INDEX, folder.name), folder.name)
    return next(filter(None, (variant(path.name for path in (folder / part).glob("*.safetensors")) for part in parts)), None)


def check_names(folder: Path, parts: Iterable[str], label: str) -> None:
    """Raises BadInput where a list of shards or of a tokenizer's files names one that is not beside it."""
    for part in parts:
        for path, listed in _lists(folder / part, label):
            for name in listed:
                plain_name(name, f"{label}: {path.relative_to(folder).as_posix()}")


def is_whole(folder: Path) -> bool:
    """Are all parts there, with every shard that their lists name? Downloads stop half-way."""
    try:
        parts = parts_of(read_index(folder / INDEX, folder.name), folder.name)
        listed = [path.parent / str(name) for part in parts for path, names in _lists(folder / part, folder.name) for name in names]
    except BadInput:
        return False
    weights = list((folder / "transformer").glob("*.safetensors"))
    return bool(weights) and all((folder / part).is_dir() for part in parts) and all(path.is_file() for path in listed)


def _lists(folder: Path, label: str) -> Iterator[tuple[Path, list]]:
    """Every file of a part that lists others, and what it lists."""
    for path in sorted(folder.glob("*.json")):
        shards = _SHARD_INDEX.fullmatch(path.name)
        if not shards and path.name != "tokenizer_config.json":
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            yield path, list(dict.fromkeys(content["weight_map"].values())) if shards else list(content.get("fast_tokenizer_files", ()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{label}: {path.parent.name}/{path.name} cannot be read; save the pipeline again") from None


def own_file(path: Path, folder: Path) -> Path:
    """The path, if the file is the folder's own: a link may lead to another place in it or, in the hub's cache, to the snapshot's blobs.
    Raises BadInput for a link that leads elsewhere: a copy of the folder would take along what is there."""
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    if root not in path.resolve().parents:
        raise BadInput(f"{path.relative_to(folder).as_posix()} is a link to a file outside {folder}; put the file itself there")
    return path
