"""What :mod:`.row_norm` and :mod:`.channel_norm` share: arithmetic on tiles, partial sums, what arguments must be."""

import torch

from . import launch
from .launch import tl, triton


@triton.jit
def normal_cdf_and_density(x):
    """Of the standard normal distribution: GELU is x * cdf, its derivative cdf + x * density.

    Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26 (error at most 7.5e-8 here): its exponential is
    that of the density, so that both together cost less than one erf.
    """
    exponential = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(x))
    tail = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * t * tail * exponential
    return tl.where(x < 0, tail, 1.0 - tail), 0.3989422804014327 * exponential


@triton.jit
def activated(x, GELU: tl.constexpr):
    """What is normalised, GELU(x) or x itself, and its derivative."""
    h, slope = x, 1.0
    if GELU:
        cdf, density = normal_cdf_and_density(x)
        h, slope = x * cdf, cdf + x * density
    return h, slope


@triton.jit
def standardize(h, inside, COUNT: tl.constexpr, AXIS: tl.constexpr, EPS: tl.constexpr):
    """Values minus their mean along an axis of ``COUNT`` values and then zeros, and 1 / their standard deviation.

    The mean is rounded, which shows where it is large against the spread: the mean of what is left corrects it. Of a
    spread that is nothing but this rounding a card, which rounds a product and a sum once, may find less than nothing.
    """
    mean = tl.sum(h, AXIS) / COUNT
    centered = h - tl.expand_dims(mean, AXIS)
    if COUNT != h.shape[AXIS]:
        centered = tl.where(inside, centered, 0.0)
    rest = tl.sum(centered, AXIS) / COUNT
    variance = tl.sum(centered * centered, AXIS) / COUNT - rest * rest
    variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return centered - tl.expand_dims(rest, AXIS), tl.expand_dims(tl.rsqrt(variance + EPS), AXIS)


@triton.jit
def input_gradient(grad, gain, normalized, rstd, slope, COUNT: tl.constexpr, AXIS: tl.constexpr):
    """Gradient of x from that of the output; ``slope`` is the derivative of what was done to x before."""
    grad *= gain
    mean = tl.expand_dims(tl.sum(grad, AXIS), AXIS) / COUNT
    projection = tl.expand_dims(tl.sum(grad * normalized, AXIS), AXIS) / COUNT
    return (grad - mean - normalized * projection) * rstd * slope


@triton.jit(do_not_specialize=["partials"])
def _sum_kernel(partial_ptr, out_ptr, partials, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    column, row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, partials, ROWS):
        inside = (row < partials - first)[:, None] & (column < C)[None, :]
        start = tl.cast(first, tl.int64) * C
        total += tl.load(partial_ptr + start + row[:, None] * C + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < C)


def empty_partials(grad_gain: torch.Tensor, programs: int) -> torch.Tensor:
    """Room for a row of partial sums of each program, (programs, c); the row of a single one is the gradient itself."""
    c = grad_gain.numel()
    if c and programs == 1:
        return grad_gain.view(1, c)
    return grad_gain.new_empty((programs, c), dtype=torch.float32)


def sum_partials(partial: torch.Tensor, out: torch.Tensor) -> None:
    """Sum partials, (programs, c), over the programs in a fixed order; zeros if there are none."""
    programs, c = partial.shape
    if programs != 1:
        launch.run(_sum_kernel, (launch.ceil_div(c, 32),), partial, out, programs, C=c, COLUMNS=32, ROWS=64)


def output_dtype(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    """That of x, or what torch promotes ``x + residual`` to."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def check_arguments(x: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor | None, eps: float) -> None:
    """What all the norms ask of their arguments, whichever implementation runs.

    Raises:
        TypeError: if a tensor is not one of real floating-point numbers.
        ValueError: for a residual of another shape than x, tensors on several devices, or an eps that is not positive.
    """
    for name, tensor in (("x", x), ("gain", gain), ("residual", residual)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}; convert it first")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; it is on {tensor.device}; move it there")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {tuple(x.shape)}; got {tuple(residual.shape)};"
            " expand it if it is to be broadcast"
        )
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}: constant rows have no variance to divide by")
