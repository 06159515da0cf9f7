"""What a model is before it is loaded: family, size, layers and the memory it will take, from its configuration and the headers of its
safetensors files, on disk or, before anything is downloaded, on the hub. No tensor is read and torch is not imported."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from workbench import folders, modelfiles, weightformats
from workbench.memory import free_bytes, reclaim
from workbench.options import WEIGHT_BITS, BadInput
from workbench.resources import resource_folder

MODELS = resource_folder("assets") / "models"
FLOAT_BYTES = 4  # a parameter in the float32 that a CPU computes in
# Solved weights at every width below float stay in memory while a plan is searched, and one float copy of what runs.
SEARCH_BYTES = sum(bits for bits in WEIGHT_BITS if bits != 16) / 8 + FLOAT_BYTES
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_SECONDS = 10.0  # that an answer may take
_BLOCK = re.compile(r"(.*blocks)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Sizes are None where they cannot be known yet; parameters and linears are the transformer's."""

    source: str
    kind: str  # embedded, folder, hub id
    family: str = ""
    parameters: int | None = None
    all_parameters: int | None = None
    linears: int | None = None
    blocks: int | None = None
    disk_bytes: int | None = None
    note: str = ""
    refused: bool = False  # it cannot be loaded, and `note` says why

    @property
    def load_bytes(self) -> int | None:
        """Predicted memory of the loaded pipeline, all parts in float32."""
        return None if self.all_parameters is None else FLOAT_BYTES * self.all_parameters

    @property
    def search_bytes(self) -> int | None:
        """Predicted memory while a plan is searched, trajectories and activations aside."""
        return None if self.load_bytes is None else round(self.load_bytes + SEARCH_BYTES * self.parameters)


def embedded() -> dict[str, Path]:
    """Embedded models by name."""
    return {path.parent.name: path.parent for path in sorted(MODELS.glob("*/model_index.json"))}


def of(source: str) -> ModelInfo:
    """What is known of an embedded name, a local folder or a hub id. Never raises for what is merely unknown."""
    folder, kind = _folder(source)
    if folder is None:
        unknown = "no embedded model, folder or hub id has this name"
        note = "not downloaded yet; the hub is asked for its size" if kind == "hub id" else unknown
        return ModelInfo(source=source, kind=kind, note=note)
    try:
        index = modelfiles.check_index(folder, source)
        with modelfiles.named(source):
            variant = modelfiles.variant_on_disk(folder, index)
            checkpoints = [modelfiles.checkpoint(folder / part, library, variant) for part, (library, _) in modelfiles.parts(index).items()
                           if (folder / part / "config.json").exists() or not (folder / part).is_dir()]
    except BadInput as error:  # a download may be unfinished, and is then completed by a load
        return ModelInfo(source=source, kind=kind, note=str(error), refused=kind != "hub id")
    shapes = {found.folder.name: {name: tensor.shape for name, tensor in found.tensors.items()} for found in checkpoints}
    disk_bytes = sum(path.stat().st_size for found in checkpoints for path in found.files)
    return _model_info(source, kind, modelfiles.shown(index.get("_class_name")), shapes, disk_bytes)


def on_hub(hub_id: str) -> ModelInfo:
    """What is known of a model that has not been downloaded, from its model_index.json, the hub's list of files and the headers of those
    that would be: a few kilobytes each. Never raises: the note says why nothing is known."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        api = HfApi()
        info = api.model_info(hub_id, files_metadata=True, timeout=HUB_SECONDS)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if folders.INDEX not in sizes:
            return ModelInfo(source=hub_id, kind="hub id", note="the hub does not list it as a diffusers pipeline")
        path = Path(hf_hub_download(hub_id, folders.INDEX, revision=info.sha, etag_timeout=HUB_SECONDS))
        index = modelfiles.read_index(path.parent, hub_id)
        weights = [name for name in folders.wanted(sizes, modelfiles.parts(index)) if name.endswith(".safetensors")]
        shapes: dict[str, dict] = {}
        for name in weights:
            header = api.parse_safetensors_file_metadata(hub_id, name, revision=info.sha, timeout=HUB_SECONDS)
            weightformats.refuse(header.tensors, lambda _name, file=name: file)
            shapes.setdefault(name.split("/")[0], {}).update({key: tensor.shape for key, tensor in header.tensors.items()})
    except BadInput as error:
        return ModelInfo(source=hub_id, kind="hub id", note=f"{hub_id}: {error}", refused=True)
    except Exception as error:  # no network, no such model, or one that asks for an account
        return ModelInfo(source=hub_id, kind="hub id", note=f"the hub did not tell its size ({type(error).__name__})")
    return _model_info(hub_id, "hub id", index["_class_name"], shapes, sum(sizes[name] for name in weights))


def _model_info(source: str, kind: str, family: str, shapes: dict[str, dict], disk_bytes: int) -> ModelInfo:
    """From the names and shapes of each part's tensors."""
    counts = {part: sum(math.prod(shape) for shape in tensors.values()) for part, tensors in shapes.items()}
    transformer = shapes.get("transformer", {})
    matrices = [name for name, shape in transformer.items() if name.endswith(".weight") and len(shape) == 2]
    return ModelInfo(
        source=source,
        kind=kind,
        family=family,
        parameters=counts.get("transformer", 0),
        all_parameters=sum(counts.values()),
        linears=len(matrices),
        blocks=len({match[0] for match in map(_BLOCK.match, matrices) if match}),
        disk_bytes=disk_bytes,
    )


def require_room(model_info: ModelInfo) -> None:
    """Raises BadInput when the model is refused, or would not fit in what memory is free once loaded."""
    if model_info.refused:
        raise BadInput(model_info.note)
    if model_info.load_bytes is None:
        return
    free = free_bytes()
    if free is not None and model_info.load_bytes > free:
        reclaim()  # of models that have been put down
        free = free_bytes()
    if free is not None and model_info.load_bytes > free:
        raise BadInput(
            f"{model_info.source} needs about {model_info.load_bytes / 1e9:.1f} GB to load and {free / 1e9:.1f} GB are free; a model of "
            f"less than {free / FLOAT_BYTES / 1e9:.1f} billion parameters would fit"
        )


def _folder(source: str) -> tuple[Path | None, str]:
    if source in embedded():
        return embedded()[source], "embedded"
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, "folder"
    if not _HUB_ID.fullmatch(source):
        return None, "unknown"
    return _cached(source), "hub id"


def _cached(hub_id: str) -> Path | None:
    """The newest snapshot of a hub model that has been downloaded already."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    snapshots = home / "hub" / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.glob(f"*/{folders.INDEX}"), key=lambda path: path.stat().st_mtime) if snapshots.is_dir() else []
    return next((path.parent for path in reversed(found) if modelfiles.is_whole(path.parent)), None)
