"""The model calls the kernels, and on the Triton path nothing that they are to replace."""

import math

import pytest
import torch
from fast_path import make_imagen, make_super, make_unet, make_words
from torch.utils._python_dispatch import TorchDispatchMode

from minimagen_fast.Imagen import Imagen
from minimagen_fast.kernels import use_implementation
from minimagen_fast.layers import CrossEmbedLayer
from minimagen_fast.plan_autocast import autocast_as_on_cuda
from minimagen_fast.Unet import BaseTest, SuperTest

REPLACED = ("group_norm", "softmax", "scaled_dot_product", "quantile", "sort", "kthvalue", "gelu")


class Operators(TorchDispatchMode):
    """Collects the names of all operators that run, and counts how often images are put side by side."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.joined = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        if "aten.cat" in str(func):
            # Of more than a pixel: the gradients of 1x1 convolutions' weights are joined, too.
            self.joined += all(x.ndim == 4 and x.shape[2] == x.shape[3] > 1 for x in args[0])
        return func(*args, **(kwargs or {}))


def small_imagen():
    """Two stages on the meta device, where operators have shapes and names and take no time."""
    attending = {"layer_attns": (False, True), "layer_cross_attns": True, "attend_at_middle": True}
    unets = BaseTest(**attending), SuperTest(lowres_cond=True, layer_cross_attns=True)
    return Imagen(unets, text_encoder_name="t5_small", image_sizes=(8, 16), timesteps=20).to("meta")


@pytest.fixture
def words():
    return dict(
        text_embeds=torch.empty(1, 4, 512, device="meta"), text_masks=torch.empty(1, 4, dtype=torch.bool, device="meta")
    )


def replaced(names):
    return sorted(name for name in names if name.startswith("aten.") and any(part in name for part in REPLACED))


def loss_of(imagen, words, stage):
    return imagen(torch.empty(1, 3, 16, 16, device="meta"), **words, unet_number=stage)


@pytest.mark.parametrize("stage", [1, 2])
def test_training_on_triton_uses_none_of_what_the_kernels_replace(stage, words):
    imagen = small_imagen()
    with use_implementation("triton"), Operators() as seen:
        loss_of(imagen, words, stage).backward()
    assert replaced(seen.names) == []
    families = ["group_norm_silu", "null_key", "mix", "layer_norm"]
    # It stands in the feed-forward networks of the transformers, of which the second stage has none.
    families += ["channel_layer_norm"] if stage == 1 else []
    for family in families:
        ours = [name for name in seen.names if name.startswith("minimagen_fast.") and family in name]
        assert any("backward" in name for name in ours) or family == "mix", (family, sorted(seen.names))
        assert any("backward" not in name for name in ours), family


# Ancestral sampling takes every step; three are the fewest in which the others do all that they do.
@pytest.mark.parametrize("sampler, steps", [("ddpm", None), ("ddim", 3), ("dpmpp_2m", 3)])
def test_sampling_on_triton_uses_none_of_what_the_kernels_replace(sampler, steps, words):
    imagen = small_imagen()
    with use_implementation("triton"), Operators() as seen:
        images = imagen.sample(**words, cond_scale=2.0, sampler=sampler, steps=steps, progress=False)
    assert images.shape == (1, 3, 16, 16)
    assert replaced(seen.names) == []
    assert any(name.startswith("minimagen_fast.sampling_step") for name in seen.names), sorted(seen.names)


@pytest.mark.parametrize("stage", [1, 2])
def test_skips_are_put_beside_images_by_the_reference_alone(stage, words):
    imagen = small_imagen()
    unet = imagen.unets[stage - 1]
    # Of several kernel sizes in the first layer, and the low-resolution image.
    before = sum(isinstance(module, CrossEmbedLayer) for module in unet.modules()) + (stage == 2)
    skips = sum(1 + len(further) for _, further, *_ in unet.ups)
    assert skips > 2
    for implementation, expected in (("triton", before), ("reference", before + skips)):
        with use_implementation(implementation), Operators() as seen:
            loss_of(imagen, words, stage)
        assert seen.joined == expected, implementation


def test_the_reference_is_seen_to_use_them(words):
    # Keeps the lists above honest: what they look for is what plain torch runs.
    imagen = small_imagen()
    with use_implementation("reference"), Operators() as seen:
        loss_of(imagen, words, 1).backward()
        imagen.sample(**words, cond_scale=2.0, steps=2, progress=False)
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
