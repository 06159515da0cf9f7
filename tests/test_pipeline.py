"""The verbs on the embedded model with few steps, and the rollouts a search measures."""

import numpy as np
import pytest
import torch

from workbench import generate, pipeline
from workbench.models import sources
from workbench.options import BadInput, Budget, Cancelled, ModelSpec, QuantConfig, SearchConfig, SensitivityConfig, TraceConfig
from workbench.quant.store import WeightStore
from workbench.rollout import Rollout
from workbench.runs import Run
from workbench.sensitivity.signed import project

STEPS = 3
PROMPTS = ("fluent red heart", "noto grinning face", "twemoji pizza")
SMALL = SearchConfig(beam=2, configs=3, samples=2, finalists=2, refine=2)


@pytest.fixture(scope="module")
def bundle():
    """A bundle of its own: some tests below look at what is left of it."""
    return sources.load(ModelSpec())


@pytest.fixture(scope="module")
def profiled(bundle):
    return pipeline.profile(bundle, TraceConfig(prompts=PROMPTS, steps=STEPS))


@pytest.fixture(scope="module")
def budget(bundle, profiled):
    return pipeline.default_budget(bundle, profiled)


@pytest.fixture(scope="module")
def costates_T(bundle, profiled):
    return project(bundle, profiled.trace, profiled.bank).costates_T


def _rollout(bundle, profiled, scoring="raw", samples=3, costates_T=None):
    return Rollout(bundle, profiled.trace, pipeline.weights_of(bundle, profiled), samples=samples, scoring=scoring, costates_T=costates_T)


def test_profile_reports_every_step_of_every_stage(bundle):
    seen = []
    pipeline.profile(bundle, TraceConfig(prompts=PROMPTS[:1], steps=2), on_progress=seen.append)
    for stage in ("trace", "sensitivity", "weights"):
        reports = [p for p in seen if p.stage == stage]
        assert reports[-1].done == reports[-1].total, stage
    columns = [p.detail for p in seen if p.stage == "sensitivity" and p.detail]
    assert [c["step"] for c in columns] == [1, 0]
    assert all(len(c["fisher_L"]) == len(bundle.layers) for c in columns)


def test_the_adjoint_score_of_the_last_step_is_the_probed_final_error(bundle, profiled, costates_T):
    rollout = _rollout(bundle, profiled, "adjoint", costates_T=costates_T)
    rollout.use_weights((4,) * len(bundle.layers))
    state = rollout.start()
    for step in range(STEPS):
        state = rollout.extend(state, step, (4,) * len(bundle.layers))
    delta, final = state.latent - profiled.trace.latent_ST[:, -1], profiled.trace.latent_ST[:, -1]
    [probes] = costates_T[-1]
    by_hand = ((probes * delta).sum((2, 3)).square() / final.square().sum((1, 2))).mean()
    assert rollout.score(state, STEPS - 1) == pytest.approx(float(by_hand), rel=1e-5)


def test_a_float_rollout_has_no_error_and_leaves_the_model_as_it_was(bundle, profiled):
    before, rollout, errors = dict(bundle.transformer.named_modules()), _rollout(bundle, profiled), []
    for weights, acts in ((16, 16), (2, 3)):
        rollout.use_weights((weights,) * len(bundle.layers))
        state = rollout.start()
        for step in range(STEPS):
            state = rollout.extend(state, step, (acts,) * len(bundle.layers))
        errors.append(rollout.error(state))
    assert errors[0] == 0 < 1e-4 < errors[1]
    assert dict(bundle.transformer.named_modules()) == before


def test_a_state_survives_storage(bundle, profiled):
    rollout = _rollout(bundle, profiled)
    rollout.use_weights((4,) * len(bundle.layers))
    state = rollout.extend(rollout.start(), 0, (4,) * len(bundle.layers))
    back = rollout.load(rollout.save(state))
    assert torch.equal(back.latent, state.latent) and len(back.latents) == len(state.latents) == 1 and back.outputs == ()


