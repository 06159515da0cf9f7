"""Kernels beside torch's own products, in one run: `python benchmarks/kernels.py [--json OUT] [--rounds N] [--small]`.

Per shape, in turns and as medians: torch._int_mm alone, torch BF16 and FP32, activation quantization alone (with and without the
rotation), and whole quantized layers W8A8 per channel and W4A8 in groups of 64, activation quantization included, with and without the
rotation, and W4A16. A sum in place of N: layers that read one input, in one call, as the model runs them. Then what kept memory
and spinning threads bring to a step of the embedded model. Prints Markdown; asserts nothing.
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
from workbench.latency import interleaved_timing  # noqa: E402

SINGLE = (256, 256, 256, 1024)  # q, k, v and the MLP of a single block
EMBEDDED = [(m, k, widths) for m in (80, 640)
            for k, widths in ((256, (256,)), (256, (1024,)), (1024, (256,)), (1280, (256,)), (256, SINGLE))]
FLUX = [(1024, 3072, (3072,)), (1024, 3072, (12288,))]
PROCESSES = 3
LAYERS = ("W8A8", "W4A8 g64", "W8A8 rotated", "W4A8 g64 rotated")
COLUMNS = ("int_mm", "bf16", "fp32", "quantize", "rotate + quantize", *LAYERS, "W4A16 g64")
RATIOS = [(of, layer) for of in ("int_mm", "bf16") for layer in LAYERS]


def weight(k_in: int, n_out: int, bits: int, group_size: int):
    """A packed weight of noise."""
    codes_NK = torch.randint(0, 1 << bits, (n_out, k_in), dtype=torch.uint8)
    return pack(codes_NK, bits), torch.rand(n_out, -(-k_in // (group_size or k_in))).add(0.01).half(), None, bits, group_size


def runs_of(m: int, k: int, widths: tuple[int, ...]) -> dict:
    """Everything that is timed at a shape: torch's products of all N features, and our layers in one call."""
    n = sum(widths)
    x, w = torch.randn(m, k), torch.randn(n, k)
    x16, w16 = x.bfloat16(), w.bfloat16()
    left, right = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((m, k), (n, k)))
    signs = torch.sign(torch.randn(k))
    none, epilogue, four = (None,) * len(widths), (None, None, None, False), weight(k, n, 4, 64)

    def quantized(rotation, bits, group_size):
        packed, scale, zero, _, _ = zip(*(weight(k, each, bits, group_size) for each in widths))
        stored = (packed, scale, zero, (bits,) * len(widths), group_size, none, (False,) * len(widths))
        fused = ops.fused_linears(x16, *rotation, 0, *stored, k)
        act_bits, rest = (8,) * len(widths), (None, None, 1.0, False)
        return lambda: (fused and fused((x16,), act_bits, *rest)) or ops.quant_linears((x16,), *rotation, act_bits, 0, *stored, *rest)
    plain, rotated = (None, 1), (signs, 256)
    return {"int_mm": lambda: torch._int_mm(left, right.t()), "bf16": lambda: torch.nn.functional.linear(x16, w16),
            "fp32": lambda: torch.nn.functional.linear(x, w), "quantize": lambda: ops.act_quant(x16, None, 1, 8, 0),
            "rotate + quantize": lambda: ops.act_quant(x16, signs, 256, 8, 0),
            "W8A8": quantized(plain, 8, 0), "W4A8 g64": quantized(plain, 4, 64), "W8A8 rotated": quantized(rotated, 8, 0),
            "W4A8 g64 rotated": quantized(rotated, 4, 64),
            "W4A16 g64": lambda: ops.linear_wna16(x16, *four, *epilogue)}


def step_ms(samples: int) -> float:
    """Milliseconds of a step of the embedded model in float32."""
    bundle = pipeline.load()
    predict = bundle.predictor(bundle.integrator(20), bundle.encode(bundle.prompts("showcase")[:samples]))
    latent = bundle.noise(range(samples))
    with torch.no_grad():
        return interleaved_timing({"step": lambda: predict(latent, 10)}, 40, bundle.device)["step"] / 1000


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
    for m, k, widths in EMBEDDED + ([] if options.small else FLUX):
        us = interleaved_timing(runs_of(m, k, widths), options.rounds, torch.device("cpu"), calls=20 if m < 1024 else 1)
        ratios = [us[of] / us[layer] for of, layer in RATIOS]
        cells = [f"{us[name]:.0f}" for name in COLUMNS] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {m} x {k} x {'+'.join(map(str, widths))} | " + " | ".join(cells)
              + " |", flush=True)
        rows.append({"m": m, "k": k, "n": widths, "us": us})
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
