"""One case from beginning to end: prepare, check, time, count, record."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from minimagen_fast import host_memory

from .ceilings import ceilings
from .floors import Floor, floor_of
from .machine import cache_bytes
from .measure import Clock, NotCapturable, Subject, Timer, launches, peak_bytes, settle
from .profiles import Profile
from .results import Identity, Record, ResultFile

# The timer that the tests give to pytest-benchmark: it stands still but for the samples that are taken here.
CLOCK = Clock()
# From here on one call more only to see how long it takes is too much.
STEADY_SECONDS = 0.5


class Unavailable(Exception):
    """A case cannot be measured here; the message says why."""


@contextmanager
def reference_fits() -> Iterator[None]:
    """Where the reference computes what a case is compared with: if memory is too little, it is not for the case."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        why = f"the reference, with which it is compared, is out of memory: {_first_line(error)}"
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
        sample: Takes a sample by itself instead of a :class:`.measure.Timer`; then there is no first call for
            ``wrong``, which gets None.
        rounds: How many samples then.
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
    rounds: int = 1
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


@dataclass(frozen=True)
class Plan:
    """A case to be measured.

    Attributes:
        identity: Which.
        prepare: Makes it ready; raises :class:`Unavailable` if it cannot be.
        priority: Cases with small numbers come first, so that a run that is stopped has told the most.
        seconds: How long it takes, about, where that is long: it is not begun with less time left.
        beside: A peer's variant and what makes it ready: a sample of it is taken before each of the case's, so that
            their ratio does not tell how busy the machine was at two times. If it cannot be had, the case is alone.
    """

    identity: Identity
    prepare: Callable[[Context], Prepared]
    priority: int = 0
    seconds: float = 0.0
    beside: tuple[str, Callable[[Context], Prepared]] | None = None


