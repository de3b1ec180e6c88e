"""GroupNorm + scale/shift + SiLU of groups too large for registers and too small, or too many, to split.

One program goes through one group of one sample twice. That is two reads and one write forward, and four reads and one
write backward, of which the second reads mostly find the group in the cache; and it is a single launch.
"""

import torch

from . import launch
from .group_norm_parameters import from_samples
from .group_norm_tiles import (
    Operands,
    added_to,
    affine,
    factor_of,
    load_both,
    load_one,
    pointers,
    run_forward,
    silu_gradient,
    store_one,
)
from .launch import tl, triton

TILE = 8192
# Elements of a group up to which going through it alone takes no longer than the launches that splitting it needs, and
# up to which a cache holds what is left of it for the second pass, where there are programs for the whole card.
ALWAYS, IF_MANY = 2**15, 2**17


def fits(operands: Operands) -> bool:
    """Whether this is how to compute it, given that a group does not fit into registers."""
    elements = operands.pixels * operands.group_width
    many = operands.batch * operands.groups >= launch.target(operands.x.device).multiprocessors
    return elements <= (IF_MANY if many else ALWAYS)


def _unaligned(operands: Operands) -> bool:
    """Whether lines are not aligned: they come value by value, and every value has an address of its own."""
    return not operands.channels_last and operands.pixels % 16 != 0


