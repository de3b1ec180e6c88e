"""The channel LayerNorm kernels, in both memory formats, against the reference path in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parity import DEVICE, DTYPES, assert_near, check_parity, check_slopes, randn

from minimagen_fast.kernels import channel_norm_planes, launch, layer_norm_rows
from minimagen_fast.kernels.channel_norm import channel_layer_norm

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-5
NCHW, NHWC = torch.contiguous_format, torch.channels_last
FORMATS = pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["nchw", "nhwc"])
GELU = pytest.mark.parametrize("gelu", [False, True], ids=["", "gelu"])


def ours(**inputs):
    return channel_layer_norm(**inputs, implementation="triton")


def reference(**inputs):
    return channel_layer_norm(**inputs, implementation="reference")


def check(inputs, gelu=False, **kw):
    return check_parity(lambda **i: ours(**i, gelu=gelu), lambda **i: reference(**i, gelu=gelu), inputs, **kw)


def case(*shape, memory_format=NCHW, dtype=torch.float32, gain_dtype=None, residual=False, **values):
    c = shape[1]
    x = randn("x", *shape, dtype=dtype, **values).contiguous(memory_format=memory_format)
    inputs = {"x": x, "gain": randn("gain", 1, c, 1, 1, dtype=gain_dtype or dtype), "residual": None}
    if residual:
        inputs["residual"] = randn("residual", *shape, dtype=dtype).contiguous(memory_format=memory_format)
    return inputs


@pytest.fixture
def every_width_is_wide(monkeypatch):
    """Channels come block by block: 64 of them for 16 pixels."""
    monkeypatch.setattr(channel_norm_planes, "LARGEST_TILE", 0)
    monkeypatch.setattr(channel_norm_planes, "WIDE_TILE", 1024)


@pytest.mark.parametrize("dtype", DTYPES)
@GELU
@FORMATS
@pytest.mark.parametrize(
    "shape", [(1, 8, 8, 8), (2, 24, 5, 7), (2, 40, 1, 3), (3, 100, 3, 3), (1, 128, 9, 16), (2, 320, 4, 4)], ids=str
)
def test_parity(shape, memory_format, gelu, dtype):
    inputs = case(*shape, memory_format=memory_format, dtype=dtype, residual=not gelu)
    out = check(inputs, gelu, dtype=dtype)
    assert out.dtype == dtype and out.stride() == inputs["x"].stride()


@FORMATS
@pytest.mark.parametrize("c", [1024, 1030, 2048, 4095, 4096])
def test_wide_images(c, memory_format):
    check(case(2, c, 2, 3, memory_format=memory_format, residual=c == 1030), c == 2048, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@GELU
@pytest.mark.parametrize("c", [8, 63, 64, 65, 200])
def test_block_by_block(c, gelu, dtype, every_width_is_wide):
    check(case(2, c, 3, 6, dtype=dtype, residual=True), gelu, dtype=dtype)


@pytest.mark.parametrize("busy", [False, True])
def test_block_by_block_of_longer_lines(busy, every_width_is_wide, monkeypatch):
    monkeypatch.setattr(launch, "target", lambda device: launch.Target((9, 0), 2 if busy else 100, 1 << 17))
    runs, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda *args, **kw: (runs.append(kw), run(*args, **kw)))
    check(case(2, 100, 5, 13), dtype=torch.float32)
    assert runs[0]["PIXELS"] == (64 if busy else 16)


@pytest.mark.parametrize("pixels", [15, 16, 17, 63, 64, 65])
@FORMATS
def test_tiles_need_not_be_full(pixels, memory_format):
    """Tiles are 16 pixels of 320 channels in NCHW memory, 8 in channels_last."""
    check(case(1, 320, 1, pixels, memory_format=memory_format, residual=True), dtype=torch.float32)


def test_programs_take_several_tiles(monkeypatch):
    monkeypatch.setattr(launch, "target", lambda device: launch.Target((9, 0), 1, 1 << 17))
    check(case(3, 320, 5, 7), dtype=torch.float32)


def test_which_kernels_run(monkeypatch):
    runs = []
    monkeypatch.setattr(launch, "run", lambda kernel, *args, **kw: runs.append(kernel))
    for shape, memory_format, kernels in (
        ((2, 64, 4, 4), NCHW, (channel_norm_planes._forward_kernel, channel_norm_planes._backward_kernel)),
        ((2, 2048, 4, 4), NCHW, (channel_norm_planes._forward_kernel, channel_norm_planes._wide_backward_kernel)),
        ((2, 4096, 4, 4), NCHW, (channel_norm_planes._wide_forward_kernel, channel_norm_planes._wide_backward_kernel)),
        ((2, 4096, 4, 4), NHWC, (layer_norm_rows._forward_kernel, layer_norm_rows._backward_kernel)),
        ((2, 64, 1, 1), NCHW, (layer_norm_rows._forward_kernel, layer_norm_rows._backward_kernel)),
    ):
        x = torch.ones(shape, device=DEVICE).contiguous(memory_format=memory_format).requires_grad_()
        ours(x=x, gain=torch.ones(shape[1], device=DEVICE)).sum().backward()
        assert tuple(runs) == kernels
        runs.clear()


@FORMATS
@pytest.mark.filterwarnings("ignore:var_mean:UserWarning")
@pytest.mark.parametrize("shape", [(3, 24, 1, 1), (1, 24, 1, 1), (0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
def test_ambiguous_and_empty(shape, memory_format):
    inputs = case(*shape, memory_format=memory_format, residual=True)
    out = check(inputs, dtype=torch.float32)
    # To torch, what is empty is contiguous and nothing else.
    assert out.is_contiguous(memory_format=memory_format if out.numel() else NCHW)


@FORMATS
def test_one_channel(memory_format):
    """Nothing is left of it, nor of its gradient but, on a card, how it rounds a product within a difference."""
    slack = 0.0 if DEVICE.type == "cpu" else 1e-4
    inputs = {
        name: value.requires_grad_()
        for name, value in case(2, 1, 3, 3, memory_format=memory_format, residual=True).items()
    }
    out = ours(**inputs)
    out.backward(randn("dy", 2, 1, 3, 3))
    assert torch.equal(out, inputs["residual"]) and not inputs["gain"].grad.any()
    assert inputs["x"].grad.abs().max() <= slack


VIEWS = {
    "channels sliced": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "pixels sliced": lambda x: F.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "offset": lambda x: torch.cat((x[:1], x))[1:],
    "expanded over the batch": lambda x: x[:1].expand_as(x),
    "expanded over pixels": lambda x: x[:, :, :1, :1].expand_as(x),
    "of tokens": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).reshape(x.shape),
}


@FORMATS
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view, memory_format):
    inputs = case(2, 24, 3, 5, memory_format=memory_format, residual=True)
    strided = {name: value if name == "gain" else view(value) for name, value in inputs.items()}
    make = lambda y: view(randn("dy", *y.shape).contiguous(memory_format=memory_format))  # noqa: E731
    out = check(strided, dtype=torch.float32, cotangent=make)
    assert out.is_contiguous() or out.is_contiguous(memory_format=NHWC)


def test_a_part_of_the_channels_keeps_the_format():
    x = case(2, 24, 3, 5, memory_format=NHWC)["x"][:, 8:]
    assert ours(x=x, gain=randn("gain", 16)).is_contiguous(memory_format=NHWC)


@FORMATS
def test_formats_may_differ(memory_format):
    other = NHWC if memory_format == NCHW else NCHW
    inputs = case(2, 24, 3, 5, memory_format=memory_format, residual=True)
    inputs["residual"] = inputs["residual"].contiguous(memory_format=other)
    make = lambda y: randn("dy", *y.shape).contiguous(memory_format=other)  # noqa: E731
    out = check(inputs, dtype=torch.float32, cotangent=make)
    assert out.stride() == inputs["x"].stride()


@FORMATS
def test_gradient_of_a_sum(memory_format):
    """sum().backward() hands over one number, expanded."""
    one = torch.ones((), device=DEVICE)
    check(case(2, 24, 3, 5, memory_format=memory_format), dtype=torch.float32, cotangent=lambda y: one.expand_as(y))


@FORMATS
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "needed", [n for k in range(4) for n in itertools.combinations(["x", "gain", "residual"], k)], ids=str
)
def test_requires_grad_subsets(needed, wide, memory_format, request):
    if wide:
        request.getfixturevalue("every_width_is_wide")
    inputs = case(2, 100, 3, 5, memory_format=memory_format, residual=True)
    check(inputs, gelu=True, dtype=torch.float32, gradients_of=needed)


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32])
def test_float32_parameters_and_residuals(dtype, residual_dtype, memory_format):
    """As under autocast."""
    inputs = case(2, 24, 3, 5, memory_format=memory_format, dtype=dtype, gain_dtype=torch.float32)
    if residual_dtype:
        inputs["residual"] = randn("residual", 2, 24, 3, 5, dtype=residual_dtype)
    for run in (ours, reference):
        out = check_parity(run, reference, inputs, dtype=dtype)
        assert out.dtype == (residual_dtype or dtype)


@pytest.mark.parametrize("shape", [(24,), (1, 24, 1, 1)], ids=str)
def test_gain_of_either_shape(shape):
    inputs = case(2, 24, 3, 5) | {"gain": randn("gain", 24).reshape(shape)}
    check(inputs, dtype=torch.float32)
    check(inputs | {"gain": randn("gain", 48)[::2].reshape(shape)}, dtype=torch.float32)


@FORMATS
@pytest.mark.parametrize("wide", [False, True])
def test_large_mean_and_small_spread(wide, memory_format, request):
    if wide:
        request.getfixturevalue("every_width_is_wide")
    check(case(2, 200, 3, 5, memory_format=memory_format, scale=0.1, shift=10000.0), dtype=torch.float32)


def test_one_large_value(every_width_is_wide):
    """The first channel, from which distances are taken, is far from all others."""
    inputs = case(2, 200, 3, 5)
    inputs["x"][:, 0] = 1000.0
    check(inputs, dtype=torch.float32)


@FORMATS
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.3, -65504.0])
def test_constant_pixels(value, wide, memory_format, request):
    """Nothing is left of them; float64 itself leaves rounding, and a card's division does."""
    slack = 0.0 if DEVICE.type == "cpu" else 1e-6
    if wide:
        request.getfixturevalue("every_width_is_wide")
    inputs = case(2, 200, 3, 5, memory_format=memory_format, residual=True)
    inputs["x"].fill_(value)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out, grad = ours(**inputs), randn("dy", 2, 200, 3, 5)
    out.backward(grad)
    assert (out - inputs["residual"]).abs().max() <= slack and inputs["gain"].grad.abs().max() <= slack
    g = grad.double() * inputs["gain"].detach().double()
    assert_near(inputs["x"].grad, (g - g.mean(1, keepdim=True)) * EPS**-0.5, dtype=torch.float32)


