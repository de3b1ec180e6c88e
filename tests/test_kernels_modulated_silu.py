"""Modulation and SiLU in one step back on a CPU, against autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from minimagen_fast.kernels import group_norm_silu, modulated_silu, use_implementation

B, C = 3, 8


def by_hand(x, scale, shift):
    return F.silu(x * (scale[:, :, None, None] + 1) + shift[:, :, None, None])


def tensors(dtype=torch.float32, requires_grad=(True, True, True)):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, C, 5, 4), (B, C), (B, C)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [x.requires_grad_(wanted) for x, wanted in zip(made, requires_grad, strict=True)]


def is_one_step(*inputs, run=modulated_silu.modulated_silu):
    return type(run(*inputs).grad_fn).__name__ == "_ModulatedSiluBackward"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "subset", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_values_and_gradients(memory_format, subset):
    x, *rows = tensors(requires_grad=subset)
    x = x.detach().to(memory_format=memory_format).requires_grad_(subset[0])
    inputs = (x, *rows)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    assert is_one_step(*inputs)
    out = modulated_silu.modulated_silu(*inputs)
    assert out.is_contiguous(memory_format=memory_format)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, wanted, upstream)
    expected_out = by_hand(*(tensor.double() for tensor in inputs))
    expected = torch.autograd.grad(expected_out, wanted, upstream.double())
    for one, other in zip((out, *got), (expected_out, *expected), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)


def test_second_gradients():
    """Those of float64, which takes the other way, within rounding."""
    second = []
    for dtype in (torch.float32, torch.float64):
        inputs = tensors(dtype)
        assert is_one_step(*inputs) == (dtype == torch.float32)
        first = torch.autograd.grad(modulated_silu.modulated_silu(*inputs).sum(), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs))
    for single, double in zip(*second, strict=True):
        assert double.abs().max() > 0.1
        torch.testing.assert_close(single, double.float(), rtol=1e-4, atol=1e-4)


def test_where_torch_must_see_every_operator_it_does():
    inputs = tensors()
    assert is_one_step(*inputs)
    with use_implementation("reference"):
        assert not is_one_step(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_one_step(*inputs)
    with FakeTensorMode():
        assert not is_one_step(*(torch.empty(x.shape, requires_grad=True) for x in inputs))
    jacobian = torch.func.jacrev(lambda shift: modulated_silu.modulated_silu(*inputs[:2], shift).sum())(inputs[2])
    expected = torch.autograd.grad(by_hand(*inputs).sum(), inputs[2])[0]
    torch.testing.assert_close(jacobian, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(modulated_silu.modulated_silu(*inputs), by_hand(*inputs))


def test_group_norm_silu_ends_with_it():
    x, scale, shift = tensors()
    assert is_one_step(x, run=lambda x: group_norm_silu(x, groups=2, scale=scale, shift=shift))
    assert not is_one_step(x, run=lambda x: group_norm_silu(x, groups=2))
