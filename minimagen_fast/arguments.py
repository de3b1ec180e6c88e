"""What users give: what is a number, whichever library it comes from, and what is none; and what is no tensor."""

import math
import operator
from typing import Any

import torch


def argument_of(args: Any, name: str, *default: Any) -> Any:
    """One of the arguments of a training: of a dictionary, or an attribute of a namespace or another object.

    Raises:
        AttributeError, KeyError: if it is not there and no default is given.
    """
    if isinstance(args, dict):
        return args.get(name, *default) if default else args[name]
    return getattr(args, name, *default)


def finite_number(name: str, value: Any) -> float:
    """A number as a float.

    Raises:
        TypeError: if it is none: True and text are none, a numpy number or a tensor of one element is.
        ValueError: if it is infinite, also as float32, in which it is used, or NaN.
    """
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if abs(number) > torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite as float32, got {value!r}")
    return number


def check_seed(seed: int | None, argument: str) -> None:
    """Refuses a seed that torch has no room for.

    Raises:
        ValueError: it has more than 64 bits.
    """
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"{argument} must be a whole number below 2^64, and not below -2^63; got {seed}")


def check_not_meta(device: torch.device, argument: str) -> None:
    """Refuses ``meta``, whose tensors have shapes alone.

    Raises:
        ValueError: if it is ``meta``.
    """
    if device.type == "meta":
        raise ValueError(
            f"{argument} 'meta' cannot be used here: it holds no values. Give cpu, or cuda if there is one"
        )


def check_tensor(name: str, value: Any) -> None:
    """Refuses what is no tensor.

    Raises:
        TypeError: it is a list, a numpy array, a PIL image.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}: convert it, e.g. with torch.as_tensor")


def whole_number(name: str, value: Any, *, least: int | None = None, else_: str = "") -> int:
    """A whole number as an int.

    Args:
        name: What the caller calls it.
        value: What came.
        least: The smallest that is allowed; any, if not given.
        else_: What else is allowed, for the message, such as " or None".

    Raises:
        TypeError: if it is none: True and 3.0 are none, a numpy integer is.
        ValueError: if it is too small.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int{else_}, got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
