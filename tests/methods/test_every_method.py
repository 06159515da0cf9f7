"""Every method's settings through all verbs: profile, search, build, export, load. A plan that is searched can be built."""

import pytest
import torch

from workbench import generate, pipeline
from workbench.methods import METHODS
from workbench.options import Budget, SearchConfig, TraceConfig

STEPS, PROMPTS = 2, ("fluent pizza",)
QUICK = SearchConfig(beam=1, samples=1, refine=0, rivals="uniform", finalists=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_what_is_searched_is_built_exported_and_reopened(bundle, tmp_path, name):
    quant = METHODS[name].quant
    found = pipeline.profile(bundle, TraceConfig(prompts=PROMPTS, steps=STEPS), quant=quant, target="a100")
    limit = pipeline.uniform_plan(bundle, quant, pipeline.sigma_of(found.trace), 6, 16).weight_bytes
    result = pipeline.search(bundle, found, Budget(max_weight_bytes=limit, max_mean_act_bits=6), QUICK)
    plan = result.chosen.plan
    assert all(choice.symmetric == (quant.weight_grid != "asymmetric") for choice, layer in zip(plan.weight_choice_L, bundle.layers)
               if layer.has_act_bits)
    quantized = pipeline.quantize(bundle, found, plan)
    assert quantized.weight_bytes == plan.weight_bytes <= limit
    pipeline.export(bundle, quantized, tmp_path / "checkpoint")
    reopened, again = pipeline.load_quantized(tmp_path / "checkpoint")
    before, after = (generate.run(each, PROMPTS, (1,), each.integrator(STEPS), quantized=model).latent_ST
                     for each, model in ((bundle, quantized), (reopened, again)))
    assert torch.equal(before, after) and again.weight_bytes == plan.weight_bytes
