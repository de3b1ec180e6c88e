"""What only a CUDA device can show of the kernels. The parity tests of each kernel run on it too: kernel_parity.py."""

from functools import partial

import pytest
import torch
from kernel_parity import randn

from minimagen_fast.diffusion_model import GaussianDiffusion
from minimagen_fast.kernels import (
    ancestral_step,
    channel_layer_norm,
    conv1x1_concat,
    ddim_step,
    dpm_solver_pp_2m_step,
    group_norm_silu,
    layer_norm,
    null_key_attention,
    predict_start_from_noise,
    q_posterior_mean,
    q_sample,
    upsample_conv3x3,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def deterministic_convolutions(monkeypatch):
    """A 1x1 convolution of planes is cuDNN's, which has to be asked."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


LAST, PLANES = torch.channels_last, torch.contiguous_format


def image(name, *shape, dtype=torch.bfloat16, memory_format=LAST):
    return randn(name, *shape, dtype=dtype).to(memory_format=memory_format)


def _group_norm_silu(device="cuda", memory_format=LAST, side=32):
    x, skip = (
        image(name, 2, c, side, side, memory_format=memory_format).to(device) for name, c in (("x", 64), ("skip", 32))
    )
    weight, bias = randn("weight", 96).to(device), randn("bias", 96).to(device)
    scale, shift = randn("scale", 2, 96).to(device), randn("shift", 2, 96).to(device)
    inputs = dict(x=x, skip=skip, weight=weight, bias=bias, scale=scale, shift=shift)
    return lambda **given: group_norm_silu(groups=8, skip_scale=2**-0.5, implementation="triton", **given), inputs


def _group_norm_silu_of_planes(device="cuda"):
    return _group_norm_silu(device, PLANES)


def _group_norm_silu_in_a_loop(device="cuda"):
    return _group_norm_silu(device, PLANES, side=48)


def _group_norm_silu_in_many_parts(device="cuda"):
    return _group_norm_silu(device, PLANES, side=160)


def _group_norm_silu_with_bias(device="cuda", side=8):
    operation, inputs = _group_norm_silu(device, side=side)
    del inputs["skip"]
    inputs = {name: value if name == "x" else value[..., :64] for name, value in inputs.items()}
    return operation, inputs | {"x_bias": randn("x_bias", 64).to(device)}


def _group_norm_silu_with_bias_in_many_parts(device="cuda"):
    return _group_norm_silu_with_bias(device, side=160)


def _conv1x1_concat(device="cuda", memory_format=LAST):
    x, skip = (image(name, 2, c, 16, 16, memory_format=memory_format).to(device) for name, c in (("x", 64), ("s", 32)))
    weight, bias = randn("weight", 64, 96, 1, 1).bfloat16().to(device), randn("bias", 64).bfloat16().to(device)
    return partial(conv1x1_concat, skip_scale=2**-0.5), dict(x=x, skip=skip, weight=weight, bias=bias)


def _conv1x1_concat_of_planes(device="cuda"):
    return _conv1x1_concat(device, PLANES)


def _upsample_conv3x3(device="cuda", memory_format=LAST):
    x = image("x", 2, 64, 16, 16, memory_format=memory_format).to(device)
    weight = image("weight", 32, 64, 3, 3, memory_format=memory_format).to(device)
    return upsample_conv3x3, dict(x=x, weight=weight, bias=randn("bias", 32).bfloat16().to(device))


def _upsample_conv3x3_of_planes(device="cuda"):
    return _upsample_conv3x3(device, PLANES)


def _attention(device="cuda", shared=False, n=256, implementation="triton"):
    width = 64 if shared else 512
    q, k, v = (
        randn(name, 2, rows, columns, dtype=torch.bfloat16).to(device)
        for name, rows, columns in (("q", n, 512), ("k", 261, width), ("v", 261, width))
    )
    inputs = dict(q=q, k=k, v=v, null_key=randn("null", 64).to(device), null_value=randn("value", 64).to(device))
    return partial(null_key_attention, heads=8, implementation=implementation), inputs


def _attention_with_shared_keys(device="cuda"):
    return _attention(device, shared=True)


def _attention_of_the_library(device="cuda"):
    return _attention(device, implementation="sdpa_merge")


def _attention_of_the_library_with_shared_keys(device="cuda"):
    return _attention(device, shared=True, implementation="sdpa_merge")


def _attention_by_default(device="cuda"):
    return _attention(device, shared=True, implementation="auto")


def _layer_norm(device="cuda"):
    inputs = dict(x=randn("x", 2, 256, 128, dtype=torch.bfloat16).to(device), gain=randn("gain", 128).to(device))
    return partial(layer_norm, implementation="triton"), inputs


def _channel_layer_norm(device="cuda", memory_format=LAST, c=128):
    x = image("x", 2, c, 16, 16, memory_format=memory_format).to(device)
    return partial(channel_layer_norm, gelu=True, implementation="triton"), dict(
        x=x, gain=randn("gain", 1, c, 1, 1).to(device)
    )


def _channel_layer_norm_of_planes(device="cuda"):
    return _channel_layer_norm(device, PLANES)


def _channel_layer_norm_of_many_planes(device="cuda"):
    return _channel_layer_norm(device, PLANES, c=2048)


def _mixture(device, function, first, second, **options):
    """An operation of two images and one pair of constants for each."""
    inputs = {name: randn(name, 3, 3, 32, 32).to(device) for name in (first, second)}
    a, b = torch.linspace(0.1, 1, 10, device=device), torch.linspace(1, 0.2, 10, device=device)
    t = torch.tensor([0, 5, 9], device=device)

    def operation(**given):
        return function(given[first], t, given[second], a, b, implementation="triton", **options)

    return operation, inputs


def _q_sample(device="cuda"):
    return _mixture(device, q_sample, "x_start", "noise")


def _q_sample_in_another_format(device="cuda"):
    return _mixture(device, q_sample, "x_start", "noise", normalize=True, dtype=torch.bfloat16, memory_format=LAST)


def _predict_start(device="cuda"):
    return _mixture(device, predict_start_from_noise, "x_t", "noise")


def _q_posterior(device="cuda"):
    def mean(x_start, t, x_t, a, b, implementation):
        return q_posterior_mean(x_start, x_t, t, a, b, implementation=implementation)

    return _mixture(device, mean, "x_start", "x_t")


def _sampling(side, device):
    """A process of 20 steps, images on their way through it, and what a step is given besides."""
    inputs = {name: randn(name, 2, 3, side, side).to(device) for name in ("x_t", "pred", "third")}
    return GaussianDiffusion(timesteps=20).to(device), inputs, torch.tensor([3, 15], device=device)


def _alphas(process):
    return process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod


def _ancestral_step(device="cuda", side=16):
    process, inputs, t = _sampling(side, device)
    schedules = (
        process.sqrt_recip_alphas_cumprod,
        process.sqrt_recipm1_alphas_cumprod,
        process.posterior_mean_coef1,
        process.posterior_mean_coef2,
        process.posterior_log_variance_clipped,
    )

    def step(x_t, pred, third):
        return ancestral_step(x_t, t, pred, third, *schedules, percentile=0.9, implementation="triton")

    return step, inputs


def _ancestral_step_in_several_launches(device="cuda"):
    return _ancestral_step(device, side=128)


def _ddim_step(device="cuda", side=16):
    process, inputs, t = _sampling(side, device)
    before = t // 2

    def step(x_t, pred, third):
        options = dict(percentile=0.9, eta=0.5, noise=third, implementation="triton")
        return ddim_step(x_t, t, before, pred, *_alphas(process), **options)

    return step, inputs


def _ddim_step_in_several_launches(device="cuda"):
    return _ddim_step(device, side=128)


def _dpm_solver_step(device="cuda", side=16):
    process, inputs, t = _sampling(side, device)
    before, after = t // 2, t + 2

    def step(x_t, pred, third):
        options = dict(percentile=0.9, last_x_start=third, t_last=after, implementation="triton")
        # Both results as one tensor.
        return torch.stack(dpm_solver_pp_2m_step(x_t, t, before, pred, *_alphas(process), **options))

    return step, inputs


def _dpm_solver_step_in_several_launches(device="cuda"):
    return _dpm_solver_step(device, side=128)


def run(operation, inputs):
    """The output and all gradients."""
    given = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = operation(**given)
    # Nothing here comes from the host or belongs to a stream, so that a graph can hold it.
    return [out.detach(), *torch.autograd.grad(out, list(given.values()), out.detach().flip(0))]


def run_deterministically(operation, inputs):
    """The same where torch is told that all runs are to be alike."""
    torch.use_deterministic_algorithms(True)
    try:
        return run(operation, inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def forward(operation, inputs):
    with torch.no_grad():
        return [operation(**inputs)]


# Of these the library adds up the queries' gradient in any order, unless told not to.
LIBRARIES = [_attention_of_the_library, _attention_of_the_library_with_shared_keys]
CASES = [
    _group_norm_silu,
    _group_norm_silu_of_planes,
    _group_norm_silu_in_a_loop,
    _group_norm_silu_in_many_parts,
    _conv1x1_concat,
    _conv1x1_concat_of_planes,
    _upsample_conv3x3,
    _upsample_conv3x3_of_planes,
    _attention,
    _attention_with_shared_keys,
    _attention_by_default,
    _layer_norm,
    _channel_layer_norm,
    _channel_layer_norm_of_planes,
    _channel_layer_norm_of_many_planes,
    _q_sample,
    _q_sample_in_another_format,
    _predict_start,
    _q_posterior,
]
WITHOUT_GRADIENTS = [
    _group_norm_silu_with_bias,
    _group_norm_silu_with_bias_in_many_parts,
    _ancestral_step,
    _ancestral_step_in_several_launches,
    _ddim_step,
    _ddim_step_in_several_launches,
    _dpm_solver_step,
    _dpm_solver_step_in_several_launches,
]
# With how each of them is used.
case = pytest.mark.parametrize(
    "make, use",
    [(make, run) for make in CASES]
    + [(make, run_deterministically) for make in LIBRARIES]
    + [(make, forward) for make in WITHOUT_GRADIENTS],
    ids=lambda value: value.__name__.strip("_"),
)


def assert_identical(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@case
def test_two_runs_are_bit_identical(make, use):
    operation, inputs = make()
    assert_identical(use(operation, inputs), use(operation, inputs))


@case
def test_on_another_stream(make, use):
    operation, inputs = make()
    expected = use(operation, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What the stream does first keeps it busy: a kernel that starts on the default one would not wait for it.
        torch.cuda._sleep(100_000_000)
        late = {name: value + 0 for name, value in inputs.items()}
        actual = use(operation, late)
    stream.synchronize()
    assert_identical(actual, expected)


@case
def test_in_a_cuda_graph(make, use):
    operation, inputs = make()
    use(operation, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = use(operation, inputs)
    for factor in (1.0, 0.5):
        for value in inputs.values():
            value.mul_(factor)
        expected = use(operation, inputs)
        for tensor in captured:
            tensor.fill_(torch.nan)
        graph.replay()
        assert_identical(captured, expected)


@case
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one(make, use):
    assert torch.cuda.current_device() == 0
    expected = [tensor.cpu() for tensor in use(*make("cuda:0"))]
    actual = [tensor.cpu() for tensor in use(*make("cuda:1"))]
    assert_identical(actual, expected)
    assert torch.cuda.current_device() == 0


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
