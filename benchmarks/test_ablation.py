"""What each switch is worth: from the reference path to the fast one, one more switched on at a time."""

import functools
from collections.abc import Iterator

import pytest
import torch

from .denoiser_calls import prepare
from .denoisers import COMPILE_SECONDS, NETWORKS, REFERENCE, Network, Variant
from .harness import CLOCK, Context, Plan, Prepared
from .results import Identity

pytestmark = pytest.mark.benchmark(timer=CLOCK)

STEPS = (
    REFERENCE,
    Variant("+kernels"),
    Variant("+channels_last", channels_last=True),
    Variant("+bfloat16", channels_last=True, autocast=True),
    Variant("+compile", channels_last=True, autocast=True, compile=True),
)


def _calls(profile: str, cuda: bool) -> list[tuple[str, int, str]]:
    if profile == "smoke":
        return [("tiny-base@16", 2, "forward")]
    return [("Base@64", 2, "forward"), ("laptop-base@64", 8, "both")] if cuda else [("laptop-base@64", 1, "forward")]


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    for name, batch, direction in _calls(profile, device.type == "cuda"):
        network = NETWORKS[name]
        for number, step in enumerate(STEPS):
            if step.compile and profile == "smoke":
                continue
            identity = Identity("ablation", name, direction, network.shape(batch), "float32", step.name)
            yield Plan(
                identity,
                functools.partial(_prepare, number, network, step, batch, direction),
                # What is compiled is found in Inductor's cache after the denoisers.
                5 if step.compile else 1,
                COMPILE_SECONDS[device.type] / 2 if step.compile else 0.0,
            )


def _prepare(number: int, network: Network, step: Variant, batch: int, direction: str, context: Context) -> Prepared:
    prepared = prepare(network, step, batch, direction, context)
    prepared.extra["step"] = number
    return prepared


def test_ablation(plan, harness, benchmark):
    harness.run(plan, benchmark)
