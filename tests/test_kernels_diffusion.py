"""Forward process and its inversions: the kernels against plain torch, and plain torch against the model's formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parity import DEVICE, DTYPES, assert_near, check_parity, check_slopes, randn
from torch._dynamo.testing import CompileCounterWithBackend

from minimagen_fast.diffusion_model import GaussianDiffusion
from minimagen_fast.kernels import diffusion, launch

pytestmark = pytest.mark.usefixtures("poisoned")

PROCESS = GaussianDiffusion(timesteps=100).to(DEVICE)
NAMES = {
    diffusion.q_sample: ("x_start", "noise", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    diffusion.predict_start_from_noise: ("x_t", "noise", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    diffusion.q_posterior_mean: ("x_start", "x_t", "posterior_mean_coef1", "posterior_mean_coef2"),
}
OPERATIONS = pytest.mark.parametrize("operation", NAMES, ids=lambda operation: operation.__name__)
FORMATS = [torch.contiguous_format, torch.channels_last]


def inputs_of(operation, x, y, t=None):
    first, second, a, b = NAMES[operation]
    t = torch.arange(len(x), device=DEVICE) * 37 % 100 if t is None else t
    return {first: x, second: y, "t": t, a: getattr(PROCESS, a), b: getattr(PROCESS, b)}


def parity(operation, x, y, *, dtype, t=None, wanted=(True, True), cotangent=None, **options):
    return check_parity(
        lambda **inputs: operation(**inputs, **options, implementation="triton"),
        lambda **inputs: operation(**inputs, **options, implementation="reference"),
        inputs_of(operation, x, y, t),
        dtype=dtype,
        gradients_of=[name for name, wants in zip(NAMES[operation][:2], wanted, strict=True) if wants],
        cotangent=cotangent,
    )


@OPERATIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", [(a, b) for a in FORMATS for b in FORMATS])
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 5, 7, 11), (2, 1, 4, 6), (3, 16, 1, 1), (1, 3, 23, 29)])
def test_parity(operation, dtype, formats, shape):
    x, y = (randn(n, *shape, dtype=dtype).to(memory_format=f) for n, f in zip("xy", formats, strict=True))
    out = parity(operation, x, y, dtype=dtype)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=formats[0])


@OPERATIONS
@pytest.mark.parametrize("n", [1, diffusion.BLOCK - 1, diffusion.BLOCK, diffusion.BLOCK + 1])
def test_sizes_around_a_block(operation, n):
    parity(operation, randn("x", 2, n), randn("y", 2, n), dtype=torch.float32)


VIEWS = {
    "sliced": lambda shape: randn("sliced", shape[0], shape[1] + 2, shape[2], shape[3] * 2)[:, 1:-1, :, ::2],
    "transposed": lambda shape: randn("transposed", shape[0], shape[1], shape[3], shape[2]).transpose(2, 3),
    "batch last": lambda shape: randn("batch last", *shape[1:], shape[0]).permute(3, 0, 1, 2),
    "stride 0": lambda shape: randn("stride 0", 1, shape[1], 1, 1).expand(shape),
    "channels_last": lambda shape: randn("cl", *shape).to(memory_format=torch.channels_last),
    "offset": lambda shape: randn("offset", 1 + torch.Size(shape).numel())[1:].view(shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("operation", [diffusion.q_sample, diffusion.predict_start_from_noise])
def test_views_and_their_gradients(operation, view):
    shape = (2, 3, 5, 4)
    viewed, plain = VIEWS[view](shape), randn("plain", *shape)
    parity(operation, viewed, plain, dtype=torch.float32)
    parity(operation, plain, viewed, dtype=torch.float32)
    parity(operation, plain, plain * 2, dtype=torch.float32, cotangent=lambda out: VIEWS[view](out.shape))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
@OPERATIONS
def test_gradients_of_a_part(operation, wanted):
    parity(operation, randn("x", 2, 3, 4, 4), randn("y", 2, 3, 4, 4), dtype=torch.float32, wanted=wanted)


def both(operation, *args, **options):
    """The operation's result by the kernel, after comparing it closely with that of plain torch in the same dtype."""
    inputs = inputs_of(operation, *args)
    out, expected = (operation(**inputs, **options, implementation=name) for name in ("triton", "reference"))
    assert out.dtype == expected.dtype and out.stride() == expected.stride()
    assert_near(out, expected, dtype="a product and a sum" if out.dtype == torch.float32 else out.dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [None, *FORMATS])
