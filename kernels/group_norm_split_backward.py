"""Backward of :mod:`.group_norm_split`: two reads of the images and of the output's gradient, one write."""

import torch

from . import launch
from .group_norm_parameters import from_samples
from .group_norm_split import choose, config, load_tile, normalisation, place, reduction
from .group_norm_tiles import Operands, affine, load_one, silu_gradient, store_one
from .launch import tl, triton


@triton.jit
def _load_du(
    dy,
    centred,
    slope,
    level,
    sample,
    pixel,
    first,
    steps,
    channel,
    valid,
    channels,
    pixels,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Gradient of the SiLU's input, zero outside of the image."""
    du = load_one(dy, sample, pixel, first, steps, channel, valid, channels, pixels, CHANNELS_LAST)
    if SILU:
        du *= silu_gradient(centred * slope[None, :] + level[None, :])
    return du


@triton.jit(do_not_specialize=["chunks", "blocks"])
def _sums_kernel(
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
    partial,
    channels_x,
    channels,
    pixels,
    group_width,
    groups,
    span,
    chunks,
    blocks,
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
    """Per channel of a chunk, the sums of du and of du * normalised."""
    sample, chunk, begin, block = place(span, chunks, blocks)
    image, width, first, before = choose(x, skip, block, channels_x, channels, HAS_SKIP, BLOCK_C)
    steps, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    inside = first + channel < width
    joint = before + first + channel
    mean, rest, rstd = normalisation(statistics, sample, joint, inside, group_width, groups)
    gain, offset = affine(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, joint, inside, HAS_WEIGHT, HAS_BIAS, HAS_SCALE
    )
    slope, level = gain * rstd, offset - rest * (gain * rstd)
    # Summed over the threads once, at the end.
    tile_p, tile_q = tl.zeros((BLOCK_P, BLOCK_C), tl.float32), tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for done in range(0, tl.minimum(span, pixels - begin).to(tl.int32), BLOCK_P):
        values, valid = load_tile(
            image, sample, begin + done, first, steps, channel, inside, width, pixels, before,
            HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
        )  # fmt: skip
        centred = tl.where(valid, values - mean[None, :], 0.0)
        du = _load_du(
            dy, centred, slope, level, sample, begin + done, before + first, steps, channel, valid, channels, pixels,
            SILU, CHANNELS_LAST,
        )  # fmt: skip
        tile_p += du
        tile_q += du * centred
    p = tl.sum(tile_p, axis=0)
    q = (tl.sum(tile_q, axis=0) - rest * p) * rstd
    row = partial + (sample * 2 * chunks + chunk) * channels + joint
    tl.store(row, p, mask=inside)
    tl.store(row + chunks * channels, q, mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def _totals_kernel(
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    partial,
    sums,
    means,
    channels,
    pixels,
    group_width,
    groups,
    chunks,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over the chunks, and of what goes back to the normalised values the group's means."""
    group = tl.program_id(0) % groups
    sample = (tl.program_id(0) // groups).to(tl.int64)
    start = partial + sample * 2 * chunks * channels
    mean_p, mean_q = 0.0, 0.0
    for first in range(0, group_width, BLOCK_C):
        within = first + tl.arange(0, BLOCK_C)
        inside = within < group_width
        channel = group * group_width + within
        p, q = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
        for done in range(0, chunks, BLOCK_K):
            chunk = done + tl.arange(0, BLOCK_K)
            mask = (chunk < chunks)[:, None] & inside[None, :]
            slot = start + chunk[:, None] * channels + channel[None, :]
            p += tl.sum(tl.load(slot, mask=mask, other=0.0), axis=0)
            q += tl.sum(tl.load(slot + chunks * channels, mask=mask, other=0.0), axis=0)
        tl.store(sums + sample * 2 * channels + channel, p, mask=inside)
        tl.store(sums + sample * 2 * channels + channels + channel, q, mask=inside)
        gain, _ = affine(
            weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, inside,
            HAS_WEIGHT, HAS_BIAS, HAS_SCALE,
        )  # fmt: skip
        mean_p += tl.sum(tl.where(inside, gain * p, 0.0), axis=0)
        mean_q += tl.sum(tl.where(inside, gain * q, 0.0), axis=0)
    count = tl.cast(group_width, tl.float32) * tl.cast(pixels, tl.float32)
    tl.store(means + sample * 2 * groups + group, mean_p / count)
    tl.store(means + sample * 2 * groups + groups + group, mean_q / count)


@triton.jit(do_not_specialize=["first_block", "chunks", "blocks"])
def _input_gradient_kernel(
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
    means,
    dx,
    dskip,
    first_block,
    channels_x,
    channels,
    pixels,
    group_width,
    groups,
    span,
    chunks,
    blocks,
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
    block += first_block
    image, width, first, before = choose(x, skip, block, channels_x, channels, HAS_SKIP, BLOCK_C)
    gradient, _, _, _ = choose(dx, dskip, block, channels_x, channels, HAS_SKIP, BLOCK_C)
    steps, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    inside = first + channel < width
    joint = before + first + channel
    mean, rest, rstd = normalisation(statistics, sample, joint, inside, group_width, groups)
    gain, offset = affine(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, joint, inside, HAS_WEIGHT, HAS_BIAS, HAS_SCALE
    )
    slope, level = gain * rstd, offset - rest * (gain * rstd)
    row = means + sample * 2 * groups + joint // group_width
    mean_p, mean_q = tl.load(row, mask=inside, other=0.0), tl.load(row + groups, mask=inside, other=0.0)
    back_slope = mean_q * rstd * rstd
    back_level = mean_p * rstd - rest * back_slope
    if HAS_SKIP:
        factor = tl.where(before > 0, SKIP_SCALE, 1.0)
    for done in range(0, tl.minimum(span, pixels - begin).to(tl.int32), BLOCK_P):
        values, valid = load_tile(
            image, sample, begin + done, first, steps, channel, inside, width, pixels, before,
            HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
        )  # fmt: skip
        centred = values - mean[None, :]
        du = _load_du(
            dy, centred, slope, level, sample, begin + done, before + first, steps, channel, valid, channels, pixels,
            SILU, CHANNELS_LAST,
        )  # fmt: skip
        result = du * slope[None, :] - centred * back_slope[None, :] - back_level[None, :]
        if HAS_SKIP:
            result *= factor
        store_one(gradient, result, sample, begin + done, first, steps, channel, valid, width, pixels, CHANNELS_LAST)


def backward(
    operands: Operands,
    dy: torch.Tensor,
    statistics: torch.Tensor,
    images: list[torch.Tensor | None],
    vectors: list[torch.Tensor | None],
) -> None:
    """Fill the gradients that are given: of both images, and of weight, bias, scale and shift."""
    tile, split = config(operands)
    batch, chunks, blocks = operands.batch, split["chunks"], split["blocks"]
    partial = statistics.new_empty((batch, 2, chunks, operands.channels))
    sums = statistics.new_empty((batch, 2, operands.channels))
    means = statistics.new_empty((batch, 2, operands.groups))
    flags = {"SILU": operands.silu, **operands.image_flags, **operands.affine_flags}
    launch.run(
        _sums_kernel,
        (batch * chunks * blocks,),
        *operands.images,
        *operands.affine,
        dy,
        statistics,
        partial,
        *operands.sizes,
        *split.values(),
        **flags,
        **tile,
    )
    launch.run(
        _totals_kernel,
        (batch * operands.groups,),
        *operands.affine,
        partial,
        sums,
        means,
        *operands.sizes[1:],
        chunks,
        **operands.affine_flags,
        **reduction(operands),
    )
    # Blocks of an input whose gradient nobody needs are left out.
    blocks_x = launch.ceil_div(operands.x.shape[1], tile["BLOCK_C"])
    first_block = blocks_x if images[0] is None else 0
    needed = (blocks if images[1] is not None else blocks_x) - first_block
    launch.run(
        _input_gradient_kernel,
        (batch * chunks * needed,),
        *operands.images,
        *operands.affine,
        dy,
        statistics,
        means,
        *(dy if image is None else image for image in images),
        first_block,
        *operands.sizes,
        split["span"],
        chunks,
        needed,
        **flags,
        **tile,
    )
    from_samples(operands, sums, vectors)
