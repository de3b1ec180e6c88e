"""How the kernels are held to plain torch: one device, one tolerance table, one comparison for all of them.

Where there is a CUDA device the kernels run on it, in all three dtypes. Elsewhere Triton's interpreter runs them on CPU
tensors (see conftest.py), which leaves out bfloat16: the interpreter cuts it off instead of rounding it.
"""

import math
import zlib
from collections.abc import Callable, Iterable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])

# Allowed distance from a float64 result: a share of the value, and a share of the largest value in the tensor, since
# what is a sum of large terms carries their rounding.
TOLERANCE: dict[torch.dtype | str, tuple[float, float]] = {
    # Plain torch alone: a formula against the same formula written otherwise.
    torch.float64: (1e-12, 1e-13),
    # 84 and 17 units in the last place: sums of hundreds of terms, and a card's exponentials and roots, which are good
    # to two units. In the interpreter, whose are numpy's, most results need less than a fifth of it.
    torch.float32: (1e-5, 2e-6),
    # Two units in the last place of the value and one of the largest: computed in float32, rounded once or twice.
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 8e-3),
    # Against plain torch in float32: a product and a sum that are rounded once instead of twice.
    "a product and a sum": (1e-6, 2e-7),
    # The same of a whole step of sampling: about ten of them, and a division.
    "a sampling step": (2e-6, 2e-6),
    # Gradients of a whole U-Net in float32: the rounding of a hundred layers, which plain torch has too.
    "a network": (5e-5, 1e-5),
    # The gradient of one image in bfloat16, from the same kernels, alone and among others: a rounding may differ.
    "an image among others": (1.6e-2, 2e-5),
    # Sums of up to 2^31 terms in float32, in two orders.
    "long sums": (1e-4, 1e-4),
    # Slopes over a finite step, of values in float32: see check_slopes().
    "finite differences": (5e-3, 2e-3),
}
# What allows more than that: how many times, and why.
WIDER = {
    # On a card a float32 product is three TF32 ones, of 21 bits where float32 has 24.
    "three TF32 products": 4,
    # Attention's delta is made from the output rounded to bfloat16: where few keys share the weight, the gradient of
    # queries is a difference.
    "a rounded delta": 3,
    # The exponential multiplies the rounding of scores in the thousands, 1e-4.
    "scores in the thousands": 4,
    # Two or three values per group or row: what is left of them, and their gradients, nearly cancel.
    "few values": 50,
    # A product with few terms that nearly cancel keeps the rounding of the larger one; there are two products.
    "two products": 4,
    # Queries, keys and values are rounded to float16 before they meet.
    "rounded inputs": 4,
}
# Allowed distance of an operation in half precision from the same in float32, as a share of the norm: the inputs, the
# weights and all between them are rounded.
SHARE_OF_NORM = {torch.float16: 1e-2, torch.bfloat16: 6e-2}


def randn(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype=torch.float32) -> torch.Tensor:
    """Normal values that depend on the name and the shape alone."""
    generator = torch.Generator().manual_seed(hash_of(name, *shape))
    return (torch.randn(shape, generator=generator) * scale + shift).to(dtype).to(DEVICE)


def hash_of(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def assert_near(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    dtype: torch.dtype | str,
    what: str = "",
    wider: str | Iterable[str] = (),
):
    """``actual``, computed from inputs of ``dtype``, is ``expected``, a float64 result, up to the table's tolerance.

    NaNs and infinities must be where ``expected`` has them. ``dtype`` may be the name of another row of the table;
    ``wider`` names reasons for a wider tolerance, one or several.
    """
    factor = math.prod(WIDER[reason] for reason in ([wider] if isinstance(wider, str) else wider))
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
    wider: str | Iterable[str] = (),
) -> torch.Tensor:
    """Compare a kernel's output and gradients with those of ``reference`` in float64 on the same values.

    Args:
        operation: Called with ``inputs`` by name.
        reference: Called with the same in float64.
        inputs: Tensors, views of any kind, or None.
        dtype: The lowest precision among them, which sets the tolerance.
        gradients_of: Names of the inputs that require a gradient; all floating-point ones if not given.
        cotangent: Makes the output's gradient from the output; by default random and dense.
        wider: See :func:`assert_near`.

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
    assert_near(out.detach(), expected.detach(), dtype=dtype, what="output", wider=wider)
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
            assert_near(value.grad, exact[name].grad, dtype=dtype, what=f"gradient of {name}", wider=wider)
        elif value is not None:
            assert value.grad is None, name
    return out


def check_slopes(
    operation: Callable[..., torch.Tensor],
    inputs: dict[str, torch.Tensor | None],
    *,
    gradients_of: Iterable[str] | None = None,
    step: float = 1e-2,
) -> None:
    """Compare a kernel's gradients with finite differences of its own values, of each input along one direction.

    It is a random one, but has much of the gradient's own, so that a gradient that is too long or too short shows.

    Args:
        operation: Called with ``inputs`` by name.
        inputs: Tensors in float32, or None.
        gradients_of: Names of the inputs whose gradients are looked at; all floating-point ones if not given.
        step: How far each value goes to either side, about.
    """
    names = gradients_of or [k for k, v in inputs.items() if v is not None and v.is_floating_point()]
    ours = {k: v.detach().requires_grad_() if k in names else v for k, v in inputs.items()}
    out = operation(**ours)
    cotangent = randn("cotangent", *out.shape)
    gradients = torch.autograd.grad(out, [ours[name] for name in names], cotangent)

    def value(**changed: torch.Tensor) -> float:
        with torch.no_grad():
            return (operation(**inputs | changed).double() * cotangent.double()).sum().item()

    relative, absolute = TOLERANCE["finite differences"]
    for name, gradient in zip(names, gradients, strict=True):
        length = gradient.norm().item()
        direction = randn("direction", *gradient.shape) + 3 * gradient / max(length, 1e-30)
        ends = [value(**{name: inputs[name] + sign * step * direction}) for sign in (1, -1)]
        slope, expected = (ends[0] - ends[1]) / (2 * step), (gradient.double() * direction).sum().item()
        allowed = relative * abs(expected) + absolute * length
        assert abs(slope - expected) <= allowed, f"gradient of {name}: {expected} where values rise by {slope}"
