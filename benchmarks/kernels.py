"""Kernels beside torch's own products, in one run: `python benchmarks/kernels.py [--json OUT] [--rounds N] [--small]`.

Per shape, in turns and as medians: torch._int_mm alone, torch BF16 and FP32, activation quantization alone (with and without the
rotation), and whole quantized layers W8A8 per channel and W4A8 in groups of 64, activation quantization included, with and without the
rotation, and W4A16. Then what kept memory and spinning threads bring to a step of the embedded model. Prints Markdown; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from workbench import tuning  # noqa: E402

SETTINGS = {"glibc's memory, threads that sleep": "", "memory kept": "memory", "memory kept, threads that spin": "memory threads"}
chosen = os.environ.get("BENCH_TUNING", "memory threads").split()
if "threads" in chosen:
    tuning.tune()
elif "memory" in chosen:
    tuning.keep_large_blocks()

import torch  # noqa: E402
from lowbit import ops  # noqa: E402
from lowbit.formats import pack  # noqa: E402
from provenance import provenance  # noqa: E402

from workbench import latency, pipeline  # noqa: E402
from workbench.latency import in_turns  # noqa: E402

EMBEDDED = [(m, k, n) for m in (80, 640) for k, n in ((256, 256), (256, 1024), (1024, 256), (1280, 256))]
FLUX = [(1024, 3072, 3072), (1024, 3072, 12288)]
PROCESSES = 3
LAYERS = ("W8A8", "W4A8 g64", "W8A8 rotated", "W4A8 g64 rotated")
COLUMNS = ("int_mm", "bf16", "fp32", "quantize", "rotate + quantize", *LAYERS, "W4A16 g64")
RATIOS = [(of, layer) for of in ("int_mm", "bf16") for layer in LAYERS]


def weight(k_in: int, n_out: int, bits: int, group_size: int):
    """A packed weight of noise."""
    codes_NK = torch.randint(0, 1 << bits, (n_out, k_in), dtype=torch.uint8)
    return pack(codes_NK, bits), torch.rand(n_out, -(-k_in // (group_size or k_in))).add(0.01).half(), None, bits, group_size


def runs_of(m: int, k: int, n: int) -> dict:
    """Everything that is timed at a shape; inputs are made anew as views, so that nothing is remembered between calls."""
    x, w = torch.randn(m, k), torch.randn(n, k)
    x16, w16 = x.bfloat16(), w.bfloat16()
    left, right = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((m, k), (n, k)))
    signs = torch.sign(torch.randn(k))
    eight, four, epilogue = weight(k, n, 8, 0), weight(k, n, 4, 64), (None, None, None, False)

    def quantized(rotation, packed_NP, scale_NG, zero_NG, bits, group_size):
        return ops.quant_linears((x16,), *rotation, (8,), 0, (packed_NP,), (scale_NG,), (zero_NG,), (bits,), group_size, (None,), (False,),
                                 None, None)
    plain, rotated = (None, 1), (signs, 256)
    return {"int_mm": lambda: torch._int_mm(left, right.t()), "bf16": lambda: torch.nn.functional.linear(x16, w16),
            "fp32": lambda: torch.nn.functional.linear(x, w), "quantize": lambda: ops.act_quant(x16, None, 1, 8, 0),
            "rotate + quantize": lambda: ops.act_quant(x16, signs, 256, 8, 0),
            "W8A8": lambda: quantized(plain, *eight), "W4A8 g64": lambda: quantized(plain, *four),
            "W8A8 rotated": lambda: quantized(rotated, *eight), "W4A8 g64 rotated": lambda: quantized(rotated, *four),
            "W4A16 g64": lambda: ops.linear_wna16(x16, *four, *epilogue)}


def step_ms(samples: int) -> float:
    """Milliseconds of a step of the embedded model in float32."""
    bundle = pipeline.load()
    schedule, conditioning = bundle.schedule(20), bundle.encode(bundle.prompts("showcase")[:samples])
    latent_SMD = bundle.initial_latents(range(samples))
    with torch.no_grad():
        return in_turns({"step": lambda: bundle.velocity(latent_SMD, schedule, 10, conditioning)}, 40, bundle.device)["step"] / 1000


def tunings() -> dict[str, dict[str, float]]:
    """Milliseconds of a step for 1 and for 8 images under each setting of memory and threads: medians of processes that take turns."""
    code = "import sys; sys.path.insert(0, '.'); from benchmarks.kernels import step_ms; print(step_ms(1), step_ms(8))"
    found = {label: [] for label in SETTINGS}
    for _ in range(PROCESSES):
        for label, names in SETTINGS.items():
            made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "BENCH_TUNING": names}, capture_output=True,
                                  text=True, check=True)
            found[label].append([float(part) for part in made.stdout.splitlines()[-1].split()])
    return {label: dict(zip(("1 image", "8 images"), map(statistics.median, zip(*each)))) for label, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="the embedded model's shapes only")
    options = parser.parse_args()
    backend = ops.backend()
    machine = ", ".join((latency.cpu_name(), f"{os.cpu_count()} cores, {torch.get_num_threads()} threads", f"torch {torch.__version__}",
                         backend.reason))
    print("# Kernels beside torch's own products\n")
    print(f"{machine}; microseconds, medians of {options.rounds} turns; layers quantize their input, ratios say how many "
          "times as fast they are.\n")
    print("| M x K x N | " + " | ".join((*COLUMNS, *(f"{layer} : {of}" for of, layer in RATIOS))) + " |")
    print("|---" * (1 + len(COLUMNS) + len(RATIOS)) + "|")
    rows = []
    for m, k, n in EMBEDDED + ([] if options.small else FLUX):
        us = in_turns(runs_of(m, k, n), options.rounds, torch.device("cpu"), calls=20 if m < 1024 else 1)
        ratios = [us[of] / us[layer] for of, layer in RATIOS]
        print(f"| {m} x {k} x {n} | " + " | ".join(f"{us[name]:.0f}" for name in COLUMNS) + " | " + " | ".join(f"{r:.2f}" for r in ratios)
              + " |", flush=True)
        rows.append({"m": m, "k": k, "n": n, "us": us})
    settings = tunings()
    print(f"\nA step of the embedded model, float32, ms (medians of {PROCESSES} processes each, in turns):\n")
    print("| | 1 image | 8 images |\n|---|---|---|")
    for label, each in settings.items():
        print(f"| {label} | " + " | ".join(f"{value:.1f}" for value in each.values()) + " |")
    print("\n" + "\n".join(provenance("kernels.py", sys.argv[1:], None, backend.reason)))
    if options.json:
        found = {"machine": machine, "layers": rows, "settings_ms": settings}
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
