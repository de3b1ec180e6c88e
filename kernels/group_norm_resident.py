"""GroupNorm + scale/shift + SiLU of groups that fit into one program's registers.

It reads and writes the images once: the floor. One program computes one group of one sample. Backward is in
:mod:`.group_norm_resident_backward`.
"""

import functools

import torch

from . import launch
from .group_norm_tiles import Operands, added_to, affine, load_both, run_forward, store_one
from .launch import tl, triton

# Bytes of a group, both sides rounded up to powers of two, and of it for each thread of a program, such that what both
# directions keep of each value stays in registers: forward one float32, backward two, and per channel some vectors. Of
# twice as many bytes in half precision and channels_last memory registers spill forward, too, on every target that is
# compiled for, although one program then has all of a multiprocessor's.
LARGEST_TILE, BYTES_PER_THREAD = 32768, 32
# Values of a tile with more pixels than the images: in NCHW memory, where each value has an address of its own, and, of
# these, of one with many channels or read from two images; in channels_last memory of one with many channels.
LARGEST_PADDED_PLANES, LARGEST_PADDED_PAIR, LARGEST_PADDED_ROWS = 8192, 4096, 8192


@functools.cache
def tile(pixels: int, group_width: int) -> tuple[int, int]:
    """Pixels and channels of the tile that holds a group."""
    return launch.next_power_of_2(pixels), launch.next_power_of_2(group_width)


def padded(operands: Operands) -> bool:
    """Whether its tile has more pixels than the images."""
    return tile(operands.pixels, operands.group_width)[0] != operands.pixels


def fits(operands: Operands) -> bool:
    """Whether a group fits into one program."""
    largest, width = LARGEST_TILE, operands.x.element_size()
    if padded(operands) and not operands.channels_last:
        few = operands.skip is not None or operands.group_width > 128
        largest = min(largest, (LARGEST_PADDED_PAIR if few else LARGEST_PADDED_PLANES) * width)
    elif padded(operands) and operands.group_width > 256:
        largest = min(largest, LARGEST_PADDED_ROWS * width)
    return size(operands) <= largest


def size(operands: Operands) -> int:
    """Bytes of that tile."""
    block_p, block_c = tile(operands.pixels, operands.group_width)
    return block_p * block_c * operands.x.element_size()


def config(operands: Operands, most_warps: int) -> dict[str, int]:
    """Tile and warps of a program."""
    block_p, block_c = tile(operands.pixels, operands.group_width)
    num_warps = min(max(size(operands) // (32 * BYTES_PER_THREAD), 1), most_warps)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": num_warps}


@triton.jit
def _forward_kernel(
    x,
    skip,
    x_bias,
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
    HAS_X_BIAS: tl.constexpr,
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
    if HAS_X_BIAS:
        # After the mean is subtracted: added to large values, it would be rounded like them.
        added = added_to(x_bias, first + channel, inside, HAS_X_BIAS)
        mean += tl.sum(added, axis=0) / group_width
        centred = tl.where(mask, (values - mean) + added[None, :], 0.0)
    else:
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


def forward(operands: Operands, y: torch.Tensor, statistics: torch.Tensor, eps: float) -> None:
    """See :func:`.run_forward`."""
    # Twice as much for each thread needs fewer registers in channels_last memory, and more in NCHW. Of unaligned lines,
    # where each value has an address, the compiler gives too few of them to each of 32 warps.
    most = 16 if operands.channels_last or operands.pixels % 16 else 32
    options = config(operands, most)
    if operands.channels_last and options["BLOCK_C"] == 1:
        # A channel's values are far from each other, each with an address of its own.
        options["num_warps"] = min(2 * options["num_warps"], most)
    run_forward(_forward_kernel, options, operands, y, statistics, eps)
