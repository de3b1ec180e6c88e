"""Where a case runs: in this process, or in one of its own.

A peer shares a process with nothing of ours: our models have the C library keep memory that is freed, and a call that
changes what it does can be taken back but in part. Whoever has the peer alone has it without. Nor is it checked before
it is timed, as it is with the reference, which is ours.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from minimagen_fast import host_memory

from .measure import Timer, launches, peak_bytes
from .peers import peer_versions
from .prepared import Context, Prepared, Unavailable

Prepare = Callable[[Context], Prepared]

# From here on one call more only to see how long it takes is too much.
STEADY_SECONDS = 0.5


class Here:
    """A case in this process.

    Args:
        prepare: Makes it ready; raises :class:`.Unavailable` if it cannot be.
        context: What for.
        graph: Whether to time a CUDA graph of it.
        checked_late: Whether :meth:`wrong` is asked after other calls than the first.
    """

    def __init__(self, prepare: Prepare, context: Context, graph: bool = False, checked_late: bool = False):
        self._context, self._graph, self._checked_late = context, graph, checked_late
        self._sample: Callable[[], float]
        self._result: Any = None
        # What ours keeps, it says itself.
        host_memory.keep_freed(False)
        self._prepared = prepare(context)

    def start(self) -> None:
        """Make the first call."""
        prepared = self._prepared
        if prepared.sample is not None:
            self._result = prepared.first()
            return
        assert prepared.subject is not None
        started = time.perf_counter()
        result = prepared.subject(0)
        if self._context.device.type == "cuda":
            torch.cuda.synchronize(self._context.device)
        prepared.extra["first_call_seconds"] = time.perf_counter() - started
        # The next call may write where this one did.
        self._result = tree_map_only(torch.Tensor, torch.clone, result) if self._checked_late else result

    def wrong(self) -> str | None:
        """What is wrong with the first call's result, None if nothing is; to be asked once."""
        result, self._result = self._result, None
        return self._prepared.wrong(result)

    def rounds(self) -> int:
        """How many samples to take. To be asked before the first; it may capture a CUDA graph.

        Raises:
            NotCapturable: if it cannot be captured.
        """
        prepared = self._prepared
        if prepared.sample is not None:
            self._sample = prepared.sample
            return prepared.rounds() if callable(prepared.rounds) else prepared.rounds
        assert prepared.subject is not None
        profile = self._context.profile
        first = prepared.extra["first_call_seconds"]
        known = first if prepared.steady and first > STEADY_SECONDS else None
        timer = Timer(
            prepared.subject, self._context.device, copies=prepared.copies, graph=self._graph, call_seconds=known
        )
        self._sample = timer.sample
        return timer.rounds(profile.case_seconds, profile.min_rounds, profile.max_rounds)

    def sample(self) -> float:
        """Seconds of a call."""
        return self._sample()

    def sample_in_turn(self) -> float:
        """Seconds of a call after others: after an untimed one, since what it had in caches is not there."""
        assert self._prepared.subject is not None
        self._prepared.subject(0)
        return self._sample()

    def extra(self) -> dict[str, Any]:
        """What else is worth knowing, as far as it is known yet."""
        return self._prepared.extra

    def described(self, samples: Sequence[float]) -> dict[str, Any]:
        """Further values of its :class:`.results.Record`, now that there are samples."""
        prepared = self._prepared
        values: dict[str, Any] = {"bytes": prepared.bytes, "flops": prepared.flops}
        if prepared.floor:
            values |= {"floor_seconds": prepared.floor.seconds, "floor_by_family": prepared.floor.by_family}
        extra: dict[str, Any] = {}
        if prepared.memory and prepared.subject is not None:
            if prepared.count_launches:
                values["launches"] = launches(prepared.subject, self._context.device)
            values["peak_bytes"] = peak = self._peak_bytes(prepared.subject)
            if prepared.images and peak is not None:
                extra["peak_bytes_per_image"] = peak / prepared.images
        if prepared.more:
            extra |= prepared.more(samples)
        return {**values, "extra": {**prepared.extra, **extra}}

    def _peak_bytes(self, subject: Callable[[int], Any]) -> int | None:
        if self._prepared.memory_of is not None:
            without_graph = self._prepared.memory_of()
            if without_graph is None:
                return None
            subject = without_graph
            # Once before: libraries try their ways at first, which may take more.
            subject(0)
        return peak_bytes(subject, self._context.device)

    def close(self) -> None:
        """The case is over."""
        self._prepared.close()


class Apart:
    """The same in a process of its own, on a CPU; ``prepare`` and what it is made of can be pickled."""

    def __init__(self, prepare: Prepare, context: Context):
        spawn = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, mp_context=spawn, initializer=_end_with_parent)
        self._number = self._result(os.getpid)
        with ExitStack() as stack:
            stack.callback(self.close)
            self._result(_prepare, prepare, context, torch.get_num_threads(), peer_versions())
            stack.pop_all()

    def _result(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._process.submit(function, *args).result()

    def start(self) -> None:
        self._result(_call, "start")

    def wrong(self) -> str | None:
        return self._result(_call, "wrong")

    def rounds(self) -> int:
        return self._result(_call, "rounds")

    def sample(self) -> float:
        return self._result(_call, "sample")

    def sample_in_turn(self) -> float:
        return self._result(_call, "sample_in_turn")

    def extra(self) -> dict[str, Any]:
        return self._result(_call, "extra")

    def described(self, samples: Sequence[float]) -> dict[str, Any]:
        return self._result(_call, "described", samples)

    def close(self) -> None:
        """End the process, and all that the case has there."""
        # Whatever it is at, which may take minutes.
        with suppress(OSError):  # it has ended, which each system says in its own way
            os.kill(self._number, signal.SIGTERM)
        self._process.shutdown(cancel_futures=True)


# That of a process of its own.
_case: Here


def _end_with_parent() -> None:
    """Have this process end with the one that made it, killed or not: it would wait for calls for ever, in memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _prepare(prepare: Prepare, context: Context, threads: int, peers: dict[str, str | None]) -> None:
    global _case
    if peer_versions() != peers:
        raise Unavailable(f"a new process has the peers {peer_versions()} and not {peers}")
    torch.set_num_threads(threads)
    _case = Here(prepare, context, checked_late=True)


def _call(name: str, *args: Any) -> Any:
    return getattr(_case, name)(*args)
