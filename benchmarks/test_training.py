"""Training as documented: data loader, ``Imagen.forward``, backward, optimizer step."""

import functools
import time
from collections.abc import Iterator, Sequence
from statistics import median, quantiles
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from minimagen_fast.data import get_minimagen_dl_opts
from minimagen_fast.shapes import ShapesDataset
from minimagen_fast.t5 import register_text_encoder

from .denoiser_calls import demands
from .denoisers import (
    NETWORKS,
    ORIGINAL,
    ORIGINAL_COMPILED,
    OURS,
    OURS_BF16,
    OURS_COMPILED,
    REFERENCE,
    TOKENS,
    TOLERANCE,
    Network,
    Variant,
    imagen_of,
)
from .floors import Floor, convolution_rate, share_of_matrix_rate
from .harness import CLOCK, Context, Plan, Prepared
from .parity import relative_distance
from .results import Identity

pytestmark = pytest.mark.benchmark(timer=CLOCK)

SEED = 5
# Worker processes that draw the pictures; on a CPU there is none to spare.
WORKERS = {"cpu": 0, "cuda": 8}
WARM_UP_STEPS = 2
# AdamW reads weight, gradient and two moments and writes weight and moments, all float32.
OPTIMIZER_BYTES = 7 * 4
ENCODER = "benchmarks"


def _encode(captions: list[str], max_length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Text embeddings of the right size that need no model: what they say does not matter for the time."""
    tokens = min(TOKENS, max_length)
    embeds = torch.randn(len(captions), tokens, 512, generator=torch.Generator().manual_seed(0))
    return embeds.to(device), torch.ones(len(captions), tokens, dtype=torch.bool, device=device)


register_text_encoder(ENCODER, _encode, 512)


def _calls(profile: str, cuda: bool) -> list[tuple[str, int, tuple[Variant, ...], int]]:
    """Network, batch, variants, priority."""
    if profile == "smoke":
        return [("tiny-base@16", 4, (ORIGINAL, OURS), 0)]
    if not cuda:
        return [("laptop-base@32", 4, (ORIGINAL, OURS, OURS_BF16), 1)]
    calls = [
        ("laptop-base@64", 64, (ORIGINAL, OURS, OURS_BF16), 1),
        ("Base@64", 16, (ORIGINAL, OURS, OURS_BF16), 1),
        ("laptop-base@64", 64, (ORIGINAL_COMPILED, OURS_COMPILED), 4),
    ]
    return calls + [("Base@64", 16, (ORIGINAL_COMPILED, OURS_COMPILED), 5)] if profile == "full" else calls


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    for name, batch, variants, priority in _calls(profile, device.type == "cuda"):
        network = NETWORKS[name]
        for variant in variants:
            identity = Identity("training", name, "both", network.shape(batch), "float32", variant.name)
            yield Plan(identity, functools.partial(_prepare, network, variant, batch), priority)


class _Loop:
    """A training loop that can be stopped and gone on with after every step.

    Args:
        network: What to train.
        variant: How.
        batch_size: Pictures of a step.
        device: Where.
        steps: How many steps there are pictures for.

    Attributes:
        waited: Seconds for which each step waited for its pictures.
    """

    def __init__(self, network: Network, variant: Variant, batch_size: int, device: torch.device, steps: int):
        self._variant, self._device = variant, device
        self._imagen = imagen_of((network,), variant, device, timesteps=1000)
        # The original package's Imagen has no parameters once it has been called.
        self.parameters = list(self._imagen.unets[0].parameters())
        # Whatever the device, one kernel for all of them: the peers get the best optimizer, too.
        self._optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        pictures = ShapesDataset(steps * batch_size, side_length=network.side, encoder_name=ENCODER)
        workers = WORKERS[device.type]
        options = {**get_minimagen_dl_opts(device), "batch_size": batch_size, "num_workers": workers}
        if workers:
            # The text encoder was registered in this process.
            options |= {"multiprocessing_context": "fork", "pin_memory": True}
        self._batches = iter(DataLoader(pictures, **options))
        self.waited: list[float] = []

    def next_batch(self) -> dict[str, torch.Tensor]:
        return {name: value.to(self._device, non_blocking=True) for name, value in next(self._batches).items()}

    def gradients(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, and the gradients in the parameters."""
        with self._variant.active(self._device):
            loss = self._imagen(batch["image"], text_embeds=batch["encoding"], text_masks=batch["mask"], unet_number=1)
        loss.backward()
        return loss.detach()

    def update(self, batch: dict[str, torch.Tensor]) -> None:
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


def _prepare(network: Network, variant: Variant, batch_size: int, context: Context) -> Prepared:
    device, rounds = context.device, 2 * context.profile.min_rounds
    loop = _Loop(network, variant, batch_size, device, rounds + WARM_UP_STEPS + 2)
    batch = loop.next_batch()
    flops, floor = demands(network, batch_size, "both", variant.dtype, context)
    optimizer = OPTIMIZER_BYTES * sum(parameter.numel() for parameter in loop.parameters)
    optimizer_seconds = optimizer / context.ceilings["copy_bytes_per_second"]

    def wrong(_: None) -> str | None:
        found = _wrong(loop, _Loop(network, REFERENCE, batch_size, device, 1), batch, variant)
        for _ in range(WARM_UP_STEPS):
            loop.step()
        loop.waited.clear()
        return found

    def more(samples: Sequence[float]) -> dict[str, Any]:
        percentiles = quantiles(samples, n=100, method="inclusive")
        return {
            "images_per_second": batch_size / median(samples),
            "step_seconds": {f"p{p}": percentiles[p - 1] for p in (50, 90, 99)},
            "data_wait_share": sum(loop.waited) / sum(samples),
            "mfu": share_of_matrix_rate(
                flops, median(samples), convolution_rate(variant.dtype, device.type == "cuda"), context.ceilings
            ),
        }

    return Prepared(
        lambda _: loop.update(batch),
        wrong,
        sample=loop.step,
        rounds=rounds,
        count_launches=True,
        bytes=floor.bytes + optimizer,
        flops=flops,
        floor=Floor(
            floor.seconds + optimizer_seconds,
            {**floor.by_family, "optimizer": optimizer_seconds},
            floor.bytes + optimizer,
            flops,
        ),
        extra={**variant.about(device), "optimizer": "AdamW(fused=True)", "loader_workers": WORKERS[device.type]},
        more=more,
    )


def _wrong(loop: _Loop, reference: _Loop, batch: dict[str, torch.Tensor], variant: Variant) -> str | None:
    """Compare loss and gradients on a batch, from the same random numbers."""
    found: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    for each in (loop, reference):
        torch.manual_seed(SEED)
        loss = each.gradients(batch)
        found.append((loss, [p.grad for p in each.parameters if p.grad is not None]))
        for parameter in each.parameters:
            parameter.grad = None
    (loss, gradients), (expected_loss, expected) = found
    if len(gradients) != len(expected):
        return f"{len(gradients)} gradients instead of {len(expected)}"
    distances = relative_distance([loss], [expected_loss]), relative_distance(gradients, expected)
    for what, distance, allowed in zip(("loss", "gradients"), distances, TOLERANCE[variant.dtype], strict=True):
        if distance > allowed:
            return f"{what} {distance:.2g} away from the reference's, {allowed:.2g} is allowed"
    return None


def test_training(plan, harness, benchmark):
    harness.run(plan, benchmark)
