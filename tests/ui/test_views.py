"""Results to figures and tables: the numbers that arrive, how they are labelled, and nothing that breaks JSON or HTML."""

import dataclasses
import json
import math
import re
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ui.fakes import FakeBundle, FakePipeline, make_scored, make_table
from workbench.options import Budget, QuantConfig, SearchConfig, SensitivityConfig, TraceConfig
from workbench.search.recorder import extended
from workbench.types import LayerInfo, Ranking, SoloTiming
from workbench.ui import budgets, figures, tables
from workbench.ui.session import Drafted
from workbench.ui.views import compare, plans, quantities, search, sensitivity
from workbench.ui.views.layers import blocks_of, layer_labels, spans

STEPS = 6


@pytest.fixture(scope="module")
def bundle():
    return FakeBundle()


@pytest.fixture(scope="module")
def found(bundle):
    return FakePipeline().profile(bundle, TraceConfig(steps=STEPS), SensitivityConfig(), QuantConfig())


@pytest.fixture(scope="module")
def result(bundle, found):
    return FakePipeline().search(bundle, found, Budget(max_mean_act_bits=4), SearchConfig())


@pytest.fixture(scope="module")
def fisher_TL(found):
    return found.sensitivity.fisher_TL.tolist()


def block_map(rows, layers, how="mean", cell=(None, None), name="fisher"):
    return sensitivity.block_map(rows, layers, name, "Fisher information", how, cell)


def heat_of(figure):
    return figure["data"][0]


