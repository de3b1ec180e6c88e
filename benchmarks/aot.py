"""The ahead-of-time table: every kernel as machine code for three generations of cards, without a card.

``python -m benchmarks.aot`` compiles a representative part of the launches that the U-Nets Base, Super, BaseTest and
SuperTest can make, and of attention with other head widths, and prints what became of each configuration as a Markdown
table; ``--all`` compiles all of them, ``--changed`` all of the kernels that changed, or are launched in other ways,
since the kept table was made, of which the rest is taken; with either ``--write`` keeps the table in
benchmarks/results/aot.md. tests/test_aot.py holds the representative part to :func:`complaints`, and to the kept table,
and knows by the kernels' :func:`fingerprint` and by the :func:`digests` of what is launched whether all were compiled
since they were changed last. With ``TRITON_CACHE_DIR`` set to a folder, an interrupted run goes on where it was.

Launches are enumerated by running the operations forward and backward on meta tensors, see ``kernels.launch.record``:
what they would launch on an A100, an H200 and a B200. Those of one kernel that Triton compiles alike are one
configuration. Registers, stack and static shared memory are what ``cuobjdump`` finds in the machine code; widths of
global accesses and tensor-core instructions are those in the PTX.
"""

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from minimagen_fast.kernels import launch
from minimagen_fast.Unet import ATTN_DIM_HEAD, Base, BaseTest, Super, SuperTest

from . import traffic
from .kernel_cases import Case, attention_cases, unet_cases

