"""Matrix products in float32 on a CPU, by whichever of the two libraries that torch comes with is faster.

torch multiplies matrices with MKL, which on AMD's processors goes no further than AVX2; oneDNN, with which it
convolves, uses AVX-512 there: the same products in float32, since Zen 5 in half of the time. Which library it is
follows from the processor and from nothing that is measured, so that every process on it computes the same numbers.
"""

import functools
import math
import platform
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import dispatch
from .launch import is_batched

__all__ = ["grouped_products", "linear", "onednn_multiplies", "summed_products"]

# AMD's first family that does not do AVX-512 in halves, as Zen 4 does, which gains nothing by it.
_ZEN_5 = 26
# With fewer multiplications the call itself takes the time; one with gradients takes more, and so do sums over rows.
_LEAST_MULTIPLICATIONS, _LEAST_WITH_GRADIENTS, _LEAST_SUMMED = 2**18, 2**23, 2**24


@functools.cache
def _onednn_is_faster() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(capabilities.get("avx512_f"))
        and "AMD" in str(capabilities.get("cpu_name"))
        and _family() >= _ZEN_5
    )


def _family() -> int:
    """The processor's family, as its maker counts them; 0 where the system does not say."""
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:
        said = platform.processor()
    found = re.search(r"family\s*:?\s*(\d+)", said, re.IGNORECASE)
    return int(found[1]) if found else 0


def onednn_multiplies(*tensors: torch.Tensor) -> bool:
    """Whether products of these tensors are oneDNN's."""
    return dispatch.is_eager_float32_on_cpu(*tensors) and torch.backends.mkldnn.enabled and _onednn_is_faster()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear.

    Args:
        x: Shape (..., k).
        weight: Shape (m, k).
        bias: Shape (m,).

    Returns:
        Shape (..., m).
    """
    # Before anything is asked of sizes: a graph for any batch must not become one for those of the same answer.
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    least = _LEAST_WITH_GRADIENTS if gradients else _LEAST_MULTIPLICATIONS
    enough = x.numel() * weight.shape[0] >= least
    if not enough or not _fit(x, weight, bias) or not onednn_multiplies(*tensors):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if gradients else _product(x, weight, bias)


def _fit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the shapes fit together; torch says it more clearly than oneDNN if not, or takes what is broadcast."""
    return weight.ndim == 2 and x.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # Of other layouts oneDNN reads number by number, and beyond the end of a bias.
    if not weight.t().is_contiguous():
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        # As torch does, nothing that no gradient is made of: it would be kept in memory, and might not be changed.
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        wanted, rows = ctx.needs_input_grad, gradient.reshape(-1, gradient.shape[-1])
        return (
            linear(gradient, weight.t()) if wanted[0] else None,
            _of_weight(rows, x.reshape(-1, x.shape[-1])) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


def _of_weight(gradients: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    enough = rows.numel() * gradients.shape[1] >= _LEAST_SUMMED
    if torch.is_grad_enabled() or is_batched(gradients) or not enough or not onednn_multiplies(gradients, rows):
        return gradients.t() @ rows
    return summed_products(gradients[:, None], rows[:, None])


def grouped_products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """einsum("n g k, g m k -> n g m"): a product for each group, without gradients, by oneDNN.

    A grouped convolution of images of n pixels and g * k channels, which lie in memory as these rows do.

    Args:
        x: Shape (n, g, k).
        weight: Shape (g, m, k). oneDNN is fastest for a k that is a multiple of 16.

    Returns:
        Shape (n, g, m), contiguous.
    """
    (n, groups, _), m = x.shape, weight.shape[1]
    pixels = x.reshape(1, n, 1, -1).permute(0, 3, 1, 2)
    filters = weight.reshape(groups * m, -1, 1, 1)
    # This very function: torch's convolution leaves some shapes to other libraries.
    out = torch.mkldnn_convolution(pixels, filters, None, [0, 0], [1, 1], [1, 1], groups)
    return out.permute(0, 2, 3, 1).reshape(n, groups, m)


def summed_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """einsum("n g k, n g m -> k m"), without gradients, by oneDNN.

    The gradient of a 1x1 convolution's weight, of images whose pixels are these rows.

    Args:
        x: Shape (n, g, k).
        y: Shape (n, g, m).

    Returns:
        Shape (k, m).
    """
    rows = x.shape[0] * x.shape[1]
    if rows == 0:
        return x.new_zeros((x.shape[2], y.shape[2]))
    if x.shape[2] < y.shape[2]:
        # Of pixels oneDNN reads some channels of all, then the next: in rows so wide, that are in no cache any more, it
        # would wait for nearly every number. Of gradients it reads whole rows.
        return summed_products(y, x).t()
    # Of so many images even torch with one thread leaves the convolution to oneDNN.
    images = math.gcd(rows, 16)
    gradient, pixels = (
        tensor.reshape(images, rows // images, 1, tensor.shape[2]).permute(0, 3, 1, 2) for tensor in (x, y)
    )
    weight = x.new_empty((x.shape[2], y.shape[2], 1, 1))
    _, found, _ = torch.ops.aten.convolution_backward(
        gradient, pixels, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    return found.flatten(1)
