"""Measures a cost table that others may search by: `python benchmarks/latency_table.py NAME --label "AMD EPYC (Zen 4), 2 threads"`.

Writes assets/latency/NAME.json, after which `--target NAME` is offered everywhere: microseconds of every layer shape and choice, and of
a whole image, at the default settings, with the machine, the commit and the versions. A CPU or a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from workbench import tuning  # noqa: E402

tuning.tune()

from lowbit import ops  # noqa: E402
from provenance import provenance  # noqa: E402

from workbench import latency, pipeline  # noqa: E402
from workbench.options import LATENCY_TABLES, QuantConfig  # noqa: E402

DIGITS = 2  # of microseconds that are kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the target: letters, digits and hyphens")
    parser.add_argument("--label", required=True, help="the machine as people call it")
    parser.add_argument("--models", default="emoji-flux", help="names or folders separated by commas (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--times", type=int, default=5, help="measurements, of which the least counts: what else runs only adds time")
    options = parser.parse_args()
    if not options.name.replace("-", "").isalnum():
        parser.error(f"{options.name!r} is no name of a target; use letters, digits and hyphens")
    cells = {}
    for model in options.models.split(","):
        bundle = pipeline.load(model, options.device)
        measured = [latency.measured_cells(bundle, QuantConfig()) for _ in range(options.times)]
        cells |= {key: [min(us) for us in zip(*(found[key] for found in measured))] for key in measured[0]}
    lines = provenance("latency_table.py", [options.name], bundle, ops.backend(bundle.device.type, bundle.dtype).reason)[2:]
    told = "; ".join(line.removeprefix("- ") for line in lines if line)
    LATENCY_TABLES.mkdir(exist_ok=True)
    rounded = {key: [round(us, DIGITS) for us in pair] for key, pair in cells.items()}
    path = LATENCY_TABLES / f"{options.name}.json"
    path.write_text(json.dumps({"label": options.label, "provenance": told, "cells": rounded}, indent=0) + "\n", encoding="utf-8")
    print(f"{len(cells)} cells: {path.name}")


if __name__ == "__main__":
    main()
