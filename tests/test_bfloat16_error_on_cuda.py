"""In bfloat16 a whole U-Net on the kernels is as near to float64 as on the reference path, and so are its gradients."""

from statistics import median

import pytest
import torch
from fast_path import randomise
from kernel_parity import randn

from minimagen_fast.kernels import use_implementation
from minimagen_fast.Unet import Unet

pytestmark = pytest.mark.gpu

# Rounding of their own may cost the kernels this many times the reference's error.
FACTOR = 1.5
BASE = {"layer_attns": (False, True), "attend_at_middle": True}
SUPER = {"memory_efficient": True, "lowres_cond": True, "layer_attns": (False, True), "num_resnet_blocks": (1, 2)}


def relative(ours, exact):
    """The norm of a difference over that of what is exact, both of several tensors together; infinite over zero."""
    wrong = sum((one - other).square().sum().item() for one, other in zip(ours, exact, strict=True))
    right = sum(other.square().sum().item() for other in exact)
    return (wrong / right) ** 0.5 if right else float("inf")


def distances(settings, memory_format, device="cuda", dtype=torch.bfloat16, dim=64, side=32):
    """Of each path under autocast, how far from float64 its output, its parameters' gradients and the image's are.

    Distances are Euclidean, relative to the exact values' norm. Those of parameters are taken of all together, in which
    the largest count, and as the median, in which each does; some are zero but for rounding.
    """
    torch.manual_seed(0)
    unet = randomise(Unet(dim=dim, dim_mults=(1, 2), **settings)).to(device).to(memory_format=memory_format)
    shape = (2, 3, side, side)
    inputs = {"x": randn("x", *shape).to(device, memory_format=memory_format), "text_embeds": randn("text", 2, 20, 512)}
    if unet.lowres_cond:
        inputs["lowres_cond_img"] = randn("lowres", *shape).to(device, memory_format=memory_format)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    times = {"time": torch.tensor([10, 500], device=device)}
    if unet.lowres_cond:
        times["lowres_noise_times"] = torch.tensor([3, 200], device=device)
    cotangent = randn("cotangent", *shape).to(device)

    def results(convert):
        given = {name: convert(value).detach().requires_grad_(name == "x") for name, value in inputs.items()}
        out = unet(**given, **times)
        wanted = [given["x"], *unet.parameters()]
        # In float64 text that is always there leaves the null embeddings without a gradient, or with one of zeros.
        found = torch.autograd.grad(out.double(), wanted, cotangent.double(), allow_unused=True)
        return out.detach().double(), [g if g is None else g.double() for g in found]

    with use_implementation("reference"):
        unet.double()
        exact, exact_gradients = results(torch.Tensor.double)
        unet.float()
    found = {}
    for name in ("reference", "triton"):
        with use_implementation(name), torch.autocast(torch.device(device).type, dtype):
            out, gradients = results(torch.Tensor.float)
        found[name] = {"output": relative([out], [exact])}
        pairs = [(ours, theirs) for ours, theirs in zip(gradients, exact_gradients, strict=True) if theirs is not None]
        image, *parameters = (relative([ours], [theirs]) for ours, theirs in pairs)
        found[name] |= {
            "gradient of the image": image,
            "gradients of the parameters": relative(*zip(*pairs[1:], strict=True)),
            "gradient of a parameter": median(parameters),
        }
    return found


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("settings", [BASE, SUPER], ids=["base", "super"])
def test_error_is_no_larger_than_that_of_the_reference(settings, memory_format):
    found = distances(settings, memory_format)
    for what, error in found["triton"].items():
        assert 0 < error <= FACTOR * found["reference"][what], (what, found)
