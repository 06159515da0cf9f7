"""One way round: what changed is drawn, what did not is left alone, and an error becomes one line of its screen."""

import asyncio
import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from gradio.state_holder import SessionState

from workbench.options import BadInput
from workbench.ui import page
from workbench.ui.bindings import Page, Screens


@pytest.fixture
def wired(store):
    with gr.Blocks():
        wired = Page(store)
        for name in ("cell", "how"):
            wired.show(gr.HTML(), [name], lambda s, name=name: f"{name} {getattr(s, name)}")
        wired.show(gr.HTML(), ["notice-search"], lambda s: s.notices.get("search", ("", ""))[0])
    return wired


def drawn(outputs):
    """Values per component, None where nothing is sent."""
    return [None if isinstance(v, dict) and v.get("__type__") == "update" else v for v in outputs[2:]]


def test_only_what_changed_is_drawn_again(wired, session):
    first = wired.refresh(session, {})
    assert drawn(first) == ["cell (None, None)", "how mean", ""]
    assert drawn(wired.refresh(session, first[1])) == [None, None, None]
    session.set(cell=(1, 2))
    assert drawn(wired.refresh(session, first[1])) == ["cell (1, 2)", None, None]


def test_another_session_is_drawn_whole(wired, session, store):
    first = wired.refresh(session, {})
    other = store.open("")
    assert None not in drawn(wired.refresh(other, first[1]))


def handler(wired, action):
    wired.on(lambda *a, **k: None, action, tab="search")
    return wired._handler(wired.listeners[-1])


def test_bad_input_becomes_the_line_of_its_screen_and_goes_with_the_next_action(wired, session):
    def refuse(_):
        raise BadInput("too small; 5 would do")

    seen = wired.refresh(session, {})[1]
    assert drawn(handler(wired, refuse)(session.id, seen)) == [None, None, "too small; 5 would do"]
    assert session.notices["search"] == ("too small; 5 would do", "error")
    handler(wired, lambda _: None)(session.id, seen)
    assert session.notices["search"][0] == ""


def test_an_unexpected_error_is_one_line_too(wired, session):
    def fail(_):
        raise RuntimeError("first\nsecond")

    handler(wired, fail)(session.id, {})
    assert session.notices["search"] == ("RuntimeError: first", "error")


def test_a_page_whose_link_cannot_be_followed_has_a_session_all_the_same(store, session):
    def broken(_, link):
        raise RuntimeError(f"no way to {link}\nat all")

    with Screens() as demo:
        wired = Page(store)
        wired.on_open = broken
        wired.bind(demo, gr.BrowserState(""))
    opened = next(block.fn for block in demo.fns.values() if block.name == "open_page")
    kept, shown, *_ = opened(session.id, SimpleNamespace(query_params={"plan": "abc"}))
    assert kept == shown == session.id
    assert session.notices["model"] == ("RuntimeError: no way to abc", "error")


def test_only_jobs_compute_in_parallel(wired, session):
    """A second thread with helpers of its own would halve the speed of the first (`tuning.py`)."""
    found, before = {}, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        def note(where):
            found[where] = torch.get_num_threads()

        wired.show(gr.HTML(), ["cell"], lambda _: note("drawing"))
        with ThreadPoolExecutor(1) as visitor:
            visitor.submit(handler(wired, lambda _: note("action")), session.id, {}).result()
        session.soon("look", lambda: note("light"))
        session.store.light.shutdown()
        session.submit("load", "model", lambda on_progress: note("job"))
        assert session.job.wait(20)
    finally:
        torch.set_num_threads(before)
    assert found == {"drawing": 1, "action": 1, "light": 1, "job": 2}


def test_the_payload_of_an_event_reaches_the_action(wired, session):
    got = []
    wired.on(lambda *a, **k: None, lambda s, payload, value: got.append((payload, value)), tab="search", with_payload=True)
    listener = wired._handler(wired.listeners[-1])
    assert next(iter(inspect.signature(listener, eval_str=True).parameters.values())).annotation is gr.EventData
    listener(gr.EventData(None, {"row": 1}), session.id, {}, "v")
    assert got == [({"row": 1}, "v")]


@pytest.fixture
def demo(store):
    return page.build(store)


def test_no_listener_is_a_public_endpoint(demo):
    public = [d["api_name"] for d in demo.config["dependencies"] if d["api_visibility"] == "public" and d["targets"]]
    assert public == []


def test_gradios_own_status_goes_to_a_part_that_is_not_drawn(demo):
    events = [fn for fn in demo.fns.values() if fn.concurrency_id == "page"]
    assert events and all([type(shown) for shown in fn.show_progress_on] == [gr.Timer] for fn in events)


@pytest.mark.parametrize("sent", [("new", None, None), ("new", gr.Button("Stop"), None), (None, None, None), ("new", None, "too")])
def test_an_output_that_is_left_alone_is_not_made_anew(sent, monkeypatch):
    values = [gr.skip() if value is None else value for value in sent]
    with Screens() as demo:
        outputs = [gr.HTML(), gr.Button(), gr.HTML()]
        demo.load(lambda: None, None, outputs)
    (event,) = demo.fns.values()

    def answer(kind):  # in a thread: another test's browser may keep a loop in this one
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: asyncio.run(kind.postprocess_data(demo, event, list(values), SessionState(demo)))).result()

    made = []
    whole = answer(gr.Blocks)
    monkeypatch.setattr(SessionState, "_update_config", lambda self, number: made.append(number))
    assert answer(Screens) == [gr.skip() if value is None else theirs for value, theirs in zip(sent, whole)]
    assert made == [block._id for block, value in zip(outputs, sent) if isinstance(value, gr.Button)]


def test_no_component_would_send_a_lossy_image(demo):
    images = [b for b in demo.blocks.values() if isinstance(b, gr.Image | gr.ImageSlider | gr.Gallery)]
    assert [b for b in images if b.format != "png"] == []


def test_the_page_stays_small_and_asks_for_nothing_from_outside(demo):
    # A Form is the frame gradio draws around neighbours; an Api is a parameter of a public endpoint and draws nothing.
    own = [b for b in demo.blocks.values() if type(b).__name__ not in ("Form", "Api")]
    assert len(own) < 165
    config = json.dumps(demo.config, default=str)
    assert "googleapis" not in config and "cdn" not in config.lower()


def test_building_the_page_imports_no_torch():
    import subprocess
    import sys

    code = "import sys; from workbench.ui import page; from workbench.ui.session import Store; from workbench.jobs import Board; " \
           "page.build(Store(Board())); print('torch' in sys.modules, 'diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
