"""What the blocks of a U-Net are told of time and text while sampling, with nothing computed twice.

Over the steps of a sampling only the timestep changes, and it is the same for all images. Done once, before the first
step: the embeddings of all timesteps, in one product each; the text tokens, the pooled text, and the keys and values
that every cross attention makes of the tokens of text and of time, where those are worth keeping. A step adds the
pooled text to its row, makes the scales and shifts of all blocks in one product, and puts what belongs to its 2 or 4
time tokens before what belongs to the text. The tokens are normalised one by one (``norm_cond``), so this is what
:meth:`.Unet.forward` computes.

A batch that is divided has :class:`Conditions` for each of its pieces, and :class:`SharedConditions` once.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .kernels.cross_attention import keys_are_worth_keeping
from .layers import CrossAttention, _OverPixels, has_plain_time_mlp
from .plain import is_plain
from .Unet import BlockCondition, Unet


def can_be_conditioned_ahead(blocks: list[Any]) -> bool:
    """Whether :class:`Conditions` can stand in for what blocks do with time and text: not if that was replaced.

    Nor if their cross attentions have keys of several sizes, or there is none.
    """
    if not all(map(has_plain_time_mlp, blocks)):
        return False
    attentions = [block.cross_attn for block in blocks if block.cross_attn is not None]
    if not all(is_plain(each, _OverPixels) and is_plain(each.fn, CrossAttention) for each in attentions):
        return False
    return len({(each.fn.heads, each.fn.null_kv.shape) for each in attentions}) == 1


def _parts_of_layers(unet: Unet, tokens: torch.Tensor, keys: bool) -> Iterator[torch.Tensor]:
    """The keys and values that each cross attention makes of normalised tokens (b, m, cond_dim); or these, for all."""
    if not keys:
        yield tokens
        return
    for block in unet.resnet_blocks:
        if block.cross_attn is not None:
            attention: Any = block.cross_attn.fn
            yield attention.project_context(tokens)


class SharedConditions:
    """What all images have in common: the conditions of time, and the weights that make scales and shifts of them.

    Args:
        unet: The U-Net.
        times: Timestep of each step, int64, shape (s,).
        lowres_noise_time: Timestep to which the low-resolution images were noised, int64, shape (1,).
        dtype: Of all that is kept.

    Attributes:
        keeps_keys: Whether keys and values are kept, and not the tokens of which a step makes them.
        widths: Of the scales and shifts of each block.
        attends: Whether a block attends to tokens.
        time_emb: Embedding of each timestep, shape (s, time_cond_dim).
        time_part: Keys and values of its tokens for each layer, shape (s, layers, m, width); or its tokens, as one.
        weight: Of the product that makes all scales and shifts.
        bias: Likewise.
    """

    def __init__(self, unet: Unet, times: torch.Tensor, *, lowres_noise_time: torch.Tensor | None, dtype: torch.dtype):
        blocks: list[Any] = unet.resnet_blocks
        self.widths = [block.time_mlp[1].out_features for block in blocks]
        self.attends = [block.cross_attn is not None for block in blocks]
        time_emb, time_tokens = self._embedded(unet, times, lowres_noise_time)
        dim_head = next(block.cross_attn.fn.null_kv.shape[1] for block in blocks if block.cross_attn is not None)
        self.keeps_keys = keys_are_worth_keeping(time_tokens, dim_head=dim_head)
        self.time_emb = time_emb.to(dtype)
        self.time_part = self._time_part(unet, time_tokens).to(dtype)
        weight = blocks[0].time_mlp[1].weight
        self.weight = weight.new_empty((sum(self.widths), weight.shape[1]), dtype=dtype)
        self.bias = weight.new_empty(sum(self.widths), dtype=dtype)
        self._join(unet)

    def load(self, unet: Unet, times: torch.Tensor, lowres_noise_time: torch.Tensor | None) -> None:
        """Work them out anew, in place, for as many steps: what reads them at fixed addresses goes on with these."""
        time_emb, time_tokens = self._embedded(unet, times, lowres_noise_time)
        self.time_emb.copy_(time_emb)
        self.time_part.copy_(self._time_part(unet, time_tokens))
        self._join(unet)

    @staticmethod
    def _embedded(unet: Unet, times: torch.Tensor, lowres_noise_time: torch.Tensor | None):
        lowres_times = None if lowres_noise_time is None else lowres_noise_time.expand(len(times))
        time_emb, time_tokens = unet._generate_t_tokens(times, lowres_times)
        return time_emb, unet.norm_cond(time_tokens)

    def _time_part(self, unet: Unet, time_tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack(list(_parts_of_layers(unet, time_tokens, self.keeps_keys)), dim=1)

    def _join(self, unet: Unet) -> None:
        # Each to its place, with no other copy of all: these are the largest weights but the convolutions'.
        for block, weight, bias in zip(
            unet.resnet_blocks, self.weight.split(self.widths), self.bias.split(self.widths), strict=True
        ):
            projection: Any = block.time_mlp[1]  # type: ignore[index]
            weight.copy_(projection.weight)
            bias.copy_(projection.bias)


class Conditions:
    """The conditions of all ResNet blocks over all steps, for images with text, without, or both.

    The weights of the U-Net are read when this is made and by :meth:`load`, and at no other time.

    Args:
        shared: What these images have in common with others.
        unet: The U-Net.
        text_embeds: Text embeddings, shape (b, n, text_embed_dim); none for images without text.
        text_mask: Which tokens are text, bool, shape (b, n).
        batch: Number of images b.
        with_text: For each of the groups of b conditions that follow one another, whether it has the text.
    """

    def __init__(
        self,
        shared: SharedConditions,
        unet: Unet,
        *,
        text_embeds: torch.Tensor | None,
        text_mask: torch.Tensor | None,
        batch: int,
        with_text: tuple[bool, ...],
    ):
        self._shared, self._batch, self._with_text = shared, batch, with_text
        rows = batch * len(with_text)
        _, layers, self._time_tokens, width = shared.time_part.shape
        words = 0 if text_embeds is None else unet.max_text_len
        self.text_emb = shared.time_emb.new_zeros(rows, shared.time_emb.shape[1])
        # Keys and values of every layer, or tokens for all of them: those of the text and, before them, room for those
        # of one step.
        self.context = shared.time_part.new_empty(layers, rows, self._time_tokens + words, width)
        if text_embeds is not None:
            self.load(unet, text_embeds, text_mask)

    def load(self, unet: Unet, text_embeds: torch.Tensor, text_mask: torch.Tensor | None) -> None:
        """Take over the text of as many other images, in place: what reads it at fixed addresses goes on with this."""
        for group, has_text in enumerate(self._with_text):
            rows = slice(group * self._batch, (group + 1) * self._batch)
            # Without text all images are told the same.
            images = slice(None) if has_text else slice(1)
            embeds, mask = text_embeds[images], None if text_mask is None else text_mask[images]
            keep = torch.full((len(embeds),), has_text, device=embeds.device)
            hidden, tokens = unet._text_tokens(embeds, mask, keep)
            self.text_emb[rows] = hidden
            parts = _parts_of_layers(unet, unet.norm_cond(tokens), self._shared.keeps_keys)
            for context, part in zip(self.context, parts, strict=True):
                context[rows, self._time_tokens :] = part

    def at(self, step: torch.Tensor) -> list[BlockCondition]:
        """The conditions of one step for each block, until the next call.

        Args:
            step: Which step, int64, shape (1,), on the device: nothing waits for its value.
        """
        shared = self._shared
        time_emb = shared.time_emb.index_select(0, step) + self.text_emb
        scale_shifts = F.linear(F.silu(time_emb), shared.weight, shared.bias).split(shared.widths, dim=1)
        time_part = shared.time_part.index_select(0, step)
        self.context[:, :, : self._time_tokens] = time_part.transpose(0, 1)
        if shared.keeps_keys:
            contexts = [BlockCondition(keys_values=one) for one in self.context]
        else:
            contexts = [BlockCondition(cond=self.context[0])] * sum(shared.attends)
        given = iter(contexts)
        return [
            BlockCondition(scale_shift=scale_shift, **(next(given) if attends else {}))
            for scale_shift, attends in zip(scale_shifts, shared.attends, strict=True)
        ]
