"""The U-Net that predicts the noise in an image, and its four built-in sizes."""

import inspect
import itertools
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .arguments import whole_number
from .blocks import blocks_are_compiled, run_block
from .helpers import cast_tuple, default, exists, prob_mask_like
from .kept import KEPT, forget_all
from .kernels.cross_attention import keys_are_worth_sharing
from .kernels.grouped_attention import with_shared
from .layers import (
    Attention,
    CrossEmbedLayer,
    Downsample,
    Identity,
    Parallel,
    Residual,
    ResnetBlock,
    SinusoidalPosEmb,
    TransformerBlock,
    Upsample,
    _OverPixels,
    has_plain_time_mlp,
    join_unless_taken_apart,
    takes_shared_cond,
)
from .plain import is_as_made, is_plain, methods_of, overridden
from .t5 import MAX_LENGTH, get_encoded_dim

ATTN_DIM_HEAD = 64
NUM_TIME_TOKENS = 2
RESNET_GROUPS = 8
SKIP_CONNECT_SCALE = 2**-0.5
T5_SMALL_DIM = get_encoded_dim("t5_small")
# Weights up to which to copy those of all blocks side by side, for one product, costs less than a product for each.
_MOST_JOINED = 2**21


def _per_level(name: str, value: Any, levels: int) -> tuple:
    try:
        return cast_tuple(value, levels)
    except ValueError:
        raise ValueError(
            f"{name} must be one value or {levels}, one for each entry of dim_mults; got {len(value)}: {value!r}"
        ) from None


# What a ResnetBlock is told about time and text: arguments of its forward, by name. A plain dict, which
# torch.compile takes.
BlockCondition = dict[str, torch.Tensor]


def _run_resnet_block(
    level: int,
    block: nn.Module,
    x: torch.Tensor,
    condition: BlockCondition,
    *,
    attends: bool = False,
    skip: torch.Tensor | None = None,
    skip_scale: float = 1.0,
) -> torch.Tensor:
    """The result of a block, which is called as the original calls it, whatever it is and whoever looks on.

    Only where its condition was worked out ahead, of a block as it was made, is it told that instead.
    """
    x, apart = join_unless_taken_apart(block, x, skip, skip_scale)
    if "time_emb" not in condition:
        return run_block(level, block, x, **condition, **apart)
    # By place: a forward of someone else's has names of its own, and hooks see no others.
    given = [condition["time_emb"]]
    if attends or exists(getattr(block, "cross_attn", None)):
        given.append(condition["cond"])
    return run_block(level, block, x, *given, **apart)


class _TimeHiddens(nn.Sequential):
    """Timesteps (b,) to hidden states, in the dtype of its weights."""

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        embedding, *rest = self
        # The angles need float32: in half precision large timesteps would fall together.
        angles = embedding(time)
        x = angles.to(next((p.dtype for p in self.parameters() if p.is_floating_point()), angles.dtype))
        for layer in rest:
            x = layer(x)
        return x


