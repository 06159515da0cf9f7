"""Time a Flux of width 1024 with random weights: `python benchmarks/wide_flux.py [--json OUT] [--rounds N] [--steps N]`.

Two double and four single blocks, 16 heads of 64, 256 image and 16 text tokens: large enough that products, not calls, take the
time. Speed does not depend on what weights are worth. The folder is made of the embedded model's other parts, in a temporary place.
Prints what `python -m workbench bench` prints; asserts nothing.
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

from workbench import families, pipeline  # noqa: E402
from workbench.options import BenchConfig, ModelSpec, QuantConfig  # noqa: E402

WIDE = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 16, "attention_head_dim": 64}
IMAGE_PX = 256  # 256 image tokens


def make(folder: str) -> None:
    """A pipeline folder like emoji-flux's with a wide, untrained transformer."""
    whole = FluxPipeline.from_pretrained(families.EMBEDDED["emoji-flux"], torch_dtype=torch.float32, local_files_only=True)
    torch.manual_seed(0)
    whole.transformer = FluxTransformer2DModel.from_config({**whole.transformer.config, **WIDE})
    whole.vae.register_to_config(sample_size=IMAGE_PX)
    whole.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--weight-bits", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(folder)
        bundle = families.load(ModelSpec(source=folder))
    plan = pipeline.uniform_plan(bundle, QuantConfig(), bundle.schedule(options.steps).sigma_T1[:-1].tolist(), options.weight_bits, 4)
    found = pipeline.bench(bundle, plan, BenchConfig(rounds=options.rounds))
    model = found["model"]
    print(f"{found['device']}; {bundle.parameters / 1e6:.0f} M parameters, {options.steps} steps, medians of {options.rounds} turns")
    print(f"float {model['float_ms']:.0f} ms ({model['float_type']}), quantized {model['quantized_ms']:.0f} ms "
          f"({model['quantized_type']}): {model['float_ms'] / model['quantized_ms']:.2f} times faster; "
          f"predicted {model['predicted_ms']:.0f} ms; layers take {model['layer_bytes_share']:.3f} of their 16-bit bytes")
    for peer in found["peers"]:
        print(f"{peer['name']} {peer['version'] or ''}: " + (f"{peer['model_ms']:.0f} ms" if peer["model_ms"] else peer["reason"]))
    print("\n" + "\n".join(provenance("wide_flux.py", sys.argv[1:], None, found["kernels"])))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
