"""How many programs share the work of a kernel whose programs each read parameter vectors, or write sums for them."""

import torch

from . import launch

# What a multiprocessor holds at once at the register use of these kernels.
WARPS_PER_MULTIPROCESSOR = 16
# What vectors and partial sums may add to what must be moved. The price: where there is little work, this leaves fewer
# programs than the card could run, and a part of it stays idle. So as not to wait longer than needed, each of them then
# has as large a tile under way as its registers hold.
VECTOR_SHARE = 0.05


def resident(device: torch.device, num_warps: int) -> int:
    """How many programs run at the same time."""
    return launch.target(device).multiprocessors * (WARPS_PER_MULTIPROCESSOR // num_warps)


def affordable(moved: int, each: int) -> int:
    """How many programs may move ``each`` bytes of vectors and partial sums beside ``moved`` bytes; at least 1."""
    return max(int(VECTOR_SHARE * moved / each), 1)


def shared_out(pieces: int, most: int) -> int:
    """The fewest programs of which none has more of the pieces than if there were ``most``; none for no pieces."""
    if not pieces:
        return 0
    return launch.ceil_div(pieces, launch.ceil_div(pieces, most))
