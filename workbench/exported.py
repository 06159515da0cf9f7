"""An exported checkpoint, reopened: every file against the manifest, every tensor against the model and the plan.

What `export` writes and how a folder is laid out is said there. Anything that does not agree is a BadInput of one line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from workbench import modelfiles
from workbench.models import Bundle, checks, sources
from workbench.models.denoiser import StepState
from workbench.options import BadInput, Frozen, GenerationConfig, ModelSpec
from workbench.plans import BitChoice, BitPlan
from workbench.quant import transforms
from workbench.quant.activations import format_of
from workbench.quant.bank import float_layers
from workbench.quant.qlinear import Extras, FloatLinear, LayerFormat, QuantLinear
from workbench.quant.quantize import QuantizedModel, modulation_module, resident_bytes
from workbench.types import LayerInfo

FORMAT = "adatsq-export-1"
MANIFEST, PLAN, LAYERS = "manifest.json", "plan.json", "layers.json"
BESIDE = (".smooth_K", ".down_RK", ".act_range_2")  # what layers of one input share, and the static ranges of float weights


class Listed(Frozen):
    """One file of a manifest."""

    bytes: int = Field(ge=0)
    sha256: str = Field(max_length=64)


class Manifest(Frozen):
    """What is read of manifest.json."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field(min_length=1, max_length=200)
    model_hash: str = Field(min_length=8, max_length=64)
    weight_bytes: int = Field(ge=0)
    files: dict[str, Listed]


def is_export(folder: str | Path) -> bool:
    """Is this folder one that `write` made?"""
    try:
        return modelfiles.read_json(Path(folder) / MANIFEST, MANIFEST).get("format") == FORMAT
    except BadInput:
        return False


def load_quantized(folder: str | Path, device: str = "auto") -> tuple[Bundle, QuantizedModel]:
    """Reopen an export. The bundle has no float weights where layers are packed; use it with the quantized model."""
    folder = Path(folder)
    manifest = check_files(folder)
    plan = BitPlan.parse(_read_text(folder / PLAN), PLAN)
    stored = modelfiles.read_json(folder / "transformer" / LAYERS, LAYERS)
    layer_formats = {name: LayerFormat.parse(layer_format, f"{LAYERS}: {modelfiles.shown(name)}") for name, layer_format in stored.items()}
    device = sources.find_device(ModelSpec.parse({"source": str(folder), "device": device}, "load").device)
    tensors = read_tensors(folder / "transformer")
    packed = {name: {key: tensors.pop(f"{name}.{key}") for key in layer_format.shapes() if f"{name}.{key}" in tensors}
              for name, layer_format in layer_formats.items()}
    shared = {name: tensors.pop(name).to(device) for name in list(tensors) if name.endswith(BESIDE)}
    bundle = _open_bundle(folder, manifest, plan.generation, layer_formats, tensors, device)
    plan = _check_plan(folder, bundle, plan, layer_formats, manifest)
    state, layers = StepState(plan), {}
    place = {layer.name: layer.index if layer.has_act_bits else None for layer in bundle.layers}
    for name, layer_format in layer_formats.items():
        layer_format = layer_format.model_copy(update={"layer_index": place[name]})  # earlier versions counted without the modulation
        of_input = {key: shared[f"{layer_format.input_group}.{key}"] for key in layer_format.shared_shapes()
                    if f"{layer_format.input_group}.{key}" in shared}
        with modelfiles.named(f"{folder.name}: {name}"):
            layers[name] = QuantLinear.from_tensors(packed[name], layer_format, step_state=state, shared=of_input).to(device)
    for layer, choice in zip(bundle.layers, plan.weight_choice_L):
        if _in_float(plan, layer, choice):
            with modelfiles.named(f"{folder.name}: {layer.name}"):
                layers[layer.name] = _float_layer(bundle, layer, plan, choice, shared, state)
    weight_bytes = resident_bytes(bundle, plan, layers, float_layers(bundle))
    if weight_bytes != manifest.weight_bytes:
        raise BadInput(f"{folder}: {weight_bytes} bytes of weights, the manifest says {manifest.weight_bytes}; export again")
    return bundle, QuantizedModel(plan=plan, bundle=bundle, layers=layers, state=state, weight_bytes=weight_bytes)


def _check_plan(folder: Path, bundle: Bundle, plan: BitPlan, layer_formats: Mapping[str, LayerFormat], manifest: Manifest) -> BitPlan:
    """The plan in the newest format; BadInput unless plan, stored layers and model are of one export."""
    if plan.model_hash != manifest.model_hash:
        raise BadInput(f"{folder}: {PLAN} is of another model than {MANIFEST}; export again")
    plan = plan.upgraded(bundle.layers)
    names = tuple(layer.name for layer in bundle.layers)
    if plan.layer_names != names:
        raise BadInput(f"{folder}: {PLAN} names other layers than the model has; export again")
    if other := next((name for name in layer_formats if name not in names), None):
        raise BadInput(f"{folder}: {LAYERS} names {modelfiles.shown(other)}, which is no layer of {bundle.name}; export again")
    for layer, choice in zip(bundle.layers, plan.weight_choice_L):
        if _in_float(plan, layer, choice) != (layer.name not in layer_formats):
            raise BadInput(f"{folder}: the plan and the stored weight of {layer.name} disagree; export again")
    return plan


def _in_float(plan: BitPlan, layer: LayerInfo, choice: BitChoice) -> bool:
    """Does an export hold this layer's weight as it was?"""
    return choice.is_float or (plan.quant.modulation == "cached" and not layer.has_act_bits)


