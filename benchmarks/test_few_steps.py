"""The same pictures, or nearly, in fewer steps: all timesteps of the training against a solver with few."""

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from minimagen_fast.quickstart_training import Recipe

from .cascades import Cascade, prepare
from .harness import CLOCK, Plan
from .imagens import OURS
from .results import Identity

pytestmark = pytest.mark.benchmark(timer=CLOCK)

SAMPLERS = {
    "all-timesteps": {},
    "dpmpp_2m-20": {"sampler": "dpmpp_2m", "steps": 20},
}


def _calls(profile: str, device: str) -> list[tuple[Cascade, int, int]]:
    """Cascade, batch, priority."""
    quickstart = ("quickstart-base@16", "quickstart-super@32")
    if profile == "smoke":
        return [(Cascade.of("tiny", ("tiny-base@16",), 40), 1, 2)]
    if device == "cpu":
        return [(Cascade.of("quickstart", quickstart, Recipe().timesteps), 1, 2)]
    calls = [(Cascade.of("laptop", ("laptop-base@64", "laptop-super@128"), 1000), 1, 2)]
    if profile == "full":
        calls.append((Cascade.of("Base+Super", ("Base@64", "Super@256"), 1000), 1, 4))
    return calls


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    for cascade, batch, priority in _calls(profile, device.type):
        for name, options in SAMPLERS.items():
            identity = Identity("few-steps", cascade.name, None, cascade.shape(batch), "float32", name)
            prepared = functools.partial(prepare, replace(cascade, options=options), OURS, batch)
            yield Plan(identity, prepared, priority, OURS.seconds(device))


def test_few_steps(plan, harness, benchmark):
    harness.run(plan, benchmark)
