"""A fused linear whose parts have widths of their own, through every stage."""

from types import SimpleNamespace
from typing import ClassVar

import torch

from tests.quant.toy import HIDDEN, Toy, ToyBundle, final_latent, method_plan, output, plan_of, record, solve
from workbench import sensitivity
from workbench.models.discover import Rule, Segment
from workbench.options import QuantConfig, SensitivityConfig
from workbench.quant.quantize import build
from workbench.quant.segments import Segments

HALF = HIDDEN // 2


class SplitBundle(ToyBundle):
    """The toy with `up` split by its outputs and `down` by its inputs."""

    rules: ClassVar = (Rule(r"blocks\.\d+\.up", "quantize", segments=lambda _: (
                           Segment(role="first", rows=(0, HALF)), Segment(role="second", rows=(HALF, HIDDEN)))),
                       Rule(r"blocks\.\d+\.down", "quantize", segments=lambda _: (
                           Segment(role="first", columns=(0, HALF)), Segment(role="second", columns=(HALF, HIDDEN)))),
                       *ToyBundle.rules)


def make_split():
    torch.manual_seed(0)
    return SplitBundle(name="split", source="split", pipeline=SimpleNamespace(transformer=Toy()), model_hash="split-model-hash",
                       device=torch.device("cpu"))


def test_at_16_bits_the_parts_are_the_whole_up_to_the_order_of_a_sum():
    bundle, quant = make_split(), QuantConfig(modulation_bits=16)
    trace = record(bundle)
    quantized = build(bundle, solve(bundle, trace, None, quant, (16,)), plan_of(bundle, trace.integrator, quant, 16, 16))
    torch.testing.assert_close(final_latent(quantized, trace), trace.latent_ST[:, -1], rtol=1e-4, atol=1e-5)
    assert quantized.weight_bytes == bundle.float_bytes
    places = [name for name, module in quantized.modules["transformer"].named_modules() if isinstance(module, Segments)]
    assert places == [f"blocks.{i}.{role}" for i in range(2) for role in ("up", "down")]


def test_each_part_has_its_own_width_and_row_of_the_map():
    bundle, quant = make_split(), QuantConfig(group_size=None)
    trace = record(bundle)
    smap = sensitivity.profile(bundle, trace, SensitivityConfig(probes=1), quant)
    parts = [layer for layer in bundle.layers if layer.linear]
    assert len(parts) == 8 and bool((smap.fisher_TL[:, [layer.index for layer in parts]] > 0).all())
    bank = solve(bundle, trace, smap.alpha_TL, quant, (2, 4, 8))
    usual = [8 if not layer.has_act_bits else 4 for layer in bundle.layers]
    errors = {}
    for name in ("blocks.1.up.first", "blocks.1.up.second", "blocks.1.down.first", "blocks.1.down.second"):
        widths = [2 if layer.name == name else bits for layer, bits in zip(bundle.layers, usual)]
        plan = method_plan(bundle, trace.integrator, quant, widths, 8)
        quantized = build(bundle, bank, plan)
        assert quantized.weight_bytes == plan.weight_bytes
        errors[name] = float((output(quantized, trace) - output(bundle, trace)).square().sum())
    even = build(bundle, bank, method_plan(bundle, trace.integrator, quant, usual, 8))
    least = float((output(even, trace) - output(bundle, trace)).square().sum())
    assert len(set(errors.values())) == 4 and min(errors.values()) > least


def test_fisher_of_rows_adds_up_to_that_of_the_whole_linear():
    whole, split = ToyBundle, make_split()
    torch.manual_seed(0)
    bundle = whole(name="toy", source="toy", pipeline=SimpleNamespace(transformer=Toy()), model_hash="split-model-hash",
                   device=torch.device("cpu"))
    trace, config, quant = record(bundle), SensitivityConfig(probes=1), QuantConfig(transform="none")
    of_whole, of_parts = (sensitivity.profile(each, trace, config, quant) for each in (bundle, split))
    index = {layer.name: layer.index for layer in bundle.layers}
    part = {layer.name: layer.index for layer in split.layers}
    for block in range(2):
        rows = [part[f"blocks.{block}.up.{role}"] for role in ("first", "second")]
        torch.testing.assert_close(of_parts.fisher_TL[:, rows].sum(1), of_whole.fisher_TL[:, index[f"blocks.{block}.up"]])
        columns = [part[f"blocks.{block}.down.{role}"] for role in ("first", "second")]
        for each in columns:  # both parts write the whole output
            torch.testing.assert_close(of_parts.fisher_TL[:, each], of_whole.fisher_TL[:, index[f"blocks.{block}.down"]])
