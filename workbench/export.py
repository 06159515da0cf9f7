"""A quantized model as a checkpoint folder: written beside its target, read back, then put in place (reopened by `exported`).

    manifest.json  what is in the folder: sizes and SHA-256 of every file, versions, exact bytes
    plan.json      the bits of every step and layer
    README.md      a model card
    transformer/   config.json, layers.json (format of every packed layer), weights-0000N-of-0000M.safetensors
    …              the rest of the pipeline, copied from the model's own folder
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from workbench import folders, modelfiles
from workbench.exported import FORMAT, LAYERS, MANIFEST, PLAN, check_files, is_export, load_quantized, read_tensors, sha256_of
from workbench.modelcard import model_card
from workbench.models import Bundle
from workbench.options import BadInput, OnProgress, Progress, ignore_progress
from workbench.quant.qlinear import FloatLinear, QuantLinear
from workbench.quant.quantize import QuantizedModel
from workbench.runs import sync

__all__ = ["ExportManifest", "check_target", "is_export", "load_quantized", "stored_tensors", "write"]

BASE_CARD = "BASE_MODEL.md"  # the original's README
MAX_SHARD_BYTES = 9_500_000  # what can be pushed to a Space without large-file storage
HEADER_BYTES = 300  # of one tensor in a shard's header, generously


@dataclass(frozen=True, kw_only=True)
class ExportManifest:
    """What was written. weight_bytes: resident bytes of the transformer; disk_bytes: of all files."""

    folder: Path
    plan_id: str
    weight_bytes: int
    disk_bytes: int
    files: Mapping[str, str]  # path: SHA-256
    verified: bool


def write(bundle: Bundle, quantized: QuantizedModel, folder: str | Path, *, profile_summary: Mapping[str, str] | None = None,
          max_shard_bytes: int = MAX_SHARD_BYTES, on_progress: OnProgress = ignore_progress) -> ExportManifest:
    """Write, read back, and only then give the folder its name. An earlier export there is replaced; anything else is not."""
    target = check_target(folder).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}.tmp"
    building.mkdir()
    try:
        _report(on_progress, 0, "copying the pipeline")
        _copy_pipeline(bundle, building)
        _report(on_progress, 1, "writing weights")
        _write_transformer(bundle, quantized, building / "transformer", max_shard_bytes)
        (building / PLAN).write_text(quantized.plan.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (building / "README.md").write_text(model_card(bundle, quantized, profile_summary or {}), encoding="utf-8")
        files = _write_manifest(bundle, quantized, building)
        _report(on_progress, 2, "reading back")
        _verify(bundle, quantized, building)
        _put_in_place(building, target)
        _report(on_progress, 3, "written and verified")
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return ExportManifest(folder=target, plan_id=quantized.plan.plan_id, weight_bytes=quantized.weight_bytes, verified=True,
                          disk_bytes=sum(p.stat().st_size for p in target.rglob("*") if p.is_file()), files=files)


def check_target(folder: str | Path) -> Path:
    """The folder, if it may be written: new, empty, or an earlier export."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; give a new folder for the export")
    if folder.is_dir() and any(folder.iterdir()) and not is_export(folder):
        raise BadInput(f"{folder} is not empty and not an earlier export; give a new folder")
    return folder


# Writing.

def _copy_pipeline(bundle: Bundle, building: Path) -> None:
    """Everything but the transformer's weights, byte for byte from the model's own folder, and nothing that a link has elsewhere."""
    source = Path(bundle.pipeline.config._name_or_path)
    if not (source / folders.INDEX).is_file():
        raise BadInput(f"the model's folder {source} is gone; load the model again before exporting")
    parts = modelfiles.parts(modelfiles.check_index(source, source.name))
    names = [path.relative_to(source).as_posix() for path in sorted((*source.glob("*"), *source.glob("*/*"))) if path.is_file()]
    for name in folders.wanted(names, parts):
        part, _, inside = name.rpartition("/")
        if part == "transformer" and inside != "config.json":
            continue
        (building / part).mkdir(exist_ok=True)
        shutil.copyfile(folders.own_file(source / name, source), building / (BASE_CARD if name.lower() == "readme.md" else name))


