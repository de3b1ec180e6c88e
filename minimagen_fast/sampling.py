"""The loop that takes one U-Net's images from pure noise to x_0, and what it does to be fast.

A step predicts the noise, with text and without in one call of the U-Net where guidance needs both, and updates the
images in place. It reads nothing but tensors that stay where they are, the number of the step among them: so it may be
replayed, see :mod:`.sampled_steps`. Nothing in it waits for the device.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.modules.module import _has_any_global_hook

from .acceleration import Acceleration, autocast_dtype
from .conditioning import can_be_conditioned_ahead
from .kept import Kept, kept_with
from .module_watch import has_tensors_in_attributes, is_known
from .plain import is_untouched, methods_of, overridden
from .predictions import CachedPrediction, PlainPrediction, Task
from .progress import progress_bar
from .sampled_steps import Steps, may_be_recorded, replayed_steps
from .Unet import Unet, dtype_of

# Of the methods that take part in a whole call of a U-Net, those that the fast path stands in for.
_OF_CALLS = methods_of(
    Unet, "forward", "forward_with_cond_scale", "_check_inputs", "_text_condition", "_block_conditions"
)
# Those that the fast path calls of a copy.
_OF_COPIES = methods_of(Unet, "denoise", "resnet_blocks", "dtype")


@dataclass(frozen=True)
class _Hand:
    """What someone has taken a hand in, found out once a sampling.

    Attributes:
        calls: How the U-Net or a part of it is called, in words, if so: then it must be called, whole, itself.
        is_copied: Whether a copy computes what the U-Net does, now and later: not if a part may have a state that is
            not known, nor if the U-Net has methods of its own that the copy would run. What these are told, and what
            they note down themselves, would not come to the copy, or only there.
    """

    calls: str | None
    is_copied: bool

    @classmethod
    def in_(cls, task: Task) -> "_Hand":
        unet, calls = task.unet, None
        if others := overridden(unet, _OF_CALLS):
            calls = f"{' and '.join(others)} of the U-Net was overridden"
        elif _has_any_global_hook():
            calls = "torch has hooks for all modules"
        elif not all(map(is_untouched, unet.modules())):
            calls = "the forward of the U-Net, of a part or of its class was replaced, compiled or given hooks"
        elif not task.one_lowres_time:
            calls = (
                "_get_times of the schedule of low-resolution images was overridden, so that each may have its own time"
            )
        elif not can_be_conditioned_ahead(unet.resnet_blocks):
            calls = "a block of the U-Net, or what it does with time and text, was replaced"
        if calls is not None or overridden(unet, _OF_COPIES) or has_tensors_in_attributes(unet):
            return cls(calls, is_copied=False)
        return cls(calls, is_copied=all(is_known(part) for part in unet.modules() if part is not unet))


def sample_images(
    task: Task,
    x: torch.Tensor,
    acceleration: Acceleration,
    *,
    generator: torch.Generator | None = None,
    description: str = "",
    progress: bool = False,
    after_step: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Sample with one U-Net.

    Args:
        task: What to sample.
        x: Pure noise, float32, shape (b, c, h, w).
        acceleration: How to run the U-Net.
        generator: Source of the random numbers, on the device of the images; the global one if not given.
        description: What the progress bar says.
        progress: Whether to show one.
        after_step: Called after each step with its number and the images.

    Returns:
        Images x_0, dtype and shape of ``x``.
    """
    hand = _Hand.in_(task)
    with _running(task, x, acceleration, hand), _steps(task, x, acceleration, hand) as steps:
        for number in progress_bar(range(len(task.update.times)), desc=description, shown=progress):
            if task.update.draws:
                steps.noise.normal_(generator=generator)
            steps.advance(first=number == 0)
            if after_step is not None:
                after_step(number, steps.x.clone())
        return steps.x.clone()


