"""Watching a training: losses, gradients, speed and memory, in ``log.jsonl``, TensorBoard and the progress bar."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .board import Board
from .Imagen import Imagen
from .line_sums import LineSums
from .machine import machine_facts, version_facts
from .ranks import Ranks
from .run_log import LOG, RunLog, finite
from .throughput import Clock, settle, training_flops

__all__ = ["Watch"]

BOARD = "tensorboard"


class Watch:
    """Collects what there is to see of a training, and writes it down every few steps.

    Every rank makes one, and calls the same methods in the same order; rank 0 writes. Between two log steps nothing
    waits for the device. What is logged stands for all steps since the last log step, on all ranks.

    Args:
        directory: The training directory.
        imagen: The Imagen that is trained, on the device of this rank.
        numbers: Numbers of the U-Nets that are trained, from 1.
        ranks: The ranks.
        log_interval: Optimizer steps from one line of the log to the next, at least 1.
        steps: Optimizer steps of the whole training, those of a run that is continued included; None if not known.
        tensorboard: Whether to write for TensorBoard too, into the folder ``tensorboard``.
        precision_peak_flops: FLOPs per second that one device can do at most in the precision of the training; the
            share of them that is reached (model FLOPs utilisation) is not told if not given.
        now: A clock, in seconds, that never goes back.

    Raises:
        ValueError: `log_interval` or `precision_peak_flops` is out of range, or tensorboard is not installed.
        OSError: the log cannot be opened. All ranks raise what rank 0 does.
    """

    def __init__(
        self,
        directory: Path,
        imagen: Imagen,
        numbers: Sequence[int],
        ranks: Ranks,
        *,
        log_interval: int,
        steps: int | None,
        tensorboard: bool = False,
        precision_peak_flops: float | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        if log_interval < 1:
            raise ValueError(f"log_interval must be a whole number of at least 1, got {log_interval!r}")
        if precision_peak_flops is not None and not precision_peak_flops > 0:
            raise ValueError(f"precision_peak_flops must be positive or None, got {precision_peak_flops!r}")
        self._directory, self._imagen, self._numbers, self._ranks = directory, imagen, list(numbers), ranks
        self._log_interval, self._steps, self._peak_flops = log_interval, steps, precision_peak_flops
        self._board: Board | None = None
        self._log: RunLog | None = None
        error: Exception | None = None
        counted: dict[int, int | None] = {}
        if ranks.first:
            try:
                self._board = Board(directory / BOARD) if tensorboard else None
                self._log = RunLog(directory / LOG)
                counted = {number: _flops_if_known(imagen, number) for number in self._numbers}
            except (OSError, ValueError) as failure:
                error = failure
        # The others must not wait for a rank that has given up.
        error, self._flops = ranks.from_first((error, counted))
        if error is not None:
            raise error
        self._sums = LineSums(imagen, self._numbers, ranks)
        self._clock = Clock(now)
        self._device = imagen.device
        self._steps_here, self._paused_here = 0, 0.0
        self._last: dict[str, Any] | None = None
        self._clear()

    def _clear(self) -> None:
        """Begins a new line of the log."""
        self._sums.clear()
        self._images = dict.fromkeys(self._numbers, 0)
        self._steps_in_line = 0

    # What the training tells

    def start(self, step: int, settings: Mapping[str, Any], *, steps: int | None = None) -> None:
        """The training begins, or goes on from a checkpoint after `step` optimizer steps.

        Args:
            step: Number of optimizer steps that are done.
            settings: How it trains; anything that JSON has (others are written as text).
            steps: As for the constructor, where it is known only now.
        """
        if steps is not None:
            self._steps = steps
        unets = {
            number: {
                "parameters": sum(parameter.numel() for parameter in self._imagen.unets[number - 1].parameters()),
                "image_size": self._imagen.image_sizes[number - 1],
                "timesteps": self._sums.timesteps[number],
                "flops_per_image": self._flops[number],
            }
            for number in self._numbers
        }
        self._write(
            "start",
            step,
            settings=dict(settings),
            unets=unets,
            ranks=self._ranks.size,
            machine=machine_facts(self._device),
            versions=version_facts(self._device),
        )

    def waited(self, seconds: float) -> None:
        """This rank has waited so long for the data of a batch."""
        self._clock.begin(seconds)
        self._sums.waited += seconds

    def losses(self, number: int, images: int, losses: Tensor, times: Tensor) -> None:
        """A U-Net has been trained on a batch.

        Args:
            number: Its number.
            images: Number of the batch's images on all ranks together.
            losses: The losses of this rank's images, shape (b,), on the device; those that do not count left out.
            times: Their timesteps, int64, shape (b,), on the device.
        """
        self._clock.begin()
        self._sums.add_losses(number, losses, times)
        self._images[number] += images

    def step(
        self,
        step: int,
        epoch: int,
        batch: int,
        norm: Tensor,
        learning_rates: Sequence[float],
        bad_steps: Tensor,
    ) -> dict[str, Any] | None:
        """An optimizer step is done.

        Args:
            step: Number of optimizer steps that are done, this one included.
            epoch: Index of the epoch.
            batch: Number of its batches that are done.
            norm: Norm of the gradient before it was clipped, a scalar on the device, not sharded.
            learning_rates: Learning rate of each group of the optimizer's parameters.
            bad_steps: Number of steps so far that were left out because their gradients were not finite, a scalar on
                the device.

        Returns:
            At a log step what has been logged, on all ranks; else None.
        """
        self._clock.begin()
        self._steps_in_line += 1
        self._sums.add_norm(norm)
        self._latest = step, epoch, batch, learning_rates, bad_steps
        return None if step % self._log_interval else self._line()

    def end(self) -> None:
        """The training ends: of the steps since the last line there is a line too."""
        if self._steps_in_line:
            self._line()

    def _line(self) -> dict[str, Any]:
        """Writes a line for all steps since the last one."""
        step, epoch, batch, learning_rates, bad_steps = self._latest
        means = self._sums.means(bad_steps)
        # Only now has the device done what the seconds are for.
        seconds, paused = self._clock.lap()
        self._steps_here += self._steps_in_line
        self._paused_here += paused
        per_step = seconds / self._steps_in_line
        per_image = [(self._flops[number], images) for number, images in self._images.items()]
        known = [flops * images for flops, images in per_image if flops is not None]
        flops = sum(known) / seconds if len(known) == len(per_image) else None
        images = self._images[self._numbers[0]]  # the same batches, where several U-Nets are trained
        record = {
            "epoch": epoch,
            "batch": batch,
            "unets": means.unets,
            "grad_norm": means.grad_norm,
            "learning_rates": [float(rate) for rate in learning_rates],
            "images": images,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "seconds_per_step": per_step,
            "data_wait_share": min(1.0, means.waited / seconds),
            "memory_bytes": means.memory,
            "flops_per_second": flops,
            "mfu": None if flops is None or self._peak_flops is None else flops / (self._peak_flops * self._ranks.size),
            "bad_steps": means.bad_steps,
            "seconds_to_end": self._to_end(step, per_step),
            "ranks": self._ranks.size,
        }
        self._clear()
        self._last = self._write("step", step, **record)
        if self._board is not None:
            self._board.step(self._last)
        return self._last

    def _to_end(self, step: int, seconds_per_step: float) -> float | None:
        """Seconds until the training is done, with as many pauses as before."""
        if self._steps is None:
            return None
        return max(0, self._steps - step) * (seconds_per_step + self._paused_here / self._steps_here)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block does not count as training: validation, checkpoints, sampling."""
        # What the device has still to do belongs to what came before.
        settle(self._device)
        with self._clock.paused():
            yield
            settle(self._device)

    def validation(self, step: int, losses: Mapping[int, float]) -> None:
        """Mean validation losses by number of the U-Net."""
        record = self._write("validation", step, losses=losses)
        if self._board is not None:
            self._board.validation(record)

    def samples(self, step: int, path: Path) -> None:
        """A sample grid has been written to `path`, below the training directory."""
        self._write("samples", step, file=path.relative_to(self._directory).as_posix())
        if self._board is not None:
            self._board.samples(step, path)

    def event(self, step: int, text: str) -> None:
        """Something has happened: a stop, a restart, a checkpoint, steps that were left out."""
        self._write("event", step, text=text)
        if self._board is not None:
            self._board.event(step, text)

    def _write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        record = finite({"kind": kind, "time": time.time(), "step": step, **values})
        if self._log is not None:
            self._log.append(record)
        return record

    # What the training asks

    def shown(self) -> dict[str, str]:
        """The last log step in a few words, for a progress bar; nothing before the first."""
        if self._last is None:
            return {}
        last = self._last
        words = {
            "loss": "/".join(_short(unet["loss"]) for unet in last["unets"].values()),
            "norm": _short(last["grad_norm"]),
            "images/s": _short(last["images_per_second"]),
        }
        if last["memory_bytes"] is not None:
            words["memory"] = tqdm.format_sizeof(last["memory_bytes"], "B", 1024)
        if last["seconds_to_end"] is not None:
            words["left"] = tqdm.format_interval(last["seconds_to_end"])
        return words

    def close(self) -> None:
        """Closes the files."""
        if self._log is not None:
            self._log.close()
        if self._board is not None:
            self._board.close()


def _flops_if_known(imagen: Imagen, number: int) -> int | None:
    try:
        return training_flops(imagen, number)
    except Exception as error:
        # A subclass may take arguments of its own, and another module in the place of a U-Net may be anything.
        kind = type(imagen._get_unet(number)).__name__
        warnings.warn(
            f"the FLOPs of U-Net {number}, a {kind}, cannot be counted, so they and mfu are not told: {error}",
            stacklevel=3,
        )
        return None


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
