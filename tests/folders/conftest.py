"""A tiny pipeline, saved once whole and once in shards, and copies of both to damage."""

from pathlib import Path

import pytest

from tests.folders.tiny import linked_copy, tiny_pipeline


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sharded"
    tiny_pipeline().save_pretrained(folder, max_shard_size="6KB")
    return folder


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    return linked_copy(tiny, tmp_path / "model")


@pytest.fixture
def shards(sharded, tmp_path) -> Path:
    return linked_copy(sharded, tmp_path / "model")
