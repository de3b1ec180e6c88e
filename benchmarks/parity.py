"""Whether a variant computes what the reference computes; if not, no time of it is given."""

import torch
from torch.utils._pytree import tree_leaves

# Largest distance from the reference allowed, by the lowest precision at work: of all values together, as a share of
# their norm, and of the worst value, as a share of the largest.
KERNEL_TOLERANCE = {
    torch.float32: (1e-4, 1e-3),
    torch.float16: (4e-3, 2e-2),
    torch.bfloat16: (2e-2, 6e-2),
}


def difference(actual, expected, tolerance: tuple[float, float]) -> str | None:
    """Compare results, tensors or nests of them, value by value.

    Args:
        actual: The variant's results.
        expected: The reference's, of the same structure; other dtypes will do.
        tolerance: Distance allowed, see ``KERNEL_TOLERANCE``.

    Returns:
        What is wrong, or None if nothing is.
    """
    ours, theirs = (
        [leaf.detach() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in (actual, expected)
    )
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors instead of {len(theirs)}"
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
        which = f"tensor {place} of {len(ours)}"
        if a.shape != b.shape:
            return f"{which} has shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        if not b.numel():
            continue
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return f"{which} is not finite where the reference is, or the other way round"
        finite = b.isfinite()
        if not finite.any():
            continue
        a, b = a[finite], b[finite]
        of_all, of_one = relative_distance([a], [b]), ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        for what, distance, allowed in (("", of_all, tolerance[0]), ("'s worst value", of_one, tolerance[1])):
            if distance > allowed:
                return f"{which}{what} is {distance:.2g} away from the reference, {allowed:.2g} is allowed"
    return None


def relative_distance(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm of the difference of all tensors together, as a share of that of ``expected``; NaN counts as infinite.

    Those of ``expected`` may be on another device.
    """
    apart = whole = 0.0
    for a, b in zip(actual, expected, strict=True):
        b = b.to(a.device).double()
        apart += (a.double() - b).square().sum().item()
        whole += b.square().sum().item()
    distance = (apart / max(whole, 1e-60)) ** 0.5
    return distance if distance == distance else float("inf")
