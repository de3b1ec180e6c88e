"""The loop that takes one U-Net's images from pure noise to x_0, and what it does to be fast.

A step predicts the noise, with text and without in one call of the U-Net where guidance needs both, and updates the
images in place. It reads nothing but tensors that stay where they are, the number of the step among them: so it is
captured once on CUDA, and recorded on a CPU, see :mod:`.recorded`, and replayed for all steps of all samplings of its
kind. Nothing in it waits for the device. What is said here of capturing holds for recording.

Samplings are of one kind if they differ in their words, their low-resolution images, the noise level of those, their
guidance weight, ``dynamic_thresholding_percentile`` and ``eta``, their random numbers, and the values of weights and
noise schedules alone. A step is captured anew for

- other shapes: number and size of the images, ``batch_size``, one prediction a step or the two of guidance, and number
  of steps, which sizes the tables of timesteps and their embeddings;
- other operators: another ``sampler``, noise added or none (``eta`` = 0), another :class:`.Acceleration`, other kernels
  in force, other settings of torch's precision or determinism;
- weights or schedules that lie elsewhere, after a conversion, a move, or the replacement of a tensor or a module;
- memory that did not suffice: what is captured is given up for it.

The last four kinds are kept for each U-Net.

A recording takes as long as it saves in some steps: it is made where at least as many are left, or were run. Steps
are not recorded, and run as they are without a word, where a mode, a transform or the class of a start image sees which
functions are called, in Triton's interpreter, of a U-Net whose class is not ours, and with weights that are sparse,
parametrised or of other classes than torch's own. Of large batches or U-Nets a recording goes at the end of the
sampling.
"""

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.modules.module import _has_any_global_hook

from .acceleration import Acceleration, autocast_dtype
from .blocks import blocks_are_compiled
from .conditioning import can_be_conditioned_ahead
from .cuda_capture import capturing, library_settings
from .kept import Kept, forget_idle_graphs, kept_with
from .kernels import dispatch
from .module_watch import has_plain_tensors, has_tensors_in_attributes, is_known
from .plain import is_untouched, methods_of, no_calls_are_seen, overridden
from .predictions import CachedPrediction, PlainPrediction, Prediction, Task
from .progress import progress_bar
from .recorded import NotRecordable, record_in_place
from .samplers import Update
from .Unet import Unet, dtype_of

# Captured steps that are kept for each U-Net: every one holds the memory of a step.
_MOST_GRAPHS = 4
# So many steps from a recording save the time that it takes: 11 to 15, measured on two cores.
_PAID_BACK_BY = 16
# Bytes of conditions and images that recorded steps may hold on to from one sampling to the next.
_MOST_KEPT = 2**26
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


class _Steps:
    """Images on their way, in tensors that stay where they are."""

    def __init__(self, predict: Prediction, update: Update, x: torch.Tensor):
        self.x = x.clone()
        self.noise = torch.empty_like(self.x)
        self._predict, self._update = predict, update
        self.number = torch.zeros(1, dtype=torch.long, device=x.device)
        self._x_start = torch.empty_like(self.x) if update.multistep else None

    def advance(self, first: bool) -> None:
        """One step; the first, which has no step before it, may differ."""
        pred = self._predict(self.x, self.number)
        last = None if first else self._x_start
        out, x_start = self._update(self.x, self.number, pred, self.noise, last)
        self.x.copy_(out)
        if x_start is not None and self._x_start is not None:
            self._x_start.copy_(x_start)
        self.number.add_(1)