def _config(operands: Operands) -> dict[str, int]:
    width, pixels = launch.next_power_of_2(operands.group_width), launch.next_power_of_2(operands.pixels)
    if operands.channels_last:
        block_c = min(width, 64)
        block_p = min(pixels, TILE // block_c)
    else:
        # Longer lines spill, on the one card or the other, and so do as many values of float32.
        most = TILE * 2 // operands.x.element_size()
        if _unaligned(operands):
            most //= 2
        block_p = min(pixels, most, 256)
        block_c = min(width, most // block_p, 256)
    per_thread = 16 if operands.channels_last else 32 // operands.x.element_size()
    num_warps = min(max(block_p * block_c // (32 * per_thread), 1), 16)
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
    begin = group * group_width
    pixel, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)

    # Distances to the mean of the first tile: squares of the values themselves would cancel where the mean is large.
    # What the pivot is off by, the squares of the first tile contain.
    mask = (pixel < pixels)[:, None] & (channel < group_width)[None, :]
    values = load_both(
        x, skip, sample, 0, begin, pixel, channel, mask, channels_x, channels, pixels,
        HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
    )  # fmt: skip
    number = tl.cast(tl.minimum(group_width, BLOCK_C), tl.float32) * tl.cast(tl.minimum(pixels, BLOCK_P), tl.float32)
    pivot = tl.sum(tl.sum(values, axis=0), axis=0) / number
    if HAS_X_BIAS:
        # After the pivot is subtracted: added to large values, it would be rounded like them.
        added = added_to(x_bias, begin + channel, channel < group_width, HAS_X_BIAS)
        pivot += tl.sum(added, axis=0) / tl.minimum(group_width, BLOCK_C)
        total = tl.where(mask, (values - pivot) + added[None, :], 0.0)
    else:
        total = tl.where(mask, values - pivot, 0.0)
    squares = total * total
    done = tl.full((), BLOCK_P, tl.int32)
    for within in range(0, group_width, BLOCK_C):
        first = begin + within
        inside = within + channel < group_width
        if HAS_X_BIAS:
            added = added_to(x_bias, first + channel, inside, HAS_X_BIAS)
        for start in range(done, pixels, BLOCK_P):
            mask = (start + pixel < pixels)[:, None] & inside[None, :]
            values = load_both(
                x, skip, sample, start, first, pixel, channel, mask, channels_x, channels, pixels,
                HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
            )  # fmt: skip
            distance = values - pivot
            if HAS_X_BIAS:
                distance += added[None, :]
            distance = tl.where(mask, distance, 0.0)
            total += distance
            squares += distance * distance
        done *= 0
    count = tl.cast(group_width, tl.float32) * tl.cast(pixels, tl.float32)
    shifted = tl.sum(tl.sum(total, axis=0), axis=0) / count
    variance = tl.sum(tl.sum(squares, axis=0), axis=0) / count - shifted * shifted
    rstd = 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + EPS)
    # The mean as a sum of two float32: where it is large against the deviations, its own rounding would show in them.
    mean = pivot + shifted
    rest = shifted - (mean - pivot)
    row = statistics + sample * 3 * groups + group
    tl.store(row, mean)
    tl.store(row + groups, rest)
    tl.store(row + 2 * groups, rstd)

    for within in range(0, group_width, BLOCK_C):
        first = begin + within
        inside = within + channel < group_width
        gain, offset = affine(
            weight, bias, scale, shift, scale_stride, shift_stride, sample, first + channel, inside,
            HAS_WEIGHT, HAS_BIAS, HAS_SCALE,
        )  # fmt: skip
        slope, level = gain * rstd, offset - rest * (gain * rstd)
        if HAS_X_BIAS:
            level += added_to(x_bias, first + channel, inside, HAS_X_BIAS) * slope
        for start in range(0, pixels, BLOCK_P):
            mask = (start + pixel < pixels)[:, None] & inside[None, :]
            values = load_both(
                x, skip, sample, start, first, pixel, channel, mask, channels_x, channels, pixels,
                HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
            )  # fmt: skip
            u = (values - mean) * slope[None, :] + level[None, :]
            if SILU:
                u *= tl.sigmoid(u)
            store_one(y, u, sample, start, first, pixel, channel, mask, channels, pixels, CHANNELS_LAST)


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
    begin = group * group_width
    pixel, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    row = statistics + sample * 3 * groups + group
    mean, rest, rstd = tl.load(row), tl.load(row + groups), tl.load(row + 2 * groups)

    mean_p, mean_q = 0.0, 0.0
    for within in range(0, group_width, BLOCK_C):
        first = begin + within
        inside = within + channel < group_width
        gain, offset = affine(
            weight, bias, scale, shift, scale_stride, shift_stride, sample, first + channel, inside,
            HAS_WEIGHT, HAS_BIAS, HAS_SCALE,
        )  # fmt: skip
        slope, level = gain * rstd, offset - rest * (gain * rstd)
        tile_p, tile_q = tl.zeros((BLOCK_P, BLOCK_C), tl.float32), tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(0, pixels, BLOCK_P):
            mask = (start + pixel < pixels)[:, None] & inside[None, :]
            values = load_both(
                x, skip, sample, start, first, pixel, channel, mask, channels_x, channels, pixels,
                HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
            )  # fmt: skip
            du = load_one(dy, sample, start, first, pixel, channel, mask, channels, pixels, CHANNELS_LAST)
            centred = tl.where(mask, values - mean, 0.0)
            if SILU:
                du *= silu_gradient(centred * slope[None, :] + level[None, :])
            tile_p += du
            tile_q += du * centred
        p = tl.sum(tile_p, axis=0)
        q = (tl.sum(tile_q, axis=0) - rest * p) * rstd
        if NEED_SUMS:
            sums_row = sums + sample * 2 * channels + first + channel
            tl.store(sums_row, p, mask=inside)
            tl.store(sums_row + channels, q, mask=inside)
        mean_p += tl.sum(gain * p, axis=0)
        mean_q += tl.sum(gain * q, axis=0)

    if NEED_X or NEED_SKIP:
        count = tl.cast(group_width, tl.float32) * tl.cast(pixels, tl.float32)
        back_slope = mean_q / count * rstd * rstd
        back_level = mean_p / count * rstd - rest * back_slope
        for within in range(0, group_width, BLOCK_C):
            first = begin + within
            inside = within + channel < group_width
            wanted = inside
            if HAS_SKIP:
                factor = factor_of(first + channel, channels_x, SKIP_SCALE)
                if not NEED_X:
                    wanted = inside & (first + channel >= channels_x)
                if not NEED_SKIP:
                    wanted = inside & (first + channel < channels_x)
            gain, offset = affine(
                weight, bias, scale, shift, scale_stride, shift_stride, sample, first + channel, inside,
                HAS_WEIGHT, HAS_BIAS, HAS_SCALE,
            )  # fmt: skip
            slope, level = gain * rstd, offset - rest * (gain * rstd)
            for start in range(0, pixels, BLOCK_P):
                mask = (start + pixel < pixels)[:, None] & wanted[None, :]
                values = load_both(
                    x, skip, sample, start, first, pixel, channel, mask, channels_x, channels, pixels,
                    HAS_SKIP, SKIP_SCALE, CHANNELS_LAST,
                )  # fmt: skip
                du = load_one(dy, sample, start, first, pixel, channel, mask, channels, pixels, CHANNELS_LAST)
                centred = values - mean
                if SILU:
                    du *= silu_gradient(centred * slope[None, :] + level[None, :])
                gradient = du * slope[None, :] - centred * back_slope - back_level
                if HAS_SKIP:
                    gradient *= factor
                target = pointers(
                    dx, dskip, sample, start, first, pixel, channel, channels_x, channels, pixels,
                    HAS_SKIP, CHANNELS_LAST,
                )  # fmt: skip
                tl.store(target, gradient.to(dx.dtype.element_ty), mask=mask)


def forward(operands: Operands, y: torch.Tensor, statistics: torch.Tensor, eps: float) -> None:
    """See :func:`.run_forward`."""
    config = _config(operands)
    if _unaligned(operands):
        config["num_warps"] = 4
    unaligned_floats = _unaligned(operands) and operands.x.element_size() > 2 and config["BLOCK_P"] == 256
    if operands.skip is not None and (config["BLOCK_P"] <= 32 or unaligned_floats):
        # Many short lines in two images, or unaligned ones: their addresses need the registers of more threads.
        config["num_warps"] = max(config["num_warps"], 8)
    if operands.x_bias is not None and operands.channels_last and operands.x.element_size() > 2:
        # So does what is added to every channel.
        config["num_warps"] = min(2 * config["num_warps"], 16)
    run_forward(_forward_kernel, config, operands, y, statistics, eps)


def backward(
    operands: Operands,
    dy: torch.Tensor,
    statistics: torch.Tensor,
    images: list[torch.Tensor | None],
    vectors: list[torch.Tensor | None],
) -> None:
    """Fill the gradients that are given: of both images, and of weight, bias, scale and shift."""
    wanted = any(vector is not None for vector in vectors)
    sums = statistics.new_empty((operands.batch if wanted else 0, 2, operands.channels))
    launch.run(
        _backward_kernel,
        (operands.batch * operands.groups,),
        *operands.images,
        *operands.affine,
        dy,
        statistics,
        *(dy if image is None else image for image in images),
        sums,
        *operands.sizes,
        NEED_X=images[0] is not None,
        NEED_SKIP=images[1] is not None,
        NEED_SUMS=wanted,
        SILU=operands.silu,
        **operands.image_flags,
        **operands.affine_flags,
        **_config(operands),
    )
    from_samples(operands, sums, vectors)
