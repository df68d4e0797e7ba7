"""The settings of the C library's memory allocator."""

import ctypes

# Parameters of mallopt in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1  # bytes; the largest value that mallopt takes


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, and use it again, instead of returning it to the system.

    By default glibc returns large blocks at once, so that each tensor of a training step causes page faults again. On a
    C library without `mallopt`, this function does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _NEVER)
        mallopt(_TRIM_THRESHOLD, _NEVER)
