"""Comparisons on a tiny model with few steps and prompts: what is counted, kept, skipped, marked and written."""

import csv
import io
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import t as student

from tests.contest.conftest import PROMPTS
from workbench import contest, costs, zerogpu
from workbench.contest import compare, make
from workbench.methods import METHODS
from workbench.metrics import PSNR_CEILING_DB
from workbench.options import BadInput, Cancelled, ContestConfig, EvolutionConfig, SearchConfig, TraceConfig
from workbench.quant.calibration import fused_groups
from workbench.runs import Run

STEPS = 3
SMALL = make.Settings(trace=TraceConfig(steps=STEPS, prompts=("fluent rocket", "noto turtle")),
                      search=SearchConfig(beam=1, samples=1, finalists=1),
                      evolution=EvolutionConfig(population=2, generations=1, samples=1))


def contest_config(**fields):
    return SMALL.model_copy(update={"contest_config": ContestConfig(**fields)})


@pytest.fixture(scope="module")
def held(bundle, tmp_path_factory):
    """rtn, svdquant, qdit and adatsq at W4A4, with the run folder that keeps them."""
    run = Run(tmp_path_factory.mktemp("contest") / "run")
    names = ("rtn", "qdit", "svdquant", "adatsq")
    return (run, *contest.run_comparison(bundle, names, SMALL, prompts=PROMPTS, seed=5, run=run))


def test_every_row_has_every_number_of_the_table(held):
    _, float_run, results, found = held
    assert [row["method"] for row in found["results"]] == ["rtn", "qdit", "svdquant", "adatsq"]
    for row, result in zip(found["results"], results):
        assert row["compute"] in ("emulated", "kernel") and row["reason"]
        assert row["act_bits_mean"] == 4 if row["method"] != "adatsq" else row["act_bits_mean"] <= 4
        assert row["quantize_seconds"] > 0 and row["seconds_per_image"] > 0
        for name in ("psnr_db", "ssim", "vif", "latent_nmse", "retrieval"):
            assert row[name]["n"] == 3 and row[name]["low"] <= row[name]["mean"] <= row[name]["high"]
        assert result.images.shape == float_run.made.images.shape
    assert found["float"]["retrieval"]["n"] == 3 and found["settings"]["weight_bits"] == 4
    spent = {row["method"]: (row["search_evaluations"] > 0, row["search_seconds"] > 0) for row in found["results"]}
    assert spent == {"rtn": (False, False), "svdquant": (False, False), "qdit": (True, True), "adatsq": (True, True)}


