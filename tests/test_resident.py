"""Loaded models: none is there twice, what is in use stays, and what nobody uses takes a bounded number of bytes."""

import gc
import multiprocessing
import os
import threading
import weakref

import pytest

from workbench import pipeline
from workbench.models import resident, sources
from workbench.models.resident import Resident, loaded_bytes
from workbench.options import BadInput


class Model:
    """Refers to itself in a circle, as a bundle does by its hooks."""

    def __init__(self, name, size):
        self.name, self.size, self.itself = name, size, self


@pytest.fixture
def models():
    """(registry of at most 10 bytes, get(name, size), names in the order of loading)."""
    registry, loads = Resident(lambda model: model.size, most_bytes=10), []

    def get(name, size=4):
        def load():
            loads.append(name)
            return Model(name, size)
        return registry.get(name, load)

    return registry, get, loads


def test_a_model_is_loaded_once_and_the_least_recently_used_goes_first(models):
    registry, get, loads = models
    for name in ("a", "b", "a", "c", "a"):
        get(name)
    assert loads == ["a", "b", "c"]
    assert [name in registry for name in "abc"] == [True, False, True], "b was used longest ago, and three are more than 10 bytes"
    get("b")
    assert loads == ["a", "b", "c", "b"]


def test_what_is_in_use_is_never_loaded_twice(models):
    registry, get, loads = models
    held = get("a")
    for name in ("b", "c", "d", "e"):
        get(name)
    assert get("a") is held and loads.count("a") == 1
    del held
    for name in ("b", "c", "d", "e"):
        get(name)
    assert "a" not in registry


def test_the_newest_stays_whatever_it_takes_and_goes_before_the_next_one_is_loaded(models):
    registry, get, _ = models
    watched = weakref.ref(get("large", 1000))
    get("large")
    assert watched() is not None and "large" in registry, "a worker asks for its model again at every stage"
    there = []
    registry.get("next", lambda: there.append(watched()) or Model("next", 4))
    assert there == [None], "its memory is free before the next one needs it"


def test_a_model_that_cannot_be_loaded_leaves_nothing(models):
    registry, get, loads = models

    def refuse():
        raise BadInput("a file is missing")

    with pytest.raises(BadInput):
        registry.get("a", refuse)
    assert "a" not in registry and get("a").name == "a" and loads == ["a"]


def test_two_that_ask_at_once_get_the_same_one(models):
    registry, found, begun = models[0], [], threading.Event()

    def load():
        begun.set()
        threading.Event().wait(0.05)
        return Model("a", 4)

    threads = [threading.Thread(target=lambda: found.append(registry.get("a", load))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begun.is_set() and len({id(model) for model in found}) == 1


def test_the_pipeline_lets_models_go_that_nobody_uses(monkeypatch):
    monkeypatch.setattr(pipeline, "_LOADED", Resident(lambda model: model.size, most_bytes=10))
    monkeypatch.setattr(sources, "load", lambda spec: Model(spec.source, 4))
    names = [f"maker/model{number}" for number in range(20)]
    held = pipeline.load(names[0], "cpu")
    watched = [weakref.ref(pipeline.load(name, "cpu")) for name in names]
    gc.collect()
    assert [number for number, model in enumerate(watched) if model() is not None] == [0, 18, 19]
    assert pipeline.load(names[0], "cpu") is held
    assert pipeline.is_loaded(names[0], "cpu") and pipeline.is_loaded(names[19], "cpu") and not pipeline.is_loaded(names[5], "cpu")


def test_the_bytes_of_a_bundle_are_those_of_all_its_parts(bundle):
    parts = [part for part in (bundle.pipeline.transformer, bundle.pipeline.vae, bundle.pipeline.text_encoder) if part is not None]
    least = sum(parameter.numel() * parameter.element_size() for part in parts for parameter in part.parameters())
    assert least <= loaded_bytes(bundle) < resident.KEPT_BYTES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_process_forked_while_a_model_loads_can_load_its_own(models):
    registry, get, _ = models
    loading, done = threading.Event(), threading.Event()

    def slow():
        loading.set()
        done.wait(60)
        return Model("slow", 1)

    other = threading.Thread(target=registry.get, args=("slow", slow))
    other.start()
    assert loading.wait(20)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: get("own"))
    child.start()
    child.join(20)
    ended = child.exitcode
    child.kill()
    done.set()
    other.join()
    assert ended == 0
