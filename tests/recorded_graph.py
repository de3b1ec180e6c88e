"""A stand-in for CUDA graphs on a CPU: it records every operation with its tensors, and runs them again."""

import dataclasses
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimagen_fast import acceleration, captured_training, cuda_capture


class RecordedGraph(TorchDispatchMode):
    """Like a true graph it reads and writes where the tensors lay when it was captured, and knows nothing else.

    Attributes:
        replays: How often it was replayed.
    """

    made: list["RecordedGraph"] = []

    def __init__(self):
        super().__init__()
        self._calls, self.replays, self.memory = [], 0, self
        RecordedGraph.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Of tensors it knows where they lie: what is assigned to `data` later does not reach it.
        args, kwargs = (
            torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, each) for each in (args, kwargs)
        )
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def pool(self):
        assert self._calls, "nothing was captured"
        return self.memory

    def replay(self):
        assert self._calls, "nothing was captured"
        self.replays += 1
        for func, args, kwargs, result in self._calls:
            for written, again in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(written, torch.Tensor) and written.data_ptr() != again.data_ptr():
                    written.copy_(again)


def record_cuda_graphs(monkeypatch, *, reason="always, in this test"):
    """Every training on a CPU captures and replays; gives the list of the graphs that are made."""
    resolve = acceleration.resolve

    def with_graphs(*args, **kwargs):
        resolved = resolve(*args, **kwargs)
        if resolved.condition_cache == "off":
            return resolved
        reasons = {**resolved.reasons, "cuda_graphs": reason}
        return dataclasses.replace(resolved, cuda_graphs="on", reasons=reasons)

    @contextmanager
    def capture(graph, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local", "other threads may disturb the capture"
        graph.memory = pool or graph
        with graph:
            yield

    RecordedGraph.made = []
    monkeypatch.setattr("minimagen_fast.Imagen.resolve", with_graphs)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(cuda_capture, "_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(captured_training, "_memory", lambda device: 2**30)
    return RecordedGraph.made
