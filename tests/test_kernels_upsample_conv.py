"""The 3x3 convolution of enlarged images, without enlarging them, against that of enlarged ones."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from kernel_parity import DEVICE, DTYPES, assert_near, check_parity, randn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from minimagen_fast.kernels import upsample_conv as module
from minimagen_fast.kernels import upsample_conv3x3, use_implementation
from minimagen_fast.kernels.upsample_conv import summed_kernel

pytestmark = pytest.mark.usefixtures("poisoned")

NCHW, NHWC = torch.contiguous_format, torch.channels_last
FORMATS = pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["nchw", "nhwc"])
NAMES = ("x", "weight", "bias")
SUBSETS = [subset for size in range(4) for subset in itertools.combinations(NAMES, size)]


@pytest.fixture(params=["transposed", "four"], autouse=True)
def way(request, monkeypatch):
    """Both ways, of which a device has one."""
    monkeypatch.setattr(module, "_is_transposed", lambda device: request.param == "transposed")
    return request.param


def reference(x, weight, bias=None):
    return F.conv2d(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), weight, bias, padding=1)


def case(b, c, out, h, w, *, memory_format=NCHW, dtype=torch.float32):
    return {
        "x": randn("x", b, c, h, w, dtype=dtype).contiguous(memory_format=memory_format),
        "weight": randn("weight", out, c, 3, 3, scale=(9 * c) ** -0.5, dtype=dtype).contiguous(
            memory_format=memory_format
        ),
        "bias": randn("bias", out, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@FORMATS
@pytest.mark.parametrize("shape", [(2, 8, 4, 5, 7), (1, 3, 10, 1, 1), (3, 1, 1, 2, 1), (2, 32, 48, 4, 4)])
def test_parity(shape, memory_format, dtype):
    inputs = case(*shape, memory_format=memory_format, dtype=dtype)
    # Sums of weights are rounded once before they are multiplied.
    out = check_parity(upsample_conv3x3, reference, inputs, dtype=dtype, wider="two products")
    assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)


def test_every_weight_in_every_pixel():
    # Of whole numbers nothing is rounded: one weight and one pixel at a time.
    for place, (row, column) in itertools.product(range(9), itertools.product(range(3), range(2))):
        x, weight = torch.zeros(1, 1, 3, 2, device=DEVICE), torch.zeros(1, 1, 3, 3, device=DEVICE)
        x[0, 0, row, column], weight.view(-1)[place] = 1, 1
        assert torch.equal(upsample_conv3x3(x, weight), reference(x, weight))


@FORMATS
def test_without_bias(memory_format):
    inputs = case(2, 8, 6, 3, 3, memory_format=memory_format)
    del inputs["bias"]
    check_parity(upsample_conv3x3, reference, inputs, dtype=torch.float32)


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
@FORMATS
def test_some_gradients(wanted, memory_format):
    inputs = case(2, 8, 6, 3, 3, memory_format=memory_format)
    check_parity(upsample_conv3x3, reference, inputs, dtype=torch.float32, gradients_of=wanted)


def test_layouts():
    inputs = case(2, 8, 4, 3, 5)
    inputs["weight"] = inputs["weight"].contiguous(memory_format=NHWC)
    check_parity(upsample_conv3x3, reference, inputs, dtype=torch.float32)
    inputs["x"] = randn("x", 2, 8, 5, 3).transpose(2, 3)
    row = randn("row", 1, 4, 1, 1)
    check_parity(
        upsample_conv3x3, reference, inputs, dtype=torch.float32, cotangent=lambda out: row.to(out).expand(out.shape)
    )


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("one, other", [(NCHW, NHWC), (NHWC, NCHW)])
def test_the_result_is_laid_out_like_the_images(one, other, implementation):
    inputs = case(2, 8, 6, 4, 4, memory_format=one)
    inputs["weight"] = inputs["weight"].contiguous(memory_format=other)
    with use_implementation(implementation):
        assert upsample_conv3x3(**inputs).is_contiguous(memory_format=one)


@pytest.mark.parametrize("axis", [0, -1])
@FORMATS
def test_vmap(memory_format, axis):
    inputs = case(2, 8, 6, 4, 4, memory_format=memory_format)
    batch = torch.stack((inputs["x"], 2 * inputs["x"]), dim=axis)
    given = inputs["weight"], inputs["bias"]
    out = torch.func.vmap(lambda x: upsample_conv3x3(x, *given), in_dims=axis)(batch)
    expected = [upsample_conv3x3(x, *given) for x in batch.unbind(axis)]
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-5)


@FORMATS
def test_finite_differences_of_first_and_second_derivatives(memory_format):
    inputs = case(1, 2, 3, 2, 3, memory_format=memory_format)
    exact = tuple(value.double().requires_grad_() for value in inputs.values())
    # cuDNN's gradients of weights may be summed in another order every time.
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *given: upsample_conv3x3(*given).sin(), exact, nondet_tol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_reaches(value):
    inputs = case(1, 2, 3, 5, 5)
    inputs["x"][0, 1, 2, 2] = value
    # cuDNN may transform tiles, which then are not finite as a whole.
    with torch.backends.cudnn.flags(enabled=False):
        assert torch.equal(upsample_conv3x3(**inputs).isfinite(), reference(**inputs).isfinite())


@FORMATS
def test_empty_batch(memory_format):
    inputs = case(0, 4, 6, 3, 3, memory_format=memory_format)
    assert check_parity(upsample_conv3x3, reference, inputs, dtype=torch.float32).shape == (0, 6, 6, 6)


@FORMATS
def test_a_kernel_that_was_summed_before(memory_format):
    inputs = case(2, 8, 6, 3, 3, memory_format=memory_format)
    kernel = summed_kernel(inputs["weight"])
    assert kernel.is_contiguous(memory_format=memory_format)
    assert torch.equal(upsample_conv3x3(**inputs, kernel=kernel), upsample_conv3x3(**inputs))
    # It is that one, and not the weight, which is read.
    assert not torch.equal(upsample_conv3x3(**inputs, kernel=2 * kernel), upsample_conv3x3(**inputs))


@FORMATS
@pytest.mark.parametrize("images", [torch.float32, torch.bfloat16])
def test_autocast(images, memory_format):
    inputs = case(2, 16, 8, 4, 4, memory_format=memory_format)
    inputs = {k: (v.to(images) if k == "x" else v).detach().requires_grad_() for k, v in inputs.items()}
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = upsample_conv3x3(**inputs)
    assert out.dtype == torch.bfloat16
    assert_near(out, reference(**{k: v.detach().double() for k, v in inputs.items()}), dtype=torch.bfloat16)
    out.backward(randn("g", *out.shape).to(out))
    assert all(value.grad.dtype == value.dtype for value in inputs.values())


def test_fewer_multiplications_than_of_enlarged_images(way):
    inputs = case(2, 8, 6, 16, 16)
    with FlopCounterMode(display=False) as ours:
        upsample_conv3x3(**inputs)
    with FlopCounterMode(display=False) as plain, use_implementation("reference"):
        upsample_conv3x3(**inputs)
    # The four ways of an ordinary convolution have an edge each that is not used.
    edges = (17 / 16) ** 2 if way == "four" else 1
    assert ours.get_total_flops() == pytest.approx(plain.get_total_flops() * 16 / 36 * edges)


def test_the_bias_takes_no_pass_of_its_own(way):
    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                names.append(func.name().removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    inputs = case(2, 8, 6, 4, 4)
    kernel, names = summed_kernel(inputs["weight"]), []
    with torch.no_grad(), Operators():
        upsample_conv3x3(**inputs, kernel=kernel)
    in_place = ["empty.memory_format", *["add.out"] * 4] if way == "four" else []
    assert names == ["convolution", *in_place]


def test_the_reference_enlarges_the_images():
    inputs = case(2, 8, 6, 5, 5)
    with use_implementation("reference"):
        assert torch.equal(upsample_conv3x3(**inputs), reference(**inputs))


def test_vmap_and_functional_gradients():
    inputs = case(3, 4, 2, 3, 3)
    weight, bias = inputs["weight"], inputs["bias"]
    one_by_one = torch.func.vmap(lambda image: upsample_conv3x3(image[None], weight, bias)[0])(inputs["x"])
    assert_near(one_by_one, reference(**inputs).double(), dtype=torch.float32)
    gradient = torch.func.grad(lambda w: upsample_conv3x3(inputs["x"], w, bias).square().sum())(weight)
    expected = torch.func.grad(lambda w: reference(inputs["x"].double(), w, bias.double()).square().sum())
    assert_near(gradient, expected(weight.double()), dtype=torch.float32)


@FORMATS
def test_no_graph_break(memory_format):
    inputs = case(2, 8, 6, 3, 3, memory_format=memory_format)
    compiled = torch.compile(upsample_conv3x3, fullgraph=True, backend="aot_eager")
    check_parity(compiled, reference, inputs, dtype=torch.float32)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"x": torch.ones(2, 8, 3)}, "x must have shape"),
        ({"weight": torch.ones(6, 7, 3, 3)}, r"weight must have shape \(c_out, 8, 3, 3\).*got \(6, 7, 3, 3\)"),
        ({"weight": torch.ones(6, 8, 1, 1)}, "weight must have shape"),
        ({"bias": torch.ones(5)}, r"bias must have shape \(6,\)"),
    ],
)
def test_clear_errors(changes, words):
    inputs = case(2, 8, 6, 3, 3) | changes
    with pytest.raises(ValueError, match=words):
        upsample_conv3x3(**{name: value.to(DEVICE) for name, value in inputs.items()})


def test_a_kernel_of_another_device_s_kind_is_refused(way, monkeypatch):
    inputs = case(2, 8, 6, 3, 3)
    kernel = summed_kernel(inputs["weight"])
    monkeypatch.setattr(module, "_is_transposed", lambda device: way != "transposed")
    with pytest.raises(ValueError, match="kernel must have shape .* what summed_kernel makes"):
        upsample_conv3x3(**inputs, kernel=kernel)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_another_dtype_is_refused(name, dtype):
    inputs = case(2, 8, 6, 3, 3)
    inputs[name] = inputs[name].to(dtype)
    message = "must be of a floating-point type" if dtype == torch.int64 else "must have the dtype of x"
    with pytest.raises(TypeError, match=message):
        upsample_conv3x3(**inputs)


@pytest.mark.parametrize("name", NAMES[1:])
def test_tensors_on_several_devices_are_refused(name):
    inputs = case(2, 8, 6, 3, 3)
    with pytest.raises(ValueError, match=f"{name} must be on the device of x, {DEVICE}.*; got meta"):
        upsample_conv3x3(**inputs | {name: inputs[name].to("meta")})
