"""A training at scale on paper: memory, exchange, time and data, from what is counted and what has been measured."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .kernels import launch
from .plan_data import Data
from .plan_memory import Memory, largest_batch, memory
from .plan_network import Links
from .plan_setup import GIB, Card, Setup
from .plan_time import Rate, Times, times
from .plan_trace import trace
from .plan_unet import Flops, count_flops, units

__all__ = ["Assumed", "Plan", "make_plan"]

SECONDS_OF_A_DAY = 86400


@dataclass(frozen=True)
class Assumed:
    """What nobody has measured here.

    Attributes:
        usable_memory: Share of a card's memory that a training can fill: the rest is the driver's, the libraries', and
            what the allocator cannot use.
        link_efficiency: Share of the links' rates that large messages reach.
        memory_efficiency: Share of the memory's bandwidth that the optimizer reaches.
        node_latency: Seconds for a step of a ring or tree within a node.
        latency: Seconds for one between nodes.

    Raises:
        ValueError: a value is out of range.
    """

    usable_memory: float = 0.9
    link_efficiency: float = 0.8
    memory_efficiency: float = 0.8
    node_latency: float = 4e-6
    latency: float = 15e-6

    def __post_init__(self) -> None:
        for name in ("usable_memory", "link_efficiency", "memory_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name.replace('_', '-')} must lie in (0, 1], got {getattr(self, name)}")
        for name in ("node_latency", "latency"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0 seconds, got {getattr(self, name)}")


@dataclass(frozen=True)
class Plan:
    """What a training comes to, for each strategy.

    Attributes:
        setup: The training.
        card: What it runs on.
        assumed: What was assumed.
        rate: How fast a GPU computes.
        images: How many images it is to see.
        data: Where they come from.
        parameters: Number of weights.
        flops: Of an image.
        kept_per_image: Bytes of activations that an image leaves behind for the backward pass.
        copies: Bytes of low-precision copies of the weights, which stand beside them.
        memory: By strategy.
        largest: Largest number of images of a GPU in one forward pass, by strategy; 0 if not one fits.
        times: By strategy.
        notes: What to know about the figures.
    """

    setup: Setup
    card: Card
    assumed: Assumed
    rate: Rate
    images: int
    data: Data
    parameters: int
    flops: Flops
    kept_per_image: float
    copies: int
    memory: dict[str, Memory]
    largest: dict[str, int]
    times: dict[str, Times]
    notes: tuple[str, ...]

    @property
    def available(self) -> float:
        """Bytes that a training can fill on a card."""
        return self.card.memory_gib * GIB * self.assumed.usable_memory

    def fits(self, strategy: str) -> bool:
        return self.memory[strategy].most <= self.available

    def days(self, strategy: str) -> float:
        return self.images / self.times[strategy].images_per_second / SECONDS_OF_A_DAY

    def read_per_node(self, strategy: str) -> float:
        """Bytes that the data loaders of a node must read in a second."""
        return self.data.read_per_second(self.times[strategy].images_per_second / self.setup.nodes)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values: bytes, seconds, images. What is assumed stands under ``assumed``."""
        setup, data = asdict(self.setup), self.data
        strategies = {
            name: {
                "memory": {**asdict(self.memory[name]), "fits": self.fits(name), "largest_batch": self.largest[name]},
                "time": {**asdict(self.times[name]), "step": self.times[name].step, "days": self.days(name)},
                "read_bytes_per_second_and_node": self.read_per_node(name),
            }
            for name in self.memory
        }
        assumed: dict[str, Any] = asdict(self.assumed)
        assumed |= {"tokens_per_caption": data.tokens, "bytes_per_picture": data.bytes_per_picture}
        if self.rate.assumed:
            assumed["seconds_per_image"] = self.rate.source
        return {
            "setup": {**setup, "network": {**setup["network"], "settings": dict(self.setup.network.settings)}},
            "card": asdict(self.card),
            "assumed": assumed,
            "measured": {} if self.rate.assumed else {"seconds_per_image": self.rate.source},
            "counted": {
                "parameters": self.parameters,
                "flops_per_image": asdict(self.flops),
                "activation_bytes_per_image": self.kept_per_image,
                "copied_weight_bytes": self.copies,
            },
            "images": self.images,
            "data": {
                **asdict(data),
                "picture_bytes": data.pictures_bytes,
                "caption_bytes": data.captions,
                "padded_float32_caption_bytes": data.padded_captions,
            },
            "strategies": strategies,
            "notes": list(self.notes),
        }


def make_plan(
    setup: Setup, card: Card, rate: Rate, *, images: int, data: Data, strategies: Sequence[str], assumed: Assumed
) -> Plan:
    """Plan a training.

    Args:
        setup: The training.
        card: What it runs on.
        rate: How fast a GPU computes, see :mod:`.plan_time`.
        images: How many images it is to see, every repetition counted; at least 1.
        data: Where they come from.
        strategies: Which of ``ddp``, ``fsdp`` and ``hybrid`` to look at.
        assumed: What else must be assumed.

    Raises:
        ValueError: a strategy makes no sense with so many GPUs.
    """
    if unusable := [name for name in strategies if name not in setup.strategies]:
        raise ValueError(
            f"--strategy {unusable[0]} is none for {setup.gpus} GPUs on {setup.nodes} nodes; choose from"
            f" {', '.join(setup.strategies)}, or all"
        )
    links = Links.of(card, assumed.link_efficiency, assumed.node_latency, assumed.latency)
    traced = trace(
        setup.network,
        checkpoint_levels=setup.checkpoint_levels,
        batch=setup.batch if setup.device == "cpu" else None,
        precision=setup.dtype,
        device=setup.device,
    )
    notes = ["activations are counted without torch.compile, which keeps fewer"]
    if setup.device == "cuda" and not launch.AVAILABLE:
        notes.append("triton is not installed here: counted for plain torch, which keeps more than the kernels do")
    available = card.memory_gib * GIB * assumed.usable_memory
    return Plan(
        setup=setup,
        card=card,
        assumed=assumed,
        rate=rate,
        images=images,
        data=data,
        parameters=sum(unit.numel for unit in units(setup.network)[0]),
        flops=count_flops(setup.network, setup.checkpoint_levels),
        kept_per_image=traced.kept_per_image,
        copies=traced.copies,
        memory={name: memory(setup, name) for name in strategies},
        largest={name: largest_batch(setup, name, available) for name in strategies},
        times={name: times(setup, name, rate, card, links, assumed.memory_efficiency) for name in strategies},
        notes=tuple(notes),
    )
