"""Paths, constants and process set-up shared by the build scripts of emoji-flux."""

import ctypes
import json
import os
from pathlib import Path

BUILD_FOLDER = Path(__file__).resolve().parent
CACHE_FOLDER = BUILD_FOLDER / "cache"
MODEL_FOLDER = BUILD_FOLDER.parent / "models" / "emoji-flux"
PROMPTS_FILE = BUILD_FOLDER.parent / "prompts" / "emoji-flux.json"
GENERAL_PROMPTS_FILE = BUILD_FOLDER.parent / "prompts" / "general.json"

STYLES = ("fluent", "noto", "twemoji")
IMAGE_PX = 128
MAX_TOKENS = 16


def prepare_process() -> None:
    """Keep freed memory in the process and use as many threads as the process may use cores (`taskset` limits them).

    glibc maps and unmaps every large tensor anew by default, which costs more than the arithmetic here.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_mmap_threshold, m_trim_threshold = -3, -1
        libc.mallopt(m_mmap_threshold, 2**31 - 1)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    except OSError:
        pass  # not glibc: its allocator does not have this fault
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


def write_json(path: Path, value: object) -> None:
    """Write `value` beside `path`, then rename, so that a killed build leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def save_state(path: Path, state: dict) -> None:
    """Write a training state (cache folder only) atomically."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)
