"""A checkpoint of any method's parts reopens to the same latents, and the sizes stay true to the byte."""

import pytest
import torch

from workbench import costs, export, generate
from workbench.options import QuantConfig, TraceConfig
from workbench.plans import BitChoice, make_plan
from workbench.quant import quantize
from workbench.quant.bank import Calibration
from workbench.replay.trace import record

STEPS, PROMPTS, SEEDS = 2, ("fluent pizza", "noto grinning face"), (0, 1)
RICH = QuantConfig(transform="smooth_hadamard", solver="nearest", hessian="none", weight_grid="asymmetric", branch_bits=1 / 3)
CASES = {"grouped, cached": RICH.model_copy(update={"act_scale": "group", "act_grid": "asymmetric", "modulation": "cached"}),
         "static, group sizes of their own": RICH.model_copy(update={"act_scale": "tensor", "act_clip": 0.9, "branch_bits": 0.0})}


@pytest.mark.parametrize("name", CASES)
def test_what_is_reopened_computes_the_same(bundle, tmp_path, name):
    quant = CASES[name]
    recorded = record(bundle, TraceConfig(prompts=PROMPTS[:1], steps=STEPS))
    sizes_L = [64 if quant.branch_bits else (32, 64, None)[layer.index % 3] for layer in bundle.layers]
    widths_L = [(4, 3, 8, 16)[layer.index % 4] for layer in bundle.layers]
    choices = [costs.sized(BitChoice.of(bits, quant, layer), layer, size) for bits, size, layer in zip(widths_L, sizes_L, bundle.layers)]
    rows = [[(4, 8, 16)[(step + layer.index) % 3] for layer in bundle.layers] for step in range(STEPS)]
    plan = make_plan(layers=bundle.layers, sigma_T=bundle.integrator(STEPS).sigma_T1[:-1].tolist(), act_bits_TL=rows, quant=quant,
                     weight_choice_L=choices, costs=costs.tabulate(bundle, quant, STEPS, sizes_L), model_hash=bundle.model_hash)
    quantized = quantize.quantize(bundle, Calibration(trace=recorded), plan)
    assert quantized.weight_bytes == plan.weight_bytes and quantized.compute(bundle).name in ("kernel", "emulated")
    export.write(bundle, quantized, tmp_path / "checkpoint")
    reopened, again = export.load_quantized(tmp_path / "checkpoint")
    assert again.weight_bytes == quantized.weight_bytes
    before, after = (generate.run(each, PROMPTS, SEEDS, each.integrator(STEPS), quantized=model)
                     for each, model in ((bundle, quantized), (reopened, again)))
    assert torch.equal(before.latent_ST, after.latent_ST)
