"""What is planned: a network, how it is trained, and on how many cards of which kind."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .plan_unet import Network

__all__ = ["CARDS", "STRATEGIES", "Card", "Setup"]

STRATEGIES = ("ddp", "fsdp", "hybrid")
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A card and its links, by its maker's figures.

    Attributes:
        name: Part of the name by which the driver knows it.
        memory_gib: Memory, in GiB.
        tflops: Dense matrix products in bfloat16, on a CPU in what is computed in, in 10^12 operations a second.
        memory_gbps: Bandwidth of the memory, in 10^9 bytes a second.
        link_gbps: What it sends to cards of its node, in 10^9 bits a second, one way.
        node_link_gbps: What it sends to other nodes.
        device: ``cuda``, or ``cpu`` for a machine without cards.
    """

    name: str
    memory_gib: float
    tflops: float
    memory_gbps: float
    link_gbps: float
    node_link_gbps: float
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device of a card must be cuda or cpu, got {self.device!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "device"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{field.name} of a card must be a positive number, and finite, got {value!r}")

    @classmethod
    def named(cls, name: str) -> "Card":
        """The card of this name, or that of a JSON file with the attributes of this class.

        Raises:
            ValueError: there is no such card, or the file does not describe one.
        """
        if name.lower() in CARDS:
            return CARDS[name.lower()]
        if not name.endswith(".json"):
            raise ValueError(f"--card must be {', '.join(CARDS)}, or a JSON file that describes a card; got {name!r}")
        return cls.of(read_json(Path(name)), name)

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> "Card":
        """The card with these values."""
        names = [field.name for field in fields(cls)]
        required = set(names) - {"device"}
        if unknown := set(values) - set(names):
            raise ValueError(f"{source} has {', '.join(sorted(unknown))}, but a card has only {', '.join(names)}")
        if missing := required - set(values):
            raise ValueError(f"{source} lacks {', '.join(sorted(missing))} of a card")
        return cls(**values)


# Data sheets of the SXM modules, nvidia.com, and of the DGX systems that hold eight of them: memory as these count it
# (the driver shows within 1% of it in GiB), dense bfloat16 (half of what is printed "with sparsity"), memory bandwidth;
# NVLink in one direction (half of what is printed); one network adapter for each card.
# A100 80GB: 312 TFLOPS, 2039 GB/s, NVLink 600 GB/s; DGX A100: 8 adapters of 200 Gb/s.
# H100, H200: 1979 TFLOPS with sparsity, 3.35 and 4.8 TB/s, NVLink 900 GB/s; DGX H100, H200: 8 of 400 Gb/s.
# B200: DGX B200: 72 PFLOPS FP8 dense for training, so 36 bfloat16 with sparsity, 1440 GB, 64 TB/s, NVLink 14.4 TB/s for
# eight; 8 adapters of 400 Gb/s.
CARDS = {
    "a100": Card("A100", 80, 312, 2039, 2400, 200),
    "h100": Card("H100", 80, 989, 3350, 3600, 400),
    "h200": Card("H200", 141, 989, 4800, 3600, 400),
    "b200": Card("B200", 180, 2250, 8000, 7200, 400),
}


@dataclass(frozen=True)
class Setup:
    """A training to be planned.

    Attributes:
        network: What is trained.
        batch: Images of a GPU in one forward pass.
        gpus: Number of GPUs.
        gpus_per_node: GPUs of a node.
        accumulate: Batches whose gradients are averaged for one optimizer step.
        ema: Whether averages of the weights are kept.
        checkpoint_levels: Levels of the U-Net that are computed twice.
        gather: Bytes of a gathered weight where they are sharded: 2 as ``minimagen-fast train`` gathers them where it
            computes in bfloat16, or 4.
        precision: ``bfloat16`` or ``float32``.
        device: ``cuda`` or ``cpu``.

    Raises:
        ValueError: a value is out of range.
    """

    network: Network
    batch: int
    gpus: int = 1
    gpus_per_node: int = 8
    accumulate: int = 1
    ema: bool = False
    checkpoint_levels: tuple[int, ...] = ()
    gather: int = 2
    precision: str = "bfloat16"
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("batch", "gpus", "gpus_per_node", "accumulate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus must be at most gpus_per_node ({self.gpus_per_node}) or a multiple of it, got {self.gpus}"
            )
        if self.gather not in (2, 4):
            raise ValueError(f"gather must be 2 or 4 bytes for a weight, got {self.gather!r}")
        if self.precision not in ("bfloat16", "float32"):
            raise ValueError(f"precision must be bfloat16 or float32, got {self.precision!r}")

    @property
    def dtype(self) -> torch.dtype:
        """The precision as torch has it."""
        return getattr(torch, self.precision)

    @property
    def nodes(self) -> int:
        return max(self.gpus // self.gpus_per_node, 1)

    @property
    def local(self) -> int:
        """GPUs of a node that take part."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def global_batch(self) -> int:
        """Images of one optimizer step."""
        return self.batch * self.gpus * self.accumulate

    @property
    def strategies(self) -> tuple[str, ...]:
        """Those that differ with so many GPUs."""
        if self.gpus == 1:
            return ("ddp",)
        return STRATEGIES if self.nodes > 1 else STRATEGIES[:2]

    def shards(self, strategy: str) -> int:
        """Over how many GPUs weights are sharded."""
        return {"ddp": 1, "fsdp": self.gpus, "hybrid": self.local}[strategy]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: there is no such file, or something else in it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    return values
