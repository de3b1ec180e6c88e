"""What each switch of the fast path is worth: from the reference path on, one more switched on at a time."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from . import sampling_steps, training_steps
from .denoisers import BLOCKS_SECONDS, NETWORKS, Network
from .harness import CLOCK, Plan
from .imagens import ImagenVariant, ablation
from .prepared import Context, Prepared
from .results import Identity

pytestmark = pytest.mark.benchmark(timer=CLOCK)

_LATER = "freed_memory", "recorded_steps", "bfloat16", "compile", "cuda_graphs"
SAMPLING = ("kernels", "channels_last", "condition_cache", *_LATER)
# A step of training has no conditions to keep.
TRAINING = ("kernels", "channels_last", *_LATER)
# Those of other devices; what is switched on after them must not ask for them, either.
ELSEWHERE = {"cpu": ("cuda_graphs",), "cuda": ("freed_memory", "recorded_steps")}

Prepare = Callable[[Network, ImagenVariant, int, Context], Prepared]


def _calls(profile: str, device: str) -> list[tuple[str, str, int, tuple[ImagenVariant, ...], Prepare]]:
    """What, network, images, switches, how it is prepared."""
    sampling, training = (
        ("sampling-step", SAMPLING, sampling_steps.prepare),
        ("training-step", TRAINING, training_steps.prepare),
    )
    sizes = {
        "smoke": (("tiny-base@16", 1), ("tiny-base@16", 4)),
        "cpu": (("cpu-base@64", 1), ("quickstart-base@16", 32)),
        "cuda": (("Base@64", 8), ("Base@64", 16)),
    }["smoke" if profile == "smoke" else device]
    return [
        (what, name, batch, ablation(*(switch for switch in switches if switch not in ELSEWHERE[device])), prepare)
        for (what, switches, prepare), (name, batch) in zip((sampling, training), sizes, strict=True)
    ]


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    for what, name, batch, variants, prepare in _calls(profile, device.type):
        network = NETWORKS[name]
        for number, variant in enumerate(variants):
            compiles = variant.compiles(device)
            if compiles and profile == "smoke":
                continue
            identity = Identity("ablation", f"{what}-{name}", None, network.shape(batch), "float32", variant.name)
            yield Plan(
                identity,
                functools.partial(_prepare, number, prepare, network, variant, batch),
                # What is compiled is found in Inductor's cache after the other sections.
                5 if compiles else 1,
                BLOCKS_SECONDS[device.type] / 2 if compiles else 0.0,
            )


def _prepare(
    number: int, prepare: Prepare, network: Network, variant: ImagenVariant, batch: int, context: Context
) -> Prepared:
    prepared = prepare(network, variant, batch, context)
    prepared.extra["step"] = number
    return prepared


def test_ablation(plan, harness, benchmark):
    harness.run(plan, benchmark)
