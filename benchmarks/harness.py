"""One case from beginning to end: prepare, check, time, count, record."""

import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch

from minimagen_fast import host_memory

from .measure import Clock, NotCapturable, settle
from .places import Apart, Here, Prepare
from .prepared import Context, Unavailable, first_line
from .results import Identity, Record, ResultFile

# The timer that the tests give to pytest-benchmark: it stands still but for the samples that are taken here.
CLOCK = Clock()


@dataclass(frozen=True)
class Plan:
    """A case to be measured.

    Attributes:
        identity: Which.
        prepare: Makes it ready; raises :class:`Unavailable` if it cannot be.
        priority: Cases with small numbers come first, so that a run that is stopped has told the most.
        seconds: How long it takes, about, where that is long: it is not begun with less time left.
        apart: Whether it is measured in a process of its own, on a CPU, where it is checked only after that.
        beside: A peer's variant and what makes it ready, in a process of its own: a sample of it is taken before each
            of the case's, so that their ratio does not tell how busy the machine was at two times. If it cannot be had,
            the case is alone.
    """

    identity: Identity
    prepare: Prepare
    priority: int = 0
    seconds: float = 0.0
    apart: bool = False
    beside: tuple[str, Prepare] | None = None


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
        record, refusal = Record(plan.identity), self._refusal(plan)
        try:
            if refusal:
                raise Unavailable(refusal)
            self._measure(plan, record, benchmark)
        except Unavailable as reason:
            record.status, record.reason = "unavailable", str(reason)
        except NotCapturable as error:
            record.status, record.reason = "unavailable", f"it cannot be captured as a CUDA graph: {error}"
        except torch.OutOfMemoryError as error:
            record.status, record.reason = "unavailable", f"out of memory: {first_line(error)}"
        except Exception as error:
            record.status, record.reason = "error", f"{type(error).__name__}: {first_line(error)}"
            raise
        finally:
            if not record.samples:
                record.beside = None
            if record.samples or record.status != "ok":
                self.results.add(record, self.seconds)
                self.last_summary = summary(record)
            if not refusal:
                # There may be hundreds that are not begun, when no time is left.
                settle(self.context.device)
        if record.status == "unavailable":
            pytest.skip(record.reason)
        if record.status == "parity_failed":
            pytest.fail(f"no time is given: {record.reason}", pytrace=False)
        return record

    @property
    def seconds(self) -> float:
        """Time since the run began."""
        return time.monotonic() - self._started

    def _refusal(self, plan: Plan) -> str | None:
        """Why a case is not begun; None if it is."""
        profile = self.context.profile
        if self.seconds + plan.seconds > profile.seconds:
            left = f", but for less than the {plan.seconds:.0f} s that it may take" if plan.seconds else ""
            return f"the {profile.seconds:.0f} s of profile {profile.name} were used up{left}"
        if plan.identity.graph and self.context.device.type != "cuda":
            return "CUDA graphs need a CUDA device"
        return None

    def _measure(self, plan: Plan, record: Record, benchmark) -> None:
        context = self.context
        with ExitStack() as stack:
            if context.device.type == "cuda":
                # What autograd recorded on one stream it also runs there, and the default one cannot be captured.
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(context.device)))
            case = Apart(plan.prepare, context) if plan.apart else Here(plan.prepare, context, plan.identity.graph)
            stack.callback(case.close)
            record.extra = case.extra()
            case.start()
            record.extra = case.extra()
            if not plan.apart and self._is_wrong(case, record):
                return
            rounds = case.rounds()
            peer = self._peer(plan, stack)
            samples = self._samples(plan, case, rounds, peer, record, benchmark)
            values = case.described(samples)
            if plan.apart and self._is_wrong(case, record):
                return
            if peer and not _is_right(peer):
                record.beside = None  # its own case says why
            for name, value in values.items():
                setattr(record, name, value)
            record.samples = samples

    @staticmethod
    def _is_wrong(case: Here | Apart, record: Record) -> bool:
        record.reason = case.wrong()
        if record.reason:
            record.status = "parity_failed"
        return bool(record.reason)

    def _peer(self, plan: Plan, stack: ExitStack) -> Apart | None:
        """What is timed beside a case, ready for samples; None if there is nothing."""
        if plan.beside is None:
            return None
        try:
            peer = Apart(plan.beside[1], self.context)
            stack.callback(peer.close)
            peer.start()
            peer.rounds()
            return peer
        except Unavailable:
            return None  # its own case says why
        except Exception as error:
            # Its own case fails likewise, if it is measured at all.
            what = f"{plan.identity.id} is timed alone, without {plan.beside[0]}"
            warnings.warn(f"{what}: {type(error).__name__}: {first_line(error)}", stacklevel=2)
            return None

    def _samples(
        self, plan: Plan, case: Here | Apart, rounds: int, peer: Apart | None, record: Record, benchmark
    ) -> list[float]:
        benchmark.group = "/".join(plan.identity.id.split("/")[:-1])
        if peer is None:
            benchmark.pedantic(lambda: CLOCK.advance(case.sample()), rounds=rounds)
            return list(benchmark.stats.stats.data)
        peer_samples: list[float] = []

        def in_turn() -> None:
            peer_samples.append(peer.sample_in_turn())
            CLOCK.advance(case.sample_in_turn())

        benchmark.pedantic(in_turn, rounds=rounds)
        assert plan.beside is not None
        record.beside = plan.beside[0], peer_samples
        return list(benchmark.stats.stats.data)


def _is_right(peer: Apart) -> bool:
    try:
        return peer.wrong() is None
    except Unavailable:
        return False


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
