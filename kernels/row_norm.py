"""LayerNorm with a gain and no bias over the last dimension, with an optional residual added to the result.

    y = (x - mean(x)) / sqrt(var(x) + eps) * gain [+ residual]

with the biased variance: Ba, Kiros and Hinton, "Layer Normalization" (2016), arXiv 1607.06450. With g = dy * gain and
n = (x - mean) / sqrt(var + eps), and means over the row,

    dx = (g - mean(g) - n * mean(g * n)) / sqrt(var + eps),    dgain = sum of dy * n over the rows.

Floor: forward one read (two with a residual) and one write, backward two reads and one write. A row is in registers as
a whole, so that backward finds mean and variance again without further traffic, and forward saves nothing but its
inputs. Programs take tile after tile of rows, as many programs as the card holds at once: each reads the gain once and
writes one row of partial sums of its gradient.

The kernels can also apply GELU to x first; :mod:`.channel_norm` runs them on images in channels_last memory.
"""

import torch
import torch.nn.functional as F

from . import dispatch, launch
from .launch import tl, triton

MAX_WIDTH = 8192
# Elements of a tile where rows are short enough to have several in one.
TILE = 4096
# What a multiprocessor holds at once at the register use of these kernels.
WARPS_PER_MULTIPROCESSOR = 16


def _reference(x: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor | None, eps: float) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, gain.dtype)
    # CPUs take half precision with a float32 gain as it comes.
    if gain.dtype == x.dtype or (x.device.type == "cpu" and wide == gain.dtype == torch.float32):
        out = F.layer_norm(x, x.shape[-1:], gain, eps=eps)
    else:
        out = F.layer_norm(x.to(wide), x.shape[-1:], gain.to(wide), eps=eps)
    out = out.to(x.dtype)
    return out if residual is None else out + residual


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
def standardize(h, inside, COUNT: tl.constexpr, AXIS: tl.constexpr, EPS: tl.constexpr):
    """Values minus their mean along an axis of ``COUNT`` values and then zeros, and 1 / their standard deviation.

    The mean is rounded, which shows where it is large against the spread: the mean of what is left corrects it.
    """
    mean = tl.sum(h, AXIS) / COUNT
    centered = h - tl.expand_dims(mean, AXIS)
    if COUNT != h.shape[AXIS]:
        centered = tl.where(inside, centered, 0.0)
    rest = tl.sum(centered, AXIS) / COUNT
    variance = tl.sum(centered * centered, AXIS) / COUNT - rest * rest
    return centered - tl.expand_dims(rest, AXIS), tl.expand_dims(tl.rsqrt(variance + EPS), AXIS)


