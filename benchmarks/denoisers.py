"""The networks that are measured, their inputs, and the ways to call them; :mod:`.imagens` has whole cascades."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from minimagen_fast.kernels import use_implementation
from minimagen_fast.quickstart_training import Recipe
from minimagen_fast.t5 import get_encoded_dim
from minimagen_fast.tiny_t5 import TINY_T5_NAME
from minimagen_fast.Unet import Base, BaseTest, Super, SuperTest, Unet

from .floors import convolution_rate
from .peers import original_package

TIMESTEPS = 1000
# Tokens of a caption; the network pads them to 256.
TOKENS = 32


@dataclass(frozen=True, eq=False)
class Network:
    """A U-Net and the size of its images.

    Attributes:
        name: Its name in the results.
        settings: Arguments of :class:`.Unet`.
        side: Height and width of its images, in pixels.
    """

    name: str
    settings: dict[str, Any]
    side: int

    def build(self, device: torch.device | str, unet_class: Callable[..., torch.nn.Module] = Unet) -> torch.nn.Module:
        """The network with random weights, the same every time on the same device."""
        torch.manual_seed(0)
        with torch.device(device):
            return unet_class(**self.settings)

    def inputs(self, batch: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Arguments of its ``forward``: random images, timesteps, text; a low-resolution image where it wants one."""
        device = torch.device(device)
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(1)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, generator=generator).to(dtype)

        def times() -> torch.Tensor:
            return torch.randint(1, TIMESTEPS, (batch,), device=device, generator=generator)

        image = (batch, self.settings.get("channels", 3), self.side, self.side)
        inputs = {
            "x": randn(*image),
            "time": times(),
            "text_embeds": randn(batch, TOKENS, self.settings["text_embed_dim"]),
            "text_mask": torch.ones(batch, TOKENS, dtype=torch.bool, device=device),
        }
        if self.settings.get("lowres_cond"):
            inputs |= {"lowres_cond_img": randn(*image), "lowres_noise_times": times()}
        return inputs

    def shape(self, batch: int) -> str:
        return f"b{batch}-{self.settings.get('channels', 3)}x{self.side}x{self.side}"


TEXT = {"text_embed_dim": 512}
LAPTOP_BASE = {"dim": 64, "dim_mults": (1, 2, 4), **TEXT}
LAPTOP_SUPER = {
    "dim": 32,
    "dim_mults": (1, 2, 4),
    "num_resnet_blocks": (1, 2, 2),
    "layer_attns": (False, False, True),
    "layer_cross_attns": (False, False, True),
    "memory_efficient": True,
    "lowres_cond": True,
    **TEXT,
}
# Wide, with attention where it pays: what two cores can do a step of in a second.
CPU_BASE = {"dim": 64, "dim_mults": (1, 2, 4), "layer_attns": (False, True, True), **TEXT}
CPU_BASE["layer_cross_attns"] = CPU_BASE["layer_attns"]
QUICKSTART = [{**settings, "text_embed_dim": get_encoded_dim(TINY_T5_NAME)} for settings in Recipe().unets]
NETWORKS = {
    network.name: network
    for network in (
        Network("Base@64", {**Base.defaults, **TEXT}, 64),
        Network("Super@256", {**Super.defaults, **TEXT, "lowres_cond": True}, 256),
        Network("laptop-base@64", LAPTOP_BASE, 64),
        Network("laptop-super@128", LAPTOP_SUPER, 128),
        # What can be sampled in a while on two cores.
        Network("laptop-base@32", LAPTOP_BASE, 32),
        Network("laptop-super@64", LAPTOP_SUPER, 64),
        Network("cpu-base@64", CPU_BASE, 64),
        Network("quickstart-base@16", QUICKSTART[0], 16),
        Network("quickstart-super@32", {**QUICKSTART[1], "lowres_cond": True}, 32),
        Network("tiny-base@16", {**BaseTest.defaults, **TEXT}, 16),
        Network("tiny-super@32", {**SuperTest.defaults, **TEXT, "lowres_cond": True}, 32),
    )
}


