"""LayerNorm over the channels of every pixel, with a gain and no bias, optionally of GELU(x) and plus a residual.

    y = (h - mean(h)) / sqrt(var(h) + eps) * gain [+ residual],    h = x or GELU(x) = x * Phi(x)

The formulas are those of :mod:`.row_norm`, a row being the channels of a pixel; GELU is the exact one of Hendrycks and
Gimpel, "Gaussian Error Linear Units" (2016), arXiv 1606.08415, computed again in backward.

In channels_last memory the channels of a pixel lie side by side: the kernels of :mod:`.layer_norm_rows` take the image
as it is, with the floors given there. In NCHW memory those of :mod:`.channel_norm_planes` do.
"""

import torch
import torch.nn.functional as F

from . import dispatch, launch
from .channel_norm_planes import backward_planes, forward_planes
from .layer_norm_rows import backward_rows, forward_rows
from .layer_norm_tiles import check_arguments, output_dtype

MAX_CHANNELS = 4096


def _reference(
    x: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor | None, eps: float, gelu: bool
) -> torch.Tensor:
    # Half precision keeps three digits of a mean: statistics need float32.
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    if gelu:
        h = F.gelu(h)
    if h.stride(1) == 1:
        by_pixel = F.layer_norm(h.permute(0, 2, 3, 1), h.shape[1:2], gain.flatten().to(h.dtype), eps=eps)
        out = by_pixel.permute(0, 3, 1, 2).to(x.dtype)
    else:
        # Not torch.var_mean: over channels that lie apart a CPU computes it value by value, ten times as slowly.
        centred = h - h.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        out = (centred * torch.rsqrt(variance + eps) * gain.reshape(1, -1, 1, 1)).to(x.dtype)
    return out if residual is None else out + residual


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    """That of x, or the one to copy it to if it is in neither."""
    if x.is_contiguous():
        return torch.contiguous_format
    # A part of the channels of a channels_last image still has its channels side by side.
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def _dense(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """x in one of the two formats, and whether the channels of a pixel lie side by side in it."""
    x = x.contiguous(memory_format=_memory_format(x))
    return x, x.is_contiguous(memory_format=torch.channels_last)


def _empty_output(x, gain, residual, eps, gelu):
    dtype = output_dtype(x, residual)
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=_memory_format(x))


def _empty_gradients(grad, x, gain, eps, gelu, need_x, need_gain):
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
        if need_x
        else x.new_empty(0),
        gain.new_empty(gain.shape if need_gain else 0),
    )


def _setup_context(ctx, inputs, output):
    x, gain, residual, ctx.eps, ctx.gelu = inputs
    ctx.save_for_backward(x, gain)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, grad):
    need_x, need_gain, need_residual, *_ = ctx.needs_input_grad
    grad_x = grad_gain = None
    if need_x or need_gain:
        arguments = grad, *ctx.saved_tensors, ctx.eps, ctx.gelu, need_x, need_gain
        grad_x, grad_gain = _channel_layer_norm_backward(*arguments)
    return (
        grad_x if need_x else None,
        grad_gain if need_gain else None,
        grad.to(ctx.residual_dtype) if need_residual else None,
        None,
        None,
    )


@launch.define(
    "channel_layer_norm_backward(Tensor grad, Tensor x, Tensor gain, float eps, bool gelu, bool need_x, bool need_gain)"
    " -> (Tensor, Tensor)",
    _empty_gradients,
)
def _channel_layer_norm_backward(grad, x, gain, eps, gelu, need_x, need_gain):
    grad_x, grad_gain = _empty_gradients(grad, x, gain, eps, gelu, need_x, need_gain)
    x, rows = _dense(x)
    grad = grad.contiguous(memory_format=torch.channels_last if rows else torch.contiguous_format)
    run = backward_rows if rows else backward_planes
    run(grad, x, gain.contiguous(), grad_x, grad_gain, eps, gelu)
    return grad_x, grad_gain


@launch.define(
    "channel_layer_norm(Tensor x, Tensor gain, Tensor? residual, float eps, bool gelu) -> Tensor",
    _empty_output,
    backward=_backward,
    setup_context=_setup_context,
)
def _channel_layer_norm(x, gain, residual, eps, gelu):
    out = _empty_output(x, gain, residual, eps, gelu)
    x, rows = _dense(x)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last if rows else torch.contiguous_format)
    run = forward_rows if rows else forward_planes
    run(x, gain.contiguous(), residual, out, eps, gelu)
    return out


def channel_layer_norm(
    x: torch.Tensor,
    gain: torch.Tensor,
    *,
    eps: float = 1e-5,
    gelu: bool = False,
    residual: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """LayerNorm over the channels of every pixel with a gain and no bias; Ba et al., "Layer Normalization" (2016).

    Computes in float32 (float64 for a float64 x). Any number of images and pixels, of 1 to 4096 channels for the Triton
    kernels.

    Args:
        x: Shape (b, c, h, w), any floating-point dtype, any strides; fastest in contiguous or channels_last memory.
        gain: Shape (c,) or (1, c, 1, 1). May be float32 where x is half precision, as under autocast.
        eps: Added to the biased variance; positive.
        gelu: Whether to normalise GELU(x), the exact one, instead of x.
        residual: Added to the result, of the shape of x.
        implementation: Overrides the policy of :mod:`.dispatch` for this call.

    Returns:
        Of the shape and memory format of x. Of the dtype of x; with a residual, of what torch promotes the two to: a
        float32 residual stream stays one.

    Raises:
        TypeError: if a tensor is not one of real floating-point numbers.
        ValueError: for a gain or a residual of another shape, tensors on several devices, an eps that is not positive,
            or an implementation that was asked for and cannot be used.
    """
    if x.dim() != 4:
        raise ValueError(f"x must have shape (b, c, h, w), got {tuple(x.shape)}")
    c = x.shape[1]
    if tuple(gain.shape) not in ((c,), (1, c, 1, 1)):
        raise ValueError(
            f"gain must have shape ({c},) or (1, {c}, 1, 1) for x of shape {tuple(x.shape)}; got {tuple(gain.shape)}"
        )
    check_arguments(x, gain, residual, eps)
    candidates = {"triton": lambda: _triton_reasons(x, gain, residual), "reference": []}
    choice = dispatch.select("channel_layer_norm", candidates, x.device, implementation)
    return (_channel_layer_norm if choice == "triton" else _reference)(x, gain, residual, eps, gelu)


def _triton_reasons(x: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor | None) -> list[str]:
    reasons = dispatch.triton_reasons(x, gain, residual)
    if not 0 < x.shape[1] <= MAX_CHANNELS:
        reasons.append(f"it takes images of 1 to {MAX_CHANNELS} channels, not {x.shape[1]}")
    return reasons
