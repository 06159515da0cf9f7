"""Run folders: results stored under the hash of what they were made from, written atomically, so work can be resumed.

An artifact is `<stage>-<key>.safetensors` (tensors plus JSON metadata) or `<stage>-<key>.json`. A file takes its final
name only after all its bytes are on the disk, and a file that cannot be read whole counts as absent, as does one that other
code has made: artifacts carry the version of theirs. Never a pickle.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
import types
import typing
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from workbench.options import BadInput

NOT_COMPUTING = ("ui", "shipped", "cli.py", "commands.py", "commands_judging.py", "terminal.py", "flags.py", "jobs.py", "__main__.py")
RUN_MARKER = "run.json"
RUN_FORMAT = "adatsq-run-1"
METADATA_KEY = "adatsq"
POSIX = os.name == "posix"


@functools.cache
def code_version() -> str:
    """Hash of the sources that compute: everything here but the screen and the shell, and the kernels. What other sources have made is
    not read as today's."""
    package = Path(__file__).resolve().parent
    kernels = Path(sys.modules["lowbit"].__file__).resolve().parent
    files = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in NOT_COMPUTING]
    digest = hashlib.sha256()
    for path in sorted([*files, *kernels.rglob("*.py"), *kernels.rglob("*.c"), *kernels.rglob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# Freezing: a result as named tensors and JSON. Thawing is driven by the type hints of the class, so a file decides
# what a result contains but never which code runs.

def freeze(value) -> tuple[dict[str, torch.Tensor], object]:
    """(tensors, json) of a nested dataclass or pydantic model; containers may be tuples, lists and dicts."""
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()

    def keep(tensor: torch.Tensor, path: str):
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # Two views of one storage cannot go into one file, and a small view must not drag a large storage along.
        if storage.data_ptr() in storages or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        while path in tensors:
            path += "_"
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[path] = tensor
        return {"tensor": path}

    def visit(node, path: str):
        if node is None or isinstance(node, bool | int | str):
            return node
        if isinstance(node, float):
            return node if np.isfinite(node) else {"float": repr(node)}
        if isinstance(node, torch.Tensor):
            return keep(node, path)
        if isinstance(node, np.ndarray):
            return {"array": keep(torch.from_numpy(np.ascontiguousarray(node)), path)["tensor"]}
        if isinstance(node, BaseModel):
            return {"model": node.model_dump(mode="json")}
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            names = [f.name for f in dataclasses.fields(node) if f.init]
            return {"fields": {name: visit(getattr(node, name), f"{path}.{name}".lstrip(".")) for name in names}}
        if isinstance(node, tuple | list):
            return {"tuple" if isinstance(node, tuple) else "list": [visit(v, f"{path}.{i}") for i, v in enumerate(node)]}
        if isinstance(node, dict):
            return {"pairs": [[visit(k, ""), visit(v, f"{path}.{k}")] for k, v in node.items()]}
        raise TypeError(f"{path or 'value'} is a {type(node).__name__}, which a run folder cannot hold")

    return tensors, visit(value, "")


def thaw(hint, tensors: dict[str, torch.Tensor], node):
    """The inverse of `freeze` for a value of type `hint`; raises ValueError, KeyError or TypeError if they disagree."""
    if node is None or isinstance(node, bool | int | float | str):
        return node
    (tag, content), = node.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "array":
        return tensors[content].numpy()
    if tag == "float":
        return float(content)
    hint = _member(hint)
    if tag == "model":
        return _expect(hint, BaseModel).model_validate(content)
    if tag == "fields":
        if not dataclasses.is_dataclass(hint):
            raise TypeError(f"the file holds a dataclass where {hint} is expected")
        hints = typing.get_type_hints(hint)
        return hint(**{name: thaw(hints[name], tensors, value) for name, value in content.items()})
    arguments = typing.get_args(hint)
    if tag == "pairs":
        of_key, of_value = arguments or (typing.Any, typing.Any)
        return {thaw(of_key, tensors, k): thaw(of_value, tensors, v) for k, v in content}
    return {"tuple": tuple, "list": list}[tag](thaw(_item(arguments, i), tensors, v) for i, v in enumerate(content))


def _member(hint):
    """The one class in `X | None`; a hint that is no union is returned as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(hint) if m is not type(None)]
        if len(members) == 1:
            return members[0]
    return hint


def _item(arguments: tuple, index: int):
    if not arguments:
        return typing.Any
    if len(arguments) == 1 or arguments[-1] is Ellipsis:
        return arguments[0]
    return arguments[index]


def _expect(hint, base: type):
    if not (isinstance(hint, type) and issubclass(hint, base)):
        raise TypeError(f"the file holds a {base.__name__} where {hint} is expected")
    return hint


# Writing and reading.

def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)` fills a file beside `path`, which then takes its name; a reader sees all of it or nothing."""
    temporary = path.parent / f".{os.getpid()}-{uuid.uuid4().hex}.tmp"
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        if POSIX:  # Windows opens no folder, and keeps names safe by itself
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """One JSON object as a file, atomically; NaN and infinity are refused (they are not JSON)."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_atomically(Path(path), lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def sync(path: Path) -> None:
    """Everything of a file, or the names in a folder, is on the disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs only what could be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(part):
    """Anything that can be part of a key, as JSON that is the same in every process."""
    if isinstance(part, torch.Tensor):
        content = part.detach().cpu().contiguous()
        digest = hashlib.sha256(content.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        return ["tensor", str(content.dtype), list(content.shape), digest]
    if isinstance(part, BaseModel):
        return [type(part).__name__, part.model_dump(mode="json")]
    if dataclasses.is_dataclass(part):
        fields = {f.name: _plain(getattr(part, f.name)) for f in dataclasses.fields(part)}
        return [type(part).__name__, fields]
    if isinstance(part, dict):
        return ["dict", sorted(([_plain(k), _plain(v)] for k, v in part.items()), key=json.dumps)]
    if isinstance(part, tuple | list):
        return [_plain(item) for item in part]
    if part is None or isinstance(part, bool | int | float | str):
        return part
    raise TypeError(f"a {type(part).__name__} cannot be part of a key")


class Run:
    """A run folder. Nothing is created before the first artifact is saved. code: the version that artifacts are made and read by; by
    default that of the sources."""

    def __init__(self, folder: str | Path, code: str = ""):
        self.folder, self.code = Path(folder), code or code_version()
        if self.folder.exists() and not self.folder.is_dir():
            raise BadInput(f"{self.folder} is a file; give a new folder or an earlier run's folder")
        if self.folder.is_dir():
            if any(path.suffix != ".tmp" for path in self.folder.iterdir()):
                self._check_marker()
            self._drop_leftovers()

    @staticmethod
    def key(*parts) -> str:
        """Hash of what a result is made from: options, strings, numbers, tensors and containers of them."""
        return hashlib.sha256(json.dumps(_plain(parts), sort_keys=True).encode()).hexdigest()[:16]

    def path(self, stage: str, key: str, suffix: str = ".safetensors") -> Path:
        name = f"{stage}-{key}{suffix}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", name):
            raise ValueError(f"{name!r} is no artifact name")
        return self.folder / name

    def has(self, stage: str, key: str) -> bool:
        """Is there a whole artifact, in either format?"""
        return self._header(stage, key) is not None or self.load_json(stage, key) is not None

    def save(self, stage: str, key: str, value) -> Path:
        """Store a result (a dataclass or pydantic model, tensors included)."""
        tensors, node = freeze(value)
        metadata = {METADATA_KEY: json.dumps({"type": type(value).__name__, "value": node, "code": self.code}, allow_nan=False)}
        path = self.path(stage, key)
        self._prepare()
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
        return path

    def load(self, cls: type, stage: str, key: str):
        """The stored result, or None when there is none that is whole and still fits its class."""
        header = self._header(stage, key)
        if header is None or header["type"] != cls.__name__:
            return None
        try:
            with safe_open(self.path(stage, key), framework="pt") as file:
                # Cloned: a view into a mapped file would change, or vanish, with the file.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            return thaw(cls, tensors, header["value"])
        except (SafetensorError, ValueError, KeyError, TypeError):
            return None

    def save_blob(self, stage: str, key: str, blob: bytes) -> Path:
        """Store safetensors bytes that a stage made itself (the search's state)."""
        path = self.path(stage, key)
        self._prepare()
        write_atomically(path, lambda temporary: temporary.write_bytes(blob))
        return path

    def load_blob(self, stage: str, key: str) -> bytes | None:
        """The stored bytes, or None when there are none that are whole, or no artifact can have that name."""
        try:
            path = self.path(stage, key)
            with safe_open(path, framework="pt"):
                return path.read_bytes()
        except (OSError, SafetensorError, ValueError):
            return None

    def save_json(self, stage: str, key: str, value) -> Path:
        path = self.path(stage, key, ".json")
        self._prepare()
        write_json(path, {"code": self.code, "value": value})
        return path

    def load_json(self, stage: str, key: str):
        try:
            found = json.loads(self.path(stage, key, ".json").read_text(encoding="utf-8"))
            return found["value"] if found["code"] == self.code else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def resume(self, cls: type, stage: str, key: str, make: Callable):
        """The stored result, or make() stored and returned."""
        value = self.load(cls, stage, key)
        if value is None:
            value = make()
            self.save(stage, key, value)
        return value

    def _header(self, stage: str, key: str) -> dict | None:
        """The JSON part of a whole safetensors artifact (its reader checks the length against the header)."""
        try:
            with safe_open(self.path(stage, key), framework="pt") as file:
                header = json.loads((file.metadata() or {})[METADATA_KEY])
            return header if header.get("code") == self.code else None
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def _prepare(self) -> None:
        marker = self.folder / RUN_MARKER
        if not marker.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(marker, {"format": RUN_FORMAT})

    def _check_marker(self) -> None:
        try:
            found = json.loads((self.folder / RUN_MARKER).read_text(encoding="utf-8")).get("format")
        except (OSError, ValueError, AttributeError):
            found = None
        if found != RUN_FORMAT:
            raise BadInput(f"{self.folder} is not empty and not a run folder; give a new folder or an earlier run's folder")

    def _drop_leftovers(self) -> None:
        """Remove what killed processes were writing; a live one's temporary files stay, and on Windows everybody's."""
        for temporary in self.folder.glob(".*-*.tmp"):
            owner = temporary.name[1:].split("-")[0]
            if owner.isdigit() and not _alive(int(owner)):
                temporary.unlink(missing_ok=True)


def _alive(process_id: int) -> bool:
    """Whether a process runs, as far as can be asked: on Windows signal 0 is Ctrl-C, and a process that is not asked counts as alive."""
    if not POSIX:
        return True
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
