"""Convolutions with wide kernels, whose weight's gradient is a convolution on a CPU, against torch's own in float64."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minimagen_fast.kernels import use_implementation, wide_conv, wide_conv2d
from minimagen_fast.layers import CrossEmbedLayer

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

NAMES = ("x", "weight", "bias")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """As on a processor where this is the faster way."""
    monkeypatch.setattr(wide_conv, "_is_convolution_fast", lambda: True)


def case(b, c, out, h, w, side=15):
    torch.manual_seed(0)
    return {
        "x": torch.randn(b, c, h, w),
        "weight": torch.randn(out, c, side, side) / (side * c**0.5),
        "bias": torch.randn(out),
    }


def expected(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def results(function, inputs, gradients_of, dtype):
    """The output in ``dtype``, and the gradients asked for."""
    inputs = {name: value.to(dtype).requires_grad_(name in gradients_of) for name, value in inputs.items()}
    out = function(**inputs)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape).cos()
    return out, torch.autograd.grad(out, [inputs[name] for name in gradients_of], cotangent)


def is_ours(out: torch.Tensor) -> bool:
    return type(out.grad_fn).__name__ == "_WideConvBackward"


@pytest.mark.parametrize("wanted", [s for n in (1, 2, 3) for s in itertools.combinations(NAMES, n)], ids="-".join)
def test_gradients(wanted):
    inputs = case(2, 3, 4, 9, 12)
    out, gradients = results(wide_conv2d, inputs, wanted, torch.float32)
    assert is_ours(out) == ("weight" in wanted)
    torch.testing.assert_close(out, expected(**inputs), rtol=0, atol=0)
    for gradient, other in zip(gradients, results(expected, inputs, wanted, torch.float64)[1], strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 6, 8, 5, 2), (2, 8, 3, 16, 17), (5, 3, 8, 20, 20)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_shapes_and_layouts(shape, layout):
    inputs = case(*shape)
    laid_out = {n: v.contiguous(memory_format=layout) if v.ndim == 4 else v for n, v in inputs.items()}
    del laid_out["bias"], inputs["bias"]
    out, (gradient,) = results(wide_conv2d, laid_out, ("weight",), torch.float32)
    assert is_ours(out)
    _, (other,) = results(expected, inputs, ("weight",), torch.float64)
    torch.testing.assert_close(gradient.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_second_derivatives():
    inputs = {name: value.requires_grad_() for name, value in case(2, 2, 3, 4, 3, side=9).items()}

    def twice(function):
        first = torch.autograd.grad(function(**inputs).sin().sum(), inputs.values(), create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs.values())

    assert is_ours(wide_conv2d(**inputs))
    for one, other in zip(twice(wide_conv2d), twice(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_batched_gradients():
    inputs = {name: value.requires_grad_() for name, value in case(2, 2, 3, 4, 5, side=9).items()}

    def batched(function):
        out = function(**inputs)
        cotangents = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(0))
        return torch.autograd.grad(out, inputs.values(), cotangents, is_grads_batched=True)

    for one, other in zip(batched(wide_conv2d), batched(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_where_it_is_a_convolution_like_others():
    inputs = {name: value.requires_grad_() for name, value in case(2, 3, 4, 6, 6).items()}

    def ours():
        return is_ours(wide_conv2d(**inputs))

    assert ours()
    with torch.no_grad():
        assert not ours()
    with use_implementation("reference"):
        assert not ours()
    with torch.autocast("cpu", torch.bfloat16):
        assert not ours()
    with FlopCounterMode(display=False):
        assert not ours()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not ours()
    assert not is_ours(wide_conv2d(**{name: value.double() for name, value in inputs.items()}))
    assert not is_ours(wide_conv2d(inputs["x"][:0], inputs["weight"], inputs["bias"])), "an empty batch"
    for other in (case(2, 3, 4, 6, 6, side=7), case(2, 9, 4, 6, 6), case(1, 1, 1, 64, 65)):
        assert not is_ours(wide_conv2d(**{name: value.requires_grad_() for name, value in other.items()}))
    tangent = torch.func.jvp(lambda x: wide_conv2d(x, inputs["weight"].detach()), (inputs["x"],), (inputs["x"],))[1]
    assert torch.equal(tangent, expected(inputs["x"], inputs["weight"]))


def test_the_layer_of_several_kernels_trains_by_it(monkeypatch):
    torch.manual_seed(0)
    layer, x = CrossEmbedLayer(3, (3, 7, 15), 16, stride=1), torch.randn(2, 3, 8, 8)
    used = []
    monkeypatch.setattr(wide_conv, "_exchanged", lambda images, f=wide_conv._exchanged: used.append(1) or f(images))
    layer(x).sin().sum().backward()
    assert len(used) == 2, "images and gradient of the one wide convolution"
    gradients = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    with use_implementation("reference"):
        layer(x).sin().sum().backward()
    for gradient, parameter in zip(gradients, layer.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5 * parameter.grad.abs().max().item())


def test_a_convolution_that_someone_touched_is_called():
    layer, x, called = CrossEmbedLayer(3, (3, 15), 8, stride=1), torch.randn(1, 3, 4, 4), []
    layer.convs[1].register_forward_hook(lambda *_: called.append("hook"))

    class Own(nn.Conv2d):
        def forward(self, x):
            called.append("class")
            return super().forward(x)

    layer.convs[0] = Own(3, 4, 3, padding=1)
    layer(x)
    assert called == ["class", "hook"]
    layer.convs[0] = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1))
    assert layer(x).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("shape", [(4, 3, 10, 10), (4, 3, 9, 15), (4, 3, 15, 9), (3, 9, 9), (9,)])
def test_kernels_that_would_change_the_size_of_images_are_refused(shape):
    with pytest.raises(ValueError, match=rf"weight must have shape \(c_out, c, side, side\).*{re.escape(str(shape))}"):
        wide_conv2d(torch.randn(2, 3, 16, 16), torch.randn(shape))


def test_a_convolution_of_even_side_is_called():
    layer, x = CrossEmbedLayer(3, (3, 15), 16, stride=1), torch.randn(2, 3, 8, 8)
    convolution = torch.nn.Conv2d(3, 8, 10, padding=5)
    layer.convs = torch.nn.ModuleList([convolution])
    assert torch.equal(layer(x), convolution(x))
