"""What is summed up on the device from one line of the log to the next, and added up over the ranks for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .Imagen import Imagen
from .ranks import Ranks
from .throughput import peak_memory

__all__ = ["BUCKETS", "LineSums", "Means"]

# Parts of equal width of the timesteps, from little noise to pure noise, whose losses are told apart.
BUCKETS = 10


@dataclass(frozen=True)
class Means:
    """What the steps since the last line come to, on all ranks.

    Attributes:
        unets: For each U-Net by its number ``loss``, the mean over all images, and ``loss_by_timestep``, the means of
            :data:`BUCKETS` parts of the timesteps; None where there was no image.
        grad_norm: Mean of the norms that are finite; None if there is none.
        bad_steps: As given.
        waited: Seconds for which the rank that has waited longest waited for data: it keeps the others waiting.
        memory: Bytes of the rank with the highest peak; None where the system does not say.
    """

    unets: dict[int, dict[str, Any]]
    grad_norm: float | None
    bad_steps: int
    waited: float
    memory: int | None


class LineSums:
    """Sums on the device, for one line of the log. Adding to them waits for nothing.

    Args:
        imagen: The Imagen that is trained, on the device of this rank.
        numbers: Numbers of the U-Nets that are trained, from 1.
        ranks: The ranks.
    """

    def __init__(self, imagen: Imagen, numbers: Sequence[int], ranks: Ranks) -> None:
        self._numbers, self._ranks, self._device = list(numbers), ranks, imagen.device
        schedulers: Any = imagen.noise_schedulers
        self.timesteps: dict[int, int] = {number: schedulers[number - 1].num_timesteps for number in numbers}
        self.clear()

    def clear(self) -> None:
        """Begins a new line."""
        shape = len(self._numbers), BUCKETS
        self._sums = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._counts = torch.zeros_like(self._sums)
        # Sum of the gradients' norms, and how many there are: those that are finite.
        self._norms = torch.zeros(2, dtype=torch.float64, device=self._device)
        self.waited = 0.0

    def add_losses(self, number: int, losses: Tensor, times: Tensor) -> None:
        """Adds the losses of images, shape (b,), and their timesteps, int64, shape (b,)."""
        place = self._numbers.index(number)
        bucket = times * BUCKETS // self.timesteps[number]
        self._sums[place].index_add_(0, bucket, losses.detach().double())
        self._counts[place].index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float64))

    def add_norm(self, norm: Tensor) -> None:
        """Adds the norm of a gradient, a scalar."""
        norm = norm.detach().double()
        is_finite = torch.isfinite(norm)
        self._norms += torch.stack([torch.where(is_finite, norm, 0.0), is_finite.double()])

    def means(self, bad_steps: Tensor) -> Means:
        """What it all comes to: one exchange between the ranks, one reading of the device.

        Args:
            bad_steps: Number of steps that were left out so far, a scalar on the device, the same on all ranks.
        """
        memory = peak_memory(self._device)
        # A place for each rank, so that a sum brings the values of all together.
        own = torch.zeros(self._ranks.size, 2, dtype=torch.float64)
        own[self._ranks.rank] = torch.tensor([self.waited, memory or 0], dtype=torch.float64)
        shared = torch.cat([self._sums.flatten(), self._counts.flatten(), own.flatten().to(self._device)])
        same = self._norms, bad_steps.detach().double().reshape(1)
        values = torch.cat([self._ranks.sum_(shared), *same]).tolist()
        size = self._sums.numel()
        sums, counts, own_values = values[:size], values[size : 2 * size], values[2 * size : -3]
        norm_sum, norm_count, bad = values[-3:]
        unets = {}
        for place, number in enumerate(self._numbers):
            part = slice(place * BUCKETS, (place + 1) * BUCKETS)
            unets[number] = {
                "loss": _ratio(sum(sums[part]), sum(counts[part])),
                "loss_by_timestep": [_ratio(*pair) for pair in zip(sums[part], counts[part], strict=True)],
            }
        return Means(
            unets=unets,
            grad_norm=_ratio(norm_sum, norm_count),
            bad_steps=int(bad),
            waited=max(own_values[0::2]),
            memory=None if memory is None else int(max(own_values[1::2])),
        )


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
