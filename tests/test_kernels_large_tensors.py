"""The end of tensors with more elements than 32 bits can count, on a card; and of small ones, to try the tests."""

import sys

import pytest
import torch
from kernel_parity import DEVICE, DTYPES, assert_near, hash_of, randn

from minimagen_fast.diffusion_model import GaussianDiffusion
from minimagen_fast.kernels import (
    ancestral_step,
    channel_layer_norm,
    conv1x1_concat,
    ddim_step,
    dpm_solver_pp_2m_step,
    group_norm_looped,
    group_norm_resident,
    group_norm_silu,
    launch,
    null_key_attention,
    predict_start_from_noise,
    q_posterior_mean,
    q_sample,
    sampling_kernels,
    threshold,
    use_implementation,
)

BEYOND = 2**31 + 2**20
# Bfloat16 on a card: 4 GiB a tensor.
HALF = DTYPES[-1]
SMALL = 2**10
NCHW, NHWC = torch.contiguous_format, torch.channels_last
SKIP_SCALE = 2**-0.5
PROCESS = GaussianDiffusion(timesteps=100)


def sizes(names, cases, small=1):
    """All cases with large tensors on a card, the first ones of them everywhere with small tensors, too."""
    given = [(SMALL, *case) for case in cases[:small]]
    given += [pytest.param(BEYOND, *case, marks=pytest.mark.gpu) for case in cases]
    return pytest.mark.parametrize(f"elements, {names}", given, ids=str)


