"""Training as documented: steps a second, waiting for data, and what is kept for the backward."""

import functools
from collections.abc import Iterator

import pytest
import torch

from minimagen_fast.quickstart_training import Recipe

from .denoisers import NETWORKS, Network
from .harness import CLOCK, Plan
from .imagens import EAGER, ORIGINAL_COMPILED, ImagenVariant, beside_original
from .results import Identity
from .training_steps import prepare

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def _calls(profile: str, device: str) -> list[tuple[str, int, tuple[ImagenVariant, ...], int]]:
    """Network, batch, variants, priority."""
    eager = EAGER[device]
    if profile == "smoke":
        return [("tiny-base@16", 4, eager[:2], 0), ("tiny-super@32", 2, eager[:2], 0)]
    if device == "cpu":
        sizes = Recipe().batch_sizes
        return [
            *[("quickstart-base@16", batch, eager, 0) for batch in sorted({sizes[0], 32})],
            ("quickstart-super@32", sizes[1], eager, 1),
            ("laptop-super@64", 4, eager, 1),
        ]
    calls = [
        ("laptop-base@64", 64, eager, 1),
        ("Base@64", 16, eager, 1),
        ("Super@256", 8, eager, 1),
        ("Base@64", 16, (ORIGINAL_COMPILED,), 4),
    ]
    if profile == "full":
        calls += [("laptop-base@64", 64, (ORIGINAL_COMPILED,), 5), ("Super@256", 8, (ORIGINAL_COMPILED,), 5)]
    return calls


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    for name, batch, variants, priority in _calls(profile, device.type):
        network = NETWORKS[name]
        for variant in variants:
            identity = Identity("training", name, "both", network.shape(batch), "float32", variant.name)

            def prepared(variant: ImagenVariant, network: Network = network, batch: int = batch):
                return functools.partial(prepare, network, variant, batch)

            beside = beside_original(variant, device, prepared)
            yield Plan(identity, prepared(variant), priority, variant.seconds(device), beside)


def test_training(plan, harness, benchmark):
    harness.run(plan, benchmark)
