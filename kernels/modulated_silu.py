"""silu(x * (scale + 1) + shift) in float32 on a CPU, with one step back where autograd would take nine."""

import torch
import torch.nn.functional as F

from . import dispatch

__all__ = ["modulated_silu"]


def modulated_silu(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """silu(x * (scale + 1) + shift).

    Args:
        x: Images, shape (b, c, h, w).
        scale: Shape (b, c).
        shift: Shape (b, c).

    Returns:
        Shape (b, c, h, w).
    """
    if torch.is_grad_enabled() and dispatch.is_eager_float32_on_cpu(x, scale, shift):
        return _ModulatedSilu.apply(x, scale, shift)
    modulated = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None] + 1)
    # In place unless the backward pass needs what was there.
    return F.silu(modulated, inplace=not torch.is_grad_enabled())


class _ModulatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift):
        factor = scale[:, :, None, None] + 1
        modulated = torch.addcmul(shift[:, :, None, None], x, factor)
        ctx.save_for_backward(x, scale, shift, factor, modulated)
        return F.silu(modulated)

    @staticmethod
    def backward(ctx, gradient):
        x, scale, shift, factor, modulated = ctx.saved_tensors
        if torch.is_grad_enabled():
            # For gradients of these gradients autograd must see where they come from.
            factor = scale[:, :, None, None] + 1
            modulated = torch.addcmul(shift[:, :, None, None], x, factor)
            sigmoid = torch.sigmoid(modulated)
            of_modulated = gradient * sigmoid * (1 + modulated * (1 - sigmoid))
        else:
            of_modulated = torch.ops.aten.silu_backward(gradient, modulated)
        of_x, of_scale, of_shift = ctx.needs_input_grad
        return (
            of_modulated * factor if of_x else None,
            (of_modulated * x).sum((2, 3)) if of_scale else None,
            of_modulated.sum((2, 3)) if of_shift else None,
        )
