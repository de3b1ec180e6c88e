"""The checkpoints that a training goes on from: sharded, written beside the training, whole or not there.

A folder ``checkpoints/`` holds folders ``step_000001200``, each the state after so many optimizer steps:

- the tensors, as ``torch.distributed.checkpoint`` writes them: every rank its own share, to be read by any number of
  ranks;
- ``values.pth``: everything that is no tensor of the model, and ``rank_00000.pth``: what each rank has for itself;
- ``manifest.json``: the size and SHA-256 digest of every file, and which training it is of. It is written last.

A checkpoint is written into a folder ``.step_000001200.part``, which is renamed when all of it is on the disk; only
then does the file ``latest`` name it. Whatever ends the writing leaves the earlier ones as they were.
Where several trainings have written into one folder, none removes or continues what is another's.

Nothing that is read can run code: the tensors' index, a pickle, is looked through first, see :mod:`.checkpoint_index`.
"""

import json
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from . import checkpoint
from .checkpoint_index import read_index
from .files import file_digest, file_fault, replace_file, sync_folder, system_error
from .interrupts import uninterrupted
from .ranks import Ranks

__all__ = ["Saved", "SnapshotError", "Snapshots"]

FORMAT, VERSION = "minimagen_fast training checkpoint", 1
# That one process is taken for all where there is only one; from the writing thread, so for all threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
MANIFEST, LATEST, VALUES = "manifest.json", "latest", "values.pth"
_NAME = re.compile(r"step_(\d{9,})(?:_(\d+))?")


