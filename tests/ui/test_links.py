"""A link holds exactly what the plan decides, says nothing that could be false, and refuses everything that is no link of ours."""

import base64
import json
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ui.fakes import FakeBundle, FakePipeline
from workbench import costs as cost_tables
from workbench.options import ACT_BITS, WEIGHT_BITS, BadInput, QuantConfig, SensitivityConfig, TraceConfig
from workbench.plans import BitChoice, make_plan
from workbench.ui import links, report
from workbench.ui.actions import export

STEPS = 5


@pytest.fixture(scope="module")
def bundle():
    return FakeBundle()


@pytest.fixture(scope="module")
def costs(bundle):
    return cost_tables.tabulate(bundle, QuantConfig())


def plan_of(bundle, costs, weights, acts):
    found = FakePipeline().profile(bundle, TraceConfig(steps=STEPS), SensitivityConfig(), QuantConfig())
    layers = len(bundle.layers)
    return make_plan(layers=bundle.layers, sigma_T=found.sensitivity.sigma_T1[:-1].tolist(), costs=costs, quant=QuantConfig(),
                     weight_choice_L=[BitChoice(weight_bits=weights[i % len(weights)]) for i in range(layers)],
                     act_bits_TL=[[acts[(t + i) % len(acts)] for i in range(layers)] for t in range(STEPS)], model_hash=bundle.model_hash)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(WEIGHT_BITS), min_size=1, max_size=7), st.lists(st.sampled_from(ACT_BITS), min_size=1, max_size=7))
def test_what_comes_back_decides_the_same(weights, acts):
    bundle = FakeBundle()
    costs = cost_tables.tabulate(bundle, QuantConfig())
    plan = plan_of(bundle, costs, weights, acts)
    recipe = links.decode(links.encode(plan, "emoji-flux", ("noto anchor", "fluent pizza"), 7))
    back = links.plan_of(recipe, bundle, costs)
    assert back.plan_id == plan.plan_id and back.weight_bytes == plan.weight_bytes and back.act_bits_mean == plan.act_bits_mean
    assert (recipe.prompts, recipe.seed, recipe.model) == (("noto anchor", "fluent pizza"), 7, "emoji-flux")


def test_a_link_of_the_first_version_keeps_the_grids_of_its_day(bundle, costs):
    plan = plan_of(bundle, costs, (4,), (4,))
    values = json.loads(zlib.decompress(base64.urlsafe_b64decode(links.encode(plan, "emoji-flux", (), 0) + "==")))
    assert values["version"] == 3 and values["quant"] == QuantConfig().model_dump(mode="json")
    first = {name: value for name, value in values.items() if name != "version"} | {"quant": {"damping": 0.3}}
    quant = links.decode(coded(first)).quant
    assert (quant.weight_grid, quant.act_grid, quant.damping) == ("symmetric", "symmetric", 0.3)
    del first["quant"]
    assert links.decode(coded(first)).quant == QuantConfig(weight_grid="symmetric", act_grid="symmetric")


def test_a_link_stores_weights_on_the_grid_that_its_plan_names(bundle, costs):
    plan = plan_of(bundle, costs, (4,), (4,))
    recipe = links.decode(links.encode(plan, "emoji-flux", (), 0))
    recipe = recipe.model_copy(update={"quant": QuantConfig(weight_grid="asymmetric")})
    assert not any(choice.symmetric for choice in links.plan_of(recipe, bundle, costs).weight_choice_L)


def coded(values) -> str:
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(values).encode())).decode().rstrip("=")


@pytest.mark.parametrize("code", [
    "", "x" * 50, "!!!", "A" * 100_000, coded([1]), coded("text"), coded({"version": 4}), coded("[" * 50_000),
    base64.urlsafe_b64encode(zlib.compress(b" " * 5_000_000)).decode(),
])
def test_what_is_no_link_is_refused_in_one_line(code):
    with pytest.raises(BadInput) as error:
        links.decode(code)
    assert "link" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("change", "said"), [
    ({"model_hash": "other4567"}, "made for"), ({"weights": "2"}, "does not fit"), ({"steps": ["0" * 30]}, "does not fit"),
    ({"sigmas": [0.1, 0.2, 0.3, 0.4, 0.5]}, "noise levels"), ({"weights": "9" * 30}, "width"), ({"weights": "a" * 30}, "width"),
])
def test_a_link_that_does_not_fit_the_model_is_refused(bundle, costs, change, said):
    recipe = links.decode(links.encode(plan_of(bundle, costs, [4], [4]), "emoji-flux", (), 0))
    with pytest.raises(BadInput, match=said):
        links.plan_of(links.Recipe.model_validate(recipe.model_dump() | change), bundle, costs)


def test_prompts_of_a_link_are_checked_like_typed_ones(bundle, costs):
    values = links.decode(links.encode(plan_of(bundle, costs, [4], [4]), "emoji-flux", (), 0)).model_dump(mode="json")
    for prompt in ("", "x" * 5001, "a\x00b"):
        with pytest.raises(BadInput, match="prompt"):
            links.decode(coded(values | {"prompts": [prompt]}))


def test_following_a_link_restores_prompts_and_plan_once(session, costs):
    code = links.encode(plan_of(session.bundle, costs, [3], [6]), "emoji-flux", ("noto anchor",), 3)
    export.follow_link(session, code)
    assert session.prompts == ("noto anchor",) and session.seed == 3 and session.steps == STEPS
    assert session.chosen.origin == "link" and session.chosen.error is None
    session.set(chosen=None)
    export.follow_link(session, code)
    assert session.chosen is None, "a reload of the same address does not undo what was done since"


def test_on_a_space_only_listed_models_are_loaded(session, costs, monkeypatch):
    from workbench.ui.actions import model

    monkeypatch.setenv("SPACE_ID", "someone/space")
    for source in ("/etc", "owner/other-model"):
        with pytest.raises(BadInput, match="only emoji-flux"):
            model.load_model(session, source)
    export.follow_link(session, links.encode(plan_of(session.bundle, costs, [3], [6]), "owner/other-model", (), 0))
    assert "only emoji-flux" in session.notices["model"][0] and session.chosen is None


def test_a_report_asks_for_nothing_and_escapes_prompts(session, costs):
    session.set(chosen=export.Drafted(plan_of(session.bundle, costs, [3], [6]), origin="<script>alert(1)</script>"))
    page = report.write(session)
    assert "<script" not in page and "src=\"http" not in page and "href=" not in page
    assert page.count("<svg") == 1 and ">W</text>" in page
