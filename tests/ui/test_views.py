"""Results to figures and tables: the numbers that arrive, how they are labelled, and nothing that breaks JSON or HTML."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from tests.ui.fakes import FakeBundle, FakePipeline, make_scored, make_table
from workbench.options import Budget, QuantConfig, SearchConfig, SensitivityConfig, TraceConfig
from workbench.types import LayerInfo
from workbench.ui import figures, tables, views
from workbench.ui.session import Imported

STEPS = 6


@pytest.fixture(scope="module")
def bundle():
    return FakeBundle()


@pytest.fixture(scope="module")
def found(bundle):
    return FakePipeline().profile(bundle, TraceConfig(steps=STEPS), SensitivityConfig(), QuantConfig())


@pytest.fixture(scope="module")
def fisher_TL(found):
    return found.sensitivity.fisher_TL.tolist()


def heat_of(figure):
    return figure["data"][0]


def test_block_map_is_the_mean_or_the_sum_of_its_layers(bundle, fisher_TL):
    first_block = views.blocks_of(bundle.layers)["blocks.0"]
    total = sum(fisher_TL[2][i] for i in first_block)
    mean = heat_of(views.block_heatmap(fisher_TL, bundle.layers, "mean", (None, None)))["customdata"][0][2]
    summed = heat_of(views.block_heatmap(fisher_TL, bundle.layers, "sum", (None, None)))["customdata"][0][2]
    assert summed == pytest.approx(total, rel=1e-3)
    assert mean == pytest.approx(total / len(first_block), rel=1e-3)


def test_colour_is_the_logarithm_and_hover_the_value(bundle, fisher_TL):
    heat = heat_of(views.block_heatmap(fisher_TL, bundle.layers, "mean", (None, None)))
    assert np.allclose(heat["z"], np.log10(heat["customdata"]), rtol=1e-3)
    assert float(heat["colorbar"]["ticktext"][-1]) == pytest.approx(max(map(max, heat["customdata"])), rel=0.06)


def test_a_map_in_the_making_has_empty_columns(bundle, fisher_TL):
    partial_TL = [None] * (STEPS - 1) + [fisher_TL[-1]]
    heat = heat_of(views.block_heatmap(partial_TL, bundle.layers, "mean", (None, None)))
    assert all(row[:-1] == [None] * (STEPS - 1) and row[-1] is not None for row in heat["z"])
    json.dumps(heat, allow_nan=False)


def test_zero_fisher_is_an_empty_cell_not_minus_infinity(bundle):
    heat = heat_of(views.block_heatmap([[0.0] * len(bundle.layers), [1.0] * len(bundle.layers)], bundle.layers, "mean", (None, None)))
    assert heat["z"][0] == [None, 0.0]
    nothing = views.block_heatmap([[0.0] * len(bundle.layers)], bundle.layers, "mean", (None, None))
    assert nothing["data"] == [] and "0" in nothing["layout"]["annotations"][0]["text"]


def test_selected_cell_is_framed_in_both_maps(bundle, fisher_TL):
    layer, step = 8, 4  # the third layer of the second block
    blocks = views.block_heatmap(fisher_TL, bundle.layers, "mean", (layer, step))["layout"]["shapes"][0]
    inside = views.layer_heatmap(fisher_TL, bundle.layers, (layer, step))["layout"]["shapes"][0]
    assert (blocks["x0"], blocks["y0"]) == (3.5, 0.5)
    assert (inside["x0"], inside["y0"]) == (3.5, 1.5)


def test_layer_labels_are_short_and_unique():
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_mlp"]
    blocks = ["double.0", "double.0", "single.0"]
    layers = [LayerInfo(index=i, name=n, block=b, role="", n_out=1, k_in=1, tokens=1, has_bias=False, shares_input_with=i)
              for i, (n, b) in enumerate(zip(names, blocks))]
    assert views.layer_labels(layers) == ["double.0 attn.to_q", "double.0 ff.net.2", "single.0 proj_mlp"]


def test_fragile_cells_are_ordered_and_shares_are_of_everything(bundle, found, fisher_TL):
    rows = views.fragile_rows(fisher_TL, found.sensitivity.stderr_TL.tolist(), bundle.layers, limit=10_000)
    assert len(rows) == STEPS * len(bundle.layers)
    assert [r[3] for r in rows] == sorted((r[3] for r in rows), reverse=True)
    assert sum(r[5] for r in rows) == pytest.approx(100, rel=1e-2)
    assert all(r[4] == pytest.approx(10) for r in rows), "the fake's standard error is a tenth"
    step, label = rows[0][1], rows[0][2]
    top = np.unravel_index(np.argmax(fisher_TL), (STEPS, len(bundle.layers)))
    assert (step, label) == (top[0], views.layer_labels(bundle.layers)[top[1]])


def test_error_against_bits_leaves_out_float(bundle, found):
    layer, step = 3, 2
    activations, weight = views.error_against_bits(make_table(found.sensitivity), bundle.layers, (layer, step))["data"]
    assert activations["x"] == [3, 4, 6, 8]
    assert activations["y"][0] == pytest.approx(float(found.table.error_TLC[step, layer, 0]), rel=1e-3)
    assert weight["x"][0] == 2 and all(a > b for a, b in zip(weight["y"], weight["y"][1:]))


def test_budget_lines_stand_at_the_sliders_and_points_beyond_fade(found):
    front = [(1_000_000, 4.0, 1e-2, "beam"), (3_000_000, 4.0, 1e-3, "beam"), (1_000_000, 8.0, 1e-4, "beam")]
    figure = views.pareto(front, [], front[0], budget_mb=2.0, budget_bits=5.0)
    lines = {shape["xref"]: shape["x0"] for shape in figure["layout"]["shapes"]}
    assert lines == {"x": 5.0, "x2": 2.0}
    for trace in (t for t in figure["data"] if t["name"] == "front"):
        assert trace["marker"]["opacity"] == [1.0, views.FADED, views.FADED]
    by_memory = next(t for t in figure["data"] if t["name"] == "front" and t["xaxis"] == "x2")
    assert by_memory["x"] == [1.0, 3.0, 1.0]
    assert [c[:2] for c in by_memory["customdata"]] == [["front", 0], ["front", 1], ["front", 2]]


def test_zoom_survives_new_points_but_not_another_block(bundle, fisher_TL):
    def revision(figure):
        return figure["layout"]["uirevision"]

    one, two = ([(1_000_000, 4.0, 1e-2, "beam")] * n for n in (1, 2))
    assert revision(views.pareto(one, [], None, 1, 4)) == revision(views.pareto(two, [], None, 2, 5))
    assert revision(views.block_heatmap(fisher_TL, bundle.layers, "mean", (None, None))) == revision(
        views.block_heatmap([None] * 5 + [fisher_TL[5]], bundle.layers, "mean", (3, 5)))
    assert revision(views.layer_heatmap(fisher_TL, bundle.layers, (0, 0))) != revision(
        views.layer_heatmap(fisher_TL, bundle.layers, (len(bundle.layers) - 1, 0)))


def test_bit_map_shows_every_width_of_the_plan(bundle, found):
    scored = make_scored(found, 3, 4)
    weights, steps = views.bit_map(scored.plan, bundle.layers)["data"]
    assert [row[0] for row in weights["customdata"]] == list(scored.plan.weight_bits_L)
    assert np.array_equal(np.array(steps["customdata"]).T, scored.plan.act_bits_TL)
    levels = sorted(figures.BIT_COLOURS)
    assert all(levels[z] == bits for row, shown in zip(steps["z"], steps["customdata"]) for z, bits in zip(row, shown))


def test_plan_numbers_say_how_each_is_known(bundle, found):
    scored = make_scored(found, 4, 4)
    html = views.plan_numbers(scored, bundle, found.costs)
    row = {cells[0]: cells[1:] for cells in (
        [c.split("</td>")[0] for c in r.split("<td>")[1:]] for r in html.split("<tr>")[2:])}
    assert row["transformer in memory"] == [f"{scored.plan.weight_bytes / 1e6:.2f}", "MB", "exact"]
    parameters = sum(layer.n_out * (layer.k_in + 1) for layer in bundle.layers)
    stored = 8 * (scored.plan.weight_bytes - found.costs.fixed_bytes) / parameters
    assert row["effective weight bits, quantized layers"][0] == f"{stored:.2f}"
    assert row["bit operations of one image"][2] == "modelled"
    assert row["predicted error"][2] == "modelled"
    assert row["error (NMSE of the final latent)"][2] == "measured, 4 held-out prompts"
    assert "measured" not in views.plan_numbers(Imported(scored.plan), bundle, None)


def test_search_plot_is_live_then_final(bundle, found):
    result = FakePipeline().search(bundle, found, Budget(max_mean_act_bits=4), SearchConfig())
    live = views.search_plot(result.events[:4], None, None, 1.0, 4.0)
    assert [len(t["x"]) for t in live["data"] if t["name"] == "front"] == [3, 3]
    final = views.search_plot(result.events, result, result.chosen, 1.0, 4.0)
    assert [len(t["x"]) for t in final["data"] if t["name"] == "front"] == [5, 5]
    assert [len(t["x"]) for t in final["data"] if t["name"] == "references"] == [3, 3]
    json.dumps(final, allow_nan=False)


def test_the_ring_is_around_the_chosen_plan_s_own_point(bundle, found):
    result = FakePipeline().search(bundle, found, Budget(max_mean_act_bits=4), SearchConfig())
    judged = result.front[1].model_copy(update={"error": 0.7, "held_out": True})
    ring = next(t for t in views.search_plot(result.events, result, judged, 1.0, 4.0)["data"] if t["name"] == "chosen")
    assert (ring["x"], ring["y"]) == ([result.front[1].plan.act_bits_mean], [figures.rounded(result.front[1].error)])


@pytest.mark.parametrize("gain", [1, 8, 64])
def test_difference_is_absolute_scaled_and_clipped(gain):
    left, right = np.array([[[0, 10, 200]]], np.uint8), np.array([[[3, 0, 255]]], np.uint8)
    assert views.difference(left, right, gain).tolist() == [[[min(255, v * gain) for v in (3, 10, 55)]]]


def test_mean_of_latent_errors(bundle, found):
    scored = make_scored(found, 4, 4)
    comparison = FakePipeline().compare(bundle, SimpleNamespace(plan=scored.plan, weight_bytes=1), ("a", "b"), 0, STEPS)
    first = dataclasses.replace(comparison.pairs[0], latent_nmse_T=(0.1, 0.2))
    second = dataclasses.replace(comparison.pairs[1], latent_nmse_T=(0.3, 0.6))
    mean, chosen = views.error_over_steps(dataclasses.replace(comparison, pairs=(first, second)), 1)["data"]
    assert mean["y"] == [0.2, 0.4] and chosen["y"] == [0.3, 0.6]


def test_metrics_show_direction_and_size_of_sample(bundle, found):
    comparison = FakePipeline().compare(bundle, SimpleNamespace(plan=make_scored(found, 4, 4).plan, weight_bytes=1), ("a", "b"), 0, STEPS)
    html = views.comparison_numbers(comparison)
    assert "36  [35, 37]" in html and "n = 2, higher is better" in html and "n = 2, lower is better" in html
    assert "measured, emulated" in html


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a & b <img src=x onerror=alert(1)>"])
def test_text_from_outside_is_escaped(text):
    for html in (tables.notice(text), tables.table((text,), [(text,)], text), views.compute_badge(text, text), tables.status(text, None)):
        assert "<script" not in html and "<img" not in html and "&lt;" in html


def test_no_notice_leaves_no_trace():
    assert tables.notice("") == ""
    assert 'role="alert"' in tables.notice("bad") and 'role="status"' in tables.notice("fine", "info")


def test_log_axis_has_ticks_whatever_the_range():
    assert figures.log_axis("", [1.0, 3.0])["dtick"] == "D1"
    assert figures.log_axis("", [1.0, 50.0])["dtick"] == "D2"
    assert figures.log_axis("", [1e-9, 1e9])["dtick"] == 3
    assert figures.log_axis("", [None, 0.0])["dtick"] == 1
