"""What sessions share and what they do not; that no change is lost where several threads make some; how faults beside a job are told."""

import importlib
import pkgutil
import threading
from collections import Counter
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch

import workbench.ui
from tests.ui.fakes import make_scored
from tests.ui.test_actions import SEARCH_SETTINGS, profile, wait_for
from workbench.ui import page
from workbench.ui import session as sessions
from workbench.ui.actions import common, compare, search
from workbench.ui.bindings import Page

MUTABLE = (dict, list, set, bytearray, Counter, np.ndarray, torch.Tensor)
IN_COMMON = ("board", "store", "bundle", "job", "lock")  # of all sessions, on purpose, each with a lock of its own


def containers(value, seen=None) -> dict[int, object]:
    """Everything in a value that can be changed in place, by identity."""
    seen = {} if seen is None else seen
    if id(value) in seen or isinstance(value, type):
        return seen
    if isinstance(value, MUTABLE):
        seen[id(value)] = value
    inner = (value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set | frozenset)
             else vars(value).values() if hasattr(value, "__dataclass_fields__") or isinstance(value, SimpleNamespace) else ())
    for each in inner:
        containers(each, seen)
    return seen


def own(session):
    return {name: value for name, value in vars(session).items() if name not in IN_COMMON}


@pytest.fixture
def drawn(store):
    """Every component's value, drawn from a session."""
    with gr.Blocks():
        built = {}
        binder = Page.bind

        def keep(self, *args):
            built["page"] = self
            binder(self, *args)

        Page.bind = keep
        try:
            page.build(store)
        finally:
            Page.bind = binder
    return lambda session: [binding.draw(session) for binding in built["page"].bindings]


def test_where_sessions_start_cannot_be_changed_in_place():
    assert {name for name, value in sessions.OF_MODEL.items() if containers(value)} == set()
    for table in (sessions.OF_COMPARISON, sessions.OF_PROFILE, sessions.OF_MODEL):
        with pytest.raises(TypeError):
            table["pair"] = 1
    for name in ("previews", "comparisons", "exports"):
        with pytest.raises(TypeError):
            sessions.OF_MODEL[name]["of one visitor"] = "picture"


def test_two_visitors_have_no_object_in_common_that_one_could_change(store, finish):
    def visit():
        session = store.open("")
        session.sync()
        profile(session)
        finish(session)
        search.search(session, 1.2, None, 5.0, *SEARCH_SETTINGS)
        return finish(session)

    store.start_preload()
    assert store.preload.wait(20)
    first, second = visit(), visit()
    shared = containers(own(first)).keys() & containers(own(second)).keys()
    assert not shared, [containers(own(first))[each] for each in shared]
    assert first.result is not None and second.result is not None


def test_what_is_drawn_is_of_its_own_each_time(drawn, searched):
    searched.set(pinned=make_scored(searched.profile, 8, 8))
    constants = {}
    for module in pkgutil.walk_packages(workbench.ui.__path__, "workbench.ui."):
        for value in vars(importlib.import_module(module.name)).values():
            containers(value, constants)
    first, second = containers(drawn(searched)), containers(drawn(searched))
    kept = containers(own(searched))
    assert len(first) > 100
    assert not first.keys() & (second.keys() | constants.keys()) - kept.keys(), "another visitor's figure is made of the same lists"


class SlowCount(int):
    """Whoever adds to it gives the others time to do the same."""

    def __add__(self, other):
        threading.Event().wait(0.001)
        return SlowCount(int(self) + other)


def at_once(*works, times=10):
    """Each of some works several times, all in threads of their own."""
    threads = [threading.Thread(target=lambda work=work: [work(i) for i in range(times)]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_no_change_is_lost_where_several_threads_make_them(session):
    for name in ("gain", "notice-model", "pace"):
        session.rev[name] = SlowCount(0)

    def pulse(number):
        session._pace = object()
        session.sync()

    at_once(*[lambda i: session.set(gain=i)] * 3, *[lambda i, n=n: session.notify("model", f"{n} {i}") for n in range(3)], pulse, pulse)
    assert session.rev["gain"] == 30 and session.rev["notice-model"] == 30
    assert session.rev["pace"] >= 10, "both visitors' looks count"


def test_what_several_threads_add_is_all_there(session):
    class Slow(dict):
        def items(self):
            found = list(super().items())
            threading.Event().wait(0.001)
            return found

    session.previews = Slow()
    at_once(*[lambda i, n=n: session.put("previews", (n, i), "address") for n in range(4)])
    assert session.previews.keys() == {(n, i) for n in range(4) for i in range(10)}


def test_a_session_keeps_the_newest_comparisons_only(searched, finish):
    prompts, seed, steps = searched.compare_form
    plans = [make_scored(searched.profile, weight, act, "uniform") for weight in (3, 4, 8) for act in (3, 4, 6, 8)]
    for scored in plans:
        common.choose(searched, scored)
        compare.compare(searched, prompts[0], seed, steps)
        finish(searched)
    newest = [scored.plan.plan_id for scored in plans[-sessions.KEPT_COMPARISONS:]]
    assert list(searched.comparisons) == newest
    common.choose(searched, plans[0])
    assert searched.comparison is None, "it can be drawn again"


def test_a_fault_in_what_follows_a_job_is_told_as_its_failure(store, session, finish):
    def broken(_):
        raise RuntimeError("no look\nat all")

    store.on_ended = broken
    profile(session)
    finish(session)
    assert session.job.state == "failed" and session.job.error == "profile failed after its work had ended: RuntimeError: no look"
    assert session.notices["sensitivity"] == ("after profile: RuntimeError: no look", "error")
    assert session.profile is not None, "what the job made is kept"
    store.on_ended = lambda _: None
    search.search(session, 1.2, None, 5.0, *SEARCH_SETTINGS)
    assert finish(session).job.state == "done"


def test_an_example_that_cannot_be_shown_leaves_the_model(store):
    def broken(_):
        raise RuntimeError("half a file")

    store.on_adopt = broken
    store.start_preload()
    session = store.open("")
    assert session.job.wait(20)
    session.sync()
    assert session.bundle is not None
    assert session.notices["model"] == ("emoji-flux is loaded, but its example cannot be shown: RuntimeError: half a file", "error")


def test_what_ends_its_thread_beside_a_job_is_told_too(session):
    def leave():
        raise SystemExit(3)

    session.soon("layer_inspection", leave)
    wait_for(lambda: session.pending == 0)
    assert session.notices["layer_inspection"] == ("SystemExit: 3", "error")
