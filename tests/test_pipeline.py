"""The verbs on the embedded model with few steps, and the rollouts a search measures."""

import numpy as np
import pytest
import torch

from workbench import generate, pipeline
from workbench.models import sources
from workbench.options import BadInput, Budget, Cancelled, ModelSpec, QuantConfig, SearchConfig, TraceConfig
from workbench.rollout import Rollout
from workbench.runs import Run

STEPS = 3
PROMPTS = ("fluent red heart", "noto grinning face", "twemoji pizza")
SMALL = SearchConfig(beam=2, configs=3, samples=2, finalists=2, refine=2)


@pytest.fixture(scope="module")
def bundle():
    """A bundle of its own: some tests below look at what is left attached to it."""
    return sources.load(ModelSpec())


@pytest.fixture(scope="module")
def profiled(bundle):
    return pipeline.profile(bundle, TraceConfig(prompts=PROMPTS, steps=STEPS))


@pytest.fixture(scope="module")
def budget(bundle, profiled):
    return pipeline.default_budget(bundle, profiled)


def _weights(bundle, profiled):
    return lambda bits_L: pipeline.build(
        bundle, profiled.bank, pipeline.uniform_plan(bundle, profiled.quant, pipeline.sigma_of(profiled.trace), bits_L, 16))


def _rollout(bundle, profiled, scoring="adjoint", samples=3):
    return Rollout(bundle, profiled.trace, _weights(bundle, profiled), samples=samples, scoring=scoring,
                   adjoint_RSTMD=profiled.sensitivity.adjoint_RSTMD)


def test_profile_reports_every_step_of_every_stage(bundle):
    seen = []
    pipeline.profile(bundle, TraceConfig(prompts=PROMPTS[:1], steps=2), on_progress=seen.append)
    for stage in ("trace", "sensitivity", "weights"):
        reports = [p for p in seen if p.stage == stage]
        assert reports[-1].done == reports[-1].total, stage
    columns = [p.detail for p in seen if p.stage == "sensitivity" and p.detail]
    assert [c["step"] for c in columns] == [1, 0]
    assert all(len(c["fisher_L"]) == len(bundle.layers) for c in columns)


def test_the_adjoint_score_of_the_last_step_is_the_probed_final_error(bundle, profiled):
    with _rollout(bundle, profiled) as rollout:
        rollout.use_weights((4,) * len(bundle.layers))
        state = rollout.start()
        for step in range(STEPS):
            state = rollout.extend(state, step, (4,) * len(bundle.layers))
        score = rollout.score(state, STEPS - 1)
        delta = state - profiled.trace.latent_STMD[:, -1]
    probes = profiled.sensitivity.adjoint_RSTMD[:, :, -1]
    by_hand = ((probes * delta).sum((2, 3)).square() / profiled.trace.latent_STMD[:, -1].square().sum((1, 2))).mean()
    assert score == pytest.approx(float(by_hand), rel=1e-5)


def test_float_rollout_has_no_error_and_leaves_the_model_as_it_was(bundle, profiled):
    before = {layer.name: bundle.linear(layer.name) for layer in bundle.layers}
    with _rollout(bundle, profiled, "raw") as rollout:
        rollout.use_weights((16,) * len(bundle.layers))
        state = rollout.start()
        for step in range(STEPS):
            state = rollout.extend(state, step, (16,) * len(bundle.layers))
        float_weights = rollout.error(state)
        rollout.use_weights((2,) * len(bundle.layers))
        state = rollout.start()
        for step in range(STEPS):
            state = rollout.extend(state, step, (3,) * len(bundle.layers))
        coarse = rollout.error(state)
    assert float_weights < 1e-4 < coarse  # modulation stays at 8 bits, so the first is small and not zero
    assert all(bundle.linear(name) is module for name, module in before.items())
    assert bundle.cursor.plan is None and bundle.cursor.row is None


def test_rollout_error_equals_that_of_the_generated_latents(bundle, profiled):
    plan = pipeline.uniform_plan(bundle, profiled.quant, pipeline.sigma_of(profiled.trace), 4, 6)
    with _rollout(bundle, profiled, "raw") as rollout:
        measured = rollout.error_of(plan)
    quantized = pipeline.quantize(bundle, profiled, plan)
    made = generate.run(bundle, PROMPTS, profiled.trace.seeds, profiled.trace.schedule, quantized=quantized)
    final, reference = made.latent_STMD[:, -1], profiled.trace.latent_STMD[:, -1]
    by_hand = ((final - reference).square().sum((1, 2)) / reference.square().sum((1, 2))).mean()
    assert measured == pytest.approx(float(by_hand), rel=1e-3)


