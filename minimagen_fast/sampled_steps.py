"""Steps of sampling that stay what they are from one to the next, and are replayed.

A step is captured once on CUDA, and recorded on a CPU, see :mod:`.recorded`, and replayed for all steps of all
samplings of its kind. What is said here of capturing holds for recording.

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
from collections.abc import Callable

import torch

from .acceleration import Acceleration
from .blocks import blocks_are_compiled
from .cuda_capture import capturing, library_settings
from .kept import Kept, forget_idle_graphs
from .kernels import dispatch
from .module_watch import has_plain_tensors
from .plain import no_calls_are_seen
from .predictions import CachedPrediction, Prediction, Task
from .recorded import NotRecordable, record_in_place
from .samplers import Update
from .Unet import Unet

# Captured steps that are kept for each U-Net: every one holds the memory of a step.
_MOST_GRAPHS = 4
# So many steps from a recording save the time that it takes: 11 to 15, measured on two cores.
_PAID_BACK_BY = 16
# Bytes of conditions and images that recorded steps may hold on to from one sampling to the next.
_MOST_KEPT = 2**26


class Steps:
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


class ReplayedSteps(Steps):
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


class CapturedSteps(ReplayedSteps):
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


def _graph_of(steps: ReplayedSteps) -> torch.cuda.CUDAGraph | None:
    return steps.graph if isinstance(steps, CapturedSteps) else None


class RecordedSteps(ReplayedSteps):
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


def may_be_recorded(task: Task, x: torch.Tensor, acceleration: Acceleration) -> bool:
    """Whether steps of a U-Net that may be copied do nothing but run operators that a recorder sees."""
    return (
        acceleration.recorded_steps == "on"
        and not acceleration.interprets_triton()
        and no_calls_are_seen((x, task.lowres_cond_img))
        and has_plain_tensors(task.unet)
    )


def _in_force() -> tuple:
    """What is set for the process, and says which operators a step runs."""
    return dispatch.implementation(), dispatch.attention_override(None), blocks_are_compiled(), library_settings()


def replayed_steps(kept: Kept, task: Task, unet: Unet, x: torch.Tensor, acceleration: Acceleration) -> ReplayedSteps:
    """The captured step for this task, or one to be captured."""
    graphs: OrderedDict[tuple, ReplayedSteps] = kept.graphs
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

    def all_steps() -> "OrderedDict[tuple, ReplayedSteps]":
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
        captured = CapturedSteps(predict, task.update, x, required)
        captured.find_other = lambda: next(filter(None, map(_graph_of, all_steps().values())), None)
        graphs[key] = captured
        return captured
    recorded = RecordedSteps(predict, task.update, x, required, in_force)
    # Beside the conditions: images, noise and, for some samplers, x_0.
    if predict.nbytes + 3 * x.nbytes <= _MOST_KEPT:
        graphs[key] = recorded
    return recorded
