"""What only a CUDA device can show of the kernels. The parity tests of each kernel run on it too: kernel_parity.py."""

import time

import pytest
import torch
from kernel_parity import randn

from minimagen_fast.kernels import (
    channel_layer_norm,
    group_norm_silu,
    launch,
    layer_norm,
    null_key_attention,
    q_sample,
    use_implementation,
)
from minimagen_fast.Unet import Unet

pytestmark = pytest.mark.gpu


def image(name, *shape, dtype=torch.bfloat16):
    return randn(name, *shape, dtype=dtype).to(memory_format=torch.channels_last)


def _group_norm_silu(device="cuda"):
    x, skip = image("x", 2, 64, 32, 32).to(device), image("skip", 2, 32, 32, 32).to(device)
    weight, bias = randn("weight", 96).to(device), randn("bias", 96).to(device)
    scale, shift = randn("scale", 2, 96).to(device), randn("shift", 2, 96).to(device)
    inputs = dict(x=x, skip=skip, weight=weight, bias=bias, scale=scale, shift=shift)
    return lambda **given: group_norm_silu(groups=8, skip_scale=2**-0.5, implementation="triton", **given), inputs


def _attention(device="cuda"):
    q, k, v = (
        randn(n, 2, rows, 512, dtype=torch.bfloat16).to(device) for n, rows in (("q", 256), ("k", 261), ("v", 261))
    )
    inputs = dict(q=q, k=k, v=v, null_key=randn("null", 64).to(device), null_value=randn("value", 64).to(device))
    return lambda **given: null_key_attention(heads=8, implementation="triton", **given), inputs


def _layer_norm(device="cuda"):
    inputs = dict(x=randn("x", 2, 256, 128, dtype=torch.bfloat16).to(device), gain=randn("gain", 128).to(device))
    return lambda **given: layer_norm(implementation="triton", **given), inputs


def _channel_layer_norm(device="cuda"):
    inputs = dict(x=image("x", 2, 128, 16, 16).to(device), gain=randn("gain", 1, 128, 1, 1).to(device))
    return lambda **given: channel_layer_norm(gelu=True, implementation="triton", **given), inputs


def _q_sample(device="cuda"):
    x, noise = randn("x", 3, 3, 32, 32).to(device), randn("noise", 3, 3, 32, 32).to(device)
    t = torch.tensor([0, 5, 9], device=device)
    a, b = torch.rand(10, device=device), torch.rand(10, device=device)
    return lambda x_start, noise: q_sample(x_start, t, noise, a, b, implementation="triton"), dict(
        x_start=x, noise=noise
    )


CASES = [_group_norm_silu, _attention, _layer_norm, _channel_layer_norm, _q_sample]
case = pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__[1:])


def run(operation, inputs):
    """The output and all gradients."""
    given = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = operation(**given)
    out.backward(randn("cotangent", *out.shape).to(out))
    return [out.detach(), *(value.grad for value in given.values())]


def assert_identical(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@case
def test_two_runs_are_bit_identical(make):
    operation, inputs = make()
    assert_identical(run(operation, inputs), run(operation, inputs))


@case
def test_on_another_stream(make):
    operation, inputs = make()
    expected = run(operation, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What the stream does first keeps it busy: a kernel that starts on the default one would not wait for it.
        torch.cuda._sleep(100_000_000)
        late = {name: value + 0 for name, value in inputs.items()}
        actual = run(operation, late)
    stream.synchronize()
    assert_identical(actual, expected)


@case
def test_in_a_cuda_graph(make):
    operation, inputs = make()
    with torch.no_grad():
        expected = operation(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = operation(**inputs)
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, expected)


@case
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one(make):
    assert torch.cuda.current_device() == 0
    expected = [tensor.cpu() for tensor in run(*make("cuda:0"))]
    actual = [tensor.cpu() for tensor in run(*make("cuda:1"))]
    assert_identical(actual, expected)
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 48 * 2**30,
    reason="needs 48 GiB of device memory",
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_offsets_beyond_32_bits(memory_format):
    x = torch.empty(9, 256, 1024, 1024, dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    assert x.numel() > 2**31
    x.normal_(generator=torch.Generator("cuda").manual_seed(0))
    weight, bias = randn("weight", 256), randn("bias", 256)
    for operation in (
        lambda x: group_norm_silu(x, weight, bias, groups=8),
        lambda x: channel_layer_norm(x, weight),
    ):
        with torch.no_grad(), use_implementation("triton"):
            last = operation(x)[-1:].clone()
            assert torch.equal(last, operation(x[-1:]))


def test_attention_memory_grows_with_the_queries_and_not_with_their_square():
    peaks = []
    for n in (4096, 8192):
        q, k, v = (randn(name, 1, n, width, dtype=torch.bfloat16) for name, width in (("q", 512), ("k", 64), ("v", 64)))
        null = randn("null", 64)
        q.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = null_key_attention(q, k, v, null, null, heads=8, implementation="triton")
        out.backward(out.detach())
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del q, k, v, out
    assert peaks[1] < 2.2 * peaks[0]


def test_error_in_bf16_is_no_larger_than_that_of_the_reference():
    torch.manual_seed(0)
    unet = Unet(dim=64, layer_cross_attns=True, attend_at_middle=True).cuda().to(memory_format=torch.channels_last)
    x = image("x", 4, 3, 32, 32, dtype=torch.float32)
    condition = dict(time=torch.tensor([0, 10, 500, 999], device="cuda"), text_embeds=randn("text", 4, 20, 512))
    with torch.no_grad():
        with use_implementation("reference"):
            exact = unet.double()(
                x.double(), **{k: v.double() if v.is_floating_point() else v for k, v in condition.items()}
            )
        unet.float()
        errors = {}
        for name in ("reference", "triton"):
            with use_implementation(name), torch.autocast("cuda", torch.bfloat16):
                errors[name] = (unet(x, **condition).double() - exact).square().mean().sqrt().item()
    assert errors["triton"] <= 1.5 * errors["reference"], errors


def test_host_time_of_a_call_over_a_bare_launch():
    x, gain = randn("x", 8, 64), randn("gain", 64)
    with torch.no_grad(), launch.record() as launches:
        layer_norm(x.to("meta"), gain.to("meta"), implementation="triton")
    (bare,) = launches
    args = [torch.empty_like(arg, device="cuda") if isinstance(arg, torch.Tensor) else arg for arg in bare.args]
    options = dict(num_warps=bare.num_warps, num_stages=bare.num_stages, **bare.constexprs)

    def microseconds(call, times=2000):
        best = float("inf")
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(times):
                call()
            best = min(best, (time.perf_counter() - start) / times * 1e6)
        return best

    with torch.no_grad():
        ours = microseconds(lambda: layer_norm(x, gain, implementation="triton"))
        alone = microseconds(lambda: bare.kernel[bare.grid](*args, **options))
    assert ours - alone < 15, (ours, alone)
