"""Cascades, and the ways in which a user has them sample and train."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minimagen_fast.acceleration import REFERENCE as PLAIN
from minimagen_fast.acceleration import resolve
from minimagen_fast.Imagen import Imagen
from minimagen_fast.Unet import BaseTest

from . import denoisers
from .denoisers import Network, Variant
from .floors import convolution_rate
from .measure import Subject
from .peers import original_package
from .prepared import Unavailable


@dataclass(frozen=True, eq=False)
class ImagenVariant:
    """A way to run a cascade.

    Attributes:
        name: Its name in the results.
        preset: What :meth:`.Imagen.accelerate` is told, also of what stands for the original package's Imagen.
        settings: What it is told besides.
        unets: How the U-Nets are made and called; those of ours as they are, the rest is up to their cascade.
    """

    name: str
    preset: str = "auto"
    settings: Mapping[str, str] = field(default_factory=dict)
    unets: Variant = denoisers.OURS

    @property
    def original(self) -> bool:
        """Whether it is of the original package, if that is installed."""
        return self.unets.original

    def imagen(
        self, networks: Sequence[Network], device: torch.device, *, timesteps: int | tuple[int, ...]
    ) -> torch.nn.Module:
        """A cascade of these networks; of the original package, if the variant is and it is there.

        Raises:
            Unavailable: if this variant cannot be had on the device.
        """
        imagen_class = original_imagen() if self.original and original_package() else Imagen
        imagen = imagen_class(
            [self.unets.module(network, device) for network in networks],
            text_encoder_name="t5_small",
            text_embed_dim=networks[0].settings["text_embed_dim"],
            image_sizes=tuple(network.side for network in networks),
            timesteps=timesteps,
        ).to(device)
        if isinstance(imagen, Imagen):
            try:
                imagen.accelerate(self.preset, **self.settings)
            except ValueError as error:
                raise Unavailable(str(error)) from error
            if imagen.acceleration.compile == "blocks":
                # What was compiled before, for other networks, would be asked first, at every call.
                torch._dynamo.reset()
        if self.unets.compile:
            for unet in imagen.unets:
                # In place: the cascade's other methods call the network as well.
                unet.forward = self.unets.compiled(unet.forward)
        return imagen

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Run what is inside as a user of this variant would."""
        with self.unets.active(device):
            yield

    def dtype(self, imagen: torch.nn.Module) -> torch.dtype:
        """What most is computed in."""
        return self.unets.dtype if self.original else imagen.acceleration.dtype

    def without_graphs(
        self, imagen: torch.nn.Module, make: Callable[[], Subject]
    ) -> Callable[[], Subject | None] | None:
        """What :class:`.prepared.Prepared` is to count the memory of; ``make`` makes a call of the cascade."""
        if self.unets.mode is not None:
            # Graphs that torch.compile makes: without them it would be compiled otherwise.
            return lambda: None
        if not isinstance(imagen, Imagen) or imagen.acceleration.cuda_graphs == "off":
            return None

        def launched() -> Subject:
            imagen.accelerate(self.preset, **{**self.settings, "cuda_graphs": "off"})
            return make()

        return launched

    def compiles(self, device: torch.device) -> bool:
        """Whether torch.compile is at work, as far as can be told before the cascade is there."""
        if self.original or self.preset == "reference" or "compile" in self.settings:
            return self.unets.compile or self.settings.get("compile") == "blocks"
        return device.type == "cuda"

    def seconds(self, device: torch.device) -> float:
        """How long the first call may take, where that is long."""
        if not self.compiles(device):
            return 0.0
        return (denoisers.COMPILE_SECONDS if self.unets.compile else denoisers.BLOCKS_SECONDS)[device.type]

    def about(self, imagen: torch.nn.Module, device: torch.device) -> dict[str, Any]:
        """What ``extra`` should say of it."""
        about = self.unets.about(device) | {"computes_in": convolution_rate(self.dtype(imagen), device.type == "cuda")}
        if not self.original:
            plain = resolve(PLAIN, device, imagen.unets[0].dtype)
            switched = [name for name in PLAIN if getattr(imagen.acceleration, name) != getattr(plain, name)]
            about["switched_on"] = ", ".join(switched) or "nothing"
        return about


ORIGINAL = ImagenVariant("original", "reference", unets=denoisers.ORIGINAL)
ORIGINAL_COMPILED = ImagenVariant("original-compiled", "reference", unets=denoisers.ORIGINAL_COMPILED)
ORIGINAL_GRAPHS = ImagenVariant("original-compiled-graphs", "reference", unets=denoisers.ORIGINAL_GRAPHS)
OURS = ImagenVariant("ours")
OURS_BF16 = ImagenVariant("ours-bf16", settings={"precision": "bfloat16"})
OURS_COMPILED = ImagenVariant("ours-compiled", settings={"precision": "bfloat16", "compile": "blocks"})
REFERENCE = ImagenVariant("reference", "reference")

# On CUDA ours computes in bfloat16 and is compiled anyway.
EAGER = {"cpu": (ORIGINAL, OURS, OURS_BF16), "cuda": (ORIGINAL, OURS)}
COMPILED_PEERS = {"cpu": (ORIGINAL_COMPILED,), "cuda": (ORIGINAL_COMPILED, ORIGINAL_GRAPHS)}


def ablation(*switches: str) -> tuple[ImagenVariant, ...]:
    """From the reference path, one switch more at a time, of :data:`SWITCHES`."""
    variants, settings = [REFERENCE], {}
    for name in switches:
        settings = {**settings, **SWITCHES[name]}
        variants.append(ImagenVariant(f"+{name}", "reference", settings))
    return tuple(variants)


SWITCHES: dict[str, dict[str, str]] = {
    "kernels": {"kernels": "auto", "attention": "auto"},
    "channels_last": {"memory_format": "channels_last"},
    # Also one call of the U-Net a step for both predictions.
    "condition_cache": {"condition_cache": "on"},
    # On a CPU.
    "freed_memory": {"freed_memory": "kept"},
    "recorded_steps": {"recorded_steps": "on"},
    "bfloat16": {"precision": "bfloat16"},
    # Steps that are recorded run their blocks as they are.
    "compile": {"compile": "blocks", "recorded_steps": "off"},
    # A switch that training heeds needs one that it does not.
    "cuda_graphs": {"condition_cache": "on", "cuda_graphs": "on"},
}


def stage(network: Network) -> tuple[Network, ...]:
    """The smallest cascade in which a network has its place, which is the last: one alone takes no smaller images."""
    if not network.settings.get("lowres_cond"):
        return (network,)
    text = {"text_embed_dim": network.settings["text_embed_dim"]}
    return replace(network, name="smallest", settings={**BaseTest.defaults, **text}, side=network.side // 2), network


@functools.cache
def original_imagen() -> Callable[..., torch.nn.Module]:
    """The original package's Imagen class."""
    from minimagen.Imagen import Imagen as OriginalImagen

    return OriginalImagen
