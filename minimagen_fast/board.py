"""What TensorBoard shows of a training."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["Board"]

# TensorBoard groups tags by what stands before the first slash.
_TAGS = {
    "grad_norm": "gradient/norm",
    "bad_steps": "gradient/bad_steps",
    "images_per_second": "speed/images_per_second",
    "seconds_per_step": "speed/seconds_per_step",
    "data_wait_share": "speed/data_wait_share",
    "flops_per_second": "speed/flops_per_second",
    "mfu": "speed/mfu",
    "memory_bytes": "memory/bytes",
    "epoch": "progress/epoch",
}


class Board:
    """Writes the records of a run for TensorBoard. If that fails, it costs a warning and the rest, not the training.

    Args:
        folder: Where its files go.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"TensorBoard was asked for, but it cannot be imported ({error}): pip install"
                " 'minimagen_fast[tensorboard]', or do without"
            ) from error
        self._folder, self._kind = folder, SummaryWriter
        self._writer: Any = None
        self._failed = False

    def _add(self, what: str, *values: Any, since: int, **options: Any) -> None:
        """Has the writer add something. When it is the first, TensorBoard forgets older values from step `since` on."""
        if self._failed:
            return
        try:
            if self._writer is None:
                # A continued run repeats steps: what a run before wrote for these does not count any more.
                self._writer = self._kind(str(self._folder), purge_step=since)
            getattr(self._writer, f"add_{what}")(*values, **options)
        except Exception as error:  # which one depends on the library that it writes with
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # Its thread does not write any more after an error: it would end every later call.
        self._failed = True
        warnings.warn(
            f"TensorBoard's files in {self._folder} end here: {error}. The training goes on without them", stacklevel=4
        )

    def step(self, record: Mapping[str, Any]) -> None:
        """Shows a record of kind ``step``."""
        step = record["step"]
        for key, tag in _TAGS.items():
            self._scalar(tag, record[key], step)
        for place, rate in enumerate(record["learning_rates"]):
            self._scalar(f"learning_rate/group_{place}", rate, step)
        for number, unet in record["unets"].items():
            self._scalar(f"loss/unet_{number}", unet["loss"], step)
            buckets = unet["loss_by_timestep"]
            for place, loss in enumerate(buckets):
                share = f"{place / len(buckets):.1f}-{(place + 1) / len(buckets):.1f}"
                self._scalar(f"loss_by_timestep_unet_{number}/{share}", loss, step)

    def validation(self, record: Mapping[str, Any]) -> None:
        """Shows a record of kind ``validation``."""
        for number, loss in record["losses"].items():
            self._scalar(f"validation_loss/unet_{number}", loss, record["step"])

    def samples(self, step: int, path: Path) -> None:
        """Shows a picture."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._add("image", "samples", pixels, step, dataformats="HWC", since=step)

    def event(self, step: int, text: str) -> None:
        """Shows a text."""
        # The losses of this very step are older than what is said of it.
        self._add("text", "events", text, step, since=step + 1)

    def _scalar(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            self._add("scalar", tag, value, step, since=step)

    def close(self) -> None:
        """Has everything written."""
        if self._writer is None or self._failed:
            return
        try:
            self._writer.close()
        except Exception as error:
            self._fail(error)