@pytest.mark.parametrize("x_format", FORMATS)
def test_q_sample_normalises_casts_and_reorders(dtype, memory_format, x_format):
    x = randn("x", 2, 3, 6, 5).sigmoid().to(memory_format=x_format)
    noise = randn("y", 2, 3, 6, 5)
    out = both(diffusion.q_sample, x, noise, normalize=True, dtype=dtype, memory_format=memory_format)
    assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format or x_format)
    parity(diffusion.q_sample, x, noise, dtype=torch.float32, normalize=True, memory_format=memory_format)


@pytest.mark.parametrize("channels", [2, 3, 64, 65])
@pytest.mark.parametrize("to", FORMATS)
def test_any_number_of_channels_changes_its_format(to, channels):
    # In blocks of pixels, of which there are fewer the more channels there are; beyond 64 value by value.
    shape = (2, channels, 19, 31 if channels < 4 else 1)
    (other,) = set(FORMATS) - {to}
    x, noise = (randn(name, *shape).to(memory_format=other) for name in "xy")
    out = both(diffusion.q_sample, x, noise, memory_format=to)
    assert torch.equal(out, both(diffusion.q_sample, x.to(memory_format=to), noise.to(memory_format=to)))


def test_reference_is_the_formula_of_the_model():
    x, y, t = randn("x", 4, 3, 8, 8), randn("y", 4, 3, 8, 8), torch.tensor([0, 1, 50, 99], device=DEVICE)
    a, b = (getattr(PROCESS, name)[t].reshape(-1, 1, 1, 1) for name in NAMES[diffusion.q_sample][2:])
    out = diffusion.q_sample(**inputs_of(diffusion.q_sample, x, y, t), normalize=True, implementation="reference")
    assert torch.equal(out, a * (x * 2 - 1) + b * y)
    a, b = (getattr(PROCESS, name)[t].reshape(-1, 1, 1, 1) for name in NAMES[diffusion.predict_start_from_noise][2:])
    out = diffusion.predict_start_from_noise(
        **inputs_of(diffusion.predict_start_from_noise, x, y, t), implementation="reference"
    )
    assert torch.equal(out, a * x - b * y)


@OPERATIONS
def test_one_graph_for_all_timesteps(operation):
    compiled_graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operation, fullgraph=True, backend=compiled_graphs, dynamic=False)
    x, y = randn("x", 2, 3, 4, 4).requires_grad_(), randn("y", 2, 3, 4, 4)
    for t in (0, 41, 99):
        inputs = inputs_of(operation, x, y, torch.full((2,), t, device=DEVICE))
        results = []
        for function in (compiled, operation):
            out = function(**inputs, implementation="triton")
            results.append((out, *torch.autograd.grad(out, x, randn("g", *out.shape))))
        assert all(torch.equal(*each) for each in zip(*results, strict=True))
    assert compiled_graphs.frame_count == 1


