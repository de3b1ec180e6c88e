"""The building blocks of the U-Net."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .helpers import default, exists, maybe
from .kernels import (
    channel_layer_norm,
    conv1x1_concat,
    dispatch,
    group_norm_silu,
    layer_norm,
    linear,
    null_key_attention,
    null_key_cross_attention,
    upsample_conv3x3,
    wide_conv2d,
)
from .kernels.arguments import autocast_dtype
from .kernels.grouped_attention import with_shared
from .plain import has_hooks, is_plain, is_plain_sequence, keep_forwards


def _plus_residual(
    module: nn.Module, *args: torch.Tensor | None, residual: torch.Tensor | None, **kwargs
) -> torch.Tensor:
    """A module's result plus ``residual``, if there is one: added by the module's own kernel where it has one."""
    if not exists(residual):
        return module(*args, **kwargs)
    if is_plain(module, LayerNorm, Attention, CrossAttention, _OverPixels):
        return module(*args, residual=residual, **kwargs)
    return module(*args, **kwargs) + residual


class _OverPixels(nn.Module):
    """Run a module on tokens over the pixels of an image: (b, c, h, w) -> (b, h*w, c) -> fn -> (b, c, h, w)."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor, *, residual: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        residual = maybe(lambda images: rearrange(images, "b c h w -> b (h w) c"))(residual)
        tokens = _plus_residual(self.fn, rearrange(x, "b c h w -> b (h w) c"), residual=residual, **kwargs)
        return rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])


class Attention(nn.Module):
    """Self attention whose query heads share one key/value head, with a learned null key.

    Args:
        dim: Width of the tokens.
        dim_head: Width of a head.
        heads: Number of query heads.
        context_dim: Width of the context tokens to attend to besides the tokens themselves; none if not given.
    """

    def __init__(self, dim: int, *, dim_head: int = 64, heads: int = 8, context_dim: int | None = None):
        super().__init__()
        self.scale = dim_head**-0.5
        self.heads = heads
        self.norm = LayerNorm(dim)
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * 2, bias=False)
        self.to_context = (
            nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, dim_head * 2))
            if exists(context_dim)
            else None
        )
        self.to_out = nn.Sequential(nn.Linear(dim_head * heads, dim, bias=False), LayerNorm(dim))

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        attn_bias: torch.Tensor | None = None,
        *,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from every token to the null key, the context and the tokens.

        Args:
            x: Tokens, shape (b, n, dim).
            context: Context tokens, shape (b, m, context_dim).
            mask: Which keys may be attended to, bool, shape (b, m + n), the context's first.
            attn_bias: Added to the scores, broadcast to (b, heads, n, 1 + m + n), the null key's column first.
            residual: Added to the result, shape (b, n, dim).

        Returns:
            Tokens, shape (b, n, dim).

        Raises:
            ValueError: if a context is given to a module that was made without ``context_dim``.
        """
        x = self.norm(x)
        q, (k, v) = _queries(self, x), _project(self.to_kv, x).chunk(2, dim=-1)
        if exists(context):
            if not exists(self.to_context):
                raise ValueError("context was given, but this Attention was made without context_dim")
            ck, cv = self.to_context(context).chunk(2, dim=-1)
            k, v = torch.cat((ck, k), dim=1), torch.cat((cv, v), dim=1)
        null_key, null_value = self.null_kv
        out = null_key_attention(q, k, v, null_key, null_value, heads=self.heads, mask=mask, bias=attn_bias)
        return _projected(self.to_out, out, residual)


def _projected(to_out: nn.Module, tokens: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """What the last part of an attention makes of the heads' results, plus ``residual`` if there is one."""
    if not is_plain(to_out, nn.Sequential) or len(to_out) != 2:
        return _plus_residual(to_out, tokens, residual=residual)
    project, norm = to_out
    return _plus_residual(norm, _project(project, tokens), residual=residual)


