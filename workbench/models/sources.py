"""Where a model comes from: `load` turns an embedded name, a local diffusers folder or a hub id into a Bundle."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch

from workbench import folders, modelfiles
from workbench.models import checks
from workbench.models.bundle import ASSETS, Bundle
from workbench.models.flux import FluxBundle
from workbench.models.zimage import ZImageBundle
from workbench.options import BadInput, ModelSpec

FAMILIES = {"FluxPipeline": FluxBundle, "ZImagePipeline": ZImageBundle}
EMBEDDED = {path.parent.name: path.parent for path in sorted((ASSETS / "models").glob("*/model_index.json"))}
NEEDS_MORE = {  # pipelines of known transformers that take more than text
    "FluxKontextPipeline": "an image to edit", "FluxImg2ImgPipeline": "an image to start from", "FluxFillPipeline": "an image and a mask",
    "FluxInpaintPipeline": "an image and a mask", "FluxControlPipeline": "a control image", "FluxControlNetPipeline": "a control image",
    "FluxPriorReduxPipeline": "an image", "WanImageToVideoPipeline": "a first frame", "WanVACEPipeline": "a reference video",
    "QwenImageEditPipeline": "an image to edit", "QwenImageImg2ImgPipeline": "an image to start from",
    "ZImageImg2ImgPipeline": "an image to start from"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_device(name: str) -> torch.device:
    """The device of that name; auto: the GPU, where there is one. Raises BadInput where it does not exist."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device {name} is not available here; use cpu or auto")
    return device


def load(spec: ModelSpec) -> Bundle:
    """The pipeline of `spec`, ready to run. Raises BadInput for anything that is not a safetensors pipeline of a known family."""
    folder, name = _find(spec.source)
    family = check_folder(folder, name)
    device = find_device(spec.device)
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipeline = checks.open_pipeline(folder, name, torch.bfloat16 if device.type == "cuda" else torch.float32)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return FAMILIES[family](name=name, source=spec.source, pipeline=pipeline, device=device,
                            model_hash=_hash_weights(folder / "transformer"))


def check_folder(folder: Path, name: str = "") -> str:
    """The pipeline class of a folder; BadInput when it is no pipeline, of an unknown family, made of pickles, or names files that are not
    its own. `name` stands for it."""
    name = name or folder.name
    index = modelfiles.check_index(folder, name)
    family = _known_family(index, name)
    with modelfiles.named(name):
        modelfiles.check_lists(folder, index)
    return family


def _known_family(index: dict, name: str) -> str:
    family = index["_class_name"]
    if family in NEEDS_MORE:
        raise BadInput(f"{name} is a {family}, which needs {NEEDS_MORE[family]}; here a prompt is all that goes in. Supported are "
                       f"{', '.join(FAMILIES)}")
    if family not in FAMILIES:
        raise BadInput(f"{name} is a {modelfiles.shown(family)}; supported are {', '.join(FAMILIES)}")
    return family


def _find(source: str) -> tuple[Path, str]:
    """The folder of a model, and its name: that of the folder, unless this is a snapshot from the hub, whose name is a hash."""
    if source in EMBEDDED:
        return EMBEDDED[source], source
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, folder.name
    if folder.is_file():
        if folder.suffix in modelfiles.PICKLES:
            raise BadInput(f"{folder.name} is a pickle, which is never opened; convert it to a safetensors pipeline folder")
        raise BadInput(f"{folder.name} is a file; give the folder of a diffusers pipeline")
    if _HUB_ID.fullmatch(source):
        return _download(source), source.rsplit("/", 1)[-1]
    embedded = ", ".join(EMBEDDED) or "the embedded models"
    raise BadInput(f"unknown model {source!r}; use {embedded}, the folder of a diffusers pipeline, or a hub id owner/name")


def _download(source: str) -> Path:
    """The folder of a hub model's newest snapshot. Its model_index.json comes first: a pipeline of another family is refused before
    anything else is fetched, and of a known one come the files that make it, by name. Raises BadInput."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    folder = None
    try:
        folder = Path(hf_hub_download(source, folders.INDEX)).parent
        index = modelfiles.read_index(folder, source)
        _known_family(index, source)
        listed = HfApi().model_info(source, revision=folder.name).siblings or ()
        names = folders.wanted((file.rfilename for file in listed), modelfiles.parts(index))
        if not any(name.startswith("transformer/") and name.endswith(".safetensors") for name in names):
            raise BadInput(f"{source} has no safetensors weights of its transformer; a pickle is never opened")
        return Path(snapshot_download(source, revision=folder.name, allow_patterns=names))
    except BadInput:
        raise
    except Exception as error:  # the hub library raises many kinds, offline as well as for a wrong name
        if folder is not None and modelfiles.is_whole(folder):  # downloaded earlier
            return folder
        raise BadInput(f"{source} is neither a folder here nor a diffusers pipeline that can be fetched from the hub "
                       f"({_first_line(error)}); embedded models work offline: {', '.join(EMBEDDED)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _hash_weights(folder: Path) -> str:
    """Content hash of the transformer's configuration and weights, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()[:16]
