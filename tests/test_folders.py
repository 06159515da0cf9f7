"""Names that come from files: none becomes a path out of its folder, and of a repository only the pipeline's files are wanted."""

import json
from types import SimpleNamespace

import pytest

from workbench import checkpoints, export, folders, modelfiles, runs
from workbench.models import sources
from workbench.options import BadInput, ModelSpec

PARTS = {"vae": ["diffusers", "AutoencoderKL"], "transformer": ["diffusers", "FluxTransformer2DModel"], "tokenizer": ["transformers", "X"],
         "image_encoder": [None, None]}
CLIMBING = ["../other", "..", "/no-such-folder", "vae/../../other", ".hidden", "a/b", "a\\b", "", "vae ", "ü"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def model(tmp_path):
    """A folder like a pipeline's, with a neighbour that is nobody's business."""
    folder = tmp_path / "models" / "model"
    write(folder / "model_index.json", {"_class_name": "FluxPipeline", **PARTS})
    for name in ("vae/config.json", "vae/a.safetensors", "transformer/config.json", "transformer/b.safetensors", "tokenizer/vocab.txt",
                 "tokenizer/tokenizer_config.json", "LICENSE-MIT.txt", "notice.md", "README.md", "whole.safetensors", "vae/run.py"):
        write(folder / name, {"of": name})
    write(folder.parent / "other" / "secret.txt", "secret")
    return folder


def copied(model, out):
    """What an export takes along, by name."""
    out.mkdir(parents=True)
    export._copy_pipeline(SimpleNamespace(pipeline=SimpleNamespace(config=SimpleNamespace(_name_or_path=str(model)))), out)
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_an_export_takes_the_pipelines_files_and_its_licence(model, tmp_path):
    assert copied(model, tmp_path / "out") == {
        "model_index.json", "vae/config.json", "vae/a.safetensors", "transformer/config.json", "tokenizer/vocab.txt",
        "tokenizer/tokenizer_config.json", "LICENSE-MIT.txt", "notice.md", "BASE_MODEL.md"}


@pytest.mark.parametrize("name", CLIMBING)
def test_a_part_whose_name_is_a_path_is_refused_by_everything_that_opens_the_folder(model, tmp_path, name):
    write(model / "model_index.json", {"_class_name": "FluxPipeline", **PARTS, name: ["diffusers", "AutoencoderKL"]})
    before = sorted(tmp_path.rglob("*"))
    for use in (lambda: copied(model, tmp_path / "outs" / "out"), lambda: sources.load(ModelSpec(source=str(model)))):
        with pytest.raises(BadInput, match="no plain file or folder name") as error:
            use()
        assert "\n" not in str(error.value)
    assert sorted(path for path in tmp_path.rglob("*") if "outs" not in path.parts) == before
    assert not [path for path in (tmp_path / "outs").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../../other/secret.txt", "/no-such-folder/x", "../vae/a.safetensors", "a/b.safetensors", 5])
@pytest.mark.parametrize("place", ["index", "tokenizer"])
def test_a_list_of_files_may_not_name_one_elsewhere(model, name, place):
    if place == "index":
        write(model / "vae" / "a.safetensors.index.json", {"weight_map": {"x": "a.safetensors", "y": name}})
    else:
        write(model / "tokenizer" / "tokenizer_config.json", {"fast_tokenizer_files": [name]})
    with pytest.raises(BadInput, match=r"no plain file or folder name|has no weight_map of tensors to files"):
        sources.load(ModelSpec(source=str(model)))


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "null"])
def test_a_damaged_list_of_shards_is_one_line(model, content):
    write(model / "vae" / "a.safetensors.index.json", content)
    with pytest.raises(BadInput, match=r"vae/a\.safetensors\.index\.json (cannot be read|is a|has no weight_map)"):
        sources.load(ModelSpec(source=str(model)))


@pytest.mark.parametrize("content", ["null", '["FluxPipeline"]', '{"_class_name": ["FluxPipeline"]}', '{"_class_name": {}}'])
def test_an_index_of_another_form_is_one_line(model, content):
    write(model / "model_index.json", content)
    with pytest.raises(BadInput, match=r"model_index\.json(: _class_name)? is a?"):
        sources.load(ModelSpec(source=str(model)))