def _project(product: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    if is_plain(product, nn.Linear):
        return linear(tokens, product.weight, product.bias)
    return product(tokens)


def _is_scaled_by_kernels(attention: "Attention | CrossAttention") -> bool:
    """Whether an attention's ``scale`` is still the one with which it was made, and kernels multiply queries."""
    scale = attention.scale
    # The value of a tensor is not asked for: that would wait for the device.
    return not isinstance(scale, torch.Tensor) and scale == attention.null_kv.shape[-1] ** -0.5


def _queries(attention: "Attention | CrossAttention", tokens: torch.Tensor) -> torch.Tensor:
    """Queries (b, n, heads * d) that kernels, which multiply them by d**-0.5, multiply by the attention's ``scale``."""
    q = _project(attention.to_q, tokens)
    if _is_scaled_by_kernels(attention):
        return q
    # In the shape in which the original multiplies: a scale may be one for each head, (heads, 1, 1).
    by_head = q.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    scaled = by_head * (attention.scale * attention.null_kv.shape[-1] ** 0.5)
    return scaled.transpose(1, 2).flatten(2).to(q.dtype)


def _is_plain_conv(module: Any, side: int | None = None) -> bool:
    """Whether a module is a plain convolution, of this or any side length, that leaves the size of images as it is."""
    if not is_plain(module, nn.Conv2d):
        return False
    side = default(side, module.kernel_size[0])
    return (
        side % 2 == 1
        and (module.kernel_size, module.padding, module.padding_mode) == ((side,) * 2, (side // 2,) * 2, "zeros")
        and (module.stride, module.dilation, module.groups) == ((1, 1), (1, 1), 1)
    )


def _adds_bias_apart(device: torch.device) -> bool:
    """Whether a convolution reads and writes its result once more to add the bias: all but those of a CPU do."""
    return device.type != "cpu"


def _reads_apart(device: torch.device) -> bool:
    """Whether a kernel reads the images apart: on a CPU they are one for the norm, and so for the convolution too."""
    return device.type != "cpu" or dispatch.implementation() == "triton"


class _TakesSkip(nn.Module):
    """A block whose ``forward`` takes more channels apart, as ``skip``; but not if another one was put in its place."""

    _forward_with_skip: Callable | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Found out here, once: not in a step, nor where a graph is made of it.
        cls._forward_with_skip = cls.forward if _names_skip(cls.forward) else None

    def takes_skip(self) -> bool:
        if has_hooks(self):
            # They are to see all channels, as in the original.
            return False
        own = vars(self).get("forward")
        return type(self).forward is type(self)._forward_with_skip if own is None else _names_skip(own)


def _names_skip(forward: Callable) -> bool:
    return "skip" in inspect.signature(forward).parameters


def join_unless_taken_apart(
    block: nn.Module, x: torch.Tensor, skip: torch.Tensor | None, skip_scale: float
) -> tuple[torch.Tensor, dict[str, Any]]:
    """With what to call a block that is to see more channels: in one tensor, unless it takes them as ``skip``."""
    if not exists(skip):
        return x, {}
    if isinstance(block, _TakesSkip) and block.takes_skip():
        return x, {"skip": skip, "skip_scale": skip_scale}
    return torch.cat((x, skip * skip_scale), dim=1), {}


def _seeing_skip(
    block: nn.Module, x: torch.Tensor, skip: torch.Tensor | None, skip_scale: float, **kwargs
) -> torch.Tensor:
    x, apart = join_unless_taken_apart(block, x, skip, skip_scale)
    return block(x, **apart, **kwargs)


def _rows(values: torch.Tensor, batch: int, channels: int) -> torch.Tensor | None:
    """Scales or shifts of normalised images as rows (b, channels); None if they differ from pixel to pixel."""
    if values.ndim == 4 and values.shape[2:] == (1, 1):
        values = values.flatten(1)
    if values.ndim != 2:
        return None
    return values.expand(batch, channels) if 1 in values.shape else values


class Block(_TakesSkip):
    """GroupNorm, optional scale and shift, SiLU, 3x3 convolution.

    Args:
        dim: Channels of the input.
        dim_out: Channels of the output.
        groups: Number of groups of the GroupNorm.
        norm: Whether to normalise at all.
    """

    def __init__(self, dim: int, dim_out: int, groups: int = 8, norm: bool = True):
        super().__init__()
        self.groupnorm = nn.GroupNorm(groups, dim) if norm else Identity()
        self.activation = nn.SiLU()
        self.project = nn.Conv2d(dim, dim_out, 3, padding=1)

    def forward(
        self,
        x: torch.Tensor,
        scale_shift: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        skip: torch.Tensor | None = None,
        skip_scale: float = 1.0,
        x_bias: torch.Tensor | None = None,
        biased: bool = True,
    ) -> torch.Tensor:
        """Map images (b, dim, h, w) to (b, dim_out, h, w).

        Args:
            x: Images.
            scale_shift: Scale and shift of the normalised images, x * (scale + 1) + shift: of shape (b, dim), or one
                that broadcasts to the images', such as (b, dim, 1, 1).
            skip: More channels of the images, which come after those of ``x``; together they are ``dim``.
            skip_scale: Factor of ``skip``.
            x_bias: Added to the images, shape (dim,); only if :meth:`hands_on_bias`.
            biased: Whether the convolution adds its bias, which else someone else has to; only if
                :meth:`hands_on_bias`.
        """
        scale = shift = None
        by_rows = True
        if exists(scale_shift):
            channels = x.shape[1] + (skip.shape[1] if exists(skip) else 0)
            scale, shift = (_rows(values, x.shape[0], channels) for values in scale_shift)
            by_rows = exists(scale) and exists(shift)
        if by_rows and self.fuses_norm():
            norm: Any = self.groupnorm
            x = group_norm_silu(
                x,
                norm.weight,
                norm.bias,
                groups=norm.num_groups,
                eps=norm.eps,
                scale=scale,
                shift=shift,
                skip=skip,
                skip_scale=skip_scale,
                x_bias=x_bias,
            )
            return self.project(x) if biased else F.conv2d(x, self.project.weight, padding=1)
        if exists(skip):
            x = torch.cat((x, skip * skip_scale), dim=1)
        x = self.groupnorm(x)
        if exists(scale_shift):
            scale, shift = (rows[:, :, None, None] if rows.ndim == 2 else rows for rows in scale_shift)
            x = x * (scale + 1) + shift
        return self.project(self.activation(x))

    def fuses_norm(self) -> bool:
        """Whether one kernel normalises and activates, reading the parameters: not if a part of it was replaced."""
        return is_plain(self.groupnorm, nn.GroupNorm) and is_plain(self.activation, nn.SiLU)

    def hands_on_bias(self, following: "Block") -> bool:
        """Whether the block after this one is to add the bias of this one's convolution, as it reads the images anyway.

        Not with gradients: that of the bias would take another pass then.
        """
        project = self.project
        return (
            not torch.is_grad_enabled()
            and is_plain(self, Block)
            and _is_plain_conv(project, 3)
            and exists(project.bias)
            and _adds_bias_apart(project.weight.device)
            and is_plain(following, Block)
            and self.fuses_norm()
            and following.fuses_norm()
        )


class _FeedForward(nn.Sequential):
    """Norm, 1x1 convolution, GELU, norm, 1x1 convolution; the GELU is a part of the norm after it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self) != 5 or not is_plain(self[2], nn.GELU) or not is_plain(self[3], ChanLayerNorm):
            return super().forward(x)
        norm, widen, gelu, hidden_norm, narrow = self
        if gelu.approximate != "none":
            return super().forward(x)
        return narrow(hidden_norm(widen(norm(x)), gelu=True))


def ChanFeedForward(dim: int, mult: int = 2) -> nn.Sequential:
    """The feed-forward part of a :class:`TransformerBlock` on images: two 1x1 convolutions with a GELU between them.

    Args:
        dim: Channels of input and output.
        mult: How many times wider the hidden layer is.
    """
    hidden_dim = int(dim * mult)
    return _FeedForward(
        ChanLayerNorm(dim),
        nn.Conv2d(dim, hidden_dim, 1, bias=False),
        nn.GELU(),
        ChanLayerNorm(hidden_dim),
        nn.Conv2d(hidden_dim, dim, 1, bias=False),
    )


class ChanLayerNorm(nn.Module):
    """LayerNorm over the channels of every pixel, with a gain and no bias.

    Args:
        dim: Number of channels.
        eps: Added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
        """Normalise images of shape (b, dim, h, w), or, with ``gelu``, the GELU of them."""
        return channel_layer_norm(x, self.g, eps=self.eps, gelu=gelu)


class CrossAttention(nn.Module):
    """Attention from tokens to context tokens and a learned null key, each head with its own keys and values.

    Args:
        dim: Width of the tokens.
        context_dim: Width of the context tokens; ``dim`` if not given.
        dim_head: Width of a head.
        heads: Number of heads.
        norm_context: Whether to normalise the context tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        norm_context: bool = False,
    ):
        super().__init__()
        self.scale = dim_head**-0.5
        self.heads = heads
        context_dim = default(context_dim, dim)
        self.norm = LayerNorm(dim)
        self.norm_context = LayerNorm(context_dim) if norm_context else Identity()
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(context_dim, dim_head * heads * 2, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim_head * heads, dim, bias=False), LayerNorm(dim))

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        *,
        keys_values: torch.Tensor | None = None,
        shared_context: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from every token to the null key and the context.

        Args:
            x: Tokens, shape (b, n, dim).
            context: Context tokens, shape (b, m, context_dim).
            mask: Which context tokens may be attended to, bool, shape (b, m); with shared ones (b, m + s).
            keys_values: What :meth:`project_context` makes of the context, to be given instead of it.
            shared_context: More context tokens, after the others, for all images the same: shape (s, context_dim).
            residual: Added to the result, shape (b, n, dim).

        Returns:
            Tokens, shape (b, n, dim).
        """
        x = self.norm(x)
        null_key, null_value = self.null_kv
        joins = not exists(keys_values) and _is_scaled_by_kernels(self)
        if joins and is_plain_sequence(self.to_out, nn.Linear, LayerNorm):
            project, norm = self.to_out
            products = self.to_q, self.to_kv, project
            if all(is_plain(product, nn.Linear) and product.bias is None for product in products):
                weights = [product.weight for product in products]
                out = null_key_cross_attention(
                    x,
                    self.norm_context(context),
                    *weights,
                    null_key,
                    null_value,
                    heads=self.heads,
                    mask=mask,
                    shared_context=self.norm_context(shared_context) if exists(shared_context) else None,
                )
                return norm(out, residual=residual)
        if exists(shared_context):
            context = with_shared(context, shared_context)
        keys_values = default(keys_values, lambda: self.project_context(context))
        k, v = keys_values.chunk(2, dim=-1)
        out = null_key_attention(_queries(self, x), k, v, null_key, null_value, heads=self.heads, mask=mask)
        return _projected(self.to_out, out, residual)

    def project_context(self, context: torch.Tensor) -> torch.Tensor:
        """The keys and, after them, the values of context tokens (b, m, context_dim): shape (b, m, 2 * heads * d)."""
        return _project(self.to_kv, self.norm_context(context))


class CrossEmbedLayer(nn.Module):
    """Convolutions of several kernel sizes side by side, as in an Inception module.

    The smallest kernel gets half of the output channels, the next a quarter and so on; the largest gets what is left.

    Args:
        dim_in: Channels of the input.
        kernel_sizes: Kernel sizes in pixels, all odd or all even like ``stride``.
        dim_out: Channels of the output; ``dim_in`` if not given.
        stride: Stride in pixels.

    Raises:
        ValueError: if a kernel size and the stride are not both odd or both even: the results would not line up.
    """

    def __init__(self, dim_in: int, kernel_sizes: tuple[int, ...], dim_out: int | None = None, stride: int = 2):
        super().__init__()
        if any((kernel - stride) % 2 for kernel in kernel_sizes):
            raise ValueError(
                f"kernel_sizes must all be {'odd' if stride % 2 else 'even'} like the stride {stride};"
                f" got {tuple(kernel_sizes)}"
            )
        dim_out = default(dim_out, dim_in)
        ascending = sorted(kernel_sizes)
        dims = [dim_out // 2**i for i in range(1, len(ascending))]
        dims.append(dim_out - sum(dims))
        self.convs = nn.ModuleList(
            nn.Conv2d(dim_in, dim, kernel, stride=stride, padding=(kernel - stride) // 2)
            for kernel, dim in zip(ascending, dims, strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (b, dim_in, h, w) to (b, dim_out, h / stride, w / stride)."""
        dtype = autocast_dtype(x)
        if dtype is not None and all(is_plain(conv, nn.Conv2d) for conv in self.convs):
            # Once, or every convolution would convert the images for itself, and keep its own for the backward pass.
            x = x.to(dtype)
        trains_on_cpu = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if trains_on_cpu and x.dtype == torch.float32 and not x.is_contiguous():
            # There the backward pass of wide kernels on few channels is up to 30 times slower in channels_last.
            layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
            x = x.contiguous()
            return self._side_by_side(x).contiguous(memory_format=layout)
        return self._side_by_side(x)

    def _side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        results = [wide_conv2d(x, conv.weight, conv.bias) if _is_plain_conv(conv) else conv(x) for conv in self.convs]
        return torch.cat(results, dim=1)


def Downsample(dim: int, dim_out: int | None = None) -> nn.Conv2d:
    """A convolution that halves height and width.

    Args:
        dim: Channels of the input.
        dim_out: Channels of the output; ``dim`` if not given.
    """
    return nn.Conv2d(dim, default(dim_out, dim), kernel_size=4, stride=2, padding=1)


class Identity(nn.Module):
    """Returns its first input; takes and ignores any other argument."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return x


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension with a learned gain; the bias is a constant zero.

    Args:
        dim: Size of the last dimension.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: torch.Tensor, *, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise tokens of shape (..., dim); then add the residual, of the same shape, if there is one."""
        return layer_norm(x, self.gamma, residual=residual)


class Parallel(nn.Module):
    """The sum of several modules' results on the same input."""

    def __init__(self, *fns: Callable):
        super().__init__()
        self.fns = nn.ModuleList(fns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(fn(x) for fn in self.fns)


class Residual(nn.Module):
    """A module's result plus its input."""

    def __init__(self, fn: Callable):
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return _plus_residual(self.fn, x, residual=x, **kwargs)


class ResnetBlock(_TakesSkip):
    """Two :class:`Block`s with a residual connection, conditioned on time and optionally on tokens.

    Args:
        dim: Channels of the input.
        dim_out: Channels of the output.
        cond_dim: Width of the conditioning tokens to attend to between the blocks; no attention if not given.
        time_cond_dim: Width of the time conditioning that scales and shifts the second block; none if not given.
        groups: Number of groups of the GroupNorms.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        cond_dim: int | None = None,
        time_cond_dim: int | None = None,
        groups: int = 8,
    ):
        super().__init__()
        self.time_mlp = (
            nn.Sequential(nn.SiLU(), nn.Linear(time_cond_dim, dim_out * 2)) if exists(time_cond_dim) else None
        )
        self.cross_attn = _OverPixels(CrossAttention(dim=dim_out, context_dim=cond_dim)) if exists(cond_dim) else None
        self.block1 = Block(dim, dim_out, groups=groups)
        self.block2 = Block(dim_out, dim_out, groups=groups)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else Identity()

    def forward(
        self,
        x: torch.Tensor,
        time_emb: torch.Tensor | None = None,
        cond: torch.Tensor | None = None,
        *,
        scale_shift: torch.Tensor | None = None,
        keys_values: torch.Tensor | None = None,
        shared_cond: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
        skip_scale: float = 1.0,
    ) -> torch.Tensor:
        """Map images (b, dim, h, w) to (b, dim_out, h, w).

        Args:
            x: Images. There may be fewer of them than there are conditions: with n images, image i stands under the
                conditions i, i + n, i + 2 n... The work on what they share is done once.
            time_emb: Time conditioning, shape (b, time_cond_dim).
            cond: Conditioning tokens, shape (b, m, cond_dim); needed if the block was made with ``cond_dim``.
            scale_shift: What ``time_mlp`` makes of the time conditioning, shape (b, 2 * dim_out), instead of it.
            keys_values: What the cross attention's ``project_context`` makes of the tokens, instead of them.
            shared_cond: More conditioning tokens, after the others, for all images the same: shape (s, cond_dim); only
                if :func:`takes_shared_cond`.
            skip: More channels of the images, which come after those of ``x``; together they are ``dim``. The two are
                never put into one tensor where a kernel can read them apart.
            skip_scale: Factor of ``skip``.

        Raises:
            ValueError: if the block attends to tokens and none are given.
        """
        if exists(self.time_mlp) and exists(time_emb):
            scale_shift = self.time_mlp(time_emb)
        if exists(skip) and not _reads_apart(x.device):
            x, skip = torch.cat((x, skip * skip_scale), dim=1), None

        first = self.block1
        handed = isinstance(first, Block) and not exists(self.cross_attn) and first.hands_on_bias(self.block2)
        h = _seeing_skip(first, x, skip, skip_scale, **({"biased": False} if handed else {}))
        # Not `len`, which torch.export would make a constant.
        if exists(scale_shift) and scale_shift.shape[0] > h.shape[0]:
            copies = scale_shift.shape[0] // h.shape[0]
            # Not `repeat`, whose result is never in channels_last memory.
            h, x = (torch.cat([images] * copies) for images in (h, x))
        if exists(self.cross_attn):
            if not exists(cond) and not exists(keys_values):
                raise ValueError("cond must be given to a ResnetBlock that was made with cond_dim")
            given = {"keys_values": keys_values} if exists(keys_values) else {}
            if exists(shared_cond):
                given["shared_context"] = shared_cond
            h = _plus_residual(self.cross_attn, h, residual=h, context=cond, **given)
        more: dict[str, Any] = {"x_bias": first.project.bias} if handed else {}
        if exists(scale_shift):
            # As the original hands them over, for whatever stands in for the block.
            rows = scale_shift if is_plain(self.block2, Block) else scale_shift[:, :, None, None]
            more["scale_shift"] = rows.chunk(2, dim=1)
        h = self.block2(h, **more)
        if not exists(skip):
            return h + self.res_conv(x)
        if _is_plain_conv(self.res_conv, 1):
            return h + conv1x1_concat(x, skip, self.res_conv.weight, self.res_conv.bias, skip_scale=skip_scale)
        return h + self.res_conv(torch.cat((x, skip * skip_scale), dim=1))


def has_plain_time_mlp(block: Any) -> bool:
    """Whether others may make a block's ``scale_shift`` of its ``time_mlp``'s weights: not if anything was replaced."""
    if not is_plain(block, ResnetBlock) or not is_plain_sequence(block.time_mlp, nn.SiLU, nn.Linear):
        return False
    last = block.time_mlp[1]
    # Sparse weights cannot be put side by side.
    return exists(last.bias) and last.weight.layout == torch.strided


def takes_shared_cond(block: ResnetBlock) -> bool:
    """Whether a block may be told of tokens that all images share: not if what attends to them was replaced."""
    attention: Any = block.cross_attn
    if not exists(attention):
        return True
    if not is_plain(attention, _OverPixels) or not is_plain(attention.fn, CrossAttention):
        return False
    return is_plain(attention.fn.norm_context, Identity, LayerNorm)


class SinusoidalPosEmb(nn.Module):
    """Sinusoidal embedding of timesteps, Vaswani et al., "Attention Is All You Need" (2017), section 3.5.

    Args:
        dim: Width of the embedding: even and at least 4.

    Raises:
        ValueError: for any other width.
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"dim of a sinusoidal embedding must be even and at least 4, got {dim}")
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed timesteps of shape (b,) as float32 of shape (b, dim): sines first, then cosines."""
        half = self.dim // 2
        steps = torch.arange(half, device=x.device, dtype=torch.float32)
        frequencies = torch.exp(steps * (-math.log(10000) / (half - 1)))
        angles = x[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class TransformerBlock(nn.Module):
    """Self attention over the pixels and a feed-forward, each with a residual connection.

    Args:
        dim: Channels of the images.
        heads: Number of query heads.
        dim_head: Width of a head.
        ff_mult: How many times wider the feed-forward's hidden layer is.
        context_dim: Width of context tokens to attend to as well; none if not given.
    """

    def __init__(
        self, dim: int, *, heads: int = 8, dim_head: int = 32, ff_mult: int = 2, context_dim: int | None = None
    ):
        super().__init__()
        self.attn = _OverPixels(Attention(dim=dim, heads=heads, dim_head=dim_head, context_dim=context_dim))
        self.ff = ChanFeedForward(dim=dim, mult=ff_mult)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Map images (b, dim, h, w) to the same shape.

        Args:
            x: Images.
            context: Context tokens, shape (b, m, context_dim).
        """
        x = _plus_residual(self.attn, x, residual=x, context=context)
        return self.ff(x) + x


class UpsampleConv(nn.Sequential):
    """Enlargement and convolution, in this order; as one operation while they are what :func:`Upsample` made.

    Attributes:
        summed_kernel: What :func:`.upsample_conv.summed_kernel` makes of the weight, from whom keeps it up to date;
            none if it is to be made in every call.
    """

    summed_kernel: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (b, dim, h, w) to (b, dim_out, 2 h, 2 w)."""
        if not self.is_one_operation():
            return super().forward(x)
        convolution: Any = self[1]
        return upsample_conv3x3(x, convolution.weight, convolution.bias, kernel=self.summed_kernel)

    def is_one_operation(self) -> bool:
        """Whether both parts are plain, and have the settings that they were made with."""
        if len(self) != 2:
            return False
        enlarge, convolve = self
        return (
            is_plain(enlarge, nn.Upsample)
            and (enlarge.size, enlarge.scale_factor, enlarge.mode) == (None, 2, "nearest")
            and _is_plain_conv(convolve, 3)
        )


def Upsample(dim: int, dim_out: int | None = None) -> nn.Sequential:
    """Doubles height and width by repeating pixels, then a 3x3 convolution.

    Args:
        dim: Channels of the input.
        dim_out: Channels of the output; ``dim`` if not given.
    """
    return UpsampleConv(
        nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, default(dim_out, dim), 3, padding=1)
    )


keep_forwards(
    Attention,
    Block,
    ChanLayerNorm,
    CrossAttention,
    CrossEmbedLayer,
    Identity,
    LayerNorm,
    Parallel,
    Residual,
    ResnetBlock,
    SinusoidalPosEmb,
    TransformerBlock,
    UpsampleConv,
    _FeedForward,
    _OverPixels,
)
