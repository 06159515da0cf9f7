"""Where figures come from: the command, the commit, the machine and the versions, as Markdown lines under every table."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch

from workbench import latency

PLACES = {"--run", "--out", "--json"}  # arguments that say where things are kept, not what is measured


def provenance(script: str, argv: Sequence[str], bundle=None, *more: str) -> list[str]:
    """`script` is the file's name in benchmarks/; `more` are lines of facts of its own."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()
    model = [f"- model {bundle.name}, transformer {bundle.model_hash}, {bundle.parameters:,} parameters, {bundle.float_type}, "
             f"device {bundle.device}"] if bundle else []
    return ["## Provenance", "", f"- `python benchmarks/{script} {_asked(argv)}".rstrip() + f"`, commit {commit or 'unknown'}, "
            f"{time.strftime('%Y-%m-%d')}", *model,
            f"- {latency.cpu_name()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; "
            f"torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}",
            *(f"- {line}" for line in more), ""]


def _asked(argv: Sequence[str]) -> str:
    return " ".join(part for before, part in zip(("", *argv), argv) if not PLACES & {part, before})
