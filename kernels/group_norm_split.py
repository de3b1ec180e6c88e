"""GroupNorm + scale/shift + SiLU of groups that are split over many programs, so that few large images fill a card.

Forward, here, reads the images twice and writes once; backward, in :mod:`.group_norm_split_backward`, reads them and
the output's gradient twice and writes once. What programs have to tell each other goes through slots of their own,
combined in a fixed order: results are the same in every run. One program computes a run of pixels ("chunk") of a block
of channels of one sample, which lies in one of the two inputs.
"""

import torch

from . import launch
from .group_norm_tiles import Operands, added_to, affine, load_one, store_one
from .launch import tl, triton

TILE = 4096
# Chunks cost a few dozen bytes per channel, for parameters and partial sums. This many pixels pay for them.
SMALLEST_CHUNK = 256
PROGRAMS_PER_MULTIPROCESSOR = 4


def config(operands: Operands) -> tuple[dict[str, int], dict[str, int]]:
    """The tile and its warps; sizes of the split."""
    widest = launch.next_power_of_2(max(image.shape[1] for image in operands.images))
    pixels = max(launch.next_power_of_2(operands.pixels), 16)
    if operands.channels_last:
        block_c = min(widest, 64)
        block_p = min(pixels, TILE // block_c)
    else:
        block_p = min(pixels, 1024, TILE)
        block_c = min(widest, TILE // block_p, 256)
    blocks = launch.ceil_div(operands.x.shape[1], block_c)
    if operands.skip is not None:
        blocks += launch.ceil_div(operands.skip.shape[1], block_c)
    programs = launch.target(operands.x.device).multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    wanted = launch.ceil_div(programs, max(operands.batch * blocks, 1))
    span = max(launch.ceil_div(operands.pixels, wanted), SMALLEST_CHUNK)
    span = launch.ceil_div(span, block_p) * block_p
    # With two images of float32 lines, 16 values for a thread spill; with one, 8 do.
    half = operands.x.element_size() > 2 and operands.skip is not None and not operands.channels_last
    num_warps = min(max(block_p * block_c // (256 if half else 512), 1), 16 if half else 8)
    tile = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": num_warps}
    return tile, {"span": span, "chunks": launch.ceil_div(operands.pixels, span), "blocks": blocks}


@triton.jit
def place(span, chunks, blocks):
    """Sample, chunk, its first pixel and block of channels of this program."""
    program = tl.program_id(0)
    chunk = (program // blocks) % chunks
    sample = (program // blocks // chunks).to(tl.int64)
    return sample, chunk, chunk.to(tl.int64) * span, program % blocks


@triton.jit
def choose(x, skip, block, channels_x, channels, HAS_SKIP: tl.constexpr, BLOCK_C: tl.constexpr):
    """The image of the two that a block of channels lies in: its pointer, its width, where the block begins in it, and
    where the image begins in the concatenation."""
    if HAS_SKIP:
        blocks_x = tl.cdiv(channels_x, BLOCK_C)
        in_skip = block >= blocks_x
        image = tl.where(in_skip, skip, x)
        width = tl.where(in_skip, channels - channels_x, channels_x)
        first = (block - tl.where(in_skip, blocks_x, 0)) * BLOCK_C
        before = tl.where(in_skip, channels_x, 0)
    else:
        image = x
        width = channels
        first = block * BLOCK_C
        before = block * 0
    return image, width, first, before


@triton.jit
def load_tile(
    image,
    sample,
    pixel,
    first,
    steps,
    channel,
    inside,
    width,
    pixels,
    before,
    HAS_SKIP: tl.constexpr,
    SKIP_SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Values from ``pixel`` on, and which of the tile's pixels there are."""
    valid = (steps < (pixels - pixel).to(tl.int32))[:, None] & inside[None, :]
    values = load_one(image, sample, pixel, first, steps, channel, valid, width, pixels, CHANNELS_LAST)
    if HAS_SKIP:
        values *= tl.where(before > 0, SKIP_SCALE, 1.0)
    return values, valid


@triton.jit(do_not_specialize=["chunks", "blocks"])
def _moments_kernel(
    x,
    skip,
    x_bias,
    partial,
    channels_x,
    channels,
    pixels,
    span,
    chunks,
    blocks,
    HAS_X_BIAS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SKIP_SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per channel of a chunk: a pivot, and the sums of distances to it and of their squares.

    The pivot is the mean of the first tile. It is as good as that of the chunk: what it is off by, the squares of the
    first tile contain.
    """
    sample, chunk, begin, block = place(span, chunks, blocks)
    image, width, first, before = choose(x, skip, block, channels_x, channels, HAS_SKIP, BLOCK_C)
    steps, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    inside = first + channel < width
    values, valid = load_tile(
        image, sample, begin, first, steps, channel, inside, width, pixels, before, HAS_SKIP, SKIP_SCALE, CHANNELS_LAST
    )
    pivot = tl.sum(values, axis=0) / tl.minimum(pixels - begin, BLOCK_P).to(tl.float32)
    distance = tl.where(valid, values - pivot[None, :], 0.0)
    # Summed over the threads once, at the end.
    total, squares = distance, distance * distance
    for done in range(BLOCK_P, tl.minimum(span, pixels - begin).to(tl.int32), BLOCK_P):
        values, valid = load_tile(
            image, sample, begin + done, first, steps, channel, inside, width, pixels, before,
            HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
        )  # fmt: skip
        distance = tl.where(valid, values - pivot[None, :], 0.0)
        total += distance
        squares += distance * distance
    sum_1, sum_2 = tl.sum(total, axis=0), tl.sum(squares, axis=0)
    if HAS_X_BIAS:
        # It moves the pivot. By what that is rounded, all distances are longer.
        added = added_to(x_bias, first + channel, inside, HAS_X_BIAS)
        moved = pivot + added
        rest = (pivot - moved) + added
        moved_by = rest * tl.minimum(span, pixels - begin).to(tl.float32)
        sum_2 += rest * (2.0 * sum_1 + moved_by)
        sum_1 += moved_by
        pivot = moved
    row = partial + (sample * 3 * chunks + chunk) * channels + before + first + channel
    field = chunks * channels
    tl.store(row, pivot, mask=inside)
    tl.store(row + field, sum_1, mask=inside)
    tl.store(row + 2 * field, sum_2, mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def _statistics_kernel(
    partial,
    statistics,
    channels,
    pixels,
    group_width,
    groups,
    span,
    chunks,
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean, its rounding error and 1 / deviation of one group, by the formula of Chan, Golub and LeVeque (1979)."""
    group = tl.program_id(0) % groups
    sample = (tl.program_id(0) // groups).to(tl.int64)
    field = chunks * channels
    start = partial + sample * 3 * field + group * group_width
    pivot = tl.load(start)
    # Of what is merged so far: number of values, their mean less the pivot, sum of squared distances to it.
    count, mean, squares = 0.0, 0.0, 0.0
    for first in range(0, group_width, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        for done in range(0, chunks, BLOCK_K):
            chunk = done + tl.arange(0, BLOCK_K)
            mask = (chunk < chunks)[:, None] & (channel < group_width)[None, :]
            slot = start + chunk[:, None] * channels + channel[None, :]
            near = tl.load(slot, mask=mask, other=0.0)
            total = tl.load(slot + field, mask=mask, other=0.0)
            spread = tl.load(slot + 2 * field, mask=mask, other=0.0)
            number = tl.where(mask, tl.minimum(pixels - chunk * span, span).to(tl.float32)[:, None], 0.0)
            distance = near - pivot + total / tl.where(mask, number, 1.0)
            distance = tl.where(mask, distance, 0.0)
            spread -= total * total / tl.where(mask, number, 1.0)

            tile_count = tl.sum(tl.sum(number, axis=0), axis=0)
            tile_mean = tl.sum(tl.sum(number * distance, axis=0), axis=0) / tile_count
            centred = distance - tile_mean
            tile_squares = tl.sum(tl.sum(spread + number * centred * centred, axis=0), axis=0)
            delta = tile_mean - mean
            squares += tile_squares + delta * delta * (count * tile_count / (count + tile_count))
            mean += delta * (tile_count / (count + tile_count))
            count += tile_count
    variance = squares / count
    rounded = pivot + mean
    row = statistics + sample * 3 * groups + group
    tl.store(row, rounded)
    tl.store(row + groups, mean - (rounded - pivot))
    tl.store(row + 2 * groups, 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + EPS))


@triton.jit
def normalisation(statistics, sample, channel, inside, group_width, groups):
    """Mean, its rounding error and 1 / deviation for every channel of a block."""
    row = statistics + sample * 3 * groups + channel // group_width
    mean = tl.load(row, mask=inside, other=0.0)
    rest = tl.load(row + groups, mask=inside, other=0.0)
    return mean, rest, tl.load(row + 2 * groups, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["chunks", "blocks"])
def _apply_kernel(
    x,
    skip,
    x_bias,
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    statistics,
    y,
    channels_x,
    channels,
    pixels,
    group_width,
    groups,
    span,
    chunks,
    blocks,
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
    sample, _, begin, block = place(span, chunks, blocks)
    image, width, first, before = choose(x, skip, block, channels_x, channels, HAS_SKIP, BLOCK_C)
    steps, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    inside = first + channel < width
    joint = before + first + channel
    mean, rest, rstd = normalisation(statistics, sample, joint, inside, group_width, groups)
    gain, offset = affine(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, joint, inside, HAS_WEIGHT, HAS_BIAS, HAS_SCALE
    )
    slope, level = gain * rstd, offset - rest * (gain * rstd)
    if HAS_X_BIAS:
        level += added_to(x_bias, joint, inside, HAS_X_BIAS) * slope
    for done in range(0, tl.minimum(span, pixels - begin).to(tl.int32), BLOCK_P):
        values, valid = load_tile(
            image, sample, begin + done, first, steps, channel, inside, width, pixels, before,
            HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
        )  # fmt: skip
        u = (values - mean[None, :]) * slope[None, :] + level[None, :]
        if SILU:
            u *= tl.sigmoid(u)
        store_one(y, u, sample, begin + done, before + first, steps, channel, valid, channels, pixels, CHANNELS_LAST)


def reduction(operands: Operands) -> dict[str, int]:
    """Tile of the kernels that combine the chunks of a group."""
    block_c = min(launch.next_power_of_2(operands.group_width), 64)
    return {"BLOCK_K": 2048 // max(block_c, 16), "BLOCK_C": block_c, "num_warps": 4}


def forward(operands: Operands, y: torch.Tensor, statistics: torch.Tensor, eps: float) -> None:
    """Fill the output and the statistics, (b, 3, groups): the mean, its rounding error, and 1 / deviation."""
    tile, split = config(operands)
    programs = (operands.batch * split["chunks"] * split["blocks"],)
    partial = statistics.new_empty((operands.batch, 3, split["chunks"], operands.channels))
    launch.run(
        _moments_kernel,
        programs,
        *operands.images,
        operands.added,
        partial,
        *operands.sizes[:3],
        *split.values(),
        HAS_X_BIAS=operands.x_bias is not None,
        **operands.image_flags,
        **tile,
    )
    launch.run(
        _statistics_kernel,
        (operands.batch * operands.groups,),
        partial,
        statistics,
        *operands.sizes[1:],
        split["span"],
        split["chunks"],
        EPS=eps,
        **reduction(operands),
    )
    if not operands.channels_last and operands.pixels % 16 and tile["num_warps"] == 8:
        # Values of unaligned lines have an address each.
        tile = {**tile, "num_warps": 16}
    launch.run(
        _apply_kernel,
        programs,
        *operands.images,
        operands.added,
        *operands.affine,
        statistics,
        y,
        *operands.sizes,
        *split.values(),
        HAS_X_BIAS=operands.x_bias is not None,
        SILU=operands.silu,
        **operands.image_flags,
        **operands.affine_flags,
        **tile,
    )
