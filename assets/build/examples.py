"""Make the example runs that the app shows before anything has been run: `python assets/build/examples.py [MODEL …]`.

One command for every embedded model, or for those named. To be run again whenever a model's weights change: an example of other
weights is not shown. Takes some minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workbench import examples, latency, model_info, pipeline, tuning
from workbench.options import SearchConfig, SensitivityConfig, TraceConfig

STEPS, PROMPTS, COMPARED = 20, 16, 6


def make(model: str) -> examples.Example:
    started = time.perf_counter()
    bundle = pipeline.load(model)
    trace = TraceConfig(prompts=bundle.prompts("calibration")[:PROMPTS], steps=STEPS)
    found = pipeline.profile(bundle, trace, SensitivityConfig())
    result = pipeline.search(bundle, found, pipeline.default_budget(bundle, found), SearchConfig())
    quantized = pipeline.quantize(bundle, found, result.chosen.plan)
    comparison = pipeline.compare(bundle, quantized, bundle.prompts("showcase")[:COMPARED], 0, STEPS)
    timing = pipeline.solo_timing(bundle, quantized, STEPS, comparison.float_seconds_per_image)
    comparison = dataclasses.replace(comparison, solo_timing=timing)
    layer_inspection = pipeline.inspect(bundle, found.trace, *found.sensitivity.most_fragile, found.quant)
    seconds = time.perf_counter() - started
    made = (f"Example run, made on {datetime.date.today().isoformat()} in {seconds:.0f} s on {latency.cpu_name()}, "
            f"{os.cpu_count()} cores: {STEPS} steps, {PROMPTS} prompts. Its seconds are of that machine.")
    return examples.Example(made=made, seconds=seconds, sensitivity=found.sensitivity, table=found.table, costs=found.costs,
                            quant=found.quant, result=result, comparison=comparison, trace=found.trace, layer_inspection=layer_inspection)


if __name__ == "__main__":
    tuning.tune()
    for name in sys.argv[1:] or model_info.embedded():
        path = examples.save(make(name), name)
        print(f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}: {path.stat().st_size / 1e6:.2f} MB")