class Harness:
    """Measures cases one after the other and writes each down.

    Args:
        context: Device, profile and ceilings.
        results: Where to write.
        started: When the run began, in seconds of ``time.monotonic()``.

    Attributes:
        last_summary: A line on the case before.
    """

    def __init__(self, context: Context, results: ResultFile, started: float):
        self.context = context
        self.results = results
        self.last_summary = ""
        self._started = started
        # The allocator of the C library learns from what a program frees: here from the start, whatever runs first.
        host_memory.keep_freed(True)

    def run(self, plan: Plan, benchmark) -> Record:
        """Measure one case with pytest-benchmark's fixture.

        The test fails where parity does or something goes wrong, and is skipped where a case cannot be measured. In
        every case there is a record, but for an interruption.
        """
        record = Record(plan.identity)
        try:
            self._measure(plan, record, benchmark)
        except Unavailable as reason:
            record.status, record.reason = "unavailable", str(reason)
        except NotCapturable as error:
            record.status, record.reason = "unavailable", f"it cannot be captured as a CUDA graph: {error}"
        except torch.OutOfMemoryError as error:
            record.status, record.reason = "unavailable", f"out of memory: {_first_line(error)}"
        except Exception as error:
            record.status, record.reason = "error", f"{type(error).__name__}: {_first_line(error)}"
            raise
        finally:
            if not record.samples:
                record.beside = None
            if record.samples or record.status != "ok":
                self.results.add(record, self.seconds)
                self.last_summary = summary(record)
            settle(self.context.device)
        if record.status == "unavailable":
            pytest.skip(record.reason)
        if record.status == "parity_failed":
            pytest.fail(f"not timed: {record.reason}", pytrace=False)
        return record

    @property
    def seconds(self) -> float:
        """Time since the run began."""
        return time.monotonic() - self._started

    def _measure(self, plan: Plan, record: Record, benchmark) -> None:
        context, profile = self.context, self.context.profile
        if self.seconds + plan.seconds > profile.seconds:
            left = f", but for less than the {plan.seconds:.0f} s that it may take" if plan.seconds else ""
            raise Unavailable(f"the {profile.seconds:.0f} s of profile {profile.name} were used up{left}")
        if plan.identity.graph and context.device.type != "cuda":
            raise Unavailable("CUDA graphs need a CUDA device")
        # What ours keeps, it says itself.
        host_memory.keep_freed(False)
        with ExitStack() as stack:
            if context.device.type == "cuda":
                # What autograd recorded on one stream it also runs there, and the default one cannot be captured.
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(context.device)))
            prepared = plan.prepare(context)
            stack.callback(prepared.close)
            record.extra = prepared.extra
            record.reason = self._check(prepared)
            if record.reason:
                record.status = "parity_failed"
                return
            samples = self._samples(plan, prepared, self._peer(plan, stack), record, benchmark)
            self._describe(prepared, record)
            if prepared.more:
                record.extra.update(prepared.more(samples))
            record.samples = samples

    def _check(self, prepared: Prepared) -> str | None:
        """Call it for the first time; gives what is wrong with the result."""
        result = None
        if prepared.sample is None:
            started = time.perf_counter()
            result = prepared.subject(0)
            if self.context.device.type == "cuda":
                torch.cuda.synchronize(self.context.device)
            prepared.extra["first_call_seconds"] = time.perf_counter() - started
        return prepared.wrong(result)

    def _peer(self, plan: Plan, stack: ExitStack) -> Prepared | None:
        """What is timed beside a case, checked; None if there is nothing."""
        if plan.beside is None:
            return None
        try:
            peer = plan.beside[1](self.context)
            stack.callback(peer.close)
            return None if self._check(peer) else peer
        except Unavailable:
            return None  # its own case says why
        except Exception as error:
            # Its own case fails likewise, if it is measured at all.
            what = f"{plan.identity.id} is timed alone, without {plan.beside[0]}"
            warnings.warn(f"{what}: {type(error).__name__}: {_first_line(error)}", stacklevel=2)
            return None

    def _samples(self, plan: Plan, prepared: Prepared, peer: Prepared | None, record: Record, benchmark) -> list[float]:
        sample, rounds = self._sampler(prepared, plan.identity.graph)
        benchmark.group = "/".join(plan.identity.id.split("/")[:-1])
        if peer is None:
            benchmark.pedantic(lambda: CLOCK.advance(sample()), rounds=rounds)
            return list(benchmark.stats.stats.data)
        peer_sample, _ = self._sampler(peer, plan.identity.graph)
        peer_samples: list[float] = []

        def in_turn() -> None:
            # Each once untimed: what it keeps in caches, and of main memory, is not there after the other.
            peer.subject(0)
            peer_samples.append(peer_sample())
            prepared.subject(0)
            CLOCK.advance(sample())

        benchmark.pedantic(in_turn, rounds=rounds)
        record.beside = plan.beside[0], peer_samples
        return list(benchmark.stats.stats.data)

    def _sampler(self, prepared: Prepared, graph: bool) -> tuple[Callable[[], float], int]:
        """What takes a sample, and how many to take."""
        if prepared.sample is not None:
            return prepared.sample, prepared.rounds
        profile = self.context.profile
        first = prepared.extra["first_call_seconds"]
        known = first if prepared.steady and first > STEADY_SECONDS else None
        timer = Timer(prepared.subject, self.context.device, copies=prepared.copies, graph=graph, call_seconds=known)
        return timer.sample, timer.rounds(profile.case_seconds, profile.min_rounds, profile.max_rounds)

    def _describe(self, prepared: Prepared, record: Record) -> None:
        record.bytes, record.flops = prepared.bytes, prepared.flops
        if prepared.floor:
            record.floor_seconds, record.floor_by_family = prepared.floor.seconds, prepared.floor.by_family
        if not prepared.memory or prepared.subject is None:
            return
        device, subject = self.context.device, prepared.subject
        if prepared.count_launches:
            record.launches = launches(subject, device)
        if prepared.memory_of is not None:
            subject = prepared.memory_of()
            if subject is None:
                return
            # Once before: libraries try their ways at first, which may take more.
            subject(0)
        record.peak_bytes = peak_bytes(subject, device)
        if prepared.images:
            record.extra["peak_bytes_per_image"] = record.peak_bytes / prepared.images


def summary(record: Record) -> str:
    """One line on a record, for whoever watches."""
    if record.status != "ok":
        return f"{record.identity.id}: {record.status}: {record.reason}"
    values = record.as_dict()["seconds"]
    line = f"{record.identity.id}: {_readable(values['median'])}"
    line += f" [{_readable(values['q1'])} to {_readable(values['q3'])}]"
    if record.floor_seconds:
        line += f", {values['median'] / record.floor_seconds:.3g} x floor"
    return line


def _readable(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
