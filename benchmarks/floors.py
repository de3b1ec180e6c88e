"""The least time that a machine can need for a function: nothing kept from one operation to the next, nothing wasted.

The function is run once and every operation in it is charged the larger of its FLOPs over the matrix rate and its bytes
over the bandwidth, where an operation reads each input and writes each output once. Views are free, and so are
conversions and copies: they could be part of the operation before or after. Whoever fuses operations can come below the
sum of their floors; that is why the operations of this package count as one each.

Tensors on the ``meta`` device give the same floor as real ones, at no cost: they have shapes and no values. The Triton
kernels take them on any machine.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

FAMILIES = ("convolution", "linear", "attention", "group norm", "row norm", "elementwise", "other")
RATE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "bfloat16", torch.float64: "float32"}
NAMESPACE = "minimagen_fast"

# By a part of an operator's name; the first that fits.
_FAMILY_OF = (
    ("convolution", ("convolution", "conv1x1", "conv2d", "conv3x3")),
    ("attention", ("null_key", "attention", "softmax")),
    ("group norm", ("group_norm",)),
    ("row norm", ("layer_norm", "row_norm", "channel_norm")),
    ("linear", ("addmm", "bmm", "mm", "linear")),
)
_COPIES = (
    "_to_copy",
    "clone",
    "copy_",
    "contiguous",
    "lift_fresh",
    "detach",
    "alias",
    "_unsafe_view",
    "_reshape_alias",
)
_MAKES_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_OTHER = ("cat", "index", "gather", "embedding", "sort", "stack", "topk", "scatter", "pad")


@dataclass(frozen=True)
class Floor:
    """What a function must do, and how long that takes at least.

    Attributes:
        seconds: Least time.
        by_family: The same by kind of operation, those that occur; sums to ``seconds``.
        bytes: Bytes read and written.
        flops: Operations in matrix products and convolutions, a multiplication and an addition counted as two.
    """

    seconds: float
    by_family: dict[str, float]
    bytes: int
    flops: int


class _Walk(TorchDispatchMode):
    def __init__(self, ceilings: dict[str, Any]):
        super().__init__()
        self._bandwidth = ceilings["copy_bytes_per_second"]
        self._rates = ceilings["flops_per_second"]
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        namespace, name = func.name().split("::")
        name = name.split(".")[0]
        if not func.is_view and name not in _COPIES and name not in _MAKES_NOTHING:
            self._charge(func, namespace, name, args, kwargs, out)
        return out

    def _charge(self, func, namespace, name, args, kwargs, out):
        read, written = _tensors((args, kwargs)), _tensors(out)
        # What is changed in place is an input and the output: read and written.
        size = sum(map(_bytes, read.values())) + sum(map(_bytes, written.values()))
        flops = _flops(func, name, args, kwargs, out)
        family = _family(namespace, name)
        seconds = size / self._bandwidth
        if flops:
            dtype = next(t.dtype for t in read.values() if t.is_floating_point())
            seconds = max(seconds, flops / self._rates[rate_name(dtype, family, self._rates)])
        self.seconds[family] += seconds
        self.bytes += size
        self.flops += flops


def _tensors(tree: Any) -> dict[int, torch.Tensor]:
    """The tensors in it, each once, also if it is there twice."""
    return {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def _bytes(tensor: torch.Tensor) -> int:
    """What of a tensor is in memory: an expanded one repeats itself."""
    return prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.element_size()


def rate_name(dtype: torch.dtype, family: str, rates: dict[str, float]) -> str:
    """Which of the matrix rates an operation of a kind and dtype can reach at best."""
    if family == "convolution":
        return convolution_rate(dtype, "tf32" in rates)
    # Kernels of attention, ours and the library's, multiply in either way.
    if family == "attention" and dtype == torch.float32 and "tf32x3" in rates:
        return max("float32", "tf32x3", key=rates.__getitem__)
    return RATE_NAMES[dtype]


def _flops(func, name: str, args, kwargs, out) -> int:
    if name.startswith("null_key_flash"):
        return _attention_flops(name, args)
    count = flop_registry.get(func._overloadpacket)
    return int(count(*args, **kwargs, out_val=out)) if count else 0


def _attention_flops(name: str, args) -> int:
    """Two matrix products forward, and backward four: who computes the scores again does more than it must."""
    backward = name.endswith("_backward")
    q, k = args[1:3] if backward else args[:2]
    return (8 if backward else 4) * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]


def _family(namespace: str, name: str) -> str:
    for family, parts in _FAMILY_OF:
        if any(part in name for part in parts):
            return family
    if namespace == NAMESPACE:
        return "elementwise"
    return "other" if any(part in name for part in _OTHER) else "elementwise"


def floor_of(function: Callable[[], Any], ceilings: dict[str, Any]) -> Floor:
    """Run a function once and add up the floors of its operations.

    Args:
        function: What to run, with its backward if that is to count. Tensors on ``meta`` will do.
        ceilings: Bandwidth and matrix rates, see :func:`.ceilings.ceilings`.
    """
    with _Walk(ceilings) as walk:
        function()
    seconds = {family: walk.seconds[family] for family in FAMILIES if walk.seconds[family]}
    return Floor(sum(seconds.values()), seconds, walk.bytes, walk.flops)


def floor_of_operation(size: int, flops: int, dtype: torch.dtype, family: str, ceilings: dict[str, Any]) -> Floor:
    """The floor of one operation of which bytes and FLOPs are known."""
    rate = ceilings["flops_per_second"][rate_name(dtype, family, ceilings["flops_per_second"])]
    seconds = max(size / ceilings["copy_bytes_per_second"], flops / rate)
    return Floor(seconds, {family: seconds}, size, flops)


def family_of(operation: str) -> str:
    """The kind of one of this package's operations, by its name."""
    return _family(NAMESPACE, operation)


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of a function by torch's own counter, which sees plain torch only: matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def convolution_rate(dtype: torch.dtype, cuda: bool) -> str:
    """Which of the matrix rates convolutions of a dtype can reach: on CUDA, TF32's unless that is forbidden."""
    return "tf32" if cuda and dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else RATE_NAMES[dtype]


def share_of_matrix_rate(flops: int, seconds: float, rate: str, ceilings: dict[str, Any]) -> float:
    """FLOPs over time, as a share of the measured matrix rate of this name."""
    return flops / seconds / ceilings["flops_per_second"][rate]
