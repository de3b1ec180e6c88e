"""What the device can do at best, measured in every run: memory bandwidth and matrix rate."""

from collections.abc import Callable
from typing import Any

import torch

from minimagen_fast.kernels import linear

from .measure import Timer, settle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS = 0.3
ROUNDS = (3, 30)


def ceilings(device: torch.device, *, copy_mib: int, matrix_side: int) -> dict[str, Any]:
    """Measure bandwidth and matrix rates on random data, the best of several samples each.

    Args:
        device: Which device.
        copy_mib: Size of the tensor that is copied, in MiB; at most a quarter of what is free on a GPU.
        matrix_side: Side of the matrices that are multiplied.

    Returns:
        ``copy_bytes_per_second``, reads and writes both counted, and ``flops_per_second`` by dtype, a multiplication
        and an addition counted as two. ``tf32`` is that of float32 matrices with shortened products, which cuDNN's
        convolutions are allowed on CUDA unless told otherwise; ``tf32x3`` that of products which are made of three such
        ones, as attention's are in float32.
    """
    if device.type == "cuda":
        copy_mib = min(copy_mib, torch.cuda.mem_get_info(device)[0] // 2**20 // 4)
    bandwidth = _copy_bandwidth(device, copy_mib)
    flops = {name: _matrix_rate(device, dtype, matrix_side) for name, dtype in DTYPES.items()}
    if device.type == "cuda":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            flops["tf32"] = _matrix_rate(device, torch.float32, matrix_side)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        flops["tf32x3"] = flops["tf32"] / 3
    # Gigabytes, which the first case may need.
    settle(device)
    return {"copy_bytes_per_second": bandwidth, "flops_per_second": flops}


def _copy_bandwidth(device: torch.device, mib: int) -> float:
    source = torch.randn(mib * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda _: target.copy_(source), device)


def _matrix_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    # On a CPU torch has two libraries for products, and ours may use the faster.
    ways = [lambda _: torch.mm(a, b, out=out), *([lambda _: linear(a, b)] if device.type == "cpu" else [])]
    return 2 * side**3 / min(_best(way, device) for way in ways)


def _best(subject: Callable[[int], object], device: torch.device) -> float:
    subject(0)
    timer = Timer(subject, device)
    return min(timer.sample() for _ in range(timer.rounds(SECONDS, *ROUNDS)))
