"""What a choice costs in time: sums, sharing, the cache, and honest labels."""

import json

import pytest
import torch

from workbench import latency, roofline
from workbench.options import ACT_BITS, LATENCY_TARGETS, MEASURED_TARGETS, MODELLED_TARGETS, WEIGHT_BITS, BadInput, QuantConfig
from workbench.plans import LatencyTable
from workbench.types import LayerInfo


def table(us_LWA, fixed_us=7.0):
    return LatencyTable(target="a test", measured=False, provenance="", weight_bits_W=(4, 16), act_bits_A=(4, 16),
                        us_LWA=torch.as_tensor(us_LWA, dtype=torch.float64), fixed_us=fixed_us)


def test_a_plan_costs_its_layers_and_the_fixed_part_of_every_step():
    costs = table([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]])
    assert costs.plan_ms([4, 16], [[4, 16], [16, 4], [4, 4]]) == pytest.approx((1 + 40 + 2 + 30 + 1 + 30 + 3 * 7) / 1000)
    assert costs.act_us_LA([16, 4]).tolist() == [[3.0, 4.0], [10.0, 20.0]]


@pytest.mark.parametrize("wrong", [float("nan"), -1.0, float("inf")])
def test_a_time_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="finite and not negative"):
        table([[[wrong, 1.0], [1.0, 1.0]]])
    with pytest.raises(ValueError, match="finite and not negative"):
        table([[[1.0, 1.0], [1.0, 1.0]]], fixed_us=wrong)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for tables; the kernels are those already loaded."""
    monkeypatch.setattr(latency.build, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def clock(monkeypatch):
    """Made-up times, us: a layer's follow from its shape and widths, 1000 of them for its input; an image takes 20 seconds."""
    timed = []

    def taken(cell, count):
        return 2e7 if cell[0] == "image" else latency._calls(cell) * (1000 + count * (1000.0 + cell[1] + sum(cell[5:7])))

    def interleaved_timing(runs, *_, **__):
        timed.extend(runs)
        return {name: taken(*name) for name in runs}
    monkeypatch.setattr(latency, "interleaved_timing", interleaved_timing)
    return timed


def test_a_table_of_a_busy_machine_is_measured_anew(bundle, cache, monkeypatch):
    """Half a second an image, then a tenth: whatever else ran when the table was made has gone."""
    pace, timed = [5e5], []

    def interleaved_timing(runs, *_, **__):
        timed.append(len(runs))
        return {name: pace[0] for name in runs}
    monkeypatch.setattr(latency, "interleaved_timing", interleaved_timing)
    busy = latency.measure(bundle, QuantConfig())
    pace[0] = 4.5e5
    assert torch.equal(latency.measure(bundle, QuantConfig()).us_LWA, busy.us_LWA) and timed[1:] == [1], "as fast as then: read"
    pace[0] = 1e5
    quiet = latency.measure(bundle, QuantConfig())
    assert timed[2] == 1 and timed[3] == timed[0] and bool((quiet.us_LWA < busy.us_LWA).any())
    pace[0] = 5e5
    assert torch.equal(latency.measure(bundle, QuantConfig()).us_LWA, quiet.us_LWA), "busy now: the quiet table stays"


def test_layers_that_share_an_input_pay_for_its_quantization_once(bundle, cache, clock):
    measured = latency.measure(bundle, QuantConfig())
    four = WEIGHT_BITS.index(4)
    for layer in (layer for layer in bundle.layers if layer.has_act_bits):
        expected = 2000 + layer.n_out + 4 + 8 - (0 if layer.same_input == layer.index else 1000)
        assert float(measured.us_LWA[layer.index, four, ACT_BITS.index(4)]) == expected
    whole = [cell for cell, count in clock if count == 1]
    shapes = {latency.shape_of(layer) for layer in bundle.layers if layer.has_act_bits}
    assert len(whole) == len(set(whole)) == 1 + len(shapes) * len(WEIGHT_BITS) * 2


def test_few_activation_bits_cost_what_eight_do_and_the_fixed_part_is_the_rest_of_an_image(bundle, cache, clock):
    measured = latency.measure(bundle, QuantConfig())
    for bits in (3, 4, 6):
        assert torch.equal(measured.us_LWA[..., ACT_BITS.index(bits)], measured.us_LWA[..., ACT_BITS.index(8)])
    assert not torch.equal(measured.us_LWA[..., ACT_BITS.index(16)], measured.us_LWA[..., ACT_BITS.index(8)])
    rows = [[8] * len(bundle.layers)] * latency.STEPS_OF_SCHEDULE
    assert measured.plan_ms([4] * len(bundle.layers), rows) == pytest.approx(20_000.0)
    assert measured.measured and "measured" in measured.target


def test_measurements_are_kept_and_taken_anew_when_asked(bundle, cache, clock):
    first = latency.measure(bundle, QuantConfig())
    count = len(clock)
    assert torch.equal(latency.measure(bundle, QuantConfig()).us_LWA, first.us_LWA) and len(clock) == count
    latency.measure(bundle, QuantConfig(group_size=32))
    assert len(clock) == 2 * count, "another group size is another layer"
    latency.measure_beside({}, bundle, QuantConfig())
    assert len(clock) == 3 * count
    assert latency.reference(bundle, QuantConfig())[1] == 2e7 and latency.reference(bundle, QuantConfig(group_size=128)) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"cells": {"x": [1]}}', '{"cells": 3}', '{"cells": {"x": ["a", "b"]}}'])
