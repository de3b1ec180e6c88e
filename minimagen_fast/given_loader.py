"""Data loaders that users have made, as the trainer reads them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from . import checkpoint
from .ranks import Ranks

__all__ = ["GivenLoader", "failures_of"]


class GivenLoader:
    """An iterable of batches, such as a ``DataLoader``; on one process.

    Its order comes from torch's global random numbers or from its own generators.

    Args:
        loader: The iterable. A ``DataLoader`` goes on in the middle of an epoch without reading what was done.
    """

    def __init__(self, loader: Iterable) -> None:
        self.loader = loader
        self.generators = checkpoint.loader_generators(loader)

    @property
    def dataset(self) -> Any:
        return getattr(self.loader, "dataset", None)

    @property
    def batches_in_epoch(self) -> int | None:
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except TypeError:  # a loader of an iterable data set has __len__ and yet no length
            return None

    @property
    def samples(self) -> int | None:
        """Number of samples of the data set; None if nobody knows."""
        try:
            return len(self.dataset)
        except TypeError:
            return None

    @property
    def layout(self) -> dict[str, int]:
        """What says which samples are in which batch, besides their order, as far as that is known."""
        size = getattr(self.loader, "batch_size", None)
        return {"batch size": size} if isinstance(size, int) else {}

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, torch.Tensor] | None]:
        return checkpoint.iterate_from(self.loader, start)


def failures_of(ranks: Ranks, *loaders: Any) -> list[str]:
    """What the data sets of loaders, also behind a ``Subset``, count in `failures`; in words, each data set once.

    What loaders count themselves is summed over the ranks, all of which must call this.
    """
    counting = {}
    own: Counter[str] = Counter()
    for loader in loaders:
        own.update(getattr(loader, "failures", {}))
        dataset = getattr(loader, "dataset", None)
        while dataset is not None and not hasattr(dataset, "failures"):
            dataset = getattr(dataset, "dataset", None)
        # Training and validation are often parts of one data set, which has one count.
        if dataset is not None and dataset.failures:
            counting[id(dataset)] = dataset
    own = sum(ranks.from_all(own), Counter())
    told = [f"images that could not be had: {dict(own)}"] if own else []
    return told + [f"images of {type(dataset).__name__}: {dataset.failures}" for dataset in counting.values()]
