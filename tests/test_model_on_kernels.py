"""The model calls the kernels, and on the Triton path nothing that they are to replace."""

import math

import pytest
import torch
from fast_path import make_imagen, make_super, make_unet, make_words
from torch.utils._python_dispatch import TorchDispatchMode

from minimagen_fast.Imagen import Imagen
from minimagen_fast.kernels import use_implementation
from minimagen_fast.plan_autocast import autocast_as_on_cuda
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


def kept_images(make, implementation):
    """Shapes of the activations of a level's images that a training step under autocast keeps, by dtype."""
    imagen = make_imagen(unets=[make_unet(), make_super(dim=32)] if make is make_super else [make_unet(dim=32)])
    imagen.to("meta").accelerate(memory_format="channels_last")
    unet, side = imagen.unets[-1], imagen.image_sizes[-1]
    parameters, kept = {id(parameter) for parameter in unet.parameters()}, {}
    # The smallest, 64 channels at the lower level; what is kept besides, such as statistics of norms, has fewer values.
    smallest = 64 * (side // 2 if make is make_unet else side // 4) ** 2

    def keep(tensor):
        tokens_of_text = 258 in tensor.shape or 260 in tensor.shape
        if id(tensor) not in parameters and not tokens_of_text and math.prod(tensor.shape[1:]) >= smallest:
            kept.setdefault(tensor.dtype, []).append(tuple(tensor.shape))
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with use_implementation(implementation), autocast_as_on_cuda(unet, torch.bfloat16), hooks:
        imagen(torch.empty(2, 3, side, side, device="meta"), **make_words(device="meta"), unet_number=len(imagen.unets))
    return kept


@pytest.mark.parametrize("make", [make_unet, make_super])
def test_no_float32_image_is_kept_for_the_backward_pass_under_autocast(make):
    kept = kept_images(make, "triton")
    assert len(kept[torch.bfloat16]) > 50 and kept.get(torch.float32) is None, kept
    # What is looked for is what plain torch keeps.
    assert len(kept_images(make, "reference")[torch.float32]) > 10
