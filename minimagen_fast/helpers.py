"""Small functions that the other modules share."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch

from .arguments import check_not_meta, check_tensor
from .resize import PAD_MODES, resize

T = TypeVar("T")


def cast_tuple(val: Any, length: int | None = None) -> tuple:
    """Make a tuple of a value, list or tuple.

    Args:
        val: A list or tuple (taken as it is) or a single value (repeated ``length`` times).
        length: The wanted length; a single value is taken once if not given.

    Raises:
        ValueError: if ``val`` is a list or tuple of another length.
    """
    out = tuple(val) if isinstance(val, list | tuple) else (val,) * default(length, 1)
    if exists(length) and len(out) != length:
        raise ValueError(f"expected {length} values, one for each, or a single value; got {len(out)}: {val!r}")
    return out


def default(val: Any, d: Any) -> Any:
    """``val`` unless it is None; otherwise ``d``, called first if it is callable."""
    if exists(val):
        return val
    return d() if callable(d) else d


def eval_decorator(fn: Callable) -> Callable:
    """Run a method of a module in eval mode; every submodule gets its own mode back, also after an error."""

    @wraps(fn)
    def inner(model: torch.nn.Module, *args, **kwargs):
        with evaluating(model):
            return fn(model, *args, **kwargs)

    return inner


# By module and part of one, how many are evaluating it, and the mode that the first of them met.
_evaluated: "WeakKeyDictionary[torch.nn.Module, tuple[int, bool]]" = WeakKeyDictionary()
# The `train` of a part may be someone's, and do anything.
_changing_modes = threading.RLock()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Have a module in eval mode; every submodule gets its own mode back.

    Several threads may evaluate one module at a time, or modules that share parts: the mode of each part is that before
    the first of such blocks, and comes back with the end of the last.
    """
    parts = list(model.modules())
    with _changing_modes:
        for part in parts:
            number, training = _evaluated.get(part) or (0, part.training)
            _evaluated[part] = number + 1, training
    try:
        with _changing_modes:
            model.eval()
        yield
    finally:
        with _changing_modes:
            _restore(parts)


def _restore(parts: list[torch.nn.Module]) -> None:
    """Give each part its own mode back, unless someone else is evaluating it."""
    own: dict[torch.nn.Module, bool] = {}
    for part in parts:
        number, training = _evaluated.pop(part)
        if number > 1:
            _evaluated[part] = number - 1, training
        else:
            own[part] = training
    for part, training in own.items():
        # Layers of adapters merge their weights with the mode, and take them apart again.
        if type(part).train is not torch.nn.Module.train:
            part.train(training)
    # Which has set the modes of all their parts.
    for part in parts:
        part.training = own.get(part, False)


def exists(val: Any) -> bool:
    """Whether a value is not None."""
    return val is not None


def extract(a: torch.Tensor, t: torch.Tensor, x_shape: torch.Size) -> torch.Tensor:
    """Pick one value per image and shape it to broadcast over that image.

    Args:
        a: Values by timestep, shape (T,).
        t: Timestep of each image, int64, shape (b,), values in [0, T).
        x_shape: Shape of the images, (b, ...).

    Returns:
        ``a[t]``, shape (b, 1, ..., 1) with as many dimensions as ``x_shape``.
    """
    return a.gather(-1, t).reshape(t.shape[0], *((1,) * (len(x_shape) - 1)))


def identity(t: T, *args, **kwargs) -> T:
    """The first argument; whatever else is passed is ignored."""
    return t


