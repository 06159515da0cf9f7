"""Two settings of the libraries under torch, each worth more on a small machine than most kernels. Call `tune` before torch
is imported.

Memory: glibc maps and unmaps every large tensor anew unless its thresholds are raised.
Threads: a layer of a small model takes a fraction of a millisecond, as long as it takes to wake a sleeping thread. Threads
that spin for a moment before they sleep made a quantized forward (4 images, 80 tokens, width 256) 2.4 times faster on two
cores than threads that sleep at once; endless spinning would steal the cores of whatever else runs.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEEP_BYTES = 1 << 30
SPIN_ROUNDS = "50000"  # of GNU OpenMP: some tenths of a millisecond


def tune() -> None:
    """Both settings; what the environment already says wins."""
    keep_large_blocks()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_ROUNDS)


def keep_large_blocks() -> bool:
    """Raise glibc's thresholds, once, before tensors exist. False where there is no glibc, whose allocators need none."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEEP_BYTES) and mallopt(M_TRIM_THRESHOLD, KEEP_BYTES))
