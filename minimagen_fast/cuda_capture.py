"""Capturing what is launched on a CUDA device in a graph, beside other threads and whatever device is current."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

# A process may capture one graph at a time.
_capturing = threading.Lock()
# The allocator may still ask a graph whose capture failed which stream was its own.
_failed: list[torch.cuda.CUDAGraph] = []
# Memory in which a capture could not be ended: torch takes it for captured in still, and lets no other begin there.
_spoiled: set[Any] = set()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # torch's own stream for captures is one for the process, and on the device that was current at the first of them.
    return torch.cuda.Stream(device)


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Have matrix products in a block of code work in memory that is allocated in it, and leave none of it to others.

    cuBLAS keeps its workspace for each stream. One that a capture allocated, in the memory of its graph, would be used
    by the next graph captured on the same stream as well, and go with the first.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


def _have_numbers_drawn_again(device: torch.device) -> None:
    """Have the default generator draw random numbers after a capture that could not be ended.

    Until another one is ended torch takes the generator for captured, and refuses every number, in all of the process.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # Something must be captured: torch warns of graphs that are empty.
        written = torch.zeros(1, device=device)
        with torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
            written.zero_()
    except RuntimeError:
        _failed.append(graph)


def _memory_for(beside: torch.cuda.CUDAGraph | None) -> Any:
    pool = None if beside is None else beside.pool()
    return torch.cuda.graph_pool_handle() if pool is None or pool in _spoiled else pool


def _give_back(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Give up the memory of a capture that failed, if it could not be ended; otherwise it goes with the graph."""
    try:
        graph.pool()
    except RuntimeError:
        _spoiled.add(pool)
        index = torch.cuda.current_device() if device.index is None else device.index
        # The first one refuses what was not begun, of which there is nothing to release.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph,
    device: torch.device,
    beside: torch.cuda.CUDAGraph | None = None,
    *,
    stream: torch.cuda.Stream | None = None,
) -> Iterator[None]:
    """Capture what a block of code launches on a device.

    Meanwhile other threads may do what they like, but draw random numbers from a device's default generator: releases
    of torch refuse that during any capture.

    Args:
        graph: To capture it in.
        device: The device.
        beside: A graph whose memory this one may use too, and does, unless a capture in it could not be ended. Then
            neither may run while the other does, nor leave anything in that memory for later.
        stream: On which stream, and not the default one; on one for captures alone, if not given.

    Raises:
        RuntimeError: if it cannot be captured. The current stream is then what it was before.
    """
    with _capturing, torch.cuda.device(device), _own_workspaces():
        before = torch.cuda.current_stream(device)
        pool = _memory_for(beside)
        try:
            # Other threads may do meanwhile what must not be captured: one that loads pictures pins memory.
            on = _stream(device) if stream is None else stream
            with torch.cuda.graph(graph, pool=pool, stream=on, capture_error_mode="thread_local"):
                yield
        except BaseException:
            _give_back(graph, device, pool)
            # It may have ended all the same, and hold what it allocated.
            with suppress(RuntimeError):
                graph.reset()
            _failed.append(graph)
            _have_numbers_drawn_again(device)
            raise
        finally:
            # torch leaves its own in force if the capture cannot be ended.
            torch.cuda.set_stream(before)


def library_settings() -> tuple:
    """What torch's own operations heed when they choose how to compute."""
    return (
        torch.backends.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_accumulation,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    )
