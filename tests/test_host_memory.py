"""Main memory that is freed: kept by the process or given back, seen in the pages that the system has to hand out."""

import os
import subprocess
import sys

import pytest
import torch

from minimagen_fast import host_memory
from minimagen_fast.acceleration import resolve

PROGRAM = """
import resource
import torch
from minimagen_fast import host_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(20, 2**20)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20

new_pages()
given_back = new_pages()
host_memory.keep_freed(True)
new_pages()
kept, before = new_pages(), resident()
host_memory.keep_freed(False)
print(given_back, kept, before - resident())
"""


def pages(**environment):
    """New pages for a tensor of 80 MiB where memory is given back and where it is kept; MiB given back in the end."""
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return [int(count) for count in done.stdout.split()]


@pytest.mark.skipif(host_memory.obstacle() is not None, reason=str(host_memory.obstacle()))
def test_freed_memory_is_kept_and_given_back():
    given_back, kept, in_the_end = pages()
    # With huge pages there would be fewer of them, but some.
    assert given_back > 20 and kept < given_back / 10
    assert in_the_end > 70


@pytest.mark.skipif(host_memory.obstacle() is not None, reason=str(host_memory.obstacle()))
def test_what_the_environment_says_stays():
    assert min(pages(MALLOC_TRIM_THRESHOLD_="131072")[:2]) > 20


@pytest.mark.parametrize("most, said", [(2**30, None), (2**25, "blocks of 32 MiB and more"), (0, "blocks of 0 MiB")])
def test_a_library_that_keeps_no_large_blocks(monkeypatch, most, said):
    MMAP, TRIM, SMALL, asked = -3, -1, 1, []

    class Library:
        def mallopt(self, parameter, size):
            asked.append((parameter, size))
            return int(parameter != MMAP or size <= most)

        def malloc_trim(self, pad):
            asked.append("trimmed")

    monkeypatch.setattr(host_memory, "obstacle", lambda: None)
    monkeypatch.setattr(host_memory, "_library", Library)
    monkeypatch.setattr(host_memory, "_huge_page_bytes", lambda: 0)
    monkeypatch.setattr(host_memory, "_kept", False)
    monkeypatch.setattr(host_memory, "_limit", 2**30)
    host_memory.keep_freed(True)
    host_memory.keep_freed(True)
    sizes = [size for size in (2**30, 2**25) if size >= most]
    # The one of trimming alone would keep the other where it is.
    assert asked == [*((MMAP, size) for size in sizes), *([(TRIM, 2**30)] if most else []), (SMALL, 0)]
    reason = resolve({}, torch.device("cpu"), torch.float32).reasons["freed_memory"]
    assert said in reason if said else reason.endswith("step"), reason
    asked.clear()
    host_memory.keep_freed(False)
    # What the library begins with on machines of 64 bits.
    assert asked == [(MMAP, 2**25), *([(TRIM, 2**26)] if most else []), (SMALL, 128), "trimmed"]


IN_HUGE_PAGES = """
import torch
from minimagen_fast import host_memory

host_memory.keep_freed(True)
# Its middle: huge pages begin where they can.
place = torch.ones(20, 2**20)[10:].data_ptr()
inside = False
for line in open("/proc/self/smaps"):
    first, last = line.split()[0].partition("-")[::2]
    if last and not first.endswith(":"):
        inside = int(first, 16) <= place < int(last, 16)
    elif inside and first == "VmFlags:":
        print(line)
"""


@pytest.mark.skipif(not host_memory._huge_page_bytes(), reason="the system has no huge pages for programs that ask")
@pytest.mark.skipif(host_memory.obstacle() is not None, reason=str(host_memory.obstacle()))
def test_what_is_kept_may_lie_in_huge_pages():
    done = subprocess.run([sys.executable, "-c", IN_HUGE_PAGES], capture_output=True, text=True, check=True)
    assert "hg" in done.stdout.split()


def test_huge_pages_are_asked_for_again_where_the_first_end(monkeypatch):
    MIB, huge, advised = 2**20, 2 * 2**20, []

    class Library:
        end = 7 * MIB + 5

        def mallopt(self, parameter, size):
            return 1

        def malloc_trim(self, pad):
            self.end = 9 * MIB

        def sbrk(self, step):
            return self.end

        def malloc(self, size):
            assert size == host_memory._AHEAD
            self.end += size

        def free(self, block):
            pass

        def madvise(self, begin, size, advice):
            assert advice == 14 and begin % huge == size % huge == 0
            advised.append((begin // MIB, (begin + size) // MIB))

    library = Library()
    monkeypatch.setattr(host_memory, "obstacle", lambda: None)
    monkeypatch.setattr(host_memory, "_library", lambda: library)
    monkeypatch.setattr(host_memory, "_huge_page_bytes", lambda: huge)
    for name, value in (("_kept", False), ("_limit", 2**30), ("_huge_until", 0)):
        monkeypatch.setattr(host_memory, name, value)
    host_memory.keep_freed(True)
    host_memory.keep_freed(True)
    assert advised == [(8, 518)]
    library.end = 700 * MIB
    host_memory.keep_freed(True)
    assert advised.pop() == (700, 1212)
    host_memory.keep_freed(False)
    host_memory.keep_freed(True)
    assert advised == [(8, 518), (10, 520)]


@pytest.mark.parametrize(
    "said, overcommit, expected",
    [("always [madvise] never", "0", 2**21), ("always madvise [never]", "0", 0), ("[always] madvise never", "2", 0)],
)
def test_where_huge_pages_are_asked_for(tmp_path, monkeypatch, said, overcommit, expected):
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    (tmp_path / "enabled").write_text(said)
    (tmp_path / "overcommit").write_text(overcommit)
    monkeypatch.setattr(host_memory, "_HUGE_PAGES", tmp_path)
    monkeypatch.setattr(host_memory, "_OVERCOMMIT", tmp_path / "overcommit")
    assert host_memory._huge_page_bytes.__wrapped__() == expected
    (tmp_path / "enabled").unlink()
    assert host_memory._huge_page_bytes.__wrapped__() == 0


@pytest.mark.parametrize(
    "library, environment, message",
    [("", {}, "GNU"), ("glibc", {"GLIBC_TUNABLES": "x"}, "GLIBC_TUNABLES says"), ("glibc", {}, None)],
)
def test_obstacles(monkeypatch, library, environment, message):
    for name in host_memory._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: (library, ""))
    found = host_memory.obstacle.__wrapped__()
    assert found is None if message is None else message in found
