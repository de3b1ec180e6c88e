"""What the dtypes and devices of several tensors of one operation must be, and what autocast makes of them."""

from collections.abc import Mapping

import torch

from .launch import untraced


@untraced
def has_autocast(device_type: str) -> bool:
    """Whether torch has autocast for such devices; not traced, which torch.compile of torch 2.11 cannot do."""
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(*tensors: torch.Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts these tensors, None if it is off or leaves them alone: one of them is float64.

    torch casts for its own products in this way.
    """
    device_type = tensors[0].device.type
    if not (has_autocast(device_type) and torch.is_autocast_enabled(device_type)):
        return None
    return None if any(x.dtype == torch.float64 for x in tensors) else torch.get_autocast_dtype(device_type)


def check_floating_point(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Refuse numbers of other kinds; None among them is ignored.

    Raises:
        TypeError: for the first that is not floating point.
    """
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name} must be of a floating-point type; got {x.dtype}: convert it, as with .float()")


def check_one_dtype(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Refuse floating-point tensors of another dtype than the first's, unless autocast casts them all to one.

    On the meta device, for which torch has no autocast, tensors may stand for some that are cast: all pass.

    Raises:
        TypeError: for the first that differs.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    (first, like), *others = given.items()
    for name, x in others:
        if x.dtype != like.dtype and like.device.type != "meta" and autocast_dtype(*given.values()) is None:
            raise TypeError(
                f"{name} must have the dtype of {first}, {like.dtype}; got {x.dtype}: convert one of the two, or use"
                " autocast, which leaves float64 alone"
            )


def check_one_device(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Refuse tensors on another device than the first's.

    Raises:
        ValueError: for the first that is elsewhere.
    """
    (first, like), *others = tensors.items()
    for name, x in others:
        if x is not None and x.device != like.device:
            raise ValueError(f"{name} must be on the device of {first}, {like.device}; got {x.device}: move it there")
