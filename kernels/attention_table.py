"""Which implementation of attention with a null key is tried first on a CUDA device, by shape.

Provisional: no timing stands behind the orders here. ``DEFAULT`` puts the kernels of this package first, since they
read and write every tensor once and in place; then the library's kernel with a merge, which copies no keys; then the
library's on concatenated keys. ``python -m benchmarks.attention_order --write`` rewrites ``MEASURED``: it times the
forward pass of every implementation that can do the job at each key's shape, in ``DTYPE`` and without a mask, and
writes down the order it found. Everything else takes ``DEFAULT``: other shapes, dtypes and masks, and training, since
of all of them only our kernels' backward pass is deterministic.
"""

from typing import NamedTuple

import torch

__all__ = ["DEFAULT", "DTYPE", "MEASURED", "Key", "key_of", "order"]

Order = tuple[str, ...]

# Of queries, keys and values, where times are taken.
DTYPE = torch.bfloat16
QUERIES = (64, 256, 1024, 4096, 16384)
KEYS = (64, 320, 1024, 4096, 16384)


class Key(NamedTuple):
    """What the choice depends on.

    Attributes:
        shared: Whether all heads share one key/value head.
        width: Width of a head.
        queries: The first of ``QUERIES`` that is at least the number of queries, else the last.
        keys: The first of ``KEYS`` that is at least the number of keys, else the last.
    """

    shared: bool
    width: int
    queries: int
    keys: int


DEFAULT: Order = ("triton", "sdpa_merge", "sdpa")

MEASURED: dict[Key, Order] = {}


def key_of(shared: bool, width: int, n: int, m: int) -> Key:
    """The key of ``n`` queries to ``m`` keys."""
    return Key(shared, width, _bucket(n, QUERIES), _bucket(m, KEYS))


def order(key: Key, dtype: torch.dtype, *, masked: bool, training: bool) -> Order:
    """Names of implementations, the one to try first in front."""
    if dtype != DTYPE or masked or training:
        return DEFAULT
    return MEASURED.get(key, DEFAULT)


def _bucket(size: int, bounds: tuple[int, ...]) -> int:
    return next((bound for bound in bounds if size <= bound), bounds[-1])
