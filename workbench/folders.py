"""Names in the folder of a diffusers pipeline: which of its files make the pipeline, on the disk and on the hub, and which names may
become paths. Names come from files that others wrote, so only plain ones do: no separator, no leading dot. What the files say is read in
`modelfiles.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from workbench.options import BadInput

INDEX = "model_index.json"
SUFFIXES = (".json", ".txt", ".jinja", ".model", ".safetensors")  # of a part's files
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


def lists_shards(name: str) -> bool:
    """Is a file of this name one that says which tensor lies in which shard?"""
    return _SHARD_INDEX.fullmatch(name) is not None


def own_file(path: Path, folder: Path) -> Path:
    """The path, if the file is the folder's own: a link may lead to another place in it or, in the hub's cache, to the snapshot's blobs.
    Raises BadInput for a link that leads elsewhere: a copy of the folder would take along what is there."""
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    if root not in path.resolve().parents:
        raise BadInput(f"{path.relative_to(folder).as_posix()} is a link to a file outside {folder}; put the file itself there")
    return path
