"""The memory of a plan against that of real training steps."""

import functools
import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plan_runs import SMALL, SMALL_SUPER, measured_peak
from torch._subclasses.fake_tensor import FakeTensorMode

from minimagen_fast.kernels import conv1x1_concat, null_key_cross_attention
from minimagen_fast.kernels.upsample_conv import summed_kernel
from minimagen_fast.plan_autocast import autocast_as_on_cuda
from minimagen_fast.plan_memory import largest_batch, memory
from minimagen_fast.plan_setup import Setup
from minimagen_fast.plan_trace import trace
from minimagen_fast.plan_unet import units
from minimagen_fast.ranks import Ranks

WIDE = replace(SMALL, name="wide@8", settings={**SMALL.settings, "dim": 64}, side=8)


# What is compared: the most bytes that torch's CPU allocator has given out in two whole steps of training (forward,
# backward, clipping, fused Adam, average), weights included, with the peak that the plan gives for the same. The plan
# sees neither the rest of the cascade nor its own small buffers, hence less than all.
@pytest.mark.parametrize(
    "network, options",
    [
        (SMALL, {"batch": 8, "precision": "float32", "ema": True}),
        (SMALL, {"batch": 2, "checkpoint_levels": (0, 1, 2), "accumulate": 2, "ema": True}),
        (SMALL, {"batch": 1, "accumulate": 2}),
        (SMALL_SUPER, {"batch": 6, "checkpoint_levels": (0,)}),
        (SMALL_SUPER, {"batch": 2, "precision": "float32", "ema": True}),
        # Few activations: what a recording has at its end counts, all its gradients beside those of the batch before.
        (WIDE, {"batch": 1, "accumulate": 2, "precision": "float32"}),
    ],
    ids=lambda value: getattr(value, "name", None) or "-".join(value),
)
def test_the_peak_is_that_of_a_real_training(network, options):
    setup = Setup(network, device="cpu", **options)
    assert memory(setup, "ddp").peak == pytest.approx(measured_peak(setup, Ranks()), rel=0.05)


@pytest.mark.parametrize("network", [SMALL, SMALL_SUPER], ids=lambda network: network.name)
@pytest.mark.parametrize("gradients", ["kept", "grown"])
@pytest.mark.parametrize("levels", [(), (0, 1)])
def test_on_a_card_two_batch_sizes_tell_all_others(network, gradients, levels):
    options = {"checkpoint_levels": levels, "gradients": gradients}
    linear = trace(network, **options)
    for batch in (4, 7):
        exact = trace(network, batch=batch, **options)
        assert linear.peak(batch) == exact.peak(batch)
        assert linear.kept_per_image * batch + linear.copies == exact.kept_per_image * batch


def test_no_address_is_asked_of_tensors_without_values(recwarn):
    trace(SMALL, batch=1, precision=torch.float32, device="cpu")
    assert not recwarn.list


def test_what_is_computed_twice_keeps_less():
    kept = [trace(SMALL, checkpoint_levels=levels).kept_per_image for levels in ((), (0,), (0, 1, 2))]
    assert kept[0] > 1.2 * kept[1] > 1.2 * 1.2 * kept[2]


def test_no_attention_matrix_is_kept_on_a_card():
    # Four times the pixels would be sixteen times the scores.
    small, large = (trace(replace(SMALL, side=side)).kept_per_image for side in (32, 64))
    assert large < 4.2 * small


def test_weights_in_float32_leave_copies_behind():
    parameters = dict(SMALL.imagen()[1].named_parameters())
    # What the convolution of an enlargement keeps are 16 sums of its weights, in place of 9 weights.
    sums = sum(
        2 * p.numel() * 16 // 9 for name, p in parameters.items() if re.fullmatch(r"ups\.\d\.3\.1\.weight", name)
    )
    matrices = sum(
        2 * p.numel()
        for name, p in parameters.items()
        # Biases and weights of convolutions and linear layers; gains of norms are not converted.
        if "norm" not in name and "null" not in name and not name.endswith((".g", "gamma"))
    )
    assert trace(SMALL).copies == pytest.approx(matrices + sums * 7 / 16, rel=0.02)
    assert sums and trace(SMALL, weights=torch.bfloat16).copies == pytest.approx(sums, rel=0.01)
    # Those of blocks that are computed again are made again; what is left are downsampling and upsampling.
    assert trace(SMALL, checkpoint_levels=(0, 1, 2)).copies < 0.5 * matrices