def test_rollout_error_equals_that_of_the_generated_latents(bundle, profiled):
    plan = pipeline.uniform_plan(bundle, profiled.quant, pipeline.sigma_of(profiled.trace), 4, 6)
    measured = _rollout(bundle, profiled).error_of(plan)
    quantized = pipeline.quantize(bundle, profiled, plan)
    made = generate.run(bundle, PROMPTS, profiled.trace.seeds, profiled.trace.integrator, quantized=quantized)
    final, reference = made.latent_ST[:, -1], profiled.trace.latent_ST[:, -1]
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
    assert [each.prediction for each in result.ranking] == ["planning_table", "adjoint directional", "adjoint white"]
    assert len({scored.plan.plan_id for scored in result.front}) >= 12


def test_a_search_measures_on_prompts_that_neither_calibration_nor_the_judge_has(bundle, profiled):
    fresh = pipeline.fresh_trace(bundle, profiled, SMALL, None, lambda progress: None)
    assert not set(fresh.prompts) & (set(profiled.trace.prompts) | set(bundle.prompts("held_out")))
    assert fresh.samples >= SMALL.samples and fresh.steps == STEPS


def test_a_painted_plan_is_costed_at_once_and_measured_on_request(bundle, profiled):
    layers = len(bundle.layers)
    rows = [[4] * layers, [8] * layers, [3] * layers]
    plan = pipeline.paint_plan(bundle, profiled, (4,) * layers, rows)
    assert plan.weight_bytes == profiled.costs.total_bytes((4,) * layers) and plan.act_bits_mean == 5
    assert [bits is None for bits in plan.act_bits_TL[0]] == [not layer.has_act_bits for layer in bundle.layers]
    scored = pipeline.evaluate_plan(bundle, profiled, plan, prompts=2)
    assert scored.held_out and scored.samples == 2 and scored.plan == plan
    eights = pipeline.paint_plan(bundle, profiled, (8,) * layers, [[8] * layers] * STEPS)
    finer = pipeline.evaluate_plan(bundle, profiled, eights, prompts=2)
    assert 0 < finer.error < scored.error
    with pytest.raises(BadInput, match="other settings"):
        pipeline.evaluate_plan(bundle, profiled, plan.model_copy(update={"quant": QuantConfig(group_size=32)}))
    with pytest.raises(BadInput, match="noise levels"):
        pipeline.evaluate_plan(bundle, profiled, plan.model_copy(update={"sigma_T": (0.9, 0.5, 0.1)}))


def test_no_error_is_called_held_out_where_the_profile_has_seen_every_prompt(bundle, profiled, monkeypatch):
    monkeypatch.setattr(bundle, "prompts", lambda kind: PROMPTS)
    plan = pipeline.paint_plan(bundle, profiled, (4,) * len(bundle.layers), [[4] * len(bundle.layers)] * STEPS)
    with pytest.raises(BadInput, match="every held-out prompt"):
        pipeline.evaluate_plan(bundle, profiled, plan, prompts=2)


