"""Gradients of the weight, bias, scale and shift of :mod:`.group_norm_silu`, from sums over the pixels.

With P = sum of du and Q = sum of du * normalised per sample and channel: dscale = weight * Q + bias * P, dshift = P,
dweight = sum of (1 + scale) * Q over the samples, dbias = sum of (1 + scale) * P. In a fixed order, all in float32.
"""

import torch

from . import launch
from .group_norm_tiles import Operands
from .launch import tl, triton

# Samples and channels of a tile.
TILE = {"BLOCK_N": 32, "BLOCK_C": 32}


@triton.jit(do_not_specialize=["batch"])
def _parameter_gradients_kernel(
    weight,
    bias,
    scale,
    scale_stride,
    sums,
    dweight,
    dbias,
    dscale,
    dshift,
    batch,
    channels,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_SHIFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    gain, offset = tl.full((BLOCK_C,), 1.0, tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    if HAS_WEIGHT:
        gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    weight_total, bias_total = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, batch, BLOCK_N):
        sample = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (sample < batch)[:, None] & inside[None, :]
        row = sums + sample[:, None] * 2 * channels + channel[None, :]
        p = tl.load(row, mask=mask, other=0.0)
        q = tl.load(row + channels, mask=mask, other=0.0)
        out = sample[:, None] * channels + channel[None, :]
        if NEED_SCALE:
            gradient = gain[None, :] * q + offset[None, :] * p
            tl.store(dscale + out, gradient.to(dscale.dtype.element_ty), mask=mask)
        if NEED_SHIFT:
            tl.store(dshift + out, p.to(dshift.dtype.element_ty), mask=mask)
        if HAS_SCALE and (NEED_WEIGHT or NEED_BIAS):
            at = scale + sample[:, None] * scale_stride + channel[None, :]
            factor = tl.load(at, mask=mask, other=0.0).to(tl.float32) + 1.0
            p *= factor
            q *= factor
        weight_total += tl.sum(q, axis=0)
        bias_total += tl.sum(p, axis=0)
    if NEED_WEIGHT:
        tl.store(dweight + channel, weight_total.to(dweight.dtype.element_ty), mask=inside)
    if NEED_BIAS:
        tl.store(dbias + channel, bias_total.to(dbias.dtype.element_ty), mask=inside)


def _run(channels: int, sums: torch.Tensor, affine: tuple, flags: dict[str, bool], gradients: list) -> None:
    names = "WEIGHT", "BIAS", "SCALE", "SHIFT"
    launch.run(
        _parameter_gradients_kernel,
        (launch.ceil_div(channels, TILE["BLOCK_C"]),),
        *affine,
        sums,
        *(sums if gradient is None else gradient for gradient in gradients),
        sums.shape[0],
        channels,
        **flags,
        **{f"NEED_{name}": gradient is not None for name, gradient in zip(names, gradients, strict=True)},
        **TILE,
        num_warps=4,
    )


def from_samples(operands: Operands, sums: torch.Tensor, vectors: list[torch.Tensor | None]) -> None:
    """From sums of every sample, (b, 2, c), those gradients that are not None: of weight, bias, scale and shift.

    The sums are of du and of du * normalised.
    """
    if any(vector is not None for vector in vectors):
        weight, bias, scale, _, scale_stride, _ = operands.affine
        affine = weight, bias, scale, scale_stride
        _run(operands.channels, sums, affine, operands.affine_flags, vectors)


def from_partials(partials: torch.Tensor, dweight: torch.Tensor | None, dbias: torch.Tensor | None) -> None:
    """Fill those that are not None from partial sums, (n, 2, c): of the gradient of the bias and that of the weight."""
    flags = {"HAS_WEIGHT": False, "HAS_BIAS": False, "HAS_SCALE": False}
    affine = partials, partials, partials, 0
    _run(partials.shape[2], partials, affine, flags, [dweight, dbias, None, None])
