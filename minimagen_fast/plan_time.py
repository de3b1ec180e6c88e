"""How long a step of a training takes, and how much of the exchange hides behind its computing.

What hides: while a GPU computes the forward pass it can gather the weights of later blocks; while it computes the
backward pass it can gather those of earlier blocks and exchange gradients that are done. So of the exchange in a pass
only what takes longer than the pass itself is waited for, and what has nothing to hide behind: the first gathering of
either pass, and the last exchange of gradients. That links and computing slow each other down is left out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan_network import FLOAT32, Collective, Links, collectives, total
from .plan_setup import Card, Setup, read_json
from .plan_unet import count_flops, units

__all__ = ["Rate", "Times", "from_mfu", "from_profile", "times"]

# AdamW reads weight, gradient and two moments and writes weight and moments; the average is read and written, too, and
# takes another look at the weight.
OPTIMIZER_BYTES, EMA_BYTES = 7 * FLOAT32, 3 * FLOAT32


@dataclass(frozen=True)
class Rate:
    """How fast a GPU trains by itself.

    Attributes:
        seconds_per_image: Of forward and backward pass.
        source: Where that comes from, for the reader.
        assumed: Whether it is an assumption and not a measurement.
        optimizer_included: Whether the time of the optimizer is in it.
    """

    seconds_per_image: float
    source: str
    assumed: bool
    optimizer_included: bool


def from_mfu(setup: Setup, card: Card, mfu: float) -> Rate:
    """The rate of a card that reaches a share of its matrix rate, with what is computed twice on top.

    Raises:
        ValueError: `mfu` lies outside (0, 1].
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu must lie in (0, 1], got {mfu}")
    flops = count_flops(setup.network, setup.checkpoint_levels)
    source = f"{mfu:.0%} of {card.tflops:g} TFLOP/s"
    return Rate(flops.run / (mfu * card.tflops * 1e12), source, True, False)


def from_profile(setup: Setup, card: Card, path: Path, name: str | None = None) -> Rate:
    """The rate that the benchmark suite has measured for training steps of this network.

    A measurement at another batch size is taken per image. Where levels are computed twice, which the suite does not
    measure, it is stretched by their FLOPs.

    Args:
        setup: The training.
        card: The card, whose name must be in that of the measured device.
        path: Result file of ``minimagen-fast bench``.
        name: Name of the network there; that of the training's, if not given.

    Raises:
        ValueError: the file is no result file, or of another device, or has no such measurement.
    """
    content = read_json(path)
    device = content.get("machine", {}).get("device") if isinstance(content.get("machine"), dict) else None
    if not isinstance(content.get("cases"), list) or not isinstance(device, str):
        raise ValueError(f"--profile {path} is not a result file of the benchmark suite: it has no cases or no machine")
    if card.name.lower() not in device.lower():
        raise ValueError(
            f"--profile {path} was measured on {device!r}, but the plan is for {card.name}: give --card as that device,"
            " or a profile of this card"
        )
    case = _training_case(content["cases"], name or setup.network.name, setup.batch, path)
    measured_batch = _images(case)
    flops = count_flops(setup.network, setup.checkpoint_levels)
    seconds = case["seconds"]["median"] / measured_batch * flops.run / flops.model
    stretched = "" if flops.run == flops.model else f", times {flops.run / flops.model:.2f} for levels computed twice"
    source = f"{path.name}: {case['name']} {case['variant']}, batch {measured_batch}, on {device}{stretched}"
    return Rate(seconds, source, False, True)


def _training_case(cases: list[dict[str, Any]], name: str, batch: int, path: Path) -> dict[str, Any]:
    """The fastest training of this network with this package, of the nearest batch size."""
    training = [c for c in cases if c.get("section") == "training" and c.get("status") == "ok" and c.get("seconds")]
    ours = [c for c in training if str(c["variant"]).startswith("ours")]
    found = [c for c in ours if c["name"] == name]
    if not found:
        names = ", ".join(sorted({c["name"] for c in ours})) or "none"
        raise ValueError(f"--profile {path} has no training of {name}; it has {names}: give --profile-network")
    return min(found, key=lambda c: (abs(_images(c) - batch), c["seconds"]["median"]))