def log(t: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """Natural logarithm of ``t`` clamped from below to ``eps``, so that it is always finite."""
    return torch.log(t.clamp(min=eps))


def maybe(fn: Callable) -> Callable:
    """A function that passes None through and applies ``fn`` to everything else."""

    @wraps(fn)
    def inner(x):
        return fn(x) if exists(x) else x

    return inner


def module_device(module: torch.nn.Module) -> torch.device:
    """The device of a module's first parameter."""
    return next(module.parameters()).device


def normalize_neg_one_to_one(img: torch.Tensor) -> torch.Tensor:
    """Map images from [0, 1] to [-1, 1]."""
    return img * 2 - 1


@contextmanager
def null_context(*args, **kwargs) -> Iterator[None]:
    """A context manager that does nothing."""
    yield


def prob_mask_like(shape: tuple, prob: float, device: torch.device) -> torch.Tensor:
    """A boolean mask whose elements are True with probability ``prob``, each on its own.

    With 0 and 1 the mask is constant and no random number is drawn.

    Args:
        shape: Shape of the mask.
        prob: Probability of True, in [0, 1].
        device: Where to make it.
    """
    if prob == 1:
        return torch.ones(shape, device=device, dtype=torch.bool)
    if prob == 0:
        return torch.zeros(shape, device=device, dtype=torch.bool)
    return torch.zeros(shape, device=device, dtype=torch.float32).uniform_(0, 1) < prob


def resize_image_to(
    image: torch.Tensor,
    target_image_size: int,
    clamp_range: tuple | None = None,
    pad_mode: Literal["constant", "edge", "reflect", "symmetric"] = "reflect",
) -> torch.Tensor:
    """Resize images to a square, each axis on its own, with an antialiased cubic kernel (:mod:`.resize`).

    Args:
        image: Images, floating point, shape (b, c, h, w), or one, (c, h, w).
        target_image_size: Side length s of the result, in pixels.
        clamp_range: (low, high) to clamp the result to; a cubic kernel overshoots at edges. Images that already have
            the target size are returned as they are, unclamped.
        pad_mode: What lies beyond the border: zeros, the edge pixel, or the mirrored image without ('reflect') or
            with ('symmetric') the edge pixel repeated.

    Returns:
        Images of the same dtype, shape (b, c, s, s), or (c, s, s).

    Raises:
        TypeError: if the image is not a floating point tensor.
        ValueError: for another number of dimensions, an empty or unknown size, or an unknown ``pad_mode``.
    """
    check_tensor("image", image)
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point, got {image.dtype}; convert it first, e.g. image / 255")
    if image.ndim not in (3, 4) or 0 in image.shape[-2:]:
        raise ValueError(f"image must have shape (b, c, h, w) or (c, h, w) with pixels in it, got {tuple(image.shape)}")
    if pad_mode not in PAD_MODES:
        raise ValueError(f"pad_mode must be one of {', '.join(PAD_MODES)}; got {pad_mode!r}")
    size = int(target_image_size)
    if size < 1 or size != target_image_size:
        raise ValueError(f"target_image_size must be a whole number of pixels, at least 1; got {target_image_size!r}")
    if image.shape[-2] == size and image.shape[-1] == size:
        return image
    out = resize(image, size, size, pad_mode)
    return out.clamp(*clamp_range) if exists(clamp_range) else out


def right_pad_dims_to(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """``t`` with trailing dimensions of size 1, so that it has at least as many dimensions as ``x``."""
    missing = x.ndim - t.ndim
    return t if missing <= 0 else t.view(*t.shape, *((1,) * missing))


def usable_device(device: torch.device | str, argument: str = "device") -> torch.device:
    """The device, with its index, after seeing that it can hold a tensor.

    Args:
        device: A device or its name.
        argument: What the error calls it.

    Raises:
        ValueError: if there is no such device, or it cannot be used.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{argument} {str(device)!r} cannot be used here: {reason}") from error


def device_for_values(device: torch.device | str, argument: str = "device") -> torch.device:
    """As :func:`usable_device`, after seeing that what is computed there has values, too.

    Raises:
        ValueError: if there is no such device, or it cannot be used, or it is ``meta``.
    """
    device = usable_device(device, argument)
    check_not_meta(device, argument)
    return device


def device_of_rank(name: str | None, local_rank: int | str) -> torch.device:
    """What ``--DEVICE`` says to one of the processes of a machine, by its number there: ``cuda`` is its own, to each.

    A CUDA device where there is one, if it says nothing.

    Raises:
        ValueError: as :func:`device_for_values`.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    return device_for_values(f"cuda:{local_rank}" if name == "cuda" else name, "--DEVICE")


def unnormalize_zero_to_one(normed_img: torch.Tensor) -> torch.Tensor:
    """Map images from [-1, 1] to [0, 1]."""
    return (normed_img + 1) * 0.5