def stored_tensors(bundle: Bundle, quantized: QuantizedModel) -> dict[str, Tensor]:
    """The transformer as it is stored: packed layers as they are, everything else in the 16-bit type that keeps it exactly."""
    packed = {name: module for name, module in quantized.layers.items() if isinstance(module, QuantLinear)}
    stored = {f"{name}.{key}": tensor.cpu() for name, module in packed.items() for key, tensor in module.tensors().items()}
    stored |= {name: tensor.cpu().contiguous() for name, tensor in quantized.shared_tensors().items()}
    stored |= {f"{name}.act_range_2": module.range_2.cpu() for name, module in quantized.layers.items()
               if isinstance(module, FloatLinear) and module.range_2 is not None}
    for name, tensor in bundle.transformer.state_dict().items():
        if name.rpartition(".")[0] not in packed:
            stored[name] = _in_16_bits(tensor.detach().cpu()).contiguous()
    return stored


def _in_16_bits(tensor: Tensor) -> Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        if tensor.is_floating_point() and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor


def _write_transformer(bundle: Bundle, quantized: QuantizedModel, folder: Path, max_shard_bytes: int) -> None:
    shards = list(_shards(stored_tensors(bundle, quantized), max_shard_bytes))
    for number, shard in enumerate(shards, 1):
        save_file(shard, folder / f"weights-{number:05d}-of-{len(shards):05d}.safetensors", {"format": "pt"})
    forms = {name: module.format.model_dump(mode="json") for name, module in quantized.layers.items()
             if isinstance(module, QuantLinear)}
    (folder / LAYERS).write_text(json.dumps(forms, indent=1) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterable[dict[str, Tensor]]:
    """Tensors in order, as many to a shard as fit; a tensor larger than a shard has one of its own."""
    shard, room = {}, max_bytes
    for name, tensor in tensors.items():
        need = tensor.numel() * tensor.element_size() + HEADER_BYTES
        if shard and need > room:
            yield shard
            shard, room = {}, max_bytes
        shard[name] = tensor
        room -= need
    yield shard


def _write_manifest(bundle: Bundle, quantized: QuantizedModel, building: Path) -> dict[str, str]:
    files = {path.relative_to(building).as_posix(): path for path in sorted(building.rglob("*")) if path.is_file()}
    digests = {name: sha256_of(path) for name, path in files.items()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "safetensors")}
    manifest = {"format": FORMAT, "model": bundle.name, "model_hash": bundle.model_hash, "plan_id": quantized.plan.plan_id,
                "weight_bytes": quantized.weight_bytes, "float_bytes": bundle.float_bytes, "parameters": bundle.parameters,
                "versions": versions,
                "files": {name: {"bytes": path.stat().st_size, "sha256": digests[name]} for name, path in files.items()}}
    (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in (*files.values(), building / MANIFEST):
        path.chmod(0o644)  # the tensor writer makes private files; a checkpoint is made to be shared
        sync(path)
    return digests


def _verify(bundle: Bundle, quantized: QuantizedModel, building: Path) -> None:
    """Every tensor on the disk is the one in memory, and the manifest agrees with the files."""
    check_files(building)
    expected, found = stored_tensors(bundle, quantized), read_tensors(building / "transformer")
    wrong = [name for name in expected if name not in found or not torch.equal(expected[name], found[name])]
    if wrong or len(found) != len(expected):
        raise OSError(f"the export read back differently ({wrong[0] if wrong else 'extra tensors'}); nothing was kept")


def _put_in_place(building: Path, target: Path) -> None:
    if not target.exists():
        building.rename(target)
        return
    old = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}.tmp"
    target.rename(old)
    building.rename(target)
    shutil.rmtree(old)


def _report(on_progress: OnProgress, done: int, message: str) -> None:
    on_progress(Progress(stage="export", done=done, total=3, message=message))
