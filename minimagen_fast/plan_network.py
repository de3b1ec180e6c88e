"""What the GPUs of a training send one another in an optimizer step, and how long that takes.

Bytes are those that each rank sends, and receives, where every collective runs as a ring over its N ranks (Patarasuk
and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009): 2 (N - 1) / N of the tensor for
an all-reduce, (N - 1) / N for an all-gather or a reduce-scatter, all of it for a broadcast. A ring enters and leaves
every node once, so of what the GPUs of a node send, one part in as many as they are goes to other nodes. With a
ring for each network adapter, as NCCL makes them, each adapter carries an equal share of that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .plan_setup import Card, Setup
from .plan_unet import units

__all__ = ["Collective", "Links", "collectives"]

FLOAT32 = 4
# DistributedDataParallel's default for all but the first bucket.
BUCKET = 25 * 2**20


@dataclass(frozen=True)
class Collective:
    """An exchange that a rank takes part in.

    Attributes:
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter`` or ``broadcast``.
        bytes: Size of the whole tensor: before a reduction, after a gathering.
        ranks: How many take part.
        nodes: Over how many nodes these are spread.
        when: ``forward`` or ``backward``.
        synchronised: Whether it is there only once in an optimizer step, in its last backward pass; otherwise once for
            each of the batches that are accumulated.
        parts: Over how many messages it is spread.
    """

    kind: str
    bytes: float
    ranks: int
    nodes: int
    when: str
    synchronised: bool
    parts: int = 1

    @property
    def local(self) -> int:
        """How many take part on a node."""
        return self.ranks // self.nodes

    @property
    def sent_between(self) -> float:
        """Bytes that each rank's network adapter sends to other nodes."""
        return self.sent / self.local if self.nodes > 1 else 0.0

    @property
    def sent(self) -> float:
        """Bytes that each rank sends."""
        if self.ranks == 1:
            return 0.0
        share = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
        return self.bytes * (share[self.kind] * (self.ranks - 1) / self.ranks if self.kind in share else 1.0)


def collectives(setup: Setup, strategy: str) -> list[Collective]:
    """All of an optimizer step that carry weights, gradients or buffers, in the order of their kinds.

    Not counted are sums of a few numbers: the loss, the norm of the gradients, whether to stop.

    Args:
        setup: The training.
        strategy: ``ddp``, ``fsdp`` or ``hybrid``.
    """
    groups, buffers = units(setup.network)
    if setup.gpus == 1:
        return []
    if strategy == "ddp":
        gradients = FLOAT32 * sum(group.numel for group in groups)
        parts = math.ceil(gradients / BUCKET)
        everyone = setup.gpus, setup.nodes
        return [
            Collective("broadcast", buffers, *everyone, "forward", True),
            Collective("all_reduce", gradients, *everyone, "backward", True, parts),
        ]
    shards = setup.shards(strategy)
    around = shards, setup.nodes if strategy == "fsdp" else 1
    padded = [group.shard_numel(shards) * shards for group in groups]
    found = [Collective("all_gather", setup.gather * size, *around, "forward", False) for size in padded]
    # What belongs to no block stays gathered.
    found += [Collective("all_gather", setup.gather * size, *around, "backward", False) for size in padded[:-1]]
    found += [Collective("reduce_scatter", FLOAT32 * size, *around, "backward", True) for size in padded]
    if strategy == "hybrid":
        between = setup.nodes, setup.nodes
        found += [Collective("all_reduce", FLOAT32 * size / shards, *between, "backward", True) for size in padded]
    return found


@dataclass(frozen=True)
class Links:
    """What carries the messages of a GPU.

    Attributes:
        node: Bytes a second to GPUs of its node, as they are reached.
        between: Bytes a second to other nodes, likewise.
        node_latency: Seconds for a step of a ring within a node.
        latency: Seconds for one between nodes.
    """

    node: float
    between: float
    node_latency: float
    latency: float

    @classmethod
    def of(cls, card: Card, efficiency: float, node_latency: float, latency: float) -> "Links":
        """The links of a card, of whose rates this share is reached."""
        share = efficiency * 1e9 / 8
        return cls(card.link_gbps * share, card.node_link_gbps * share, node_latency, latency)

    def seconds(self, collective: Collective) -> float:
        """How long a collective takes by itself: the longer of its bytes over either kind of link, and its steps.

        All-gather and reduce-scatter go around a ring once, through every node in turn. An all-reduce goes up and down
        a tree over the nodes, as NCCL's does, and twice around those of a node.
        """
        if collective.ranks == 1:
            return 0.0
        across = collective.nodes > 1
        if collective.kind in ("all_reduce", "broadcast"):
            ways = 2 if collective.kind == "all_reduce" else 1
            steps = ways * (
                math.ceil(math.log2(collective.nodes)) * self.latency + (collective.local - 1) * self.node_latency
            )
        else:
            hops = min(collective.nodes, collective.ranks - 1) if across else 0
            steps = hops * self.latency + (collective.ranks - 1 - hops) * self.node_latency
        slowest = collective.sent_between / self.between
        if collective.local > 1:
            slowest = max(slowest, collective.sent / self.node)
        return slowest + collective.parts * steps


def total(found: list[Collective], measure: Callable[[Collective], float], accumulate: int) -> float:
    """A measure summed over an optimizer step."""
    return sum(measure(each) * (1 if each.synchronised else accumulate) for each in found)