@FORMATS
@GELU
def test_values_near_the_largest_of_half_precision(gelu, memory_format):
    inputs = case(2, 40, 3, 5, memory_format=memory_format, dtype=torch.float16)
    inputs["x"][:, ::4] = 65504.0
    inputs["x"][:, 1::4] = -65504.0
    check(inputs, gelu, dtype=torch.float16)


@FORMATS
@GELU
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_pixel(value, wide, gelu, memory_format, request):
    if wide:
        request.getfixturevalue("every_width_is_wide")
    inputs = case(2, 100, 3, 5, memory_format=memory_format)
    inputs["x"][1, 3, 2, 1] = value
    out = check(inputs, gelu, dtype=torch.float32)
    assert out[1, :, 2, 1].isnan().all() and out.isnan().sum() == 100


@FORMATS
@pytest.mark.parametrize("wide", [False, True])
def test_a_gain_that_is_nan_spoils_its_channel_and_a_residual_its_value(wide, memory_format, request):
    if wide:
        request.getfixturevalue("every_width_is_wide")
    inputs = case(2, 100, 3, 5, memory_format=memory_format, residual=True)
    inputs["gain"][0, 3] = inputs["residual"][1, 7, 2, 1] = float("nan")
    out = check(inputs, True, dtype=torch.float32)
    assert out[:, 3].isnan().all() and out.isnan().sum() == 2 * 15 + 1