def test_search_stays_within_budget_and_judges_on_unseen_prompts(bundle, profiled, budget):
    result = pipeline.search(bundle, profiled, budget, SMALL)
    assert result.chosen.held_out and result.chosen.samples == pipeline.JUDGE_PROMPTS
    assert result.chosen.plan.weight_bytes <= budget.max_weight_bytes
    assert result.chosen.plan.act_bits_mean <= budget.max_mean_act_bits
    assert any(scored.plan == result.chosen.plan for scored in result.finalists)  # not always the best on the prompts of the search
    sizes = [scored.plan.weight_bytes for scored in result.front]
    assert min(sizes) < budget.max_weight_bytes < max(sizes)
    built = pipeline.quantize(bundle, profiled, result.chosen.plan)
    assert built.weight_bytes == result.chosen.plan.weight_bytes
    assert result.chosen.low <= result.chosen.error <= result.chosen.high
    assert {"uniform", "greedy", "milp", "layers", "dp", "bisection", "ends"} <= {scored.origin for scored in result.references}
    assert [each.prediction for each in result.ranking] == ["guide", "adjoint directional", "adjoint white"]
    assert len({scored.plan.plan_id for scored in result.front}) >= 12


def test_a_search_measures_on_prompts_that_neither_calibration_nor_the_judge_has(bundle, profiled):
    fresh = pipeline.fresh_trace(bundle, profiled, SMALL, None, lambda progress: None)
    assert not set(fresh.prompts) & (set(profiled.trace.prompts) | set(bundle.prompts("held_out")))
    assert fresh.samples >= SMALL.samples and fresh.schedule.steps == STEPS


def test_a_painted_plan_is_costed_at_once_and_measured_on_request(bundle, profiled):
    layers = len(bundle.layers)
    rows = [[4] * layers, [8] * layers, [3] * layers]
    plan = pipeline.paint_plan(bundle, profiled, (4,) * layers, rows)
    assert plan.weight_bytes == profiled.costs.total_bytes((4,) * layers) and plan.act_bits_mean == 5
    scored = pipeline.evaluate_plan(bundle, profiled, plan, prompts=2)
    assert scored.held_out and scored.samples == 2 and scored.plan == plan
    eights = pipeline.paint_plan(bundle, profiled, (8,) * layers, [[8] * layers] * STEPS)
    finer = pipeline.evaluate_plan(bundle, profiled, eights, prompts=2)
    assert 0 < finer.error < scored.error
    with pytest.raises(BadInput, match="other settings"):
        pipeline.evaluate_plan(bundle, profiled, plan.model_copy(update={"quant": QuantConfig(group_size=32)}))
    with pytest.raises(BadInput, match="noise levels"):
        pipeline.evaluate_plan(bundle, profiled, plan.model_copy(update={"sigma_T": (0.9, 0.5, 0.1)}))


def test_search_cancelled_at_any_moment_resumes_to_the_same_result(bundle, profiled, budget, tmp_path):
    config = SMALL.model_copy(update={"rivals": "uniform", "refine": 1})
    whole = pipeline.search(bundle, profiled, budget, config)
    run = Run(tmp_path / "run")

    def cancel_after(count):
        seen = []

        def listener(progress):
            seen.extend([progress] * (progress.stage == "search"))
            if len(seen) > count:
                raise Cancelled
        return listener

    for count in (9, 25):
        with pytest.raises(Cancelled):
            pipeline.search(bundle, profiled, budget, config, run=run, on_progress=cancel_after(count))
    assert bundle.cursor.plan is None
    resumed = pipeline.search(bundle, profiled, budget, config, run=run)
    assert [s.plan for s in resumed.front] == [s.plan for s in whole.front]
    assert np.allclose([s.error for s in resumed.front], [s.error for s in whole.front], rtol=1e-4)
    assert resumed.chosen.plan == whole.chosen.plan


def test_profile_is_read_back_from_a_run(bundle, tmp_path):
    config = TraceConfig(prompts=PROMPTS[:1], steps=2)
    first = pipeline.profile(bundle, config, run=Run(tmp_path))
    stages = []
    again = pipeline.profile(bundle, config, run=Run(tmp_path), on_progress=lambda p: stages.append(p.stage))
    assert set(stages) == {"weights", "latency"}
    assert torch.equal(again.sensitivity.fisher_TL, first.sensitivity.fisher_TL)
    assert torch.equal(again.table.error_TLC, first.table.error_TLC)


@pytest.mark.parametrize(("change", "words"), [
    ({"model_hash": "f" * 16}, "belongs to model"), ({"act_bits_TL": "x"}, "act_bits_TL"), ({"surprise": 1}, "surprise")])
def test_plans_from_outside_are_checked(bundle, profiled, change, words):
    plan = pipeline.uniform_plan(bundle, profiled.quant, pipeline.sigma_of(profiled.trace), 4, 4)
    with pytest.raises(BadInput, match=words):
        pipeline.validate_plan(bundle, {**plan.model_dump(mode="json"), **change})


def test_a_budget_below_the_smallest_feasible_is_refused(bundle, profiled):
    with pytest.raises(BadInput, match="smallest feasible"):
        pipeline.search(bundle, profiled, Budget(max_weight_bytes=1000), SMALL)
