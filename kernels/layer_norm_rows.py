"""LayerNorm of rows that lie one after the other in memory: tokens, or the pixels of channels_last images.

Floor: forward one read (two with a residual) and one write, backward two reads and one write. A row is in registers as
a whole, so that backward finds mean and variance again without further traffic, and forward saves nothing but its
inputs. Programs take tile after tile of rows, as many programs as the card holds at once, or fewer: each reads the gain
once and writes one row of partial sums of its gradient, which must not be much of what it moves, see :mod:`.programs`.
In half precision, with a float32 gain, that takes 20 rows a program forward and 40 backward. GELU can come first.
"""

import torch

from . import launch, programs
from .launch import tl, triton
from .layer_norm_tiles import activated, empty_partials, input_gradient, standardize, sum_partials

# Elements of a tile where rows are short enough to have several in one: programs of 4 or 8 warps, so that a
# multiprocessor has some that load while others compute.
TILE = 4096
# Of a program where the gain allows fewer programs than that: then each has as much under way as it can.
MOST_WARPS = 16


@triton.jit(do_not_specialize=["rows"])
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
        h = activated(h, GELU)[0]
        centered, rstd = standardize(h, inside_row, C, 1, EPS)
        y = centered * rstd * gain
        if residual_ptr is not None:
            y += residual
        tl.store(out_ptr + start + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
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
        h, slope = activated(x, GELU)
        centered, rstd = standardize(h, inside_row, C, 1, EPS)
        normalized = centered * rstd
        if NEED_GAIN:
            total += grad * normalized
        if NEED_X:
            grad = input_gradient(grad, gain, normalized, rstd, slope, C, 1)
            tl.store(grad_x_ptr + start + offset, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if NEED_GAIN:
        partial = tl.sum(total, 0).to(partial_ptr.dtype.element_ty)
        tl.store(partial_ptr + tl.program_id(0) * C + column, partial, mask=column < C)


def _plan(x: torch.Tensor, c: int, per_thread: int, moved: int, each: int) -> tuple[int, int, dict[str, int]]:
    """Programs, warps and tile sizes.

    Args:
        x: Rows of ``c`` values.
        c: Width of a row.
        per_thread: Elements of a tile for each thread.
        moved: Bytes of all that is read and written once.
        each: Bytes of vectors and partial sums that each program moves.
    """
    c_padded, most = launch.next_power_of_2(c), programs.affordable(moved, each)
    for tile in (TILE, MOST_WARPS * 32 * per_thread):
        rows = max(tile // c_padded, 1)
        num_warps = rows * c_padded // (32 * per_thread)
        tiles = launch.ceil_div(x.numel() // c, rows)
        number = min(tiles, programs.resident(x.device, num_warps))
        if number <= most:
            break
    return programs.shared_out(tiles, min(number, most)), num_warps, dict(C=c, C_PADDED=c_padded, ROWS=rows)


def forward_rows(
    x: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor, eps: float, gelu: bool
) -> None:
    """Normalise rows of ``gain.numel()`` values that lie one after the other in memory, whatever the shape says."""
    c = gain.numel()
    moved = x.nbytes + out.nbytes + (0 if residual is None else residual.nbytes)
    number, num_warps, sizes = _plan(x, c, 32, moved, gain.nbytes)
    tensors = x, gain, residual, out, x.numel() // c
    launch.run(_forward_kernel, (number,), *tensors, num_warps=num_warps, **sizes, EPS=eps, GELU=gelu)


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
    need_x, need_gain = grad_x.numel() > 0, grad_gain.numel() > 0
    # Partial sums are written and read.
    each = gain.nbytes + 2 * 4 * grad_gain.numel()
    number, num_warps, sizes = _plan(x, c, 16, x.nbytes + grad.nbytes + grad_x.nbytes, each)
    partial = empty_partials(grad_gain, number)
    needs = dict(NEED_X=need_x, NEED_GAIN=need_gain)
    if need_x or need_gain:
        tensors = grad, x, gain, grad_x, partial, x.numel() // c
        launch.run(_backward_kernel, (number,), *tensors, num_warps=num_warps, **sizes, EPS=eps, GELU=gelu, **needs)
    if need_gain:
        sum_partials(partial, grad_gain)
