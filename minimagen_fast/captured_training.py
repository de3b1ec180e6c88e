"""Steps of training that are replayed: forward and backward pass of a U-Net, each captured in a CUDA graph.

A small U-Net, or a small batch, may keep the device busy for less time than the host needs to launch its kernels one
by one. Replayed they are launched at once. What autograd sees is one operation from the parameters to the losses, so
hooks of parameters, accumulation of gradients and every optimizer work as they do otherwise; and with the same
operations on the same numbers the gradients are the same.

A step is captured once two backward passes of its kind have run as they are, which is when libraries and compilers have
done what they do at first. Steps of one kind have the same shapes, parameters that lie where they did, and the same
settings. A step runs as it is, without a word, where

- it is large: what it keeps for its backward pass and its gradients, or in the end its graphs, take more than
  :data:`MOST_MEMORY` of the device's memory, which graphs hold on to;
- the losses of an earlier one are still there and their backward pass has not run: its activations would be lost;
- several processes train together: gradients are exchanged while the backward pass goes on;
- something else has a part in it: hooks or methods of its own of the U-Net, modules of other classes than torch's and
  ours, sparse weights, hooks of saved tensors, a mode that sees functions or operators, ``torch.func``, another
  capture.

On a CPU steps are recorded instead, by :mod:`.recorded_training`: there memory and losses that wait are no obstacle.
"""

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.hooks import unserializable_hook

from .acceleration import Acceleration, autocast_dtype
from .cuda_capture import capturing, library_settings
from .kept import KEPT, TRAINING, InOrder, KeptGraphs
from .kernels import dispatch
from .module_watch import ModuleWatch, only_computes
from .plain import classes_are_as_made, no_calls_are_seen
from .recorded_training import RecordedStep
from .twins import twin_of

if TYPE_CHECKING:
    from .Unet import Unet

_BACKWARD_PASSES_FIRST = 2
#: Share of the device's memory that a captured step may hold on to.
MOST_MEMORY = 1 / 8

Inputs = dict[str, torch.Tensor | None]
Compute = Callable[..., torch.Tensor]


def losses_of(unet: "Unet", compute: Compute, inputs: Inputs, acceleration: Acceleration, what: tuple) -> torch.Tensor:
    """The result of a computation, replayed if it may be.

    Args:
        unet: The U-Net; no other parameters take part.
        compute: The computation: of a U-Net and of ``inputs``, by name, to losses. It does not wait for the device.
        inputs: Tensors on one device.
        acceleration: How to run the U-Net.
        what: What else the computation depends on: where two are equal, the same is computed.
    """
    if not is_replayed(acceleration) or not _may_be_replayed(inputs):
        return compute(unet, **inputs)
    kept = _kept_with(unet)
    # Another thread may train this U-Net.
    if not kept.lock.acquire(blocking=False):
        return compute(unet, **inputs)
    try:
        if kept.awaits_backward() or not kept.is_of(unet):
            return compute(unet, **inputs)
        graphs = acceleration.cuda_graphs == "on"
        autocast = autocast_dtype(unet.null_text_embed.device)
        if not graphs and (autocast is not None or acceleration.interprets_triton()):
            # Who has autocast in force may have it so in the backward pass or not.
            return compute(unet, **inputs)
        kernels = dispatch.implementation(), dispatch.attention_override(None)
        settings = *kernels, autocast, library_settings()
        # A graph reads copies of one layout. A recording reads what is given: in another layout, a single text that
        # stands for all images, for example, torch may compute in other ways.
        shapes = tuple(None if x is None else (x.shape, x.dtype, () if graphs else x.stride()) for x in inputs.values())
        step = kept.step((acceleration, settings, what, shapes), _Step if graphs else RecordedStep)
        required = acceleration.asks_for("cuda_graphs" if graphs else "recorded_steps")
        return step.losses(kept, unet, compute, inputs, required=required)
    finally:
        kept.lock.release()


def is_replayed(acceleration: Acceleration) -> bool:
    """Whether steps of a training are to be captured or recorded, where they may be."""
    return acceleration.cuda_graphs == "on" or acceleration.recorded_steps == "on"


