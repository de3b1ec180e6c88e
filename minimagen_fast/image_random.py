"""Random numbers that belong to an image and not to its batch.

A training that draws from one stream of random numbers after the other is another training as soon as its batches are
split otherwise, over more devices or for accumulation. Here every image has a seed of its own, and all that is random
about it comes from that seed: so it meets the same timestep, noise and dropped text wherever and in whatever company it
is trained on.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .arguments import whole_number

__all__ = ["ImageRandom", "image_seeds"]

# What a number is for: streams of one seed must not overlap.
_UNIFORM, _NOISE, _LOWRES_NOISE = range(3)


def image_seeds(ids: Sequence[int], *what: int) -> list[int]:
    """A seed for each image of a batch, in [0, 2^63).

    Args:
        ids: What tells an image from the others of its data set.
        what: Whatever else the numbers are to depend on, each at least 0: the seed of the run, the epoch, the U-Net.
    """
    return [_mixed(*what, number) for number in ids]


def _mixed(*numbers: int) -> int:
    # A sound hash of several numbers (O'Neill, "Developing a seed_seq Alternative", 2015).
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class ImageRandom:
    """The random numbers of a batch.

    On CUDA they are drawn there, image by image, and are other numbers than on the CPU.

    Args:
        seeds: One for each image, at least 0: a list, a numpy array or a tensor of ints.
        device: Where the numbers are wanted.

    Raises:
        TypeError, ValueError: a seed is no int, or negative.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._seeds = [whole_number("seeds", seed) for seed in seeds]
        if any(seed < 0 for seed in self._seeds):
            raise ValueError(f"seeds must be whole numbers of at least 0, got {min(self._seeds)}")
        self._device = device
        draws = [np.random.Generator(np.random.Philox(_mixed(seed, _UNIFORM))).random(3) for seed in self._seeds]
        # One copy for the batch, which the device need not be waited for.
        uniform = torch.from_numpy(np.array(draws, dtype=np.float64).reshape(-1, 3))
        self._time, self._level, self._keep = uniform.unbind(1)

    def times(self, end: int) -> torch.Tensor:
        """Timesteps, uniform over 0 to ``end`` - 1, int64, shape (b,)."""
        return (self._time * end).long().to(self._device, non_blocking=True)

    def lowres_times(self, end: int) -> torch.Tensor:
        """The same for the noise of the low-resolution images."""
        return (self._level * end).long().to(self._device, non_blocking=True)

    def keep(self, probability: float) -> torch.Tensor:
        """Bool, shape (b,), each True with this probability."""
        return (self._keep < probability).to(self._device, non_blocking=True)

    def noise(self, images: torch.Tensor) -> torch.Tensor:
        """Standard normal noise in the shape, dtype and device of images (b, c, h, w)."""
        return self._normal(images, _NOISE)

    def lowres_noise(self, images: torch.Tensor) -> torch.Tensor:
        """The same for the low-resolution images."""
        return self._normal(images, _LOWRES_NOISE)

    def _normal(self, images: torch.Tensor, stream: int) -> torch.Tensor:
        noise = torch.empty_like(images, memory_format=torch.contiguous_format)
        generator = torch.Generator(images.device)
        for seed, one in zip(self._seeds, noise, strict=True):
            one.normal_(generator=generator.manual_seed(_mixed(seed, stream)))
        return noise