class _ReplayedSteps(_Steps):
    """The same, of which one is taken down, and replayed."""

    def __init__(self, predict: CachedPrediction, update: Update, x: torch.Tensor, required: bool):
        super().__init__(predict, update, x)
        self._conditions, self._required = predict, required
        self._replay: Callable[[], None] | None = None
        self._may_be_taken_down = True
        # As they are, and how many are left of this sampling.
        self._runs, self._left = 0, len(update.times)

    def begin(self, task: Task, unet: Unet, x: torch.Tensor, required: bool) -> None:
        """Start again with another task, of the same signature, and images of the same shape."""
        self._required = required
        # What has failed before is an error for whom it is required by.
        self._may_be_taken_down = self._may_be_taken_down or required
        self.x.copy_(x)
        self.number.zero_()
        self._left = len(task.update.times)
        self._update.load(task.update)
        self._conditions.load(task, unet)

    def rest(self) -> None:
        """Let go, until the next task, of what is not of these steps alone."""
        self._conditions.rest()

    def predicts_with(self, predict: Prediction) -> bool:
        """Whether the noise in these images is predicted by this one."""
        return self._predict is predict

    def drop(self) -> bool:
        """Free what was taken down, and say whether there was anything; the next steps run as before that."""
        had, self._replay, self._runs = self._replay is not None, None, 0
        return had

    def advance(self, first: bool) -> None:
        self._left -= 1
        if first and self._update.multistep:
            super().advance(first)
        elif self._replay is not None:
            self._replay()
        # Before it is taken down a step must run once, for what libraries and compilers do at first.
        elif self._runs and self._may_be_taken_down and self._pays():
            self._take_down()
        else:
            self._run()

    def _run(self) -> None:
        super().advance(first=False)
        self._runs += 1

    def _pays(self) -> bool:
        """Whether it pays to take a step down."""
        return True

    def _take_down(self) -> None:
        """Make a step that is replayed from then on."""
        raise NotImplementedError

    def _give_up(self, failed: str, setting: str, error: RuntimeError) -> None:
        """Go on without. To be called while the error is handled."""
        if self._required:
            raise
        self._may_be_taken_down = False
        warnings.warn(
            f"a step of sampling could not be {failed}: {error}. To do without: imagen.accelerate({setting}='off')",
            stacklevel=2,
        )


class _CapturedSteps(_ReplayedSteps):
    """By replaying a CUDA graph.

    Attributes:
        graph: What was captured, if anything.
        find_other: Finds a graph that never runs at the same time, to share its memory.
    """

    def __init__(self, predict: CachedPrediction, update: Update, x: torch.Tensor, required: bool):
        super().__init__(predict, update, x, required)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.find_other: Callable[[], torch.cuda.CUDAGraph | None] = lambda: None

    def drop(self) -> bool:
        self.graph = None
        return super().drop()

    def _take_down(self) -> None:
        self.graph = self._capture()
        if self.graph is None:
            self._run()
        else:
            self._replay = self.graph.replay
            self._replay()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        while True:
            graph = torch.cuda.CUDAGraph()
            try:
                with capturing(graph, self.x.device, self.find_other()):
                    self._run()
                return graph
            except RuntimeError as error:
                # What was captured for another U-Net may hold the memory that this takes.
                if isinstance(error, torch.OutOfMemoryError) and forget_idle_graphs():
                    continue
                self._give_up("captured in a CUDA graph and is launched anew each time", "cuda_graphs", error)
                return None


def _graph_of(steps: _ReplayedSteps) -> torch.cuda.CUDAGraph | None:
    return steps.graph if isinstance(steps, _CapturedSteps) else None