@OPERATIONS
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_extreme_values(operation):
    x, y = randn("x", 2, 3, 8, 8), randn("y", 2, 3, 8, 8)
    x[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y[0, 0, 0, 2:4] = torch.tensor([torch.inf, torch.nan])
    both(operation, x, y)
    both(operation, 10_000 + x / 10, y)
    # Some leave float32.
    both(operation, randn("x", 2, 3, 8, 8), randn("y", 2, 3, 8, 8).sign() * 3e38)
    large = torch.full((2, 3, 4, 4), 65504.0, dtype=torch.float16, device=DEVICE)
    assert both(operation, large, -large).isfinite().all()


@OPERATIONS
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_extreme_gradients(operation):
    """Each goes where its value came from, whatever the images hold."""
    x, y = randn("x", 2, 3, 8, 8), randn("y", 2, 3, 8, 8)
    x[0, 1, 0, :2], y[1, 0, 0, :2] = torch.nan, torch.inf

    def cotangent(out):
        gradient = 10_000 + randn("gradient", *out.shape) / 10
        gradient[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        gradient[1] *= 1e30
        return gradient

    parity(operation, x, y, dtype=torch.float32, cotangent=cotangent)
    # Close to the largest of float16, from which a and b take away.
    x, y = (randn(name, 2, 3, 4, 4, dtype=torch.float16) for name in "xy")
    first = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    parity(operation, x, y, dtype=torch.float16, t=first, cotangent=lambda out: torch.full_like(out, 60_000.0))


def test_a_gradient_reaches_noise_that_is_half_as_wide():
    x, noise = randn("x", 2, 3, 8, 8), randn("y", 2, 3, 8, 8, dtype=torch.float16)
    inputs = inputs_of(diffusion.q_sample, x, noise.requires_grad_())
    diffusion.q_sample(**inputs, implementation="triton").backward(randn("g", 2, 3, 8, 8))
    assert noise.grad.dtype == torch.float16 and noise.grad.isfinite().all() and noise.grad.any()


@OPERATIONS
def test_finite_differences(operation):
    inputs = inputs_of(operation, randn("x", 2, 3, 4, 4), randn("y", 2, 3, 4, 4))
    check_slopes(lambda **given: operation(**given, implementation="triton"), inputs, gradients_of=NAMES[operation][:2])


@OPERATIONS
def test_empty_batch(operation):
    x, y = (torch.empty(0, 3, 4, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    out = operation(**inputs_of(operation, x, y), implementation="triton")
    out.sum().backward()
    assert out.shape == x.grad.shape == y.grad.shape == x.shape


def test_timesteps_that_share_memory():
    t = torch.tensor([42], device=DEVICE).expand(3)
    both(diffusion.q_sample, randn("x", 3, 3, 4, 4), randn("y", 3, 3, 4, 4), t)


@OPERATIONS
def test_strided_timesteps_and_schedules(operation):
    inputs = inputs_of(operation, randn("x", 3, 3, 4, 4), randn("y", 3, 3, 4, 4))
    for name in inputs.keys() - set(NAMES[operation][:2]):
        inputs[name] = torch.stack((inputs[name], torch.zeros_like(inputs[name])), dim=1)[:, 0]
    check_parity(
        lambda **given: operation(**given, implementation="triton"),
        lambda **given: operation(**given, implementation="reference"),
        inputs,
        dtype=torch.float32,
        gradients_of=NAMES[operation][:2],
    )


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_images_in_channels_last_memory(implementation):
    several = torch.stack([randn(name, 2, 3, 4, 4).contiguous(memory_format=torch.channels_last) for name in "xy"])

    def noised(x):
        return diffusion.q_sample(**inputs_of(diffusion.q_sample, x, x), implementation=implementation)

    for out, x in zip(torch.vmap(noised)(several), several, strict=True):
        torch.testing.assert_close(out, noised(x))


def test_two_runs_are_bit_identical():
    def run():
        x, y = (randn(name, 2, 3, 40, 40).requires_grad_() for name in "xy")
        out = diffusion.q_sample(**inputs_of(diffusion.q_sample, x, y), implementation="triton")
        out.backward(randn("g", 2, 3, 40, 40))
        return out, x.grad, y.grad

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_launch_whatever_the_formats(dtype):
    x, y = (torch.empty(2, 3, 8, 8, device="meta", requires_grad=True) for _ in range(2))
    t = torch.empty(2, dtype=torch.int64, device="meta")
    a = torch.empty(100, device="meta")
    with launch.record() as launches:
        out = diffusion.q_sample(
            x,
            t,
            y.to(memory_format=torch.channels_last),
            a,
            a,
            normalize=True,
            dtype=dtype,
            memory_format=torch.channels_last,
            implementation="triton",
        )
        out.backward(torch.empty_like(out))
    assert [each.kernel.__name__ for each in launches] == ["_mix_kernel", "_mix_backward_kernel"]


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    formats=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS), st.sampled_from([None, *FORMATS])),
    normalize=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_any_shape_and_format(shape, formats, normalize, scale):
    x, y = (randn(n, *shape, scale=scale).to(memory_format=f) for n, f in zip("xy", formats[:2], strict=True))
    parity(diffusion.q_sample, x, y, dtype=torch.float32, normalize=normalize, memory_format=formats[2])


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    images = (randn(name, 2, 3, 4, 4).requires_grad_(grad) for name in "xy")
    first, second, t, a, b = inputs_of(diffusion.q_sample, *images).values()
    torch.library.opcheck(
        torch.ops.minimagen_fast.mix.default, (first, second, t, a, b, True, True, torch.float32, True)
    )
    torch.library.opcheck(
        torch.ops.minimagen_fast.mix_backward.default,
        (first.detach(), t, a, b, True, True, torch.float32, True, torch.float16, False, True, grad),
    )


def test_wrong_arguments():
    x, y = randn("x", 2, 3, 4, 4), randn("y", 2, 3, 4, 4)
    good = inputs_of(diffusion.q_sample, x, y)

    def refused(error, message, **changed):
        for implementation in ("auto", "triton", "reference"):
            with pytest.raises(error, match=message):
                diffusion.q_sample(**{**good, "implementation": implementation, **changed})

    refused(TypeError, "x_start must be floating point, got torch.int64", x_start=x.long())
    refused(ValueError, r"noise must have the shape of x_start, \(2, 3, 4, 4\); got \(1, 3, 4, 4\)", noise=y[:1])
    refused(TypeError, "t must be int64, got torch.int32", t=good["t"].int())
    refused(ValueError, r"t must hold one timestep for each image, shape \(2,\); got \(1,\)", t=good["t"][:1])
    refused(TypeError, "sqrt_alphas_cumprod must be float32, got torch.float16", sqrt_alphas_cumprod=good["t"].half())
    refused(ValueError, r"must have shape \(T,\)", sqrt_one_minus_alphas_cumprod=torch.ones((), device=DEVICE))
    message = "sqrt_one_minus_alphas_cumprod must have .*, 100 of them like sqrt_alphas_cumprod; got 10"
    refused(ValueError, message, sqrt_one_minus_alphas_cumprod=torch.ones(10, device=DEVICE))
    refused(ValueError, "noise must be on .* it is on meta", noise=y.to("meta"))
    refused(ValueError, "t must be on .* it is on meta", t=good["t"].to("meta"))
    refused(TypeError, "dtype must be a floating-point dtype, got torch.int64", dtype=torch.int64)
    refused(ValueError, "memory_format must be", memory_format=torch.channels_last_3d)
    refused(ValueError, "must be one of auto", implementation="cuda")
    with pytest.raises(ValueError, match="memory_format torch.channels_last needs images of shape"):
        diffusion.q_sample(
            **inputs_of(diffusion.q_sample, x.flatten(1), y.flatten(1)), memory_format=torch.channels_last
        )


def test_what_the_kernel_cannot_do_goes_to_plain_torch():
    x, y = randn("x", 2, 3, 4, 4).double(), randn("y", 2, 3, 4, 4).double()
    inputs = inputs_of(diffusion.q_sample, x, y)
    assert diffusion.q_sample(**inputs).dtype == torch.float64
    with pytest.raises(ValueError, match="'triton' of q_sample cannot be used here: .*not from torch.float64"):
        diffusion.q_sample(**inputs, implementation="triton")


def test_gradcheck_of_the_reference():
    x, y = (randn(name, 2, 3, 2, 2).double().requires_grad_() for name in "xy")
    for operation in NAMES:
        torch.autograd.gradcheck(
            lambda x, y, operation=operation: operation(**inputs_of(operation, x, y), implementation="reference"),
            (x, y),
        )
