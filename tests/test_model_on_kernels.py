"""The model calls the kernels, and on the Triton path nothing that they are to replace."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minimagen_fast.Imagen import Imagen
from minimagen_fast.kernels import use_implementation
from minimagen_fast.Unet import BaseTest

REPLACED = ("group_norm", "softmax", "scaled_dot_product", "quantile", "sort", "kthvalue", "gelu")


class Operators(TorchDispatchMode):
    """Collects the names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def small_imagen():
    """On the meta device, where operators have shapes and names and take no time."""
    torch.manual_seed(0)
    attending = {"layer_attns": (False, True), "layer_cross_attns": True, "attend_at_middle": True}
    return Imagen(BaseTest(**attending), text_encoder_name="t5_small", image_sizes=8, timesteps=20).to("meta")


@pytest.fixture
def words():
    return dict(
        text_embeds=torch.empty(1, 4, 512, device="meta"), text_masks=torch.empty(1, 4, dtype=torch.bool, device="meta")
    )


def replaced(names):
    return sorted(name for name in names if name.startswith("aten.") and any(part in name for part in REPLACED))


def test_training_on_triton_uses_none_of_what_the_kernels_replace(words):
    imagen = small_imagen()
    with use_implementation("triton"), Operators() as seen:
        imagen(torch.empty(1, 3, 8, 8, device="meta"), **words).backward()
    assert replaced(seen.names) == []
    families = ("group_norm_silu", "null_key", "mix", "layer_norm", "channel_layer_norm")
    for family in families:
        ours = [name for name in seen.names if name.startswith("minimagen_fast.") and family in name]
        assert any("backward" in name for name in ours) or family == "mix", (family, sorted(seen.names))
        assert any("backward" not in name for name in ours), family


def test_sampling_on_triton_uses_none_of_what_the_kernels_replace(words):
    imagen = small_imagen()
    with use_implementation("triton"), Operators() as seen:
        imagen.sample(**words, cond_scale=2.0, progress=False)
    assert replaced(seen.names) == []


def test_the_reference_is_seen_to_use_them(words):
    # Keeps the lists above honest: what they look for is what plain torch runs.
    imagen = small_imagen()
    with use_implementation("reference"), Operators() as seen:
        imagen(torch.empty(1, 3, 8, 8, device="meta"), **words).backward()
        imagen.sample(**words, cond_scale=2.0, progress=False)
    found = replaced(seen.names)
    for part in ("group_norm", "softmax", "gelu"):
        assert any(part in name for name in found), part
    assert any(part in name for name in found for part in ("quantile", "sort", "kthvalue"))
