"""The ahead-of-time table as Markdown: rows of :mod:`.aot_code`, and the worst of every kernel; written and read."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from . import traffic
from .aot_builds import Key, Kind
from .aot_code import Row, percent
from .fingerprints import fingerprint

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


def parse(text: str) -> dict[Key, Row]:
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
            "occupancy": min((row.occupancy for row in group), key=percent),
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
