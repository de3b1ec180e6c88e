"""A step of training as documented, as a case: data loader, ``Imagen.forward``, backward, optimizer."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import torch
from torch.utils.data import DataLoader

from minimagen_fast.data import get_minimagen_dl_opts
from minimagen_fast.shapes import ShapesDataset
from minimagen_fast.t5 import register_text_encoder

from .denoiser_calls import demands
from .denoisers import TOKENS, TOLERANCE, Network
from .floors import Floor, convolution_rate, share_of_matrix_rate
from .imagens import REFERENCE, ImagenVariant, stage
from .measure import saved_bytes
from .parity import relative_distance
from .prepared import Context, Prepared, reference_fits

SEED = 5
# Worker processes that draw the pictures; on a CPU there is none to spare.
WORKERS = {"cpu": 0, "cuda": 8}
WARM_UP_STEPS = 2
# Steps are timed for so many times the time of a case: data loader, forward, backward, optimizer each vary.
PATIENCE = 3
# AdamW reads weight, gradient and two moments and writes weight and moments, all float32.
OPTIMIZER_BYTES = 7 * 4

# A loss, and the gradients of it.
_Found = tuple[torch.Tensor, list[torch.Tensor]]


def _encoder(width: int) -> str:
    """A text encoder that needs no model, by its name: what the embeddings say does not matter for the time."""

    def encode(captions: list[str], max_length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = min(TOKENS, max_length)
        embeds = torch.randn(len(captions), tokens, width, generator=torch.Generator().manual_seed(0))
        return embeds.to(device), torch.ones(len(captions), tokens, dtype=torch.bool, device=device)

    name = f"benchmarks-{width}"
    register_text_encoder(name, encode, width)
    return name


class _Loop:
    """A training loop that can be stopped and gone on with after every step.

    Args:
        network: What to train.
        variant: How.
        batch_size: Pictures of a step.
        device: Where.
        steps: How many steps there are pictures for.
        threads: How many threads a step may use; as many as torch does, if not given.

    Attributes:
        imagen: The smallest cascade that has this network.
        parameters: Those that are trained.
        waited: Seconds for which each step waited for its pictures.
    """

    def __init__(
        self,
        network: Network,
        variant: ImagenVariant,
        batch_size: int,
        device: torch.device,
        steps: int,
        threads: int | None = None,
    ):
        self._variant, self._device, self._threads = variant, device, threads
        cascade = stage(network)
        self._number = len(cascade)
        self.imagen = variant.imagen(cascade, device, timesteps=1000)
        # The original package's Imagen has no parameters once it has been called.
        self.parameters = list(self.imagen.unets[-1].parameters())
        # Whatever the device, one kernel for all of them: the peers get the best optimizer, too.
        self._optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        encoder = _encoder(network.settings["text_embed_dim"])
        pictures = ShapesDataset(steps * batch_size, side_length=network.side, encoder_name=encoder)
        workers = WORKERS[device.type]
        options = {**get_minimagen_dl_opts(device), "batch_size": batch_size, "num_workers": workers}
        if workers:
            # The text encoder was registered in this process.
            options |= {"multiprocessing_context": "fork", "pin_memory": True}
        self._batches = iter(DataLoader(pictures, **options))
        self.waited: list[float] = []

    def next_batch(self) -> dict[str, torch.Tensor]:
        return {name: value.to(self._device, non_blocking=True) for name, value in next(self._batches).items()}

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with self._variant.active(self._device):
            return self.imagen(
                batch["image"], text_embeds=batch["encoding"], text_masks=batch["mask"], unet_number=self._number
            )

    def gradients(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, and the gradients in the parameters."""
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def update(self, batch: dict[str, torch.Tensor]) -> None:
        with _threads(self._threads):
            self.gradients(batch)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Seconds of a step, from asking for its pictures to the end of the optimizer's work."""
        started = time.perf_counter()
        batch = self.next_batch()
        self.waited.append(time.perf_counter() - started)
        self.update(batch)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(
    network: Network, variant: ImagenVariant, batch_size: int, context: Context, threads: int | None = None
) -> Prepared:
    """A training loop, ready to be checked and timed step by step; used for the ablation, too.

    On a part of the threads there is no floor: the ceilings are those of all.
    """
    device, profile = context.device, context.profile
    least = 2 * profile.min_rounds
    loop = _Loop(network, variant, batch_size, device, max(least, profile.max_rounds) + WARM_UP_STEPS + 2, threads)
    batch = loop.next_batch()
    dtype = variant.dtype(loop.imagen)
    rate = convolution_rate(dtype, device.type == "cuda")
    flops, floor = demands(network, batch_size, "both", dtype, context)
    optimizer = OPTIMIZER_BYTES * sum(parameter.numel() for parameter in loop.parameters)
    optimizer_seconds = optimizer / context.ceilings["copy_bytes_per_second"]

    warm_up: list[float] = []

    def first() -> _Found:
        found = _found(loop, batch)
        warm_up.extend(loop.step() for _ in range(WARM_UP_STEPS))
        loop.waited.clear()
        return found

    def rounds() -> int:
        return max(least, min(profile.max_rounds, int(PATIENCE * profile.case_seconds / warm_up[-1])))

    def wrong(found: _Found) -> str | None:
        with reference_fits():
            expected = _found(_Loop(network, REFERENCE, batch_size, device, 1), batch)
        return _difference(found, expected, dtype)

    def more(samples: Sequence[float]) -> dict[str, Any]:
        percentiles = quantiles(samples, n=100, method="inclusive")
        mfu = {} if threads else {"mfu": share_of_matrix_rate(flops, median(samples), rate, context.ceilings)}
        return {
            **mfu,
            "images_per_second": batch_size / median(samples),
            "step_seconds": {f"p{p}": percentiles[p - 1] for p in (50, 90, 99)},
            "data_wait_share": sum(loop.waited) / sum(samples),
            "saved_bytes_per_image": saved_bytes(lambda: loop.loss(batch), loop.imagen.unets[-1]) / batch_size,
        }

    def update(_: int) -> None:
        loop.update(batch)

    return Prepared(
        update,
        wrong,
        sample=loop.step,
        first=first,
        rounds=rounds,
        count_launches=True,
        memory_of=variant.without_graphs(loop.imagen, lambda: update),
        bytes=floor.bytes + optimizer,
        flops=flops,
        floor=None
        if threads
        else Floor(
            floor.seconds + optimizer_seconds,
            {**floor.by_family, "optimizer": optimizer_seconds},
            floor.bytes + optimizer,
            flops,
        ),
        extra={
            **variant.about(loop.imagen, device),
            "optimizer": "AdamW(fused=True)",
            "loader_workers": WORKERS[device.type],
        },
        more=more,
        images=batch_size,
    )


def _found(loop: _Loop, batch: dict[str, torch.Tensor]) -> _Found:
    """Loss and gradients on a batch, from the same random numbers in every loop."""
    torch.manual_seed(SEED)
    loss = loop.gradients(batch)
    gradients = [p.grad for p in loop.parameters if p.grad is not None]
    for parameter in loop.parameters:
        parameter.grad = None
    return loss, gradients


def _difference(found: _Found, expected: _Found, dtype: torch.dtype) -> str | None:
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    if len(gradients) != len(expected_gradients):
        return f"{len(gradients)} gradients instead of {len(expected_gradients)}"
    distances = relative_distance([loss], [expected_loss]), relative_distance(gradients, expected_gradients)
    for what, distance, allowed in zip(("loss", "gradients"), distances, TOLERANCE[dtype], strict=True):
        if distance > allowed:
            return f"{what} {distance:.2g} away from the reference's, {allowed:.2g} is allowed"
    return None
