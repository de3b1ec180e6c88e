"""Steps of training on a CPU that run from a recording of their operators, see :mod:`.recorded`.

What autograd sees is one operation from the parameters to the losses, as with the steps that :mod:`.captured_training`
captures on CUDA devices, and they are where those are. But nothing is held from one step to the next, so that passes
may overlap, and what a recording cannot do, such as gradients of gradients, is done by the step as it is.
"""

import functools
import warnings
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import unserializable_hook

from .kernels import dispatch
from .kernels.launch import is_batched
from .recorded import record
from .twins import twin_of

if TYPE_CHECKING:
    from .captured_training import Compute, Inputs, Kept
    from .Unet import Unet

_BACKWARD_PASSES_FIRST = 2
# A recording takes as long as some steps: where few steps are of one kind it would not pay.
_AT_ONCE, _STEPS_FOR_ONE_MORE = 4, 32
# Of parameters. Steps of larger U-Nets take long, beside what lies between operators, and while they are
# recorded there are gradients twice.
MOST_BYTES = 2**28
# What torch's attention may be computed by, and whether it may now.
_BACKENDS = {
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}


class RecordedStep:
    """Steps of one kind: they run as they are at first, are then recorded, and then run from the recording."""

    # Kept for each U-Net, recorded or not: texts of every length are another kind.
    MOST_KINDS = 16

    def __init__(self) -> None:
        self._backward_passes = 0
        self._has_failed = False
        self._recorded: _Recorded | None = None

    def losses(
        self, kept: "Kept", unet: "Unet", compute: "Compute", inputs: "Inputs", *, required: bool
    ) -> torch.Tensor:
        """From inputs, of its kind, to losses."""
        if self._recorded is None and self._is_due(kept, unet, required):
            self._record(kept, unet, compute, inputs, required)
        if self._recorded is not None:
            return _Replay.apply(self._recorded, compute, _as_recorded(inputs), *self._recorded.parameters)
        losses = compute(unet, **inputs)
        if losses.requires_grad:
            losses.register_hook(self._count)
        return losses

    def _is_due(self, kept: "Kept", unet: "Unet", required: bool) -> bool:
        if self._backward_passes < _BACKWARD_PASSES_FIRST:
            return False
        if required:
            return True
        pays = kept.recordings < _AT_ONCE + kept.steps // _STEPS_FOR_ONE_MORE
        return pays and not self._has_failed and sum(x.nbytes for x in unet.parameters()) <= MOST_BYTES

    @unserializable_hook  # torch warns of others where losses are saved
    def _count(self, _: torch.Tensor) -> None:
        self._backward_passes += 1

    def _record(self, kept: "Kept", unet: "Unet", compute: "Compute", inputs: "Inputs", required: bool) -> None:
        kept.recordings += 1
        try:
            self._recorded = _Recorded(unet, compute, inputs)
        except RuntimeError as error:
            if required:
                raise
            self._has_failed = True
            warnings.warn(
                f"a step of training could not be recorded and runs as it is: {error}."
                " To do without: imagen.accelerate(recorded_steps='off')",
                stacklevel=2,
            )


def _as_recorded(inputs: "Inputs") -> "Inputs":
    """Inputs as a recording takes them."""
    return {name: x if x is None or not x.storage_offset() else _copy(x) for name, x in inputs.items()}


def _version(x: torch.Tensor) -> int:
    """It rises with every change in place; that of a tensor made in inference mode is not counted."""
    return 0 if x.is_inference() else x._version


def _copy(x: torch.Tensor) -> torch.Tensor:
    """The same values, which lie in the same way in memory of their own."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((extent,), (1,)).clone().as_strided(x.shape, x.stride())


class _Recorded:
    """A recording of a step, and what its backward passes need besides.

    Attributes:
        parameters: Those that have gradients.
        recording: What was recorded.
    """

    def __init__(self, unet: "Unet", compute: "Compute", inputs: "Inputs"):
        self._own, self._buffers = list(unet.parameters()), list(unet.buffers())
        self._twin = twin_of(unet)
        # A backward pass may come outside of the block of code that chose.
        self._choices = dispatch.as_now()
        self._backends = [backend for backend, is_allowed in _BACKENDS.items() if is_allowed()]
        pairs = zip(self._own, self._twin.parameters(), strict=True)
        trained = [(weight, twin) for weight, twin in pairs if weight.requires_grad]

        def backward(losses: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
            found = torch.autograd.grad(losses, [twin for _, twin in trained], gradient, allow_unused=True)
            used = [(weight, each) for (weight, _), each in zip(trained, found, strict=True) if each is not None]
            self.parameters = [weight for weight, _ in used]
            return [each for _, each in used]

        # Two of them may be one tensor, which they need not be the next time.
        own = {name: None if x is None else _copy(x) for name, x in inputs.items()}
        self.recording = record(functools.partial(compute, self._twin), own, backward)

    def versions(self, inputs: "Inputs") -> dict[str, tuple[int, ...]]:
        """Those of the tensors in place: they rise with every change. By name, and all of the U-Net's as one."""
        given = {name: (_version(x),) for name, x in inputs.items() if x is not None}
        return {**given, "": tuple(value._version for value in (*self._own, *self._buffers))}

    def gradients_anew(
        self, compute: "Compute", inputs: "Inputs", gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """The parameters' gradients, from the step as it is; with gradients of their own, if these are wanted."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad(), self._choices, sdpa_kernel(self._backends):
            # What comes of the parameters here is no business of their hooks, which will see the gradients later.
            values = {id(own): own.view_as(own) for own in self._own}
            losses = compute(twin_of(self._twin, values.values()), **inputs)
            wanted = [values[id(own)] for own in self.parameters]
            return torch.autograd.grad(losses, wanted, gradient, create_graph=differentiable, allow_unused=True)


class _Replay(torch.autograd.Function):
    """From the parameters to the losses."""

    @staticmethod
    def forward(ctx, recorded, compute, inputs, *parameters):
        ctx.recorded, ctx.compute, ctx.versions = recorded, compute, recorded.versions(inputs)
        # Losses are often kept. Autograd lets go of what it saved once the backward pass has run, and says so where a
        # second one was not announced. As saved tensors the inputs could not be changed, which most of them may.
        saved = torch.empty(0)
        saved.inputs = inputs  # type: ignore[attr-defined]
        ctx.save_for_backward(saved)
        ctx.passes = recorded.recording.run(**inputs)
        # Whoever gets them may change them.
        return next(ctx.passes).clone()

    @staticmethod
    def backward(ctx, gradient):
        (saved,) = ctx.saved_tensors
        recorded, inputs = ctx.recorded, saved.inputs
        is_anew = ctx.passes is None or torch.is_grad_enabled() or is_batched(gradient)
        now = recorded.versions(inputs)
        if any(now[name] != ctx.versions[name] for name in (now if is_anew else ["", *recorded.recording.kept])):
            raise RuntimeError(
                "the U-Net's weights, or images, texts or noise that the step was given, were changed in place between"
                " these losses and their backward pass, which needs them as they were: call backward first"
            )
        passes, ctx.passes = ctx.passes, None
        # The operators are those that ran in the precision of the step.
        with torch.autocast(gradient.device.type, enabled=False):
            if is_anew:
                return None, None, None, *recorded.gradients_anew(ctx.compute, inputs, gradient)
            return None, None, None, *passes.send(gradient.contiguous())