def test_effective_bits_are_computed_from_what_is_stored(bundle, held):
    _, _, results, _ = held
    parameters, scales = costs.layer_parameters(bundle), {}
    for result in results:
        quant = result.plan.quant
        outside = costs.outside_bytes(bundle, quant, STEPS)
        assert result.weight_bits_quantized == pytest.approx(8 * (result.weight_bytes - outside) / parameters)
        assert result.weight_bits_total == pytest.approx(8 * result.weight_bytes / bundle.parameters)
        scales[result.method] = result.weight_bits_quantized
    layers = [layer for layer in bundle.layers if layer.has_act_bits]
    biases = sum(12 * layer.n_out for layer in layers if layer.has_bias) / parameters  # 16 bits where the width is 4
    rows = sum(16 * layer.n_out for layer in layers) / parameters
    groups = sum(16 * layer.n_out * -(-layer.k_in // 64) for layer in layers) / parameters
    assert scales["rtn"] == pytest.approx(4 + rows + biases, abs=1e-6)
    assert scales["adatsq"] <= 4 + 16 / 64 + biases + 1e-6
    assert scales["qdit"] <= 4 + 24 / 64 + biases + 1e-6
    branch = 0
    for group in fused_groups(layers):  # a smoothing vector and both factors, in 16 bits, once for all layers of an input
        n_out, k_in = sum(layer.n_out for layer in group), group[0].k_in
        rank = max(1, int(n_out * k_in / 3 / 16 / (n_out + k_in)))
        branch += 16 * (k_in + rank * (n_out + k_in))
    assert scales["svdquant"] == pytest.approx(4 + groups + biases + branch / parameters, abs=1e-6)


def test_only_a_new_method_is_run(bundle, held):
    run, _, _, first = held
    stages = []
    _, _, found = contest.run_comparison(bundle, ("rtn", "smoothquant", "adatsq"), SMALL, prompts=PROMPTS, seed=5, run=run,
                                         on_progress=lambda p: stages.append((p.stage, p.message)))
    assert stages and all("SmoothQuant (2 of 3)" in message for _, message in stages)
    kept = {row["method"]: row for row in first["results"]}
    for row in found["results"]:
        if row["method"] != "smoothquant":
            assert row["psnr_db"] == kept[row["method"]]["psnr_db"] and row["quantize_seconds"] == kept[row["method"]]["quantize_seconds"]


@pytest.mark.parametrize("change", [{"seed": 6}, {"prompts": PROMPTS[:2]}, {"settings": contest_config(weight_bits=8)},
                                    {"settings": contest_config(modulation="cached")}])
def test_what_was_made_from_something_else_is_not_reused(bundle, held, change):
    run = held[0]
    options = {"settings": SMALL, "prompts": PROMPTS, "seed": 5, **change}
    stages = []
    contest.run_comparison(bundle, ("rtn",), options.pop("settings"), run=run, on_progress=lambda p: stages.append(p.stage), **options)
    assert "generate quantized" in stages
    stages.clear()
    contest.run_comparison(bundle, ("rtn",), SMALL, prompts=PROMPTS, seed=5, run=run, on_progress=lambda p: stages.append(p.stage))
    assert not stages, "and what was kept before is still there"


def test_settings_that_a_method_does_not_have_do_not_invalidate_it(bundle):
    rtn = METHODS["rtn"]
    wide = SMALL.model_copy(update={"search": SearchConfig(beam=8), "contest_config": ContestConfig(effective_bits=4.5)})
    assert compare.decided_by(rtn, SMALL, bundle) == compare.decided_by(rtn, wide, bundle)
    assert compare.decided_by(METHODS["adatsq"], SMALL, bundle) != compare.decided_by(METHODS["adatsq"], wide, bundle)


def test_paired_differences_are_the_references_lead_prompt_by_prompt(held):
    _, _, results, found = held
    by_name = {result.method: result for result in results}
    assert found["reference"] == "adatsq"
    for row in found["results"][:-1]:
        lead = np.array(by_name["adatsq"].values["psnr_db"]) - np.array(by_name[row["method"]].values["psnr_db"])
        half = student.ppf(0.975, 2) * lead.std(ddof=1) / 3**0.5
        pair = row["paired"]["psnr_db"]
        assert (pair["mean"], pair["low"], pair["high"]) == pytest.approx((lead.mean(), lead.mean() - half, lead.mean() + half))
    assert found["results"][-1]["paired"] is None


def test_best_and_second_best_are_marked_and_equals_share_a_place(held):
    _, _, _, found = held
    for name, better in (("psnr_db", max), ("latent_nmse", min)):
        means = {row["method"]: row[name]["mean"] for row in found["results"]}
        best = [row["method"] for row in found["results"] if row["marks"].get(name) == "best"]
        assert best == [better(means, key=means.get)]
        assert sum(row["marks"].get(name) == "second" for row in found["results"]) == 1
    top = max(row["retrieval"]["mean"] for row in found["results"])
    assert all((row["marks"].get("retrieval") == "best") == (row["retrieval"]["mean"] == top) for row in found["results"])


def test_csv_and_markdown_say_what_the_json_says(held):
    _, _, _, found = held
    rows = list(csv.DictReader(io.StringIO(contest.csv_text(found))))
    for read, row in zip(rows, found["results"], strict=True):
        assert read["method"] == row["method"] and float(read["psnr_db_mean"]) == row["psnr_db"]["mean"]
        assert float(read["weight_bits_quantized"]) == row["weight_bits_quantized"] and read["compute"] == row["compute"]
        assert read["adatsq_minus_this_psnr_db_low"] == ("" if row["paired"] is None else str(row["paired"]["psnr_db"]["low"]))
    text = contest.markdown_text(found)
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[:7]}) == 1 and lines[2].startswith("| float |")
    best = next(row for row in found["results"] if row["marks"].get("psnr_db") == "best")
    assert f"**{best['psnr_db']['mean']:.2f} ±" in next(line for line in lines if line.startswith(f"| {best['label']} |"))


def test_the_grid_shows_float_first_and_every_method_pixel_by_pixel(held):
    _, float_run, results, _ = held
    grid = contest.image_grid(float_run, results, columns=3)
    height, width = float_run.made.images.shape[1:3]
    for row, images in enumerate([float_run.made.images, *(result.images for result in results)]):
        for column in range(3):
            top, left = 34 + row * (height + 4), 150 + column * (width + 4)
            assert np.array_equal(grid[top:top + height, left:left + width], images[column])


def test_at_16_bits_every_method_equals_float(bundle):
    settings = contest_config(weight_bits=16, act_bits=16, modulation="cached")
    names = [name for name, method in METHODS.items() if method.allocation == "uniform" and method.quant.hessian != "fisher"]
    _, results, _ = contest.run_comparison(bundle, names, settings, prompts=PROMPTS[:2], seed=1)
    for result in results:
        assert result.values["psnr_db"] == (PSNR_CEILING_DB,) * 2 and result.values["latent_nmse"] == (0.0, 0.0), result.method


