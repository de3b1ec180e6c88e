"""GroupNorm + scale/shift + SiLU of groups that fit into one program's registers.

Forward reads and writes the images once, backward reads them and the output's gradient once and writes once: the floor.
One program computes one group of one sample.
"""

import torch

from . import launch
from .group_norm_tiles import (
    Operands,
    affine,
    factor_of,
    load_both,
    load_one,
    pointers,
    run_backward,
    run_forward,
    silu_gradient,
    store_one,
)
from .launch import tl, triton

# Bytes of a group, both sides rounded up to powers of two, such that backward, which keeps two float32 for each value,
# addresses and temporaries, stays within the 64 registers that a thread of 1024 may have, or the 128 of one of 512.
LARGEST_TILE, BYTES_PER_THREAD = 32768, 32


def tile(pixels: int, group_width: int) -> tuple[int, int]:
    """Pixels and channels of the tile that holds a group."""
    return launch.next_power_of_2(pixels), launch.next_power_of_2(group_width)


def fits(operands: Operands) -> bool:
    """Whether a group fits into one program."""
    block_p, block_c = tile(operands.pixels, operands.group_width)
    return block_p * block_c * operands.x.element_size() <= LARGEST_TILE


def _config(operands: Operands) -> dict[str, int]:
    block_p, block_c = tile(operands.pixels, operands.group_width)
    num_warps = block_p * block_c * operands.x.element_size() // (32 * BYTES_PER_THREAD)
    # Twice as much for each thread needs fewer registers in channels_last memory, and more in NCHW.
    most = 16 if operands.channels_last else 32
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": min(max(num_warps, 1), most)}


@triton.jit
def _forward_kernel(
    x,
    skip,
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    y,
    statistics,
    channels_x,
    channels,
    pixels,
    group_width,
    groups,
    EPS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SKIP_SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group = tl.program_id(0) % groups
    sample = (tl.program_id(0) // groups).to(tl.int64)
    first = group * group_width
    pixel, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    inside = channel < group_width
    mask = (pixel < pixels)[:, None] & inside[None, :]
    values = load_both(
        x, skip, sample, 0, first, pixel, channel, mask, channels_x, channels, pixels,
        HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
    )  # fmt: skip

    # The mean as a sum of two float32: where it is large against the deviations, its own rounding would show in them.
    count = tl.cast(group_width, tl.float32) * tl.cast(pixels, tl.float32)
    mean = tl.sum(tl.sum(values, axis=0), axis=0) / count
    centred = tl.where(mask, values - mean, 0.0)
    rest = tl.sum(tl.sum(centred, axis=0), axis=0) / count
    variance = tl.sum(tl.sum(centred * centred, axis=0), axis=0) / count - rest * rest
    rstd = 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + EPS)
    row = statistics + sample * 3 * groups + group
    tl.store(row, mean)
    tl.store(row + groups, rest)
    tl.store(row + 2 * groups, rstd)

    gain, offset = affine(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, first + channel, inside,
        HAS_WEIGHT, HAS_BIAS, HAS_SCALE,
    )  # fmt: skip
    u = (centred - rest) * rstd * gain[None, :] + offset[None, :]
    if SILU:
        u *= tl.sigmoid(u)
    store_one(y, u, sample, 0, first, pixel, channel, mask, channels, pixels, CHANNELS_LAST)


@triton.jit
def _backward_kernel(
    x,
    skip,
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    dy,
    statistics,
    dx,
    dskip,
    sums,
    channels_x,
    channels,
    pixels,
    group_width,
    groups,
    NEED_X: tl.constexpr,
    NEED_SKIP: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SKIP_SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group = tl.program_id(0) % groups
    sample = (tl.program_id(0) // groups).to(tl.int64)
    first = group * group_width
    pixel, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    inside = channel < group_width
    mask = (pixel < pixels)[:, None] & inside[None, :]
    values = load_both(
        x, skip, sample, 0, first, pixel, channel, mask, channels_x, channels, pixels,
        HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
    )  # fmt: skip
    du = load_one(dy, sample, 0, first, pixel, channel, mask, channels, pixels, CHANNELS_LAST)

    row = statistics + sample * 3 * groups + group
    mean, rest, rstd = tl.load(row), tl.load(row + groups), tl.load(row + 2 * groups)
    gain, offset = affine(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, first + channel, inside,
        HAS_WEIGHT, HAS_BIAS, HAS_SCALE,
    )  # fmt: skip
    normalised = ((values - mean) - rest) * rstd
    if SILU:
        du *= silu_gradient(normalised * gain[None, :] + offset[None, :])
    # Outside of the group the recomputed values mean nothing.
    du = tl.where(mask, du, 0.0)
    normalised = tl.where(mask, normalised, 0.0)
    p, q = tl.sum(du, axis=0), tl.sum(du * normalised, axis=0)
    if NEED_SUMS:
        sums_row = sums + sample * 2 * channels + first + channel
        tl.store(sums_row, p, mask=inside)
        tl.store(sums_row + channels, q, mask=inside)

    if NEED_X or NEED_SKIP:
        count = tl.cast(group_width, tl.float32) * tl.cast(pixels, tl.float32)
        mean_p, mean_q = tl.sum(gain * p, axis=0) / count, tl.sum(gain * q, axis=0) / count
        gradient = (du * gain[None, :] - mean_p - normalised * mean_q) * rstd
        wanted = mask
        if HAS_SKIP:
            gradient *= factor_of(first + channel, channels_x, SKIP_SCALE)
            if not NEED_X:
                wanted = mask & (first + channel >= channels_x)[None, :]
            if not NEED_SKIP:
                wanted = mask & (first + channel < channels_x)[None, :]
        target = pointers(
            dx, dskip, sample, 0, first, pixel, channel, channels_x, channels, pixels, HAS_SKIP, CHANNELS_LAST
        )
        tl.store(target, gradient.to(dx.dtype.element_ty), mask=wanted)


def forward(operands: Operands, y: torch.Tensor, statistics: torch.Tensor, eps: float) -> None:
    """See :func:`.run_forward`."""
    run_forward(_forward_kernel, _config(operands), operands, y, statistics, eps)


def backward(operands: Operands, *tensors: torch.Tensor | None) -> None:
    """See :func:`.run_backward`."""
    run_backward(_backward_kernel, _config(operands), operands, *tensors)
