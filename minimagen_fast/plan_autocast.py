"""Autocast as on CUDA for tensors without values, for which torch has none."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .parallel import _blocks
from .Unet import Unet

__all__ = ["autocast_as_on_cuda"]


class _CudaAutocast(TorchFunctionMode):
    """What autocast does on CUDA.

    The functions are those of torch's lists for CUDA that the U-Net and its kernels call:
    https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior. A converted weight is kept until the
    outermost block of code ends.
    """

    LOW = frozenset(
        {
            F.conv2d,
            F.linear,
            torch.matmul,
            torch.Tensor.matmul,
            torch.Tensor.__matmul__,
            torch.einsum,
            F.scaled_dot_product_attention,
        }
    )
    FLOAT32 = frozenset({F.layer_norm, torch.group_norm, torch.Tensor.softmax})

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._depth = 0
        self._copies: dict[int, torch.Tensor] = {}

    def __enter__(self):
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error):
        self._depth -= 1
        if not self._depth:
            self._copies.clear()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.LOW:
            args, kwargs = tree_map_only(torch.Tensor, self._low, (tuple(args), kwargs))
        elif func in self.FLOAT32:
            args, kwargs = tree_map_only(torch.Tensor, _float32, (tuple(args), kwargs))
        return func(*args, **kwargs)

    def _low(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.requires_grad and tensor.is_leaf):
            return tensor.to(self._dtype)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(self._dtype)
        return self._copies[id(tensor)]


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@contextmanager
def autocast_as_on_cuda(unet: Unet, dtype: torch.dtype) -> Iterator[None]:
    """Have the forward pass of a U-Net, and what the backward pass computes again of it, run under autocast."""
    mode = _CudaAutocast(dtype)

    def under_mode(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return forward(*args, **kwargs)

        return run

    # The backward pass runs without modes for functions, so every block that it may run brings its own.
    modules = [unet, *_blocks(unet)]
    for module in modules:
        module.forward = under_mode(module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward
