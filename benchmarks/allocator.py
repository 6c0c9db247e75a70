"""What the C library does with memory that is freed."""

from __future__ import annotations

import contextlib
import ctypes

# Of malloc.h: when to shrink the heap, and how many blocks may lie outside it.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep memory that is freed for what it allocates next, where it is glibc's.

    Without it the activations of every training step come from the system anew, page by page, which
    takes as long as computing them where pages are dear, as in many virtual machines.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """Let the C library give back to the system what it keeps for later."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