@dataclass(frozen=True)
class Variant:
    """A way to run a network.

    Attributes:
        name: Its name in the results.
        implementation: What :func:`.kernels.use_implementation` is told.
        channels_last: Whether weights and images lie channels innermost.
        autocast: Whether it computes in bfloat16 where autocast thinks that right.
        compile: Whether it runs under torch.compile.
        mode: What torch.compile is told.
        original: Whether the network is that of the original package, if it is installed.
    """

    name: str
    implementation: str = "auto"
    channels_last: bool = False
    autocast: bool = False
    compile: bool = False
    mode: str | None = None
    original: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What most is computed in."""
        return torch.bfloat16 if self.autocast else torch.float32

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Run what is inside as this variant does."""
        with ExitStack() as stack:
            stack.enter_context(use_implementation(self.implementation))
            if self.autocast:
                stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            yield

    def module(self, network: Network, device: torch.device) -> torch.nn.Module:
        """The network as this variant has it, not compiled: the same weights in all of them."""
        if self.original and original_package():
            module = network.build(device, original_unet())
            module.load_state_dict(network.build(device).state_dict())
        else:
            module = network.build(device)
        return module.to(memory_format=self.memory_format)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A network or its ``forward``, compiled if this variant is."""
        if not self.compile:
            return function
        # Otherwise earlier networks count towards the number of recompilations after which Dynamo gives up, silently.
        torch._dynamo.reset()
        compiled = torch.compile(function, mode=self.mode)
        if self.mode is None:
            return compiled
        # In some modes a call writes its result where the last one left its own, and guidance needs two.
        return lambda *args, **kwargs: compiled(*args, **kwargs).clone()

    def about(self, device: torch.device) -> dict[str, Any]:
        """What ``extra`` should say of it; ``computes_in`` is a name among the matrix rates."""
        about: dict[str, Any] = {"computes_in": convolution_rate(self.dtype, device.type == "cuda")}
        if self.original:
            version = original_package()
            about["original"] = f"minimagen {version}" if version else "reference path of minimagen_fast, eager"
        return about


ORIGINAL = Variant("original", "reference", original=True)
ORIGINAL_COMPILED = Variant(
    "original-compiled", "reference", channels_last=True, autocast=True, compile=True, original=True
)
# On CUDA alone: CUDA graphs as torch.compile makes them.
ORIGINAL_GRAPHS = replace(ORIGINAL_COMPILED, name="original-compiled-graphs", mode="reduce-overhead")
OURS = Variant("ours")
OURS_BF16 = Variant("ours-bf16-channels_last", channels_last=True, autocast=True)
OURS_COMPILED = Variant("ours-compiled", channels_last=True, autocast=True, compile=True)
REFERENCE = Variant("reference", "reference")

# Timed in turn with the original on a CPU, which other programs slow down now and then; a card that nobody shares keeps
# its pace, and may not hold two networks.
IN_TURN = (OURS.name, OURS_COMPILED.name)

# How long compilation may take, by device, of a network's blocks, and of the whole as one: on a CPU it is C++ code.
BLOCKS_SECONDS = {"cpu": 100.0, "cuda": 60.0}
COMPILE_SECONDS = {"cpu": 300.0, "cuda": 90.0}

# Largest relative distance from the reference network in float32, over all values together: outputs, gradients. On CUDA
# float32 convolutions are allowed TF32.
TOLERANCE = {torch.float32: (5e-3, 2e-2), torch.bfloat16: (5e-2, 1.5e-1)}


@functools.cache
def original_unet() -> Callable[..., torch.nn.Module]:
    """The original package's U-Net class."""
    from minimagen.Unet import Unet as OriginalUnet

    return OriginalUnet


def runs_apart(variant: Any, device: torch.device) -> bool:
    """Whether a variant is measured in a process of its own: on a CPU, the original, see :mod:`.places`."""
    return device.type == "cpu" and variant.original


def beside_original(
    variant: Any, original: Any, device: torch.device, prepare: Callable[[Any], Any]
) -> tuple[str, Callable[..., Any]] | None:
    """What :class:`.harness.Plan` is to time beside a variant; ``prepare`` makes the case's preparation for one."""
    return (original.name, prepare(original)) if device.type == "cpu" and variant.name in IN_TURN else None
