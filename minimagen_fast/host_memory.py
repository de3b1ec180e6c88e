"""What becomes of main memory that a program has freed: it goes back to the system, or stays for the next tensor.

The GNU C library gives large blocks back at once. A step of training then asks the system for the same memory that the
step before gave back, and the system hands it out page by page, each filled with zeros first. What stays is laid out in
huge pages where the system has them for programs that ask, so that the processor looks up fewer addresses.
"""

import ctypes
import functools
import os
import platform
from pathlib import Path

# Parameters of mallopt(3): in malloc.h of the GNU C library.
_SMALL_APART, _TRIM_THRESHOLD, _MMAP_THRESHOLD = 1, -1, -3
_NEVER = 2**30
# What the library itself comes to in a program that frees large blocks: it adapts its first values, up to these.
_ADAPTED = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
# Up to so many bytes the library leaves freed blocks apart from their neighbours, for the next of the same size, until
# it looks for a large one: then it goes through all of them, some hundred times in a step of training.
_SMALL = 64 * ctypes.sizeof(ctypes.c_size_t) // 4
_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
# For madvise(2): in mman.h of Linux.
_MADV_HUGEPAGE = 14
# So many addresses the library takes at a time; they cost no memory before something is written there.
_AHEAD = 2**29

_kept, _limit = False, _NEVER
# The end of what is laid out in huge pages.
_huge_until = 0


def keep_freed(wanted: bool) -> None:
    """Have blocks below one gigabyte stay in this process when they are freed, or, not ``wanted``, go back; at once.

    Older libraries keep smaller ones alone, see :func:`limit`. Does nothing where :func:`obstacle` finds one. Where
    the process has taken more since the last call, what it takes next will lie in huge pages, too.
    """
    global _kept, _limit, _huge_until
    if obstacle():
        return
    if wanted == _kept:
        if wanted:
            _use_huge_pages()
        return
    _kept, adapted = wanted, _ADAPTED[_MMAP_THRESHOLD]
    sizes = (_NEVER, adapted) if wanted else (adapted,)
    accepted = next((size for size in sizes if _library().mallopt(_MMAP_THRESHOLD, size)), 0)
    if wanted:
        _limit = accepted
    if accepted:
        # Never alone: the other one would stay as small as it is.
        _library().mallopt(_TRIM_THRESHOLD, _NEVER if wanted else _ADAPTED[_TRIM_THRESHOLD])
    _library().mallopt(_SMALL_APART, 0 if wanted else _SMALL)
    if wanted:
        _use_huge_pages()
    else:
        _library().malloc_trim(0)
        _huge_until = 0  # the end may lie before it now


def _use_huge_pages() -> None:
    """Have what the library takes from the system next lie in huge pages; nothing if what was so before still lasts."""
    global _huge_until
    size, library = _huge_page_bytes(), _library()
    if not size or (begin := library.sbrk(0)) <= _huge_until:
        return
    # It keeps them for later, unless the block lies elsewhere: that of another thread, or where it keeps no large ones.
    library.free(library.malloc(_AHEAD))
    _huge_until = library.sbrk(0)
    begin, end = -(-begin // size) * size, _huge_until // size * size
    if begin < end:
        library.madvise(begin, end - begin, _MADV_HUGEPAGE)


@functools.cache
def _huge_page_bytes() -> int:
    """Size of a huge page; 0 where programs get none, or where memory counts as used before it is written to."""
    try:
        size = int((_HUGE_PAGES / "hpage_pmd_size").read_text())
        never = "[never]" in (_HUGE_PAGES / "enabled").read_text()
        strict = _OVERCOMMIT.read_text().strip() == "2"
    except (OSError, ValueError):
        return 0
    return 0 if never or strict else size


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
    library = ctypes.CDLL(None)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    library.malloc.restype, library.malloc.argtypes = address, [size]
    library.free.restype, library.free.argtypes = None, [address]
    library.sbrk.restype, library.sbrk.argtypes = address, [ctypes.c_ssize_t]
    library.madvise.argtypes = [address, size, ctypes.c_int]
    return library