def test_a_damaged_cache_is_measured_again(bundle, cache, clock, damage):
    latency.measure(bundle, QuantConfig())
    (path,) = cache.glob("latency-*.json")
    path.write_text(damage)
    count = len(clock)
    latency.measure(bundle, QuantConfig())
    assert len(clock) == 2 * count
    assert json.loads(path.read_text())["cells"]


def test_medians_are_of_each_run_in_turns(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def run(name, seconds):
        def once():
            order.append(name)
            now[0] += seconds[min(order.count(name), len(seconds)) - 1]
        return once
    found = latency.interleaved_timing({"a": run("a", [9, 9, 1e-6, 5e-6, 3e-6]), "b": run("b", [2e-6])}, 3, torch.device("cpu"))
    assert found == {"a": pytest.approx(3), "b": pytest.approx(2)} and order == ["a", "b"] * 5
    found = latency.interleaved_timing({"a": run("c", [9, 9, 1e-6, 5e-6, 3e-6])}, 3, torch.device("cpu"), quantile=0.25)
    assert found == {"a": pytest.approx(2)}
    order.clear()
    latency.interleaved_timing({"slow": run("slow", [9])}, 100, torch.device("cpu"), seconds=30)
    assert len(order) == latency.WARM_UP + 3


def test_real_layers_and_a_real_image_are_timed_and_leave_the_model_as_it_was(bundle, cache):
    before = [bundle.linear(layer) for layer in bundle.layers]
    ran = []
    table, us = latency.measure_beside({"beside": lambda: ran.append(1)}, bundle, QuantConfig(), rounds=3)
    assert len(ran) == latency.WARM_UP + 3 and us["beside"] > 0
    assert 0 < table.fixed_us < 1e6 and bool((table.us_LWA[[layer.has_act_bits for layer in bundle.layers]] > 0).all())
    assert not bool(table.us_LWA[[layer.index for layer in bundle.modulation]].any())  # in what a step takes beside its layers
    assert [bundle.linear(layer) for layer in bundle.layers] == before


@pytest.mark.parametrize("target", roofline.CHIPS)
def test_modelled_targets_say_so_and_never_gain_from_more_bits(bundle, target):
    modelled = latency.tabulate(bundle, QuantConfig(), target)
    assert not modelled.measured and "modelled" in modelled.target and "peak rates" in modelled.provenance
    assert bool((modelled.us_LWA.diff(dim=2) >= 0).all() and (modelled.us_LWA.diff(dim=1) >= 0).all())


def test_a_chip_without_four_bit_units_runs_four_bits_as_eight():
    chip = roofline.CHIPS["h100"]
    layer = LayerInfo(index=0, name="x", block="b", role="r", n_out=3072, k_in=3072, tokens=1 << 16, has_bias=False,
                              same_input=0, fused_with=0)
    at = [roofline._roofline_us(chip, layer, bits, bits, QuantConfig()) for bits in (4, 8, 16)]
    assert at[0] == at[1] == pytest.approx(2 * layer.macs_per_step / 1979 / 1e6) and at[2] == pytest.approx(at[1] * 1979 / 989)


def test_every_target_has_its_peak_rates():
    assert set(roofline.CHIPS) == set(LATENCY_TARGETS[1:]) - set(MEASURED_TARGETS) == set(MODELLED_TARGETS)


def test_an_unknown_target_is_refused(bundle):
    known = ", ".join(("this machine", *MEASURED_TARGETS, "a100"))
    with pytest.raises(BadInput, match=f"unknown latency target 'cray'; use one of {known}"):
        latency.tabulate(bundle, QuantConfig(), "cray")


def test_a_table_that_was_measured_elsewhere_says_where_and_holds_what_was_measured(bundle, cache, monkeypatch, tmp_path):
    here, _ = latency.measure_beside({}, bundle, QuantConfig(), rounds=3)
    stored = json.loads(next(cache.glob("latency-*.json")).read_text()) | {"label": "a processor", "provenance": "measured on some day"}
    (tmp_path / "elsewhere.json").write_text(json.dumps(stored))
    monkeypatch.setattr(latency, "LATENCY_TABLES", tmp_path)
    there = latency.shipped(bundle, QuantConfig(), "elsewhere")
    assert (there.target, there.provenance, there.measured) == ("a processor (measured elsewhere)", "measured on some day", True)
    assert torch.equal(there.us_LWA, here.us_LWA) and there.fixed_us == here.fixed_us
    with pytest.raises(BadInput, match="were not measured there at these settings; use this machine or one of a100"):
        latency.shipped(bundle, QuantConfig(group_size=32), "elsewhere")


@pytest.mark.parametrize("target", MEASURED_TARGETS)
def test_shipped_tables_hold_the_embedded_model(bundle, target):
    table = latency.tabulate(bundle, QuantConfig(), target)
    assert table.measured and table.target.endswith("(measured elsewhere)") and "commit" in table.provenance
    same = [table.us_LWA[..., ACT_BITS.index(bits)] for bits in (3, 4, 8)]
    assert torch.equal(same[0], same[1]) and torch.equal(same[1], same[2]), "held in 8 bits, activations of 3 to 8 take the same time"