def _images(case: dict[str, Any]) -> int:
    """The batch size, which stands at the start of a case's shape."""
    return int(case["shape"].split("-")[0].removeprefix("b"))


@dataclass(frozen=True)
class Times:
    """Seconds of an optimizer step.

    Attributes:
        compute: Forward and backward passes.
        optimizer: Optimizer and averages; 0 where it is a part of ``compute``.
        exchange: All messages, one after the other.
        waited: The part of ``exchange`` that nothing hides.
        sent: Bytes that each rank sends.
        sent_between: Those of them that go to other nodes.
        images_per_second: Of all GPUs.
        efficiency: Share of a step that is not waited.
    """

    compute: float
    optimizer: float
    exchange: float
    waited: float
    sent: float
    sent_between: float
    images_per_second: float
    efficiency: float

    @property
    def step(self) -> float:
        return self.compute + self.optimizer + self.waited


def times(setup: Setup, strategy: str, rate: Rate, card: Card, links: Links, memory_efficiency: float) -> Times:
    """How long an optimizer step takes.

    Args:
        setup: The training.
        strategy: ``ddp``, ``fsdp`` or ``hybrid``.
        rate: How fast a GPU computes.
        card: Whose memory the optimizer works on.
        links: What connects the GPUs.
        memory_efficiency: Share of the memory's bandwidth that the optimizer reaches.
    """
    flops = count_flops(setup.network, setup.checkpoint_levels)
    found = collectives(setup, strategy)
    batch = rate.seconds_per_image * setup.batch
    forward = batch * flops.forward / flops.run
    passes = {"forward": forward, "backward": batch - forward}
    optimizer = 0.0
    if not rate.optimizer_included:
        own = sum(group.shard_numel(setup.shards(strategy)) for group in units(setup.network)[0])
        size = own * (OPTIMIZER_BYTES + (EMA_BYTES if setup.ema else 0))
        optimizer = size / (card.memory_gbps * 1e9 * memory_efficiency)
    waited = 0.0
    for number in range(setup.accumulate):
        last = number == setup.accumulate - 1
        for when, compute in passes.items():
            here = [c for c in found if c.when == when and (last or not c.synchronised)]
            waited += _waited(here, compute, links)
    compute = batch * setup.accumulate
    step = compute + optimizer + waited
    return Times(
        compute=compute,
        optimizer=optimizer,
        exchange=total(found, links.seconds, setup.accumulate),
        waited=waited,
        sent=total(found, lambda each: each.sent, setup.accumulate),
        sent_between=total(found, lambda each: each.sent_between, setup.accumulate),
        images_per_second=setup.global_batch / step,
        efficiency=1 - waited / step,
    )


def _waited(found: list[Collective], compute: float, links: Links) -> float:
    """Seconds of a pass for which the GPU waits for messages."""
    everything = sum(links.seconds(each) for each in found)
    bare = _bare(found, links)
    return bare + max(0.0, everything - bare - compute)


def _bare(found: list[Collective], links: Links) -> float:
    """Seconds of the messages that have nothing to hide behind."""
    bare = [each for each in found if each.kind == "broadcast"]
    if gathered := [each for each in found if each.kind == "all_gather"]:
        # A forward pass needs what belongs to no block, which stands last, and its first block; a backward pass its
        # last block.
        bare += {gathered[-1], gathered[0]} if gathered[0].when == "forward" else {gathered[-1]}
    seconds = sum(links.seconds(each) for each in bare)
    for kind in ("reduce_scatter", "all_reduce"):
        if reductions := [each for each in found if each.kind == kind]:
            seconds += links.seconds(reductions[-1]) / reductions[-1].parts
    return seconds