def test_measuring_a_plan_stops_at_any_step_and_refuses_before_it_runs_anything(bundle, profiled):
    layers = len(bundle.layers)
    plan = pipeline.paint_plan(bundle, profiled, (4,) * layers, [[4] * layers] * STEPS)
    seen = []
    before = pipeline.evaluate_plan(bundle, profiled, plan, prompts=2, on_progress=seen.append)
    assert [(each.stage, each.done) for each in seen if each.stage == "rollout"] == [("rollout", step) for step in range(STEPS)]
    assert sum(each.stage != "rollout" for each in seen) >= STEPS, "the float trajectories report too"
    for count in (1, len(seen) // 2, len(seen)):
        left = iter(range(count - 1))

        def stop(_, left=left):
            if next(left, None) is None:
                raise Cancelled("enough")

        with pytest.raises(Cancelled):
            pipeline.evaluate_plan(bundle, profiled, plan, prompts=2, on_progress=stop)
    assert pipeline.evaluate_plan(bundle, profiled, plan, prompts=2) == before, "the model is as it was"
    seen.clear()
    with pytest.raises(BadInput, match="noise levels"):
        pipeline.evaluate_plan(bundle, profiled, plan.model_copy(update={"sigma_T": (0.9, 0.5, 0.1)}), on_progress=seen.append)
    assert seen == []


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
    resumed = pipeline.search(bundle, profiled, budget, config, run=run)
    assert [s.plan for s in resumed.front] == [s.plan for s in whole.front]
    assert np.allclose([s.error for s in resumed.front], [s.error for s in whole.front], rtol=1e-4)
    assert resumed.chosen.plan == whole.chosen.plan


def test_profile_is_read_back_from_a_run(bundle, tmp_path):
    config = TraceConfig(prompts=PROMPTS[:1], steps=2)
    first = pipeline.profile(bundle, config, run=Run(tmp_path))
    stages = []
    again = pipeline.profile(bundle, config, run=Run(tmp_path), on_progress=lambda p: stages.append(p.stage))
    assert set(stages) == {"latency"}, "trace, map and every solved weight were read"
    assert torch.equal(again.sensitivity.fisher_TL, first.sensitivity.fisher_TL)
    assert torch.equal(again.table.error_TLC, first.table.error_TLC)


def test_another_budget_measures_nothing_anew_that_an_earlier_search_has_measured(bundle, profiled, budget, tmp_path):
    """The search's measurements are kept by the problem, not by the budget."""
    config, run, steps = SMALL.model_copy(update={"rivals": "uniform", "refine": 0}), Run(tmp_path / "run"), []
    tighter = budget.model_copy(update={"max_mean_act_bits": 3.8})
    with pytest.MonkeyPatch.context() as patch:
        extend = Rollout.extend
        patch.setattr(Rollout, "extend", lambda *args: steps.append(1) or extend(*args))
        pipeline.search(bundle, profiled, budget, config, run=run)
        first = len(steps)
        again = pipeline.search(bundle, profiled, budget, config, run=run)
        judged = len(steps) - first
        assert judged <= config.finalists * STEPS, "only the judge runs anew"
        steps.clear()
        kept = pipeline.search(bundle, profiled, tighter, config, run=run)
        with_run = len(steps)
        steps.clear()
        anew = pipeline.search(bundle, profiled, tighter, config)
    assert with_run < 0.7 * len(steps), "uniform plans and other weights had been measured"
    assert [s.plan for s in kept.front] == [s.plan for s in anew.front] and kept.chosen.plan == anew.chosen.plan
    assert again.chosen.plan.act_bits_mean <= budget.max_mean_act_bits


def test_a_plan_is_quantized_by_its_own_widths_alone_and_resumes_by_layer(bundle, profiled, tmp_path):
    """`quantize`, `export` and `generate --plan` solve what the plan needs; a kill loses the layer that was being solved."""
    plan = pipeline.uniform_plan(bundle, profiled.quant, pipeline.sigma_of(profiled.trace), 4, 6)
    expected = pipeline.quantize(bundle, profiled, plan)
    config, run = TraceConfig(prompts=PROMPTS, steps=STEPS), Run(tmp_path / "run")

    def kill(progress):
        if progress.stage == "weights" and progress.message.startswith("solved") and len(list(run.folder.glob("weight-*"))) >= 20:
            raise Cancelled

    with pytest.raises(Cancelled):
        pipeline.quantize_plan(bundle, plan, config, SensitivityConfig(), run=run, on_progress=kill)
    kept = {path.name for path in run.folder.glob("weight-*")}
    assert 20 <= len(kept) < len(bundle.layers)
    solved = []
    with pytest.MonkeyPatch.context() as patch:
        save = WeightStore.save
        patch.setattr(WeightStore, "save", lambda store, siblings, name, *rest: solved.append(name) or save(store, siblings, name, *rest))
        made = pipeline.quantize_plan(bundle, plan, config, SensitivityConfig(), run=run)
    assert len(solved) == len(set(solved)) == len(bundle.layers) - len(kept), "each layer once, at its one width"
    for layer in bundle.layers:
        ours, theirs = made.layers[layer.name], expected.layers[layer.name]
        same = (ours.packed_NP == theirs.packed_NP).float().mean()
        assert float(same) > 0.99 and ours.bits == theirs.bits, layer.name  # the same sums, stacked otherwise
    stages = []
    pipeline.quantize_plan(bundle, plan, config, SensitivityConfig(), run=run, on_progress=lambda p: stages.append(p.stage))
    assert not stages, "everything was read"


def test_the_map_and_the_table_name_modulation_first_where_it_alone_is_rounded(bundle, profiled):
    """Modulation rounded to 4 bits and nothing else: the map has its layers on top, and what the table predicts for the plan is all
    theirs and of the size of what is measured."""
    mean_L = profiled.sensitivity.fisher_TL.mean(0)
    modulation = [layer.index for layer in bundle.modulation]
    assert set(mean_L.argsort(descending=True)[:len(modulation) // 2].tolist()) <= set(modulation)
    weights = [4 if layer.index in modulation else 16 for layer in bundle.layers]
    plan = pipeline.paint_plan(bundle, profiled, weights, [[16] * len(bundle.layers)] * STEPS)
    error_L = [float(profiled.table.weight_error_LC[i, profiled.table.weight_bits_C.index(bits)]) for i, bits in enumerate(weights)]
    assert sum(error_L[i] for i in modulation) == pytest.approx(plan.predicted_error) and plan.predicted_error > 0
    measured = _rollout(bundle, profiled).error_of(plan)
    energy = float(profiled.trace.latent_ST[:, -1].square().sum((1, 2)).mean())
    assert 0.1 < plan.predicted_error / energy / measured < 10
    eight = pipeline.paint_plan(bundle, profiled, [8 if bits == 4 else bits for bits in weights], [[16] * len(bundle.layers)] * STEPS)
    assert _rollout(bundle, profiled).error_of(eight) < measured / 20


def test_a_plan_of_format_1_gets_its_modulation_layers(bundle, profiled):
    plan = pipeline.uniform_plan(bundle, profiled.quant, pipeline.sigma_of(profiled.trace), 4, 6)
    own = [layer.index for layer in bundle.layers if layer.has_act_bits]
    values = plan.model_dump(mode="json")
    old = {**values, "format": "adatsq-plan-1", "layer_names": [values["layer_names"][i] for i in own],
           "weight_choice_L": [values["weight_choice_L"][i] for i in own],
           "act_bits_TL": [[row[i] for i in own] for row in values["act_bits_TL"]]}
    assert pipeline.validate_plan(bundle, old) == plan
    with pytest.raises(BadInput, match="layers that are not"):
        pipeline.validate_plan(bundle, {**old, "format": "adatsq-plan-2"})


@pytest.mark.parametrize(("change", "words"), [
    ({"model_hash": "f" * 16}, "belongs to model"), ({"act_bits_TL": "x"}, "act_bits_TL"), ({"surprise": 1}, "surprise")])
def test_plans_from_outside_are_checked(bundle, profiled, change, words):
    plan = pipeline.uniform_plan(bundle, profiled.quant, pipeline.sigma_of(profiled.trace), 4, 4)
    with pytest.raises(BadInput, match=words):
        pipeline.validate_plan(bundle, {**plan.model_dump(mode="json"), **change})


def test_a_budget_below_the_smallest_feasible_is_refused(bundle, profiled):
    with pytest.raises(BadInput, match="smallest feasible"):
        pipeline.search(bundle, profiled, Budget(max_weight_bytes=1000), SMALL)
