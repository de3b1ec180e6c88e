"""Batches from data that is read from its beginning to its end: streams of Hugging Face ``datasets``."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .batches import Batch, Loaded, Problem, Tally, chances, check_start, checked_numbers, collate, worker_options
from .caption_store import CaptionStore
from .captioned import CaptionedPictures, Item, NoItem
from .t5 import MAX_LENGTH
from .tables import find_columns, picture_from, undecoded

__all__ = ["StreamedLoader", "StreamedPictures"]

BUFFER_SIZE = 1000


class StreamedPictures(CaptionedPictures, IterableDataset):
    """Captioned pictures in a stream, such as ``load_dataset(..., streaming=True)`` gives.

    Items are like those of :class:`.folders.FolderDataset`. Read it through a :class:`StreamedLoader`; on its own it
    gives its items in the order of the stream, divided among the workers of a ``DataLoader``.

    Args:
        stream: A ``datasets.IterableDataset`` with a column of captions and one of pictures, see
            :func:`.tables.picture_from`.
        side_length: Side length in pixels to scale the pictures to.
        encoder_name: Name of the text encoder, see :func:`.t5.t5_encode_text`.
        max_length: Number of tokens after which a caption is cut off.
        captions: Pre-encoded captions. Those that are not among them are encoded when they are needed.
        crop: 'center' (the default) or 'random': which of the largest squares of a picture to take.
        flip: Whether to mirror every second picture, left to right, at random.
        image_column: The column with the pictures; the first of :data:`.tables.IMAGE_COLUMNS` that there is, if not
            given.
        caption_column: The column with the captions, likewise.

    Raises:
        ValueError: if there are no such columns, or there is nothing in the stream; or if the captions were encoded
            otherwise.
    """

    def __init__(
        self,
        stream: Any,
        *,
        side_length: int,
        encoder_name: str,
        max_length: int = MAX_LENGTH,
        captions: CaptionStore | None = None,
        crop: str | None = None,
        flip: bool = False,
        image_column: str | None = None,
        caption_column: str | None = None,
    ):
        super().__init__(
            side_length=side_length,
            encoder_name=encoder_name,
            max_length=max_length,
            captions=captions,
            crop=crop,
            flip=flip,
        )
        self.stream = undecoded(stream)
        names = stream.column_names
        if names is None:
            first = next(iter(self.stream), None)
            if first is None:
                raise ValueError("there is nothing in the stream")
            names = list(first)
        self.image_column, self.caption_column = find_columns(names, image_column, caption_column)

    def __iter__(self) -> Iterator[Item | None]:
        for example in self.stream:
            try:
                yield self.item(example)
            except NoItem:
                yield None

    def all_captions(self) -> Iterator[str]:
        for example in self.stream:
            caption = example[self.caption_column]
            if isinstance(caption, str):
                yield caption

    def _row(self, key: dict[str, Any]) -> tuple[Any, Any]:
        return key[self.caption_column], key[self.image_column]

    def _picture(self, source: Any) -> Image.Image:
        return picture_from(source)


class StreamedLoader:
    """Batches of a stream, divided among the ranks of a training and their worker processes.

    The files of the stream are shuffled and divided by ``datasets``; where their number is no multiple of `ranks`,
    every rank reads all of them and takes every `ranks`-th sample. Samples are shuffled in a buffer. With the same
    number of ranks and workers, the batches of an epoch follow from (`seed`, epoch) alone. What the workers end with
    that is no whole batch is put together into the last batches. To start within an epoch reads what came before once
    more, but decodes none of the whole batches.

    Nobody knows how many batches a stream has, and ranks may have different numbers: a training must end an epoch on
    all ranks when one of them has no more.

    'id' is a running number, unique in its epoch over all ranks and workers. Which sample that is, only reading the
    same epoch again tells.

    Args:
        dataset: The stream.
        batch_size: Samples in a global batch, a multiple of `ranks`.
        seed: Chooses the order, at least 0.
        rank: Number of this process, from 0.
        ranks: Number of processes.
        shuffle: Whether to shuffle files and samples.
        drop_last: Whether to leave out a last batch that is smaller.
        num_workers: Processes that read and decode, at most as many as there are files for this rank; 0 to do so in
            this one.
        prefetch_factor: Batches that each of them has ready, 2 if not given.
        pin_memory: Whether to copy batches into page-locked memory; without a CUDA device this does nothing.
        max_bad_fraction: Largest share of samples of an epoch, on this rank, that may not be had; None for any.
        device: Where the batches go.
        buffer_size: Samples that are shuffled at a time, in each worker, in main memory as they come.
        multiprocessing_context: How workers are started: 'fork', 'spawn' or 'forkserver', or the system's way.

    Attributes:
        batches_in_epoch: None.
        layout: What, besides seed and epoch, says which samples are in which batch, by name.

    Raises:
        TypeError: if the data is no stream, or a number is no int.
        ValueError: if an argument is out of range.
    """

    batches_in_epoch: int | None = None

    def __init__(
        self,
        dataset: StreamedPictures,
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
        buffer_size: int = BUFFER_SIZE,
        multiprocessing_context: str | None = None,
    ):
        if not isinstance(dataset, StreamedPictures):
            raise TypeError(f"a StreamedPictures is needed, got a {type(dataset).__name__}: use a ShardedLoader for it")
        numbers = checked_numbers(batch_size, seed, rank, ranks, num_workers)
        batch_size, seed, rank, ranks, num_workers = numbers
        if buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, got {buffer_size}")
        from datasets.distributed import split_dataset_by_node

        self.num_workers, self.device = num_workers, torch.device(device)
        self.layout = {"batch size": batch_size, "ranks": ranks, "workers": num_workers}
        self._tally = Tally(max_bad_fraction)
        self._size, self._drop_last = batch_size // ranks, drop_last
        stream = dataset.stream.shuffle(seed=seed, buffer_size=buffer_size) if shuffle else dataset.stream
        stream = split_dataset_by_node(stream, rank=rank, world_size=ranks)
        self._batches = _Batches(dataset, stream, self._size, seed, rank, ranks)
        self._options = worker_options(num_workers, prefetch_factor, pin_memory, multiprocessing_context)

    @property
    def failures(self) -> Counter[str]:
        """How many samples could not be had so far, by cause, on this rank and in all its worker processes."""
        return Counter(self._tally.failures)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch | None]:
        """This rank's parts of the global batches of an epoch, from number `start` on.

        Args:
            epoch: Number of the epoch, from 0.
            start: Number of the first batch; nothing comes if there are not as many.

        Raises:
            ValueError: if a number is out of range, or, while it is read, if the stream is damaged or too many samples
                cannot be had.
        """
        check_start(epoch, start)
        return self._read(epoch, start)

    def _read(self, epoch: int, start: int) -> Iterator[Batch | None]:
        self._tally.begin()
        # Workers take turns, and those that have come to their end are passed over: each gives at least its share of
        # the batches before `start`, if it has as many. That many it need not make.
        batches = self._batches.of(epoch, start // max(self.num_workers, 1))
        loader = DataLoader(
            batches,
            batch_size=None,
            collate_fn=_as_it_is,
            generator=torch.Generator().manual_seed(0),
            **self._options,
        )
        for number, loaded in enumerate(self._whole(loader)):
            if number >= start or loaded.problem is not None:
                yield self._tally.passed(loaded, self.device)

    def _whole(self, batches: Iterable[Loaded]) -> Iterator[Loaded]:
        """Whole batches: those of the workers, and then those of what they have left."""
        number, left = 0, list[tuple[int, Any]]()
        for loaded in batches:
            if 0 < loaded.seen < self._size:
                left += _taken_apart(loaded)
            else:
                number += 1
                yield loaded
        if number == 0 and len(left) < self._size and self._drop_last:
            warnings.warn(
                f"this part of the stream has {len(left)} samples, which are left out, since a batch has {self._size}:"
                " use a smaller BATCH_SIZE, more pictures, or fewer ranks",
                stacklevel=2,
            )
        for first in range(0, len(left), self._size):
            if len(left) - first >= self._size or not self._drop_last:
                yield collate(left[first : first + self._size])


def _taken_apart(loaded: Loaded) -> list[tuple[int, Any]]:
    """The samples that :func:`.batches.collate` has put together; those that could not be had are nobody's."""
    batch = dict(loaded.batch or {})
    ids = batch.pop("id", torch.empty(0)).tolist()
    items = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    return [*zip(ids, items, strict=True), *((-1, reason) for reason in loaded.reasons)]


