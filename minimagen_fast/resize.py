"""Antialiased cubic resizing as two small matrix products.

A separable resize is linear in the image, so each axis is one (new, old) matrix that depends on nothing but the two
sizes and the padding mode. Building it once in float64 and keeping it in float32 leaves two matrix products per call,
no host synchronisation and no padding copy: the padding is folded into the matrix.

Kernel: Keys, "Cubic convolution interpolation for digital image processing" (1981), a = -0.5. Alignment: image centres
coincide, as in Shocher et al., "From Discrete to Continuous Convolutions" (2020), section 3.
"""

from contextlib import nullcontext

import numpy as np
import torch

from .kernels.arguments import has_autocast

PAD_MODES = ("constant", "edge", "reflect", "symmetric")
# Pictures may have any size: the matrices used last are kept, which are those of a training step whatever it loads.
KEPT_BYTES, KEPT_NUMBER = 64 * 2**20, 256
_kept: dict[tuple[int, int, str, torch.device], torch.Tensor] = {}  # the last used at the end
_SUPPORT = 4  # pixels of the source that the cubic kernel reaches at scale 1


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1.0
    far = -0.5 * x**3 + 2.5 * x**2 - 4.0 * x + 2.0
    return np.where(x <= 1.0, near, np.where(x <= 2.0, far, 0.0))


def _source_index(index: np.ndarray, size: int, pad_mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Where a pixel beyond the border takes its value from, and whether it has one at all."""
    exists = np.ones(index.shape, dtype=bool)
    if pad_mode == "constant":
        exists = (index >= 0) & (index < size)
        return np.clip(index, 0, size - 1), exists
    if pad_mode == "edge" or size == 1:
        return np.clip(index, 0, size - 1), exists
    if pad_mode == "reflect":
        period = 2 * (size - 1)
        index = index % period
        return np.where(index < size, index, period - index), exists
    period = 2 * size
    index = index % period
    return np.where(index < size, index, period - 1 - index), exists


def _matrix_float64(old: int, new: int, pad_mode: str) -> np.ndarray:
    scale = new / old
    stretch = min(scale, 1.0)  # below 1 the kernel is widened so that it also low-passes
    reach = _SUPPORT / stretch / 2
    centre = np.arange(new) / scale + (old - 1) / 2 - (new - 1) / (2 * scale)
    taps = np.ceil(centre - reach).astype(np.int64)[:, None] + np.arange(int(np.ceil(2 * reach)) + 1)
    weights = _cubic((centre[:, None] - taps) * stretch)
    weights /= weights.sum(axis=1, keepdims=True)
    source, exists = _source_index(taps, old, pad_mode)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], source), weights * exists)
    return matrix


def resize_matrix(old: int, new: int, pad_mode: str, device: torch.device) -> torch.Tensor:
    """The (new, old) float32 matrix that resizes one axis from ``old`` to ``new`` pixels."""
    key = old, new, pad_mode, device
    # Without a lock, which a worker process might inherit locked: of threads, one may make what another is taking out.
    matrix = _kept.pop(key, None)
    made = matrix is None
    if matrix is None:
        # Outside any inference mode, so that one kept tensor serves training and sampling alike.
        with torch.inference_mode(False):
            matrix = torch.from_numpy(_matrix_float64(old, new, pad_mode)).to(device=device, dtype=torch.float32)
    _kept[key] = matrix
    if made:
        _forget_oldest()
    return matrix


def _forget_oldest() -> None:
    kept = list(_kept.items())
    number, size = len(kept), sum(matrix.nbytes for _, matrix in kept)
    for key, matrix in kept:
        if number <= KEPT_NUMBER and size <= KEPT_BYTES:
            return
        _kept.pop(key, None)
        number, size = number - 1, size - matrix.nbytes


def resize(image: torch.Tensor, height: int, width: int, pad_mode: str) -> torch.Tensor:
    """Resize (..., h, w) to (..., height, width); computed in float32, returned in the image's dtype."""
    # Under autocast, which not every device has, a matrix product would round the picture to bfloat16.
    device_type = image.device.type
    with torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext():
        out = image.float()
        if image.shape[-2] != height:
            out = resize_matrix(image.shape[-2], height, pad_mode, image.device) @ out
        if image.shape[-1] != width:
            out = out @ resize_matrix(image.shape[-1], width, pad_mode, image.device).T
        return out.to(image.dtype)


def noise_for(image: torch.Tensor, resized: bool, generator: torch.Generator | None = None) -> torch.Tensor:
    """Standard normal noise of an image's shape, dtype and device, the same numbers as the original package draws.

    Random numbers are drawn in the order in which a tensor lies in memory, and the original's resizing leaves its
    result as (w, c, h, b). Noise is therefore drawn that way here too, for a seed to mean the same in both packages.

    Args:
        image: Images, shape (b, c, h, w).
        resized: Whether the images have just been resized.
        generator: Source of the random numbers; the global one if not given.
    """
    b, c, h, w = image.shape
    if not resized:
        return torch.empty_like(image).normal_(generator=generator)
    noise = torch.empty_strided((b, c, h, w), (1, h * b, b, c * h * b), dtype=image.dtype, device=image.device).normal_(
        generator=generator
    )
    return noise.contiguous()
