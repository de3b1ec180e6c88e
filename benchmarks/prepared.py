"""What a case is prepared for, and what it is when it is ready to be checked and timed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .ceilings import ceilings
from .floors import Floor, floor_of
from .machine import cache_bytes
from .measure import Subject
from .profiles import Profile


class Unavailable(Exception):
    """A case cannot be measured here; the message says why."""


@contextmanager
def reference_fits() -> Iterator[None]:
    """Where the reference computes what a case is compared with: if memory is too little, it is not for the case."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        why = f"the reference, with which it is compared, is out of memory: {first_line(error)}"
        raise Unavailable(why) from error


@dataclass(frozen=True, eq=False)
class Context:
    """What a case is prepared for.

    Attributes:
        device: Where to measure.
        profile: How much.
        ceilings: What the device can do at best, see :func:`.ceilings.ceilings`.
        cache_bytes: Size of its last cache, past which inputs are rotated; 0 if they are not.
        scratch: A folder for what cases keep, empty at the start of the run.
    """

    device: torch.device
    profile: Profile
    ceilings: dict[str, Any]
    cache_bytes: int
    scratch: Path

    @classmethod
    def of(cls, device: torch.device, profile: Profile, scratch: Path) -> "Context":
        """Measure the ceilings of a device."""
        sizes = dict(copy_mib=profile.copy_mib, matrix_side=profile.matrix_side)
        return cls(device, profile, ceilings(device, **sizes), cache_bytes(device) if profile.rotate else 0, scratch)

    def floor(self, function: Callable[[], Any]) -> Floor:
        """See :func:`.floors.floor_of`."""
        return floor_of(function, self.ceilings)


@dataclass
class Prepared:
    """A case that is ready to be checked and timed.

    Attributes:
        subject: What is timed: called with the number of a set of inputs.
        wrong: Says what is wrong with the result of the subject's first call, None if nothing is.
        copies: How many sets of inputs there are.
        steady: Whether the subject's first call, if it is a long one, takes about as long as any other.
        sample: Takes a sample by itself instead of a :class:`.measure.Timer`.
        first: What is then called before the first sample, for ``wrong`` to get its result.
        rounds: How many samples then, or what says so when it is known how long one takes.
        memory: Whether to count memory (and launches, if ``count_launches``), which takes further calls.
        count_launches: Whether to count what is started on the device.
        memory_of: Where the subject replays a CUDA graph, the memory of which was allocated before: makes the same call
            without, of which memory is counted; None from it if there is none. The subject is not called after that.
        bytes: See :class:`.results.Record`, and so the others.
        flops: As there.
        floor: As there.
        extra: As there.
        more: Called with the samples at the end, for what can only be said then; gives more for ``extra``.
        images: How many images a call works on, if memory is to be told for each of them, too.
        close: Called when the case is over.
    """

    subject: Subject | None
    wrong: Callable[[Any], str | None]
    copies: int = 1
    steady: bool = False
    sample: Callable[[], float] | None = None
    first: Callable[[], Any] = lambda: None
    rounds: int | Callable[[], int] = 1
    memory: bool = True
    count_launches: bool = False
    memory_of: Callable[[], Subject | None] | None = None
    bytes: int | None = None
    flops: int | None = None
    floor: Floor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    more: Callable[[Sequence[float]], dict[str, Any]] | None = None
    images: int | None = None
    close: Callable[[], None] = lambda: None


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or ["no message"])[0]
