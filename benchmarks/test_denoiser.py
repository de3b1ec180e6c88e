"""One call of a U-Net, and one with its backward, against the original and what a user would make of it."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from .denoiser_calls import prepare
from .denoisers import (
    COMPILE_SECONDS,
    NETWORKS,
    ORIGINAL,
    ORIGINAL_COMPILED,
    OURS,
    OURS_BF16,
    OURS_COMPILED,
    Network,
    Variant,
    beside_original,
    runs_apart,
)
from .harness import CLOCK, Plan
from .prepared import Context, Prepared
from .results import Identity

pytestmark = pytest.mark.benchmark(timer=CLOCK)

EAGER = (ORIGINAL, OURS, OURS_BF16)
COMPILED = (ORIGINAL_COMPILED, OURS_COMPILED)


def _calls(profile: str, cuda: bool) -> list[tuple[str, int, str, tuple[Variant, ...], int]]:
    """Network, batch, direction, variants, priority. One image with guidance is a batch of two."""
    if profile == "smoke":
        return [
            ("tiny-base@16", 2, "forward", EAGER, 0),
            ("tiny-base@16", 2, "both", EAGER, 0),
            ("tiny-super@32", 2, "forward", (ORIGINAL, OURS), 0),
        ]
    if not cuda:
        return [
            ("laptop-super@128", 1, "forward", EAGER, 0),
            ("laptop-base@32", 2, "both", EAGER, 1),
            ("laptop-super@64", 2, "both", EAGER, 1),
        ]
    laptop = [
        ("laptop-base@64", 2, "forward", EAGER, 0),
        ("laptop-super@128", 2, "forward", EAGER, 0),
        ("laptop-base@64", 2, "both", EAGER, 1),
        ("laptop-super@128", 2, "both", EAGER, 1),
        ("laptop-base@64", 2, "forward", COMPILED, 6),
    ]
    large = [
        ("Base@64", 2, "forward", EAGER, 0),
        ("Super@256", 2, "forward", EAGER, 0),
        ("Base@64", 8, "both", EAGER, 0),
        ("Super@256", 4, "both", EAGER, 0),
        ("Base@64", 2, "forward", COMPILED, 5),
        ("Super@256", 2, "forward", COMPILED, 6),
    ]
    if profile == "full":
        large += [
            (name, batch, direction, (*EAGER, *COMPILED), 5)
            for name in ("Base@64", "Super@256")
            for batch, direction in ((16, "forward"), (16, "both"))
        ]
        large += [("laptop-base@64", 2, "both", COMPILED, 5), ("laptop-super@128", 2, "both", COMPILED, 5)]
    return large + laptop


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    for name, batch, direction, variants, priority in _calls(profile, device.type == "cuda"):
        network = NETWORKS[name]

        def prepared(
            variant: Variant, network: Network = network, batch: int = batch, direction: str = direction
        ) -> Callable[[Context], Prepared]:
            return functools.partial(prepare, network, variant, batch, direction)

        for variant in variants:
            # A backward is launched one by one in training; a denoiser that samples can be a graph.
            for graph in (False, True) if device.type == "cuda" and direction == "forward" else (False,):
                identity = Identity("denoiser", name, direction, network.shape(batch), "float32", variant.name, graph)
                seconds = COMPILE_SECONDS[device.type] if variant.compile else 0.0
                beside = beside_original(variant, ORIGINAL, device, prepared)
                yield Plan(identity, prepared(variant), priority, seconds, runs_apart(variant, device), beside)


def test_denoiser(plan, harness, benchmark):
    harness.run(plan, benchmark)
