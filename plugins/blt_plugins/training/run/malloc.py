"""How the process keeps memory between steps."""

from __future__ import annotations

import ctypes
import sys

#: Names of mallopt(3) in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tell glibc not to return freed memory to the OS; returns whether it worked.

    Every step allocates the same amount again. Otherwise each large tensor is mapped again, and
    touching its pages for the first time takes longer than most of the arithmetic on it. Other
    allocators are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, 2**31 - 1) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
