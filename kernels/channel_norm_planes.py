"""LayerNorm over the channels of every pixel in NCHW memory: the kernels of :mod:`.channel_norm` for that format.

Tiles are [channels, pixels], pixels innermost, so that neighbouring threads read neighbouring addresses. Floor: forward
one read (two with a residual) and one write, backward two reads and one write, while all channels of 8 pixels fit in
registers: 2048 channels of one tensor, 1024 of two. Wider images are read twice, block by block of channels: once for
the statistics, combined by Chan's formula, and once for the result; forward one read more, backward two. What a program
reads again is small enough to be in the cache.
"""

import torch

from . import launch, programs
from .launch import tl, triton
from .layer_norm_tiles import activated, empty_partials, input_gradient, standardize, sum_partials

# 16 bytes of half precision.
MIN_PIXELS, MAX_PIXELS = 8, 128
# Elements of a tile: as a rule, and what registers hold at most of one tensor.
TILE, LARGEST_TILE = 4096, 16384
# Of a tile with a part of the channels.
WIDE_TILE, WIDE_PIXELS = 4096, 64


@triton.jit
def _tile_of(tile, pixels, C: tl.constexpr, PIXELS: tl.constexpr):
    """Where a tile starts in memory, and how many pixels its image has from there on."""
    per_image = tl.cdiv(pixels, PIXELS)
    first = tile % per_image * PIXELS
    return tl.cast(tile // per_image, tl.int64) * C * pixels + first, pixels - first


@triton.jit(do_not_specialize=["images"])
def _forward_kernel(
    x_ptr,
    gain_ptr,
    residual_ptr,
    out_ptr,
    images,
    pixels,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    PIXELS: tl.constexpr,
    EPS: tl.constexpr,
    GELU: tl.constexpr,
):
    channel, pixel = tl.arange(0, C_PADDED), tl.arange(0, PIXELS)
    inside_channel = (channel < C)[:, None]
    offset = channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
    gain = tl.load(gain_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[:, None]
    for tile in tl.range(tl.program_id(0), images * tl.cdiv(pixels, PIXELS), tl.num_programs(0)):
        start, left = _tile_of(tile, pixels, C, PIXELS)
        inside = (pixel < left)[None, :]
        if C != C_PADDED:
            inside = inside & inside_channel
        h = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        h = activated(h, GELU)[0]
        centered, rstd = standardize(h, inside_channel, C, 0, EPS)
        y = centered * (rstd * gain)
        if residual_ptr is not None:
            y += residual
        tl.store(out_ptr + start + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["images"])
def _backward_kernel(
    grad_ptr,
    x_ptr,
    gain_ptr,
    grad_x_ptr,
    partial_ptr,
    images,
    pixels,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    PIXELS: tl.constexpr,
    EPS: tl.constexpr,
    GELU: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_GAIN: tl.constexpr,
):
    channel, pixel = tl.arange(0, C_PADDED), tl.arange(0, PIXELS)
    inside_channel = (channel < C)[:, None]
    offset = channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
    gain = tl.load(gain_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((C_PADDED,), tl.float32)
    for tile in tl.range(tl.program_id(0), images * tl.cdiv(pixels, PIXELS), tl.num_programs(0)):
        start, left = _tile_of(tile, pixels, C, PIXELS)
        inside = (pixel < left)[None, :]
        if C != C_PADDED:
            inside = inside & inside_channel
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        h, slope = activated(x, GELU)
        centered, rstd = standardize(h, inside_channel, C, 0, EPS)
        normalized = centered * rstd
        if NEED_GAIN:
            total += tl.sum(grad * normalized, 1)
        if NEED_X:
            grad = input_gradient(grad, gain, normalized, rstd, slope, C, 0)
            tl.store(grad_x_ptr + start + offset, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if NEED_GAIN:
        partial = total.to(partial_ptr.dtype.element_ty)
        tl.store(partial_ptr + tl.program_id(0) * C + channel, partial, mask=channel < C)


@triton.jit
def _wide_statistics(
    x_ptr,
    grad_ptr,
    gain_ptr,
    start,
    left,
    pixels,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    EPS: tl.constexpr,
    GELU: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Mean (as a pivot and the mean distance from it) and 1 / standard deviation of h; of g, mean and mean of g * n.

    Block after block of channels, combined as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm
    for Computing Sample Variances" (1979). The mean distance from any one of the values is rounded less than the mean.
    """
    block, pixel = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
    pivot = activated(tl.load(x_ptr + start + pixel, mask=pixel < left, other=0.0).to(tl.float32), GELU)[0][None, :]
    mean = tl.zeros((1, PIXELS), tl.float32)
    squares = tl.zeros((1, PIXELS), tl.float32)
    grad_mean = tl.zeros((1, PIXELS), tl.float32)
    products = tl.zeros((1, PIXELS), tl.float32)
    for first in tl.range(0, C, CHANNELS):
        channel = first + block
        inside_channel = (channel < C)[:, None]
        offset = channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
        inside = inside_channel & (pixel < left)[None, :]
        h = activated(tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32), GELU)[0] - pivot
        count = tl.minimum(C - first, CHANNELS)
        share = count / (first + count)
        block_mean = tl.sum(tl.where(inside_channel, h, 0.0), 0)[None, :] / count
        centered = tl.where(inside_channel, h - block_mean, 0.0)
        apart = block_mean - mean
        mean += apart * share
        squares += tl.sum(centered * centered, 0)[None, :] + apart * apart * (first * share)
        if GRADIENT:
            gain = tl.load(gain_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[:, None]
            grad = tl.load(grad_ptr + start + offset, mask=inside, other=0.0).to(tl.float32) * gain
            grad_apart = tl.sum(grad, 0)[None, :] / count - grad_mean
            grad_mean += grad_apart * share
            products += tl.sum(grad * centered, 0)[None, :] + apart * grad_apart * (first * share)
    rstd = tl.rsqrt(squares / C + EPS)
    return pivot, mean, rstd, grad_mean, products / C * rstd


@triton.jit
def _wide_forward_kernel(
    x_ptr,
    gain_ptr,
    residual_ptr,
    out_ptr,
    pixels,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    EPS: tl.constexpr,
    GELU: tl.constexpr,
):
    start, left = _tile_of(tl.program_id(0), pixels, C, PIXELS)
    pivot, mean, rstd, _, _ = _wide_statistics(
        x_ptr, x_ptr, gain_ptr, start, left, pixels, C, CHANNELS, PIXELS, EPS, GELU, GRADIENT=False
    )
    pixel = tl.arange(0, PIXELS)
    for first in tl.range(0, C, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        offset = channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
        inside = (channel < C)[:, None] & (pixel < left)[None, :]
        h = activated(tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32), GELU)[0]
        gain = tl.load(gain_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[:, None]
        y = (h - pivot - mean) * rstd * gain
        if residual_ptr is not None:
            y += tl.load(residual_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + start + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _wide_backward_kernel(
    grad_ptr,
    x_ptr,
    gain_ptr,
    grad_x_ptr,
    partial_ptr,
    pixels,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    EPS: tl.constexpr,
    GELU: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_GAIN: tl.constexpr,
):
    start, left = _tile_of(tl.program_id(0), pixels, C, PIXELS)
    pivot, mean, rstd, grad_mean, projection = _wide_statistics(
        x_ptr, grad_ptr, gain_ptr, start, left, pixels, C, CHANNELS, PIXELS, EPS, GELU, GRADIENT=NEED_X
    )
    pixel = tl.arange(0, PIXELS)
    for first in tl.range(0, C, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        offset = channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
        inside = (channel < C)[:, None] & (pixel < left)[None, :]
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        h, slope = activated(x, GELU)
        normalized = (h - pivot - mean) * rstd
        if NEED_GAIN:
            partial = partial_ptr + tl.program_id(0).to(tl.int64) * C + channel
            tl.store(partial, tl.sum(grad * normalized, 1).to(partial_ptr.dtype.element_ty), mask=channel < C)
        if NEED_X:
            grad *= tl.load(gain_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[:, None]
            grad = (grad - grad_mean - normalized * projection) * rstd * slope
            tl.store(grad_x_ptr + start + offset, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)


def _plan(
    x: torch.Tensor, most: int, per_thread: int, fewest: int, moved: int, each: int
) -> tuple[bool, int, int, dict[str, int]]:
    """Whether channels come block by block, programs, warps and tile sizes.

    Args:
        x: Images.
        most: Elements of a tile at most.
        per_thread: Those of a thread, or more if there were too many threads.
        fewest: Pixels of a tile at least if channels come block by block: each reads gains anew, and has partial sums.
        moved: Bytes of all that is read and written once.
        each: Bytes of vectors and partial sums that each program moves.
    """
    b, c, h, w = x.shape
    c_padded = launch.next_power_of_2(c)
    if h * w % 16:
        # Lines that are not aligned come value by value, and every value has an address of its own.
        most //= 2
    if c_padded * MIN_PIXELS <= most:
        longest = min(max(launch.next_power_of_2(h * w), 2 * MIN_PIXELS), MAX_PIXELS)
        affordable = programs.affordable(moved, each)
        # Where the gain allows only few programs, each has as much under way as it can.
        for tile in (min(TILE, most), most):
            pixels = min(max(tile // c_padded, 2 * MIN_PIXELS), longest)
            pixels = pixels if c_padded * pixels <= most else MIN_PIXELS
            num_warps = min(max(c_padded * pixels // (32 * per_thread), 4), 16)
            tiles = b * launch.ceil_div(h * w, pixels)
            number = min(tiles, programs.resident(x.device, num_warps))
            if number <= affordable:
                break
        sizes = dict(C=c, C_PADDED=c_padded, PIXELS=pixels)
        return False, programs.shared_out(tiles, min(number, affordable)), num_warps, sizes
    # Longer lines where the image is large enough to keep the card busy all the same.
    busy = b * launch.ceil_div(h * w, WIDE_PIXELS) >= launch.target(x.device).multiprocessors
    pixels = WIDE_PIXELS if busy else fewest
    return True, b * launch.ceil_div(h * w, pixels), 8, dict(C=c, CHANNELS=WIDE_TILE // pixels, PIXELS=pixels)


def forward_planes(
    x: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor, eps: float, gelu: bool
) -> None:
    """Normalise contiguous images (b, c, h, w)."""
    b, _, h, w = x.shape
    moved = x.nbytes + out.nbytes + (0 if residual is None else residual.nbytes)
    most = LARGEST_TILE if residual is None else LARGEST_TILE // 2
    wide, number, num_warps, sizes = _plan(x, most, 32, 2 * MIN_PIXELS, moved, gain.nbytes)
    kernel, numbers = (_wide_forward_kernel, (h * w,)) if wide else (_forward_kernel, (b, h * w))
    tensors = x, gain, residual, out
    launch.run(kernel, (number,), *tensors, *numbers, num_warps=num_warps, **sizes, EPS=eps, GELU=gelu)


def backward_planes(
    grad: torch.Tensor,
    x: torch.Tensor,
    gain: torch.Tensor,
    grad_x: torch.Tensor,
    grad_gain: torch.Tensor,
    eps: float,
    gelu: bool,
) -> None:
    """Gradients of :func:`forward_planes` into ``grad_x`` and ``grad_gain``, of which empty ones are not wanted."""
    b, _, h, w = x.shape
    need_x, need_gain = grad_x.numel() > 0, grad_gain.numel() > 0
    # Partial sums are written and read.
    each = gain.nbytes + 2 * 4 * grad_gain.numel()
    moved = x.nbytes + grad.nbytes + grad_x.nbytes
    wide, number, num_warps, sizes = _plan(x, LARGEST_TILE // 2, 16, 4 * MIN_PIXELS, moved, each)
    kernel, numbers = (_wide_backward_kernel, (h * w,)) if wide else (_backward_kernel, (b, h * w))
    partial = empty_partials(grad_gain, number)
    needs = dict(NEED_X=need_x, NEED_GAIN=need_gain)
    if need_x or need_gain:
        tensors = grad, x, gain, grad_x, partial
        launch.run(kernel, (number,), *tensors, *numbers, num_warps=num_warps, **sizes, EPS=eps, GELU=gelu, **needs)
    if need_gain:
        sum_partials(partial, grad_gain)
