"""A quantized model as a checkpoint folder: written beside its target, read back, then put in place; and the way back.

    manifest.json  what is in the folder: sizes and SHA-256 of every file, versions, exact bytes
    plan.json      the bits of every step and layer
    README.md      a model card
    transformer/   config.json, layers.json (format of every packed layer), weights-0000N-of-0000M.safetensors
    …              the rest of the pipeline, copied from the model's own folder
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench import folders
from workbench.modelcard import model_card
from workbench.models import Bundle, sources
from workbench.models.denoiser import StepState
from workbench.options import BadInput, ModelSpec, OnProgress, Progress, ignore_progress
from workbench.plans import BitChoice, BitPlan
from workbench.quant import transforms
from workbench.quant.activations import format_of
from workbench.quant.bank import float_layers
from workbench.quant.qlinear import Extras, FloatLinear, LayerFormat, QuantLinear
from workbench.quant.quantize import QuantizedModel, modulation_module, resident_bytes
from workbench.runs import sync
from workbench.types import LayerInfo

FORMAT = "adatsq-export-1"
BASE_CARD = "BASE_MODEL.md"  # the original's README
MANIFEST, PLAN, LAYERS = "manifest.json", "plan.json", "layers.json"
MAX_SHARD_BYTES = 9_500_000  # what can be pushed to a Space without large-file storage
HEADER_BYTES = 300  # of one tensor in a shard's header, generously
BESIDE = (".smooth_K", ".down_RK", ".act_range_2")  # what layers of one input share, and the static ranges of float weights


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


def load_quantized(folder: str | Path, device: str = "auto") -> tuple[Bundle, QuantizedModel]:
    """Reopen an export. The bundle has no float weights where layers are packed; use it with the quantized model."""
    folder = Path(folder)
    manifest = _check_files(folder)
    plan = BitPlan.parse((folder / PLAN).read_text(encoding="utf-8"), PLAN)
    forms = {name: LayerFormat.parse(form, f"{LAYERS}: {name}") for name, form in _read_json(folder / "transformer" / LAYERS).items()}
    device = sources.find_device(ModelSpec.parse({"source": str(folder), "device": device}, "load").device)
    tensors = _read_tensors(folder / "transformer")
    packed = {name: {key: tensors.pop(f"{name}.{key}") for key in form.shapes() if f"{name}.{key}" in tensors}
              for name, form in forms.items()}
    shared = {name: tensors.pop(name).to(device) for name in list(tensors) if name.endswith(BESIDE)}
    bundle = _open_bundle(folder, manifest, forms, tensors, device)
    plan = plan.upgraded(bundle.layers)
    state, layers = StepState(plan), {}
    place = {layer.name: layer.index if layer.has_act_bits else None for layer in bundle.layers}
    for name, form in forms.items():
        if name not in place:
            raise BadInput(f"{folder}: {LAYERS} names {name}, which is no layer of {bundle.name}; export again")
        form = form.model_copy(update={"layer_index": place[name]})  # earlier versions counted without the modulation
        of_input = {key: shared[f"{form.input_group}.{key}"] for key in form.shared_shapes() if f"{form.input_group}.{key}" in shared}
        layers[name] = QuantLinear.from_tensors(packed[name], form, cursor=state, shared=of_input).to(device)
    for layer, choice in zip(bundle.layers, plan.weight_choice_L):
        in_float = choice.is_float or (plan.quant.modulation == "cached" and not layer.has_act_bits)
        if in_float != (layer.name not in forms):
            raise BadInput(f"{folder}: the plan and the stored weight of {layer.name} disagree; export again")
        if in_float:
            layers[layer.name] = _float_layer(bundle, layer, plan, choice, shared, state)
    weight_bytes = resident_bytes(bundle, plan, layers, float_layers(bundle))
    if weight_bytes != manifest["weight_bytes"]:
        raise BadInput(f"{folder}: {weight_bytes} bytes of weights, the manifest says {manifest['weight_bytes']}; export again")
    return bundle, QuantizedModel(plan=plan, bundle=bundle, layers=layers, state=state, weight_bytes=weight_bytes)


def _float_layer(bundle: Bundle, layer: LayerInfo, plan: BitPlan, choice: BitChoice, shared: Mapping[str, Tensor],
                 state: StepState) -> nn.Module:
    if not layer.has_act_bits:
        return modulation_module(bundle.float_layer(layer), plan.quant, state)
    first = bundle.layers[layer.fused_with].name
    transform = transforms.make(plan.quant.transform, layer.k_in, plan.quant.seed, shared.get(f"{first}.smooth_K"))
    extras = Extras(act=format_of(plan.quant, choice.group_size), input_group=first, range_2=shared.get(f"{layer.name}.act_range_2"))
    return FloatLinear(bundle.float_layer(layer), transform, cursor=state, layer_index=layer.index, extras=extras)


def is_export(folder: str | Path) -> bool:
    """Is this folder one that `write` made?"""
    try:
        return json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
    parts = folders.parts_of(folders.read_index(source / folders.INDEX, source.name), source.name)
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
    digests = {name: _sha256(path) for name, path in files.items()}
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
    _check_files(building)
    expected, found = stored_tensors(bundle, quantized), _read_tensors(building / "transformer")
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


# Reading.

class NoFloatWeight(nn.Linear):
    """Holds the place and the size of a layer whose float weight was not exported."""

    def __init__(self, name: str, form: LayerFormat, device):
        nn.Module.__init__(self)
        self.name, self.in_features, self.out_features = name, form.k_in, form.n_out
        one = torch.zeros((), device=device)
        self.weight = nn.Parameter(one.expand(form.n_out, form.k_in), requires_grad=False)
        self.bias = nn.Parameter(one.expand(form.n_out), requires_grad=False) if form.has_bias else None

    def forward(self, x):
        if x.is_meta:  # shapes alone are asked for
            return nn.functional.linear(x, self.weight, self.bias)
        raise BadInput("an exported checkpoint has no float weights; load the original model to run or profile it in float")


def _open_bundle(folder: Path, manifest: dict, forms: Mapping[str, LayerFormat], tensors: dict[str, Tensor], device) -> Bundle:
    import diffusers

    family = sources.check_folder(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    entry = folders.read_index(folder / folders.INDEX, folder.name).get("transformer")
    library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
    transformer_class = getattr(diffusers, str(class_name), None)
    if library != "diffusers" or not (isinstance(transformer_class, type) and issubclass(transformer_class, diffusers.ModelMixin)):
        raise BadInput(f"{folder}: {class_name} is no transformer of diffusers; export again")
    with torch.device("meta"):
        transformer = transformer_class.from_config(transformer_class.load_config(folder / "transformer", local_files_only=True))
    linears = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    if strangers := sorted(set(forms) - linears):
        raise BadInput(f"{folder}: {LAYERS} names {strangers[0][:80]!r}, which is no linear layer of this transformer; export again")
    for name, form in forms.items():
        parent, _, leaf = name.rpartition(".")
        transformer.get_submodule(parent)._modules[leaf] = NoFloatWeight(name, form, device)
    transformer.load_state_dict({name: t.to(device, dtype if t.is_floating_point() else None) for name, t in tensors.items()},
                                strict=False, assign=True)
    absent = [name for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers()) if tensor.is_meta]
    if absent:
        raise BadInput(f"{folder}: {absent[0]} is missing; export again")
    pipeline = getattr(diffusers, family).from_pretrained(str(folder), transformer=transformer, dtype=dtype, use_safetensors=True,
                                                          local_files_only=True, variant=folders.variant_on_disk(folder))
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return sources.FAMILIES[family](name=manifest["model"], source=str(folder), pipeline=pipeline, device=device,
                                     model_hash=manifest["model_hash"])


def _check_files(folder: Path) -> dict:
    """The manifest, once every file it lists is whole."""
    if not is_export(folder):
        raise BadInput(f"{folder} is not an exported checkpoint ({MANIFEST} is missing or of another format)")
    manifest = _read_json(folder / MANIFEST)
    try:
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        model, _, _ = str(manifest["model"]), str(manifest["model_hash"]), int(manifest["weight_bytes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{folder}: {MANIFEST} is incomplete ({error}); export again") from None
    if Path(model).name != model:  # the model's prompts and its judge are found by it
        raise BadInput(f"{folder}: {MANIFEST} names the model {model[:80]!r}, which is a path; export again")
    for name, (size, digest) in files.items():
        path = folder / name
        if folder.resolve() not in path.resolve().parents:
            raise BadInput(f"{folder}: the manifest names {name}, outside the folder; export again")
        if not path.is_file() or path.stat().st_size != size or _sha256(path) != digest:
            raise BadInput(f"{folder}: {name} is missing or damaged; export again")
    return manifest


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})
        except SafetensorError as error:
            raise BadInput(f"{path.name} cannot be read ({error}); export again") from None
    return tensors


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path.name} cannot be read ({error}); export again") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _report(on_progress: OnProgress, done: int, message: str) -> None:
    on_progress(Progress(stage="export", done=done, total=3, message=message))