@FORMATS
@pytest.mark.parametrize("wide", [False, True])
def test_a_gradient_that_is_nan_stays_in_its_pixel(wide, memory_format, request):
    if wide:
        request.getfixturevalue("every_width_is_wide")

    def cotangent(out):
        gradient = randn("dy", *out.shape)
        gradient[1, 3, 2, 1] = float("nan")
        return gradient

    inputs = case(2, 100, 3, 5, memory_format=memory_format, residual=True)
    check(inputs, dtype=torch.float32, cotangent=cotangent)


def test_gelu_is_the_exact_one():
    x = torch.linspace(-12, 12, 4096, device=DEVICE).reshape(1, 4096, 1, 1)
    for shape in ((1, 4096, 1, 1), (1, 64, 8, 8)):
        check({"x": x.reshape(shape), "gain": randn("gain", shape[1]), "residual": None}, True, dtype=torch.float32)


@FORMATS
@pytest.mark.parametrize("wide", [False, True])
def test_two_runs_are_identical(wide, memory_format, request):
    if wide:
        request.getfixturevalue("every_width_is_wide")

    def run():
        inputs = case(2, 100, 5, 9, memory_format=memory_format, residual=True)
        inputs = {name: value.requires_grad_() for name, value in inputs.items()}
        out = ours(**inputs, gelu=True)
        return out, *torch.autograd.grad(out, list(inputs.values()), randn("dy", 2, 100, 5, 9))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@FORMATS
