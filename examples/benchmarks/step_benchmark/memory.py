"""Memory of this process, as the system counts it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from pathlib import Path

MIB = 2**20

AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Environment in which glibc hands freed tensors back at once, so that resident memory is what is in use now."""


def release_memory() -> None:
    """Hand what is free back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such function outside glibc
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Make the process's peak memory start again from what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(name: str) -> float:
    """Return ``VmRSS`` or ``VmHWM`` of this process in MiB; nan without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith(name)), math.nan)
