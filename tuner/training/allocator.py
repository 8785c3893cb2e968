"""Memory that tensors gave up stays with the process, so that the next pass need not ask for it again."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_LARGEST = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Stop glibc from handing large blocks back to the system at each free; False where there is no glibc.

    Otherwise every tensor above some megabytes is mapped, zeroed page by page, and unmapped again: on a CPU
    that was a third of an evaluation's time (docs/log.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))
