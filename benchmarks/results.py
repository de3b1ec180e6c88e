"""The result file of a run: one JSON, rewritten after every case, so that a run that was stopped leaves what it has."""

import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

SCHEMA = 1
FOLDER = Path(__file__).resolve().parent / "results"
SECTIONS = ("sampling-step", "denoiser", "kernels", "sampling", "few-steps", "training", "ablation", "startup")
STATUSES = ("ok", "parity_failed", "unavailable", "error")


@dataclass(frozen=True)
class Identity:
    """What a case measures. Cases that differ in the variant alone answer the same question.

    Attributes:
        section: One of ``SECTIONS``.
        name: What is measured: an operation, a network.
        direction: 'forward', 'backward', 'both', or None where there is no such thing.
        shape: Sizes, in a word.
        dtype: Of inputs and weights.
        variant: Who does it and how: 'ours', 'reference', a peer.
        graph: Whether it is replayed as a CUDA graph.
    """

    section: str
    name: str
    direction: str | None
    shape: str
    dtype: str
    variant: str
    graph: bool = False

    def __post_init__(self):
        assert self.section in SECTIONS, self.section

    @property
    def id(self) -> str:
        words = (self.section, self.name, self.direction, self.shape, self.dtype, self.variant)
        return "/".join(word for word in words if word) + ("/graph" if self.graph else "")


@dataclass
class Record:
    """What was found out about a case.

    Attributes:
        identity: Which case.
        status: One of ``STATUSES``.
        reason: Why it is not 'ok'.
        samples: Seconds of one call each.
        bytes: The least that a call must move between memory and chip.
        flops: Floating-point operations of a call, a multiplication and an addition counted as two.
        floor_seconds: The least time that this machine can need, see :mod:`.floors`.
        floor_by_family: The same by kind of operation; sums to it.
        peak_bytes: Most memory that a call had allocated at one time, its inputs aside; where it replays a CUDA graph,
            that of the same call without.
        launches: Kernels that a call starts on the device.
        beside: A peer's variant, and its seconds of one call each, taken in turn with ``samples``.
        extra: Whatever else is worth knowing, by name.
    """

    identity: Identity
    status: str = "ok"
    reason: str | None = None
    samples: Sequence[float] = ()
    bytes: int | None = None
    flops: int | None = None
    floor_seconds: float | None = None
    floor_by_family: dict[str, float] | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    beside: tuple[str, Sequence[float]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        values = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("identity", "samples", "beside")
        }
        beside = self.beside and {"variant": self.beside[0], "seconds": spread(self.beside[1])}
        seconds = {"seconds": spread(self.samples), "beside": beside}
        return {"id": self.identity.id, **asdict(self.identity), **values, **seconds}


def spread(samples: Sequence[float]) -> dict[str, Any] | None:
    """Median, quartiles, least and all of some samples; None of none."""
    if not samples:
        return None
    q1, _, q3 = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (samples[0],) * 3
    return {"median": median(samples), "q1": q1, "q3": q3, "min": min(samples), "samples": list(samples)}


def file_name(profile: str, date: datetime, software: dict[str, Any]) -> str:
    """What a run's file is called: profile, date, commit, and whether the code was really that of the commit."""
    commit = (software["commit"] or "unknown") + ("-dirty" if software["dirty"] else "")
    return f"{profile}-{date:%Y-%m-%d}-{commit}.json"


def _free(path: Path) -> Path:
    """The path, or one beside it, of nothing that is there."""
    names = itertools.chain([path], (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


class ResultFile:
    """A run's results, on disk from the start.

    Args:
        path: The JSON file; folders on the way to it are made. Where something of that name is, -2 is added, or the
            first number that is free.
        header: What is known before the first case: profile, start, machine, software, ceilings.

    Attributes:
        path: Where the results really are.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = _free(path)
        self._content: dict[str, Any] = {
            "schema": SCHEMA,
            **header,
            "complete": False,
            "seconds": 0.0,
            "cases": [],
            "missing": [],
        }
        self._write()

    @property
    def recorded(self) -> set[str]:
        """The ids of the cases so far."""
        return {case["id"] for case in self._content["cases"]}

    def add(self, record: Record, seconds: float) -> None:
        """Add a case; ``seconds`` is the time since the start of the run."""
        self._content["cases"].append(record.as_dict())
        if record.status == "unavailable":
            self._content["missing"].append({"what": record.identity.id, "why": record.reason})
        self._content["seconds"] = seconds
        self._write()

    def add_missing(self, what: str, why: str) -> None:
        """Say of something that was not even tried why not."""
        self._content["missing"].append({"what": what, "why": why})
        self._write()

    def finish(self, complete: bool, seconds: float) -> None:
        """Note the end of the run, and whether every case of the profile has its record, be it why it is not timed."""
        self._content["complete"] = complete
        self._content["seconds"] = seconds
        self._write()

    def _write(self) -> None:
        # A reader, or a crash half way, never meets half a file.
        descriptor, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._content, file, indent=1, allow_nan=False)
                file.write("\n")
            os.chmod(name, 0o644)
            os.replace(name, self.path)
        finally:
            # There only if it did not take its place.
            Path(name).unlink(missing_ok=True)