def need(size):
    """Skip where the card has less memory free, in bytes, than that and 4 GiB for what torch and libraries take."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        free, size = torch.cuda.mem_get_info()[0], size + 2**32
        if free < size:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of free device memory, there are {free / 2**30:.0f}")


def filled(name, *shape, dtype=HALF, memory_format=NCHW):
    """Normal values that are made where they are wanted."""
    x = torch.empty(shape, dtype=dtype, device=DEVICE, memory_format=memory_format)
    return x.normal_(generator=torch.Generator(DEVICE).manual_seed(hash_of(name)))


def images_for(elements, *shape):
    """How many images of a shape it takes, at least two."""
    return max(launch.ceil_div(elements, torch.Size(shape).numel()), 2)


def last(x):
    """The last image, in float64."""
    return x[-1:].detach().double() if x.is_floating_point() else x[-1:]


def schedules(*names):
    return {name: getattr(PROCESS, name).to(DEVICE) for name in names}


def times(b):
    return torch.arange(b, device=DEVICE) % 50 + 10


def check_end(operation, images, *, parameters=None, wider=()):
    """The last image's result and gradients among many are those of the reference, given this image alone in float64.

    Args:
        operation: Called with the implementation, ``images`` and ``parameters``.
        images: Tensors of as many rows as there are images.
        parameters: What is the same for all images.
        wider: Reasons for a wider tolerance.
    """
    parameters = parameters or {}
    wanted = [name for name, x in images.items() if x.is_floating_point()]
    given = {name: x.detach().requires_grad_(name in wanted) for name, x in images.items()}
    out = operation("triton", **given, **parameters)
    cotangent = torch.empty_like(out).normal_(generator=torch.Generator(DEVICE).manual_seed(1))
    gradients = torch.autograd.grad(out, [given[name] for name in wanted], cotangent)

    alone = {name: last(x).requires_grad_(name in wanted) for name, x in images.items()}
    exact = {name: x.double() for name, x in parameters.items()}
    expected = operation("reference", **alone, **exact)
    assert_near(out[-1:].detach(), expected.detach(), dtype=HALF, what="output", wider=wider)
    expected_gradients = torch.autograd.grad(expected, [alone[name] for name in wanted], last(cotangent))
    for name, gradient, of_one in zip(wanted, gradients, expected_gradients, strict=True):
        assert_near(gradient[-1:], of_one, dtype=HALF, what=f"gradient of {name}", wider=wider)


# The side of images of 128 channels, and as many of the skip connection, whose groups these kernels take.
SIDES = {"resident": 16, "looped": 64, "split": 128}


@sizes("memory_format, plan", [(layout, plan) for layout in (NHWC, NCHW) for plan in SIDES], small=3)
def test_group_norm_of_two_images_with_scale_and_shift(elements, memory_format, plan, monkeypatch):
    # Both images, both gradients, and twice that of the output and its gradient.
    need(8 * HALF.itemsize * elements)
    module = sys.modules[group_norm_silu.__module__]
    c, side, groups = 128, SIDES[plan], 8
    if elements == SMALL:
        c, side, groups = 32, 4, 2
        monkeypatch.setattr(group_norm_resident, "LARGEST_TILE", 32768 if plan == "resident" else 0)
        monkeypatch.setattr(group_norm_looped, "ALWAYS", 2**30 if plan == "looped" else -1)
        monkeypatch.setattr(group_norm_looped, "IF_MANY", -1)
    taken = []
    monkeypatch.setattr(module, "_plan", lambda of, choose=module._plan: taken.append(choose(of)[0]) or choose(of))
    b = images_for(elements, c, side, side)
    images = {name: filled(name, b, c, side, side, memory_format=memory_format) for name in ("x", "skip")}
    images["scale"], images["shift"] = filled("time", b, 4 * c).chunk(2, dim=1)
    parameters = {"weight": randn("weight", 2 * c, shift=0.5), "bias": randn("bias", 2 * c)}

    def operation(implementation, **tensors):
        return group_norm_silu(**tensors, groups=groups, skip_scale=SKIP_SCALE, implementation=implementation)

    check_end(operation, images, parameters=parameters)
    assert {run.__module__.rpartition(".")[2] for run in taken} == {f"group_norm_{plan}"}


@sizes("memory_format", [(NHWC,), (NCHW,)], small=2)
def test_conv1x1_of_two_images(elements, memory_format):
    # Both images, both products, their sum, its gradient, both images', and copies that a library may make.
    need(12 * HALF.itemsize * elements)
    c, side = (128, 128) if elements == BEYOND else (8, 8)
    b = images_for(elements, c, side, side)
    images = {name: filled(name, b, c, side, side, memory_format=memory_format) for name in ("x", "skip")}
    parameters = {"weight": randn("weight", c, 2 * c, 1, 1, scale=c**-0.5).to(HALF), "bias": randn("bias", c).to(HALF)}

    def operation(implementation, x, skip, weight, bias):
        if implementation == "reference":
            return torch.nn.functional.conv2d(torch.cat((x, skip * SKIP_SCALE), dim=1), weight, bias)
        return conv1x1_concat(x, skip, weight, bias, skip_scale=SKIP_SCALE)

    check_end(operation, images, parameters=parameters, wider="two products")


MIXES = {
    "q_sample": (q_sample, ("x_start", "noise"), ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")),
    "predict_start_from_noise": (
        predict_start_from_noise,
        ("x_t", "noise"),
        ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    ),
    "q_posterior_mean": (q_posterior_mean, ("x_start", "x_t"), ("posterior_mean_coef1", "posterior_mean_coef2")),
}


@sizes("name, formats", [(name, (NCHW, layout)) for layout in (NHWC, NCHW) for name in MIXES], small=3)
def test_mixtures_of_two_images(elements, name, formats):
    function, names, constants = MIXES[name]
    # Both images, their gradients, and the output and its gradient, which may be float32.
    need((4 * HALF.itemsize + 8) * elements)
    c, side = (64, 256) if elements == BEYOND else (3, 16)
    b = images_for(elements, c, side, side)
    images = {
        each: filled(each, b, c, side, side, memory_format=layout) for each, layout in zip(names, formats, strict=True)
    }

    def operation(implementation, t, **tensors):
        options = {"normalize": True, "dtype": HALF} if name == "q_sample" and implementation == "triton" else {}
        if name == "q_sample":
            options["normalize"] = True
        return function(t=t, **tensors, **schedules(*constants), **options, implementation=implementation)

    check_end(operation, {**images, "t": times(b)})


@sizes("shared", [(False,), (True,)])
def test_attention_of_the_library_with_the_null_key_merged_in(elements, shared):
    # Queries, output, their gradients, the library's sums of one of them in float32, and a copy.
    need((5 * HALF.itemsize + 4) * elements)
    heads, d, m = 8, 64, 16
    n = 1024 if elements == BEYOND else 4
    b = images_for(elements, n, heads * d)
    width = d if shared else heads * d
    images = {"q": filled("q", b, n, heads * d), "k": filled("k", b, m, width), "v": filled("v", b, m, width)}
    parameters = {"null_key": randn("null_key", d), "null_value": randn("null_value", d)}

    def operation(implementation, **tensors):
        implementation = "sdpa_merge" if implementation == "triton" else implementation
        return null_key_attention(**tensors, heads=heads, implementation=implementation)

    check_end(operation, images, parameters=parameters, wider="a rounded delta")


def take(step, implementation, x_t, t, pred, null_pred, third):
    options = {"null_pred": null_pred, "percentile": 0.9, "cond_scale": 3.0, "implementation": implementation}
    if step == "ancestral":
        names = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        names += ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped")
        return (ancestral_step(x_t, t, pred, third, **schedules(*names), **options),)
    options |= schedules("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    if step == "ddim":
        return (ddim_step(x_t, t, t - 5, pred, noise=third, eta=0.7, **options),)
    return dpm_solver_pp_2m_step(x_t, t, t - 5, pred, last_x_start=third, t_last=t + 5, **options)


@sizes(
    "whole, step", [(whole, step) for step in ("dpm_solver", "ancestral", "ddim") for whole in (True, False)], small=2
)
def test_sampling_steps(elements, whole, step, monkeypatch):
    # Images, what becomes of them and x_0 in float32, and two predictions and the noise in half precision.
    need((3 * 4 + 3 * HALF.itemsize) * elements)
    shape = (3, 64, 64) if whole else (4, 512, 512)
    if elements == SMALL:
        shape = (3, 16, 16)
        monkeypatch.setattr(sampling_kernels, "WHOLE", 2**20 if whole else 0)
        monkeypatch.setattr(threshold, "TILE", 256)
    assert whole == (torch.Size(shape).numel() <= sampling_kernels.WHOLE)
    b = images_for(elements, *shape)
    pred, null_pred = filled("pred", 2 * b, *shape).chunk(2)
    images = {
        "x_t": filled("x_t", b, *shape, dtype=torch.float32),
        "t": times(b),
        "pred": pred,
        "null_pred": null_pred,
        "third": filled("third", b, *shape),
    }
    outs = take(step, "triton", **images)
    expected = take(step, "reference", **{name: last(x) for name, x in images.items()})
    for out, exact in zip(outs, expected, strict=True):
        assert_near(out[-1:], exact, dtype=torch.float32)


# Images that are large themselves: more than 2^31 values in less than 5 GiB.
LARGE = (9, 256, 1024, 1024)
large_images = pytest.mark.parametrize(
    "shape, memory_format",
    [((2, 8, 4, 4), NHWC), *(pytest.param(LARGE, layout, marks=pytest.mark.gpu) for layout in (NHWC, NCHW))],
    ids=str,
)


def norms(channels):
    """Operations of an image and parameters, and the parameters."""
    weight, bias = randn("weight", channels), randn("bias", channels)
    return [
        (lambda x, weight, bias: group_norm_silu(x, weight, bias, groups=2), [weight, bias]),
        (channel_layer_norm, [weight]),
    ]


@large_images
def test_norms_of_large_images(shape, memory_format):
    # Of the last image some tensors in float64.
    need((3 * HALF.itemsize + 5) * torch.Size(shape).numel())
    x = filled("x", *shape, memory_format=memory_format)
    for operation, parameters in norms(shape[1]):
        with torch.no_grad(), use_implementation("triton"):
            end = operation(x, *parameters)[-1:].clone()
        with torch.no_grad(), use_implementation("reference"):
            assert_near(end, operation(last(x), *(vector.double() for vector in parameters)), dtype=HALF)


def gradients_of(operation, x, parameters, cotangent):
    inputs = [value.detach().requires_grad_() for value in (x, *parameters)]
    with use_implementation("triton"):
        out = operation(*inputs)
    return torch.autograd.grad(out, inputs, cotangent)


@large_images
def test_gradients_of_norms_of_large_images(shape, memory_format):
    need((6 * HALF.itemsize + 3) * torch.Size(shape).numel())
    x, cotangent = (filled(name, *shape, memory_format=memory_format) for name in ("x", "cotangent"))
    for operation, parameters in norms(shape[1]):
        grad_x, *sums = gradients_of(operation, x, parameters, cotangent)
        alone = [gradients_of(operation, x[i : i + 1], parameters, cotangent[i : i + 1]) for i in range(len(x))]
        assert_near(grad_x[-1:], alone[-1][0], dtype="an image among others")
        for total, *parts in zip(sums, *(gradients[1:] for gradients in alone), strict=True):
            assert_near(total, torch.stack(parts).sum(0), dtype="long sums")
