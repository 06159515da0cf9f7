"""Whole images, float, quantized and by other libraries: `python benchmarks/images.py [--json OUT] [--rounds N] [--models NAMES]`.

What `python -m workbench bench` measures, for the embedded model and for a Flux of width 1024 with random weights (two double and
four single blocks, 16 heads of 64, 256 image and 16 text tokens: large enough that products, not calls, take the time; speed does
not depend on what weights are worth). Prints Markdown; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from workbench import tuning  # noqa: E402

tuning.tune()

import torch  # noqa: E402
from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: E402
from provenance import provenance  # noqa: E402

from workbench import pipeline  # noqa: E402
from workbench.models import Bundle, sources  # noqa: E402
from workbench.options import BenchConfig, ModelSpec, QuantConfig  # noqa: E402

WIDE = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 16, "attention_head_dim": 64}
IMAGE_PX = 256  # 256 image tokens
STEPS = {"emoji-flux": 20, "wide-flux": 4}
PLAN_BITS = (4, 4)  # of weights, of activations


def make(name: str) -> Bundle:
    """The embedded model, or a pipeline like it with a wide, untrained transformer."""
    if name == "emoji-flux":
        return pipeline.load(name)
    whole = FluxPipeline.from_pretrained(sources.EMBEDDED["emoji-flux"], torch_dtype=torch.float32, local_files_only=True)
    torch.manual_seed(0)
    whole.transformer = FluxTransformer2DModel.from_config({**whole.transformer.config, **WIDE})
    whole.vae.register_to_config(sample_size=IMAGE_PX)
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        return sources.load(ModelSpec(source=folder))


def measure(name: str, rounds: int) -> dict:
    """The JSON object of `bench`, with `parameters` and `steps`."""
    bundle = make(name)
    plan = pipeline.uniform_plan(bundle, QuantConfig(), bundle.integrator(STEPS[name]).sigma_T1[:-1].tolist(), *PLAN_BITS)
    return {"parameters": bundle.parameters, "steps": STEPS[name]} | pipeline.bench(bundle, plan, BenchConfig(rounds=rounds))


def whole_table(name: str, found: dict) -> list[str]:
    """Milliseconds and bytes of the model and of other libraries."""
    model, mb = found["model"], 1e6
    floats = [(f"float, {kind}", ms, model["float_bytes"] if kind == "bfloat16" else None)
              for kind, ms in model["float_ms_by_type"].items()]
    ours = [(f"W{PLAN_BITS[0]}A{PLAN_BITS[1]} g64, float parts in {kind}", ms, model["quantized_bytes"])
            for kind, ms in model["quantized_ms_by_type"].items()]
    predicted = (f"the same, predicted by the cost table in {model['predicted_type']}", model["predicted_ms"], model["quantized_bytes"])
    others = [(" ".join(filter(None, (each["name"], each["version"]))), each["model_ms"], each["bytes"]) for each in found["baselines"]]
    missing = [f"Not timed: {each['name']}: {each['reason']}." for each in found["baselines"] if not each["model_ms"]]
    rows = [f"| {label} | {ms:.1f} | {model['float_ms'] / ms:.2f} | {'' if size is None else f'{size / mb:.2f}'} |"
            for label, ms, size in (*floats, *ours, predicted, *others) if ms]
    peak = "not known here" if model["peak_process_bytes"] is None else f"{model['peak_process_bytes'] / mb:.0f} MB"
    return [f"## {name}: {found['parameters'] / 1e6:.0f} M parameters, {found['steps']} steps", "",
            "| | ms an image | times as fast as the faster float | MB of tensors |", "|---|---:|---:|---:|", *rows, "", *missing,
            f"The quantized layers take {model['layer_bytes_share']:.3f} of their 16-bit bytes; peak memory of the process with float "
            f"model, quantized model and all libraries: {peak}.", ""]


def layer_table(found: dict) -> list[str]:
    """Microseconds of every layer shape and choice."""
    rows = [f"| {layer['m']} x {layer['n']} x {layer['k']} | {layer['choice']} | {layer['us']:.0f} | {layer['float_us']:.0f} | "
            f"{layer['speedup']:.2f} |" for layer in found["layers"]]
    return ["| M x N x K | choice | us | fastest float, us | times faster |", "|---|---|---:|---:|---:|", *rows, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", default=",".join(STEPS), help="names separated by commas (default: %(default)s)")
    options = parser.parse_args()
    unknown = set(options.models.split(",")) - set(STEPS)
    if unknown:
        parser.error(f"no model {', '.join(sorted(unknown))}; choose from {', '.join(STEPS)}")
    results = {name: measure(name, options.rounds) for name in options.models.split(",")}
    print("# Images: float, quantized, predicted, and other libraries\n")
    print(f"All transformer calls of one image, timed in turns in one run, medians of {options.rounds}. Float and quantized run the same "
          "lean forward;\ntorchao and optimum-quanto are given it too (the float type that is faster for them), ONNX Runtime runs "
          "diffusers' own forward without Python.\n")
    for name, found in results.items():
        print("\n".join((*whole_table(name, found), *layer_table(found))))
    kernels = next(iter(results.values()))["kernels"]
    print("\n".join(provenance("images.py", sys.argv[1:], None, kernels)))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
