"""Result files, read back: checked field by field, cases that answer the same question put together.

:mod:`.results` writes them. Whatever is read here can be reported, drawn and compared without further checks.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from .results import SCHEMA, SECTIONS, STATUSES

DIRECTIONS = ("forward", "backward", "both")
# Sections whose variants do the same work in different ways. Those of the others are steps, or different things.
COMPETING = ("sampling-step", "denoiser", "kernels", "sampling", "training")
# One variant is faster than another if their quartiles do not overlap and their medians are further apart than this.
# The two are measured one after the other: by then the machine may be that much warmer or busier.
MARGIN = 0.02
# Matrix rates are measured for these; half precision of either kind runs at the same one.
RATE_OF = {"float16": "bfloat16"}


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: median, quartiles and least of all samples."""

    median: float
    q1: float
    q3: float
    min: float
    samples: tuple[float, ...]

    def apart_from(self, other: "Spread") -> bool:
        """Whether the quartiles of the two do not overlap."""
        return self.q3 < other.q1 or other.q3 < self.q1

    def faster_than(self, other: "Spread") -> bool:
        """Whether it is less time, beyond the noise."""
        return self.q3 < other.q1 and self.median * (1 + MARGIN) < other.median


@dataclass(frozen=True)
class Beside:
    """A peer's variant, and its seconds of one call, each taken just before the sample of the same number."""

    variant: str
    seconds: Spread


@dataclass(frozen=True)
class Case:
    """A case's record, its fields as in :class:`.results.Identity` and :class:`.results.Record`."""

    id: str
    section: str
    name: str
    direction: str | None
    shape: str
    dtype: str
    variant: str
    graph: bool
    status: str
    reason: str | None
    seconds: Spread | None
    bytes: int | None
    flops: int | None
    floor_seconds: float | None
    floor_by_family: dict[str, float] | None
    peak_bytes: int | None
    launches: int | None
    beside: Beside | None
    extra: dict[str, Any]

    def factor(self, peer: "Case") -> float:
        """How many times as fast as a peer it is."""
        ratios = self._ratios_in_turn(peer)
        return median(ratios) if ratios else peer.seconds.median / self.seconds.median

    def loses_to(self, peer: "Case") -> bool:
        """Whether a peer takes less time, beyond the noise."""
        ratios = self._ratios_in_turn(peer)
        if len(ratios) < 2:
            return peer.seconds.faster_than(self.seconds)
        return quantiles(ratios, n=4, method="inclusive")[2] < 1 and median(ratios) * (1 + MARGIN) < 1

    def _ratios_in_turn(self, peer: "Case") -> list[float]:
        if self.beside is None or self.beside.variant != peer.variant:
            return []
        pairs = zip(self.beside.seconds.samples, self.seconds.samples, strict=True)
        return [theirs / own for theirs, own in pairs]

    @property
    def ours(self) -> bool:
        return self.variant == "ours" or self.variant.startswith("ours-")

    @property
    def times_floor(self) -> float | None:
        """Median time as a multiple of the floor; None where there is no time or no floor."""
        return self.seconds.median / self.floor_seconds if self.seconds and self.floor_seconds else None

    @property
    def computes_in(self) -> str:
        """What most of it is computed in: that sets the matrix rate that it can reach."""
        return str(self.extra.get("computes_in", self.dtype))

    @property
    def question(self) -> tuple:
        """The same for all cases that differ in the variant alone."""
        return self.section, self.name, self.direction, self.shape, self.dtype, self.graph


@dataclass(frozen=True)
class Question:
    """The timed cases that differ in the variant alone, in the order of the file."""

    cases: tuple[Case, ...]

    @property
    def first(self) -> Case:
        return self.cases[0]

    @property
    def title(self) -> str:
        """Everything but section and variant, in words."""
        case = self.first
        words = (case.name, case.direction, case.shape, case.dtype, "CUDA graph" if case.graph else None)
        return ", ".join(word for word in words if word)

    @property
    def peers(self) -> list[Case]:
        return [case for case in self.cases if not case.ours]

    @property
    def ours(self) -> Case | None:
        """Ours as it runs by default; the fastest of ours where that was not timed."""
        plain = [case for case in self.cases if case.variant == "ours"]
        return plain[0] if plain else self.fastest_of_ours

    @property
    def fastest_of_ours(self) -> Case | None:
        return min((case for case in self.cases if case.ours), key=lambda case: case.seconds.median, default=None)


