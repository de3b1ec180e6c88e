"""What batches are made of, whichever way data is read: chance, order, failures, worker processes."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .arguments import whole_number
from .data import MinimagenCollator

# Fewer samples than this say little about their share of bad ones.
LEAST_SAMPLES = 50
# What one stream of random numbers is for: without it, those of an epoch would be those of its item 0.
_ORDER, _ITEM = 1, 2

Batch = dict[str, Tensor]


class Problem(NamedTuple):
    """An error for the user, on its way out of a worker process as it is."""

    kind: type[Exception]
    message: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> "Problem":
        """What was raised; in the process that was asked it goes on at once."""
        if get_worker_info() is None:
            raise error
        return cls(ValueError if isinstance(error, ValueError) else OSError, str(error), traceback.format_exc())

    def again(self) -> Exception:
        """The error to raise."""
        error = self.kind(self.message)
        error.__cause__ = RuntimeError(f"in a worker process:\n{self.trace}")
        return error


class Loaded(NamedTuple):
    """What has become of the samples of a batch."""

    batch: Batch | None
    seen: int
    reasons: list[str]
    problem: Problem | None = None


def collate(results: Sequence[Any]) -> Loaded:
    """A batch of (id, item or the reason why there is none), see :class:`.data.MinimagenCollator`."""
    for result in results:
        if isinstance(result, Problem):
            return Loaded(None, 0, [], result)
    had, reasons = [], []
    for id_, item in results:
        if isinstance(item, dict) and item["image"] is not None:
            had.append({**item, "id": id_})
        else:
            reasons.append(item if isinstance(item, str) else "missing")
    return Loaded(MinimagenCollator("cpu")(had), len(results), reasons)


class Tally:
    """Counts what could not be had, and ends an epoch where that is too much.

    Args:
        max_bad_fraction: Largest share of the samples of an epoch that may not be had; None for any.

    Raises:
        ValueError: if that is not from 0 to 1.
    """

    def __init__(self, max_bad_fraction: float | None):
        if max_bad_fraction is not None and not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"MAX_BAD_FRACTION must be from 0 to 1, or None for no bound, got {max_bad_fraction}")
        self.bound = max_bad_fraction
        self.failures: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """A new epoch, of which nothing has been seen."""
        self._seen, self._now = 0, Counter[str]()

    def passed(self, loaded: Loaded, device: torch.device) -> Batch | None:
        """The batch, on its device, if all is well."""
        if loaded.problem is not None:
            raise loaded.problem.again()
        self._seen += loaded.seen
        self._now.update(loaded.reasons)
        self.failures.update(loaded.reasons)
        bad = self._now.total()
        if self.bound is not None and self._seen >= LEAST_SAMPLES and bad > self.bound * self._seen:
            causes = ", ".join(f"{name}: {count}" for name, count in self._now.most_common())
            raise ValueError(
                f"{bad} of {self._seen} samples of this epoch could not be had ({causes}), which is more than"
                f" MAX_BAD_FRACTION={self.bound} allows: mend the data, or allow more"
            )
        if loaded.batch is None:
            return None
        return {name: value.to(device, non_blocking=True) for name, value in loaded.batch.items()}


def checked_numbers(batch_size: int, seed: int, rank: int, ranks: int, num_workers: int) -> tuple[int, ...]:
    """These numbers, in this order, that can be used together.

    Raises:
        TypeError: if one is no int.
        ValueError: if they cannot.
    """
    batch_size, seed, rank, ranks, num_workers = (
        whole_number(name, value, least=least)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("rank", rank, 0),
            ("ranks", ranks, 1),
            ("num_workers", num_workers, 0),
        )
    )
    if rank >= ranks:
        raise ValueError(f"rank must be from 0 to {ranks - 1}, got {rank}")
    if batch_size % ranks:
        raise ValueError(
            f"the global batch of {batch_size} cannot be divided equally among {ranks} ranks: use a multiple of {ranks}"
        )
    return batch_size, seed, rank, ranks, num_workers


def check_start(epoch: int, start: int) -> None:
    """See that an epoch can be begun there.

    Raises:
        ValueError: if it cannot.
    """
    if epoch < 0 or start < 0:
        raise ValueError(f"epoch and start must be at least 0, got {epoch} and {start}")


def worker_options(
    num_workers: int, prefetch_factor: int | None, pin_memory: bool, multiprocessing_context: str | None
) -> dict[str, Any]:
    """The options of a DataLoader that belong to its processes; those that nothing would follow from are left out."""
    options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory and torch.cuda.is_available()}
    if num_workers > 0:
        options |= {"prefetch_factor": prefetch_factor, "multiprocessing_context": multiprocessing_context}
        options["worker_init_fn"] = leave_signals_to_the_training
    return options


def leave_signals_to_the_training(worker: int) -> None:
    """In a worker process: of the signals that ask for a stop, only its parent's SIGTERM ends it.

    Launchers send them to all processes of a training, which is to finish its step and save: it needs its workers. Of
    workers that are not forked libraries may have threads by now, which a SIGTERM still reaches: fork is the default.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    # Of those that can be told who has sent a signal: torch's handler ends the worker on anybody's, no handler at all
    # would have the parent wait for ever for one that hangs.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for, args=(_parent(), os.getppid()), daemon=True).start()


def _parent() -> int | None:
    """Of a worker process the one that started it, or had it started: a fork server forks for others."""
    parent = multiprocessing.parent_process()
    return None if parent is None else parent.pid


def _end_for(parent: int | None, forked_by: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent and os.getppid() == forked_by:
        pass
    os._exit(0)


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in an epoch, int64, shape (count,), the same everywhere and for ever.

    They are sorted by random keys from the counter-based generator Philox (Salmon et al., "Parallel random numbers: as
    easy as 1, 2, 3", 2011), whose numbers NumPy keeps from version to version, unlike its shuffling.
    """
    keys = np.random.Philox(np.random.SeedSequence((_ORDER, seed, epoch))).random_raw(count)
    return np.argsort(keys, kind="stable")


def chances(seed: int, epoch: int, index: int) -> list[float]:
    """Three numbers, uniform in [0, 1), for one sample in one epoch."""
    keys = np.random.Philox(np.random.SeedSequence((_ITEM, seed, epoch, index))).random_raw(3)
    return ((keys >> np.uint64(11)) * 2.0**-53).tolist()
