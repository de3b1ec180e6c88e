"""Batches of images for the elementwise kernels: memory formats, checks, and a constant of the schedule per image."""

from collections.abc import Mapping

import torch

from .launch import tl, triton  # noqa: F401, Triton's interpreter looks for tl in the module of every kernel


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether images lie densely in channels_last order and not also in that of contiguous memory.

    No for torch.func, whose vmap knows one order only.
    """
    if torch._C._are_functorch_transforms_active() or x.ndim != 4 or x.is_contiguous() or x.stride(1) != 1:
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """The format of images, of those in other layouts the nearest one: what results of them are in."""
    # What is both (one channel, or one pixel) counts as contiguous.
    if not x.is_contiguous() and x.stride(1) == 1:
        return torch.channels_last
    return torch.contiguous_format


def in_format_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``y`` in the memory format of ``x``, copied if it must be; as it is for torch.func, whose vmap knows one only."""
    if torch._C._are_functorch_transforms_active():
        return y
    layout = memory_format(x)
    # What is both has no format to go by.
    if layout == torch.contiguous_format and x.is_contiguous(memory_format=torch.channels_last):
        return y
    return y.contiguous(memory_format=layout)


def dense(x: torch.Tensor) -> torch.Tensor:
    """The images themselves if they lie densely in one of the two orders, else a contiguous copy."""
    return x if is_channels_last(x) else x.contiguous()


def empty_images(shape: torch.Size, like: torch.Tensor, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    """Uninitialised images on the device of ``like``, dense in one order: what kernels write and fakes promise."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, device=like.device, dtype=dtype, memory_format=memory_format)


def orders(shape: torch.Size, channels_last: bool) -> tuple[int, int, int]:
    """Values per image, and the sizes of its inner and outer axis in memory, for :func:`other_order`."""
    n = shape[1:].numel()
    inner = shape[1] if channels_last else shape[2:].numel()
    return n, inner, n // max(inner, 1)


@triton.jit
def other_order(offset, inner, outer):
    """Where the value at an offset into an image in one memory format lies in the other one."""
    return (offset % inner) * outer + offset // inner


def check_images(**images: torch.Tensor) -> None:
    """Refuse image batches that are not floating point, or not of the first one's shape.

    Raises:
        TypeError: for a dtype that is not floating point.
        ValueError: for a shape that differs, or without a batch axis.
    """
    (first, like), *_ = images.items()
    if like.ndim < 2:
        raise ValueError(f"{first} must have shape (b, ...), images of any kind; got {tuple(like.shape)}")
    for name, x in images.items():
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}; convert it first")
        if x.shape != like.shape:
            raise ValueError(f"{name} must have the shape of {first}, {tuple(like.shape)}; got {tuple(x.shape)}")
    _check_one_device(images)


def check_schedule(
    like: torch.Tensor, times: Mapping[str, torch.Tensor], schedules: Mapping[str, torch.Tensor]
) -> None:
    """Refuse timesteps that are not one int64 per image of ``like``, and schedules that are not float32 vectors.

    The schedules must be of one length: kernels read all of them at a timestep without asking how long each is.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, another length than that of the first schedule, or another device than that of
            ``like``.
    """
    for name, t in times.items():
        if t.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {t.dtype}; convert it with .long()")
        if t.shape != like.shape[:1]:
            raise ValueError(
                f"{name} must hold one timestep for each image, shape ({like.shape[0]},); got {tuple(t.shape)}"
            )
    for name, schedule in schedules.items():
        if schedule.dtype != torch.float32 and not (schedule.dtype == like.dtype == torch.float64):
            raise TypeError(f"{name} must be float32, got {schedule.dtype}; noise schedules are not cast with a model")
        if schedule.ndim != 1 or not len(schedule):
            raise ValueError(f"{name} must have shape (T,), one value for each timestep; got {tuple(schedule.shape)}")
    (first, steps), *others = ((name, len(schedule)) for name, schedule in schedules.items())
    for name, length in others:
        if length != steps:
            raise ValueError(
                f"{name} must have a value for each timestep, {steps} of them like {first}; got {length}: give both"
                " from one noise schedule"
            )
    _check_one_device({"the images": like, **times, **schedules})


def _check_one_device(tensors: Mapping[str, torch.Tensor]) -> None:
    (first, like), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like {first}, it is on {tensor.device}; move it there")


def too_large(x: torch.Tensor) -> list[str]:
    """Why the kernels cannot take images of this size: they count the values of one image in 32 bits."""
    n = x.shape[1:].numel()
    return [f"an image has {n} values, more than 2^30"] if n > 2**30 else []


def at(schedule: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``schedule[t]``, shaped to broadcast over the images ``like``."""
    return schedule.gather(0, t).reshape(-1, *(1,) * (like.ndim - 1))
