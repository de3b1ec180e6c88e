"""One step of a sampling, with guidance: what the fast path is there for."""

import functools
from collections.abc import Iterator

import pytest
import torch

from .denoisers import NETWORKS, Network, beside_original, runs_apart
from .harness import CLOCK, Plan
from .imagens import COMPILED_PEERS, EAGER, ORIGINAL, OURS_COMPILED, ImagenVariant
from .results import Identity
from .sampling_steps import prepare

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def _calls(profile: str, device: str) -> list[tuple[str, int, tuple[ImagenVariant, ...], int]]:
    """Network, images, variants, priority."""
    if profile == "smoke":
        return [("tiny-base@16", 1, EAGER[device], 0), ("tiny-super@32", 2, EAGER[device], 0)]
    if device == "cpu":
        return [
            ("cpu-base@64", 1, EAGER[device], 0),
            ("cpu-base@64", 4, EAGER[device], 0),
            ("cpu-base@64", 1, (OURS_COMPILED,), 1),
            ("cpu-base@64", 4, (OURS_COMPILED,), 1),
            # Takes as long as half of the profile.
            ("cpu-base@64", 1, COMPILED_PEERS[device], 7),
        ]
    # Eight images say most: neither is the host what is slow, nor does one network take all the time.
    return [
        (name, batch, variants, priority)
        for batch, first in ((8, 0), (1, 1), (32, 2))
        for name in ("Base@64", "Super@256")
        for variants, priority in ((EAGER[device], first), (COMPILED_PEERS[device], first + 3))
    ]


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    for name, batch, variants, priority in _calls(profile, device.type):
        network = NETWORKS[name]
        for variant in variants:
            identity = Identity("sampling-step", name, None, network.shape(batch), "float32", variant.name)

            def prepared(variant: ImagenVariant, network: Network = network, batch: int = batch):
                return functools.partial(prepare, network, variant, batch)

            beside = beside_original(variant, ORIGINAL, device, prepared)
            apart = runs_apart(variant, device)
            yield Plan(identity, prepared(variant), priority, variant.seconds(device), apart, beside)


def test_sampling_step(plan, harness, benchmark):
    harness.run(plan, benchmark)
