"""The README of an exported checkpoint: what it is, what it costs, how to run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

CARD = """---
library_name: adatsq-workbench
pipeline_tag: text-to-image
tags: [quantized, mixed-precision, adatsq]
---

# {name}, quantized by the AdaTSQ Workbench

A quantized copy of `{name}` ({parameters:.1f} M transformer parameters). Method: {method}. Plan `{plan_id}`.

| | bytes of the transformer | bits per parameter |
|---|---|---|
| float (16-bit storage) | {float_bytes:,} | 16.00 |
| this checkpoint | {weight_bytes:,} | {bits:.2f} |

- Weights: {widths}. Adaptive-norm layers {modulation} bits; embedders and the output projection stay float.
- Activations, {act_grid} grid, {act_scale}: {act_mean:.2f} bits in the mean over {steps} steps and {layers} layers
  ({act_macs:.2f} weighted by multiply-accumulates); the plan gives them by step and layer, keyed by noise level.
- Grouping {group}, {weight_grid} grid, transform {transform}, solver {solver}.
{summary}
## Use

```python
from workbench import load_quantized
from workbench.generate import run

bundle, quantized = load_quantized("path/to/this/folder")
images = run(bundle, ["a prompt"], [0], bundle.integrator({steps}), quantized=quantized).images
```

or `adatsq generate path/to/this/folder --prompts prompts.txt --to images`. diffusers alone does not open this folder: the
transformer's layers are packed.

`manifest.json` lists every file with its SHA-256; opening the folder checks them. Nothing here is a pickle.
The licence and attribution of the base model apply (see BASE_MODEL.md where present).
"""


def model_card(bundle, quantized, summary: Mapping[str, str]) -> str:
    """Markdown with a Hub front matter; `summary` adds lines of what was measured."""
    plan = quantized.plan
    counts = sorted(Counter(plan.weight_bits_L).items())
    return CARD.format(
        name=bundle.name, parameters=bundle.parameters / 1e6, method=plan.method, plan_id=plan.plan_id,
        float_bytes=bundle.float_bytes, weight_bytes=quantized.weight_bytes, bits=8 * quantized.weight_bytes / bundle.parameters,
        widths=", ".join(f"{count} layers at {bits} bits" for bits, count in counts), modulation=plan.quant.modulation_bits,
        act_mean=plan.act_bits_mean, act_macs=plan.act_bits_macs, steps=len(plan.sigma_T), layers=len(plan.layer_names),
        group=f"{plan.quant.group_size} weights to a scale" if plan.quant.group_size else "one scale per output channel",
        transform=plan.quant.transform, solver=plan.quant.solver, weight_grid=plan.quant.weight_grid,
        act_grid=plan.quant.act_grid.replace("_", "-"),
        act_scale={"token": "a scale per token", "group": "a scale per group of a token", "tensor": "a static scale"}[plan.quant.act_scale],
        summary="".join(f"- {name}: {value}\n" for name, value in summary.items()))
