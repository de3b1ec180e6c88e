"""The U-Net of a plan, built without memory: its parameters, and what a training step of it computes."""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .Imagen import Imagen
from .parallel import _blocks
from .Unet import BaseTest, Unet

__all__ = ["Flops", "Network", "Unit", "count_flops", "step_inputs", "step_loss", "units"]


@dataclass(frozen=True)
class Network:
    """A U-Net to be trained.

    Attributes:
        name: What it is called, such as ``Base@64``.
        settings: Arguments of :class:`.Unet`, all JSON values.
        side: Height and width of its images, in pixels.
        tokens: Tokens that a batch's captions are padded to.
    """

    name: str
    settings: Mapping[str, Any] = field(hash=False)
    side: int
    tokens: int = 64

    def check(self, checkpoint_levels: Collection[int] = ()) -> None:
        """Raise a ValueError or TypeError unless there is such a network, and has these levels."""
        with torch.device("meta"):
            try:
                _, unet = self.imagen()
            except TypeError as error:
                raise TypeError(f"{self.name} cannot be built as a U-Net: {error}") from error
        levels = len(unet.downs)
        if wrong := [level for level in checkpoint_levels if level > levels]:
            raise ValueError(f"{self.name} has levels 0 to {levels}, the last its middle, but no level {wrong[0]}")

    def imagen(self) -> tuple[Imagen, Unet]:
        """The smallest cascade in which it has its place, on the default device, and itself in it."""
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.settings.items()
        }
        unet = Unet(**settings)
        same = {"text_embed_dim": unet.text_embed_dim, "channels": unet.channels}
        first = [BaseTest(**same)] if unet.lowres_cond else []
        imagen = Imagen(
            [*first, unet],
            text_encoder_name="t5_small",
            text_embed_dim=unet.text_embed_dim,
            channels=unet.channels,
            image_sizes=(*([max(self.side // 2, 2)] if first else []), self.side),
        )
        return imagen, unet


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together where a U-Net is sharded: a block's, or what is left.

    Attributes:
        shapes: First dimension, along which they are sharded, and product of the others, of each parameter.
    """

    shapes: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        return sum(first * rest for first, rest in self.shapes)

    def shard_numel(self, shards: int) -> int:
        """Elements that the rank with the most of them holds, which is what every rank sends."""
        return sum(-(-first // shards) * rest for first, rest in self.shapes)


@functools.lru_cache(maxsize=8)
def units(network: Network) -> tuple[tuple[Unit, ...], int]:
    """The units of a U-Net, that of the U-Net itself last, and the bytes of its buffers."""
    with torch.device("meta"):
        _, unet = network.imagen()
    own = [list(block.parameters()) for block in _blocks(unet)]
    seen = {id(parameter) for block in own for parameter in block}
    rest = [parameter for parameter in unet.parameters() if id(parameter) not in seen]
    shapes = [[(p.shape[0], p[0].numel()) for p in group] for group in (*own, rest)]
    return tuple(Unit(tuple(group)) for group in shapes), sum(buffer.nbytes for buffer in unet.buffers())


def step_inputs(network: Network, imagen: Imagen, batch: int) -> dict[str, Any]:
    """Arguments of :meth:`.Imagen._p_losses`: a batch as it is after its images have been resized."""
    images = batch, imagen.channels, network.side, network.side
    text = batch, network.tokens
    inputs: dict[str, Any] = {
        "x_start": torch.empty(images),
        "times": torch.empty(batch, dtype=torch.long),
        "text_embeds": torch.empty(*text, imagen.text_embed_dim),
        "text_mask": torch.empty(text, dtype=torch.bool),
    }
    return {**inputs, "lowres_cond_img": torch.empty(images)} if imagen.unets[-1].lowres_cond else inputs


def step_loss(imagen: Imagen, inputs: dict[str, Any]) -> torch.Tensor:
    scheduler: Any = imagen.noise_schedulers[-1]
    return imagen._p_losses(imagen._get_unet(len(imagen.unets)), noise_scheduler=scheduler, **inputs)


@dataclass(frozen=True)
class Flops:
    """Operations in matrix products and convolutions for one image, a multiplication and an addition counted as two.

    Attributes:
        forward: Of the forward pass.
        backward: Of the backward pass.
        again: Of what the backward pass computes again.
    """

    forward: int
    backward: int
    again: int

    @property
    def model(self) -> int:
        """What a training step needs, whether or not something is computed twice."""
        return self.forward + self.backward

    @property
    def run(self) -> int:
        """What it computes."""
        return self.model + self.again


@functools.lru_cache(maxsize=32)
def count_flops(network: Network, checkpoint_levels: tuple[int, ...] = ()) -> Flops:
    """Count by torch's own counter, over plain torch: what the model calls for; enlargements then take less."""
    forward, both = _flops(network, ())
    again = _flops(network, checkpoint_levels)[1] - both if checkpoint_levels else 0
    return Flops(forward, both - forward, again)


def _flops(network: Network, checkpoint_levels: tuple[int, ...]) -> tuple[int, int]:
    with torch.device("meta"):
        imagen, _ = network.imagen()
        imagen.accelerate("reference", checkpoint_levels=checkpoint_levels)
        inputs = step_inputs(network, imagen, 1)
    with FlopCounterMode(display=False) as counter:
        loss = step_loss(imagen, inputs)
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()