@pytest.mark.parametrize("link, target", [("vae/secret.txt", "other/secret.txt"), ("LICENSE", "other/secret.txt"),
                                          ("tokenizer_2", "other")])
def test_an_export_takes_nothing_that_a_link_has_elsewhere(model, tmp_path, link, target):
    write(model / "model_index.json", {"_class_name": "FluxPipeline", **PARTS, "tokenizer_2": ["transformers", "X"]})
    (model / link).symlink_to(model.parent / target)
    with pytest.raises(BadInput, match="is a link to a file outside"):
        copied(model, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.read_text("utf-8") == "secret"]


def test_links_within_a_folder_and_those_of_the_hubs_cache_are_followed(model, tmp_path):
    (model / "vae" / "more.txt").symlink_to("config.json")
    (tmp_path / "alias").symlink_to(model)
    assert "vae/more.txt" in copied(tmp_path / "alias", tmp_path / "out")
    snapshot = tmp_path / "hub" / "models--maker--model" / "snapshots" / "0123"
    for number, path in enumerate(p for p in model.rglob("*") if p.is_file()):
        blob = write(snapshot.parents[1] / "blobs" / str(number), path.read_text())
        (snapshot / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path.relative_to(model)).symlink_to(blob)
    assert copied(snapshot, tmp_path / "again") == copied(model, tmp_path / "third")
    (snapshot / "vae" / "secret.txt").symlink_to(model.parent / "other" / "secret.txt")
    with pytest.raises(BadInput, match="is a link to a file outside"):
        copied(snapshot, tmp_path / "fourth")


FILES = ["model_index.json", "LICENSE.md", "Notice", "README.md", "flux1-dev.safetensors", "ae.safetensors", ".gitattributes",
         "vae/config.json", "vae/w.safetensors", "vae/w.fp16.safetensors", "vae/w.bin", "vae/extra/w.safetensors", "vae/.hidden.json",
         "text/model-00001-of-00002.safetensors", "text/model-00002-of-00002.safetensors", "text/model.safetensors.index.json",
         "text/model.fp16-00001-of-00002.safetensors", "text/model-00001-of-00002.bf16.safetensors",
         "text/model.safetensors.index.fp16.json", "dev_grid.jpg", "half/w.bf16.safetensors", "half/w.fp16.safetensors",
         "half/w.safetensors.index.fp16.json", "half/config.json",
         "tok/vocab.txt", "tok/spiece.model", "tok/merges.v1.txt", "unused/w.safetensors", "../up.json", "vae/../../up.json"]


def test_of_a_repository_only_the_pipelines_files_are_wanted():
    assert folders.wanted(FILES, ["vae", "text", "half", "tok"]) == [
        "model_index.json", "LICENSE.md", "Notice", "README.md", "vae/config.json", "vae/w.safetensors",
        "text/model-00001-of-00002.safetensors", "text/model-00002-of-00002.safetensors", "text/model.safetensors.index.json",
        "half/w.bf16.safetensors", "half/config.json",
        "tok/vocab.txt", "tok/spiece.model", "tok/merges.v1.txt"]


def test_a_snapshot_is_whole_once_every_part_and_shard_is_there(model):
    write(model / "transformer" / "b.safetensors.index.json", {"weight_map": {"x": "b.safetensors", "y": "c.safetensors"}})
    assert not modelfiles.is_whole(model), "a shard is missing"
    write(model / "transformer" / "c.safetensors", "x")
    assert modelfiles.is_whole(model)
    (model / "tokenizer" / "vocab.txt").rename(model / "vocab.txt")
    (model / "tokenizer" / "tokenizer_config.json").unlink()
    (model / "tokenizer").rmdir()
    assert not modelfiles.is_whole(model), "a part is missing"


def test_a_checkpoint_of_a_search_may_not_name_files_elsewhere(tmp_path):
    run = runs.Run(tmp_path / "run")
    found = checkpoints.Checkpoints(run, "0123")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    for states, expected in ((["../../secret", "/no-such-folder/x", 5], ({"a": 1}, {})), (None, None), (7, None)):
        run.save_json("search", "0123", {"table": {"a": 1}, "states": states})
        assert found.load() == expected
    run.save_json("search", "0123", ["no table"])
    assert found.load() is None
