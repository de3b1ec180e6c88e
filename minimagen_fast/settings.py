"""The settings of a training, as a typed value that is saved beside it."""

import json
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .files import replace_file

__all__ = ["TrainingSettings"]

PRECISIONS = ("bfloat16",)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a training runs, on one process or on many.

    Attributes:
        epochs: Passes over the training data, those of a continued training included; at least 0.
        accumulate: Batches whose gradients are averaged for one optimizer step.
        checkpoint_interval: Batches after which to save and validate.
        unet_numbers: Numbers, from 1, of the U-Nets to train; all, if not given.
        seed: Seed from which everything random about an image is drawn, so that the training is the same on any number
            of ranks (see :mod:`.image_random`); torch's global random numbers are used, if not given.
        max_grad_norm: Gradients with a larger norm, taken over all trained U-Nets, are scaled down to it; None for no
            limit.
        ema_decay: If given, averages of the weights are kept, validated and saved, see :class:`.ema.EMA`.
        precision: ``bfloat16`` to run the forward pass under autocast; None for what the model's acceleration chooses.
        min_snr_gamma: Weighs the timesteps, see :meth:`.Imagen.forward`; None to weigh them alike.
        max_seconds: Seconds after which the training ends in good order; None for no limit.
        batch_seconds: Seconds after which a batch is given up, but for the first of a shape where blocks are compiled
            for it; None or 0 for no limit. Only on one process.
        max_bad_steps: Optimizer steps in a row that are skipped because a gradient is not finite, after which the
            training is given up (counted after every so many steps, so between this and twice as many). Fused
            optimizers, which Adam and AdamW are unless they were told otherwise, leave a step out themselves. Before
            others step the host reads from the device whether to, and waits for it: they change weights and states
            in any case, and keeping both to put them back would cost more than the wait.
        keep_last: How many checkpoints to keep.
        keep_every: Also keep those whose number of optimizer steps is a multiple of this.
        sample_interval: Optimizer steps after which pictures are sampled; None for none.

    Raises:
        ValueError: a value is out of range or of the wrong kind. The message names it.
    """

    epochs: int = 5
    accumulate: int = 1
    checkpoint_interval: int = 500
    unet_numbers: Sequence[int] | None = None
    seed: int | None = None
    max_grad_norm: float | None = 50.0
    ema_decay: float | None = None
    precision: str | None = None
    min_snr_gamma: float | None = None
    max_seconds: float | None = None
    batch_seconds: float | None = None
    max_bad_steps: int = 10
    keep_last: int = 2
    keep_every: int | None = None
    sample_interval: int | None = None

    def __post_init__(self) -> None:
        if self.unet_numbers is not None:
            if not isinstance(self.unet_numbers, Iterable):
                raise ValueError(f"unet_numbers must be a list of numbers from 1, or None; got {self.unet_numbers!r}")
            object.__setattr__(self, "unet_numbers", tuple(self.unet_numbers))
        if not _whole(self.epochs) or self.epochs < 0:
            raise ValueError(f"epochs must be a whole number of at least 0, got {self.epochs!r}")
        for name in ("accumulate", "checkpoint_interval", "max_bad_steps", "keep_last"):
            value = getattr(self, name)
            if not _whole(value) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("keep_every", "sample_interval"):
            value = getattr(self, name)
            if value is not None and (not _whole(value) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, or None; got {value!r}")
        for name in ("max_grad_norm", "max_seconds", "min_snr_gamma"):
            value = getattr(self, name)
            if value is not None and not (_number(value) and value > 0):
                raise ValueError(f"{name} must be positive or None, got {value!r}")
        if self.batch_seconds is not None and not (_number(self.batch_seconds) and self.batch_seconds >= 0):
            raise ValueError(f"batch_seconds must be at least 0, or None; got {self.batch_seconds!r}")
        if self.seed is not None and (not _whole(self.seed) or self.seed < 0):
            raise ValueError(f"seed must be a whole number of at least 0, or None; got {self.seed!r}")
        if self.ema_decay is not None and not (_number(self.ema_decay) and 0 <= self.ema_decay < 1):
            raise ValueError(f"ema_decay must lie in [0, 1), or be None; got {self.ema_decay!r}")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be None or {' or '.join(PRECISIONS)}, got {self.precision!r}: float16 needs loss"
                " scaling, which this loop does not do"
            )

    def save(self, path: Path, **further: Any) -> None:
        """Writes the settings, and whatever further JSON has, to a file."""
        text = json.dumps({**asdict(self), **further}, indent=2) + "\n"
        replace_file(path, text.encode())

    @classmethod
    def load(cls, path: Path) -> "TrainingSettings":
        """Reads what :meth:`save` wrote; entries that are no settings are passed over.

        Raises:
            ValueError: the file is not a JSON object, or a value is out of range.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold an object, got a {type(values).__name__}")
        return cls.of(values)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "TrainingSettings":
        """The settings among these values."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