@triton.jit
def _forward_kernel(
    x_ptr,
    gain_ptr,
    residual_ptr,
    out_ptr,
    rows,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    GELU: tl.constexpr,
):
    column, row = tl.arange(0, C_PADDED), tl.arange(0, ROWS)
    inside_row = (column < C)[None, :]
    offset = row[:, None] * C + column[None, :]
    gain = tl.load(gain_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first = tl.cast(tile, tl.int64) * ROWS
        start = first * C
        inside = (row < rows - first)[:, None]
        if C != C_PADDED:
            inside = inside & inside_row
        h = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            h *= normal_cdf_and_density(h)[0]
        centered, rstd = standardize(h, inside_row, C, 1, EPS)
        y = centered * rstd * gain
        if residual_ptr is not None:
            y += residual
        tl.store(out_ptr + start + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    gain_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    GELU: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_GAIN: tl.constexpr,
):
    column, row = tl.arange(0, C_PADDED), tl.arange(0, ROWS)
    inside_row = (column < C)[None, :]
    offset = row[:, None] * C + column[None, :]
    gain = tl.load(gain_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, C_PADDED), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first = tl.cast(tile, tl.int64) * ROWS
        start = first * C
        inside = (row < rows - first)[:, None]
        if C != C_PADDED:
            inside = inside & inside_row
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        h = x
        if GELU:
            cdf, density = normal_cdf_and_density(x)
            h = x * cdf
            slope = cdf + x * density
        centered, rstd = standardize(h, inside_row, C, 1, EPS)
        normalized = centered * rstd
        if NEED_GAIN:
            total += grad * normalized
        if NEED_X:
            grad *= gain
            mean = tl.sum(grad, 1)[:, None] / C
            projection = tl.sum(grad * normalized, 1)[:, None] / C
            grad = (grad - mean - normalized * projection) * rstd
            if GELU:
                grad *= slope
            tl.store(grad_x_ptr + start + offset, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if NEED_GAIN:
        tl.store(partial_ptr + tl.program_id(0) * C + column, tl.sum(total, 0), mask=column < C)


@triton.jit
def _sum_kernel(partial_ptr, out_ptr, partials, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    column, row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, partials, ROWS):
        inside = (row < partials - first)[:, None] & (column < C)[None, :]
        start = tl.cast(first, tl.int64) * C
        total += tl.load(partial_ptr + start + row[:, None] * C + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < C)


def _tile(c: int) -> tuple[int, int]:
    """Padded width and number of rows."""
    c_padded = launch.next_power_of_2(c)
    return c_padded, max(TILE // c_padded, 1)


def resident_programs(x: torch.Tensor, tiles: int, num_warps: int) -> int:
    """How many programs share the tiles: no more than run at the same time."""
    return min(tiles, launch.target(x.device).multiprocessors * (WARPS_PER_MULTIPROCESSOR // num_warps))


def forward_rows(
    x: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor, eps: float, gelu: bool
) -> None:
    """Normalise rows of ``gain.numel()`` values that lie one after the other in memory, whatever the shape says."""
    c = gain.numel()
    rows = x.numel() // c
    c_padded, tile = _tile(c)
    num_warps = 4 if c_padded <= TILE else 8
    grid = resident_programs(x, launch.ceil_div(rows, tile), num_warps)
    sizes = dict(C=c, C_PADDED=c_padded, ROWS=tile)
    launch.run(_forward_kernel, (grid,), x, gain, residual, out, rows, num_warps=num_warps, **sizes, EPS=eps, GELU=gelu)


def backward_rows(
    grad: torch.Tensor,
    x: torch.Tensor,
    gain: torch.Tensor,
    grad_x: torch.Tensor,
    grad_gain: torch.Tensor,
    eps: float,
    gelu: bool,
) -> None:
    """Gradients of :func:`forward_rows` into ``grad_x`` and ``grad_gain``, of which empty ones are not wanted."""
    c = gain.numel()
    rows = x.numel() // c
    c_padded, tile = _tile(c)
    need_x, need_gain = grad_x.numel() > 0, grad_gain.numel() > 0
    num_warps = 8 if c_padded <= TILE else 16
    grid = resident_programs(x, launch.ceil_div(rows, tile), num_warps)
    partial = x.new_empty((grid if need_gain else 0, c), dtype=torch.float32)
    sizes = dict(C=c, C_PADDED=c_padded, ROWS=tile)
    needs = dict(NEED_X=need_x, NEED_GAIN=need_gain)
    if need_x or need_gain:
        tensors = grad, x, gain, grad_x, partial
        launch.run(_backward_kernel, (grid,), *tensors, rows, num_warps=num_warps, **sizes, EPS=eps, GELU=gelu, **needs)
    if need_gain:
        sum_partials(partial, grad_gain)


def sum_partials(partial: torch.Tensor, out: torch.Tensor) -> None:
    """Sum (partials, c) over the partials in a fixed order; zeros if there are none."""
    partials, c = partial.shape
    launch.run(_sum_kernel, (launch.ceil_div(c, 32),), partial, out, partials, C=c, COLUMNS=32, ROWS=64)


def output_dtype(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    """That of x, or what torch promotes ``x + residual`` to."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


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
    reasons = dispatch.triton_reasons(x, gain, residual)
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        reasons.append(f"it takes rows of 1 to {MAX_WIDTH} values, not {x.shape[-1]}")
    choice = dispatch.select("layer_norm", {"triton": reasons, "reference": []}, x.device, implementation)
    return (_layer_norm if choice == "triton" else _reference)(x, gain, residual, eps)
