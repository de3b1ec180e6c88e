"""Backward of :mod:`.group_norm_resident`: one read of the images and of the output's gradient, one write.

One program computes one group, of one sample or of several, one after the other, so that of the gradients of weight and
bias it writes one sum for all of them. Of small images these sums would else be too much: of 8x8 pixels in half
precision 6 % of all that is moved.
"""

import torch

from . import launch, programs
from .group_norm_parameters import from_partials
from .group_norm_resident import LARGEST_TILE, config, padded, size, tile
from .group_norm_tiles import Operands, factor_of, load_both, load_one, modulation, parameters, pointers, silu_gradient
from .launch import tl, triton


@triton.jit
def _backward_of_sample(
    x,
    skip,
    scale,
    shift,
    scale_stride,
    shift_stride,
    dy,
    statistics,
    dx,
    dskip,
    dscale,
    dshift,
    sample,
    group,
    own_gain,
    own_offset,
    pixel,
    channel,
    mask,
    inside,
    channels_x,
    channels,
    pixels,
    group_width,
    groups,
    NEED_X: tl.constexpr,
    NEED_SKIP: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SKIP_SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """All gradients of a sample but those of weight and bias; of these, what the sample adds."""
    first = group * group_width
    values = load_both(
        x, skip, sample, 0, first, pixel, channel, mask, channels_x, channels, pixels,
        HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
    )  # fmt: skip
    du = load_one(dy, sample, 0, first, pixel, channel, mask, channels, pixels, CHANNELS_LAST)

    row = statistics + sample * 3 * groups + group
    mean, rest, rstd = tl.load(row), tl.load(row + groups), tl.load(row + 2 * groups)
    gain, offset = own_gain, own_offset
    if HAS_SCALE:
        factor, level = modulation(scale, shift, scale_stride, shift_stride, sample, first + channel, inside)
        gain *= factor
        offset = offset * factor + level
    normalised = ((values - mean) - rest) * rstd
    if SILU:
        du *= silu_gradient(normalised * gain[None, :] + offset[None, :])
    # Outside of the group the recomputed values mean nothing.
    du = tl.where(mask, du, 0.0)
    normalised = tl.where(mask, normalised, 0.0)
    p, q = tl.sum(du, axis=0), tl.sum(du * normalised, axis=0)

    out = sample * channels + first + channel
    if NEED_SCALE:
        tl.store(dscale + out, (own_gain * q + own_offset * p).to(dscale.dtype.element_ty), mask=inside)
    if NEED_SHIFT:
        tl.store(dshift + out, p.to(dshift.dtype.element_ty), mask=inside)
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
    if HAS_SCALE:
        p *= factor
        q *= factor
    return q, p


@triton.jit(do_not_specialize=["batch", "chunks"])
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
    dweight,
    dbias,
    dscale,
    dshift,
    batch,
    chunks,
    channels_x,
    channels,
    pixels,
    group_width,
    groups,
    NEED_X: tl.constexpr,
    NEED_SKIP: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SKIP_SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALL_P: tl.constexpr,
    ALL_C: tl.constexpr,
    SINGLE: tl.constexpr,
):
    group, chunk = tl.program_id(0) % groups, tl.program_id(0) // groups
    pixel, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    # Where there is nothing to mask, the compiler must know: masks take registers.
    inside = tl.full((BLOCK_C,), True, tl.int1) if ALL_C else channel < group_width
    rows = tl.full((BLOCK_P,), True, tl.int1) if ALL_P else pixel < pixels
    mask = rows[:, None] & inside[None, :]
    parameter = group * group_width + channel
    own_gain, own_offset = parameters(weight, bias, parameter, inside, HAS_WEIGHT, HAS_BIAS)
    if SINGLE:
        weight_total, bias_total = _backward_of_sample(
            x, skip, scale, shift, scale_stride, shift_stride, dy, statistics, dx, dskip, dscale, dshift,
            chunk.to(tl.int64), group, own_gain, own_offset, pixel, channel, mask, inside,
            channels_x, channels, pixels, group_width, groups, NEED_X, NEED_SKIP, NEED_SCALE, NEED_SHIFT,
            SILU, HAS_SKIP, SKIP_SCALE, CHANNELS_LAST, HAS_SCALE,
        )  # fmt: skip
    else:
        weight_total, bias_total = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
        for sample in range(chunk, batch, chunks):
            more_weight, more_bias = _backward_of_sample(
                x, skip, scale, shift, scale_stride, shift_stride, dy, statistics, dx, dskip, dscale, dshift,
                tl.cast(sample, tl.int64), group, own_gain, own_offset, pixel, channel, mask, inside,
                channels_x, channels, pixels, group_width, groups, NEED_X, NEED_SKIP, NEED_SCALE, NEED_SHIFT,
                SILU, HAS_SKIP, SKIP_SCALE, CHANNELS_LAST, HAS_SCALE,
            )  # fmt: skip
            weight_total += more_weight
            bias_total += more_bias
    total = tl.cast(chunk, tl.int64) * 2 * channels + parameter
    if NEED_WEIGHT:
        tl.store(dweight + total, weight_total.to(dweight.dtype.element_ty), mask=inside)
    if NEED_BIAS:
        tl.store(dbias + total, bias_total.to(dbias.dtype.element_ty), mask=inside)