@contextmanager
def repeated_step(
    task: Task, x: torch.Tensor, acceleration: Acceleration, number: int = 0
) -> Iterator[Callable[[], torch.Tensor]]:
    """One step of a sampling, to be made again and again: to measure it.

    What is done once for a sampling is done already; a CUDA graph is captured with the first call.

    Args:
        task: What to sample.
        x: Images from which the first call starts, float32, shape (b, c, h, w).
        acceleration: How to run the U-Net.
        number: Which step, from 0.

    Returns:
        A function that draws noise, makes the step from the images of its last call, and gives the new ones. They are
        its own: the next call changes them.
    """
    hand = _Hand.in_(task)
    with ExitStack() as stack:
        with _running(task, x, acceleration, hand):
            steps = stack.enter_context(_steps(task, x, acceleration, hand))
            # The first step may differ from the others, and what is captured must have run before.
            for first in (True, False) if task.update.multistep else (True,):
                steps.advance(first)
            steps.x.copy_(x)

        def step() -> torch.Tensor:
            with _running(task, x, acceleration, hand):
                steps.number.fill_(number)
                if task.update.draws:
                    steps.noise.normal_()
                steps.advance(first=False)
            return steps.x

        yield step


@contextmanager
def _running(task: Task, x: torch.Tensor, acceleration: Acceleration, hand: _Hand) -> Iterator[None]:
    """Have steps made in the way of ``acceleration``."""
    # What is kept for the next sampling must be usable in it, also if this one runs in inference mode.
    with torch.inference_mode(False), torch.no_grad(), acceleration.active():
        with _autocast_if_needed(task.unet, x.device, acceleration, hand):
            yield


def _autocast_if_needed(
    unet: Unet, device: torch.device, acceleration: Acceleration, hand: _Hand
) -> AbstractContextManager:
    """Autocast, where it has to stand for a working copy."""
    if hand.is_copied or dtype_of(unet) == acceleration.dtype or autocast_dtype(device) is not None:
        return nullcontext()
    return torch.autocast(device.type, acceleration.dtype)


def _refuse_if_asked_for(names: tuple[str, ...], acceleration: Acceleration, obstacle: str) -> None:
    for name in names:
        if getattr(acceleration, name) == "on" and acceleration.asks_for(name):
            raise ValueError(f"{name}='on' cannot be had: {obstacle}, or choose {name}='auto'")


@contextmanager
def _steps(task: Task, x: torch.Tensor, acceleration: Acceleration, hand: _Hand) -> "Iterator[Steps]":
    autocast = autocast_dtype(x.device)
    if hand.calls is not None:
        _refuse_if_asked_for(
            ("condition_cache", "cuda_graphs"),
            acceleration,
            f"{hand.calls}, and would not be called. To compile there is imagen.accelerate(compile='blocks')",
        )
    elif not hand.is_copied or not task.update.is_plain:
        _refuse_if_asked_for(
            ("cuda_graphs",),
            acceleration,
            "the U-Net has methods of its own or tensors in attributes, or a part of it or the diffusion process is of"
            " a class of another package: these may do more than compute, and a graph would replay nothing else",
        )
    elif autocast is not None:
        _refuse_if_asked_for(
            ("cuda_graphs",),
            acceleration,
            "autocast is in force, and the weights that it converts go when it ends. Say"
            " imagen.accelerate(precision='bfloat16') instead",
        )
    kept = kept_with(task.unet)
    with kept.in_order(x.device), _steps_of(kept, task, x, acceleration, autocast, hand) as steps:
        yield steps


@contextmanager
def _steps_of(
    kept: Kept,
    task: Task,
    x: torch.Tensor,
    acceleration: Acceleration,
    autocast: torch.dtype | None,
    hand: _Hand,
) -> "Iterator[Steps]":
    unet, update = task.unet, task.update
    copied = hand.is_copied and autocast is None
    if copied:
        unet = kept.working_copy(unet, acceleration.dtype, acceleration.layout)
    # Autocast keeps converted weights while it is active: a graph must not hold on to those.
    replays = (
        copied and update.is_plain and (acceleration.cuda_graphs == "on" or may_be_recorded(task, x, acceleration))
    )
    if not replays:
        kept.forget_graphs()
    if acceleration.condition_cache == "off" or hand.calls is not None:
        update = update.unguided() if task.guided_by_unet else update
        yield Steps(PlainPrediction(task, unet, acceleration.layout), update, x)
        return
    # A callback, or another thread, may sample with this U-Net while it is being sampled.
    if not replays or not kept.lock.acquire(blocking=False):
        # Autocast leaves float64 as it is.
        dtype = unet.dtype if autocast is None or unet.dtype == torch.float64 else autocast
        yield Steps(CachedPrediction(task, unet, acceleration.layout, dtype), update, x)
        return
    try:
        kept.forget_graphs_of_others(unet)
        steps = replayed_steps(kept, task, unet, x, acceleration)
        try:
            yield steps
        finally:
            steps.rest()
    finally:
        kept.lock.release()
