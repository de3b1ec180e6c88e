"""A 3x3 convolution of images enlarged twice, without enlarging them.

Where every pixel stands for four, the three taps of a row of the kernel fall on two pixels only: on the left one of
each four they see w0 and w1 + w2, on the right one w0 + w1 and w2. So each of the four is a 2x2 convolution of the
images as they are, with sums of the weights: 16 multiplications for four pixels in place of 36. All of it is plain
torch. Where the policy of :mod:`.dispatch` is ``reference``, the images are enlarged.
"""

import itertools

import torch
import torch.nn.functional as F

from . import dispatch
from .arguments import check_floating_point, check_one_device, check_one_dtype
from .images import empty_images, in_format_of, is_channels_last

__all__ = ["summed_kernel", "upsample_conv3x3"]


def upsample_conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kernel: torch.Tensor | None = None,
) -> torch.Tensor:
    """conv2d(x with every pixel repeated in two rows and two columns, weight, bias, padding=1).

    Args:
        x: Images, shape (b, c, h, w), floating point. Weight and bias have its dtype, but under autocast, which casts
            all of them unless one is float64.
        weight: Shape (c_out, c, 3, 3).
        bias: Shape (c_out,), none if not given.
        kernel: What :func:`summed_kernel` makes of ``weight``, for whoever calls this more than once with it.

    Returns:
        Images of shape (b, c_out, 2 h, 2 w) in the memory format of ``x``; under autocast in autocast's dtype,
        otherwise in that of the inputs.

    Raises:
        TypeError: if a tensor is not floating point, or they are of several dtypes that autocast does not make one.
        ValueError: if the shapes do not fit together, or the tensors are on several devices.
    """
    _check(x, weight, bias, kernel)
    # torch's convolutions follow the weight, too.
    return in_format_of(x, _convolved(x, weight, bias, kernel))


def _convolved(x, weight, bias, kernel):
    transposed = _is_transposed(x.device)
    # What interleaves the four pixels is not for transforms of functions, such as vmap.
    transformed = torch._C._are_functorch_transforms_active() and not transposed
    if transformed or dispatch.implementation() == "reference":
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    if kernel is None:
        kernel = summed_kernel(weight)
    if transposed:
        return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
    return _Interleave.apply(F.conv2d(x, kernel, padding=1), bias)


def _is_transposed(device: torch.device) -> bool:
    """Whether it is done by a transposed convolution; see :func:`summed_kernel`."""
    return device.type == "cpu"


def summed_kernel(weight: torch.Tensor) -> torch.Tensor:
    """The weights, summed as the four pixels see them, of a weight of shape (c_out, c, 3, 3).

    Returns:
        On a CPU the kernel of a transposed convolution, shape (c, c_out, 4, 4): there it is the fastest of the ways.
        Elsewhere that of a convolution whose results for the four pixels are channels, shape (4 c_out, c, 2, 2): an
        ordinary one, which libraries know best. Both channels innermost if ``weight`` is.
    """
    last = is_channels_last(weight)
    # All sums of w0, w1, w2 that there are: those of two neighbours, with zeros around.
    sums = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)
    if _is_transposed(weight.device):
        kernel = sums.flip(2, 3).transpose(0, 1)
        return kernel.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    # Each of the four pixels sees every second row and column of them.
    taps = sums.unflatten(3, (2, 2)).unflatten(2, (2, 2))
    if last:
        return taps.permute(3, 5, 0, 2, 4, 1).flatten(0, 2).permute(0, 3, 1, 2)
    return taps.permute(3, 5, 0, 1, 2, 4).flatten(0, 2)


class _Interleave(torch.autograd.Function):
    """The images (b, c, 2 h, 2 w) of four results (b, 4 c, h + 1, w + 1), each of which is used but for one edge.

    The bias (c,), or none, is added on the way: the convolution would read and write its results once more for it.
    """

    @staticmethod
    def forward(ctx, results, bias):
        b, channels, height, width = results.shape
        shape = torch.Size((b, channels // 4, 2 * height - 2, 2 * width - 2))
        ctx.last = is_channels_last(results)
        ctx.bias_dtype = None if bias is None else bias.dtype
        images = empty_images(shape, results, results.dtype, ctx.last)
        for part, result in zip(_parts(images), _used(results), strict=True):
            if bias is None:
                part.copy_(result)
            elif torch.compiler.is_compiling():
                # Compiled it is one pass, too.
                part.copy_(result + bias[:, None, None])
            else:
                torch.add(result, bias[:, None, None], out=part)
        return images

    @staticmethod
    def backward(ctx, gradient):
        of_results = _Separate.apply(gradient, ctx.last) if ctx.needs_input_grad[0] else None
        of_bias = gradient.sum((0, 2, 3), dtype=ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return of_results, of_bias


class _Separate(torch.autograd.Function):
    """The four results of which :class:`_Interleave` makes images, with zeros on the edges."""

    @staticmethod
    def forward(ctx, images, last):
        b, channels, height, width = images.shape
        shape = torch.Size((b, 4 * channels, height // 2 + 1, width // 2 + 1))
        results = empty_images(shape, images, images.dtype, last).zero_()
        for result, part in zip(_used(results), _parts(images), strict=True):
            result.copy_(part)
        return results

    @staticmethod
    def backward(ctx, gradient):
        return _Interleave.apply(gradient, None), None


_CORNERS = tuple(itertools.product(range(2), range(2)))


def _parts(images: torch.Tensor) -> list[torch.Tensor]:
    """Every second row and column."""
    # Not indexed: torch cannot do that to tensors without values that stand for some on a device it does not know.
    by_four = images.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return [by_four.select(5, column).select(3, row) for row, column in _CORNERS]


def _used(results: torch.Tensor) -> list[torch.Tensor]:
    """What is used of each of the four."""
    channels, height, width = results.shape[1] // 4, results.shape[2] - 1, results.shape[3] - 1
    return [
        results.narrow(1, place * channels, channels).narrow(2, row, height).narrow(3, column, width)
        for place, (row, column) in enumerate(_CORNERS)
    ]


def _check(x, weight, bias, kernel) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must have shape (b, c, h, w); got {tuple(x.shape)}")
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"weight must have shape (c_out, {x.shape[1]}, 3, 3), to go with x of shape {tuple(x.shape)}; got"
            f" {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},), a value per row of weight; got {tuple(bias.shape)}"
        )
    out, channels = weight.shape[:2]
    summed = (channels, out, 4, 4) if _is_transposed(x.device) else (4 * out, channels, 2, 2)
    if kernel is not None and kernel.shape != summed:
        raise ValueError(
            f"kernel must have shape {summed}, what summed_kernel makes of the weight on this device; got"
            f" {tuple(kernel.shape)}"
        )
    tensors = {"x": x, "weight": weight, "bias": bias, "kernel": kernel}
    check_floating_point(tensors)
    check_one_device(tensors)
    check_one_dtype(tensors)
