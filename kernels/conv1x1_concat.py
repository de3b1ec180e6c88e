"""A 1x1 convolution of two images side by side, without putting them side by side but where that is faster."""

import torch
import torch.nn.functional as F

from .arguments import check_floating_point, check_one_device, check_one_dtype
from .cpu_products import linear, onednn_multiplies
from .images import in_format_of, is_channels_last


def conv1x1_concat(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    skip_scale: float = 1.0,
) -> torch.Tensor:
    """conv2d(cat(x, skip * skip_scale), weight, bias) as the sum of two products, one for each image.

    The weight's columns belong to one image or the other, and products are linear. In channels_last memory images are
    matrices of pixels by channels, and the second product adds to the first in place. All of it is plain torch. Where
    :mod:`.cpu_products` leaves products to oneDNN, it is one, of both images.

    Args:
        x: Images, shape (b, c1, h, w), floating point. The others have its dtype, but under autocast, which casts all
            of them unless one is float64.
        skip: More channels, shape (b, c2, h, w).
        weight: Shape (c_out, c1 + c2, 1, 1).
        bias: Shape (c_out,), none if not given.
        skip_scale: Factor of ``skip``.

    Returns:
        Images of shape (b, c_out, h, w) in the memory format of ``x``; under autocast in autocast's dtype, otherwise
        in that of the inputs.

    Raises:
        TypeError: if a tensor is not floating point, or they are of several dtypes that autocast does not make one.
        ValueError: if the shapes do not fit together, or the tensors are on several devices.
    """
    _check(x, skip, weight, bias)
    b, c1, h, w = x.shape
    rows = is_channels_last(x)
    # torch takes no product of nothing for zeros.
    empty = 0 in (c1, skip.shape[1])
    if empty or onednn_multiplies(x, skip, weight):
        # A second product, or its sum with the first, takes longer than to put the images side by side.
        both = torch.cat((x, skip * skip_scale), dim=1)
        if empty or not rows:
            return in_format_of(x, F.conv2d(both, weight, bias))
        return linear(_rows(both), weight.flatten(1), bias).view(b, h, w, -1).permute(0, 3, 1, 2)
    if not rows:
        to_x, to_skip = weight.split((c1, skip.shape[1]), dim=1)
        # torch's convolutions follow the weight, too.
        return in_format_of(x, torch.add(F.conv2d(x, to_x, bias), F.conv2d(skip, to_skip), alpha=skip_scale))
    to_x, to_skip = weight.flatten(1).split((c1, skip.shape[1]), dim=1)
    first = linear(_rows(x), to_x, bias)
    # Autocast does not reach what works in place: the first product has the dtype that it chose.
    # The weight is scaled, not the product: its gradient is the smaller one to scale, too.
    to_skip, skip_rows = (factor.to(first.dtype) for factor in (to_skip * skip_scale, _rows(skip)))
    out = first.addmm_(skip_rows, to_skip.t())
    return out.view(b, h, w, -1).permute(0, 3, 1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(b, c, h, w) to (b * h * w, c)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _check(x, skip, weight, bias) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must have shape (b, c1, h, w); got {tuple(x.shape)}")
    if skip.ndim != 4 or skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"skip must have shape (b, c2, h, w), like x of shape {tuple(x.shape)} but for c2; got {tuple(skip.shape)}"
        )
    channels = x.shape[1] + skip.shape[1]
    if channels == 0:
        raise ValueError("x and skip must have channels, at least one together; got none")
    if weight.ndim != 4 or weight.shape[1:] != (channels, 1, 1):
        raise ValueError(
            f"weight must have shape (c_out, {channels}, 1, 1), c_out by the channels of x and skip together; got"
            f" {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},), a value per row of weight; got {tuple(bias.shape)}"
        )
    tensors = {"x": x, "skip": skip, "weight": weight, "bias": bias}
    check_floating_point(tensors)
    check_one_device(tensors)
    check_one_dtype(tensors)
