"""Steps of training that are replayed: forward and backward pass of a U-Net, each captured in a CUDA graph.

A small U-Net, or a small batch, keeps the device busy for less time than the host needs to launch its kernels one by
one. Replayed they are launched at once. What autograd sees is one operation from the parameters to the losses, so
hooks of parameters, accumulation of gradients and every optimizer work as they do otherwise; and with the same
operations on the same numbers the gradients are the same.

A step is captured once two backward passes of its kind have run as they are, which is when libraries and compilers have
done what they do at first. Steps of one kind have the same shapes, parameters that lie where they did, and the same
settings. A step runs as it is, without a word, where

- it is large: what it keeps for its backward pass, and its gradients, take more than :data:`MOST_MEMORY` of the
  device's memory, which a graph holds on to for good; then the host is not what it waits for;
- the losses of an earlier one are still there and their backward pass has not run: its activations would be lost;
- several processes train together: gradients are exchanged while the backward pass goes on;
- something else has a part in it: hooks of the U-Net, modules of other classes than torch's and ours, hooks of saved
  tensors, a mode that sees operators, ``torch.func``, another capture.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.autograd.function import once_differentiable

from .acceleration import Acceleration, autocast_dtype
from .cuda_capture import capturing, library_settings
from .kept import KEPT, InOrder, KeptGraphs
from .kernels import dispatch
from .kernels.launch import nothing_looks
from .module_watch import ModuleWatch, only_computes
from .stand_ins import stand_ins

if TYPE_CHECKING:
    from .Unet import Unet

# Kinds of step that are kept for each U-Net, captured or not.
_MOST_KINDS = 4
_BACKWARD_PASSES_FIRST = 2
#: Share of the device's memory that a captured step may hold on to.
MOST_MEMORY = 1 / 8

Inputs = dict[str, torch.Tensor | None]
Compute = Callable[..., torch.Tensor]


def losses_of(unet: "Unet", compute: Compute, inputs: Inputs, acceleration: Acceleration, what: tuple) -> torch.Tensor:
    """The result of a computation, replayed if it may be.

    Args:
        unet: The U-Net; no other parameters take part.
        compute: The computation: from ``inputs``, by name, to losses. It draws no random numbers and does not wait for
            the device.
        inputs: Tensors on one device.
        acceleration: How to run the U-Net.
        what: What else the computation depends on: where two are equal, the same is computed.
    """
    if acceleration.cuda_graphs != "on":
        vars(unet).pop(KEPT[1], None)
        return compute(**inputs)
    if not _may_be_replayed(inputs):
        return compute(**inputs)
    kept: _Kept = vars(unet).setdefault(KEPT[1], _Kept())
    # Another thread may train this U-Net.
    if not kept.lock.acquire(blocking=False):
        return compute(**inputs)
    try:
        if kept.awaits_backward() or not kept.is_of(unet):
            return compute(**inputs)
        in_force = (
            dispatch.implementation(),
            dispatch.attention_override(None),
            autocast_dtype(unet.null_text_embed.device),
        )
        shapes = tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in inputs.values())
        return kept.step((acceleration, in_force, library_settings(), what, shapes)).losses(kept, unet, compute, inputs)
    finally:
        kept.lock.release()


def _may_be_replayed(inputs: Inputs) -> bool:
    tensors = tuple(value for value in inputs.values() if value is not None)
    return (
        torch.is_grad_enabled()
        and nothing_looks(tensors)
        and not torch._C._len_torch_function_stack()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and not torch.is_anomaly_enabled()
        and not torch.cuda.is_current_stream_capturing()
        and all(value.numel() and not value.requires_grad for value in tensors)
        and not _several_processes()
    )


def _several_processes() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


class _Pass:
    """A forward pass that was replayed. It lives as long as its losses do."""

    def __init__(self) -> None:
        self.finished = False


class _Kept(KeptGraphs):
    """The steps of one U-Net. They share their memory: between a forward pass and its backward pass none may run."""

    def __init__(self) -> None:
        super().__init__()
        self._watch: ModuleWatch | None = None
        self._only_computes = False
        self._last: Callable[[], _Pass | None] = lambda: None

    def is_of(self, unet: "Unet") -> bool:
        """Whether steps of this U-Net may be captured; those of what it was before are dropped."""
        if self._watch is None or not self._watch.unchanged(unet):
            self.graphs.clear()
            self._only_computes = only_computes(unet)
            self._watch = ModuleWatch(unet, besides=KEPT)
        return self._only_computes

    def step(self, key: tuple) -> "_Step":
        """The step of a kind."""
        if key not in self.graphs:
            while len(self.graphs) >= _MOST_KINDS:
                self.graphs.popitem(last=False)
            self.graphs[key] = _Step(key[0])
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def other_graph(self) -> torch.cuda.CUDAGraph | None:
        """One that was captured, if any was."""
        captured = (step.captured for step in self.graphs.values())
        return next((each.forward for each in captured if each is not None), None)

    def begin(self) -> _Pass:
        begun = _Pass()
        self._last = weakref.ref(begun)
        return begun

    def awaits_backward(self) -> bool:
        last = self._last()
        return last is not None and not last.finished


class _Step:
    """Steps of one kind: they run as they are at first, are then captured, and then replayed.

    Attributes:
        captured: What was captured, if it was.
    """

    def __init__(self, acceleration: Acceleration):
        self._required = acceleration.asks_for("cuda_graphs")
        self._backward_passes = 0
        self._may_capture = True
        self.captured: _Captured | None = None

    def losses(self, kept: _Kept, unet: "Unet", compute: Compute, inputs: Inputs) -> torch.Tensor:
        if self.captured is None and self._may_capture and self._backward_passes >= _BACKWARD_PASSES_FIRST:
            self.captured = self._capture(kept, unet, compute, inputs)
        if self.captured is not None:
            return _Replay.apply(self.captured, kept.begin(), inputs, *self.captured.parameters)
        device = unet.null_text_embed.device
        before = _allocated(device)
        losses = compute(**inputs)
        holds = _allocated(device) - before + sum(x.nbytes for x in unet.parameters() if x.requires_grad)
        self._may_capture = self._may_capture and holds <= MOST_MEMORY * _memory(device)
        if losses.requires_grad:
            losses.register_hook(self._count)
        return losses

    def _count(self, _: torch.Tensor) -> None:
        self._backward_passes += 1

    def _capture(self, kept: _Kept, unet: "Unet", compute: Compute, inputs: Inputs) -> "_Captured | None":
        try:
            return _Captured(kept, unet, compute, inputs)
        except RuntimeError as error:
            if self._required:
                raise
            self._may_capture = False
            warnings.warn(
                f"a step of training could not be captured in CUDA graphs and is launched anew each time: {error}."
                " To do without: imagen.accelerate(cuda_graphs='off')",
                stacklevel=2,
            )
            return None


class _Captured:
    """Both passes of a step as graphs, and the tensors that they read and write."""

    def __init__(self, kept: _Kept, unet: "Unet", compute: Compute, inputs: Inputs):
        self.parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        # A backward pass may come after the U-Net has got others.
        self._alive = [value.detach() for value in (*unet.parameters(), *unet.buffers())]
        self._in_order: InOrder = kept.in_order
        self._device = device = unet.null_text_embed.device
        self._inputs = {name: None if value is None else value.clone() for name, value in inputs.items()}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Autocast keeps what it converts while it is in force: from outside it would be out of date in a replay, and
        # what is converted in the capture has no values outside.
        torch.clear_autocast_cache()
        try:
            with stand_ins(unet) as parameters:
                with capturing(self.forward, device, kept.other_graph()):
                    losses = compute(**self._inputs)
                self._gradient = torch.empty_like(losses)
                trained = [parameter for parameter in parameters if parameter.requires_grad]
                with capturing(self.backward, device, self.forward):
                    gradients = torch.autograd.grad(losses, trained, self._gradient, allow_unused=True)
                    self._gradients = list(map(_laid_out_like, trained, gradients))
        finally:
            torch.clear_autocast_cache()
        self._losses = losses.detach()

    def run_forward(self, inputs: Inputs) -> torch.Tensor:
        """From inputs, of its kind, to losses, which are the caller's."""
        own = [value for value in self._inputs.values() if value is not None]
        given = [value for value in inputs.values() if value is not None]
        with self._in_order(self._device):
            torch._foreach_copy_(own, given)
            self.forward.replay()
            return self._losses.clone()

    def run_backward(self, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        """From the losses' gradient to those of the parameters, which are the caller's."""
        with self._in_order(self._device):
            self._gradient.copy_(gradient)
            self.backward.replay()
            # The caller accumulates in them, and the next replay writes to these.
            own = iter(torch._foreach_mul([each for each in self._gradients if each is not None], 1.0))
        return [None if each is None else next(own) for each in self._gradients]


def _laid_out_like(parameter: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient as autograd would lay it out for a parameter that has none yet."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class _Replay(torch.autograd.Function):
    """From the parameters to the losses."""

    @staticmethod
    def forward(ctx, captured, begun, inputs, *parameters):
        ctx.captured, ctx.begun, ctx.versions = captured, begun, _versions(parameters)
        return captured.run_forward(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if ctx.begun.finished:
            raise RuntimeError(
                "the backward pass of these losses has run, and what it needs is gone: a replayed step has one. For"
                " retain_graph=True say imagen.accelerate(cuda_graphs='off')"
            )
        if _versions(ctx.captured.parameters) != ctx.versions:
            raise RuntimeError(
                "the U-Net's weights were changed in place between these losses and their backward pass, which needs"
                " them as they were: call backward first"
            )
        ctx.begun.finished = True
        return None, None, None, *ctx.captured.run_backward(gradient)


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [value._version for value in tensors]


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device)


@functools.cache
def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory
