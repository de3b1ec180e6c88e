"""A convolution with a wide kernel on images of few channels, whose weight's gradient is a convolution itself.

On a CPU oneDNN has no good way to the gradient of such a weight: for a 15x15 kernel on 3 or 6 channels it mostly takes
two to six times as long as for the same sums done as a convolution in which batch and channels have changed places,
with the gradient of the result as its kernel. All of it is plain torch.
"""

import functools

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input

from . import dispatch

__all__ = ["wide_conv2d"]

# Kernels of 7 pixels are no faster so, of more channels oneDNN's own way is good, and larger images than these it may
# take for kernels too large.
_WIDE, _FEW_CHANNELS, _MOST_PIXELS = 9, 8, 64 * 64


@functools.cache
def _is_convolution_fast() -> bool:
    """Whether oneDNN convolves with kernels as large as images: with AVX-512 alone."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def wide_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """conv2d(x, weight, bias, padding="same").

    Args:
        x: Images, shape (b, c, h, w).
        weight: Shape (c_out, c, side, side), the side length odd.
        bias: Shape (c_out,), none if not given.

    Returns:
        Images of shape (b, c_out, h, w).

    Raises:
        ValueError: if the weight is of another shape.
    """
    side = weight.shape[-1] if weight.ndim == 4 else 0
    if side % 2 == 0 or weight.shape[2] != side:
        raise ValueError(
            "weight must have shape (c_out, c, side, side), the side length odd, so that images keep their size; got"
            f" {tuple(weight.shape)}: call torch.nn.functional.conv2d for others"
        )
    # Asked first, so that torch.compile, for which it is a convolution like others, traces none of the rest.
    if not torch.compiler.is_compiling() and side >= _WIDE and _is_gradient_slow(x, weight, bias):
        return _WideConv.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=side // 2)


def _is_gradient_slow(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the weight's gradient is wanted, and faster as a convolution."""
    return (
        weight.shape[1] <= _FEW_CHANNELS
        and torch.is_grad_enabled()
        and weight.requires_grad
        and x.ndim == 4
        and x.numel() > 0
        and x.shape[2] * x.shape[3] <= _MOST_PIXELS
        and _is_convolution_fast()
        and torch.backends.mkldnn.enabled
        and dispatch.is_eager_float32_on_cpu(*(tensor for tensor in (x, weight, bias) if tensor is not None))
    )


class _WideConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx, gradient):
        # Of operators that have derivatives, so that there are second ones.
        x, weight = ctx.saved_tensors
        padding, wanted = weight.shape[-1] // 2, ctx.needs_input_grad
        of_x = of_weight = None
        if wanted[0]:
            of_x = conv2d_input(x.shape, weight, gradient, padding=padding)
        if wanted[1]:
            images, kernel = (_exchanged(tensor) for tensor in (x, gradient))
            of_weight = F.conv2d(images, kernel, padding=padding).transpose(0, 1).contiguous()
        return of_x, of_weight, gradient.sum((0, 2, 3)) if wanted[2] else None


def _exchanged(images: torch.Tensor) -> torch.Tensor:
    """Batch and channels, in channels_last memory: of large images oneDNN is up to four times as fast so."""
    # Said by permutations, since vmap, which batched gradients come by, knows no memory formats.
    return images.permute(1, 2, 3, 0).contiguous().permute(0, 3, 1, 2)
