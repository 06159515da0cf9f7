"""What is generated, set on the Model screen and over HTTP: it reaches the stages, and nothing found for other sizes stays."""

import pytest

from tests.ui.test_actions import profile
from workbench.options import PIPELINES_OWN, BadInput, GenerationConfig
from workbench.ui import endpoints, inputs, limits
from workbench.ui.actions import model
from workbench.ui.tabs.model import _generation_input


def values(**asked):
    """What the browser sends: a number, nothing, or a text."""
    return [asked.get(name, "" if name == "negative_prompt" else None) for name in model.GENERATION_INPUTS]


def test_another_size_starts_afresh_with_the_same_prompts(profiled, finish):
    profiled.prompts = ("my own",)
    model.generate_as(profiled, *values(height=96.0, guidance=2.0))
    assert profiled.bundle.generation == GenerationConfig(height=96, guidance=2)
    assert profiled.profile is None and profiled.fisher_TL == () and profiled.prompts == ("my own",)
    assert profiled.notices["model"] == ("generates with height 96, guidance 2.0", "info")
    profile(profiled)
    assert finish(profiled).profile is not None
    model.generate_as(profiled, *values())
    assert profiled.bundle.generation == PIPELINES_OWN and profiled.profile is None


def test_the_same_settings_again_forget_nothing(profiled):
    model.generate_as(profiled, *values())
    assert profiled.profile is not None


@pytest.mark.parametrize(("asked", "line"), [({"height": 7}, "height"), ({"width": "wide"}, "width"), ({"guidance": -1}, "guidance"),
                                             ({"negative_prompt": "x" * 5001}, "negative_prompt")])
def test_what_cannot_be_generated_is_one_line(session, asked, line):
    with pytest.raises(BadInput, match=line) as error:
        model.generate_as(session, *values(**asked))
    assert "\n" not in str(error.value) and session.bundle.generation == PIPELINES_OWN


def test_a_space_draws_no_posters(session, monkeypatch):
    monkeypatch.setattr(limits, "here", lambda: limits.ON_A_SPACE)
    monkeypatch.setattr(session.bundle, "tokens", 5000)
    with pytest.raises(BadInput, match="5000 tokens of text and image are more than the 1024"):
        model.generate_as(session, *values(height=4096))
    assert session.bundle.generation == PIPELINES_OWN


def test_a_field_without_a_value_is_a_box_and_no_slider():
    for name, component in inputs.build(GenerationConfig, *GenerationConfig.model_fields).items():
        assert type(component).__name__ == ("Textbox" if name == "negative_prompt" else "Number")
        assert component.value == GenerationConfig.model_fields[name].default


def test_a_call_says_what_is_generated(store, pipeline, monkeypatch):
    calls = endpoints.Endpoints(store)
    session, work = calls._profile("emoji-flux", ["a"], 4, 0, {"height": 96, "probes": 1})
    work(lambda progress: None)
    assert session.bundle.generation == GenerationConfig(height=96)
    with pytest.raises(BadInput, match="the profile was made for height 96"):
        calls._generate(["a"], 0, 4, None, None, session.id, {"height": 64})
    seen, stage = [], pipeline.draw
    monkeypatch.setattr(pipeline, "draw", lambda bundle, *a, **k: seen.append(bundle.generation) or stage(bundle, *a, **k))
    for known, settings in ((session.id, None), (session.id, {"height": 96}), (None, {"width": 48})):
        calls._generate(["a"], 0, 4, None, None, known, settings)[1](lambda progress: None)
    assert seen == [GenerationConfig(height=96)] * 2 + [GenerationConfig(width=48)]


def test_the_screen_shows_what_the_model_takes_and_nothing_else(session):
    shown = {name: _generation_input(session, name) for name in model.GENERATION_INPUTS}
    assert {name for name, update in shown.items() if update["visible"]} == set(session.bundle.takes)
    model.generate_as(session, *values(width=32))
    assert _generation_input(session, "width")["value"] == 32 and _generation_input(session, "height")["value"] is None
    session.bundle = None
    assert not any(_generation_input(session, name)["visible"] for name in model.GENERATION_INPUTS)