@GELU
@pytest.mark.parametrize("wide", [False, True])
def test_finite_differences(wide, gelu, memory_format, request):
    if wide:
        request.getfixturevalue("every_width_is_wide")
    inputs = case(2, 12, 2, 2, memory_format=memory_format, residual=True)
    check_slopes(lambda **given: ours(**given, gelu=gelu), inputs)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(8, 150), st.integers(1, 6), st.integers(1, 6)),
    memory_format=st.sampled_from([NCHW, NHWC]),
    gelu=st.booleans(),
    residual=st.booleans(),
    scale=st.floats(1e-2, 1e3),
)
def test_any_shape_and_scale(shape, memory_format, gelu, residual, scale):
    inputs = case(*shape, memory_format=memory_format, residual=residual, scale=scale)
    out = check(inputs, gelu, dtype=torch.float32)
    assert out.is_contiguous(memory_format=memory_format)


def test_reference_is_the_formula():
    x, gain = randn("x", 2, 24, 3, 5), randn("gain", 1, 24, 1, 1)
    rows = F.layer_norm(F.gelu(x).permute(0, 2, 3, 1), (24,), gain.flatten()).permute(0, 3, 1, 2)
    torch.testing.assert_close(reference(x=x, gain=gain, gelu=True), rows, rtol=1e-5, atol=1e-5)
    exact = [v.double().requires_grad_() for v in case(2, 3, 2, 2, residual=True).values()]
    operation = lambda x, gain, residual: channel_layer_norm(x, gain, gelu=True, residual=residual)  # noqa: E731
    assert torch.autograd.gradcheck(operation, exact)


