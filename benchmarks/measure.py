"""How a call is timed, and how its memory and its launches are counted.

A *subject* is a function of one number, which of several equal sets of inputs it is to work on. Between two calls on
the same set all others were used, so that what is larger than the cache is not found there. On CUDA their results lie
in as many places, and are written past the cache likewise.

On a CPU a sample is the wall time of some calls in a row. On CUDA it is the time between two events on the device, over
calls made one by one (then the host may be what is slow, as it would be for a user) or over replays of a CUDA graph of
several calls (then it is the device alone).
"""

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from minimagen_fast.cuda_capture import capturing

Subject = Callable[[int], Any]

# A sample is at least so long: far more than what starting and stopping a clock takes.
SAMPLE_SECONDS = {"cpu": 1e-3, "cuda": 3e-3}
# So many samples are taken of the slowest call.
FEWEST_ROUNDS = 3
# Inputs are rotated until so many times the cache has passed.
CACHES = 2
MAX_COPIES = 64


class NotCapturable(Exception):
    """A call cannot be made part of a CUDA graph; the message says why."""


class Clock:
    """A clock that stands still but for what it is told: pytest-benchmark's timer, set forward by our samples."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def copies_needed(input_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs of this size do not fit in the cache together; at most ``MAX_COPIES``."""
    return min(MAX_COPIES, 1 + math.ceil(CACHES * cache_bytes / max(input_bytes, 1)))


class Timer:
    """Takes samples of a subject's time.

    Args:
        subject: What to time; it has been called before, so that what is compiled or cached is there.
        device: Where it works.
        copies: How many sets of inputs there are.
        graph: Whether to replay a CUDA graph, captured now, on the current stream; on CUDA only, and not on the default
            stream.
        call_seconds: About how long a call takes, if that is known; otherwise it is tried.

    Attributes:
        call_seconds: About how long a call takes.

    Raises:
        NotCapturable: if a graph is wanted and the subject cannot be captured.
        RuntimeError: if a graph is wanted on the default stream, where nothing can be.
    """

    def __init__(
        self,
        subject: Subject,
        device: torch.device,
        *,
        copies: int = 1,
        graph: bool = False,
        call_seconds: float | None = None,
    ):
        assert device.type == "cuda" or not graph
        self._device = device
        self._subject = subject
        self._copies = copies
        self._next = 0
        self._calls_each = 1
        self._results: dict[int, Any] = {}
        self._step: Callable[[], object] = self._call
        if graph:
            self._capture()
        self.call_seconds = self._estimate() if call_seconds is None else call_seconds
        wanted = SAMPLE_SECONDS[device.type]
        self._repeats = max(1, math.ceil(wanted / (self.call_seconds * self._calls_each)))

    def rounds(self, seconds: float, least: int, most: int) -> int:
        """How many samples to take.

        Args:
            seconds: How long they may take together.
            least: How many also if that takes up to ten times as long; of slower calls ``FEWEST_ROUNDS``.
            most: How many at most.
        """
        fit = seconds / (self.call_seconds * self._calls_each * self._repeats)
        return max(FEWEST_ROUNDS, min(most, max(int(fit), min(least, int(10 * fit)))))

    def sample(self) -> float:
        """Seconds of one call, averaged over as many as a sample takes."""
        return self._run(self._repeats) / (self._repeats * self._calls_each)

    def _call(self) -> object:
        index, self._next = self._next, (self._next + 1) % self._copies
        result = self._subject(index)
        if self._device.type == "cuda" and self._copies > 1:
            # Freed at once, its memory would be the next one's, which would then be written to the cache alone.
            self._results[index] = result
        return result

    def _run(self, repeats: int) -> float:
        step = self._step
        if self._device.type == "cpu":
            started = time.perf_counter()
            for _ in range(repeats):
                step()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _estimate(self) -> float:
        """A first look at the time of a call, longer where calls are short; it warms up the caches and the clocks."""
        seconds = self._run(1)
        if seconds < 0.1:
            repeats = max(1, min(100, int(0.05 / max(seconds, 1e-6))))
            seconds = self._run(repeats) / repeats
        return max(seconds / self._calls_each, 1e-9)

    def _capture(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        if stream == torch.cuda.default_stream(self._device):
            # The caller's mistake: below it would pass for a subject that cannot be captured.
            raise RuntimeError("the current stream is the default one, which cannot be captured: set another")
        # Every copy once: lazily made buffers and compiled kernels must be there before the capture.
        for _ in range(max(3, self._copies)):
            self._call()
        torch.cuda.synchronize(self._device)
        self._calls_each = self._copies
        self._next = 0
        graph = torch.cuda.CUDAGraph()
        try:
            # What cannot be captured must not spoil the cases after it.
            with capturing(graph, self._device, stream=stream):
                for _ in range(self._calls_each):
                    self._call()
        except RuntimeError as error:
            # Who waits for the device, to choose what to launch next, cannot be recorded.
            if "captur" not in str(error):
                raise
            raise NotCapturable(str(error).strip().splitlines()[0]) from error
        # Their memory stays with the graph.
        self._results.clear()
        self._step = graph.replay


def settle(device: torch.device) -> None:
    """Give back what the last case left, so that the next one finds the same memory whatever came before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def peak_bytes(subject: Subject, device: torch.device) -> int:
    """Most memory that one call has allocated at one time, beyond what was there before it; its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        subject(0)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        subject(0)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(function: Callable[[], Any], module: torch.nn.Module) -> int:
    """What a function leaves behind for its backward, each storage once; that of the module's own tensors aside."""
    own = {value.untyped_storage().data_ptr() for value in (*module.parameters(), *module.buffers())}
    # They are held, so that no address is given out twice.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        # Who keeps its own result would hold on to itself by it, for ever, and to all that was computed before.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    size = sum(storage.nbytes() for storage in saved.values())
    del result
    return size


def launches(subject: Subject, device: torch.device) -> int | None:
    """How many kernels a call starts, copies and fills by the driver aside; None on a CPU.

    Also None where nothing at all was seen on the device, as where a container is not allowed to trace it.
    """
    if device.type != "cuda":
        return None
    subject(0)
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        subject(0)
        torch.cuda.synchronize(device)
    on_device = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not on_device:
        return None
    return sum(not e.name.startswith(("Memcpy", "Memset")) and not e.is_user_annotation for e in on_device)