@dataclass(frozen=True)
class Run:
    """A result file.

    Attributes:
        path: The file.
        profile: 'smoke', 'cpu', 'gpu' or 'full'.
        complete: Whether every case of the profile has its record: the run was not stopped, and not only a part asked
            for. Those for which the time did not suffice have one, too.
        started: When, in UTC.
        seconds: How long it took.
        machine: Device, threads, memory, driver, clocks.
        software: Versions, commit, peers.
        ceilings: Measured bandwidth and matrix rates.
        cases: All records.
        missing: What was not measured, and why: pairs.
    """

    path: Path
    profile: str
    complete: bool
    started: datetime
    seconds: float
    machine: dict[str, Any]
    software: dict[str, Any]
    ceilings: dict[str, Any]
    cases: tuple[Case, ...]
    missing: tuple[tuple[str, str], ...]

    @property
    def stem(self) -> str:
        return self.path.name.removesuffix(".json")

    def questions(self, *sections: str) -> list[Question]:
        """The timed cases of some sections by question, in the order of the file."""
        found: dict[tuple, list[Case]] = {}
        for case in self.cases:
            if case.seconds and case.section in sections:
                found.setdefault(case.question, []).append(case)
        return [Question(tuple(cases)) for cases in found.values()]

    def limit_share(self, case: Case) -> tuple[float, str] | None:
        """What a case reaches of the measured bandwidth or of the matrix rate, whichever is more, and which it is.

        None where neither bytes nor FLOPs were counted.
        """
        shares = []
        if case.seconds and case.bytes:
            shares.append((case.bytes / case.seconds.median / self.ceilings["copy_bytes_per_second"], "bandwidth"))
        rate = self.ceilings["flops_per_second"].get(RATE_OF.get(case.computes_in, case.computes_in))
        if case.seconds and case.flops and rate:
            shares.append((case.flops / case.seconds.median / rate, "matrix rate"))
        return max(shares, default=None)


def read(path: Path | str) -> Run:
    """Read a result file.

    Raises:
        ValueError: if it is no result file of the version that this code reads; the message names file and field.
        OSError: if it cannot be opened.
    """
    path = Path(path)
    fields = _Fields(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=fields.refuse_constant)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}. {HELP}") from error
    if not isinstance(content, dict):
        fields.fail("the file", content, "an object")
    schema = content.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise ValueError(
            f"{path}: schema is {schema!r}, this code reads {SCHEMA}. Use the version of minimagen_fast that wrote the"
            " file, or measure again with `minimagen-fast bench run`"
        )
    cases = [_case(fields, f"cases[{n}]", case) for n, case in enumerate(fields.get(content, "", "cases", list))]
    seen: set[str] = set()
    for n, case in enumerate(cases):
        if case.id in seen:
            fields.fail(f"cases[{n}].id", case.id, "the id of no other case")
        seen.add(case.id)
    missing = []
    for n, entry in enumerate(fields.get(content, "", "missing", list)):
        missing.append(tuple(fields.get(entry, f"missing[{n}].", key, str) for key in ("what", "why")))
    return Run(
        path,
        fields.get(content, "", "profile", str),
        fields.get(content, "", "complete", bool),
        _started(fields, content),
        fields.number(content, "", "seconds"),
        _machine(fields, fields.get(content, "", "machine", dict)),
        _software(fields, fields.get(content, "", "software", dict)),
        _ceilings(fields, fields.get(content, "", "ceilings", dict)),
        tuple(cases),
        tuple(missing),
    )


HELP = "Give a file that `minimagen-fast bench run` wrote, unchanged"
_KINDS = {str: "a string", bool: "true or false", int: "a whole number", list: "a list", dict: "an object"}


class _Fields:
    """Takes fields out of JSON objects, each of the kind that it must be. ``where`` is the way to the object."""

    def __init__(self, path: Path):
        self._path = path

    def fail(self, field: str, value: Any, allowed: str):
        shown = repr(value)
        shown = shown if len(shown) < 80 else f"{shown[:76]} ..."
        raise ValueError(f"{self._path}: {field} must be {allowed}; it is {shown}. {HELP}")

    def refuse_constant(self, word: str):
        raise ValueError(f"{self._path}: {word} stands where a finite number must be. {HELP}")

    def get(self, parent: Any, where: str, key: str, kind: type, *, optional: bool = False) -> Any:
        if not isinstance(parent, dict):
            self.fail(where.rstrip("."), parent, "an object")
        if key not in parent:
            raise ValueError(f"{self._path}: {where}{key} is missing. {HELP}")
        value = parent[key]
        if value is None and optional:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.fail(where + key, value, _KINDS[kind] + (" or null" if optional else ""))
        return value

    def count(self, parent: Any, where: str, key: str) -> int | None:
        value = self.get(parent, where, key, int, optional=True)
        if value is not None and value < 0:
            self.fail(where + key, value, "a whole number of at least 0, or null")
        return value

    def number(self, parent: Any, where: str, key: str, *, optional: bool = False, zero: bool = True) -> float | None:
        value = parent.get(key) if isinstance(parent, dict) else None
        if value is None and (optional and key in parent):
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, float) or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            least = "of at least 0" if zero else "above 0"
            self.fail(where + key, value, f"a number {least}" + (", or null" if optional else ""))
        return value

    def choice(
        self, parent: Any, where: str, key: str, allowed: Iterable[str], *, optional: bool = False
    ) -> str | None:
        value = self.get(parent, where, key, str, optional=optional)
        if value is not None and value not in allowed:
            self.fail(where + key, value, f"one of {', '.join(allowed)}" + (", or null" if optional else ""))
        return value