def _may_be_replayed(inputs: Inputs) -> bool:
    tensors = tuple(value for value in inputs.values() if value is not None)
    return (
        torch.is_grad_enabled()
        and no_calls_are_seen(tensors)
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and classes_are_as_made()
        and not torch.is_anomaly_enabled()
        and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        and all(value.numel() and not value.requires_grad for value in tensors)
        and not _several_processes()
    )


def _several_processes() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def _copies(inputs: Inputs) -> Inputs:
    return {name: None if x is None else x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}


class _Pass:
    """A forward pass that was replayed. It lives as long as its losses do."""

    def __init__(self) -> None:
        self.finished = False


class Kept(KeptGraphs):
    """The steps of one U-Net.

    Captured ones share their memory: between a forward pass and its backward pass none may run.

    Attributes:
        steps: How many there were.
        recordings: How many of them were recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps = self.recordings = 0
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

    def step(self, key: tuple, kind: "type[_Step | RecordedStep]") -> "_Step | RecordedStep":
        """The step of a kind."""
        self.steps += 1
        if key not in self.graphs:
            while len(self.graphs) >= kind.MOST_KINDS:
                self.graphs.popitem(last=False)
            self.graphs[key] = kind()
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def other_graph(self) -> torch.cuda.CUDAGraph | None:
        """One that was captured, if any was."""
        captured = (step.captured for step in self.graphs.values() if isinstance(step, _Step))
        return next((each.forward for each in captured if each is not None), None)

    def begin(self) -> _Pass:
        begun = _Pass()
        self._last = weakref.ref(begun)
        return begun

    def awaits_backward(self) -> bool:
        last = self._last()
        return last is not None and not last.finished


def _kept_with(unet: "Unet") -> Kept:
    if TRAINING not in vars(unet):
        vars(unet)[TRAINING] = Kept()
    return vars(unet)[TRAINING]


class _Step:
    """Steps of one kind: they run as they are at first, are then captured, and then replayed.

    Attributes:
        captured: What was captured, if it was.
    """

    # Kept for each U-Net, captured or not.
    MOST_KINDS = 4

    def __init__(self) -> None:
        self._backward_passes = 0
        self._is_large = self._has_failed = self._has_large_graphs = False
        self.captured: _Captured | None = None

    def losses(self, kept: Kept, unet: "Unet", compute: Compute, inputs: Inputs, *, required: bool) -> torch.Tensor:
        if self.captured is None and self._is_due(required):
            self.captured = self._capture(kept, unet, compute, inputs, required)
        if self.captured is not None:
            return _Replay.apply(self.captured, kept.begin(), inputs, *self.captured.parameters)
        device = unet.null_text_embed.device
        before = _allocated(device)
        # Of copies, as in the capture: by then what depends on where and how tensors lie is compiled.
        losses = compute(unet, **_copies(inputs))
        holds = _allocated(device) - before + sum(x.nbytes for x in unet.parameters() if x.requires_grad)
        self._is_large = holds > MOST_MEMORY * _memory(device)
        if losses.requires_grad:
            losses.register_hook(self._count)
        return losses

    def _is_due(self, required: bool) -> bool:
        if self._is_large or self._has_large_graphs or self._backward_passes < _BACKWARD_PASSES_FIRST:
            return False
        return required or not self._has_failed

    @unserializable_hook  # torch warns of others where losses are saved
    def _count(self, _: torch.Tensor) -> None:
        self._backward_passes += 1

    def _capture(
        self, kept: Kept, unet: "Unet", compute: Compute, inputs: Inputs, required: bool
    ) -> "_Captured | None":
        device = unet.null_text_embed.device
        before = _reserved(device)
        try:
            captured = _Captured(kept, unet, compute, inputs)
        except RuntimeError as error:
            if required:
                raise
            self._has_failed = True
            warnings.warn(
                f"a step of training could not be captured in CUDA graphs and is launched anew each time: {error}."
                " To do without: imagen.accelerate(cuda_graphs='off')",
                stacklevel=2,
            )
            return None
        # Only now is it known what the backward pass takes that computes activations again.
        self._has_large_graphs = _reserved(device) - before > MOST_MEMORY * _memory(device)
        return None if self._has_large_graphs else captured


class _Captured:
    """Both passes of a step as graphs, and the tensors that they read and write.

    Attributes:
        forward, backward: The graphs.
        parameters: Those that have gradients.
    """

    def __init__(self, kept: Kept, unet: "Unet", compute: Compute, inputs: Inputs):
        self._in_order: InOrder = kept.in_order
        self._device = device = unet.null_text_embed.device
        self._inputs = _copies(inputs)
        # It also keeps the tensors alive for a backward pass that comes when the U-Net has got others.
        # Hooks are called after the replay, and no stream may wait for one whose work is being captured.
        self._twin = twin_of(unet)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Autocast keeps what it converts while it is in force: from outside it would be out of date in a replay, and
        # what is converted in the capture has no values outside.
        torch.clear_autocast_cache()
        try:
            with capturing(self.forward, device, kept.other_graph()):
                losses = compute(self._twin, **self._inputs)
            self._gradient = torch.empty_like(losses)
            pairs = zip(unet.parameters(), self._twin.parameters(), strict=True)
            trained = [(own, twin) for own, twin in pairs if own.requires_grad]
            with capturing(self.backward, device, self.forward):
                found = torch.autograd.grad(losses, [twin for _, twin in trained], self._gradient, allow_unused=True)
                used = [
                    (own, gradient) for (own, _), gradient in zip(trained, found, strict=True) if gradient is not None
                ]
                self._gradients = [_laid_out_like(own, gradient) for own, gradient in used]
        finally:
            torch.clear_autocast_cache()
        self._losses = losses.detach()
        self.parameters = [own for own, _ in used]
        self._tensors = [*unet.parameters(), *unet.buffers()]

    def versions(self) -> list[int]:
        """Those of the U-Net's tensors: they rise with every change in place."""
        return [value._version for value in self._tensors]

    def run_forward(self, inputs: Inputs) -> torch.Tensor:
        """From inputs, of its kind, to losses, which are the caller's."""
        own = [value for value in self._inputs.values() if value is not None]
        given = [value for value in inputs.values() if value is not None]
        with self._in_order(self._device):
            torch._foreach_copy_(own, given)
            self.forward.replay()
            return self._losses.clone()

    def run_backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From the losses' gradient to those of the parameters, which are the caller's."""
        with self._in_order(self._device):
            self._gradient.copy_(gradient)
            self.backward.replay()
            # The caller accumulates in them, and the next replay writes to these.
            return torch._foreach_mul(self._gradients, 1.0)


def _laid_out_like(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as autograd would lay it out, in one more operation, for a parameter that has none yet."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class _Replay(torch.autograd.Function):
    """From the parameters to the losses."""

    @staticmethod
    def forward(ctx, captured, begun, inputs, *parameters):
        ctx.captured, ctx.begun, ctx.versions = captured, begun, captured.versions()
        return captured.run_forward(inputs)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.begun.finished:
            raise RuntimeError(
                "the backward pass of these losses has run, and what it needs is gone: a replayed step has one. For"
                " retain_graph=True say imagen.accelerate(cuda_graphs='off')"
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradients of a replayed step have no gradients. For create_graph=True say"
                " imagen.accelerate(cuda_graphs='off', kernels='reference', attention='reference')"
            )
        if ctx.captured.versions() != ctx.versions:
            raise RuntimeError(
                "the U-Net's weights were changed in place between these losses and their backward pass, which needs"
                " them as they were: call backward first"
            )
        gradients = ctx.captured.run_backward(gradient)
        # Not before: another thread would replay its step.
        ctx.begun.finished = True
        return None, None, None, *gradients


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device)


def _reserved(device: torch.device) -> int:
    """Memory that is in use or belongs to graphs."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


@functools.cache
def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory
