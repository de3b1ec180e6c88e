"""Quantiles of rows of any length."""

import torch

# torch.quantile refuses tensors (before torch 2.13; since then rows) with more elements than this.
_TORCH_LIMIT = 2**24


def quantile(x: torch.Tensor, q: float) -> torch.Tensor:
    """The ``q``-quantile of each row, interpolated linearly between neighbours, as torch.quantile has it.

    Args:
        x: Values, float32 or float64, shape (b, n).
        q: In [0, 1].

    Returns:
        Shape (b,). A row that holds a NaN has NaN.
    """
    if x.numel() <= _TORCH_LIMIT:
        return torch.quantile(x, q, dim=-1)
    rank = q * (x.shape[-1] - 1)
    below = int(rank)
    above = min(below + 1, x.shape[-1] - 1)
    low, high = (torch.kthvalue(x, place + 1, dim=-1).values for place in (below, above))
    return torch.where(x.isnan().any(dim=-1), torch.nan, torch.lerp(low, high, rank - below))
