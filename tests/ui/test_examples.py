"""An example fills the screens, says that it is one, and lets nothing be made from it."""

import pytest
import torch

from tests.quant.toy import straight
from tests.ui.fakes import MODEL_HASH, FakeBundle, FakePipeline
from workbench import examples
from workbench.options import BadInput, Budget, QuantConfig, SearchConfig, SensitivityConfig, TraceConfig
from workbench.replay.trace import Trace
from workbench.types import Conditioning
from workbench.ui import page, tour
from workbench.ui.actions import compare, export, search, sensitivity


def make_trace(samples, steps=4):
    latent_ST = torch.linspace(-1, 1, samples * (steps + 1) * 6).reshape(samples, steps + 1, 3, 2)
    return Trace(integrator=straight(steps), tokens=3, latent_ST=latent_ST, output_ST=latent_ST[:, 1:].clone(), model_hash=MODEL_HASH,
                 conditioning=Conditioning(per_sample={"text": torch.ones(samples, 2)}, shared={"ids": torch.ones(3)}),
                 prompts=tuple(f"p{i}" for i in range(samples)), seeds=tuple(range(samples)))


@pytest.fixture
def example():
    pipeline, bundle = FakePipeline(), FakeBundle()
    found = pipeline.profile(bundle, TraceConfig(steps=4), SensitivityConfig(), QuantConfig())
    result = pipeline.search(bundle, found, Budget(max_mean_act_bits=4), SearchConfig())
    quantized = pipeline.quantize(bundle, found, result.chosen.plan)
    return examples.Example(made="made elsewhere", seconds=1.0, sensitivity=found.sensitivity, table=found.table, costs=found.costs,
                            quant=found.quant, result=result, comparison=pipeline.compare(bundle, quantized, ("a", "b"), 0, 4),
                            trace=make_trace(4),
                            layer_inspection=pipeline.inspect(bundle, found.trace, *found.sensitivity.most_fragile, found.quant))


def test_what_was_saved_comes_back_but_only_for_its_own_weights(example, tmp_path):
    examples.save(example, "emoji-flux", tmp_path)
    back = examples.load("emoji-flux", MODEL_HASH, tmp_path)
    assert back.sensitivity.fisher_TL.equal(example.sensitivity.fisher_TL) and back.result.front == example.result.front
    assert (back.comparison.pairs[1].image_float == example.comparison.pairs[1].image_float).all()
    assert back.trace.samples == examples.TRAJECTORIES_KEPT and back.trace.prompts == ("p0", "p1")
    assert back.trace.latent_ST.dtype == back.comparison.trajectories.float_ST.dtype == torch.float32
    assert torch.allclose(back.trace.latent_ST, example.trace.latent_ST[:2], rtol=2**-11)  # kept in half precision
    assert (back.layer_inspection.layer, back.layer_inspection.step) == example.sensitivity.most_fragile
    assert examples.load("emoji-flux", "another-hash", tmp_path) is None
    assert examples.load("other", MODEL_HASH, tmp_path) is None


def test_an_example_fills_the_screens_and_gives_way_to_one_s_own(session, example, finish):
    page.show_example(session, example)
    assert session.chosen is not None and session.comparison is not None and tour.here(session) == 0
    assert session.cell == example.sensitivity.most_fragile
    assert session.layer_inspection is example.layer_inspection, "nothing on screen waits for a click"
    assert session.budget["max_weight_bytes"] >= session.chosen.plan.weight_bytes / 1e6
    sensitivity.pick_row(session, {"layer": 3, "step": 2})
    search.click_point(session, {"plan": example.result.front[0].plan.plan_id})
    assert session.cell == (3, 2) and session.chosen is example.result.front[0]
    for act in (lambda: search.search(session, 1.2, None, 5.0),
                lambda: compare.compare(session, "a", 0, 4), lambda: export.export(session)):
        with pytest.raises(BadInput, match="example"):
            act()
    tour.follow(session, {"stop": 0})
    assert session.example is None and session.result is None and session.comparison is None
    finish(session)
    assert tour.here(session) == 1
