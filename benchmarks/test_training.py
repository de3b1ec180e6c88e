"""Training as documented: steps a second, waiting for data, and what is kept for the backward."""

import functools
from collections.abc import Iterator

import pytest
import torch

from minimagen_fast.quickstart_training import Recipe

from .denoisers import NETWORKS, beside_original, runs_apart
from .harness import CLOCK, Plan
from .imagens import EAGER, ORIGINAL, ORIGINAL_COMPILED, ImagenVariant
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
        # So small that launching a step kernel by kernel may take longer than the step.
        ("quickstart-base@16", Recipe().batch_sizes[0], eager, 1),
        ("laptop-base@64", 16, eager, 1),
        ("Base@64", 16, eager, 1),
        ("Super@256", 8, eager, 1),
        ("Base@64", 16, (ORIGINAL_COMPILED,), 4),
    ]
    if profile == "full":
        calls += [("laptop-base@64", 16, (ORIGINAL_COMPILED,), 5), ("Super@256", 8, (ORIGINAL_COMPILED,), 5)]
    return calls


def _plan(
    name: str,
    batch: int,
    variant: ImagenVariant,
    priority: int,
    device: torch.device,
    profile: str,
    *,
    suffix: str = "",
    threads: int | None = None,
) -> Plan:
    network = NETWORKS[name]

    def prepared(variant: ImagenVariant):
        return functools.partial(prepare, network, variant, batch, threads=threads)

    identity = Identity("training", name, "both", network.shape(batch) + suffix, "float32", variant.name)
    beside = beside_original(variant, ORIGINAL, device, prepared)
    # Ours, too, where times count: what a process did before, to check it, is seen in how long a short step takes.
    apart = runs_apart(variant, device) or (device.type == "cpu" and profile != "smoke")
    return Plan(identity, prepared(variant), priority, variant.seconds(device), apart, beside)


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    for name, batch, variants, priority in _calls(profile, device.type):
        for variant in variants:
            yield _plan(name, batch, variant, priority, device, profile)
    if device.type == "cpu" and profile != "smoke":
        # As the quickstart trains it most of the time: beside the other U-Net, which has the other half.
        half = max(1, torch.get_num_threads() // 2)
        for variant in EAGER["cpu"][:2]:
            batch = Recipe().batch_sizes[0]
            yield _plan(
                "quickstart-base@16", batch, variant, 0, device, profile, suffix="-half-the-threads", threads=half
            )


def test_training(plan, harness, benchmark):
    harness.run(plan, benchmark)