CALLS = {
    "convolution": lambda new: F.conv2d(new(2, 8, 4, 4), new(6, 8, 3, 3), new(6)),
    "linear": lambda new: F.linear(new(2, 4), new(3, 4)),
    "matmul": lambda new: new(2, 3, 4) @ new(2, 4, 3),
    "einsum": lambda new: torch.einsum("b n d, b m d -> b n m", new(2, 3, 4), new(2, 5, 4)),
    "layer norm": lambda new: F.layer_norm(new(2, 4, dtype=torch.bfloat16), (4,), new(4), new(4)),
    "group norm": lambda new: torch.group_norm(new(2, 4, 3, 3, dtype=torch.bfloat16), 2, new(4), new(4)),
    "softmax": lambda new: new(2, 4, dtype=torch.bfloat16).softmax(dim=-1),
    "gelu": lambda new: F.gelu(new(2, 4, dtype=torch.bfloat16)),
    "silu": lambda new: F.silu(new(2, 4)),
    "sum": lambda new: new(2, 4, dtype=torch.bfloat16) + new(2, 4),
    "concatenation": lambda new: torch.cat((new(2, 4, dtype=torch.bfloat16), new(2, 4))),
    "choice": lambda new: torch.where(new(2, 4, dtype=torch.bool), new(2, 4, dtype=torch.bfloat16), new(2, 4)),
    "mean": lambda new: new(2, 4, dtype=torch.bfloat16).mean(dim=1),
    "convolution of two images": lambda new: conv1x1_concat(
        new(2, 8, 4, 4, dtype=torch.bfloat16), new(2, 4, 4, 4), new(6, 12, 1, 1), new(6)
    ),
    "convolution with sums of weights": lambda new: F.conv2d(
        new(2, 4, 4, 4, dtype=torch.bfloat16), summed_kernel(new(6, 4, 3, 3)), new(6).repeat(4)
    ),
    "cross attention": lambda new: null_key_cross_attention(
        new(2, 5, 8, dtype=torch.bfloat16),
        new(2, 3, 4),
        *(new(128, 8), new(256, 4), new(8, 128)),
        *(new(64), new(64)),
        heads=2,
        implementation="sdpa",
    ),
}


@contextmanager
def autocast_of_cuda():
    # torch.autocast itself refuses where there is no such device.
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
        torch.clear_autocast_cache()


class Calling(torch.nn.Module):
    """Calls a function, and has blocks like a U-Net."""

    downs = ups = ()
    mid_block1 = mid_attn = mid_block2 = final_res_block = None

    def forward(self, call, new):
        return call(new)


@pytest.mark.parametrize("call", CALLS)
def test_autocast_does_what_that_of_cuda_does(call):
    module = Calling()
    with autocast_as_on_cuda(module, torch.bfloat16), torch.no_grad():
        ours = module(CALLS[call], functools.partial(torch.empty, device="meta"))
    with FakeTensorMode(), autocast_of_cuda(), torch.no_grad():
        theirs = CALLS[call](functools.partial(torch.empty, device="cuda"))
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape


def test_sharding_divides_the_states():
    setup = Setup(SMALL, 1, gpus=16, ema=True)
    numel = sum(unit.numel for unit in units(SMALL)[0])
    whole, eighth, sixteenth = (memory(setup, how) for how in ("ddp", "hybrid", "fsdp"))
    assert whole.weights == whole.averages == 4 * numel and whole.optimizer == 8 * numel
    for found, shards in ((eighth, 8), (sixteenth, 16)):
        assert 4 * numel / shards <= found.weights < 1.15 * 4 * numel / shards
        assert found.optimizer == 2 * found.weights == 2 * found.averages
    # Of a parameter with fewer rows than there are ranks some hold a row and others nothing.
    assert memory(Setup(SMALL, 1, gpus=1024), "fsdp").weights > 3 * 4 * numel / 1024


def test_the_largest_batch_is_the_last_that_fits():
    setup = Setup(SMALL, 1, gpus=8)
    for how in ("ddp", "fsdp"):
        available = memory(Setup(SMALL, 37, gpus=8), how).most
        assert largest_batch(setup, how, available) == 37
        assert largest_batch(setup, how, available - 1) == 36
        assert largest_batch(setup, how, 1e6) == 0
