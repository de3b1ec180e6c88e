"""What the kernels of :mod:`.group_norm_silu` share: operands as the kernels read them, and arithmetic on their tiles.

A tile is [pixels, channels] in either memory format; the compiler lays it over the threads along whichever is
contiguous.
"""

from typing import NamedTuple

import torch

from . import launch
from .images import memory_format
from .launch import tl, triton


def empty_like(x: torch.Tensor, channels: int) -> torch.Tensor:
    """An uninitialised image with ``channels`` channels, otherwise like ``x``, in the format of ``x``."""
    b, _, h, w = x.shape
    return torch.empty((b, channels, h, w), dtype=x.dtype, device=x.device, memory_format=memory_format(x))


class Operands(NamedTuple):
    """The inputs of one call, dense, in one memory format.

    Attributes:
        x: Images, shape (b, c1, h, w).
        skip: More channels for them, shape (b, c2, h, w), or None.
        weight: Gains, shape (c1 + c2,), or None.
        bias: Shape (c1 + c2,), or None.
        scale: Rows of consecutive elements, shape (b, c1 + c2), or None.
        shift: Like ``scale``.
        x_bias: Added to ``x``, shape (c1,), or None; never beside ``skip``. Only forward kernels know it.
        groups: Number of groups.
        skip_scale: Factor of ``skip``.
        silu: Whether SiLU follows.
        channels_last: Whether that is the memory format.
        batch: Number of images.
        channels: Of both images.
        pixels: Of an image.
        group_width: Channels of a group.
    """

    x: torch.Tensor
    skip: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    x_bias: torch.Tensor | None
    groups: int
    skip_scale: float
    silu: bool
    channels_last: bool
    batch: int
    channels: int
    pixels: int
    group_width: int

    @classmethod
    def of(cls, x, skip, weight, bias, scale, shift, x_bias, groups, skip_scale, silu) -> "Operands":
        """Copy what is not laid out as the kernels read it."""
        layout = memory_format(x)
        x, skip = (image if image is None else image.contiguous(memory_format=layout) for image in (x, skip))
        weight, bias, x_bias = (v if v is None else v.contiguous() for v in (weight, bias, x_bias))
        # Halves of a chunk stay where they are.
        scale, shift = (rows if rows is None or rows.stride(1) == 1 else rows.contiguous() for rows in (scale, shift))
        batch, channels, height, width = x.shape
        if skip is not None:
            channels += skip.shape[1]
        return cls(
            x,
            skip,
            weight,
            bias,
            scale,
            shift,
            x_bias,
            groups,
            skip_scale,
            silu,
            layout == torch.channels_last,
            batch,
            channels,
            height * width,
            channels // groups,
        )

    @property
    def images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pointers to both inputs; ``x`` stands in for what is absent, which no kernel then reads."""
        return self.x, self.x if self.skip is None else self.skip

    @property
    def affine(self) -> tuple[torch.Tensor | int, ...]:
        """The first parameters of :func:`affine`."""
        present = (self.x if v is None else v for v in (self.weight, self.bias, self.scale, self.shift))
        return *present, *(0 if rows is None else rows.stride(0) for rows in (self.scale, self.shift))

    @property
    def added(self) -> torch.Tensor:
        """Pointer to ``x_bias``, or what stands in for it."""
        return self.x if self.x_bias is None else self.x_bias

    @property
    def sizes(self) -> tuple[int, ...]:
        """Channels of ``x`` and of both images, pixels, channels of a group, groups."""
        return self.x.shape[1], self.channels, self.pixels, self.group_width, self.groups

    @property
    def image_flags(self) -> dict[str, bool | float]:
        return {
            "HAS_SKIP": self.skip is not None,
            "SKIP_SCALE": self.skip_scale,
            "CHANNELS_LAST": self.channels_last,
        }

    @property
    def affine_flags(self) -> dict[str, bool]:
        return {
            "HAS_WEIGHT": self.weight is not None,
            "HAS_BIAS": self.bias is not None,
            "HAS_SCALE": self.scale is not None,
        }


@triton.jit
def parameters(weight, bias, channel, mask, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Weight and bias of every channel; 1 and 0 if there are none."""
    gain = tl.full(channel.shape, 1.0, tl.float32)
    offset = tl.zeros(channel.shape, tl.float32)
    if HAS_WEIGHT:
        gain = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def added_to(x_bias, channel, mask, HAS_X_BIAS: tl.constexpr):
    """What is added to the images, of every channel."""
    if HAS_X_BIAS:
        return tl.load(x_bias + channel, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.zeros(channel.shape, tl.float32)


@triton.jit
def modulation(scale, shift, scale_stride, shift_stride, sample, channel, mask):
    """A sample's 1 + scale, and its shift, of every channel."""
    factor = tl.load(scale + sample * scale_stride + channel, mask=mask, other=0.0).to(tl.float32) + 1.0
    level = tl.load(shift + sample * shift_stride + channel, mask=mask, other=0.0).to(tl.float32)
    return factor, level


@triton.jit
def affine(
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    sample,
    channel,
    mask,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """Per channel, gain and offset such that u = gain * normalised + offset."""
    gain, offset = parameters(weight, bias, channel, mask, HAS_WEIGHT, HAS_BIAS)
    if HAS_SCALE:
        factor, level = modulation(scale, shift, scale_stride, shift_stride, sample, channel, mask)
        gain *= factor
        offset = offset * factor + level
    return gain, offset


@triton.jit
def silu_gradient(u):
    sigmoid = tl.sigmoid(u)
    return sigmoid * (1.0 + u * (1.0 - sigmoid))


@triton.jit
def origin(sample, pixel, channel, width, pixels, CHANNELS_LAST: tl.constexpr):
    """Offset of an element of images with ``width`` channels; ``sample`` and ``pixel`` are 64-bit."""
    if CHANNELS_LAST:
        return (sample * pixels + pixel) * width + channel
    else:
        return (sample * width + channel) * pixels + pixel


@triton.jit
def offsets(pixel, channel, width, pixels, CHANNELS_LAST: tl.constexpr):
    """Offsets of a tile's elements from its first one."""
    if CHANNELS_LAST:
        return pixel[:, None] * width + channel[None, :]
    else:
        return pixel[:, None] + channel[None, :] * pixels


@triton.jit
def pointers(
    x,
    skip,
    sample,
    start,
    first,
    pixel,
    channel,
    channels_x,
    channels,
    pixels,
    HAS_SKIP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Where the values of a tile are that begins at pixel ``start`` and channel ``first`` of the concatenation."""
    if HAS_SKIP:
        in_x = (
            x
            + origin(sample, start, first, channels_x, pixels, CHANNELS_LAST)
            + offsets(pixel, channel, channels_x, pixels, CHANNELS_LAST)
        )
        in_skip = (
            skip
            + origin(sample, start, first - channels_x, channels - channels_x, pixels, CHANNELS_LAST)
            + offsets(pixel, channel, channels - channels_x, pixels, CHANNELS_LAST)
        )
        return tl.where((first + channel < channels_x)[None, :], in_x, in_skip)
    else:
        return (
            x
            + origin(sample, start, first, channels, pixels, CHANNELS_LAST)
            + offsets(pixel, channel, channels, pixels, CHANNELS_LAST)
        )


@triton.jit
def factor_of(channel, channels_x, SKIP_SCALE: tl.constexpr):
    """What the values of channels of the concatenation are multiplied by."""
    return tl.where(channel < channels_x, 1.0, SKIP_SCALE)[None, :]


@triton.jit
def load_both(
    x,
    skip,
    sample,
    start,
    first,
    pixel,
    channel,
    mask,
    channels_x,
    channels,
    pixels,
    HAS_SKIP: tl.constexpr,
    SKIP_SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The tile that :func:`pointers` points to, ``skip`` scaled; zero outside of the mask."""
    source = pointers(
        x, skip, sample, start, first, pixel, channel, channels_x, channels, pixels, HAS_SKIP, CHANNELS_LAST
    )
    values = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if HAS_SKIP:
        values *= factor_of(first + channel, channels_x, SKIP_SCALE)
    return values


@triton.jit
def load_one(image, sample, start, first, pixel, channel, mask, width, pixels, CHANNELS_LAST: tl.constexpr):
    """A tile of a single image; zero outside of the mask."""
    source = (
        image
        + origin(sample, start, first, width, pixels, CHANNELS_LAST)
        + offsets(pixel, channel, width, pixels, CHANNELS_LAST)
    )
    return tl.load(source, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_one(image, values, sample, start, first, pixel, channel, mask, width, pixels, CHANNELS_LAST: tl.constexpr):
    """Write a tile of a single image."""
    target = (
        image
        + origin(sample, start, first, width, pixels, CHANNELS_LAST)
        + offsets(pixel, channel, width, pixels, CHANNELS_LAST)
    )
    tl.store(target, values.to(image.dtype.element_ty), mask=mask)


def run_forward(
    kernel, config: dict[str, int], operands: Operands, y: torch.Tensor, statistics: torch.Tensor, eps: float
) -> None:
    """Launch one program for each group of each sample.

    Fills the output and the statistics, (b, 3, groups): the mean, its rounding error, and 1 / deviation.
    """
    launch.run(
        kernel,
        (operands.batch * operands.groups,),
        *operands.images,
        operands.added,
        *operands.affine,
        y,
        statistics,
        *operands.sizes,
        EPS=eps,
        HAS_X_BIAS=operands.x_bias is not None,
        SILU=operands.silu,
        **operands.image_flags,
        **operands.affine_flags,
        **config,
    )