class _Batches(IterableDataset):
    """What each worker makes of its part of a stream: a ``Loaded`` for every batch; the last may be smaller."""

    def __init__(
        self,
        pictures: StreamedPictures,
        stream: Any,
        size: int,
        seed: int,
        rank: int,
        ranks: int,
    ):
        self.pictures, self.stream, self.size = pictures, stream, size
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.epoch, self.unmade = 0, 0

    def of(self, epoch: int, unmade: int) -> "_Batches":
        """Another epoch, of which each worker leaves its first batches empty."""
        self.epoch, self.unmade = epoch, unmade
        self.stream.set_epoch(epoch)
        return self

    def __iter__(self) -> Iterator[Loaded]:
        info = get_worker_info()
        place = self.rank if info is None else self.rank + self.ranks * info.id
        places = self.ranks * (1 if info is None else info.num_workers)
        examples = enumerate(self.stream)
        number = 0
        try:
            while batch := list(islice(examples, self.size)):
                if number < self.unmade and len(batch) == self.size:
                    yield Loaded(None, 0, [])
                else:
                    yield collate([self._result(count * places + place, example) for count, example in batch])
                number += 1
        except (ValueError, OSError) as error:
            yield Loaded(None, 0, [], Problem.of(error))

    def _result(self, id_: int, example: Any) -> tuple[int, Item | str]:
        try:
            return id_, self.pictures.item(example, chances(self.seed, self.epoch, id_))
        except NoItem as error:
            return id_, error.reason


def _as_it_is(loaded: Any) -> Any:
    return loaded
