"""The machine code of a build of :mod:`.aot_builds`: what it needs and uses, and what is wrong with that.

Registers, stack and static shared memory are what ``cuobjdump`` finds in the machine code; widths of global accesses
and tensor-core instructions are those in the PTX.
"""

import importlib
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .aot_builds import TARGETS, Build, Key

PROCESSES = 2
# Of one multiprocessor.
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED_MEMORY = {80: 167_936, 90: 233_472, 100: 233_472}
# The system's own share of every block's.
RESERVED_SHARED_MEMORY = 1024
# A table's row may need that many times its recorded registers.
REGISTER_SLACK = 1.10

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_GLOBAL = r"{}\.global(?:\.[A-Za-z_][\w:]*)*?(?:\.v(\d))?\.[busf](\d+)\b"
_LOAD, _STORE = (re.compile(_GLOBAL.format(name)) for name in ("ld", "st"))
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (0x[\da-f]+|\d+)")
# By what the machine code calls them.
_PRODUCTS = {"wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCMMA", "mma.sync": "HMMA"}


@dataclass(frozen=True)
class Row:
    """What became of a build. Bytes but for registers (of a thread), warps and occupancy (share of the most warps)."""

    kernel: str
    config: str
    target: str
    registers: int
    spill: int
    shared: int
    warps: int
    occupancy: str
    load: int
    store: int
    products: str

    @property
    def key(self) -> Key:
        return self.kernel, self.config, self.target


def compile_build(build: Build) -> Row:
    """Compile, and read the result."""
    kernel = getattr(importlib.import_module(build.module), build.kernel)
    attributes = {position: [["tt.divisibility", 16]] for position in build.aligned}
    compiled = triton.compile(
        ASTSource(kernel, dict(build.signature), dict(build.constexprs), attributes),
        target=GPUTarget("cuda", build.capability, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    registers, stack, local, static = _resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    # On newer cards cuobjdump's number is the system's share.
    shared += static if build.capability < 90 else 0
    ptx = compiled.asm["ptx"]
    copies = [int(size, 0) for size in _COPY.findall(ptx)] + [16] * ("cp.async.bulk" in ptx)
    products = [name for instruction, name in _PRODUCTS.items() if instruction in ptx]
    return Row(
        *build.key,
        registers,
        stack + local,
        shared,
        build.num_warps,
        f"{occupancy(build.capability, registers, shared, build.num_warps):.0%}",
        max([*_widths(_LOAD, ptx), *copies], default=0),
        max(_widths(_STORE, ptx), default=0),
        " ".join(products) or "-",
    )


def compile_builds(builds: Iterable[Build], processes: int = PROCESSES) -> Iterator[Row]:
    """Compile them side by side, in their order."""
    # Compilers and torch have threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(compile_build, builds, chunksize=4)


def _resources(cubin: bytes) -> tuple[int, ...]:
    """Registers, stack, local and static shared memory of the only kernel in a piece of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_BIN / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL", "SHARED"))


def _widths(access: re.Pattern, ptx: str) -> list[int]:
    return [int(number or 1) * int(bits) // 8 for number, bits in access.findall(ptx)]


def occupancy(capability: int, registers: int, shared: int, num_warps: int) -> float:
    """Share of a multiprocessor's warps that programs of this size can fill."""
    # Registers are given out in units of 256 to each warp.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // num_warps
    by_memory = SHARED_MEMORY[capability] // (shared + RESERVED_SHARED_MEMORY)
    return min(by_registers, by_memory, BLOCKS, WARPS // num_warps) * num_warps / WARPS


# All that is exempted from a demand. Kernels whose loads or stores are of vectors and partial sums, a small part of
# what their operation moves, need not make them 16 bytes wide.
_NARROW: dict[str, tuple[str, ...]] = {
    "group_norm_parameters._parameter_gradients_kernel": ("load", "store"),
    "group_norm_split._moments_kernel": ("store",),
    "group_norm_split._statistics_kernel": ("load", "store"),
    "group_norm_split_backward._sums_kernel": ("store",),
    "group_norm_split_backward._totals_kernel": ("load", "store"),
    "layer_norm_tiles._sum_kernel": ("store",),
    "threshold._narrow_kernel": ("store",),
}
_ATTENTION = "null_key_flash."


def complaints(row: Row, *, wide: bool = True) -> list[str]:
    """What is wrong with the machine code; ``wide`` if it should have 16-byte accesses."""
    wrong = []
    limit = TARGETS[int(row.target.removeprefix("sm_"))].shared_memory
    if row.spill:
        wrong.append(f"spills {row.spill} bytes a thread")
    if row.shared > limit:
        wrong.append(f"needs {row.shared} bytes of shared memory, the card has {limit}")
    for what in ("load", "store"):
        if wide and getattr(row, what) < 16 and what not in _NARROW.get(row.kernel, ()):
            wrong.append(f"its widest {what} is of {getattr(row, what)} bytes, not of 16")
    if row.kernel.startswith(_ATTENTION) and row.config.startswith("bf16"):
        if row.products == "-":
            wrong.append("has no tensor-core instruction")
        elif row.target == "sm_90" and "HGMMA" not in row.products:
            wrong.append(f"multiplies with {row.products}, not with HGMMA")
    return wrong


def regressions(row: Row, recorded: dict[Key, Row]) -> list[str]:
    """In what a row is worse than its row of the kept table."""
    before = recorded.get(row.key)
    if before is None:
        return ["is not in the table"]
    wrong = []
    if row.registers > before.registers * REGISTER_SLACK:
        wrong.append(f"needs {row.registers} registers, {before.registers} in the table")
    for what in ("spill", "shared"):
        if getattr(row, what) > getattr(before, what):
            wrong.append(f"{what} {getattr(row, what)} bytes, {getattr(before, what)} in the table")
    for what in ("load", "store"):
        if getattr(row, what) < getattr(before, what):
            wrong.append(f"its widest {what} is of {getattr(row, what)} bytes, {getattr(before, what)} in the table")
    if percent(row.occupancy) < percent(before.occupancy):
        wrong.append(f"occupancy {row.occupancy}, {before.occupancy} in the table")
    if _speed(row.products) < _speed(before.products):
        wrong.append(f"multiplies with {row.products}, {before.products} in the table")
    return wrong


def percent(share: str) -> int:
    return int(share.rstrip("%"))


def _speed(products: str) -> int:
    """Greater for the faster instructions: on every card HMMA is the slower of two, or the only one."""
    return 0 if products == "-" else 1 if products == "HMMA" else 2