@FORMATS
@pytest.mark.parametrize("strided", [False, True])
def test_registration(strided, memory_format):
    inputs = case(2, 8, 3, 4, memory_format=memory_format, residual=True)
    if strided:
        inputs["x"] = randn("x", 2, 16, 3, 4).contiguous(memory_format=memory_format)[:, ::2]
        inputs["residual"] = randn("residual", 2, 8, 4, 3).transpose(2, 3)
    x, gain, residual = (value.requires_grad_() for value in inputs.values())
    torch.library.opcheck(torch.ops.minimagen_fast.channel_layer_norm.default, (x, gain, residual, EPS, True))
    x, gain, dy = x.detach(), gain.detach(), randn("dy", 2, 8, 3, 4)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.minimagen_fast.channel_layer_norm_backward.default, (dy, x, gain, EPS, True, *needs)
        )


@FORMATS
@pytest.mark.parametrize("c", [128, 1536, 4096])
def test_launches_are_recorded_on_meta_tensors(c, memory_format):
    x = torch.empty(256, c, 64, 64, device="meta", dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    gain = torch.empty(1, c, 1, 1, device="meta", requires_grad=True)
    with launch.record() as launches:
        out = ours(x=x.requires_grad_(), gain=gain, gelu=True)
        out.backward(torch.empty_like(out))
    assert len(launches) == 3 and out.stride() == x.stride() == x.grad.stride()


def test_clear_errors():
    x, gain = randn("x", 2, 8, 3, 3), randn("gain", 8)
    for implementation in ("triton", "reference"):
        with pytest.raises(ValueError, match=r"x must have shape \(b, c, h, w\)"):
            channel_layer_norm(x[0], gain, implementation=implementation)
        with pytest.raises(ValueError, match=r"gain must have shape \(8,\) or \(1, 8, 1, 1\).*got \(8, 1, 1\)"):
            channel_layer_norm(x, gain[:, None, None], implementation=implementation)
        with pytest.raises(ValueError, match="residual must have the shape of x"):
            channel_layer_norm(x, gain, residual=x[:1], implementation=implementation)
        with pytest.raises(TypeError, match="residual must be a floating-point tensor, got torch.bool"):
            channel_layer_norm(x, gain, residual=x > 0, implementation=implementation)
        with pytest.raises(ValueError, match="eps must be positive, got -1.0"):
            channel_layer_norm(x, gain, eps=-1.0, implementation=implementation)


def test_an_implementation_that_cannot_be_used():
    with pytest.raises(ValueError, match="float64"):
        ours(x=randn("x", 2, 8, 3, 3).double(), gain=randn("gain", 8))
    with pytest.raises(ValueError, match="4096"):
        ours(x=randn("x", 2, 4097, 1, 1), gain=randn("gain", 4097))
    assert channel_layer_norm(randn("x", 2, 4097, 1, 1), randn("gain", 4097)).isfinite().all()


@pytest.mark.gpu
@FORMATS
@pytest.mark.parametrize("c", [512, 4096])
def test_offsets_beyond_32_bits(c, memory_format):
    """More than 2^31 values in all, or in one image, that end like a small one."""
    side = 2048 if c == 512 else 1024
    x = torch.zeros(2, c, side, side // 2 + 1, device="cuda", dtype=torch.bfloat16).contiguous(
        memory_format=memory_format
    )
    x[-1, :, -4:] = randn("x", c, 4, side // 2 + 1).bfloat16()
    gain, weight = randn("gain", c), randn("weight", c, 4, side // 2 + 1).bfloat16()
    few = x[-1:, :, -4:].contiguous(memory_format=memory_format).requires_grad_()
    expected = ours(x=few, gain=gain)
    expected.backward(weight[None])
    grad = torch.zeros_like(x)
    grad[-1, :, -4:] = weight
    x.requires_grad_()
    out = ours(x=x, gain=gain)
    out.backward(grad)
    assert_near(out[-1:, :, -4:].detach(), expected.detach().double(), dtype=torch.bfloat16)
    assert_near(x.grad[-1:, :, -4:], few.grad.double(), dtype=torch.bfloat16)