TABLE = Path(__file__).parent / "results" / "aot.md"
TARGETS = {80: launch.A100, 90: launch.H200, 100: launch.B200}
PROCESSES = 2
PACKAGE = launch.__name__.rpartition(".")[0]
UNETS = (Base, Super, BaseTest, SuperTest)
DTYPES = (torch.bfloat16, torch.float32)
FORMATS = (torch.channels_last, torch.contiguous_format)

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
class Build:
    """What Triton compiles once: a kernel, specialised as its just-in-time compiler does it for a launch.

    Attributes:
        module: Where the kernel is defined.
        kernel: Its name there.
        signature: Its parameters' names and types.
        constexprs: Values of those that are constants, by position.
        aligned: Positions of numbers and addresses that are known to be multiples of 16.
        num_warps: Warps of a program.
        num_stages: Stages of its software pipeline.
        capability: Compute capability as one number: 80, 90, 100.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[tuple[int, ...], Any], ...]
    aligned: tuple[tuple[int, ...], ...]
    num_warps: int
    num_stages: int
    capability: int

    @property
    def config(self) -> str:
        """All that sets it apart from other builds of the kernel, for people to read."""
        constants = dict(self.constexprs)
        types, names = [], []
        for position, (name, kind) in enumerate(self.signature):
            if kind != "constexpr":
                known = (position,) in self.aligned or kind in ("fp32", "u1")
                types.append(kind.removeprefix("*") + ("" if known else "?"))
            elif name.isupper():
                names.append(f"{name}={constants[(position,)]}")
            else:
                types.append(str(constants[(position,)]))
        return f"{' '.join(types)}; {' '.join(names)}; {self.num_warps} warps, {self.num_stages} stages"

    @property
    def head_width(self) -> int | None:
        """In kernels of attention, where it is a constant."""
        names = [name for name, _ in self.signature]
        return dict(self.constexprs)[(names.index("D"),)] if "D" in names else None

    @property
    def key(self) -> tuple[str, str, str]:
        """That of its row: kernel, configuration, target."""
        return f"{self.module.rpartition('.')[2]}.{self.kernel}", self.config, f"sm_{self.capability}"


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
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.config, self.target


def specialise(recorded: launch.Launch, capability: int) -> Build:
    """The build that a launch needs on a card."""
    kernel = recorded.kernel
    options = {"num_warps": recorded.num_warps, "num_stages": recorded.num_stages}
    bound, specialization, _ = _binder(kernel, capability)(*recorded.args, **recorded.constexprs, **options)
    # What the rest depends on: numbers and tensors count only for their types.
    constants = tuple((type(value), value) for value in recorded.constexprs.values())
    key = kernel, capability, constants, tuple(recorded.constexprs), *options.values(), tuple(specialization)
    build = _builds.get(key)
    if build is None:
        keywords = {**recorded.constexprs, **options}
        packed = kernel._pack_args(_backend(capability), keywords, bound, specialization, options)
        _, signature, constexprs, attributes = packed
        build = _builds[key] = Build(
            kernel.fn.__module__,
            kernel.fn.__qualname__,
            tuple(signature.items()),
            tuple(constexprs.items()),
            tuple(position for position, attribute in attributes.items() if attribute),
            recorded.num_warps,
            recorded.num_stages,
            capability,
        )
    return build


_builds: dict[tuple, Build] = {}


@functools.cache
def _backend(capability: int):
    return make_backend(GPUTarget("cuda", capability, 32))


@functools.cache
def _binder(kernel, capability: int):
    # The two steps of triton's JITFunction.run that decide what it compiles, both private: a binder from arguments to
    # (values by name, (type, attribute) of each, options), and _pack_args, which sorts these into what ASTSource takes.
    # They are the same in triton 3.6 and 3.7.
    return create_function_from_signature(kernel.signature, kernel.params, _backend(capability))


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


def compile_launch(recorded: launch.Launch, capability: int) -> Row:
    """What a launch runs on a card."""
    return compile_build(specialise(recorded, capability))


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


def launches(case: Case, dtype: torch.dtype, memory_format: torch.memory_format, card: launch.Target):
    """What a case launches on a card, backward included."""
    inputs = _meta_inputs(case, dtype, memory_format)
    wanted = [inputs[name] for name in case.gradients]
    with launch.record(card) as recorded:
        for implementation in ("triton", *(case.libraries if dtype != torch.float32 else ())):
            out = case.run(inputs, implementation)
            if wanted:
                # Any tensor of its shape and strides; making one costs more.
                torch.autograd.grad(out, wanted, out.detach())
    return recorded


# The same for all cards.
@functools.lru_cache(maxsize=1)
def _meta_inputs(case: Case, dtype: torch.dtype, memory_format: torch.memory_format):
    return case.inputs("meta", dtype, memory_format, gradients=True)


def _cases(sizes: Iterable[tuple[int, int]]) -> Iterator[tuple[Case, bool]]:
    """Every case once, with whether 16-byte accesses are due."""
    cases: dict[str, tuple[Case, bool]] = {}
    for side, batch in sizes:
        found = [(case, unet in (Base, Super)) for unet in UNETS for case in unet_cases(unet, side, batch)]
        for case, wide in [*found, *((case, True) for case in attention_cases(side, batch))]:
            cases[case.name] = case, wide or cases.get(case.name, (case, False))[1]
    yield from cases.values()


def enumerate_builds(
    sizes: Iterable[tuple[int, int]],
    *,
    dtypes: Iterable[torch.dtype] = DTYPES,
    targets: Iterable[int] = TARGETS,
) -> dict[Build, bool]:
    """All builds for square images of these sides, in batches of these sizes, each once, in a fixed order.

    Each with whether 16-byte accesses are due: not if only the Test U-Nets need it, whose images have 8 channels, nor
    for images of less than 8x8 pixels, nor in NCHW memory for a number of pixels that is no multiple of 16.
    """
    builds: dict[Build, bool] = {}
    for case, wide in _cases(sizes):
        first, *_ = case.inputs("meta", torch.float32).values()
        pixels = first.shape[2:].numel() if case.images else None
        formats = FORMATS if case.images else FORMATS[:1]
        for dtype, memory_format, capability in itertools.product(dtypes, formats, targets):
            if case.half_only and dtype == torch.float32:
                continue
            aligned = memory_format == torch.channels_last or pixels % 16 == 0
            due = wide and (not case.images or (pixels >= 64 and aligned))
            for recorded in launches(case, dtype, memory_format, TARGETS[capability]):
                build = specialise(recorded, capability)
                builds[build] = builds.get(build, False) or due
    return builds


def compile_builds(builds: Iterable[Build], processes: int = PROCESSES) -> Iterator[Row]:
    """Compile them side by side, in their order."""
    # Compilers and torch have threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(compile_build, builds, chunksize=4)


def representatives(builds: dict[Build, bool], each: int = 2) -> list[Build]:
    """Of every kernel, dtype, target and head width, those of the smallest tiles and of the largest, ``each`` in all.

    Of builds where 16-byte accesses are not due, and of head widths that no built-in U-Net has, only the largest.
    """
    kinds: dict[tuple, list[Build]] = {}
    for build, wide in builds.items():
        kind = (build.module, build.kernel, build.capability, build.signature[0][1], build.head_width, wide)
        kinds.setdefault(kind, []).append(build)
    chosen = []
    for kind in kinds.values():
        kind.sort(key=lambda build: (_volume(build), build.num_warps, build.config))
        last = len(kind) - 1
        usual = builds[kind[0]] and kind[0].head_width in (None, ATTN_DIM_HEAD)
        number = min(each, len(kind)) if usual else 1
        chosen += [kind[last - round(i * last / max(number - 1, 1))] for i in reversed(range(number))]
    return chosen


def _volume(build: Build) -> int:
    """Elements of a tile per thread, up to a factor that is the same for all builds of a kernel."""
    volume = 1
    for position, value in build.constexprs:
        if build.signature[position[0]][0].isupper() and type(value) is int and value > 0:
            volume *= value
    return volume // build.num_warps


# Kernels whose loads or stores are of vectors and partial sums: a small part of what their operation moves.
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


def regressions(row: Row, recorded: dict[tuple[str, str, str], Row]) -> list[str]:
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
    if _percent(row.occupancy) < _percent(before.occupancy):
        wrong.append(f"occupancy {row.occupancy}, {before.occupancy} in the table")
    if _speed(row.products) < _speed(before.products):
        wrong.append(f"multiplies with {row.products}, {before.products} in the table")
    return wrong


def _percent(share: str) -> int:
    return int(share.rstrip("%"))


def _speed(products: str) -> int:
    """Greater for the faster instructions: on every card HMMA is the slower of two, or the only one."""
    return 0 if products == "-" else 1 if products == "HMMA" else 2


_COLUMNS = {
    "kernel": "kernel",
    "config": "configuration",
    "target": "target",
    "registers": "registers",
    "spill": "spill",
    "shared": "shared memory",
    "warps": "warps",
    "occupancy": "occupancy",
    "load": "widest load",
    "store": "widest store",
    "products": "products",
}


def table(rows: Iterable[Row]) -> str:
    """Markdown, which :func:`parse` reads."""
    lines = [f"| {' | '.join(_COLUMNS.values())} |", "|" + "---|" * len(_COLUMNS)]
    lines += [f"| {' | '.join(str(getattr(row, name)) for name in _COLUMNS)} |" for row in rows]
    return "\n".join(lines) + "\n"


def parse(text: str) -> dict[tuple[str, str, str], Row]:
    """The rows of :func:`table` in a text, by their keys."""
    rows = {}
    kinds = {entry.name: entry.type for entry in dataclasses.fields(Row)}
    for cells in _cells(text, _COLUMNS.values()):
        values = {k: int(v) if kinds[k] is int else v for k, v in zip(_COLUMNS, cells, strict=True)}
        row = Row(**values)
        rows[row.key] = row
    return rows


def _cells(text: str, columns: Iterable[str]) -> Iterator[list[str]]:
    """The rows of the Markdown table that has these columns."""
    _, _, rest = text.partition(f"| {' | '.join(columns)} |\n")
    for line in itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines()[1:]):
        yield [cell.strip() for cell in line.strip("|").split(" | ")]


_OVERVIEW = (
    "kernel",
    "fingerprint",
    "target",
    "launches",
    "configurations",
    "registers",
    "spill",
    "shared memory",
    "occupancy",
    "moved / floor",
    "widest load",
    "widest store",
    "products",
)
# What a kernel is known by on a target: its name and the target's.
Kind = tuple[str, str]


def worst(rows: Iterable[Row]) -> dict[Kind, dict[str, str]]:
    """The worst of every kernel and target, by :func:`overview`'s columns."""
    kinds: dict[Kind, list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.kernel, row.target), []).append(row)
    found = {}
    for kind, group in kinds.items():
        most = {_COLUMNS[name]: max(getattr(row, name) for row in group) for name in ("registers", "spill", "shared")}
        least = {_COLUMNS[name]: min(getattr(row, name) for row in group) for name in ("load", "store")}
        cells = {
            "configurations": len(group),
            **most,
            "occupancy": min((row.occupancy for row in group), key=_percent),
            **least,
            "products": ", ".join(sorted({row.products for row in group})),
        }
        found[kind] = {column: str(cell) for column, cell in cells.items()}
    return found