class SnapshotError(OSError):
    """A checkpoint could not be written. Those before it are whole."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found whole.

    Attributes:
        path: Its folder.
        step: Number of optimizer steps.
        values: What was saved as values.
        own: What this rank saved for itself; None if it was not there, because there were fewer ranks.
    """

    path: Path
    step: int
    values: dict[str, Any]
    own: dict[str, Any] | None

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor in it.

        Raises:
            ValueError: Its index holds anything else.
        """
        return read_index(self.path)

    def read_into(self, tensors: dict[str, Tensor], ranks: Ranks) -> None:
        """Fills tensors, plain or sharded in whatever way, with what was saved under their names; on all ranks."""
        read_index(self.path)  # which torch would read with pickle, whatever it holds
        dcp.load(tensors, checkpoint_id=self.path, no_dist=ranks.size == 1)


class Snapshots:
    """The checkpoints of a training directory.

    Args:
        folder: The folder ``checkpoints``; made when the first is written.
        ranks: The ranks, all of which must do the same. They share the file system.
        keep_last: How many of the newest to keep.
        keep_every: Also keep those whose step is a multiple of this.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep_last: int = 2, keep_every: int | None = None) -> None:
        self.folder = folder
        self._ranks = ranks
        self._keep_last, self._keep_every = keep_last, keep_every
        self._group: dist.ProcessGroup | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._continued: Path | None = None
        self._training = uuid.uuid4().hex  # until one is continued

    # Writing

    def save(self, step: int, tensors: dict[str, Tensor], values: dict[str, Any], own: dict[str, Any]) -> None:
        """Copies the state and has it written while the training goes on, once the one before is finished.

        Args:
            step: Number of optimizer steps.
            tensors: The tensors by name, plain (the same on all ranks) or DTensors.
            values: What else belongs to the state, for :func:`.checkpoint.save`; rank 0's is taken.
            own: What belongs to this rank alone.

        Raises:
            SnapshotError: this one could not be begun, or the one before could not be written.
        """
        self.finish()
        error: OSError | None = None
        name = self._ranks.from_first(self._free_name(step) if self._ranks.first else None)
        part = self.folder / f".{name}.part"
        try:
            if self._ranks.first:
                self._clear_away()
                part.mkdir(parents=True)
            self._ranks.wait()
            part.mkdir(parents=True, exist_ok=True)
            checkpoint.save(own, part / _own_name(self._ranks.rank))
            if self._ranks.first:
                checkpoint.save(values, part / VALUES)
        except (OSError, RuntimeError) as failure:
            error = failure if isinstance(failure, OSError) else OSError(str(failure))
        if self._ranks.sum([error is not None])[0]:
            self._abandon(part)
            raise SnapshotError(f"no checkpoint could be written to {self.folder}: {_why(error)}")
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            # Of its own: what the writing thread sends must not come between what the training sends.
            if self._ranks.size > 1:
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._ranks.timeout))
        with uninterrupted():  # what writes must be known to whoever saves next
            written = dcp.async_save(
                tensors, checkpoint_id=part, process_group=self._group, no_dist=self._ranks.size == 1
            )
            assert isinstance(written, Future)
            self._pending = self._thread.submit(self._complete, written, part, self.folder / name, step)

    @property
    def failed(self) -> bool:
        """Whether the last one could not be written; :meth:`finish` raises why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def finish(self) -> None:
        """Waits until what was begun is on the disk.

        Raises:
            SnapshotError: it could not be written. All ranks raise it.
        """
        error = self._pending.exception() if self._pending is not None else None
        # Not before: a wait that Ctrl-C ends is to be taken up again by whoever saves next.
        self._pending = None
        if self._ranks.sum([error is not None])[0]:
            free = shutil.disk_usage(self.folder).free / 2**20
            raise SnapshotError(
                f"a checkpoint could not be written to {self.folder}, where {free:,.0f} MiB are free:"
                f" {_why(error)}. The checkpoints before it are whole"
            ) from error

    def _complete(self, written: Future, part: Path, path: Path, step: int) -> None:
        """Makes a checkpoint of what has been written: rank 0, when all ranks have."""
        try:
            written.result()
            if not self._ranks.first:
                return
            files = [
                {"name": file.name, "bytes": file.stat().st_size, "sha256": file_digest(file)}
                for file in sorted(part.iterdir())
            ]
            manifest = {"format": FORMAT, "version": VERSION, "training": self._training, "step": step}
            manifest |= {"ranks": self._ranks.size, "files": files}
            replace_file(part / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
            part.rename(path)
            sync_folder(self.folder)
            replace_file(self.folder / LATEST, f"{path.name}\n".encode())
            self._remove_old(path)
        except BaseException:  # which is what torch's CheckpointException is
            self._abandon(part)
            raise

    def _abandon(self, part: Path) -> None:
        if self._ranks.first:
            shutil.rmtree(part, ignore_errors=True)  # the error before it is the one to tell

    def _clear_away(self) -> None:
        """Removes what was never finished."""
        for path in self.folder.glob(".step_*.part"):
            shutil.rmtree(path)

    def _free_name(self, step: int) -> str:
        # After a restart the same step may be saved again, and the one before is good until then. The newest of them
        # has the highest number, also where the first ones have been removed.
        taken = (_order(path) for path in self.folder.glob("step_*") if _NAME.fullmatch(path.name))
        numbers = [number for saved, number in taken if saved == step]
        return f"step_{step:09d}_{max(numbers) + 1}" if numbers else f"step_{step:09d}"

    def _remove_old(self, newest: Path) -> None:
        others = [path for path in self._own() if path != newest]
        # What came after the one that was continued is damaged, or was done over.
        later = [path for path in others if self._continued is not None and _order(path) > _order(self._continued)]
        self._continued = None
        kept = [newest, *(path for path in others if path not in later)]
        number, every = max(self._keep_last, 1), self._keep_every
        # A training that had ended, or was stopped there, saves the same step again whenever it is started.
        steps = {_step(path) for path in kept[:number]}
        for path in kept[number:]:
            step = _step(path)
            if every is None or step % every or step in steps:
                _remove(path)
            steps.add(step)
        for path in later:
            _remove(path)

    def remove_all(self) -> None:
        """Removes the checkpoints of the training whose newest was read, or that this has written; on one process."""
        for path in self._own():
            _remove(path)

    def _own(self) -> list[Path]:
        """The checkpoints but those that are of another training for sure."""
        return [path for path in self._all() if _training(path) in (None, self._training)]

    def _all(self) -> list[Path]:
        """The folders of all checkpoints, the newest first."""
        if not self.folder.is_dir():
            return []
        # Not what users put beside them, such as a copy step_000000010_backup.
        named = (path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
        return sorted(named, key=_order, reverse=True)

    # Reading

    def steps(self) -> list[int]:
        """Numbers of optimizer steps of the checkpoints that are there, whole or not, the highest first."""
        return [_step(path) for path in self._all()]

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, on all ranks; None if there is no checkpoint. Damaged ones are named.

        It is taken for the one that is continued: those of later steps go when the next one is written. Of several
        trainings the one that wrote last counts.

        Raises:
            ValueError: there are checkpoints of that training, but none is whole.
        """
        damaged: list[str] = []
        for path in self._ranks.from_first([str(path) for path in self._candidates()] if self._ranks.first else None):
            fault = self._fault(Path(path))
            if fault is None:
                if damaged and self._ranks.first:
                    warnings.warn(f"{'; '.join(damaged)}: {path} is used instead", stacklevel=2)
                self._continued = Path(path)
                self._training = _training(Path(path)) or self._training
                return self._open(Path(path))
            damaged.append(f"the checkpoint {path} is damaged ({fault})")
        if damaged:
            raise ValueError(
                f"{'; '.join(damaged)}. No other of this training is left in {self.folder}: start the training anew"
            )
        return None

    def _candidates(self) -> Iterator[Path]:
        pointer = self.folder / LATEST
        # Whatever stands in it: what it names is looked for among those that are there.
        text = pointer.read_bytes().decode("utf-8", "replace") if pointer.is_file() else ""
        named = self.folder / text.strip()
        paths = self._all()
        if named in paths:
            paths.remove(named)
            paths.insert(0, named)
        last = _training(paths[0]) if paths else None
        yield from (path for path in paths if last is None or _training(path) in (None, last))

    def _fault(self, path: Path) -> str | None:
        """What is wrong with a checkpoint. The ranks share the reading, and all get the same answer."""
        manifest = path / MANIFEST
        try:
            recorded = json.loads(manifest.read_text(encoding="utf-8"))
            files = [(path / entry["name"], entry["bytes"], entry["sha256"]) for entry in recorded["files"]]
            kind = recorded["format"], recorded["version"]
            needed = [VALUES, *(_own_name(rank) for rank in range(recorded["ranks"]))]
        except FileNotFoundError:
            return f"there is no {MANIFEST}"
        except (ValueError, KeyError, TypeError):
            return f"{MANIFEST} cannot be read"
        if kind != (FORMAT, VERSION):
            return f"it is a {kind[0]}, version {kind[1]}; this package reads a {FORMAT}, version {VERSION}"
        if missing := [name for name in needed if path / name not in [file for file, *_ in files]]:
            return f"there is no {missing[0]}"
        mine = files[self._ranks.rank :: self._ranks.size]
        faults = [f"{file.name}: {fault}" for file, *record in mine if (fault := file_fault(file, *record))]
        if not self._ranks.sum([len(faults)])[0]:
            return None
        return faults[0] if faults else "another rank found a damaged file"

    def _open(self, path: Path) -> Saved:
        step = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["step"]
        own = path / _own_name(self._ranks.rank)
        return Saved(path, step, checkpoint.load(path / VALUES), checkpoint.load(own) if own.is_file() else None)


def _why(error: BaseException | None) -> str:
    """What has gone wrong, in words: the system's, where it was the system, which torch's writer hides."""
    if error is None:
        return "see the other ranks"
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return "; ".join(sorted({str(system_error(cause) or cause) for cause in causes}))


def _remove(path: Path) -> None:
    # Not a checkpoint from its first missing file on.
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def _training(path: Path) -> str | None:
    """Which training a checkpoint is of; None where that cannot be read, or was not written yet."""
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))["training"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _own_name(rank: int) -> str:
    return f"rank_{rank:05d}.pth"


def _order(path: Path) -> tuple[int, int]:
    name = _NAME.fullmatch(path.name)
    assert name is not None
    return int(name[1]), int(name[2] or 0)


def _step(path: Path) -> int:
    return _order(path)[0]
