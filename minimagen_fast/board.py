"""What TensorBoard shows of a training."""

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
    """Writes the records of a run for TensorBoard.

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

    def _open(self, step: int) -> Any:
        if self._writer is None:
            # A continued run repeats steps: TensorBoard then forgets what a run before wrote for this one and later.
            self._writer = self._kind(str(self._folder), purge_step=step)
        return self._writer

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
        self._open(step).add_image("samples", pixels, step, dataformats="HWC")

    def event(self, step: int, text: str) -> None:
        """Shows a text."""
        # The losses of this very step are older than what is said of it.
        self._open(step + 1).add_text("events", text, step)

    def _scalar(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            self._open(step).add_scalar(tag, value, step)

    def close(self) -> None:
        """Has everything written."""
        if self._writer is not None:
            self._writer.close()
