"""What a choice costs in time: sums, sharing, the cache, and honest labels."""

import json

import pytest
import torch

from workbench import latency
from workbench.options import ACT_BITS, LATENCY_TARGETS, WEIGHT_BITS, BadInput, QuantConfig
from workbench.plans import LatencyTable


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
    """Made-up times: (M, N, K) decide a layer's, 1000 us of it for its input; a step takes a second."""
    timed = []

    def layer(_bundle, _quant, shape, weight_bits, act_bits):
        timed.append((shape, weight_bits, act_bits))
        return 2000.0 + shape[1] + weight_bits + act_bits, 0.0 if weight_bits == 16 else 1000.0
    monkeypatch.setattr(latency, "_time_layer", layer)
    monkeypatch.setattr(latency, "_time_step", lambda *_: 1e6)
    return timed


def test_layers_that_share_an_input_pay_for_its_quantization_once(bundle, cache, clock):
    measured = latency.measure(bundle, QuantConfig())
    four = WEIGHT_BITS.index(4)
    for layer in bundle.layers:
        expected = 2000 + layer.n_out + 4 + 8 - (0 if layer.shares_input_with == layer.index else 1000)
        assert float(measured.us_LWA[layer.index, four, ACT_BITS.index(4)]) == expected
    assert len(clock) == len(set(clock)) == len({latency.shape_of(layer) for layer in bundle.layers}) * len(WEIGHT_BITS) * 2


def test_few_activation_bits_cost_what_eight_do_and_the_fixed_part_is_the_rest_of_a_step(bundle, cache, clock):
    measured = latency.measure(bundle, QuantConfig())
    for bits in (3, 4, 6):
        assert torch.equal(measured.us_LWA[..., ACT_BITS.index(bits)], measured.us_LWA[..., ACT_BITS.index(8)])
    assert not torch.equal(measured.us_LWA[..., ACT_BITS.index(16)], measured.us_LWA[..., ACT_BITS.index(8)])
    rows = [[8] * len(bundle.layers)]
    assert measured.plan_ms([4] * len(bundle.layers), rows) == pytest.approx(1000.0)
    assert measured.measured and "measured" in measured.target


def test_measurements_are_kept_and_taken_anew_when_asked(bundle, cache, clock):
    first = latency.measure(bundle, QuantConfig())
    count = len(clock)
    assert torch.equal(latency.measure(bundle, QuantConfig()).us_LWA, first.us_LWA) and len(clock) == count
    latency.measure(bundle, QuantConfig(group_size=32))
    assert len(clock) == 2 * count, "another group size is another layer"
    latency.measure(bundle, QuantConfig(), anew=True)
    assert len(clock) == 3 * count


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"cells": {"x": [1]}}', '{"cells": 3}', '{"cells": {"x": ["a", "b"]}}'])
def test_a_damaged_cache_is_measured_again(bundle, cache, clock, damage):
    latency.measure(bundle, QuantConfig())
    (path,) = cache.glob("latency-*.json")
    path.write_text(damage)
    count = len(clock)
    latency.measure(bundle, QuantConfig())
    assert len(clock) == 2 * count
    assert json.loads(path.read_text())["cells"]


def test_a_real_layer_is_timed(bundle):
    whole_us, preparing_us = latency._time_layer(bundle, QuantConfig(), (16, 64, 128, True, 0), 4, 8)
    assert 0 < preparing_us < whole_us < 1e6


@pytest.mark.parametrize("target", latency.CHIPS)
def test_modelled_targets_say_so_and_never_gain_from_more_bits(bundle, target):
    modelled = latency.tabulate(bundle, QuantConfig(), target)
    assert not modelled.measured and "modelled" in modelled.target and "peak rates" in modelled.provenance
    assert bool((modelled.us_LWA.diff(dim=2) >= 0).all() and (modelled.us_LWA.diff(dim=1) >= 0).all())


def test_a_chip_without_four_bit_units_runs_four_bits_as_eight():
    chip = latency.CHIPS["h100"]
    layer = latency.LayerInfo(index=0, name="x", block="b", role="r", n_out=3072, k_in=3072, tokens=1 << 16, has_bias=False,
                              shares_input_with=0)
    at = [latency._roofline_us(chip, layer, bits, bits, QuantConfig()) for bits in (4, 8, 16)]
    assert at[0] == at[1] == pytest.approx(2 * layer.macs_per_step / 1979 / 1e6) and at[2] == pytest.approx(at[1] * 1979 / 989)


def test_every_target_has_its_peak_rates():
    assert set(latency.CHIPS) == set(LATENCY_TARGETS[1:])


def test_an_unknown_target_is_refused(bundle):
    with pytest.raises(BadInput, match="unknown latency target 'cray'; use one of this machine, a100"):
        latency.tabulate(bundle, QuantConfig(), "cray")