def overview(kinds: dict[Kind, dict[str, str]], launched: dict[Kind, str]) -> str:
    """Markdown of :func:`worst`, beside what kernels are now and what they move; :func:`parse_overview` reads it.

    Args:
        kinds: By kernel and target, in the order of the lines.
        launched: Their :func:`digests`.
    """
    moved = traffic.moved(traffic.TABLE.read_text())
    lines = [f"| {' | '.join(_OVERVIEW)} |", "|---|---|---|---|" + "--:|" * 8 + "---|"]
    for (kernel, target), measured in kinds.items():
        cells = measured | {
            "kernel": kernel,
            "fingerprint": fingerprint(kernel),
            "target": target,
            "launches": launched[kernel, target],
            "moved / floor": moved.get(kernel, "-"),
        }
        lines.append(f"| {' | '.join(cells[column] for column in _OVERVIEW)} |")
    return "\n".join(lines) + "\n"


def parse_overview(text: str) -> dict[Kind, dict[str, str]]:
    """The lines of the :func:`overview` in a text, by kernel and target."""
    lines = (dict(zip(_OVERVIEW, cells, strict=True)) for cells in _cells(text, _OVERVIEW))
    return {(line["kernel"], line["target"]): line for line in lines}


def digests(builds: Iterable[Build]) -> dict[Kind, str]:
    """For every kernel and target eight digits that change with the set of its configurations.

    They stand for all that decides on the host's side how a kernel is launched: block sizes, warps, alignment.
    """
    configs: dict[Kind, list[str]] = {}
    for build in builds:
        kernel, config, target = build.key
        configs.setdefault((kernel, target), []).append(config)
    return {kind: _digest(sorted(of_kind)) for kind, of_kind in configs.items()}


