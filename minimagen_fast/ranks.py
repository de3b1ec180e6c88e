"""The processes of a distributed training: who they are, and what they tell one another."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .arguments import finite_number

__all__ = ["RankLost", "Ranks", "open_ranks"]

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
DEFAULT_TIMEOUT, LONGEST_TIMEOUT = 600.0, 1e9
# What Gloo's errors say when a connection ends; they have no class of their own.
_LOST = ("connection closed", "connection reset", "timed out", "broken pipe", "connection refused")


class RankLost(RuntimeError):
    """Another process of the training has gone, or has not answered in time."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Without arguments: the only one.

    Attributes:
        rank: Its number, from 0. Rank 0 writes logs and reports.
        size: How many there are.
        local_rank: Its number on this machine.
        local_size: How many there are on this machine.
        timeout: Seconds after which one that does not answer counts as lost.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    timeout: float = DEFAULT_TIMEOUT

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Each number summed over all ranks; through main memory, so no device is waited for."""
        if self.size == 1:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.int64)
        with _naming_losses():
            dist.all_reduce(totals)
        return totals.tolist()

    def sum_(self, values: Tensor) -> Tensor:
        """`values` summed over all ranks, in place, on their device."""
        if self.size > 1:
            with _naming_losses():
                dist.all_reduce(values)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value of a plain Python object."""
        if self.size == 1:
            return value
        box = [value]
        with _naming_losses():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def from_all(self, value: Any) -> list[Any]:
        """Every rank's value of a plain Python object, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with _naming_losses():
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.sum([0])


@contextmanager
def _naming_losses() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise as_lost(error) or error from error


def as_lost(error: BaseException) -> RankLost | None:
    """The :class:`RankLost` that an error of torch.distributed amounts to; None for another error."""
    if isinstance(error, RankLost):
        return error
    text = str(error)
    network = isinstance(error, dist.DistError) or any(words in text.lower() for words in _LOST)
    if not isinstance(error, RuntimeError) or not network:
        return None
    return RankLost(
        "another process of this training has gone or did not answer in time"
        f" ({text.splitlines()[0] if text else type(error).__name__})"
    )


@contextmanager
def open_ranks(device: torch.device, timeout: float = DEFAULT_TIMEOUT) -> Iterator[Ranks]:
    """Joins the processes that ``torchrun`` has started; by itself where it has not.

    Gloo carries what lies in main memory, NCCL what lies on CUDA devices.

    Args:
        device: Where this process trains.
        timeout: Seconds after which a rank that does not answer counts as lost, more than 0.

    Raises:
        ValueError: `timeout` is out of range, or torchrun's environment variables are not whole.
        RankLost: not all processes have come within `timeout`.
    """
    if not 0 < finite_number("RANK_TIMEOUT", timeout) <= LONGEST_TIMEOUT:
        raise ValueError(f"RANK_TIMEOUT must be more than 0 seconds, at most {LONGEST_TIMEOUT:g}, got {timeout!r}")
    given = [name for name in TORCHRUN_VARIABLES if name in os.environ]
    if "WORLD_SIZE" not in given or dist.is_initialized():
        yield _initialized(timeout) if dist.is_initialized() else Ranks()
        return
    if missing := [name for name in TORCHRUN_VARIABLES if name not in given]:
        raise ValueError(
            f"WORLD_SIZE is set, but not {', '.join(missing)}: start distributed training with torchrun, or unset it"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        # After a loss torchrun starts processes again with the same store, where the addresses of the lost still stand.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLost(
            f"not all of {os.environ['WORLD_SIZE']} processes met at {address} within {timeout:g} seconds: this is rank"
            f" {os.environ['RANK']} on {socket.gethostname()} ({error})"
        ) from error
    yield _initialized(timeout)
    # Not after an error: NCCL would wait for what the others never send. The end of the process closes everything.
    dist.destroy_process_group()


def _initialized(timeout: float) -> Ranks:
    local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(dist.get_rank(), dist.get_world_size(), *local, timeout)
