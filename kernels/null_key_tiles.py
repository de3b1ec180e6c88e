"""Sizes of the blocks in :mod:`.null_key_flash`, by card, dtype and shape.

Found by compiling every kernel ahead of time: the largest blocks that need no more registers than there are.
"""

from typing import NamedTuple

import torch

from . import launch
from .launch import ceil_div, next_power_of_2

__all__ = ["Tile", "key_tile", "query_part", "query_tile", "split_queries"]

# The queries that a block of keys sums its gradients over are cut into parts where there are too few blocks of keys.
MOST_PARTS = 32
SHORTEST_PART = 4  # blocks of queries


class Tile(NamedTuple):
    """Queries and keys of a block, warps, stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def query_tile(q: torch.Tensor, d: int, heads: int, n: int, m: int, *, backward: bool) -> Tile:
    """Blocks for the kernels over queries: as large as the registers of each card allow without a spill."""
    target = launch.target(q.device)
    major = target.capability[0]
    if q.dtype == torch.float32 and d == 128:
        if major not in (9, 10):
            return Tile(16, 16, 8, 2) if backward else Tile(32, 32, 8, 2)
        return Tile(64, 16 if backward or major == 9 else 32, 8, 2)
    if q.dtype == torch.float32:
        if major == 10:
            return Tile(64, 32, 8, 2)
        if major == 9:
            return Tile(16 if backward else 64, 32, 4, 2)
        return Tile(16, 16 if backward else 32, 4, 2)
    if major not in (9, 10):
        return Tile(128, 16 if backward else 32, 8, 2) if d == 128 else Tile(64, 32, 4, 2)
    # 261 keys are 288 in blocks of 32 and 320 in blocks of 64.
    keys = 32 if d == 128 or (m <= 512 and ceil_div(m, 32) % 2) else 64
    if d < 128 and q.shape[0] * heads * ceil_div(n, 128) < target.multiprocessors:
        return Tile(64, keys if major == 9 else d, 4, 2)
    return Tile(128, keys, 8, 3 if major == 9 and d < 128 and not backward else 2)


def query_part(q: torch.Tensor, d: int) -> int:
    """How many columns of a head these kernels multiply at once, over which products of d columns are then sums."""
    if q.dtype != torch.float32 or d < 128:
        return d
    return 64 if launch.target(q.device).capability[0] == 10 else 32


def key_tile(q: torch.Tensor, d: int, m: int) -> Tile:
    """The same for the kernel over keys."""
    major = launch.target(q.device).capability[0]
    if q.dtype == torch.float32 and d == 128:
        return Tile(32, 16, 8, 2)
    if q.dtype == torch.float32:
        if d == 32 and major in (9, 10):
            return Tile(32 if major == 9 else 16, 64, 8, 2)
        return Tile(16, 32, 4, 2)
    if major not in (9, 10):
        return Tile(32, 64, 8 if d == 128 else 4, 2)
    if d == 128:
        return Tile(64, 64, 8, 2)
    return Tile(64, 64, 4, 2) if m <= 512 else Tile(64, 128, 8, 2)


def split_queries(q: torch.Tensor, programs: int, n: int, block: int) -> tuple[int, int]:
    """Into how many parts the queries are cut so that the card is busy, and how many queries are a part's."""
    wanted = ceil_div(launch.target(q.device).multiprocessors, max(programs, 1))
    parts = min(next_power_of_2(wanted), next_power_of_2(n // (SHORTEST_PART * block)), MOST_PARTS)
    return parts, ceil_div(ceil_div(n, block), parts) * block