def _digest(content: list) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]


def fingerprint(name: str) -> str:
    """Eight digits that change with the code of a kernel or of a function it calls, not with comments and layout.

    Args:
        name: Module and kernel, as in ``"layer_norm_rows._forward_kernel"``.
    """
    module, _, function = name.rpartition(".")
    pending = [getattr(importlib.import_module(f"{PACKAGE}.{module}"), function)]
    codes = {}
    while pending:
        function = pending.pop().fn
        name = f"{function.__module__.removeprefix(PACKAGE)}.{function.__qualname__}"
        if name in codes:
            continue
        source = textwrap.dedent(inspect.getsource(function))
        codes[name] = _code(source)
        for node in ast.walk(ast.parse(source)):
            called = None
            if isinstance(node, ast.Name):
                called = function.__globals__.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = getattr(function.__globals__.get(node.value.id), node.attr, None)
            # Triton's own functions belong to its version.
            if str(getattr(getattr(called, "fn", None), "__module__", "")).startswith(PACKAGE):
                pending.append(called)
    return _digest(sorted(codes.items()))


def _code(source: str) -> list[str]:
    """The tokens of a function, without comments, docstrings and line ends within a statement."""
    words, before = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if token.type == tokenize.STRING and before in (tokenize.INDENT, tokenize.NEWLINE):
            before = tokenize.STRING
            continue
        if before != tokenize.STRING or token.type != tokenize.NEWLINE:
            words.append(token.string.strip() or tokenize.tok_name[token.type])
        before = token.type
    return words