def _started(fields: _Fields, content: dict[str, Any]) -> datetime:
    text = fields.get(content, "", "started", str)
    try:
        started = datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not know the Z
    except ValueError:
        started = None
    if started is None or started.tzinfo is None:
        fields.fail("started", text, "a date and time in ISO 8601 with its time zone")
    return started


def _machine(fields: _Fields, machine: dict[str, Any]) -> dict[str, Any]:
    where = "machine."
    fields.get(machine, where, "device", str)
    fields.choice(machine, where, "type", ("cuda", "cpu"))
    for key in ("threads", "cores"):
        fields.get(machine, where, key, int)
    fields.number(machine, where, "memory_gib")
    fields.get(machine, where, "driver", str, optional=True)
    clocks = fields.get(machine, where, "clocks", dict, optional=True) or {}
    for key in clocks:
        fields.number(clocks, where + "clocks.", key)
    fields.get(machine, where, "capability", list, optional=True)
    return machine


def _software(fields: _Fields, software: dict[str, Any]) -> dict[str, Any]:
    where = "software."
    for key in ("python", "torch", "minimagen_fast"):
        fields.get(software, where, key, str)
    for key in ("triton", "cuda", "commit"):
        fields.get(software, where, key, str, optional=True)
    fields.get(software, where, "dirty", bool, optional=True)
    peers = fields.get(software, where, "peers", dict)
    for key in peers:
        fields.get(peers, where + "peers.", key, str, optional=True)
    return software


def _ceilings(fields: _Fields, ceilings: dict[str, Any]) -> dict[str, Any]:
    fields.number(ceilings, "ceilings.", "copy_bytes_per_second", zero=False)
    rates = fields.get(ceilings, "ceilings.", "flops_per_second", dict)
    for key in ("float32", "bfloat16", *rates):
        fields.number(rates, "ceilings.flops_per_second.", key, zero=False)
    return ceilings


def _case(fields: _Fields, place: str, case: Any) -> Case:
    where = f"{place}."
    status = fields.choice(case, where, "status", STATUSES)
    seconds = _spread(fields, where + "seconds.", fields.get(case, where, "seconds", dict, optional=True))
    reason = fields.get(case, where, "reason", str, optional=True)
    if status == "ok" and seconds is None:
        fields.fail(where + "seconds", None, "an object, as the status is 'ok'")
    if status != "ok" and seconds is not None:
        fields.fail(where + "seconds", case["seconds"], f"null, as the status is {status!r}")
    if status != "ok" and not reason:
        fields.fail(where + "reason", reason, f"a string, as the status is {status!r}")
    families = fields.get(case, where, "floor_by_family", dict, optional=True)
    for key in families or ():
        fields.number(families, where + "floor_by_family.", key)
    return Case(
        id=fields.get(case, where, "id", str),
        section=fields.choice(case, where, "section", SECTIONS),
        name=fields.get(case, where, "name", str),
        direction=fields.choice(case, where, "direction", DIRECTIONS, optional=True),
        shape=fields.get(case, where, "shape", str),
        dtype=fields.get(case, where, "dtype", str),
        variant=fields.get(case, where, "variant", str),
        graph=fields.get(case, where, "graph", bool),
        status=status,
        reason=reason,
        seconds=seconds,
        floor_seconds=fields.number(case, where, "floor_seconds", optional=True),
        floor_by_family=families,
        beside=_beside(fields, where, case, seconds),
        extra=fields.get(case, where, "extra", dict),
        **{key: fields.count(case, where, key) for key in ("bytes", "flops", "peak_bytes", "launches")},
    )


def _beside(fields: _Fields, where: str, case: dict[str, Any], own: Spread | None) -> Beside | None:
    # Files of before there was such a thing have no such field.
    beside = fields.get({"beside": None, **case}, where, "beside", dict, optional=True)
    if beside is None:
        return None
    where += "beside."
    seconds = _spread(fields, where + "seconds.", fields.get(beside, where, "seconds", dict))
    if own is None or len(seconds.samples) != len(own.samples):
        fields.fail(where + "seconds.samples", list(seconds.samples), "as many as the case's own")
    return Beside(fields.get(beside, where, "variant", str), seconds)


def _spread(fields: _Fields, where: str, seconds: dict[str, Any] | None) -> Spread | None:
    if seconds is None:
        return None
    values = {key: fields.number(seconds, where, key, zero=False) for key in ("median", "q1", "q3", "min")}
    if not values["min"] <= values["q1"] <= values["median"] <= values["q3"]:
        fields.fail(where.rstrip("."), values, "in the order min, q1, median, q3")
    samples: Sequence[Any] = fields.get(seconds, where, "samples", list)
    if not samples:
        fields.fail(where + "samples", samples, "a list of at least one number")
    numbered = {f"samples[{n}]": value for n, value in enumerate(samples)}
    return Spread(**values, samples=tuple(fields.number(numbered, where, key, zero=False) for key in numbered))
