"""A whole sampling as a case: from text embeddings to the last U-Net's images."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from minimagen_fast.Imagen import Imagen

from .denoisers import NETWORKS, TOKENS, Network
from .imagens import REFERENCE, ImagenVariant
from .parity import relative_distance
from .peers import original_package
from .prepared import Context, Prepared, reference_fits

GUIDANCE = 3.0
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
        timesteps: Diffusion steps of each.
        options: Further arguments of :meth:`.Imagen.sample`, of ours only.
    """

    name: str
    networks: tuple[Network, ...]
    timesteps: int | tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, networks: tuple[str, ...], timesteps: int | tuple[int, ...], **options: Any) -> "Cascade":
        return cls(name, tuple(NETWORKS[network] for network in networks), timesteps, options)

    def shape(self, batch: int) -> str:
        """Number of images, their sizes, number of steps."""
        steps = [self.timesteps] if isinstance(self.timesteps, int) else self.timesteps
        sides = "-".join(str(network.side) for network in self.networks)
        return f"b{batch}-{sides}-{'-'.join(map(str, steps))}steps"


def prepare(cascade: Cascade, variant: ImagenVariant, batch: int, context: Context) -> Prepared:
    """A cascade, ready to be checked and timed."""
    device = context.device
    imagen = variant.imagen(cascade.networks, device, timesteps=cascade.timesteps)
    dtype = variant.dtype(imagen)

    def wrong(pictures: torch.Tensor) -> str | None:
        # The original noises low-resolution images differently; it is compared with the same here.
        original = variant.original and original_package() is not None
        distance = relative_distance([pictures], [_expected(cascade, batch, original, device)])
        allowed = TOLERANCE[dtype]
        if distance > allowed:
            return f"pictures {distance:.2g} away from the reference's, {allowed:.2g} is allowed"
        return None

    sample = _sampler(imagen, cascade, variant, batch, device)
    return Prepared(
        sample,
        wrong,
        steady=not variant.compiles(device),
        # Elsewhere it takes the profiler, over thousands of operations, to say what a step of sampling says.
        memory=device.type == "cuda",
        memory_of=variant.without_graphs(imagen, lambda: sample),
        extra={**variant.about(imagen, device), "guidance": GUIDANCE},
        # All pictures of a batch are ready at the same time.
        more=lambda samples: {
            "images_per_second": batch / median(samples),
            "seconds_to_first_image": median(samples),
        },
    )


@functools.lru_cache(maxsize=2)
@reference_fits()
def _expected(cascade: Cascade, batch: int, match_original: bool, device: torch.device) -> torch.Tensor:
    """The reference's pictures."""
    imagen = REFERENCE.imagen(cascade.networks, device, timesteps=cascade.timesteps)
    return _sampler(imagen, cascade, REFERENCE, batch, device, match_original=match_original)(0)


def _sampler(
    imagen: torch.nn.Module,
    cascade: Cascade,
    variant: ImagenVariant,
    batch: int,
    device: torch.device,
    **options: Any,
) -> Callable[[int], torch.Tensor]:
    generator = torch.Generator(device).manual_seed(3)
    embeds = torch.randn(batch, TOKENS, imagen.text_embed_dim, device=device, generator=generator)
    mask = torch.ones(batch, TOKENS, dtype=torch.bool, device=device)
    if isinstance(imagen, Imagen):
        options = {**options, **cascade.options, "progress": False}

    def sample(_: int) -> torch.Tensor:
        # The original takes its random numbers from here.
        torch.manual_seed(SEED)
        with variant.active(device):
            return imagen.sample(text_embeds=embeds, text_masks=mask, cond_scale=GUIDANCE, **options)

    return sample
