"""Cases of the operations whose work libraries do: convolutions and matrix products, arranged otherwise by us.

:data:`LIBRARY_CASES` is what the timing suite measures of them beside :data:`.kernel_cases.CASES`. They have no kernels
of ours, so that the tables of machine code and traffic do not have them.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from minimagen_fast.kernels import (
    conv1x1_concat,
    linear,
    null_key_cross_attention,
    upsample_conv3x3,
    wide_conv2d,
)
from minimagen_fast.Unet import ATTN_DIM_HEAD, SKIP_CONNECT_SCALE

from .kernel_cases import HEADS, Case, Floor, Make, image_shape, named


def _choosing(ours: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Both as one function, of operations that have no argument ``implementation``."""

    def run(*, implementation: str | None, **arguments: Any) -> torch.Tensor:
        return (plain if implementation == "reference" else ours)(**arguments)

    return run


def _weight(make: Make, *shape: int) -> torch.Tensor:
    """A weight of the inputs' dtype, as autocast makes it, that leaves values about as large as they are."""
    return make.tokens(*shape) * prod(shape[1:]) ** -0.5


def _floors(inputs: tuple[str, ...], read_backward: tuple[str, ...], written: tuple[str, ...]) -> dict[str, Floor]:
    backward = Floor({"grad": 1, **dict.fromkeys(read_backward, 1)}, tuple(f"grad_{name}" for name in written), None)
    return {"forward": Floor(dict.fromkeys(inputs, 1), ("output",), None), "backward": backward}


def concatenated(b: int, c: int, h: int, w: int, *, skip: int, out: int) -> Case:
    """A 1x1 convolution of images and of ``skip`` further channels beside them."""

    def make_inputs(make: Make) -> dict[str, Any]:
        images = {"x": make.image(b, c, h, w), "skip": make.image(b, skip, h, w)}
        return {**images, "weight": _weight(make, out, c + skip, 1, 1), "bias": make.tokens(out)}

    def plain(x, skip, weight, bias, *, skip_scale):
        return F.conv2d(torch.cat((x, skip * skip_scale), dim=1), weight, bias)

    names = ("x", "skip", "weight", "bias")
    return Case(
        "conv1x1_concat",
        f"{image_shape(b, c, h, w)}+skip{skip}-to{out}",
        _choosing(conv1x1_concat, plain),
        make_inputs,
        **_floors(names, names[:3], names),
        options={"skip_scale": SKIP_CONNECT_SCALE},
        gradients=names,
    )


def projection(b: int, n: int, c: int, *, out: int) -> Case:
    """A matrix product of tokens."""

    def make_inputs(make: Make) -> dict[str, Any]:
        return {"x": make.tokens(b, n, c), "weight": _weight(make, out, c), "bias": make.tokens(out)}

    names = ("x", "weight", "bias")
    return Case(
        "linear",
        f"b{b}-{n}x{c}-to{out}",
        _choosing(linear, F.linear),
        make_inputs,
        **_floors(names, names[:2], names),
        gradients=names,
        images=False,
    )


def cross_attention(b: int, n: int, m: int, *, dim: int, context: int, d: int = ATTN_DIM_HEAD) -> Case:
    """Attention of ``n`` tokens to ``m`` context tokens and a null key, with its projections."""
    width = HEADS * d

    def make_inputs(make: Make) -> dict[str, Any]:
        null_key, null_value = make.parameter(2, d)
        return {
            "x": make.tokens(b, n, dim),
            "context": make.tokens(b, m, context),
            "to_q": _weight(make, width, dim),
            "to_kv": _weight(make, 2 * width, context),
            "to_out": _weight(make, dim, width),
            "null_key": null_key,
            "null_value": null_value,
        }

    names = ("x", "context", "to_q", "to_kv", "to_out", "null_key", "null_value")
    # Either queries, keys, values and results are made, or products of their weights, see null_key_cross_attention.
    projected = b * width * (n * dim + m * context + n * m)
    with_products = dim * width * context + b * HEADS * n * context * (dim + m)
    return Case(
        "null_key_cross_attention",
        f"b{b}-{n}x{m}-dim{dim}-context{context}",
        null_key_cross_attention,
        make_inputs,
        **_floors(names, names, names),
        options={"heads": HEADS},
        gradients=names,
        images=False,
        by_sample=("x", "context"),
        share=min(1.0, with_products / projected),
    )


def enlargement(b: int, c: int, h: int, w: int, *, out: int) -> Case:
    """A 3x3 convolution of images enlarged twice."""

    def make_inputs(make: Make) -> dict[str, Any]:
        return {"x": make.image(b, c, h, w), "weight": _weight(make, out, c, 3, 3), "bias": make.tokens(out)}

    def plain(x, weight, bias):
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)

    names = ("x", "weight", "bias")
    return Case(
        "upsample_conv3x3",
        f"{image_shape(b, c, h, w)}-to{out}",
        _choosing(upsample_conv3x3, plain),
        make_inputs,
        **_floors(names, names[:2], names),
        gradients=names,
        # Of the nine taps that fall on four pixels some fall on the same one.
        share=16 / 36,
    )


def wide_convolution(b: int, c: int, h: int, w: int, *, side: int, out: int) -> Case:
    """A convolution with a wide kernel; images, which nothing is learnt from, have no gradient."""

    def make_inputs(make: Make) -> dict[str, Any]:
        return {"x": make.image(b, c, h, w), "weight": _weight(make, out, c, side, side), "bias": make.tokens(out)}

    def plain(x, weight, bias):
        return F.conv2d(x, weight, bias, padding="same")

    names = ("x", "weight", "bias")
    return Case(
        "wide_conv2d",
        f"{image_shape(b, c, h, w)}-{side}x{side}-to{out}",
        _choosing(wide_conv2d, plain),
        make_inputs,
        **_floors(names, names[:1], names[1:]),
        gradients=names[1:],
    )


# Of the quickstart's U-Nets and of the denoiser that a CPU samples with.
_SMALL = [
    concatenated(1, 256, 32, 32, skip=128, out=256),
    projection(2, 1024, 512, out=512),
    cross_attention(1, 256, 258, dim=256, context=64),
    cross_attention(16, 64, 258, dim=64, context=32),
    enlargement(1, 128, 32, 32, out=128),
    wide_convolution(16, 3, 16, 16, side=15, out=8),
]
# Of Base at 64 pixels.
_LARGE = [
    case
    for b in (2, 16)
    for case in (
        concatenated(b, 1024, 32, 32, skip=512, out=1024),
        projection(b, 1024, 1024, out=2048),
        cross_attention(b, 1024, 258, dim=1024, context=512),
        enlargement(b, 512, 32, 32, out=512),
        wide_convolution(b, 3, 64, 64, side=15, out=128),
    )
]
LIBRARY_CASES: dict[str, Case] = {**named(_SMALL, small=True), **named(_LARGE, small=False)}
