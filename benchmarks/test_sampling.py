"""Pictures from text by the whole cascade, with guidance: how many a second, and how soon the first."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch

from minimagen_fast.Imagen import Imagen

from .denoisers import (
    NETWORKS,
    ORIGINAL,
    OURS,
    OURS_BF16,
    OURS_COMPILED,
    REFERENCE,
    TOKENS,
    Network,
    Variant,
    imagen_of,
)
from .harness import CLOCK, Context, Plan, Prepared
from .parity import relative_distance
from .peers import original_package
from .results import Identity

pytestmark = pytest.mark.benchmark(timer=CLOCK)

GUIDANCE = 3.0
# With 20 steps, the fewest, the original package makes NaN.
FEW = 25
SEED = 5
# Relative distance of a picture from the reference's with the same random numbers. Guidance multiplies the network's
# own differences, and the first steps, which divide by a small sqrt(abar), do so again.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, eq=False)
class Cascade:
    """U-Nets that are sampled in a row.

    Attributes:
        name: Its name in the results.
        networks: The U-Nets.
        steps: Diffusion steps of each.
    """

    name: str
    networks: tuple[Network, ...]
    steps: int


def _cascade(name: str, base: str, upper: str, steps: int) -> Cascade:
    return Cascade(name, (NETWORKS[base], NETWORKS[upper]), steps)


def _calls(profile: str, cuda: bool) -> list[tuple[Cascade, int, tuple[Variant, ...], int]]:
    """Cascade, batch, variants, priority."""
    if profile == "smoke":
        return [(_cascade("tiny", "tiny-base@16", "tiny-super@32", FEW), 1, (ORIGINAL, OURS), 2)]
    few = _cascade("laptop", "laptop-base@64", "laptop-super@128", FEW)
    if not cuda:
        return [(_cascade("laptop", "laptop-base@32", "laptop-super@64", FEW), 1, (ORIGINAL, OURS, OURS_BF16), 2)]
    calls = [
        (few, 1, (ORIGINAL, OURS, OURS_BF16), 1),
        (few, 16, (ORIGINAL, OURS, OURS_BF16), 1),
        (few, 1, (OURS_COMPILED,), 4),
        (_cascade("Base+Super", "Base@64", "Super@256", FEW), 1, (ORIGINAL, OURS, OURS_BF16), 1),
    ]
    if profile == "full":
        calls += [
            (_cascade("laptop", "laptop-base@64", "laptop-super@128", 1000), 1, (ORIGINAL, OURS, OURS_BF16), 5),
            (_cascade("Base+Super", "Base@64", "Super@256", 1000), 1, (ORIGINAL, OURS_BF16), 5),
            (_cascade("Base+Super", "Base@64", "Super@256", FEW), 8, (ORIGINAL, OURS_BF16), 5),
        ]
    return calls


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    for cascade, batch, variants, priority in _calls(profile, device.type == "cuda"):
        sides = "-".join(str(network.side) for network in cascade.networks)
        shape = f"b{batch}-{sides}-{cascade.steps}steps"
        for variant in variants:
            identity = Identity("sampling", cascade.name, None, shape, "float32", variant.name)
            yield Plan(identity, functools.partial(_prepare, cascade, variant, batch), priority)


def _prepare(cascade: Cascade, variant: Variant, batch: int, context: Context) -> Prepared:
    device = context.device
    subject = _sampler(cascade, variant, batch, device)

    def wrong(pictures: torch.Tensor) -> str | None:
        # The original noises low-resolution images differently; it is compared with the same here.
        original = variant.original and original_package() is not None
        distance = relative_distance([pictures], [_expected(cascade, batch, original, device)])
        allowed = TOLERANCE[variant.dtype]
        if distance > allowed:
            return f"pictures {distance:.2g} away from the reference's, {allowed:.2g} is allowed"
        return None

    return Prepared(
        subject,
        wrong,
        steady=not variant.compile,
        # Elsewhere it takes the profiler, over thousands of operations, to say what the denoiser says.
        memory=device.type == "cuda",
        extra={**variant.about(device), "steps": cascade.steps, "guidance": GUIDANCE},
        # All pictures of a batch are ready at the same time.
        more=lambda samples: {
            "images_per_second": batch / median(samples),
            "seconds_to_first_image": median(samples),
        },
    )


@functools.lru_cache(maxsize=2)
def _expected(cascade: Cascade, batch: int, match_original: bool, device: torch.device) -> torch.Tensor:
    """The reference's pictures."""
    return _sampler(cascade, REFERENCE, batch, device, match_original=match_original)(0)


def _sampler(
    cascade: Cascade, variant: Variant, batch: int, device: torch.device, **options: Any
) -> Callable[[int], torch.Tensor]:
    imagen = imagen_of(cascade.networks, variant, device, timesteps=cascade.steps)
    generator = torch.Generator(device).manual_seed(3)
    embeds = torch.randn(batch, TOKENS, imagen.text_embed_dim, device=device, generator=generator)
    mask = torch.ones(batch, TOKENS, dtype=torch.bool, device=device)
    if isinstance(imagen, Imagen):
        options["progress"] = False

    def sample(_: int) -> torch.Tensor:
        # The original takes its random numbers from here.
        torch.manual_seed(SEED)
        with variant.active(device):
            return imagen.sample(text_embeds=embeds, text_masks=mask, cond_scale=GUIDANCE, **options)

    return sample


def test_sampling(plan, harness, benchmark):
    harness.run(plan, benchmark)
