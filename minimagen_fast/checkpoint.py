"""Files and states that a training run is continued from.

Files are replaced atomically and read with ``weights_only=True``: only tensors and plain Python values pass. The second
half keeps the random number generators and the order of the data, without which a restarted run is another run.
"""

import io
import os
import random
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from .files import naming_file

__all__ = [
    "capture_rng",
    "isolated_rng",
    "iterate_from",
    "load",
    "loader_generators",
    "plain",
    "restore_rng",
    "save",
]


def save(value: Any, path: str | os.PathLike) -> None:
    """Writes `value` so that `path` holds either its old content or the whole new one, whatever interrupts the writing.

    Args:
        value: Tensors, numbers, strings, None, and lists, tuples and dicts of them (such as a ``state_dict``).
        path: File to write. Its folder must exist.

    Raises:
        OSError: It cannot be written, as when the disk is full.
    """
    path = Path(path)
    # In the same folder, because only a rename within one file system is atomic; with the process id, so that two runs
    # do not share it.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming_file(path), open(unfinished, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> Any:
    """Reads what :func:`save` (or ``torch.save``) wrote, onto the CPU, running no code from the file.

    Raises:
        ValueError: The file is missing, cut short, damaged, or holds other things than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint file {path}: check the path, or train the model first")
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:  # says nothing of the file
            raise
        # Bytes that are no checkpoint are instructions too, on which torch's reader fails in whatever way.
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read as a checkpoint: it was cut short or damaged, or it holds other things than "
                "tensors and plain values. Delete it and use another checkpoint of the same training directory, from "
                "state_dicts/ or tmp/"
            ) from error


def plain(value: Any, name: str) -> Any:
    """`value` as :func:`load` can read it: numpy's numbers and arrays as Python's numbers and lists.

    Args:
        value: What is to be saved, however nested.
        name: What to call it.

    Raises:
        ValueError: Something in it, which is named, could be saved but not read again.
    """
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist(), name)
    if type(value) in (dict, OrderedDict, Counter):
        return type(value)({plain(key, name): plain(entry, f"{name}[{key!r}]") for key, entry in value.items()})
    if type(value) in (list, tuple):
        return type(value)(plain(entry, f"{name}[{place}]") for place, entry in enumerate(value))
    if value is None or type(value) in (Tensor, nn.Parameter, bool, int, float, str):
        return value
    try:
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # whatever its pickling may raise
        raise ValueError(
            f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: use tensors, numbers, strings, None,"
            " and lists, tuples and dicts of them"
        ) from error
    return value


def capture_rng(device: torch.device | None = None, generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """States of all random number generators that a training run draws from, in a form that :func:`save` can write.

    Args:
        device: Device of the model. On CUDA its generator belongs to the state. No host synchronisation happens.
        generators: Further generators, such as those of :func:`loader_generators`.
    """
    algorithm, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None,
        "numpy": [algorithm, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached_gaussian],
        "python": [version, torch.tensor(internal), gauss_next],
        "generators": [generator.get_state() for generator in generators],
    }


def restore_rng(
    state: dict[str, Any], device: torch.device | None = None, generators: Sequence[torch.Generator] = ()
) -> None:
    """Puts every generator back into the state that :func:`capture_rng` took, for the same kinds of arguments.

    Raises:
        ValueError: The number of `generators` is another one than at the time of the capture.
    """
    if len(state["generators"]) != len(generators):
        raise ValueError(
            f"the saved random state has {len(state['generators'])} data loader generators, this run has "
            f"{len(generators)}: build the data loader as in the run that is continued"
        )
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    algorithm, keys, position, has_gauss, cached_gaussian = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)


@contextmanager
def isolated_rng(
    seed: int, device: torch.device | None = None, generators: Sequence[torch.Generator] = ()
) -> Iterator[None]:
    """Within the block every generator starts from `seed`; afterwards they go on as if the block had not been there."""
    state = capture_rng(device, generators)
    try:
        torch.default_generator.manual_seed(seed)
        if device is not None and device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        restore_rng(state, device, generators)


def loader_generators(loader: Iterable) -> list[torch.Generator]:
    """The random generators that a data loader and its samplers own (none where they use torch's global one)."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, batch_sampler, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    owned = [getattr(owner, "generator", None) for owner in owners]
    return list({id(generator): generator for generator in owned if isinstance(generator, torch.Generator)}.values())


class _Remaining(Sampler):
    """The index batches of `batch_sampler` after its first `count`: an iterator that can be advanced before its use."""

    def __init__(self, batch_sampler: Iterable, count: int) -> None:
        self.batch_sampler = batch_sampler
        self.count = count

    def __iter__(self) -> "_Remaining":
        # Now, for a sampler may draw its order here or only with its first batch; the workers' seed comes in between.
        self.batches, self.left = iter(self.batch_sampler), self.count
        return self

    def __next__(self) -> Any:
        return next(self.skip())

    def skip(self) -> Iterator:
        left, self.left = self.left, 0
        for _ in islice(self.batches, left):
            pass
        return self.batches


def iterate_from(loader: Iterable, count: int) -> Iterator:
    """An iterator over `loader` that goes on after its first `count` batches, in the order that the random state gives.

    A map-style ``DataLoader`` passes over the indices alone, so no skipped item is read again; any other iterable is
    run through. All random numbers that decide the order are drawn before this returns: restore the random state of the
    point to go on from afterwards. Data sets that draw random numbers of their own in worker processes, and loaders
    with ``persistent_workers``, which seed themselves only once, go on validly but not with the very same numbers.

    Args:
        loader: The training data loader.
        count: Number of batches that are done already.
    """
    if count == 0:
        return iter(loader)
    # Not isinstance: a subclass may order its batches in ways of its own.
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        iterator = iter(loader)
        for _ in islice(iterator, count):
            pass
        return iterator
    remaining = _Remaining(loader.batch_sampler, count)
    kept = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
    options = {name: getattr(loader, name) for name in (*kept, "generator", "prefetch_factor", "in_order")}
    # iter() and then the sampler draw what they draw in the sequence of an uninterrupted epoch.
    iterator = iter(DataLoader(loader.dataset, batch_sampler=remaining, **options))
    remaining.skip()
    return iterator
