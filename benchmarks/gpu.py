"""Checks the Triton kernels on a GPU and measures them: single layers, then whole steps of a full-size Flux.

    python benchmarks/gpu.py --json gpu.json                      about 8 minutes on an H100 (estimated)
    python benchmarks/gpu.py --json gpu.json --sections model     one section again; the others' results in the file are kept
    python benchmarks/gpu.py --dry-run                            tiny shapes, interpreted on the CPU: no figure means anything

A section, layer or plan that cannot run says why, and the rest goes on. Nothing is compiled with torch.compile, except where a
row says so. Every figure is a median.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("check", "layers", "model")
DRY_CASES = "halves or leading_dimensions"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="of %(default)s, with commas")
    parser.add_argument("--models", default="flux,z-image,wan-1.3b", help="whose layers to measure: of %(default)s")
    parser.add_argument("--plans", default="bf16,w8a8,w4a8,w4a8-g128,mixed", help="of the whole model: of %(default)s")
    parser.add_argument("--json", type=Path, help="file for all figures; results of other sections in it are kept")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to find mistakes")
    chosen = parser.parse_args()
    if chosen.dry_run and chosen.plans == parser.get_default("plans"):
        chosen.plans = "bf16,w8a8,mixed"
    unknown = set(chosen.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return chosen


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device) -> dict:
    """What the figures were measured on."""
    import torch

    found = {"date": datetime.date.today().isoformat(), "device": "CPU (dry run)", "driver": None, "cuda": torch.version.cuda}
    if device.type == "cuda":
        query = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
        found |= {"device": torch.cuda.get_device_name(), "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
                  "memory_bytes": torch.cuda.get_device_properties(0).total_memory, "driver": query.stdout.split("\n")[0] or None}
    return found | {package: version(package) for package in ("torch", "triton", "torchao", "diffusers")}


def check(chosen: argparse.Namespace, device) -> list[dict]:
    """The cases of the tests, on the device, in several processes: compiling the kernels for all their types takes longest."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True,
               "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    shares = [["tests/kernels/triton_cases.py", "-k", DRY_CASES]]
    if not chosen.dry_run:
        listed = subprocess.run([*pytest, "--collect-only", "tests/kernels/triton_cases.py"], **options).stdout
        cases = [line for line in listed.splitlines() if "::" in line]
        count = max(min((os.cpu_count() or 2) // 2, 8), 1)
        shares = [cases[i::count] for i in range(count)] if cases else [["tests/kernels/triton_cases.py"]]
    running = [subprocess.Popen([*pytest, *share], **options) for share in shares if share]
    rows = []
    for process in running:
        lines = process.communicate()[0].strip().splitlines() or ["no output"]
        print("\n".join(lines[-40:] if process.returncode else lines[-1:]), flush=True)
        rows.append({"passed": process.returncode == 0, "summary": lines[-1]})
    return rows


def layers(chosen: argparse.Namespace, device) -> list[dict]:
    """Rates of single layers."""
    import gpu_layers

    rows = []
    print(f"{'layer':38} {'way':28} {'us':>10} {'TFLOP/s':>9} {'x bf16':>7} {'error':>7}")
    for shape in gpu_layers.TINY if chosen.dry_run else [s for s in gpu_layers.SHAPES if s.model in chosen.models.split(",")]:
        title = f"{shape.model} {shape.layer} {shape.m}x{shape.n}x{shape.k}"
        for row in gpu_layers.measure(shape, device):
            rows.append(row)
            figures = (f"{row['us']:10.1f} {row['tflops']:9.1f} {row['speedup']:7.2f} {row.get('relative_error', 0):7.4f}"
                       if "us" in row else f"skipped: {row['skipped']}")
            print(f"{title:38} {row['way']:28} {figures}", flush=True)
    return rows


def model(chosen: argparse.Namespace, device) -> list[dict]:
    """Steps of the whole transformer."""
    import gpu_model
    import torch

    rows, float_row, float_output = [], {}, None
    titles = (("ms/step", 9), ("x bf16", 7), ("as graph", 9), ("x bf16", 7), ("peak GB", 8), ("of bf16", 8), ("resident GB", 11),
              ("error", 7))
    print(f"{'plan':10} " + " ".join(f"{title:>{width}}" for title, width in titles))
    for name in chosen.plans.split(","):
        try:
            row, output = gpu_model.measure(name, device, dry_run=chosen.dry_run)
        except Exception as error:  # the next plan may fit where this one did not
            rows.append({"plan": name, "skipped": f"{type(error).__name__}: {error}"})
            print(f"{name:10} skipped: {rows[-1]['skipped']}", flush=True)
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if name == "bf16":
            float_row, float_output = row, output
        if float_output is not None:  # the same weights and inputs: how far quantization and kernels are from them
            row["relative_error"] = float((output - float_output).norm() / float_output.norm())
        rows.append(row)
        print(table_line(row, float_row), flush=True)
    return rows


def table_line(row: dict, float_row: dict) -> str:
    """One plan's figures, and their ratios to the float model's where that was measured too."""
    def ratio(key: str, width: int, inverse: bool = False) -> str:
        pair = (float_row.get(key), row[key]) if inverse else (row[key], float_row.get(key))
        return f"{pair[0] / pair[1]:{width}.3f}" if all(isinstance(each, int | float) for each in pair) else " " * width

    graph = f"{row['graph_ms']:9.1f}" if isinstance(row["graph_ms"], float) else f"{'no':>9}"
    peak = f"{row['peak_bytes'] / 1e9:8.2f}" if row["peak_bytes"] else " " * 8
    return (f"{row['plan']:10} {row['step_ms']:9.1f} {ratio('step_ms', 7, True)} {graph} {ratio('graph_ms', 7, True)} {peak} "
            f"{ratio('peak_bytes', 8)} {row['resident_bytes'] / 1e9:11.4f} {row.get('relative_error', float('nan')):7.4f}"
            + ("" if row["finite"] else "  output not finite") + (f"  {row['graph_ms']}" if isinstance(row["graph_ms"], str) else ""))


def main() -> int:
    chosen = arguments()
    if chosen.dry_run and importlib.util.find_spec("triton"):
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    sys.path.insert(0, str(ROOT))
    import torch

    import workbench  # noqa: F401  (registers lowbit)

    if not chosen.dry_run and not torch.cuda.is_available():
        print("no CUDA device; --dry-run runs everything on tiny shapes on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if chosen.dry_run else "cuda")
    kept = json.loads(chosen.json.read_text()) if chosen.json and chosen.json.exists() else {}
    for name in chosen.sections.split(","):
        print(f"\n== {name} ==", flush=True)
        try:
            result = {"rows": {"check": check, "layers": layers, "model": model}[name](chosen, device)}
        except Exception as error:  # the other sections still run
            result = {"skipped": f"{type(error).__name__}: {error}"}
            print(f"skipped: {result['skipped']}")
        kept[name] = result | {"machine": machine(device), "dry_run": chosen.dry_run}
        if chosen.json:
            chosen.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
