"""How much memory a training takes on each GPU: replicated, or sharded.

Weights, gradients, Adam's two moments and averages are float32. What the step itself takes is traced, see
:mod:`.plan_trace`. Where a U-Net is sharded, what torch's ``fully_shard`` has at hand while a block runs is added at
every event of the trace:

- forward: the gathered weights of the block, in the flat buffer in which they came and as tensors; the flat buffer of
  the next block takes the place of the first;
- backward: the gathered weights of the block, its gradients, those of the block before in the buffer that is being
  reduced, the weights of the next block that are already on their way, the shards of the gradients that are done;
- always: the weights that belong to no block. With gradients accumulated over several batches, all gradients, whole.

Where it is replicated, the buckets of DistributedDataParallel are the gradients, and always there; gradients that are
accumulated over several batches stand beside them until the last.

On a CPU a step that runs from a recording, see :mod:`.recorded_training`, hands its gradients over all at once: where
they are accumulated, they stand beside those of the batches before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .plan_setup import Setup
from .plan_trace import Trace, trace
from .plan_unet import Unit, units
from .recorded_training import MOST_BYTES

__all__ = ["Memory", "largest_batch", "memory"]

FLOAT32 = 4
# Larger batches than this on one GPU are not looked for.
_MOST_IMAGES = 2**20
# So often that number is guessed.
_GUESSES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU, on the one that has the most.

    Attributes:
        strategy: ``ddp``, ``fsdp`` or ``hybrid``.
        weights: The weights, or the GPU's shard of them.
        optimizer: Adam's two moments.
        averages: The EMA.
        gradients: Gradients after the backward pass.
        step: What the forward and backward pass take besides: activations, low-precision copies of weights,
            temporaries; on one GPU with the gradients as they come to be.
        exchange: What gathered weights and buffers of the exchange add to the peak.
        peak: Most at one time in a training step.
        saving: Most at one time while validating and saving, activations aside.
    """

    strategy: str
    weights: float
    optimizer: float
    averages: float
    gradients: float
    step: float
    exchange: float
    peak: float
    saving: float

    @property
    def most(self) -> float:
        return max(self.peak, self.saving)


def memory(setup: Setup, strategy: str) -> Memory:
    """The memory that a training takes.

    Args:
        setup: The training.
        strategy: ``ddp``, ``fsdp`` or ``hybrid``.
    """
    groups, _ = units(setup.network)
    shards = setup.shards(strategy)
    numel = sum(group.numel for group in groups)
    own = sum(group.shard_numel(shards) for group in groups)
    sharded = shards > 1
    weights, optimizer = FLOAT32 * own, 2 * FLOAT32 * own
    averages = FLOAT32 * own if setup.ema else 0
    fixed = weights + optimizer + averages
    # On one GPU gradients come to be in the backward pass; buckets of DDP are always there.
    grown = setup.gpus == 1 and setup.accumulate == 1
    traced = _trace(setup, "grown" if grown else "kept", sharded)
    gradients = FLOAT32 * own
    if not sharded:
        step: float = traced.peak(setup.batch)
        if not grown and _is_recorded(setup, FLOAT32 * numel):
            step = max(step, gradients)
        exchange: float = gradients if setup.gpus > 1 and setup.accumulate > 1 else 0
        peak = fixed + (max(step, gradients) if grown else gradients + exchange + step)
    else:
        accumulated = FLOAT32 * numel if setup.accumulate > 1 else 0
        step = traced.peak(setup.batch)
        during = traced.peak(setup.batch, _exchanged(groups, traced, shards, setup.gather))
        exchange = during - step + accumulated
        peak = fixed + max(step + exchange, gradients)
    # Weights beside their averages, whole ones for the file, and DDP's buckets, which stay.
    saving = fixed + (weights if setup.ema else 0) + (FLOAT32 * numel if sharded else 0)
    saving += gradients if setup.gpus > 1 and not sharded else 0
    return Memory(strategy, weights, optimizer, averages, gradients, step, exchange, peak, saving)


def _is_recorded(setup: Setup, weights: float) -> bool:
    return setup.device == "cpu" and setup.gpus == 1 and not setup.checkpoint_levels and weights <= MOST_BYTES


def largest_batch(setup: Setup, strategy: str, available: float) -> int:
    """The largest number of images on each GPU that fits into so many bytes; 0 if there is none."""

    def needed(batch: int) -> float:
        return memory(replace(setup, batch=batch), strategy).most

    low, most = 1, needed(1)
    if most > available:
        return 0
    high, guess, tried = _MOST_IMAGES, 2, 0
    while high - low > 1:
        found = needed(guess)
        # About a straight line, so the next guess is nearly right; halving ends the search where it is not.
        slope = max((found - most) / (guess - low), 1.0)
        if found <= available:
            low, most = guess, found
        else:
            high = guess
        guess = low + 1 + int((available - most) / slope) if tried < _GUESSES else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        tried += 1
    return low


def _trace(setup: Setup, gradients: str, sharded: bool) -> Trace:
    weights = torch.bfloat16 if sharded and setup.gather == 2 else torch.float32
    return trace(
        setup.network,
        batch=setup.batch if setup.device == "cpu" else None,
        checkpoint_levels=setup.checkpoint_levels,
        gradients=gradients,
        weights=weights,
        precision=setup.dtype,
        device=setup.device,
    )


def _exchanged(groups: Sequence[Unit], traced: Trace, shards: int, gather: int) -> Callable[[int, bool], float]:
    """What a sharded U-Net has in memory besides, by the unit at work and whether it is the backward pass."""
    padded = [group.shard_numel(shards) * shards for group in groups]
    gathered = [gather * numel for numel in padded]
    place = {unit: position for position, unit in enumerate(traced.order)}
    rest = gathered[-1]

    def at(position: int, sizes: list[int]) -> int:
        return sizes[traced.order[position]] if 0 <= position < len(traced.order) else 0

    done = {}
    shards_done = 0.0
    for unit in reversed(traced.order):
        done[unit] = shards_done
        shards_done += FLOAT32 * groups[unit].shard_numel(shards)

    def more(unit: int, backward: bool) -> float:
        if unit == -1:
            return 2 * rest
        here = place[unit]
        if not backward:
            return rest + gathered[unit] + max(gathered[unit], at(here + 1, gathered))
        gradients, coming = gather * groups[unit].numel, at(here - 1, gathered)
        reducing = FLOAT32 * at(here + 1, padded)
        running = reducing + gathered[unit] + coming + gradients
        ending = coming + gradients + FLOAT32 * padded[unit]
        return rest + done[unit] + max(running, ending)

    return more
