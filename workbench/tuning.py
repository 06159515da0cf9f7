"""Settings of the libraries under torch, each worth more on a small machine than most kernels. Call `tune` before torch is imported.

Memory: glibc maps and unmaps every large tensor anew unless its thresholds are raised.
Threads: a layer of a small model takes a fraction of a millisecond, as long as it takes to wake a sleeping thread. Threads
that spin for a moment before they sleep made a quantized forward (4 images, 80 tokens, width 256) 2.4 times faster on two
cores than threads that sleep at once; endless spinning would steal the cores of whatever else runs.
Teams: GNU OpenMP keeps helpers for every thread that ever computed in parallel, and where there are more of them than cores it lets none
spin, though they do nothing. One image of the embedded model then takes 2 to 2.6 times as long (two cores, Xeon with AVX-512). So only
the thread that runs the jobs computes in parallel.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache

from threadpoolctl import ThreadpoolController

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


def single_threaded() -> AbstractContextManager:
    """In it the calling thread does its tensor operations by itself; other threads do theirs as before."""
    number = getattr(sys.modules.get("torch"), "get_num_threads", None)  # an import would wait for one that is under way
    if number is None:  # nothing can be computed yet
        return nullcontext()
    number()  # torch tells a thread its number when it is first asked, which must not come after the limit
    return _pools().limit(limits=1, user_api="openmp")


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()
