"""What is fetched from the hub: the pipeline's own files by name, its licence, and nothing of a pipeline that cannot be run here."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import COMMIT, REPOSITORY, serving

ROOT = Path(__file__).resolve().parents[1]
DOWNLOAD = """
from workbench.models import sources
from workbench.options import BadInput
try:
    print(sources._download({source!r}))
except BadInput as error:
    print("BadInput:", error)
"""
OUTLINE = """
import json
from workbench import model_info
found, cached = model_info.on_hub({source!r}), model_info.of({source!r})
print(json.dumps(vars(found) | {{"cached": vars(cached)}}))
"""
STEM = "diffusion_pytorch_model"
PARTS = {"scheduler": ["diffusers", "S"], "text_encoder": ["transformers", "T"], "tokenizer": ["transformers", "K"],
         "transformer": ["diffusers", "F"], "vae": ["diffusers", "V"], "image_encoder": [None, None]}


def weights(path, **shapes):
    """A safetensors file of zeros."""
    header, start = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(start))


@pytest.fixture
def repository(tmp_path):
    """As large repositories are: single files at the root, copies in half precision, shards, pictures, a pickle."""
    folder = tmp_path / "repository"
    weights(folder / "flux1-dev.safetensors", everything=[1000, 100])
    weights(folder / "transformer" / f"{STEM}-00001-of-00002.safetensors", **{"blocks.0.q.weight": [8, 4]})
    weights(folder / "transformer" / f"{STEM}-00002-of-00002.safetensors", **{"blocks.1.q.weight": [8, 4]})
    weights(folder / "transformer" / f"{STEM}.fp16-00001-of-00001.safetensors", **{"blocks.0.q.weight": [8, 4]})
    weights(folder / "vae" / f"{STEM}.safetensors", conv=[3, 6])
    weights(folder / "vae" / f"{STEM}.fp16.safetensors", conv=[3, 6])
    weights(folder / "text_encoder" / "model.bf16.safetensors", embedding=[5, 2])
    weights(folder / "controlnet" / "c.safetensors", conv=[3, 6])
    shards = {"weight_map": {f"blocks.{shard}.q.weight": f"{STEM}-0000{shard + 1}-of-00002.safetensors" for shard in range(2)}}
    texts = {"model_index.json": json.dumps({"_class_name": "FluxPipeline", **PARTS}),
             f"transformer/{STEM}.safetensors.index.json": json.dumps(shards),
             f"transformer/{STEM}.safetensors.index.fp16.json": json.dumps(shards),
             "vae/v.bin": "a pickle", "vae/diffusion.msgpack": "flax",
             **{f"{name}/config.json": json.dumps({"of": name}) for name in ("transformer", "vae", "text_encoder")},
             "scheduler/scheduler_config.json": "{}",
             "tokenizer/spiece.model": "m", "tokenizer/merges.txt": "a b", "LICENSE.md": "ours", "NOTICE": "theirs", "README.md": "card",
             "grid.jpg": "picture"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


WANTED = {"model_index.json", "LICENSE.md", "NOTICE", "README.md", "transformer/config.json",
          *(f"transformer/{STEM}-0000{shard}-of-00002.safetensors" for shard in (1, 2)), f"transformer/{STEM}.safetensors.index.json",
          "vae/config.json", f"vae/{STEM}.safetensors", "text_encoder/config.json", "text_encoder/model.bf16.safetensors",
          "scheduler/scheduler_config.json", "tokenizer/spiece.model", "tokenizer/merges.txt"}


def client(hub, home, code, source=REPOSITORY):
    """What a new process prints that has this hub."""
    done = subprocess.run([sys.executable, "-c", code.format(source=source)], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=hub.environment(home))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_download_asks_for_the_pipelines_files_and_its_licence_and_no_more(repository, tmp_path):
    with serving(repository) as hub:
        folder = Path(client(hub, tmp_path / "home", DOWNLOAD))
        assert hub.fetched[0] == "model_index.json" and sorted(hub.fetched) == sorted(WANTED), hub.unknown
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == WANTED
        assert folder.name == COMMIT
        hub.listing = False  # the hub is gone; the model is here
        hub.fetched.clear()
        assert Path(client(hub, tmp_path / "home", DOWNLOAD)) == folder and hub.fetched == []


def test_a_pipeline_of_another_family_is_refused_after_its_index(repository, tmp_path):
    (repository / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **PARTS}))
    with serving(repository) as hub:
        said = client(hub, tmp_path / "home", DOWNLOAD)
        assert said.startswith("BadInput: maker/model is a WanPipeline; supported are FluxPipeline"), said
        assert hub.fetched == ["model_index.json"]


@pytest.mark.parametrize(("change", "words"), [
    (lambda folder: (folder / "model_index.json").unlink(), "nor a diffusers pipeline that can be fetched"),
    (lambda folder: (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **PARTS, "../up": ["a", "b"]})),
     "'../up', which is no plain file or folder name"),
    (lambda folder: [path.rename(path.with_suffix(".bin")) for path in (folder / "transformer").glob("*.safetensors")],
     "has no safetensors weights of its transformer"),
])
def test_what_is_no_pipeline_is_refused_in_one_line_before_its_weights(repository, tmp_path, change, words):
    change(repository)
    with serving(repository) as hub:
        assert words in client(hub, tmp_path / "home", DOWNLOAD)
        assert set(hub.fetched) <= {"model_index.json"}


def test_the_size_that_is_told_before_a_download_is_that_of_its_files(repository, tmp_path):
    with serving(repository) as hub:
        told = json.loads(client(hub, tmp_path / "home", OUTLINE))
        sizes = {name: (repository / name).stat().st_size for name in WANTED if name.endswith(".safetensors")}
        assert told["note"] == "" and told["disk_bytes"] == sum(sizes.values()) and set(hub.fetched) == {"model_index.json", *sizes}
        assert (told["family"], told["parameters"], told["all_parameters"]) == ("FluxPipeline", 64, 64 + 18 + 10)
        assert told["cached"]["disk_bytes"] is None, "an index alone is no downloaded model"
        client(hub, tmp_path / "home", DOWNLOAD)
        after = json.loads(client(hub, tmp_path / "home", OUTLINE))["cached"]
        assert {name: after[name] for name in ("disk_bytes", "parameters", "all_parameters", "family")} == {
            name: told[name] for name in ("disk_bytes", "parameters", "all_parameters", "family")}


@pytest.mark.slow
def test_a_model_in_half_precision_alone_is_downloaded_loaded_and_exported(tmp_path):
    """The embedded model, its files named as copies in half precision are: ten seconds."""
    folder = shutil.copytree(ROOT / "assets" / "models" / "emoji-flux", tmp_path / "repository")
    for path in folder.glob("vae/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    (folder / "LICENSE").write_text("ours")
    code = ("from types import SimpleNamespace; from pathlib import Path; from workbench import export, modelfiles\n"
            "from workbench.models import sources; from workbench.options import ModelSpec\n"
            "bundle = sources.load(ModelSpec(source={source!r}, device='cpu'))\n"
            "out = Path(" + repr(str(tmp_path / "out")) + "); out.mkdir(); export._copy_pipeline(bundle, out)\n"
            "print(bundle.name, (out / 'LICENSE').read_text(), modelfiles.variant_on_disk(out, {{'vae': ['diffusers', 'AutoencoderKL']}}),"
            " bundle.prompts('showcase')[0])")
    with serving(folder) as hub:
        assert client(hub, tmp_path / "home", code).startswith("model ours fp16 ")
        assert f"vae/{STEM}.fp16.safetensors" in hub.fetched
