"""What becomes of main memory that a program has freed: it goes back to the system, or stays for the next tensor.

The GNU C library gives large blocks back at once. A step of training then asks the system for the same memory that the
step before gave back, and the system hands it out page by page, each filled with zeros first.
"""

import ctypes
import functools
import os
import platform

# Parameters of mallopt(3): in malloc.h of the GNU C library.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**30
# What the library itself comes to in a program that frees large blocks: it adapts its first values, up to these.
_ADAPTED = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

_kept, _limit = False, _NEVER


def keep_freed(wanted: bool) -> None:
    """Have blocks below one gigabyte stay in this process when they are freed, or, not ``wanted``, go back; at once.

    Older libraries keep smaller ones alone, see :func:`limit`. Does nothing where :func:`obstacle` finds one.
    """
    global _kept, _limit
    if wanted == _kept or obstacle():
        return
    _kept, adapted = wanted, _ADAPTED[_MMAP_THRESHOLD]
    sizes = (_NEVER, adapted) if wanted else (adapted,)
    accepted = next((size for size in sizes if _library().mallopt(_MMAP_THRESHOLD, size)), 0)
    if wanted:
        _limit = accepted
    if accepted:
        # Never alone: the other one would stay as small as it is.
        _library().mallopt(_TRIM_THRESHOLD, _NEVER if wanted else _ADAPTED[_TRIM_THRESHOLD])
    if not wanted:
        _library().malloc_trim(0)


def limit() -> str | None:
    """What of freed memory cannot be kept, beside blocks of a gigabyte; known once it was to be kept."""
    return None if _limit == _NEVER else f"blocks of {_limit // 2**20} MiB and more, which the C library gives back"


@functools.cache
def obstacle() -> str | None:
    """Why freed memory cannot be kept."""
    if platform.libc_ver()[0] != "glibc":
        return "only known of the GNU C library"
    if found := [name for name in _ENVIRONMENT if name in os.environ]:
        return f"the environment variable {found[0]} says how memory is freed"
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