class _RecordedSteps(_ReplayedSteps):
    """By running a recording of its operators."""

    def __init__(self, predict: CachedPrediction, update: Update, x: torch.Tensor, required: bool, in_force: tuple):
        super().__init__(predict, update, x, required)
        self._in_force = in_force

    def _pays(self) -> bool:
        pays = self._required or max(self._left, self._runs) >= _PAID_BACK_BY
        return pays and self._is_in_force()

    def _is_in_force(self) -> bool:
        """Whether what is set is what these steps are for: another thread may have set something else for a time."""
        return self._in_force == _in_force()

    def _take_down(self) -> None:
        written = [self.x, self.number, *self._conditions.written()]
        if self._x_start is not None:
            written.append(self._x_start)
        try:
            replay = record_in_place(self._run, written)
            self._replay = replay if self._is_in_force() else None
        except NotRecordable as error:
            self._give_up("recorded and runs as it is each time", "recorded_steps", error)
            # The images are written to at its end, which can be recorded.
            self._run()


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
def _steps(task: Task, x: torch.Tensor, acceleration: Acceleration, hand: _Hand) -> "Iterator[_Steps]":
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
) -> "Iterator[_Steps]":
    unet, update = task.unet, task.update
    copied = hand.is_copied and autocast is None
    if copied:
        unet = kept.working_copy(unet, acceleration.dtype, acceleration.layout)
    # Autocast keeps converted weights while it is active: a graph must not hold on to those.
    replays = (
        copied and update.is_plain and (acceleration.cuda_graphs == "on" or _may_be_recorded(task, x, acceleration))
    )
    if not replays:
        kept.forget_graphs()
    if acceleration.condition_cache == "off" or hand.calls is not None:
        update = update.unguided() if task.guided_by_unet else update
        yield _Steps(PlainPrediction(task, unet, acceleration.layout), update, x)
        return
    # A callback, or another thread, may sample with this U-Net while it is being sampled.
    if not replays or not kept.lock.acquire(blocking=False):
        # Autocast leaves float64 as it is.
        dtype = unet.dtype if autocast is None or unet.dtype == torch.float64 else autocast
        yield _Steps(CachedPrediction(task, unet, acceleration.layout, dtype), update, x)
        return
    try:
        kept.forget_graphs_of_others(unet)
        steps = _replayed(kept, task, unet, x, acceleration)
        try:
            yield steps
        finally:
            steps.rest()
    finally:
        kept.lock.release()


def _may_be_recorded(task: Task, x: torch.Tensor, acceleration: Acceleration) -> bool:
    """Whether steps of a U-Net that may be copied do nothing but run operators that a recorder sees."""
    kernels = dispatch.implementation(), dispatch.attention_override(None)
    return (
        acceleration.recorded_steps == "on"
        # What Triton's interpreter does no recorder sees.
        and "triton" not in (*kernels, acceleration.kernels, acceleration.attention)
        and no_calls_are_seen((x, task.lowres_cond_img))
        and has_plain_tensors(task.unet)
    )


def _in_force() -> tuple:
    """What is set for the process, and says which operators a step runs."""
    return dispatch.implementation(), dispatch.attention_override(None), blocks_are_compiled(), library_settings()


def _replayed(kept: Kept, task: Task, unet: Unet, x: torch.Tensor, acceleration: Acceleration) -> _ReplayedSteps:
    """The captured step for this task, or one to be captured."""
    graphs: OrderedDict[tuple, _ReplayedSteps] = kept.graphs
    in_force = _in_force()
    key = (acceleration, in_force, unet.dtype, x.shape, task.signature, task.update.signature)
    captures = acceleration.cuda_graphs == "on"
    required = acceleration.asks_for("cuda_graphs" if captures else "recorded_steps")
    if key in graphs:
        graphs.move_to_end(key)
        steps = graphs[key]
        try:
            steps.begin(task, unet, x, required)
        except BaseException:
            steps.rest()
            raise
        return steps

    # What is kept must not hold on to itself: its memory would stay taken when it is forgotten.
    keeper = weakref.ref(kept)

    def all_steps() -> "OrderedDict[tuple, _ReplayedSteps]":
        kept = keeper()
        assert kept is not None, "who makes steps holds it"
        return kept.graphs

    def make_room(predict: Prediction) -> bool:
        freed, graphs = False, all_steps()
        for key, steps in list(graphs.items()):
            if steps.predicts_with(predict):
                # After a division its graph would read what is no longer there.
                freed = steps.drop() or freed
            else:
                del graphs[key]
                freed = True
        # The U-Net before this one in the cascade has left what it captured, too.
        return freed or forget_idle_graphs()

    while len(graphs) >= _MOST_GRAPHS:
        graphs.popitem(last=False)
    predict = CachedPrediction(task, unet, acceleration.layout, unet.dtype, make_room)
    if captures:
        captured = _CapturedSteps(predict, task.update, x, required)
        captured.find_other = lambda: next(filter(None, map(_graph_of, all_steps().values())), None)
        graphs[key] = captured
        return captured
    recorded = _RecordedSteps(predict, task.update, x, required, in_force)
    # Beside the conditions: images, noise and, for some samplers, x_0.
    if predict.nbytes + 3 * x.nbytes <= _MOST_KEPT:
        graphs[key] = recorded
    return recorded