def test_a_method_can_be_skipped_and_a_cancelled_comparison_keeps_what_it_finished(bundle, tmp_path):
    def stop_at(label, error):
        def listener(progress):
            if progress.message.startswith(label) and progress.stage == "generate quantized":
                raise error
        return listener

    run, names, shown = Run(tmp_path / "run"), ("rtn", "smoothquant", "quarot"), []
    _, results, found = contest.run_comparison(bundle, names, SMALL, prompts=PROMPTS[:1], run=run, on_result=shown.append,
                                               on_progress=stop_at("SmoothQuant", contest.SkipMethod))
    assert [e.method for e in results] == ["rtn", "quarot"] and found["skipped"] == ["smoothquant"]
    assert [len(each["results"]) for each in shown] == [1, 1, 2]
    with pytest.raises(Cancelled):
        contest.run_comparison(bundle, ("smoothquant", "gptq"), SMALL, prompts=PROMPTS[:1], run=run, on_progress=stop_at("GPTQ", Cancelled))
    stages = []
    contest.run_comparison(bundle, names, SMALL, prompts=PROMPTS[:1], run=run, on_progress=stages.append)
    assert not stages, "all three are kept"


def test_searched_plans_may_be_given_effective_bits(bundle, tmp_path):
    settings = contest_config(weight_bits=4, effective_bits=3.6)
    _, [result], _ = contest.run_comparison(bundle, ("adatsq",), settings, prompts=PROMPTS[:1], run=Run(tmp_path / "run"))
    assert 3.3 < result.weight_bits_quantized <= 3.6 and len(set(result.plan.weight_bits_L)) > 1


def test_what_no_method_can_do_is_refused_before_anything_runs(bundle):
    stages = []
    for names, options, words in ((["nope"], {}, "unknown method"), ([], {}, "unknown method"),
                                  (["adatsq", "rtn"], {"act_bits": 3.5}, "rtn uses one activation width"),
                                  (["rtn"], {"reference": "gptq"}, "not among the compared"),
                                  (["rtn"], {"weight_bits": 5}, "not supported"), (["rtn"], {"surprise": 1}, "surprise")):
        with pytest.raises(BadInput, match=words):
            contest.compare_methods(bundle, names, **{"weight_bits": 4, "act_bits": 4, **options}, on_progress=stages.append)
    assert not stages and contest.chosen(["all"]) == tuple(METHODS) and contest.chosen(["rtn", "all"])[0] == "rtn"


def test_a_mix_of_widths_must_win_on_unseen_prompts_too(bundle, monkeypatch):
    """`_judged` returns whichever of the two plans the rollout measures as closer to float."""
    settings = contest_config(weight_bits=4)
    maker = make.MethodBuilder(bundle, settings, run=None)
    quant = make.quant_of(METHODS["adatsq"], settings.contest_config)
    sigma_T = tuple(bundle.integrator(STEPS).sigma_T1[:-1].tolist())
    even_L = costs.tabulate(bundle, quant, STEPS).uniform(4)  # modulation has a width of its own
    narrow = next(layer.index for layer in bundle.layers if layer.has_act_bits)
    mixed = make.pipeline.uniform_plan(bundle, quant, sigma_T, [3 if i == narrow else bits for i, bits in enumerate(even_L)], 4)
    found = SimpleNamespace(quant=quant, costs=costs.tabulate(bundle, quant, STEPS), bank=None)
    measured = []

    class Measured:
        def __init__(self, *_, samples, **__):
            assert samples == 2

        def error_of(self, plan):
            measured.append(plan)
            return errors[len(set(plan.weight_bits_L))]

    monkeypatch.setattr(make, "Rollout", Measured)
    for errors, widths in (({2: 0.1, 3: 0.2}, 2), ({2: 0.2, 3: 0.1}, 3)):  # noqa: B007 (read by error_of)
        chosen = maker._judged(found, mixed, PROMPTS[:2], lambda _: None)
        assert len(set(chosen.weight_bits_L)) == widths and chosen.act_bits_TL == mixed.act_bits_TL
    assert len(measured) == 4
    even = make.pipeline.uniform_plan(bundle, quant, sigma_T, 4, 4)
    assert maker._judged(found, even, PROMPTS[:2], None) is even and maker._judged(found, mixed, (), None) is mixed
    assert len(measured) == 4, "nothing to choose, nothing measured"


def test_another_process_gives_the_same_rows(bundle, held, tmp_path):
    _, float_run, results, _ = held
    asked = []

    class Crossing:
        """A worker: whatever goes in and comes out is pickled, and no maker is shared."""

        def __getattr__(self, stage):
            def run(of, *args, on_progress):
                asked.append(stage)
                args = zerogpu.loads(zerogpu.dumps(args, of), of)
                return zerogpu.loads(zerogpu.dumps(getattr(compare, stage)(of, *args, on_progress=on_progress), of), of)
            return run

    found = contest.run_comparison(bundle, ("rtn", "adatsq"), SMALL, prompts=PROMPTS, seed=5, run=Run(tmp_path / "run"), stages=Crossing())
    assert asked == ["float_run", "evaluate_method", "evaluate_method"]
    assert np.array_equal(found[0].made.images, float_run.made.images)
    for ours, theirs in zip(found[1], (results[0], results[3])):
        assert ours.plan == theirs.plan and np.array_equal(ours.images, theirs.images) and ours.values == theirs.values