def _float_layer(bundle: Bundle, layer: LayerInfo, plan: BitPlan, choice: BitChoice, shared: Mapping[str, Tensor],
                 state: StepState) -> nn.Module:
    if not layer.has_act_bits:
        return modulation_module(bundle.float_layer(layer), plan.quant, state)
    first = bundle.layers[layer.fused_with].name
    transform = transforms.make(plan.quant.transform, layer.k_in, plan.quant.seed, shared.get(f"{first}.smooth_K"))
    extras = Extras(act=format_of(plan.quant, choice.group_size), input_group=first, range_2=shared.get(f"{layer.name}.act_range_2"))
    for tensor, size in ((shared.get(f"{first}.smooth_K"), layer.k_in), (extras.range_2, 2)):
        if tensor is not None and tuple(tensor.shape) != (size,):
            raise BadInput(f"a tensor stored beside it is {tuple(tensor.shape)}; {(size,)} is needed")
    return FloatLinear(bundle.float_layer(layer), transform, step_state=state, layer_index=layer.index, extras=extras)


class NoFloatWeight(nn.Linear):
    """Holds the place and the size of a layer whose float weight was not exported."""

    def __init__(self, name: str, layer_format: LayerFormat, device):
        nn.Module.__init__(self)
        self.name, self.in_features, self.out_features = name, layer_format.k_in, layer_format.n_out
        one = torch.zeros((), device=device)
        self.weight = nn.Parameter(one.expand(layer_format.n_out, layer_format.k_in), requires_grad=False)
        self.bias = nn.Parameter(one.expand(layer_format.n_out), requires_grad=False) if layer_format.has_bias else None

    def forward(self, x):
        if x.is_meta:  # shapes alone are asked for
            return nn.functional.linear(x, self.weight, self.bias)
        raise BadInput("an exported checkpoint has no float weights; load the original model to run or profile it in float")


def _open_bundle(folder: Path, manifest: Manifest, generation: GenerationConfig, layer_formats: Mapping[str, LayerFormat],
                 tensors: dict[str, Tensor], device) -> Bundle:
    family = sources.check_folder(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with modelfiles.named(folder.name):
        transformer = checks.empty_transformer(folder, len(tensors) + len(layer_formats))
        for name, layer_format in layer_formats.items():
            parent, _, leaf = name.rpartition(".")
            linear = dict(transformer.named_modules()).get(name)
            sizes = f"{layer_format.n_out} x {layer_format.k_in}"
            if not isinstance(linear, nn.Linear) or f"{linear.out_features} x {linear.in_features}" != sizes:
                raise BadInput(f"{LAYERS}: {modelfiles.shown(name)} is no {sizes} linear of the transformer; export again")
            transformer.get_submodule(parent)._modules[leaf] = NoFloatWeight(name, layer_format, device)
        _fill(transformer, {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in tensors.items()})
    pipeline = checks.open_pipeline(folder, folder.name, dtype, transformer)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return sources.FAMILIES[family](name=manifest.model, source=str(folder), pipeline=pipeline, device=device,
                                    model_hash=manifest.model_hash, generation=generation)


def _fill(transformer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the transformer the stored tensors; BadInput unless these are exactly what it lacks, in shape and finite."""
    lacking = {name: tensor for name, tensor in transformer.state_dict().items() if tensor.is_meta}
    for name in dict.fromkeys([*lacking, *tensors]):
        wrong = "missing" if name not in tensors else "not of the model" if name not in lacking else None
        if wrong is None and (tensors[name].shape, tensors[name].is_floating_point()) != (
                lacking[name].shape, lacking[name].is_floating_point()):
            wrong = f"{tensors[name].dtype} {tuple(tensors[name].shape)}, not {tuple(lacking[name].shape)}"
        if wrong is None and not bool(torch.isfinite(tensors[name]).all()):
            wrong = "not finite"
        if wrong:
            raise BadInput(f"transformer: {modelfiles.shown(name)} is {wrong}; export again")
    transformer.load_state_dict(tensors, strict=False, assign=True)


def check_files(folder: Path) -> Manifest:
    """The manifest, once every file it lists is whole. A file may be a link, as in a snapshot from the hub; its name stays inside."""
    if not is_export(folder):
        raise BadInput(f"{folder} is not an exported checkpoint ({MANIFEST} is missing or of another format)")
    manifest = Manifest.parse(modelfiles.read_json(folder / MANIFEST, MANIFEST), f"{folder}: {MANIFEST}")
    if Path(manifest.model).name != manifest.model:  # the model's prompts and its judge are found by it
        raise BadInput(f"{folder}: {MANIFEST} names the model {modelfiles.shown(manifest.model)}, which is a path; export again")
    for name, expected in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise BadInput(f"{folder}: the manifest names {modelfiles.shown(name)}, outside the folder; export again")
        if not path.is_file() or path.stat().st_size != expected.bytes or sha256_of(path) != expected.sha256:
            raise BadInput(f"{folder}: {modelfiles.shown(name)} is missing or damaged; export again")
    return manifest


def read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        twice = next((name for name in modelfiles.read_header(path) if name in tensors), None)
        if twice is not None:
            raise BadInput(f"{path.name} holds {modelfiles.shown(twice)}, which an earlier file holds too; export again")
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})
        except (SafetensorError, KeyError) as error:
            raise BadInput(f"{path.name} cannot be read ({error}); export again") from None
    return tensors


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path.name} cannot be read ({type(error).__name__}); export again") from None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
