"""How the kernels are held to plain torch: one device, one tolerance table, one comparison for all of them.

Where there is a CUDA device the kernels run on it, in all three dtypes. Elsewhere Triton's interpreter runs them on CPU
tensors (see conftest.py), which leaves out bfloat16: the interpreter cuts it off instead of rounding it.
"""

import zlib
from collections.abc import Callable, Iterable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])

# Allowed distance from a float64 result: a share of the value, and a share of the largest value in the tensor, since
# what is a sum of large terms carries their rounding. 2 to 4 units in the last place of the dtype each.
TOLERANCE = {
    torch.float32: (1e-5, 2e-6),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 8e-3),
}


def randn(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype=torch.float32) -> torch.Tensor:
    """Normal values that depend on the name and the shape alone."""
    generator = torch.Generator().manual_seed(hash_of(name, *shape))
    return (torch.randn(shape, generator=generator) * scale + shift).to(dtype).to(DEVICE)


def hash_of(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def assert_near(
    actual: torch.Tensor, expected: torch.Tensor, *, dtype: torch.dtype, what: str = "", factor: float = 1.0
):
    """``actual``, computed from inputs of ``dtype``, is ``expected``, a float64 result, up to the table's tolerance.

    NaNs and infinities must be where ``expected`` has them. ``factor`` widens the tolerance, for a stated reason.
    """
    relative, absolute = (factor * tolerance for tolerance in TOLERANCE[dtype])
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    finite = expected[expected.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=relative,
        atol=absolute * scale + 1e-30,
        equal_nan=True,
        msg=lambda message: f"{what}: {message}",
    )


def check_parity(
    operation: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    inputs: dict[str, torch.Tensor | None],
    *,
    dtype: torch.dtype,
    gradients_of: Iterable[str] | None = None,
    cotangent: Callable[[torch.Tensor], torch.Tensor] | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """Compare a kernel's output and gradients with those of ``reference`` in float64 on the same values.

    Args:
        operation: Called with ``inputs`` by name.
        reference: Called with the same in float64.
        inputs: Tensors, views of any kind, or None.
        dtype: The lowest precision among them, which sets the tolerance.
        gradients_of: Names of the inputs that require a gradient; all floating-point ones if not given.
        cotangent: Makes the output's gradient from the output; by default random and dense.
        factor: See :func:`assert_near`.

    Returns:
        The operation's output.
    """
    wanted = {k for k, v in inputs.items() if v is not None and v.is_floating_point()}
    wanted = wanted if gradients_of is None else set(gradients_of)
    # detach() keeps strides, so that views stay views.
    ours = {k: v if v is None else v.detach().requires_grad_(k in wanted) for k, v in inputs.items()}
    exact = {
        k: v if v is None or not v.is_floating_point() else v.detach().double().requires_grad_(k in wanted)
        for k, v in inputs.items()
    }
    out, expected = operation(**ours), reference(**exact)
    assert_near(out.detach(), expected.detach(), dtype=dtype, what="output", factor=factor)
    if not wanted:
        assert not out.requires_grad
        return out
    make = cotangent or (lambda like: randn("cotangent", *like.shape).to(like.dtype))
    gradient = make(out.detach())
    out.backward(gradient)
    expected.backward(gradient.double())
    for name, value in ours.items():
        if name in wanted:
            assert value.grad is not None and value.grad.dtype == value.dtype, name
            assert_near(value.grad, exact[name].grad, dtype=dtype, what=f"gradient of {name}", factor=factor)
        elif value is not None:
            assert value.grad is None, name
    return out
