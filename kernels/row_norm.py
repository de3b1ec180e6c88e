"""LayerNorm with a gain and no bias over the last dimension, with an optional residual added to the result.

    y = (x - mean(x)) / sqrt(var(x) + eps) * gain [+ residual]

with the biased variance: Ba, Kiros and Hinton, "Layer Normalization" (2016), arXiv 1607.06450. With g = dy * gain and
n = (x - mean) / sqrt(var + eps), and means over the row,

    dx = (g - mean(g) - n * mean(g * n)) / sqrt(var + eps),    dgain = sum of dy * n over the rows.

The kernels are those of :mod:`.layer_norm_rows`.
"""

import torch
import torch.nn.functional as F

from . import dispatch, launch
from .layer_norm_rows import backward_rows, forward_rows
from .layer_norm_tiles import check_arguments, output_dtype

MAX_WIDTH = 8192


def _reference(x: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor | None, eps: float) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, gain.dtype)
    # CPUs take half precision with a float32 gain as it comes.
    if gain.dtype == x.dtype or (x.device.type == "cpu" and wide == gain.dtype == torch.float32):
        out = F.layer_norm(x, x.shape[-1:], gain, eps=eps)
    else:
        out = F.layer_norm(x.to(wide), x.shape[-1:], gain.to(wide), eps=eps)
    out = out.to(x.dtype)
    return out if residual is None else out + residual


def _empty_output(x, gain, residual, eps):
    return x.new_empty(x.shape, dtype=output_dtype(x, residual))


def _empty_gradients(grad, x, gain, eps, need_x, need_gain):
    return x.new_empty(x.shape if need_x else 0), gain.new_empty(gain.shape if need_gain else 0)


def _setup_context(ctx, inputs, output):
    x, gain, residual, ctx.eps = inputs
    ctx.save_for_backward(x, gain)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, grad):
    need_x, need_gain, need_residual, _ = ctx.needs_input_grad
    grad_x = grad_gain = None
    if need_x or need_gain:
        grad_x, grad_gain = _layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps, need_x, need_gain)
    return (
        grad_x if need_x else None,
        grad_gain if need_gain else None,
        grad.to(ctx.residual_dtype) if need_residual else None,
        None,
    )


@launch.define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor gain, float eps, bool need_x, bool need_gain)"
    " -> (Tensor, Tensor)",
    _empty_gradients,
)
def _layer_norm_backward(grad, x, gain, eps, need_x, need_gain):
    grad_x, grad_gain = _empty_gradients(grad, x, gain, eps, need_x, need_gain)
    backward_rows(grad.contiguous(), x.contiguous(), gain.contiguous(), grad_x, grad_gain, eps, gelu=False)
    return grad_x, grad_gain


@launch.define(
    "layer_norm(Tensor x, Tensor gain, Tensor? residual, float eps) -> Tensor",
    _empty_output,
    backward=_backward,
    setup_context=_setup_context,
)
def _layer_norm(x, gain, residual, eps):
    out = _empty_output(x, gain, residual, eps)
    residual = None if residual is None else residual.contiguous()
    forward_rows(x.contiguous(), gain.contiguous(), residual, out, eps, gelu=False)
    return out


def layer_norm(
    x: torch.Tensor,
    gain: torch.Tensor,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """LayerNorm over the last dimension with a gain and no bias; Ba et al., "Layer Normalization" (2016).

    Computes in float32 (float64 for a float64 x). Any number of rows, of 1 to 8192 values each for the Triton kernel.

    Args:
        x: Shape (..., c), any floating-point dtype, any strides.
        gain: Shape (c,). May be float32 where x is half precision, as under autocast.
        eps: Added to the biased variance; positive.
        residual: Added to the result, of the shape of x.
        implementation: Overrides the policy of :mod:`.dispatch` for this call.

    Returns:
        Contiguous, of the shape of x. Of the dtype of x; with a residual, of what torch promotes the two to: a float32
        residual stream stays one.

    Raises:
        TypeError: if a tensor is not one of real floating-point numbers.
        ValueError: for a gain or a residual of another shape, tensors on several devices, an eps that is not positive,
            or an implementation that was asked for and cannot be used.
    """
    if x.dim() == 0 or gain.shape != x.shape[-1:]:
        raise ValueError(
            f"gain must have shape (c,) for x of shape (..., c); got {tuple(gain.shape)} for {tuple(x.shape)}"
        )
    check_arguments(x, gain, residual, eps)
    candidates = {"triton": lambda: _triton_reasons(x, gain, residual), "reference": []}
    choice = dispatch.select("layer_norm", candidates, x.device, implementation)
    return (_layer_norm if choice == "triton" else _reference)(x, gain, residual, eps)


def _triton_reasons(x: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor | None) -> list[str]:
    reasons = dispatch.triton_reasons(x, gain, residual)
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        reasons.append(f"it takes rows of 1 to {MAX_WIDTH} values, not {x.shape[-1]}")
    return reasons
