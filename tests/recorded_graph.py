"""A stand-in for CUDA graphs on a CPU: it records every operation with its tensors, and runs them again."""

import torch
from fast_path import stand_in_for_cuda_graphs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from minimagen_fast import captured_training
from minimagen_fast.kernels import wide_conv


class RecordedGraph(TorchDispatchMode):
    """Like a true graph it reads and writes where the tensors lay when it was captured, and knows nothing else.

    Attributes:
        replays: How often it was replayed.
    """

    made: list["RecordedGraph"] = []

    def __init__(self):
        super().__init__()
        self._calls, self.replays, self.memory = [], 0, self
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        RecordedGraph.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Of tensors it knows where they lie: what is assigned to `data` later does not reach it.
        args, kwargs = (tree_map_only(torch.Tensor, torch.Tensor.detach, each) for each in (args, kwargs))
        if func._schema.is_mutable:
            for argument, given in zip(func._schema.arguments, args, strict=False):
                if argument.is_write:
                    for written in tree_leaves(given):
                        self._before.setdefault(written.data_ptr(), (written, written.clone()))
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        # A true capture computes nothing.
        for written, before in self._before.values():
            written.copy_(before)
        self._before = {}

    def reset(self):
        self._calls = []

    def pool(self):
        if not self._calls:
            raise RuntimeError("nothing was captured")  # as torch does
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
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(captured_training, "_memory", lambda device: 2**30)
    # Once another test has used a CUDA device torch refuses to say this of a CPU.
    monkeypatch.setattr(captured_training, "_allocated", lambda device: 0)
    monkeypatch.setattr(captured_training, "_reserved", lambda device: 0)
    # Where operators are recorded a CPU's own way to a gradient is not taken, so that it is to be the same elsewhere.
    monkeypatch.setattr(wide_conv, "_is_convolution_fast", lambda: False)
    return stand_in_for_cuda_graphs(monkeypatch, RecordedGraph, lambda graph: graph, reason=reason)
