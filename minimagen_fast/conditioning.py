"""What the blocks of a U-Net are told of time and text while sampling, with nothing computed twice.

Over the steps of a sampling only the timestep changes, and it is the same for all images. Done once, before the first
step: the embeddings of all timesteps, in one product each; the text tokens, the pooled text, and the keys and values
that every cross attention makes of the tokens of text and of time, where those are worth keeping. A step adds the
pooled text to its row, makes the scales and shifts of all blocks in one product, and puts what belongs to its 2 or 4
time tokens before what belongs to the text. The tokens are normalised one by one (``norm_cond``), so this is what
:meth:`.Unet.forward` computes.
"""

from typing import Any

import torch
import torch.nn.functional as F

from .kernels.cross_attention import keys_are_worth_keeping
from .layers import CrossAttention, _OverPixels, has_plain_time_mlp
from .plain import is_plain
from .Unet import BlockCondition, Unet


def can_be_conditioned_ahead(block: Any) -> bool:
    """Whether :class:`Conditions` can stand in for what a block does with time and text: not if that was replaced."""
    if not has_plain_time_mlp(block):
        return False
    attention = block.cross_attn
    return attention is None or (is_plain(attention, _OverPixels) and is_plain(attention.fn, CrossAttention))


class Conditions:
    """The conditions of all ResNet blocks over all steps, for images with text, without, or both.

    Their weights are read when this is made, and never again.

    Args:
        unet: The U-Net.
        times: Timestep of each step, int64, shape (s,).
        lowres_noise_time: Timestep to which the low-resolution images were noised, int64, shape (1,).
        text_embeds: Text embeddings, shape (b, n, text_embed_dim); none for images without text.
        text_mask: Which tokens are text, bool, shape (b, n).
        batch: Number of images b.
        with_text: For each of the groups of b conditions that follow one another, whether it has the text.
        dtype: Of what :meth:`at` gives.
    """

    def __init__(
        self,
        unet: Unet,
        times: torch.Tensor,
        *,
        lowres_noise_time: torch.Tensor | None,
        text_embeds: torch.Tensor | None,
        text_mask: torch.Tensor | None,
        batch: int,
        with_text: tuple[bool, ...],
        dtype: torch.dtype,
    ):
        lowres_times = None if lowres_noise_time is None else lowres_noise_time.expand(len(times))
        time_emb, time_tokens = unet._generate_t_tokens(times, lowres_times)
        time_tokens = unet.norm_cond(time_tokens)
        text_emb, text_tokens = self._text(unet, text_embeds, text_mask, batch, with_text, time_emb, time_tokens)

        blocks: list[Any] = unet.resnet_blocks
        projections = [block.time_mlp[1] for block in blocks]
        self._widths = [projection.out_features for projection in projections]
        self._attends = [block.cross_attn is not None for block in blocks]
        attentions = [block.cross_attn.fn for block in blocks if block.cross_attn is not None]
        self._keeps_keys = keys_are_worth_keeping(text_tokens, dim_head=attentions[0].null_kv.shape[1])
        if self._keeps_keys:
            time_part = torch.stack([attention.project_context(time_tokens) for attention in attentions], dim=1)
            text_part = torch.stack([attention.project_context(text_tokens) for attention in attentions])
        else:
            time_part, text_part = time_tokens[:, None], text_tokens[None]
        layers, rows, words, width = text_part.shape
        self._time_tokens = time_tokens.shape[1]

        # All that differs between two calls of sampling; see `load`.
        self._values = {
            "time_emb": time_emb.to(dtype),
            "text_emb": text_emb.to(dtype),
            "weight": torch.cat([projection.weight for projection in projections]).to(dtype),
            "bias": torch.cat([projection.bias for projection in projections]).to(dtype),
            # Keys and values of every layer, or tokens for all of them: those of time and, before the text's room for
            # those of one step.
            "time_part": time_part.to(dtype),
            "context": text_part.new_empty((layers, rows, self._time_tokens + words, width), dtype=dtype),
        }
        self._values["context"][:, :, self._time_tokens :] = text_part

    @staticmethod
    def _text(unet, text_embeds, text_mask, batch, with_text, time_emb, time_tokens):
        """Pooled text (groups * b, time_cond_dim) and normalised tokens (groups * b, m, cond_dim)."""
        if text_embeds is None:
            rows = batch * len(with_text)
            return time_emb.new_zeros(rows, time_emb.shape[1]), time_tokens.new_zeros(rows, 0, time_tokens.shape[2])
        groups = []
        for has_text in with_text:
            keep = torch.full((batch,), has_text, device=text_embeds.device)
            groups.append(unet._text_tokens(text_embeds, text_mask, keep))
        hidden, tokens = (torch.cat(parts) for parts in zip(*groups, strict=True))
        return hidden, unet.norm_cond(tokens)

    def load(self, other: "Conditions") -> None:
        """Take over another's values, in place: what reads them at fixed addresses goes on with these.

        The two are of the same U-Net, and of as many images, steps and tokens.
        """
        for name, value in self._values.items():
            value.copy_(other._values[name])

    def at(self, step: torch.Tensor) -> list[BlockCondition]:
        """The conditions of one step for each block, until the next call.

        Args:
            step: Which step, int64, shape (1,), on the device: nothing waits for its value.
        """
        values = self._values
        time_emb = values["time_emb"].index_select(0, step) + values["text_emb"]
        scale_shifts = F.linear(F.silu(time_emb), values["weight"], values["bias"]).split(self._widths, dim=1)
        time_part = values["time_part"].index_select(0, step)
        values["context"][:, :, : self._time_tokens] = time_part.transpose(0, 1)
        if self._keeps_keys:
            contexts = [BlockCondition(keys_values=one) for one in values["context"]]
        else:
            contexts = [BlockCondition(cond=values["context"][0])] * sum(self._attends)
        given = iter(contexts)
        return [
            BlockCondition(scale_shift=scale_shift, **(next(given) if attends else {}))
            for scale_shift, attends in zip(scale_shifts, self._attends, strict=True)
        ]
