"""Pictures from text by the whole cascade, with guidance: how many a second, and how soon the first."""

import functools
from collections.abc import Iterator

import pytest
import torch

from .cascades import Cascade, prepare
from .denoisers import runs_apart
from .harness import CLOCK, Plan
from .imagens import COMPILED_PEERS, EAGER, ImagenVariant
from .results import Identity

pytestmark = pytest.mark.benchmark(timer=CLOCK)

# With 20 steps, the fewest, the original package makes NaN.
FEW = 25


def _calls(profile: str, device: str) -> list[tuple[Cascade, int, tuple[ImagenVariant, ...], int]]:
    """Cascade, batch, variants, priority."""
    eager = EAGER[device]
    if profile == "smoke":
        return [(Cascade.of("tiny", ("tiny-base@16", "tiny-super@32"), FEW), 1, eager[:2], 2)]
    if device == "cpu":
        return [(Cascade.of("quickstart", ("quickstart-base@16", "quickstart-super@32"), FEW), 1, eager, 2)]
    laptop, large = ("laptop-base@64", "laptop-super@128"), ("Base@64", "Super@256")
    few = Cascade.of("laptop", laptop, FEW)
    calls = [(few, 1, eager, 1), (few, 16, eager, 1), (Cascade.of("Base+Super", large, FEW), 1, eager, 1)]
    if profile == "full":
        calls += [
            (Cascade.of("Base+Super", large, FEW), 1, COMPILED_PEERS[device], 4),
            (Cascade.of("laptop", laptop, 1000), 1, eager, 5),
            (Cascade.of("Base+Super", large, 1000), 1, eager, 5),
            (Cascade.of("Base+Super", large, FEW), 8, eager, 5),
        ]
    return calls


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    for cascade, batch, variants, priority in _calls(profile, device.type):
        for variant in variants:
            identity = Identity("sampling", cascade.name, None, cascade.shape(batch), "float32", variant.name)
            prepared = functools.partial(prepare, cascade, variant, batch)
            apart = runs_apart(variant, device)
            yield Plan(identity, prepared, priority, variant.seconds(device), apart)


def test_sampling(plan, harness, benchmark):
    harness.run(plan, benchmark)
