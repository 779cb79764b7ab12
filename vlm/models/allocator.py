"""Memory between steps on a CPU: kept for the next one instead of given back to the kernel."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep what tensors on the CPU free, and hand it to those of the next step.

    By default glibc maps every large tensor anew and unmaps it when freed, so each step meets pages the kernel has to
    clear first, up to a third of its time. False, and nothing is changed, where the environment sets the allocator
    already (MALLOC_*, GLIBC_TUNABLES) and where the C library is not glibc.

    Source: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_MAX.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([bool(mallopt(_MMAP_MAX, 0)), bool(mallopt(_TRIM_THRESHOLD, _LARGEST))])
