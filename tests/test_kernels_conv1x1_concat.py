"""The 1x1 convolution of two images against that of their concatenation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parity import DEVICE, DTYPES, assert_near, check_parity, randn

from minimagen_fast.kernels.conv1x1_concat import conv1x1_concat

pytestmark = pytest.mark.usefixtures("poisoned")

NCHW, NHWC = torch.contiguous_format, torch.channels_last
FORMATS = pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["nchw", "nhwc"])
SKIP_SCALE = 2**-0.5
NAMES = ("x", "skip", "weight", "bias")
SUBSETS = [subset for size in range(5) for subset in itertools.combinations(NAMES, size)]


def ours(**inputs):
    return conv1x1_concat(**inputs, skip_scale=SKIP_SCALE)


def reference(x, skip, weight, bias=None):
    return F.conv2d(torch.cat((x, skip * SKIP_SCALE), dim=1), weight, bias)


def case(b, c1, c2, out, h, w, *, memory_format=NCHW, dtype=torch.float32):
    return {
        "x": randn("x", b, c1, h, w, dtype=dtype).contiguous(memory_format=memory_format),
        "skip": randn("skip", b, c2, h, w, dtype=dtype).contiguous(memory_format=memory_format),
        "weight": randn("weight", out, c1 + c2, 1, 1, dtype=dtype),
        "bias": randn("bias", out, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@FORMATS
@pytest.mark.parametrize("shape", [(2, 8, 8, 4, 5, 7), (1, 3, 10, 16, 1, 1), (3, 1, 1, 1, 2, 3), (2, 64, 32, 48, 4, 4)])
def test_parity(shape, memory_format, dtype):
    inputs = case(*shape, memory_format=memory_format, dtype=dtype)
    out = check_parity(ours, reference, inputs, dtype=dtype, wider="two products")
    assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)


@FORMATS
def test_without_bias(memory_format):
    inputs = case(2, 8, 4, 6, 3, 3, memory_format=memory_format)
    del inputs["bias"]
    check_parity(ours, reference, inputs, dtype=torch.float32)


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
@FORMATS
def test_some_gradients(wanted, memory_format):
    inputs = case(2, 8, 4, 6, 3, 3, memory_format=memory_format)
    check_parity(ours, reference, inputs, dtype=torch.float32, gradients_of=wanted)


@pytest.mark.parametrize("one, other", [(NCHW, NHWC), (NHWC, NCHW)])
def test_layouts(one, other):
    inputs = case(2, 8, 6, 4, 3, 5, memory_format=one)
    inputs["skip"] = inputs["skip"].contiguous(memory_format=other)
    check_parity(ours, reference, inputs, dtype=torch.float32)
    inputs["skip"] = randn("skip", 2, 1, 3, 5).expand(2, 6, 3, 5)
    inputs["x"] = randn("x", 2, 8, 5, 3).transpose(2, 3)
    row = randn("row", 1, 4, 1, 1)
    check_parity(ours, reference, inputs, dtype=torch.float32, cotangent=lambda out: row.to(out).expand(out.shape))


@pytest.mark.parametrize("one, other", [(NCHW, NHWC), (NHWC, NCHW)])
def test_the_result_is_laid_out_like_the_images(one, other):
    inputs = case(2, 8, 6, 4, 3, 5, memory_format=one)
    inputs["weight"] = inputs["weight"].contiguous(memory_format=other)
    inputs["skip"] = inputs["skip"].contiguous(memory_format=other)
    assert ours(**inputs).is_contiguous(memory_format=one)


@FORMATS
def test_a_gradient_that_is_nan_stays_in_its_pixel_and_channel(memory_format):
    def cotangent(out):
        gradient = randn("g", *out.shape)
        gradient[1, 3, 2, 1] = float("nan")
        return gradient

    inputs = case(2, 8, 4, 6, 3, 3, memory_format=memory_format)
    check_parity(ours, reference, inputs, dtype=torch.float32, cotangent=cotangent)


@FORMATS
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_goes_where_it_does_in_torch(name, memory_format):
    for value in (float("nan"), float("inf"), float("-inf")):
        inputs = case(2, 8, 4, 6, 3, 3, memory_format=memory_format)
        inputs[name][(-1,) * inputs[name].ndim] = value
        # cuDNN may transform tiles, which then are not finite as a whole.
        with torch.backends.cudnn.flags(enabled=False):
            check_parity(ours, reference, inputs, dtype=torch.float32)


@FORMATS
def test_finite_differences(memory_format):
    inputs = case(2, 3, 2, 2, 2, 2, memory_format=memory_format)
    exact = [value.double().requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(lambda *tensors: ours(**dict(zip(NAMES, tensors, strict=True))), exact)


@settings(derandomize=True, max_examples=10, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 6), st.sampled_from([NCHW, NHWC]))
def test_any_shape(shape, memory_format):
    inputs = case(*shape, memory_format=memory_format)
    check_parity(ours, reference, inputs, dtype=torch.float32, wider="two products")


@FORMATS
def test_empty_batch(memory_format):
    inputs = case(0, 4, 4, 6, 3, 3, memory_format=memory_format)
    assert check_parity(ours, reference, inputs, dtype=torch.float32).shape == (0, 6, 3, 3)


@FORMATS
@pytest.mark.parametrize("channels", [(0, 8), (8, 0)])
def test_no_channels_beside_others(channels, memory_format):
    inputs = case(2, *channels, 6, 3, 3, memory_format=memory_format)
    out = check_parity(ours, reference, inputs, dtype=torch.float32)
    assert channels[0] == 0 or out.is_contiguous(memory_format=memory_format)


@FORMATS
@pytest.mark.parametrize("images", [torch.float32, torch.bfloat16])
def test_autocast(images, memory_format):
    inputs = case(2, 16, 16, 8, 4, 4, memory_format=memory_format)
    inputs = {k: (v.to(images) if k in ("x", "skip") else v).detach().requires_grad_() for k, v in inputs.items()}
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = ours(**inputs)
    assert out.dtype == torch.bfloat16
    assert_near(out, reference(**{k: v.detach().double() for k, v in inputs.items()}), dtype=torch.bfloat16)
    out.backward(randn("g", *out.shape).to(out))
    assert all(value.grad.dtype == value.dtype for value in inputs.values())


@FORMATS
@pytest.mark.parametrize("name", NAMES)
def test_another_dtype_under_autocast(name, memory_format):
    inputs = case(1, 8, 8, 4, 3, 3, memory_format=memory_format)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert ours(**inputs | {name: inputs[name].half()}).dtype == torch.bfloat16


@FORMATS
def test_inputs_are_left_alone(memory_format):
    inputs = case(2, 8, 4, 6, 3, 3, memory_format=memory_format)
    before = {name: value.clone() for name, value in inputs.items()}
    ours(**inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


@FORMATS
@pytest.mark.parametrize("name", NAMES)
def test_vmap(name, memory_format):
    inputs = case(2, 8, 4, 6, 3, 3, memory_format=memory_format)
    several = torch.stack([inputs[name], 2 * inputs[name]])
    mapped = torch.vmap(lambda one: ours(**inputs | {name: one}))(several)
    for out, one in zip(mapped, several, strict=True):
        assert_near(out, reference(**{k: v.double() for k, v in (inputs | {name: one}).items()}), dtype=torch.float32)


@FORMATS
def test_no_graph_break(memory_format):
    inputs = case(2, 8, 4, 6, 3, 3, memory_format=memory_format)
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    check_parity(compiled, reference, inputs, dtype=torch.float32)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"x": torch.ones(2, 8, 3)}, "x must have shape"),
        ({"skip": torch.ones(2, 8, 3, 4)}, "skip must have shape"),
        ({"weight": torch.ones(6, 13, 1, 1)}, r"weight must have shape \(c_out, 12, 1, 1\).*got \(6, 13, 1, 1\)"),
        ({"weight": torch.ones(6, 12, 3, 3)}, "weight must have shape"),
        ({"bias": torch.ones(5)}, r"bias must have shape \(6,\)"),
        ({"x": torch.ones(2, 0, 3, 3), "skip": torch.ones(2, 0, 3, 3)}, "x and skip must have channels"),
    ],
)
def test_clear_errors(changes, words):
    inputs = case(2, 8, 4, 6, 3, 3) | changes
    with pytest.raises(ValueError, match=words):
        ours(**{name: value.to(DEVICE) for name, value in inputs.items()})


@FORMATS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_another_dtype_is_refused_in_both_formats(name, dtype, memory_format):
    inputs = case(2, 8, 4, 6, 3, 3, memory_format=memory_format)
    inputs[name] = inputs[name].to(dtype)
    other, one, got = ("skip", dtype, torch.float32) if name == "x" else (name, torch.float32, dtype)
    message = f"{other} must have the dtype of x, {one}; got {got}: convert one of the two"
    if dtype == torch.int64:
        message = f"{name} must be of a floating-point type; got {dtype}"
    with pytest.raises(TypeError, match=message):
        ours(**inputs)
    if dtype != torch.float16:
        # It casts neither of these.
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16), pytest.raises(TypeError, match=message):
            ours(**inputs)


@pytest.mark.parametrize("name", NAMES[1:])
def test_tensors_on_several_devices_are_refused(name):
    inputs = case(2, 8, 4, 6, 3, 3)
    with pytest.raises(ValueError, match=f"{name} must be on the device of x, {DEVICE}.*; got meta"):
        ours(**inputs | {name: inputs[name].to("meta")})
