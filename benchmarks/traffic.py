"""The traffic table: what the kernels load and store, counted access by access, without a card.

``python -m benchmarks.traffic`` runs small cases of :mod:`.kernel_cases`, forward and backward, in Triton's
interpreter, which executes every load and store of every program, and prints a Markdown table; ``--write`` keeps it in
benchmarks/results/traffic.md, if no row is above its limit. tests/test_traffic.py holds every row to its floor's limit,
and to what it moved when the table was made.

Counted are the bytes of all elements that a load or store touches: those that its mask leaves out are not. What
several programs or loop turns read again counts again, be it in a cache or not, and partial sums on their way from one
kernel to the next count as well. An atomic operation is a load and a store. "Distinct" counts an address once a launch:
less than the bytes means that a kernel reads something again. Copies and sums that an operation leaves to torch are not
seen.

Kernels are launched as on an H200.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

# Before the first import of Triton.
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

from minimagen_fast.kernels import launch

from .kernel_cases import (
    CASES,
    LIMIT,
    Case,
    Floor,
    channel_norm,
    group_norm,
    merged_attention,
    row_norm,
    sampling_step,
    training_noising,
)

TABLE = Path(__file__).parent / "results" / "traffic.md"
# Elements of a page of addresses.
PAGE = 2**18
# Images in half precision and parameters in float32, so that parameters weigh most.
DTYPE = torch.float16
FORMATS = {torch.channels_last: "NHWC", torch.contiguous_format: "NCHW"}
_MASKED = group_norm(2, 1024, 8, 8, skip=512, resident=True)
# Beside the small cases of the registry, those where parameters and sums weigh most: few pixels or tokens, odd numbers
# of samples, groups that a program reads twice.
SMALL = [
    *(case for case in CASES.values() if case.small),
    group_norm(5, 512, 8, 8, scale=True, resident=True),
    group_norm(5, 512, 8, 8, scale=True, x_bias=True, resident=True),
    group_norm(2, 256, 16, 16, resident=True),
    group_norm(1, 2048, 8, 8, skip=1536),
    row_norm(1, 64, 2048),
    row_norm(1, 4096, 128, residual=True),
    channel_norm(1, 2048, 8, 8, gelu=True),
    channel_norm(1, 256, 16, 16),
    # What no other case launches, or launches so.
    group_norm(2, 256, 8, 8, skip=128, resident=True),
    replace(_MASKED, backward=replace(_MASKED.backward, limit=1.06, why="two sums for 64 pixels of a channel")),
    channel_norm(1, 4096, 4, 4),
    channel_norm(1, 2048, 4, 4, residual=True),
    merged_attention(1, 128, 64),
    *(training_noising(1, 3, 32, 32, memory_format) for memory_format in FORMATS),
    sampling_step("ddim", 1, 3, 32, 32, third=False),
    sampling_step("dpm_solver_pp_2m", 1, 3, 32, 32, third=False),
]


@dataclass
class Traffic:
    """What one launch of a kernel loads and stores.

    Attributes:
        kernel: Its module and name, as in ``"layer_norm_rows._forward_kernel"``.
        loaded: Bytes loaded, re-reads included.
        stored: Bytes stored.
    """

    kernel: str
    loaded: int = 0
    stored: int = 0
    # By kind, size of the elements and page: which of the page's elements were touched.
    _touched: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored

    @property
    def distinct(self) -> int:
        """Bytes at different addresses, loads and stores each for themselves."""
        return sum(size * int(np.count_nonzero(touched)) for (_, size, _), touched in self._touched.items())

    def add(self, kind: str, pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle) -> None:
        """Count one load or store of a program."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        setattr(self, kind, getattr(self, kind) + size * addresses.size)
        elements = addresses.ravel() // size
        pages = elements // PAGE
        for page in np.unique(pages):
            touched = self._touched.setdefault((kind, size, int(page)), np.zeros(PAGE, bool))
            touched[elements[pages == page] - page * PAGE] = True


