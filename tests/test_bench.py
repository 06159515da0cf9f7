"""The bench times what it says it times, and leaves the model as it was."""

import dataclasses
import time

import pytest

from workbench import bench, latency, pipeline, roofline
from workbench.options import BenchConfig, QuantConfig
from workbench.quant.bank import round_bank
from workbench.quant.quantize import build

QUICK = BenchConfig(rounds=3, baselines=False)


def test_layers_are_compared_with_the_faster_float_type(bundle, monkeypatch):
    monkeypatch.setattr(bench.latency, "interleaved_timing", lambda runs, *_, **__: {name: 10.0 + i for i, name in enumerate(runs)})
    found = bench.layers(bundle, QuantConfig(), QUICK)
    shapes = {latency.shape_of(layer)[:3] for layer in bundle.layers if layer.has_act_bits}
    assert {(row.m, row.n, row.k) for row in found} == shapes and len(found) == len(shapes) * len(bench.CHOICES)
    assert all(row.float_us == 10.0 and row.speedup == 10.0 / row.us for row in found)
    assert [row.choice for row in found[:5]] == ["W8A8 g64", "W4A8 g64", "W4A4 g64", "W3A3 g64", "W4A16 g64"]


def test_a_whole_image_is_timed_in_both_arithmetics_and_the_model_put_back(bundle):
    quant, sigma_T = QuantConfig(), bundle.integrator(2).sigma_T1[:-1].tolist()
    plan = pipeline.uniform_plan(bundle, quant, sigma_T, 4, 4)
    quantized = build(bundle, round_bank(bundle, quant, (4, 8)), plan)
    table = roofline.model(bundle, quant, "a100")
    before = bundle.transformer, bundle.dtype, [bundle.linear(layer) for layer in bundle.layers]
    started = time.perf_counter()
    us = latency.interleaved_timing(bench.whole_runs(bundle, quantized, 2), 3, bundle.device)
    found = bench.whole_model(bundle, quantized, table, us, 2)
    spent_ms = (time.perf_counter() - started) * 1000
    assert (bundle.transformer, bundle.dtype) == before[:2]
    assert all(bundle.linear(layer) is linear for layer, linear in zip(bundle.layers, before[2]))
    assert found.float_ms == min(found.float_ms_by_type.values()) == found.float_ms_by_type[found.float_type]
    assert found.quantized_ms == min(found.quantized_ms_by_type.values())
    assert set(found.float_ms_by_type) == set(found.quantized_ms_by_type) == {"float32", "bfloat16"}
    assert 0 < found.float_ms < spent_ms and 0 < found.quantized_ms < spent_ms
    assert found.predicted_ms == pytest.approx(table.plan_ms(plan.weight_bits_L, plan.act_bits_TL))
    assert found.quantized_bytes == plan.weight_bytes, "resident bytes are the plan's prediction to the byte"
    assert found.layer_bytes_share < 0.32 and found.float_bytes == bundle.float_bytes


def test_an_image_is_timed_alone_only_beside_a_prediction_for_this_machine(bundle, monkeypatch):
    steps, quant = 2, QuantConfig()
    sigma_T = bundle.integrator(steps).sigma_T1[:-1].tolist()
    plan = pipeline.uniform_plan(bundle, quant, sigma_T, 4, 4)
    quantized = build(bundle, round_bank(bundle, quant, (4, 8)), plan)
    assert bench.solo_timing(bundle, quantized, steps, 0.1) is None, "the plan predicts no time"

    def planned(target):
        return dataclasses.replace(quantized, plan=plan.model_copy(update={"latency_ms": 7.0, "latency_target": target}))
    assert bench.solo_timing(bundle, planned("NVIDIA A100 (modelled)"), steps, 0.1) is None, "of another machine"
    here = planned(f"{latency.THIS_MACHINE} (measured): a processor")
    assert bench.solo_timing(bundle, here, steps + 1, 0.1) is None and bench.solo_timing(bundle, here, steps, 60.0) is None
    monkeypatch.setattr(latency, "reference", lambda *_: None)
    found = bench.solo_timing(bundle, here, steps, 0.1)
    assert found.predicted_ms == 7.0 and found.float_ms > 0 and found.quantized_ms > 0 and found.slower == 1
    monkeypatch.setattr(latency, "reference", lambda *_: (lambda: time.sleep(0.002), 1000.0))
    assert bench.solo_timing(bundle, here, steps, 0.1).slower >= 2, "the machine takes twice as long as when its table was measured"