def cells_of(html):
    """Text of every cell of every row of an HTML table."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in row] for row in cells]


# Sensitivity

def test_block_map_is_the_mean_or_the_sum_of_its_layers(bundle, fisher_TL):
    first_block = blocks_of(bundle.layers)["blocks.0"]
    total = sum(fisher_TL[2][i] for i in first_block)
    mean = heat_of(block_map(fisher_TL, bundle.layers))["customdata"][0][2]
    summed = heat_of(block_map(fisher_TL, bundle.layers, "sum"))["customdata"][0][2]
    assert summed == pytest.approx(total, rel=1e-3)
    assert mean == pytest.approx(total / len(first_block), rel=1e-3)


def test_strips_are_the_means_over_layers_and_over_steps(bundle, fisher_TL):
    _, time, depth = block_map(fisher_TL, bundle.layers, cell=(8, 4))["data"]
    assert time["y"] == pytest.approx(np.mean(fisher_TL, axis=1), rel=1e-3)
    members = list(blocks_of(bundle.layers).values())
    assert depth["x"] == pytest.approx([np.mean(np.array(fisher_TL)[:, rows]) for rows in members], rel=1e-3)
    assert [c == figures.RED for c in time["marker"]["color"]] == [t == 4 for t in range(STEPS)]


def test_colour_is_the_logarithm_and_hover_the_value(bundle, fisher_TL):
    heat = heat_of(block_map(fisher_TL, bundle.layers))
    assert np.allclose(heat["z"], np.log10(heat["customdata"]), rtol=1e-3)
    assert float(heat["colorbar"]["ticktext"][-1]) == pytest.approx(max(map(max, heat["customdata"])), rel=0.06)


def test_a_map_in_the_making_has_empty_columns(bundle, fisher_TL):
    partial_TL = [None] * (STEPS - 1) + [fisher_TL[-1]]
    figure = block_map(partial_TL, bundle.layers)
    assert all(row[:-1] == [None] * (STEPS - 1) and row[-1] is not None for row in heat_of(figure)["z"])
    assert figure["data"][1]["x"] == [STEPS - 1]
    json.dumps(figure, allow_nan=False)


def test_zero_fisher_is_an_empty_cell_not_minus_infinity(bundle):
    heat = heat_of(block_map([[0.0] * len(bundle.layers), [1.0] * len(bundle.layers)], bundle.layers))
    assert heat["z"][0] == [None, 0.0]
    nothing = block_map([[0.0] * len(bundle.layers)], bundle.layers)
    assert nothing["data"] == [] and "0" in nothing["layout"]["annotations"][0]["text"]


def test_selected_cell_is_framed_in_both_maps(bundle, fisher_TL):
    layer, step = 8, 4  # the third layer of the second block
    blocks = block_map(fisher_TL, bundle.layers, cell=(layer, step))["layout"]["shapes"][0]
    inside = sensitivity.layer_map(fisher_TL, bundle.layers, "Fisher", (layer, step))["layout"]["shapes"][0]
    assert (blocks["x0"], blocks["y0"]) == (3.5, 0.5)
    assert (inside["x0"], inside["y0"]) == (3.5, 1.5)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_error_and_gain_are_read_from_the_table(found, fisher_TL, bits):
    sources = quantities.Sources(fisher_TL, found, bits)
    widths = list(found.table.act_bits_C)
    here = widths.index(bits)
    error_TL, wider_TL = found.table.error_TLC[..., here], found.table.error_TLC[..., here + 1]
    assert quantities.values("error", sources) == error_TL.tolist()
    gain = np.array(quantities.values("gain", sources))
    assert gain == pytest.approx(((error_TL - wider_TL) / (widths[here + 1] - bits)).numpy(), rel=1e-5)


def test_what_needs_a_finished_profile_is_not_known_before(fisher_TL):
    running = quantities.Sources([None, fisher_TL[1]], None)
    assert quantities.values("fisher", running) is not None
    assert [quantities.values(name, running) for name in quantities.QUANTITIES if name != "fisher"] == [None] * 5
    assert quantities.values("fisher", quantities.Sources([None, None], None)) is None


def test_every_quantity_draws_every_view(bundle, found, fisher_TL):
    for name, quantity in quantities.QUANTITIES.items():
        rows = quantities.values(name, quantities.Sources(fisher_TL, found, 4))
        figure = sensitivity.block_map(rows, bundle.layers, name, quantity.label, "mean", (3, 2))
        assert heat_of(figure)["type"] == "heatmap", name
        json.dumps([figure, sensitivity.layer_map(rows, bundle.layers, quantity.label, (3, 2))], allow_nan=False)


def test_a_range_of_a_block_is_its_largest_layer_s(bundle, found, fisher_TL):
    rows = quantities.values("range", quantities.Sources(fisher_TL, found))
    heat = heat_of(block_map(rows, bundle.layers, "sum", name="range"))
    members = blocks_of(bundle.layers)["blocks.1"]
    assert heat["customdata"][1][2] == pytest.approx(max(rows[2][i] for i in members), rel=1e-3)


def test_layer_labels_are_short_and_unique():
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_mlp"]
    blocks = ["double.0", "double.0", "single.0"]
    layers = [LayerInfo(index=i, name=n, block=b, role="", n_out=1, k_in=1, tokens=1, has_bias=False, same_input=i,
                        fused_with=i)
              for i, (n, b) in enumerate(zip(names, blocks))]
    assert layer_labels(layers) == ["double.0 attn.to_q", "double.0 ff.net.2", "single.0 proj_mlp"]


@pytest.mark.parametrize(("numbers", "words"), [([], ""), ([3], "3"), ([17, 18, 19, 3], "3, 17–19"), ([0, 2, 4], "0, 2, 4")])
def test_numbers_in_words(numbers, words):
    assert spans(numbers) == words


def test_the_ten_most_fragile_and_most_tolerant_cells(bundle, fisher_TL, found):
    flat = np.array(fisher_TL)
    for most in (True, False):
        html = sensitivity.extremes(fisher_TL, found.sensitivity.stderr_TL.tolist(), bundle.layers, "Fisher", (None, None), most=most)
        picks = [json.loads(unescape(text)) for text in re.findall(r'data-pick="([^"]+)"', html)]
        assert len(picks) == 10
        values = [flat[p["step"], p["layer"]] for p in picks]
        assert values == (sorted(flat.ravel(), reverse=True) if most else sorted(flat.ravel()))[:10]
        assert all(row[3] == "10" for row in cells_of(html)[1:]), "the fake's standard error is a tenth"


def test_shares_of_the_map_add_up(bundle, fisher_TL):
    cells = sensitivity.ranked(fisher_TL, 10_000)
    assert len(cells) == STEPS * len(bundle.layers)
    assert sum(value for value, _, _ in cells) == pytest.approx(np.sum(fisher_TL))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 100), min_size=4, max_size=4), min_size=3, max_size=3))
def test_the_sentence_s_share_is_what_its_steps_and_blocks_hold(value_BT):
    steps, blocks, share = sensitivity.carriers(value_BT)
    total = sum(map(sum, value_BT))
    if total > 0:
        held = sum(value_BT[b][t] for b in blocks for t in steps)
        assert share == pytest.approx(held / total) and share >= sensitivity.CARRIED - 1e-9
    else:
        assert share == 0


def test_a_concentrated_risk_is_found_and_said(bundle):
    rows = [[1e-6] * len(bundle.layers) for _ in range(STEPS)]
    for layer in blocks_of(bundle.layers)["blocks.3"]:
        rows[4][layer] = rows[5][layer] = 1.0
    text = sensitivity.insight(rows, bundle.layers, "fisher", "Fisher information")
    assert text.startswith("Steps 4–5 in block blocks.3 carry 100 % of the risk") and "in 7 % of the map" in text
    even = [[1.0] * len(bundle.layers) for _ in range(STEPS)]
    assert "spread out" in sensitivity.insight(even, bundle.layers, "fisher", "Fisher information")
    assert sensitivity.insight([None, *rows[1:]], bundle.layers, "fisher", "") == "", "nothing is said of a map in the making"


def test_error_against_bits_leaves_out_float(bundle, found):
    layer, step = 3, 2
    activations, weight = sensitivity.error_against_bits(make_table(found.sensitivity), bundle.layers, (layer, step))["data"]
    assert activations["x"] == [3, 4, 6, 8]
    assert activations["y"][0] == pytest.approx(float(found.table.error_TLC[step, layer, 0]), rel=1e-3)
    assert weight["x"][0] == 2 and all(a > b for a, b in zip(weight["y"], weight["y"][1:]))


def test_channel_ranges_keep_every_extreme(bundle, found):
    layer_inspection = FakePipeline().inspect(bundle, found.trace, 5, 1, QuantConfig())
    as_it_is, after = sensitivity.channel_ranges(layer_inspection)["data"]
    assert max(as_it_is["y"]) == pytest.approx(float(layer_inspection.high_K.max()))
    assert min(as_it_is["y"]) == pytest.approx(float(layer_inspection.low_K.min()))
    assert after["name"] == "after hadamard"
    plain = sensitivity.channel_ranges(dataclasses.replace(layer_inspection, transform="none"))["data"]
    assert [t["name"] for t in plain] == ["as it is"]


# Search

def limits(mb, bits):
    return {"max_weight_bytes": mb, "max_mean_act_bits": bits}


def point(mb, bits, error, kind="front", plan_id="a", origin="beam"):
    return search.Point(kind, plan_id, origin, limits(mb, bits), error)


def test_budget_lines_stand_at_the_sliders_the_far_side_is_shaded_and_points_beyond_fade():
    shown = [point(1, 4, 1e-2), point(3, 4, 1e-3, plan_id="b"), point(1, 8, 1e-4, plan_id="c")]
    figure = search.front(shown, None, None, limits(2.0, 5.0))
    lines = {shape["xref"]: shape["x0"] for shape in figure["layout"]["shapes"] if shape["name"] == "limit"}
    assert lines == {"x": 2.0, "x2": 5.0}
    for shape in figure["layout"]["shapes"]:
        if shape["name"] == "infeasible":
            panel = figure["layout"]["xaxis" + shape["xref"][1:]]
            assert shape["x0"] == lines[shape["xref"]] and shape["x1"] > panel["range"][1]
    fronts = [t for t in figure["data"] if t["name"] == "beam" and not t["showlegend"]]
    assert len(fronts) == 2
    for trace in fronts:
        assert trace["marker"]["opacity"] == [1.0, search.FADED, search.FADED]
        assert [c[0] for c in trace["customdata"]] == ["a", "b", "c"]


def test_the_envelope_is_the_least_error_up_to_each_cost():
    shown = [point(1, 4, 3e-2), point(2, 4, 5e-2), point(3, 4, 1e-2)]
    memory = next(t for t in search.front(shown, None, None, {})["data"] if t["name"] == "least error")
    assert (memory["x"], memory["y"]) == ([1.0, 3.0], [3e-2, 1e-2])


def test_rivals_of_any_origin_get_marks_and_names_of_their_own():
    shown = [point(1, 4, 1e-2), *(point(1, 4, 1e-2, "references", f"of {name}", name) for name in ("uniform", "some_new_rival", "dp"))]
    drawn = search.front(shown, None, None, {"max_weight_bytes": 0.5})["data"]
    entries, traces = ({t["name"]: t for t in drawn if t["showlegend"] is legend and t["mode"] == "markers"} for legend in (True, False))
    assert set(entries) == set(traces) == {"beam", "uniform bits", "some new rival", "one width per step, the best"}
    marks = {name: (t["marker"]["symbol"], t["marker"]["color"]) for name, t in entries.items()}
    assert len(set(marks.values())) == 4 and marks == {name: (t["marker"]["symbol"], t["marker"]["color"]) for name, t in traces.items()}
    assert traces["some new rival"]["customdata"][0][0] == "of some_new_rival"
    assert all(t["marker"]["opacity"] == 1 for t in entries.values()), "the legend does not fade with the plans beyond the budget"
    fewer = search.front([shown[0], shown[3]], None, None, {})["data"]
    kept = {t["name"]: (t["marker"]["symbol"], t["marker"]["color"]) for t in fewer if t["showlegend"]}
    assert kept == {name: marks[name] for name in kept}, "a rival keeps its mark whatever else is shown"


def test_a_further_axis_gets_a_panel_as_soon_as_plans_have_it():
    timed = [dataclasses.replace(point(1, 4, 1e-2), values=limits(1, 4) | {"max_latency_ms": 12.0})]
    layout = search.front(timed, None, None, {"max_latency_ms": 10.0})["layout"]
    assert {"xaxis", "xaxis2", "xaxis3"} <= set(layout) and "xaxis4" not in layout
    assert "12.00 ms" in search.front(timed, None, None, {})["data"][1]["customdata"][0][2]


def test_zoom_survives_new_points_but_not_another_block(bundle, fisher_TL):
    def revision(figure):
        return figure["layout"]["uirevision"]

    one, two = ([point(1, 4, 1e-2)] * n for n in (1, 2))
    assert revision(search.front(one, None, None, limits(1, 4))) == revision(search.front(two, None, None, limits(2, 5)))
    assert revision(block_map(fisher_TL, bundle.layers)) == revision(block_map([None] * 5 + [fisher_TL[5]], bundle.layers, cell=(3, 5)))
    last = len(bundle.layers) - 1
    assert revision(sensitivity.layer_map(fisher_TL, bundle.layers, "", (0, 0))) != revision(
        sensitivity.layer_map(fisher_TL, bundle.layers, "", (last, 0)))


def test_search_points_are_live_then_final(result):
    live = search.points(extended(None, result.front[:3]))
    assert [p.values["max_weight_bytes"] for p in live] == pytest.approx([s.plan.weight_bytes / 1e6 for s in result.front[:3]])
    final = search.points(result, result.events)
    assert [p.kind for p in final] == ["front"] * 5 + ["references"] * 3
    json.dumps(search.front(final, None, None, limits(1, 4)), allow_nan=False)


def test_the_ring_is_around_the_chosen_plan_s_own_point(result):
    judged = result.front[1].model_copy(update={"error": 0.7, "held_out": True})
    place = search.place_of(judged, result)
    assert (place.values["max_mean_act_bits"], place.error) == (result.front[1].plan.act_bits_mean, result.front[1].error)
    assert search.place_of(Drafted(result.front[0].plan), result) is None, "what was never measured has no place on the front"


def test_a_chosen_finalist_off_the_front_keeps_its_own_point_and_its_rivals(result):
    finalist = result.references[0].model_copy(update={"plan": result.front[1].plan.model_copy(update={"act_bits_mean": 3.5})})
    off_front = dataclasses.replace(result, front=(result.front[0],), finalists=(finalist,))
    judged = finalist.model_copy(update={"error": 0.7, "held_out": True})
    assert search.place_of(judged, off_front).error == finalist.error
    best = min(result.references, key=lambda s: s.error)
    assert f"{best.error / finalist.error:.2f} ×" in search.rivals_line(off_front, judged, limits(100, 16))


def test_the_beam_leaves_a_trail_that_fades(result):
    traces = search.beam(search.beam_steps(result.events), 4)["data"]
    trail = [t["opacity"] for t in traces if t["legendgroup"] == "trail"]
    assert len(trail) == 3 and trail == sorted(trail) and trail[-1] < 1
    now = next(t for t in traces if t["name"] == "survivors")
    assert now["y"] == [figures.rounded(p[1]) for p in result.events[3].survivors]


def test_the_table_holds_the_same_plans_and_marks_the_chosen(result):
    shown = search.points(result)
    html = search.plan_table(shown, result.front[2].plan.plan_id, 2)
    assert "errors are means over 2 calibration prompts" in html
    picks = [json.loads(unescape(text)) for text in re.findall(r'data-pick="([^"]+)"', html)]
    assert {p["plan"] for p in picks} == {p.plan_id for p in shown}
    chosen = re.findall(r'data-pick="([^"]+)"[^>]*aria-pressed="true"', html)
    assert [json.loads(unescape(text)) for text in chosen] == [{"plan": result.front[2].plan.plan_id}]


def test_a_rival_is_only_held_against_the_plan_where_it_keeps_the_budget(result):
    chosen = result.front[3]
    wide = search.rivals_line(result, chosen, limits(100, 16))
    best = min(result.references, key=lambda s: s.error)
    assert f"{best.error / chosen.error:.2f} ×" in wide
    assert search.rivals_line(result, chosen, limits(0.1, 3)) == "The chosen plan is beyond this budget."
    assert search.rivals_line(dataclasses.replace(result, references=()), chosen, limits(100, 16)) == "No rival keeps this budget."


def test_bit_map_shows_every_width_of_the_plan(bundle, found):
    scored = make_scored(found, 3, 4)
    figure = plans.bit_map(scored.plan, bundle.layers, (3, 1), brush=8)
    weights, steps = figure["data"]
    assert [row[0] for row in weights["customdata"]] == list(scored.plan.weight_bits_L)
    assert np.array_equal(np.array(steps["customdata"]).T, scored.plan.act_bits_TL)
    assert np.array_equal(steps["text"], steps["customdata"]), "the number stands in the cell, colour is not alone"
    levels = sorted(figures.BIT_COLOURS)
    assert all(levels[z] == bits for row, shown in zip(steps["z"], steps["customdata"]) for z, bits in zip(row, shown))
    assert figure["layout"]["meta"]["brush"] == 8 and figure["layout"]["shapes"][0]["x0"] == 0.5


def test_the_recipe_diff_is_b_less_a(bundle, found):
    first, second = make_scored(found, 3, 4).plan, make_scored(found, 4, 6).plan
    weights, steps = plans.difference_map(first, second, bundle.layers)["data"]
    assert [row[0] for row in weights["customdata"]] == [b - a for a, b in zip(first.weight_bits_L, second.weight_bits_L)]
    assert np.array_equal(np.array(steps["customdata"]).T, np.array(second.act_bits_TL) - np.array(first.act_bits_TL))
    changed = int((np.array(second.act_bits_TL) != np.array(first.act_bits_TL)).sum())
    assert plans.difference_line(first, second).startswith(f"{changed} of {STEPS * len(bundle.layers)} activation widths differ")
    assert plans.difference_line(first, first).startswith(f"Plan {first.plan_id} is A; choose another")


def test_a_phone_gets_short_names_unless_two_would_be_the_same():
    names = ["double.0 attn.to_q", "double.0 ff_context.net.2", "single.12 proj_mlp"]
    assert figures.short_rows(names)["ticktext"] == ["d0 to_q", "d0 ffc.net.2", "s12 proj_mlp"]
    assert figures.short_rows(["double.0 attn.to_q", "deep.0 to_q"]) == {}


def test_the_bits_are_told_as_a_table_of_runs(bundle, found):
    plan = make_scored(found, 3, 4).plan
    rows = [[4] * len(row) for row in plan.act_bits_TL]
    rows[2][1] = 8
    plan = plan.model_copy(update={"act_bits_TL": tuple(map(tuple, rows))})
    _, *cells = cells_of(plans.bits_table(plan, bundle.layers))
    assert cells[0][1:] == ["3", "4 at all steps"] and cells[1][2] == f"4 (steps 0–1), 8 (step 2), 4 (steps 3–{STEPS - 1})"


def test_a_painted_plan_is_told_and_placed_against_the_one_before(bundle, found, result):
    before = result.front[2]
    painted = Drafted(before.plan.model_copy(update={"predicted_error": before.plan.predicted_error * 1.5,
                                                     "weight_bytes": before.plan.weight_bytes + 250_000}), origin="painted")
    line = plans.painted_line(painted, (before,))
    assert line.startswith(f"Painted, against plan {before.plan.plan_id} before: 1.5 times its predicted error, +0.25 MB, +0.000 mean")
    assert plans.painted_line(before, ()) == ""
    place = search.painted_place(painted, (before,), result)
    assert place.error == pytest.approx(1.5 * before.error) and place.plan_id == ""
    drawn = search.front(search.points(result), place, None, {})["data"]
    assert "painted, error modelled" in [t["name"] for t in drawn] and "chosen" not in [t["name"] for t in drawn]
    assert search.painted_place(Drafted(before.plan), (), result) is None


def test_plan_numbers_say_how_each_is_known(bundle, found):
    scored = make_scored(found, 4, 4)
    row = {cells[0]: cells[1:] for cells in cells_of(plans.plan_numbers(scored, bundle, found.costs))}
    assert row["transformer in memory"] == [f"{scored.plan.weight_bytes / 1e6:.2f} MB", "=exact"]
    parameters = sum(layer.n_out * (layer.k_in + 1) for layer in bundle.layers)
    stored = 8 * (scored.plan.weight_bytes - found.costs.fixed_bytes) / parameters
    assert row["effective weight bits, quantized layers"][0] == f"{stored:.2f} bits/parameter"
    assert row["bit operations of one image"][1] == "◐modelled"
    assert row["predicted error, summed over layers and steps"][1] == "◐modelled, to compare plans of one profile"
    assert row["error (NMSE of the final latent)"][1] == "●measured, no interval: 4 held-out prompts"
    judged = scored.model_copy(update={"low": 1e-4, "high": 2e-3, "samples": 16})
    row = {cells[0]: cells[1:] for cells in cells_of(plans.plan_numbers(judged, bundle, found.costs))}
    assert row["error (NMSE of the final latent)"] == [f"{judged.error:.3e}  [1.00e-04,  2.00e-03]",
                                                       "●measured, mean and 95 % interval over 16 held-out prompts"]
    both = {cells[0]: cells[1:] for cells in cells_of(plans.two_plans(scored, judged, bundle, found.costs))}
    assert both["error (NMSE of the final latent)"][1] == (
        "●measured, A: no interval: 4 held-out prompts; B: mean and 95 % interval over 16 held-out prompts")
    assert both["transformer in memory"][1] == "=exact"
    drafted = cells_of(plans.plan_numbers(Drafted(scored.plan), bundle, None))
    assert not any("●measured" in cell for cells in drafted for cell in cells)


def test_latency_is_shown_with_how_it_is_known(bundle, found):
    plan = SimpleNamespace(**{name: getattr(make_scored(found, 4, 4).plan, name) for name in (
        "weight_bytes", "act_bits_mean", "act_bits_macs", "bit_ops", "predicted_error", "plan_id", "method")}, latency_ms=12.5)
    row = {cells[0]: cells[1:] for cells in cells_of(plans.plan_numbers(Drafted(plan), bundle, None))}
    assert row["time of an image's steps"] == ["12.50 ms", "◐modelled"]


# Compare

def test_mean_of_latent_errors(bundle, found):
    scored = make_scored(found, 4, 4)
    comparison = FakePipeline().compare(bundle, SimpleNamespace(plan=scored.plan, weight_bytes=1), ("a", "b"), 0, STEPS)
    first = dataclasses.replace(comparison.pairs[0], latent_nmse_T=(0.1, 0.2))
    second = dataclasses.replace(comparison.pairs[1], latent_nmse_T=(0.3, 0.6))
    figure = compare.error_over_steps(dataclasses.replace(comparison, pairs=(first, second)), 1, 1)
    mean, chosen = figure["data"]
    assert mean["y"] == [0.2, 0.4] and chosen["y"] == [0.3, 0.6] and figure["layout"]["shapes"][0]["x0"] == 1


def test_metrics_show_direction_and_size_of_sample(bundle, found):
    comparison = FakePipeline().compare(bundle, SimpleNamespace(plan=make_scored(found, 4, 4).plan, weight_bytes=1), ("a", "b"), 0, STEPS)
    row = {cells[0]: cells[1:] for cells in cells_of(compare.comparison_numbers(comparison))}
    assert row["PSNR"] == ["36  [35, 37] dB", "●measured, n = 2, higher is better"]
    assert row["latent NMSE"][1] == "●measured, n = 2, lower is better"
    assert row["time per image, in batches"][1] == "●measured, emulated" and "time of one image alone" not in row
    solo_timing = SoloTiming(float_ms=200.4, quantized_ms=150.0, predicted_ms=156.0)
    row = {cells[0]: cells[1:] for cells in cells_of(compare.comparison_numbers(dataclasses.replace(comparison, solo_timing=solo_timing)))}
    assert row["time of one image alone"] == ["200 → 150 ms", "●measured, quiet quarter of 9 turns"]
    assert row["its prediction by the cost table"] == ["156 (+4 %) ms", "◐modelled, a sum of measured layer times"]
    slower = dataclasses.replace(comparison, solo_timing=dataclasses.replace(solo_timing, slower=1.5))
    row = {cells[0]: cells[1:] for cells in cells_of(compare.comparison_numbers(slower))}
    assert row["its prediction by the cost table"] == ["234 (+56 %) ms", "◐modelled, a sum of measured layer times; 156 ms when they were, "
                                                                         "the machine takes 1.50 times as long now"]
    more = dataclasses.replace(comparison, metrics={**comparison.metrics, "a new metric": comparison.metrics["PSNR"]})
    assert "a new metric" in compare.comparison_numbers(more)


def test_the_sign_test_is_the_exact_binomial():
    from scipy.stats import binomtest

    for wins in range(12):
        for losses in range(12):
            expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
            assert compare.sign_test(wins, losses) == pytest.approx(expected)


def test_a_tally_claims_nothing_from_few_answers():
    assert "too few answers" in compare.tally_words(3, 0, 1, 2)
    assert "n = 3 answers on 2 pairs)" in compare.tally_words(3, 0, 1, 2)
    assert "the difference is visible" in compare.tally_words(9, 0, 0, 4)
    assert "no preference" in compare.tally_words(5, 4, 0, 4)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a & b <img src=x onerror=alert(1)>", '" onclick="alert(1)'])
def test_text_from_outside_is_escaped(text):
    for html in (tables.notice(text), tables.table((text,), [(text,)], text), compare.compute_badge(text, text), tables.empty(text, text),
                 tables.status(text, text, None), tables.numbers([(text, text, text, text)], text),
                 tables.pick_table((text,), [({"a": text}, False, [text])], text)):
        assert "<script" not in html and "<img" not in html and 'onclick="alert' not in html


def test_no_notice_leaves_no_trace():
    assert tables.notice("") == ""
    assert 'role="alert"' in tables.notice("bad") and 'role="status"' in tables.notice("fine", "info")


def test_log_axis_has_ticks_whatever_the_range():
    assert figures.log_axis("", [1.0, 3.0])["dtick"] == "D1"
    assert figures.log_axis("", [1.0, 50.0])["dtick"] == "D2"
    assert figures.log_axis("", [1e-9, 1e9])["dtick"] == 3
    assert figures.log_axis("", [None, 0.0])["dtick"] == 1


def test_sliders_are_offered_for_what_the_cost_table_knows(found):
    assert [axis.field for axis in budgets.offered(found)] == ["max_weight_bytes", "max_mean_act_bits"]
    low_mb, high_mb = budgets.memory_range(found)
    assert low_mb == pytest.approx((found.costs.fixed_bytes + int(found.costs.weight_bytes_LC[:, 0].sum())) / 1e6) and high_mb > low_mb


def test_each_part_of_the_search_says_what_it_added(result):
    found = {"lagrangian": 4e-2, "beam": 2e-2, "refined": 3e-2}  # refinement found nothing better
    finalists = tuple(result.front[0].model_copy(update={"origin": origin, "error": error}) for origin, error in found.items())
    html = search.parts_table(dataclasses.replace(result, finalists=finalists))
    rows = [tuple(cells) for cells in cells_of(html)[1:]]
    assert rows == [("Lagrangian sweep", "4.00e-02", "13.98", ""), ("beam search", "2.00e-02", "16.99", "+3.01"),
                    ("refinement", "3.00e-02", "15.23", "+0.00")]
    assert search.parts_table(dataclasses.replace(result, finalists=())) == ""


def test_rank_correlations_are_shown_with_their_counts(result):
    ranking = (Ranking(prediction="planning_table", spearman=0.937, plans=40, spearman_near=None, plans_near=3),)
    html = search.ranking_table(dataclasses.replace(result, ranking=ranking))
    assert "what the search plans by" in html and "0.94 (n = 40)" in html and "too few plans (3)" in html


def test_the_front_marks_which_part_found_a_plan(result):
    origins = ("lagrangian", "beam", "refined")
    shown = [dataclasses.replace(p, kind="front", origin=o) for p, o in zip(search.points(result), origins)]
    traces = search.front(shown, None, None, limits(100, 16))["data"]
    marks = {t["name"]: t["marker"]["symbol"] for t in traces if t["mode"] == "markers"}
    assert len(set(marks.values())) == len(marks) == 3
    others = [dataclasses.replace(shown[0], origin=o, plan_id=o) for o in ("uniform", "dp", "imported")]
    traces = search.front([*shown, *others], None, None, limits(100, 16))["data"]
    marks = {t["name"]: t["marker"]["symbol"] for t in traces if t["showlegend"] and t["mode"] == "markers"}
    assert "others on the front" in marks and len(set(marks.values())) == 4, "what is not the search's own shares one mark and one entry"


def test_replaying_a_search_shows_what_had_been_measured_by_then(result):
    steps = search.beam_steps(result.events)
    shown = search.points(result, result.events, 2)
    assert [p.error for p in shown] == [error for *_, error in steps[1].front]
    assert [p.plan_id for p in shown] == [s.plan.plan_id for s in result.front[: len(shown)]], "what is still on the front can be chosen"
    gone = search.points(dataclasses.replace(result, front=result.front[1:]), result.events, 3)
    assert gone[0].plan_id == "" and gone[1].plan_id == result.front[1].plan.plan_id, "what a better plan has replaced is there to look at"
    whole = search.points(result, result.events)
    assert search.points(result, result.events, len(steps)) == whole
    chosen = dataclasses.replace(whole[0], error=whole[0].error / 7)  # not found by then
    now, end = (search.front(points, chosen, None, limits(1, 4), whole=given) for points, given in ((shown, whole), (whole, ())))
    for axis in ("xaxis", "xaxis2"):
        assert now["layout"][axis]["range"] == end["layout"][axis]["range"], "axes stay where they are"
    low, high = now["layout"]["yaxis"]["range"]
    assert all(low < math.log10(p.error) < high for p in whole)
    assert [t["name"] for t in end["data"]].count("chosen") == 3 and "chosen" not in [t["name"] for t in now["data"]]