@contextmanager
def count() -> Iterator[list[Traffic]]:
    """Count what the kernels launched in this block load and store, in the list this gives: an entry per launch."""
    assert launch.INTERPRETED, "loads and stores can be counted only in Triton's interpreter"
    counted: list[Traffic] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, start = builder.create_masked_load, builder.create_masked_store, executor.__call__
    change = builder.create_atomic_rmw

    # All other kinds of loads and stores end in these two.
    def counting_load(self, pointers, mask, *rest):
        counted[-1].add("loaded", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        counted[-1].add("stored", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counting_start(self, *args, **kwargs):
        counted.append(Traffic(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__qualname__}"))
        return start(self, *args, **kwargs)

    def counting_change(self, operation, pointers, value, mask, *rest):
        counted[-1].add("loaded", pointers, mask)
        counted[-1].add("stored", pointers, mask)
        return change(self, operation, pointers, value, mask, *rest)

    def refuse(self, *args):
        raise NotImplementedError("atomic compare-and-swap is not counted")

    replaced = {
        "create_masked_load": counting_load,
        "create_masked_store": counting_store,
        "create_atomic_rmw": counting_change,
        "create_atomic_cas": refuse,
    }
    with mock.patch.multiple(builder, **replaced), mock.patch.object(executor, "__call__", counting_start):
        yield counted


@dataclass(frozen=True)
class Row:
    """What an operation moves, all its launches together, in bytes."""

    operation: str
    direction: str
    shape: str
    memory_format: str
    launches: int
    floor: int
    moved: int
    distinct: int
    rule: Floor
    kernels: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.operation} {self.direction} {self.shape} {self.memory_format}"

    @property
    def complaints(self) -> list[str]:
        if not self.moved:
            return ["moves nothing: it launches no kernel"]
        limits = {"moved": self.rule.limit, "distinct": self.rule.distinct}
        return [
            f"{what} {getattr(self, what) / self.floor:.3f} times its floor ({self.rule}), allowed are {limit}"
            for what, limit in limits.items()
            if limit is not None and getattr(self, what) > limit * self.floor
        ]


def measure(case: Case, memory_format: torch.memory_format = torch.contiguous_format) -> list[Row]:
    """Run a case forward and, if it has gradients, backward, and count."""
    inputs = case.inputs("cpu", DTYPE, memory_format, gradients=True)
    with count() as forward:
        out = case.run(inputs, implementation="triton")
    rows = [_row(case, "forward", memory_format, forward, inputs, out)]
    if case.backward is not None:
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        gradient = gradient.contiguous(memory_format=memory_format if out.ndim == 4 else torch.contiguous_format)
        with count() as backward:
            out.backward(gradient)
        rows.append(_row(case, "backward", memory_format, backward, inputs, out))
    return rows


def _row(
    case: Case,
    direction: str,
    memory_format: torch.memory_format,
    counted: list[Traffic],
    inputs: dict[str, Any],
    out: Any,
) -> Row:
    floor = case.floor(direction, memory_format)
    return Row(
        case.operation,
        direction,
        case.shape,
        format_name(case, memory_format),
        len(counted),
        floor.bytes(inputs, out),
        sum(launch.bytes for launch in counted),
        sum(launch.distinct for launch in counted),
        floor,
        tuple(dict.fromkeys(launch.kernel for launch in counted)),
    )


def runs(cases: Iterable[Case]) -> Iterator[tuple[Case, torch.memory_format]]:
    """All of them, those with images in both memory formats."""
    for case in cases:
        for memory_format in FORMATS if case.images else [torch.contiguous_format]:
            yield case, memory_format


def format_name(case: Case, memory_format: torch.memory_format) -> str:
    """As it stands in the table."""
    return FORMATS[memory_format] if case.images else "-"


_COLUMNS = (
    "operation",
    "",
    "shape",
    "format",
    "launches",
    "floor, bytes",
    "moved / floor",
    "distinct / floor",
    "limits",
    "rule",
    "kernels",
)


def table(rows: list[Row]) -> str:
    """Markdown, which :func:`parse` reads."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---|---|---|--:|--:|--:|--:|--:|---|---|"]
    for row in rows:
        moved, distinct = row.moved / row.floor, row.distinct / row.floor
        words = row.operation, row.direction, row.shape, row.memory_format, row.launches, f"{row.floor:,}"
        ratios = f"{moved:.3f}", f"{distinct:.3f}", f"{row.rule.limit or '-'}, {row.rule.distinct}"
        lines.append(f"| {' | '.join(map(str, (*words, *ratios, row.rule, ', '.join(row.kernels))))} |")
    return "\n".join(lines) + "\n"


def parse(text: str) -> list[dict[str, str]]:
    """The rows of the :func:`table` in a text, as its cells by their columns."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(_COLUMNS, line, strict=True)) for line in lines[1:]]


def regressions(row: Row, text: str) -> list[str]:
    """In what a row is worse than its row of the :func:`table` in a text, but for what the table rounds."""
    columns = "operation", "", "shape", "format"
    wanted = row.operation, row.direction, row.shape, row.memory_format
    before = next((cells for cells in parse(text) if tuple(cells[column] for column in columns) == wanted), None)
    if before is None:
        return ["is not in the table"]
    wrong = []
    if row.launches > int(before["launches"]):
        wrong.append(f"makes {row.launches} launches, {before['launches']} in the table")
    for what in ("moved", "distinct"):
        most = int(before["floor, bytes"].replace(",", "")) * (float(before[f"{what} / floor"]) + 0.0005)
        if getattr(row, what) > most:
            wrong.append(f"{what} {getattr(row, what):,} bytes, at most {most:,.0f} in the table")
    return wrong


def moved(text: str) -> dict[str, str]:
    """For every kernel in a :func:`table`, the most that an operation it belongs to moves in multiples of its floor."""
    most: dict[str, str] = {}
    for row in parse(text):
        for kernel in row["kernels"].split(", "):
            most[kernel] = max(most.get(kernel, ""), row["moved / floor"], key=lambda ratio: float(ratio or 0))
    return most


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if a row is above its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"keep the table in benchmarks/results/{TABLE.name}")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only cases whose name starts so")
    options = parser.parse_args(arguments)
    if options.write and options.cases:
        parser.error("--write keeps the whole table: name no cases")
    names = tuple(options.cases) or ("",)
    if not any(case.name.startswith(names) for case in SMALL):
        parser.error(f"no case has a name that starts with {' or '.join(names)}")
    rows = []
    for run in runs(case for case in SMALL if case.name.startswith(names)):
        for row in measure(*run):
            rows.append(row)
            print(f"{row.name}: {row.moved / row.floor:.3f} x floor", *row.complaints, file=sys.stderr)
    text = table(rows)
    print(text)
    wrong = any(row.complaints for row in rows)
    if options.write and wrong:
        print(f"benchmarks/results/{TABLE.name} is left as it was: see above", file=sys.stderr)
    elif options.write:
        TABLE.write_text(_HEAD + text)
    return int(wrong)


_HEAD = f"""# Memory traffic of the kernels

Written by `python -m benchmarks.traffic --write`, no card needed: bytes that the kernels load and store, counted in
Triton's interpreter, over the floor of the operation. Images and tokens are float16, parameters float32. "Moved" counts
every access, partial sums between kernels included, an atomic addition as a load and a store; "distinct" counts an
address once in a launch. The limit is {LIMIT} times the floor for both, but for what stands in the table; attention has
none for what it moves, since every block of queries reads all keys again. Where a library computes attention, only what
is beside it is counted, and floors are of that alone. Kernels are launched as on an H200. A test fails when an
operation moves more than its row says.

Two floors are above one read of every input and one write of every output. A sampling step whose image one program
cannot hold counts x_0 three times before the update: 2.5 times that minimum, and 1.9 times where the quantile is at
most 1, since the later counts then end at once. The channel norm of NCHW images with more than 2048 channels (1024 with
a residual, or in backward) reads them twice, 1.5 times the minimum forward: with all channels in registers there would
be too few pixels side by side for full accesses. Channels_last images, as on a card, are read once.

"""


if __name__ == "__main__":
    sys.exit(main())
