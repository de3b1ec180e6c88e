"""Which implementation of attention with a null key is tried first on a CUDA device, by shape.

Provisional: no timing stands behind the orders here. ``DEFAULT`` puts the kernels of this package first, since they
read and write every tensor once and in place; then the library's kernel with a merge, which copies no keys; then the
library's on concatenated keys. ``python -m benchmarks.attention_order --write`` rewrites ``MEASURED``: it times every
implementation that can do the job at each key's shape, forward alone or forward and backward, and writes down the order
it found. Shapes that nobody timed take ``DEFAULT``, and so does training under ``torch.use_deterministic_algorithms``.
"""

from typing import NamedTuple

__all__ = ["DEFAULT", "MEASURED", "Key", "key_of", "order"]

Order = tuple[str, ...]

QUERIES = (64, 256, 1024, 4096, 16384)
KEYS = (64, 320, 1024, 4096, 16384)


class Key(NamedTuple):
    """What the choice depends on.

    Attributes:
        shared: Whether all heads share one key/value head.
        width: Width of a head.
        queries: The first of ``QUERIES`` that is at least the number of queries, else the last.
        keys: The first of ``KEYS`` that is at least the number of keys, else the last.
        training: Whether a backward pass follows.
    """

    shared: bool
    width: int
    queries: int
    keys: int
    training: bool


DEFAULT: Order = ("triton", "sdpa_merge", "sdpa")

MEASURED: dict[Key, Order] = {}


def key_of(shared: bool, width: int, n: int, m: int, training: bool) -> Key:
    """The key of ``n`` queries to ``m`` keys."""
    return Key(shared, width, _bucket(n, QUERIES), _bucket(m, KEYS), training)


def order(shared: bool, width: int, n: int, m: int, training: bool) -> Order:
    """Names of implementations, the one to try first in front."""
    return MEASURED.get(key_of(shared, width, n, m, training), DEFAULT)


def _bucket(size: int, bounds: tuple[int, ...]) -> int:
    return next((bound for bound in bounds if size <= bound), bounds[-1])