def _versions() -> str:
    return f"triton {triton.__version__}"


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if there are complaints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="all configurations: an hour or so on two cores")
    parser.add_argument(
        "--changed",
        action="store_true",
        help="all configurations of kernels that changed, or are launched otherwise, since the kept table was made",
    )
    parser.add_argument("--write", action="store_true", help=f"keep the tables in benchmarks/results/{TABLE.name}")
    options = parser.parse_args(arguments)
    if options.write and not (options.all or options.changed):
        parser.error("the table is of all configurations: --write needs --all, or --changed")
    if options.changed and _versions() not in TABLE.read_text():
        parser.error(f"the kept table is not of {_versions()}, and none of it can be taken: use --all")
    if launch.INTERPRETED:
        parser.error("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        return _run_changed(options.write) if options.changed else _run(options.all, options.write)


def _run(everything: bool, write: bool) -> int:
    builds = enumerate_builds(ALL_SIZES)
    chosen = representatives(enumerate_builds(SOME_SIZES))
    recorded_text = TABLE.read_text() if TABLE.exists() else ""
    # Another compiler makes other code: then there is nothing to compare with.
    recorded = recorded_text if _versions() in recorded_text and not write else None
    rows, wrong = _compiled(builds, list(builds) if everything else chosen, chosen, recorded)
    launched = digests(builds)
    text = overview(worst(rows.values()), launched)
    if recorded is not None:
        for kernel, target in sorted(_stale(launched, recorded)):
            wrong = True
            print(f"{kernel} on {target}: code or launches are not those of the table: {_REMEDY}", file=sys.stderr)
    return _finish(text, [rows[build] for build in chosen], len(rows), write, wrong)


def _stale(launched: dict[Kind, str], text: str) -> set[Kind]:
    """The kernels and targets of which a table has other code or other configurations, or that only one of both has."""
    codes = {kernel: fingerprint(kernel) for kernel in {kernel for kernel, _ in launched}}
    now = {kind: (codes[kind[0]], digest) for kind, digest in launched.items()}
    then = {kind: (line["fingerprint"], line["launches"]) for kind, line in parse_overview(text).items()}
    return {kind for kind in now.keys() | then.keys() if now.get(kind) != then.get(kind)}


def _run_changed(write: bool) -> int:
    """The kept table, with new rows for the kernels that are not the ones it was made of, or launched in other ways."""
    text, builds = TABLE.read_text(), enumerate_builds(ALL_SIZES)
    chosen = representatives(enumerate_builds(SOME_SIZES))
    kinds = {build: (build.key[0], build.key[2]) for build in builds}
    recorded, launched = parse(text), digests(builds)
    # Other sizes than those of the table may be chosen.
    stale = _stale(launched, text) | {kinds[build] for build in chosen if build.key not in recorded}
    rows, wrong = _compiled(builds, [build for build in builds if kinds[build] in stale], chosen, None)
    lines = parse_overview(text) | worst(rows.values())
    details = [rows[build] if build in rows else recorded[build.key] for build in chosen]
    return _finish(overview({kind: lines[kind] for kind in launched}, launched), details, len(builds), write, wrong)


def _compiled(
    builds: dict[Build, bool],
    wanted: list[Build],
    chosen: list[Build],
    recorded: str | None,
) -> tuple[dict[Build, Row], bool]:
    """The rows of the wanted builds, and whether something is wrong with one, which is said.

    It is also wrong if one of the chosen is worse than in a recorded table.
    """
    print(f"{len(wanted)} of {len(builds)} configurations", file=sys.stderr)
    rows, wrong, before = {}, False, None if recorded is None else parse(recorded)
    for build, row in zip(wanted, compile_builds(wanted), strict=True):
        rows[build] = row
        found = complaints(row, wide=builds[build])
        if before is not None and build in chosen:
            found += regressions(row, before)
        for complaint in found:
            wrong = True
            print(f"{row.kernel} ({row.config}) on {row.target} {complaint}", file=sys.stderr)
    if wrong and before is not None:
        print(f"To take this into the table on purpose: {_REMEDY}", file=sys.stderr)
    return rows, wrong


def _finish(lines: str, chosen: list[Row], number: int, write: bool, wrong: bool) -> int:
    details = table(chosen)
    print(f"{lines}\n{details}")
    if write:
        TABLE.write_text(_HEAD.format(versions=_versions(), number=number, overview=lines, details=details))
    return int(wrong)


_REMEDY = "python -m benchmarks.aot --changed --write"

# Sides of square images in pixels, and batch sizes: powers of two, and some that are none.
ALL_SIZES = (
    *itertools.product([2**i for i in range(3, 11)], [2**i for i in range(9)]),
    *itertools.product((48, 200), (3, 6, 100)),
)
SOME_SIZES = tuple(itertools.product((16, 64, 256), (2, 16)))

_HEAD = """# Machine code of the kernels

Written by `python -m benchmarks.aot --write` with {versions}, no card needed: what the kernels compile to for an
A100 (sm_80), an H200 (sm_90) and a B200 (sm_100), in bfloat16 and float32, NCHW and channels_last. Registers and spills
are those of a thread (spills in bytes), shared memory in bytes of a program, occupancy the share of a multiprocessor's
warps that programs of this kind can fill. The widest global loads and stores are in bytes; narrow ones are those of the
Test U-Nets, which have 8 channels, of images of a few pixels, and of kernels that sum up vectors. Products: HGMMA,
UTCMMA and HMMA are the tensor cores' instructions of sm_90, sm_100 and sm_80.

## The worst of every kernel

All {number} configurations: square images of 8 to 1024 pixels a side in batches of 1 to 256, both powers of two; sides
of 48 and 200 in batches of 3, 6 and 100; attention with all head widths. The fingerprint is that of a kernel's code and
of the functions it calls, launches that of its configurations; a test fails when one of the two has changed since. What
is moved, over the floor, is the operation's that the kernel belongs to, at worst, from [traffic.md](traffic.md):
counted at small shapes, launched as on an H200; a dash where none of these shapes needs the kernel, or its operation is
partly a library's.

{overview}
## Representative configurations

A configuration is the types of the arguments (addresses and numbers; `?` after those that are not known to be multiples
of 16, a value or None for a constant), the constants by name, and the size of a program. The tests compile these, and
fail if one gets worse.

{details}"""


if __name__ == "__main__":
    sys.exit(main())