def _room_for_sums(operands: Operands) -> bool:
    """Whether registers hold sums that last for several samples beside everything else.

    That is not so where a thread has values of many channels, nor beside masks in the largest tile, and in NCHW memory,
    where the compiler needs more for addresses, beside masks of pixels, or of the channels of many.
    """
    if operands.pixels < 16:
        return False
    if padded(operands) and (size(operands) > LARGEST_TILE // 2 or not operands.channels_last):
        return False
    exact = tile(operands.pixels, operands.group_width) == (operands.pixels, operands.group_width)
    if operands.channels_last:
        return operands.group_width <= 256 or (exact and operands.skip is None)
    return operands.group_width <= 128 or exact


def _chunks(operands: Operands, dy: torch.Tensor) -> int:
    """How many programs share the samples of a group.

    As many as there are samples, to fill the card, unless weight and bias, and the sums of their gradients, written and
    read again, would then be too much of what is moved. Of images of 8x8 pixels in half precision, or less, one program
    takes several samples.
    """
    if not _room_for_sums(operands):
        return operands.batch
    # The images, the output's gradient, and theirs.
    moved = 3 * dy.numel() * dy.element_size()
    weights = sum(v.numel() * v.element_size() for v in (operands.weight, operands.bias) if v is not None)
    sums = 2 * 2 * 4 * operands.channels
    return programs.shared_out(operands.batch, programs.affordable(moved, weights + sums))


def _warps(operands: Operands, single: bool) -> int:
    """Warps of a program that computes one sample, or several.

    A thread of 8 warps may have 255 registers, of 16 half as many, of 32 a quarter: where half as many threads have
    twice as many values each, there are more registers for sums, or for the addresses of many short lines. Found by
    compiling ahead of time, for images of all sides that are multiples of 8.
    """
    masked, modulated, planes = padded(operands), operands.scale is not None, not operands.channels_last
    wide, half, widened = operands.group_width > 128, operands.x.element_size() == 2, _has_gains_to_widen(operands)
    few = masked and (planes or not half and not wide)
    warps = config(operands, 8 if few else 32 if planes else 16)["num_warps"]
    if masked and modulated and (planes and half or widened and operands.group_width == 1) and warps < 8:
        return 2 * warps
    if planes and half and operands.skip is not None and operands.pixels % 16 and size(operands) == 8192:
        # Values of unaligned lines in two images have two addresses each.
        return 2 * warps
    # Masks beside a modulation need registers too, masks alone the threads.
    short = not planes and operands.group_width <= 16 and (not masked or modulated)
    full = size(operands) == LARGEST_TILE and (widened or (not planes and masked and modulated and not wide))
    # Sums of many channels in NCHW memory need all threads, unless a modulation takes more of each.
    many = planes and wide and not modulated
    most_with_sums = 32 if many else 8 if widened and not planes else 4
    if (warps > 8 and (short or full)) or (warps > most_with_sums and not single):
        return warps // 2
    return warps


def fits(operands: Operands) -> bool:
    """Whether registers suffice for a group that forward holds: not for masks and all else in the largest tile."""
    return not (_has_gains_to_widen(operands) and padded(operands) and size(operands) == LARGEST_TILE)


def _has_gains_to_widen(operands: Operands) -> bool:
    """Whether gains and offsets in half precision, which take registers more, meet a scale and a shift."""
    weight = operands.weight
    return operands.scale is not None and weight is not None and weight.element_size() == 2


def backward(
    operands: Operands,
    dy: torch.Tensor,
    statistics: torch.Tensor,
    images: list[torch.Tensor | None],
    vectors: list[torch.Tensor | None],
) -> None:
    """Fill the gradients that are given: of both images, and of weight, bias, scale and shift."""
    # One for no samples at all, whose sums are zero.
    chunks = max(_chunks(operands, dy), 1)
    single = chunks == operands.batch
    options = {**config(operands, 32), "num_warps": _warps(operands, single)}
    (dweight, dbias, *rest), partials = vectors, None
    if chunks > 1 and (dweight is not None or dbias is not None):
        partials = statistics.new_empty((chunks, 2, operands.channels))
        bias_sums, weight_sums = partials.unbind(1)
        vectors = [None if dweight is None else weight_sums, None if dbias is None else bias_sums, *rest]
    gradients = images + vectors
    names = "X", "SKIP", "WEIGHT", "BIAS", "SCALE", "SHIFT"
    launch.run(
        _backward_kernel,
        (chunks * operands.groups,),
        *operands.images,
        *operands.affine,
        dy,
        statistics,
        *(dy if gradient is None else gradient for gradient in gradients),
        operands.batch,
        chunks,
        *operands.sizes,
        **{f"NEED_{name}": gradient is not None for name, gradient in zip(names, gradients, strict=True)},
        SILU=operands.silu,
        **operands.image_flags,
        **operands.affine_flags,
        **options,
        ALL_P=options["BLOCK_P"] == operands.pixels,
        ALL_C=options["BLOCK_C"] == operands.group_width,
        SINGLE=single,
    )
    if partials is not None:
        from_partials(partials, dweight, dbias)