class Unet(nn.Module):
    """A U-Net conditioned on time, text and, for super-resolution, a low-resolution image.

    Ronneberger et al., "U-Net" (2015); Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep
    Language Understanding" (Imagen, 2022), appendix B.

    Args:
        dim: Channels at the highest resolution, a multiple of 8.
        dim_mults: Channels of each level in multiples of ``dim``; each level halves height and width. The first must be
            1 unless ``memory_efficient``.
        channels: Channels of the input images.
        channels_out: Channels of the output images; ``channels`` if not given.
        cond_dim: Width of the conditioning tokens; ``dim`` if not given.
        text_embed_dim: Width of the text embeddings, see :func:`.t5.get_encoded_dim`.
        num_resnet_blocks: ResNet blocks of a level besides its first; one value or one for each level.
        layer_attns: Whether a level ends with self attention; one value or one for each level.
        layer_cross_attns: Whether a level's first ResNet block attends to the conditioning tokens; one value or one for
            each level. The two blocks in the middle always do.
        attn_heads: Number of heads of the self attention.
        lowres_cond: Whether the U-Net is conditioned on a low-resolution image (super-resolution).
        memory_efficient: Whether a level halves the image at its start and not at its end.
        attend_at_middle: Whether there is self attention in the middle.

    Raises:
        TypeError: if a number is no int.
        ValueError: if the sizes cannot be built; the message says what to change.
    """

    # Those of networks of users' own, which are U-Nets for Imagen alone and make no other use of this class.
    downsampling_factor = 1
    max_text_len = MAX_LENGTH

    def __init__(
        self,
        *,
        dim: int = 128,
        dim_mults: tuple = (1, 2, 4),
        channels: int = 3,
        channels_out: int | None = None,
        cond_dim: int | None = None,
        text_embed_dim=T5_SMALL_DIM,
        num_resnet_blocks: int | tuple = 1,
        layer_attns: bool | tuple = True,
        layer_cross_attns: bool | tuple = True,
        attn_heads: int = 8,
        lowres_cond: bool = False,
        memory_efficient: bool = False,
        attend_at_middle: bool = False,
    ):
        # Kept so that Imagen can build the same U-Net with other conditioning, see _cast_model_parameters.
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._config = config

        cond_dim = default(cond_dim, dim)
        channels_out = default(channels_out, channels)
        dim, channels, channels_out, cond_dim, text_embed_dim, attn_heads = (
            whole_number(name, value, least=1)
            for name, value in (
                ("dim", dim),
                ("channels", channels),
                ("channels_out", channels_out),
                ("cond_dim", cond_dim),
                ("text_embed_dim", text_embed_dim),
                ("attn_heads", attn_heads),
            )
        )
        dim_mults = cast_tuple(dim_mults)
        dims = self._level_dims(dim, dim_mults, memory_efficient)
        levels = len(dim_mults)
        num_resnet_blocks = tuple(
            whole_number("num_resnet_blocks", blocks, least=0)
            for blocks in _per_level("num_resnet_blocks", num_resnet_blocks, levels)
        )
        layer_attns = _per_level("layer_attns", layer_attns, levels)
        layer_cross_attns = _per_level("layer_cross_attns", layer_cross_attns, levels)

        self.channels = channels
        self.channels_out = channels_out
        self.lowres_cond = lowres_cond
        self.text_embed_dim = text_embed_dim
        self.skip_connect_scale = SKIP_CONNECT_SCALE
        # Height and width must be multiples of this: every level halves them, the last only with memory_efficient.
        self.downsampling_factor = 2 ** (levels if memory_efficient else levels - 1)

        # The modules are made in a fixed order, so that one seed gives one set of initial weights.
        time_cond_dim = dim * 4 * (2 if lowres_cond else 1)
        self.to_time_hiddens, self.to_time_cond, self.to_time_tokens = self._time_layers(dim, time_cond_dim, cond_dim)
        if lowres_cond:
            self.to_lowres_time_hiddens, self.to_lowres_time_cond, self.to_lowres_time_tokens = self._time_layers(
                dim, time_cond_dim, cond_dim
            )

        self.norm_cond = nn.LayerNorm(cond_dim)
        self.text_to_cond = nn.Linear(text_embed_dim, cond_dim)
        # What stands for dropped and missing text in classifier-free guidance, Ho and Salimans (2022).
        self.null_text_embed = nn.Parameter(torch.randn(1, self.max_text_len, cond_dim))
        self.null_text_hidden = nn.Parameter(torch.randn(1, time_cond_dim))
        self.to_text_non_attn_cond = nn.Sequential(
            nn.LayerNorm(cond_dim),
            nn.Linear(cond_dim, time_cond_dim),
            nn.SiLU(),
            nn.Linear(time_cond_dim, time_cond_dim),
        )

        self.init_conv = CrossEmbedLayer(
            channels * 2 if lowres_cond else channels, dim_out=dim, kernel_sizes=(3, 7, 15), stride=1
        )

        def first_block(dim_in: int, dim_out: int, cross_attend: bool) -> ResnetBlock:
            return ResnetBlock(
                dim_in,
                dim_out,
                cond_dim=cond_dim if cross_attend else None,
                time_cond_dim=time_cond_dim,
                groups=RESNET_GROUPS,
            )

        def further_blocks(number: int, dim_in: int, dim_out: int) -> nn.ModuleList:
            return nn.ModuleList(first_block(dim_in, dim_out, cross_attend=False) for _ in range(number))

        def self_attention(dim: int, attend: bool) -> nn.Module:
            return TransformerBlock(dim, heads=attn_heads, dim_head=ATTN_DIM_HEAD) if attend else Identity()

        level_settings = list(zip(dims[:-1], dims[1:], num_resnet_blocks, layer_attns, layer_cross_attns, strict=True))

        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()
        skip_dims = []
        for level, (dim_in, dim_out, blocks, attend, cross_attend) in enumerate(level_settings):
            pre_downsample = Downsample(dim_in, dim_out) if memory_efficient else None
            current = dim_out if memory_efficient else dim_in
            skip_dims.append(current)
            post_downsample: nn.Module | None = None
            if memory_efficient:
                pass
            elif level < levels - 1:
                post_downsample = Downsample(current, dim_out)
            else:
                post_downsample = Parallel(nn.Conv2d(dim_in, dim_out, 3, padding=1), nn.Conv2d(dim_in, dim_out, 1))
            # The order within the constructor call is the order in which the initial weights are drawn.
            self.downs.append(
                nn.ModuleList(
                    [
                        pre_downsample,
                        first_block(current, current, cross_attend),
                        further_blocks(blocks, current, current),
                        self_attention(current, attend),
                        post_downsample,
                    ]
                )
            )

        middle = dims[-1]
        self.mid_block1 = first_block(middle, middle, cross_attend=True)
        self.mid_attn = (
            _OverPixels(Residual(Attention(middle, heads=attn_heads, dim_head=ATTN_DIM_HEAD)))
            if attend_at_middle
            else None
        )
        self.mid_block2 = first_block(middle, middle, cross_attend=True)

        for dim_in, dim_out, blocks, attend, cross_attend in reversed(level_settings):
            with_skip = dim_out + skip_dims.pop()
            is_last = len(self.ups) == levels - 1
            self.ups.append(
                nn.ModuleList(
                    [
                        first_block(with_skip, dim_out, cross_attend),
                        further_blocks(blocks, with_skip, dim_out),
                        self_attention(dim_out, attend),
                        Upsample(dim_out, dim_in) if memory_efficient or not is_last else Identity(),
                    ]
                )
            )

        self.final_res_block = first_block(dim, dim, cross_attend=False)
        self.final_conv = nn.Conv2d(dim, channels_out, 3, padding=1)

    @staticmethod
    def _level_dims(dim: int, dim_mults: tuple, memory_efficient: bool) -> list[int]:
        """Channels before the first level and after each, checked."""
        if not dim_mults:
            raise ValueError("dim_mults must have at least one entry, got none")
        dims = [dim]
        for mult in dim_mults:
            is_number = isinstance(mult, numbers.Real) and not isinstance(mult, bool)
            if not is_number or mult <= 0 or not float(dim * mult).is_integer():
                raise ValueError(
                    f"dim_mults must be positive and give whole numbers of channels with dim={dim}; got {dim_mults}"
                )
            dims.append(int(dim * mult))
        if wrong := [d for d in dims if d % RESNET_GROUPS]:
            raise ValueError(
                f"dim={dim} with dim_mults={dim_mults} gives levels of {dims[1:]} channels, but every level and dim"
                f" itself must be a multiple of {RESNET_GROUPS}, the number of GroupNorm groups; {wrong[0]} is not."
                f" Choose a dim that is a multiple of {RESNET_GROUPS}"
            )
        if dim_mults[0] != 1 and not memory_efficient:
            raise ValueError(
                f"dim_mults must start with 1 unless memory_efficient=True; got {dim_mults}. Multiply dim by"
                f" {dim_mults[0]} and divide dim_mults by it, or set memory_efficient=True"
            )
        return dims

    @staticmethod
    def _time_layers(dim: int, time_cond_dim: int, cond_dim: int) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
        """Timestep to hidden state, hidden state to time conditioning, hidden state to time tokens."""
        return (
            _TimeHiddens(SinusoidalPosEmb(dim), nn.Linear(dim, time_cond_dim), nn.SiLU()),
            nn.Sequential(nn.Linear(time_cond_dim, time_cond_dim)),
            nn.Sequential(
                nn.Linear(time_cond_dim, cond_dim * NUM_TIME_TOKENS), nn.Unflatten(1, (NUM_TIME_TOKENS, cond_dim))
            ),
        )

    def __getstate__(self) -> dict[str, Any]:
        # What is kept belongs to these very tensors: it goes into no copy and no file.
        return {name: value for name, value in super().__getstate__().items() if name not in KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_locals" in state and "_config" not in state:
            self._make_of_original(state)

    def _make_of_original(self, state: dict[str, Any]) -> None:
        """Become a U-Net of ours with what was pickled of one of the original package's, which is made otherwise.

        Raises:
            ValueError: if it was changed after it was made: what was done to it would be lost.
        """
        found = nn.Module()
        found.__setstate__(state)
        parts, tensors = dict(found.named_modules()), found.state_dict(keep_vars=True)
        names = inspect.signature(Unet).parameters
        # Weights that are drawn only to be replaced must not change what is drawn afterwards.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            Unet.__init__(self, **{name: value for name, value in state["_locals"].items() if name in names})
        shapes, own = ({name: x.shape for name, x in each.items()} for each in (tensors, self.state_dict()))
        if shapes != own or state.get("init_conv_to_final_conv_residual") or not all(map(is_as_made, parts.values())):
            raise ValueError(
                "this pickle holds a U-Net of minimagen's whose parts were replaced or given hooks: load it there, save"
                " unet.state_dict(), and load that into a Unet made here"
            )
        for name, value in tensors.items():
            place, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(place), leaf, value)
        self.to(self.null_text_embed.device)
        for name, part in self.named_modules():
            part.training = parts[name].training if name in parts else found.training
        vars(self).update({name: value for name, value in state.items() if not name.startswith("_")})

    def _apply(self, *args, **kwargs):
        # All that moves or converts a module comes through here. What is kept would go on filling the memory that it is
        # to leave.
        before = self._place
        result = super()._apply(*args, **kwargs)
        if self._place != before:
            forget_all(self)
        return result

    @property
    def _place(self) -> tuple[torch.device, torch.dtype] | None:
        weight = getattr(self, "null_text_embed", None)
        return (weight.device, weight.dtype) if exists(weight) else None

    @property
    def init_conv_to_final_conv_residual(self) -> bool:
        """Whether what follows :attr:`init_conv` is also led to :attr:`final_res_block`: never, as in minimagen."""
        return False

    @init_conv_to_final_conv_residual.setter
    def init_conv_to_final_conv_residual(self, value: bool) -> None:
        if value:
            raise ValueError(
                f"init_conv_to_final_conv_residual must be False, got {value!r}: no U-Net here has the channels for it"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        # Of one that is the U-Net's own: parts may be replaced.
        return self.null_text_embed.dtype

    def check_image_size(self, height: int, width: int) -> None:
        """Raise a ValueError unless images of this size can pass through all levels."""
        factor = self.downsampling_factor
        if height < factor or width < factor or height % factor or width % factor:
            raise ValueError(
                f"images of {height}x{width} pixels do not fit this U-Net, which halves them"
                f" {factor.bit_length() - 1} times: height and width must be multiples of {factor}."
                " Choose another image size, or fewer dim_mults"
            )

    def _cast_model_parameters(
        self, *, lowres_cond: bool, text_embed_dim: int, channels: int, channels_out: int
    ) -> "Unet":
        """This U-Net if it has these settings, else a new one with new weights that has them and is alike otherwise."""
        wanted = {
            "lowres_cond": lowres_cond,
            "text_embed_dim": text_embed_dim,
            "channels": channels,
            "channels_out": channels_out,
        }
        if all(getattr(self, name) == value for name, value in wanted.items()):
            return self
        new = type(self)(**{**self._config, **wanted})
        return new.to(device=self.final_conv.weight.device, dtype=self.dtype).train(self.training)

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        *,
        lowres_cond_img: torch.Tensor | None = None,
        lowres_noise_times: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        cond_drop_prob: float = 0.0,
        keep_text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the noise in images.

        Args:
            x: Noised images, shape (b, channels, h, w); h and w multiples of ``downsampling_factor``.
            time: Timestep of each image, shape (b,).
            lowres_cond_img: Low-resolution images, noised, enlarged to (b, channels, h, w); only with ``lowres_cond``.
            lowres_noise_times: Timestep to which each of them was noised, shape (b,); with ``lowres_cond`` only.
            text_embeds: Text embeddings, shape (b, n, text_embed_dim), or (1, n, text_embed_dim) for all images; tokens
                past the 256th are cut off. Without them the U-Net is conditioned on time alone.
            text_mask: Which tokens are text and not padding, bool, shape (b, n) or (1, n); if not given, all, and zeros
                that follow them up to the 256th.
            cond_drop_prob: Probability with which an image's text is dropped, in [0, 1].
            keep_text: Which images keep their text, bool, shape (b,); drawn at random, if not given.

        Returns:
            Predicted noise, shape (b, channels_out, h, w), in the dtype of the weights (of autocast, under autocast).

        Raises:
            ValueError: if shapes do not fit together or a low-resolution input is missing or not wanted.
        """
        self._check_inputs(x, time, lowres_cond_img, lowres_noise_times, text_embeds, text_mask, cond_drop_prob)
        if exists(keep_text):
            if keep_text.shape != time.shape:
                raise ValueError(f"keep_text must have shape {tuple(time.shape)}, got {tuple(keep_text.shape)}")
            keep_text = keep_text.bool()
        # One text stands for all images.
        batch = x.shape[0]
        if exists(text_embeds):
            text_embeds = text_embeds.expand(batch, -1, -1)
        if exists(text_embeds) and exists(text_mask):
            text_mask = text_mask.expand(batch, -1)
        t, time_tokens = self._generate_t_tokens(time, lowres_noise_times)
        if exists(text_embeds) and self._shares_padding(text_embeds, text_mask):
            keep = default(keep_text, lambda: prob_mask_like((batch,), 1 - cond_drop_prob, device=x.device))
            conditions = self._conditions_with_padding_apart(text_embeds, text_mask, keep, t, time_tokens)
            return self.denoise(x, lowres_cond_img, conditions)
        # Not handed over where there is none: a method that was written for the original does not take it.
        keep = {"keep": keep_text} if exists(keep_text) else {}
        t, c = self._text_condition(text_embeds, batch, cond_drop_prob, x.device, text_mask, t, time_tokens, **keep)
        return self.denoise(x, lowres_cond_img, self._block_conditions(t, c))

    def denoise(
        self, x: torch.Tensor, lowres_cond_img: torch.Tensor | None, conditions: Iterable[BlockCondition]
    ) -> torch.Tensor:
        """What :meth:`forward` does with the images, once the conditions are known.

        Args:
            x: Noised images, shape (b, channels, h, w).
            lowres_cond_img: Low-resolution images, of the same shape; only with ``lowres_cond``.
            conditions: One for each of :attr:`resnet_blocks`. If all hold a ``scale_shift`` they may be for more images
                than there are, see :meth:`.ResnetBlock.forward`.

        Returns:
            Predicted noise, shape (b, channels_out, h, w), or as many as there are conditions.
        """
        if exists(lowres_cond_img):
            x = torch.cat((x, lowres_cond_img.to(x.dtype)), dim=1)
        given = iter(conditions)
        skip_scale = self.skip_connect_scale
        middle = len(self.downs)

        x = self.init_conv(x.to(self.dtype))
        hiddens = []
        for level, (pre_downsample, init_block, resnet_blocks, attn_block, post_downsample) in enumerate(self.downs):
            if exists(pre_downsample):
                x = pre_downsample(x)
            x = _run_resnet_block(level, init_block, x, next(given), attends=True)
            for resnet_block in resnet_blocks:
                x = _run_resnet_block(level, resnet_block, x, next(given))
                hiddens.append(x)
            x = run_block(level, attn_block, x)
            hiddens.append(x)
            if exists(post_downsample):
                x = post_downsample(x)

        x = _run_resnet_block(middle, self.mid_block1, x, next(given), attends=True)
        if exists(self.mid_attn):
            x = run_block(middle, self.mid_attn, x)
        x = _run_resnet_block(middle, self.mid_block2, x, next(given), attends=True)

        for place, (init_block, resnet_blocks, attn_block, upsample) in enumerate(self.ups, start=1):
            level = middle - place
            # No name here holds on to what was taken, which would last until the level's end.
            x = _run_resnet_block(
                level, init_block, x, next(given), attends=True, skip=hiddens.pop(), skip_scale=skip_scale
            )
            for resnet_block in resnet_blocks:
                x = _run_resnet_block(level, resnet_block, x, next(given), skip=hiddens.pop(), skip_scale=skip_scale)
            x = upsample(run_block(level, attn_block, x))

        if exists(self.final_res_block):
            x = _run_resnet_block(0, self.final_res_block, x, next(given))
        return self.final_conv(x)

    def _block_conditions(
        self, t: torch.Tensor, c: torch.Tensor, shared: torch.Tensor | None = None
    ) -> Iterable[BlockCondition]:
        """What each block is told of conditioning (b, time_cond_dim) and tokens (b, k, cond_dim).

        More tokens (s, cond_dim), after these, all images may share.
        """
        blocks = self.resnet_blocks
        rows = self._joined_scale_shifts(t, blocks)
        if exists(shared) and not (exists(rows) and all(map(takes_shared_cond, blocks))):
            c, shared = with_shared(c, shared), None
        if not exists(rows):
            return itertools.repeat({"time_emb": t, "cond": c})
        tokens = {"cond": c, "shared_cond": shared} if exists(shared) else {"cond": c}
        return [{"scale_shift": row, **tokens} for row in rows]

    @staticmethod
    def _joined_scale_shifts(t: torch.Tensor, blocks: list[ResnetBlock]) -> Sequence[torch.Tensor] | None:
        """The ``scale_shift`` of each block, from one product; None where a product for each is better."""
        if t.device.type != "cpu" or not all(map(has_plain_time_mlp, blocks)):
            return None
        layers: list[Any] = [block.time_mlp[1] for block in blocks]  # type: ignore[index]
        if sum(layer.weight.numel() for layer in layers) > _MOST_JOINED:
            return None
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return F.linear(F.silu(t), weight, bias).split([layer.out_features for layer in layers], dim=1)

    @property
    def resnet_blocks(self) -> list[ResnetBlock]:
        """All of them, in the order in which :meth:`denoise` runs them."""
        down = [block for _, first, further, _, _ in self.downs for block in (first, *further)]
        up = [block for first, further, _, _ in self.ups for block in (first, *further)]
        last = [self.final_res_block] if exists(self.final_res_block) else []
        return [*down, self.mid_block1, self.mid_block2, *up, *last]

    def forward_with_cond_scale(self, *args, cond_scale: float = 1.0, **kwargs) -> torch.Tensor:
        """Predict the noise in images with classifier-free guidance.

        null + cond_scale * (conditional - null), Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), eq. 6.

        Args:
            args: Passed on to :meth:`forward`.
            cond_scale: 0 for the unconditional prediction, 1 for the conditional one; more than 1 follows the text more
                closely, at the cost of diversity.
            kwargs: Passed on to :meth:`forward`.

        Returns:
            Guided prediction, shape (b, channels_out, h, w).
        """
        without_text = {**kwargs, "cond_drop_prob": 1.0}
        if cond_scale == 0:
            return self.forward(*args, **without_text)
        # First, as in the original: hooks that keep what they see, such as maps of attention, take the calls in order.
        conditional = self.forward(*args, **kwargs)
        if cond_scale == 1:
            return conditional
        null = self.forward(*args, **without_text)
        return null + (conditional - null) * cond_scale

    def _check_inputs(self, x, time, lowres_cond_img, lowres_noise_times, text_embeds, text_mask, cond_drop_prob):
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must have shape (b, {self.channels}, h, w), got {tuple(x.shape)}")
        batch = x.shape[0]
        self.check_image_size(*x.shape[-2:])
        if time.shape != (batch,):
            raise ValueError(f"time must have shape ({batch},), one for each image; got {tuple(time.shape)}")
        lowres = {"lowres_cond_img": lowres_cond_img, "lowres_noise_times": lowres_noise_times}
        for name, value in lowres.items():
            if exists(value) != bool(self.lowres_cond):
                wanted = "needs" if self.lowres_cond else "takes no"
                raise ValueError(f"a U-Net with lowres_cond={self.lowres_cond} {wanted} {name}")
        if self.lowres_cond:
            if lowres_cond_img.shape != x.shape:
                raise ValueError(
                    f"lowres_cond_img must have the shape of x, {tuple(x.shape)}; got {tuple(lowres_cond_img.shape)}."
                    " Enlarge it first, see helpers.resize_image_to"
                )
            if lowres_noise_times.shape != (batch,):
                raise ValueError(
                    f"lowres_noise_times must have shape ({batch},), got {tuple(lowres_noise_times.shape)}"
                )
        if exists(text_embeds) and (
            text_embeds.ndim != 3
            or text_embeds.shape[0] not in (1, batch)
            or text_embeds.shape[2] != self.text_embed_dim
        ):
            raise ValueError(
                f"text_embeds must have shape ({batch}, n, {self.text_embed_dim}), got {tuple(text_embeds.shape)};"
                " a single text stands for all images"
            )
        if exists(text_embeds) and exists(text_mask):
            tokens = text_embeds.shape[1]
            if text_mask.shape not in ((batch, tokens), (1, tokens)):
                raise ValueError(
                    f"text_mask must have shape {(batch, tokens)} like text_embeds, or {(1, tokens)};"
                    f" got {tuple(text_mask.shape)}"
                )
        if not 0 <= cond_drop_prob <= 1:
            raise ValueError(f"cond_drop_prob must lie in [0, 1], got {cond_drop_prob}")

    @staticmethod
    def _embed_times(
        layers: tuple[nn.Module, nn.Module, nn.Module], time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Time conditioning (b, time_cond_dim) and time tokens (b, 2, cond_dim) of timesteps (b,)."""
        to_hiddens, to_cond, to_tokens = layers
        hiddens = to_hiddens(time)
        return to_cond(hiddens), to_tokens(hiddens)

    def _generate_t_tokens(
        self, time: torch.Tensor, lowres_noise_times: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Time conditioning (b, time_cond_dim) and time tokens (b, 2, cond_dim); 4 of them with ``lowres_cond``."""
        t, tokens = self._embed_times((self.to_time_hiddens, self.to_time_cond, self.to_time_tokens), time)
        if self.lowres_cond:
            lowres_layers = (self.to_lowres_time_hiddens, self.to_lowres_time_cond, self.to_lowres_time_tokens)
            lowres_t, lowres_tokens = self._embed_times(lowres_layers, lowres_noise_times)
            t, tokens = t + lowres_t, torch.cat((tokens, lowres_tokens), dim=1)
        return t, tokens

    def _text_condition(
        self,
        text_embeds: torch.Tensor | None,
        batch_size: int,
        cond_drop_prob: float,
        device: torch.device,
        text_mask: torch.Tensor | None,
        t: torch.Tensor,
        time_tokens: torch.Tensor,
        *,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the text to the time conditioning, and its tokens to the time tokens.

        Args:
            text_embeds: Text embeddings, shape (b, n, text_embed_dim), or None.
            batch_size: Number of images b.
            cond_drop_prob: Probability with which an image's text is replaced by the null text.
            device: Where the images are.
            text_mask: Bool, shape (b, n), or None.
            t: Time conditioning, shape (b, time_cond_dim).
            time_tokens: Time tokens, shape (b, k, cond_dim).
            keep: Bool, shape (b,), which images keep their text; drawn at random, if not given.

        Returns:
            Conditioning (b, time_cond_dim) and normalised tokens, (b, k + 256, cond_dim) or, without text,
            (b, k, cond_dim).
        """
        if not exists(text_embeds):
            return t, self.norm_cond(time_tokens)

        if not exists(keep):
            keep = prob_mask_like((batch_size,), 1 - cond_drop_prob, device=device)
        hidden, tokens = self._text_tokens(text_embeds, text_mask, keep)
        return t + hidden, self.norm_cond(torch.cat((time_tokens, tokens), dim=1))

    def padded_text(self, text_embeds: torch.Tensor, text_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same text as embeddings (b, 256, text_embed_dim) and mask (b, 256), whatever its length."""
        text_embeds, text_mask = text_embeds[:, : self.max_text_len], text_mask[:, : self.max_text_len].bool()
        padding = self.max_text_len - text_embeds.shape[1]
        return F.pad(text_embeds, (0, 0, 0, padding)), F.pad(text_mask, (0, padding), value=False)

    def _text_tokens(
        self, text_embeds: torch.Tensor, text_mask: torch.Tensor | None, keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled text (b, time_cond_dim) and tokens (b, 256, cond_dim), of null text where ``keep`` (b,) is False."""
        tokens, padding = self._tokens_and_padding(text_embeds, text_mask, keep)
        if not exists(text_mask):
            # As in the original, where all is text that no mask says is none, zeros after its end included.
            padding = padding.masked_fill(keep[:, None, None], 0.0)
        tokens = torch.cat((tokens, padding.expand(tokens.shape[0], -1, -1)), dim=1)
        return self._pooled_text(tokens.mean(dim=1), keep), tokens

    def _tokens_and_padding(
        self, text_embeds: torch.Tensor, text_mask: torch.Tensor | None, keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of texts (b, n, cond_dim), and the null text that follows masked ones (256 - n, cond_dim)."""
        # Cut before the projection: no work on what is thrown away.
        text_embeds = text_embeds[:, : self.max_text_len].to(self.dtype)
        tokens = self.text_to_cond(text_embeds)
        # Someone else's may be one token for all places.
        null = self.null_text_embed.to(tokens.dtype).expand(1, self.max_text_len, -1)
        keep_token = keep[:, None, None]
        if exists(text_mask):
            keep_token = keep_token & text_mask[:, : self.max_text_len, None].bool()
        length = tokens.shape[1]
        return torch.where(keep_token, tokens, null[:, :length]), null[0, length:]

    def _pooled_text(self, mean: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Pooled text (b, time_cond_dim) of the tokens' mean (b, cond_dim)."""
        hidden = self.to_text_non_attn_cond(mean)
        return torch.where(keep[:, None], hidden, self.null_text_hidden.to(hidden.dtype))

    def _shares_padding(self, text_embeds: torch.Tensor, text_mask: torch.Tensor | None) -> bool:
        """Whether blocks are told apart what all texts are padded with: not if someone else has a hand in it."""
        return (
            keys_are_worth_sharing(self.null_text_embed)
            # Without it only images whose text is dropped are padded with null text.
            and exists(text_mask)
            and text_embeds.shape[1] < self.max_text_len
            # For each length of texts they would be compiled anew.
            and not blocks_are_compiled()
            and not overridden(self, _TOLD_OF_PADDING)
            and is_plain(self.norm_cond, nn.LayerNorm)
        )

    def _conditions_with_padding_apart(
        self,
        text_embeds: torch.Tensor,
        text_mask: torch.Tensor,
        keep: torch.Tensor,
        t: torch.Tensor,
        time_tokens: torch.Tensor,
    ) -> Iterable[BlockCondition]:
        """As :meth:`_block_conditions` of :meth:`_text_condition`, with what all texts are padded with apart."""
        tokens, padding = self._tokens_and_padding(text_embeds, text_mask, keep)
        mean = (tokens.sum(dim=1) + padding.sum(dim=0)) / self.max_text_len
        c = self.norm_cond(torch.cat((time_tokens, tokens), dim=1))
        return self._block_conditions(t + self._pooled_text(mean, keep), c, self.norm_cond(padding))


# Methods that are not called, or are told something else, where padding is apart.
_TOLD_OF_PADDING = methods_of(Unet, "_text_condition", "_text_tokens", "_block_conditions", "denoise")


def dtype_of(unet: nn.Module) -> torch.dtype:
    """The dtype of a U-Net's weights, or of those of another module in its place."""
    if isinstance(dtype := getattr(unet, "dtype", None), torch.dtype):
        return dtype
    return next((x.dtype for x in unet.parameters() if x.is_floating_point()), torch.float32)


class Base(Unet):
    """The base U-Net of the Imagen paper, for 64x64 images.

    - dim = 512
    - dim_mults = (1, 2, 3, 4)
    - num_resnet_blocks = 3
    - layer_attns = (False, True, True, True)
    - layer_cross_attns = (False, True, True, True)
    - memory_efficient = False

    Keyword arguments of :class:`Unet` override these.
    """

    defaults = dict(
        dim=512,
        dim_mults=(1, 2, 3, 4),
        num_resnet_blocks=3,
        layer_attns=(False, True, True, True),
        layer_cross_attns=(False, True, True, True),
        memory_efficient=False,
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**Base.defaults, **kwargs})


class Super(Unet):
    """The super-resolution U-Net of the Imagen paper ("Efficient U-Net").

    - dim = 128
    - dim_mults = (1, 2, 4, 8)
    - num_resnet_blocks = (2, 4, 8, 8)
    - layer_attns = (False, False, False, True)
    - layer_cross_attns = (False, False, False, True)
    - memory_efficient = True

    Keyword arguments of :class:`Unet` override these.
    """

    defaults = dict(
        dim=128,
        dim_mults=(1, 2, 4, 8),
        num_resnet_blocks=(2, 4, 8, 8),
        layer_attns=(False, False, False, True),
        layer_cross_attns=(False, False, False, True),
        memory_efficient=True,
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**Super.defaults, **kwargs})


class BaseTest(Unet):
    """A tiny base U-Net for trying things out.

    - dim = 8
    - dim_mults = (1, 2)
    - num_resnet_blocks = 1
    - layer_attns = False
    - layer_cross_attns = False
    - memory_efficient = False

    Keyword arguments of :class:`Unet` override these.
    """

    defaults = dict(
        dim=8,
        dim_mults=(1, 2),
        num_resnet_blocks=1,
        layer_attns=False,
        layer_cross_attns=False,
        memory_efficient=False,
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**BaseTest.defaults, **kwargs})


class SuperTest(Unet):
    """A tiny super-resolution U-Net for trying things out.

    - dim = 8
    - dim_mults = (1, 2)
    - num_resnet_blocks = (1, 2)
    - layer_attns = False
    - layer_cross_attns = False
    - memory_efficient = True

    Keyword arguments of :class:`Unet` override these.
    """

    defaults = dict(
        dim=8,
        dim_mults=(1, 2),
        num_resnet_blocks=(1, 2),
        layer_attns=False,
        layer_cross_attns=False,
        memory_efficient=True,
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**SuperTest.defaults, **kwargs})
