"""What one training step of a U-Net holds in memory and computes, counted on tensors without values.

The step is the real one, that of :class:`.Imagen`, forward and backward, run on shapes alone. Every allocation is an
event with the bytes that are alive then. On a card these are linear in the number of images in every event, so two
batch sizes tell all others. What is not seen: memory within libraries (workspaces of convolutions) and within kernels,
and what an allocator loses.
"""

import functools
import weakref
from collections.abc import Callable, Collection
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .kernels import launch
from .parallel import _blocks
from .plan_autocast import autocast_as_on_cuda
from .plan_unet import Network, step_inputs, step_loss
from .Unet import Unet

__all__ = ["Event", "Trace", "bring_here", "trace"]

# Batch sizes from which all others follow. At one image strides say less, and some operators take other ways.
_BATCHES = (2, 3)


@dataclass(frozen=True)
class Event:
    """An allocation.

    Attributes:
        constant: Bytes alive after it whatever the batch.
        per_image: And those that every image adds.
        unit: Index of the unit of parameters that is at work, or was last; -1 before the first.
        backward: Whether the backward pass has begun.
    """

    constant: float
    per_image: float
    unit: int
    backward: bool


@dataclass(frozen=True)
class Trace:
    """A training step as its allocations; parameters are not counted.

    Attributes:
        events: In their order.
        order: Units in the order in which the forward pass comes to them.
        copies: Bytes that the forward pass leaves behind whatever the batch: low-precision copies of the weights.
        kept_per_image: Bytes that it leaves behind for each image; all of them, in a trace for one batch alone.
    """

    events: tuple[Event, ...]
    order: tuple[int, ...]
    copies: int
    kept_per_image: float

    def peak(self, batch: int, more: Callable[[int, bool], float] = lambda unit, backward: 0.0) -> float:
        """Most bytes that are alive at one time.

        Args:
            batch: Number of images.
            more: Bytes that are alive besides while a unit is at work, in the forward or the backward pass.
        """
        return max(e.constant + e.per_image * batch + more(e.unit, e.backward) for e in self.events)


@functools.lru_cache(maxsize=64)
def trace(
    network: Network,
    *,
    batch: int | None = None,
    checkpoint_levels: tuple[int, ...] = (),
    gradients: str = "kept",
    weights: torch.dtype = torch.float32,
    precision: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> Trace:
    """Trace a training step.

    Args:
        network: What is trained.
        batch: Number of images, if the trace is to hold for it alone; needed on a CPU, where operators depend on it.
        checkpoint_levels: See :func:`.blocks.use_blocks`.
        gradients: ``kept`` if the tensors of gradients are there from the start and are not counted, ``grown`` if they
            are made in the backward pass and counted.
        weights: What the weights are while they are computed with.
        precision: What most is computed in; autocast, where it is not that of the weights.
        device: ``cuda``, with the Triton kernels wherever they can be, or ``cpu``.

    Raises:
        ValueError: the network does not take images of this size.
    """
    how = checkpoint_levels, gradients, weights, precision, device
    if batch is not None:
        only = _run(network, batch, *how)
        seen = zip(only.live, only.unit_of, only.backward_of, strict=True)
        events = [Event(now, 0, unit, backward) for now, unit, backward in seen]
        return Trace(tuple(events), tuple(only.order), 0, only.kept / batch)
    small, large = (_run(network, size, *how) for size in _BATCHES)
    assert len(small.live) == len(large.live), "the operators depend on the batch size"
    between = _BATCHES[1] - _BATCHES[0]
    events = []
    for low, high, unit, backward in zip(small.live, large.live, small.unit_of, small.backward_of, strict=True):
        slope = (high - low) / between
        events.append(Event(low - slope * _BATCHES[0], slope, unit, backward))
    kept = (large.kept - small.kept) / between
    return Trace(tuple(events), tuple(small.order), round(small.kept - kept * _BATCHES[0]), kept)


def _run(
    network: Network,
    batch: int,
    levels: Collection[int],
    gradients: str,
    weights: torch.dtype,
    precision: torch.dtype,
    device: str,
) -> "_Live":
    on_cpu = device == "cpu"
    with torch.device("meta"):
        imagen, unet = network.imagen()
    unet.to(weights)
    with FakeTensorMode() if on_cpu else nullcontext(), torch.device("cpu" if on_cpu else "meta"):
        if on_cpu:
            bring_here(imagen)
        if gradients == "kept":
            for parameter in unet.parameters():
                parameter.grad = torch.empty_like(parameter)
        asked: dict[str, Any] = {"memory_format": "channels_last", "checkpoint_levels": list(levels)}
        if on_cpu:
            asked |= {"kernels": "auto", "attention": "auto", "precision": str(precision).removeprefix("torch.")}
        else:
            # Where Triton is not to be had, that of plain torch is what can be counted: it keeps more.
            kernels = "triton" if launch.AVAILABLE else "reference"
            asked |= {"kernels": kernels, "attention": kernels}
        imagen.accelerate("reference", **asked)
        inputs = step_inputs(network, imagen, batch)
        present = [*imagen.parameters(), *imagen.buffers(), *(p.grad for p in unet.parameters() if p.grad is not None)]
        with ExitStack() as stack:
            if not on_cpu and precision != weights:
                stack.enter_context(autocast_as_on_cuda(unet, precision))
            live = _Live(present)
            live.follow(unet)
            with live:
                # What the batch itself takes.
                inputs = tree_map_only(torch.Tensor, torch.empty_like, inputs)
                loss = step_loss(imagen, inputs)
                live.kept, live.backward = live.now, True
                loss.backward()
    return live


def bring_here(model: nn.Module) -> None:
    """Give a model tensors of the default device: `to` does not take tensors without values where they have none."""
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, old in own:
            new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
            setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


class _Live(TorchDispatchMode):
    """Bytes of the storages that are alive, after every allocation."""

    def __init__(self, present: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.kept = 0
        self.unit, self.backward = -1, False
        self.live: list[int] = []
        self.unit_of: list[int] = []
        self.backward_of: list[bool] = []
        self.order: list[int] = []
        self._known: weakref.WeakSet = weakref.WeakSet(tensor.untyped_storage() for tensor in present)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.live.append(self.now)
        self.unit_of.append(self.unit)
        self.backward_of.append(self.backward)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size

    def follow(self, unet: Unet) -> None:
        """Note which unit of parameters is at work."""
        for index, block in enumerate(_blocks(unet)):
            block.register_forward_pre_hook(functools.partial(self._enter, index))
            block.register_forward_hook(functools.partial(self._leave, index))

    def _enter(self, index: int, *_: Any) -> None:
        if not self.backward:  # what is computed again belongs to the unit whose backward pass asks for it
            self.unit = index
            self.order.append(index)

    def _leave(self, index: int, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        if not self.backward:
            out.register_hook(functools.partial(self._return_to, index))

    def _return_to(self, index: int, gradient: torch.Tensor) -> None:
        self.unit = index
