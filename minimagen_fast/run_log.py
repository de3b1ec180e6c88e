"""``log.jsonl`` of a training directory: one JSON object a line, and how to read it back.

Every object has a ``kind``, a ``time`` (seconds since 1970) and a ``step`` (optimizer steps): ``start``, ``step``,
``validation``, ``samples``, ``event``. Numbers that are not finite are null. A process may be killed while it writes a
line, and a continued run repeats the steps after its checkpoint: reading takes care of both.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["LOG", "RunLog", "RunRecords", "read_run"]

LOG = "log.jsonl"
# What a continued run does over; events stay: they have happened.
_REPEATED = ("steps", "validations", "samples")
_LIST_OF = {"start": "starts", "step": "steps", "validation": "validations", "samples": "samples", "event": "events"}
# What a record holds besides.
_FIELDS: dict[str, set[str]] = {
    "start": {"settings", "unets", "ranks", "machine", "versions"},
    "step": {
        *("epoch", "batch", "unets", "grad_norm", "learning_rates", "images", "seconds", "images_per_second"),
        *("seconds_per_step", "data_wait_share", "memory_bytes", "flops_per_second", "mfu", "bad_steps"),
        *("seconds_to_end", "ranks"),
    },
    "validation": {"losses"},
    "samples": {"file"},
    "event": {"text"},
}


class RunLog:
    """Appends lines to a file. One that cannot be written costs a warning, not the training.

    Args:
        path: The file; it is made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cut_off = _is_cut_off(path)
        # Unbuffered: a line is there for readers at once, and what failed is not tried again behind our back.
        self._file = open(path, "ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one object as a line."""
        text = json.dumps(finite(record), allow_nan=False, ensure_ascii=False, default=str)
        line = ("\n" if self._cut_off else "").encode() + text.encode() + b"\n"
        try:
            written = self._file.write(line)
            fault = None if written == len(line) else f"only {written} of {len(line)} bytes could be written"
        except OSError as error:
            fault = str(error)
        self._cut_off = fault is not None
        if fault is not None:
            warnings.warn(f"a line of {self._path} is lost: {fault}. The training goes on", stacklevel=3)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _is_cut_off(path: Path) -> bool:
    """Whether the last line has no end, because its writer was killed."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def finite(value: Any) -> Any:
    """The same, with None for every number in it that is not finite: JSON has no word for those."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


@dataclass
class RunRecords:
    """What the log of a run says, as if it had never been interrupted: of repeated steps the last ones.

    Attributes:
        starts: One record for each process that has begun or continued the run.
        steps: The records of steps, in the order of their steps.
        validations: Those of validations.
        samples: Those of sample grids.
        events: What else happened, all of it, also what was done over.
        unreadable: Number of lines that could not be read.
    """

    starts: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    unreadable: int = 0

    @property
    def last(self) -> dict[str, Any] | None:
        """The record that was written last; None if there is none."""
        every = [record for name in _LIST_OF.values() for record in getattr(self, name)]
        return max(every, key=lambda record: record["time"], default=None)

    def _take(self, record: dict[str, Any]) -> None:
        own = getattr(self, _LIST_OF[record["kind"]])
        if record["kind"] == "start":
            # What lies after the checkpoint that is continued will be done over.
            for name in _REPEATED:
                setattr(self, name, [old for old in getattr(self, name) if old["step"] <= record["step"]])
        elif record["kind"] != "event":
            while own and own[-1]["step"] >= record["step"]:
                own.pop()
        own.append(record)


def read_run(path: str | os.PathLike) -> RunRecords:
    """Reads the log of a run, also of one that is under way.

    Args:
        path: The file, or the training directory that holds it.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LOG
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: name a training directory that `minimagen-fast train` has written a {LOG} to"
        )
    records = RunRecords()
    *lines, unfinished = path.read_bytes().split(b"\n")
    for line in [*lines, unfinished]:
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            # The last one may still be being written.
            records.unreadable += line is not unfinished
            continue
        if _is_record(record):
            records._take(record)
        else:
            records.unreadable += 1
    return records


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("kind") in _LIST_OF
        and isinstance(value.get("step"), int)
        and isinstance(value.get("time"), int | float)
        and value.keys() >= _FIELDS[value["kind"]]
    )
