"""Batches for training on any number of processes, in an order that depends on the seed and the epoch alone."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from .batches import (
    Batch,
    Problem,
    Tally,
    chances,
    check_start,
    checked_numbers,
    collate,
    permutation,
    worker_options,
)
from .captioned import NoItem

__all__ = ["Loader", "ShardedLoader"]


class Loader(Protocol):
    """What a training reads its batches from."""

    @property
    def batches_in_epoch(self) -> int | None:
        """Number of global batches in an epoch, the same on every rank; None if that is unknown."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch | None]:
        """This rank's parts of the global batches of an epoch, from number `start` on.

        Yields:
            'image' (b, 3, s, s) and 'encoding' (b, n, dim), float32, 'mask' (b, n), bool, and, where images have seeds,
            'id' (b,), int64; or None where nothing of the part could be had.
        """
        ...


class ShardedLoader:
    """Batches of a data set that is read by index, divided among the ranks of a training.

    The order of an epoch follows from (`seed`, epoch) alone. A global batch is the next `batch_size` samples of it, and
    each rank has an equal, contiguous part, so that any number of ranks sees the same global batches, nothing comes
    twice and nothing is left out. To start within an epoch, on any number of ranks, reads nothing of what came before.
    Random crops and mirroring follow from (`seed`, epoch, index). No global random generator is drawn from.

    'id' is the index in the data set, behind any ``Subset``.

    Args:
        dataset: A data set with a length whose items are like those of :class:`.captioned.CaptionedPictures`; None for
            a sample that cannot be had.
        batch_size: Samples in a global batch, a multiple of `ranks`.
        seed: Chooses the order, at least 0.
        rank: Number of this process, from 0.
        ranks: Number of processes.
        shuffle: Whether every epoch has an order of its own; else it is that of the data set.
        drop_last: Whether to leave out a last global batch that is smaller. Otherwise it is divided as evenly as it can
            be, and a rank may have None of it.
        num_workers: Processes that read and decode; 0 to do so in this one. They live as long as the loader.
        prefetch_factor: Batches that each of them has ready, 2 if not given.
        pin_memory: Whether to copy batches into page-locked memory; without a CUDA device this does nothing.
        max_bad_fraction: Largest share of samples of an epoch, on this rank, that may not be had; None for any.
        device: Where the batches go.
        multiprocessing_context: How workers are started: 'fork', 'spawn' or 'forkserver', or the system's way.

    Attributes:
        samples: Number of samples of the data set.
        layout: What, besides seed and epoch, says which samples are in which batch, by name.

    Raises:
        TypeError: if the data set cannot be read by index, or a number is no int.
        ValueError: if an argument is out of range, or an index of a ``Subset``, or there is not one batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool = False,
        max_bad_fraction: float | None = None,
        device: torch.device | str = "cpu",
        multiprocessing_context: str | None = None,
    ):
        if isinstance(dataset, IterableDataset):
            raise TypeError(f"a {type(dataset).__name__} cannot be read by index: use minimagen_fast.streams")
        numbers = checked_numbers(batch_size, seed, rank, ranks, num_workers)
        batch_size, seed, rank, ranks, num_workers = numbers
        self.batch_size, self.seed, self.rank, self.ranks = batch_size, seed, rank, ranks
        self.shuffle = shuffle
        self.layout = {"batch size": batch_size}
        self.device = torch.device(device)
        base, self._indices = _behind_subsets(dataset)
        self.samples = len(self._indices)
        whole, rest = divmod(len(self._indices), batch_size)
        self.batches_in_epoch: int = whole + (rest > 0 and not drop_last)
        if self.batches_in_epoch == 0:
            raise ValueError(
                f"{len(self._indices)} samples are less than one batch of {batch_size}: use more pictures or a smaller"
                " BATCH_SIZE"
            )
        self._tally = Tally(max_bad_fraction)
        self._plan = _Plan()
        self._loader = DataLoader(
            _Items(base, seed),
            batch_sampler=self._plan,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(seed % 2**63),
            # What a worker does follows from the index and the epoch it is sent, so it can stay for all epochs.
            persistent_workers=num_workers > 0,
            **worker_options(num_workers, prefetch_factor, pin_memory, multiprocessing_context),
        )

    @property
    def failures(self) -> Counter[str]:
        """How many samples could not be had so far, by cause, on this rank and in all its worker processes."""
        return Counter(self._tally.failures)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch | None]:
        """This rank's parts of the global batches of an epoch, from number `start` on. It ends an epoch begun before.

        Args:
            epoch: Number of the epoch, from 0.
            start: Number of the first batch, from 0 to `batches_in_epoch`.

        Raises:
            ValueError: if a number is out of range, or, while it is read, if too many samples cannot be had.
        """
        check_start(epoch, start)
        if start > self.batches_in_epoch:
            raise ValueError(f"start must be at most {self.batches_in_epoch}, the batches of an epoch, got {start}")
        return self._read(epoch, start)

    def _read(self, epoch: int, start: int) -> Iterator[Batch | None]:
        self._plan.begin(epoch, self._parts(epoch, start))
        run = self._plan.runs
        self._tally.begin()
        for loaded in self._loader:
            yield self._tally.passed(loaded, self.device)
            if self._plan.runs != run:
                raise RuntimeError("another epoch of this loader has been begun: read one at a time")

    def _parts(self, epoch: int, start: int) -> Iterator[np.ndarray]:
        order = self._indices
        if self.shuffle:
            order = order[permutation(len(order), self.seed, epoch)]
        for number in range(start, self.batches_in_epoch):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield batch[self.rank * len(batch) // self.ranks : (self.rank + 1) * len(batch) // self.ranks]


class _Plan:
    """The keys of the batches to come, changed from epoch to epoch under a DataLoader that stays."""

    def __init__(self) -> None:
        self.runs = 0
        self._keys: Iterator[list[tuple[int, int]]] = iter(())

    def begin(self, epoch: int, parts: Iterator[np.ndarray]) -> None:
        self.runs += 1
        self._keys = ([(epoch, index) for index in part.tolist()] for part in parts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._keys


class _Items(Dataset):
    """(index, item or the reason why there is none), by epoch and index."""

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        try:
            if not hasattr(self.dataset, "item"):
                return index, self.dataset[index]
            return index, self.dataset.item(index, chances(self.seed, epoch, index))
        except NoItem as error:
            return index, error.reason
        except (ValueError, OSError) as error:
            return Problem.of(error)


def _behind_subsets(dataset: Any) -> tuple[Any, np.ndarray]:
    """The data set behind any ``Subset``, and which of its indices to take."""
    indices = np.arange(len(dataset))
    while type(dataset) is Subset:
        indices = np.asarray(dataset.indices, dtype=np.int64)[indices]
        dataset = dataset.dataset
        if hasattr(dataset, "__len__"):
            indices = _from_the_start(indices, len(dataset))
    return dataset, indices


def _from_the_start(indices: np.ndarray, length: int) -> np.ndarray:
    """Indices of which some may count from the end, as those of a list do."""
    wrong = indices[(indices < -length) | (indices >= length)]
    if len(wrong):
        raise ValueError(f"a Subset's indices must be from {-length} to {length - 1}, got {wrong[0]}: correct them")
    return np.where(indices < 0, indices + length, indices)
