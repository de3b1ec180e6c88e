"""How fast a training is and what it uses: time without pauses, FLOPs of an image, memory."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from .acceleration import REFERENCE, resolve
from .Imagen import Imagen

__all__ = ["Clock", "peak_memory", "settle", "training_flops"]

META = torch.device("meta")


class Clock:
    """Measures a loop in laps, and what is not part of it apart.

    Args:
        now: Seconds from any beginning; never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._lap_began: float | None = None
        self._paused = 0.0
        self._pauses = 0

    def begin(self, seconds_ago: float = 0.0) -> None:
        """Begins the first lap; later calls do nothing."""
        if self._lap_began is None:
            self._lap_began = self._now() - seconds_ago

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block is not part of the lap; blocks may lie in one another."""
        self._pauses += 1
        began = self._now()
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses and self._lap_began is not None:
                self._paused += self._now() - max(began, self._lap_began)

    def lap(self) -> tuple[float, float]:
        """Ends the lap and begins the next.

        Returns:
            The lap's seconds, and those for which it was paused, which are not among them.
        """
        assert self._lap_began is not None and not self._pauses
        now = self._now()
        paused, self._paused = self._paused, 0.0
        seconds = now - self._lap_began - paused
        self._lap_began = now
        return seconds, paused


def training_flops(imagen: Imagen, number: int) -> int:
    """FLOPs of the forward and backward pass of a U-Net for one image, a multiplication and an addition counted as two.

    Counted are matrix products and convolutions, by torch's counter, on a copy without values that computes with plain
    torch: what the model calls for, whatever kernels run it and whatever is computed twice to save memory. All images
    cost the same but for one projection of the text, which is then padded. Takes about a second for a U-Net of 10^9
    parameters, and no memory.

    Args:
        imagen: The cascade; its U-Nets may be anywhere, sharded too.
        number: Number of the U-Net, from 1.
    """
    original = imagen._get_unet(number)
    side = imagen.image_sizes[number - 1]
    with META:
        # Drawing random weights, even for no tensors, would move the random numbers of the training along.
        with torch.random.fork_rng(devices=[]):
            unet = type(original)(**original._config)
        image = torch.empty(1, imagen.channels, side, side)
        time = torch.empty(1, dtype=torch.int64)
        text = torch.empty(1, 1, imagen.text_embed_dim)
        keep_text = torch.empty(1, dtype=torch.bool)
    lowres = {"lowres_cond_img": image, "lowres_noise_times": time} if unet.lowres_cond else {}
    with resolve(REFERENCE, META, torch.float32).active(), FlopCounterMode(display=False) as counter:
        unet(image, time, text_embeds=text, keep_text=keep_text, **lowres).sum().backward()
    return counter.get_total_flops()


def settle(device: torch.device) -> None:
    """Waits until a device has done all that it was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes of memory in use so far.

    Args:
        device: Of a CUDA device, what tensors of this process have taken; else, the process's resident memory.

    Returns:
        Bytes; None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
