"""Let malloc reuse large tensors instead of mapping each anew: several times faster on virtual machines."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEEP_BYTES = 1 << 30


def keep_large_blocks() -> bool:
    """Raise glibc's thresholds, once, before tensors exist. False where there is no glibc, whose allocators need none."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEEP_BYTES) and mallopt(M_TRIM_THRESHOLD, KEEP_BYTES))
