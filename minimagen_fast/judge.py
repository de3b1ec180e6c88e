"""An automatic judge of pictures of the built-in set: what colour, shape and background does a picture really show?

It knows how such pictures are drawn and nothing of the model that made them. The background is read off the border, the
object is what differs from it, its colour the nearest of the known ones, and its shape the one whose drawn mask, at the
best position and size, fits the object's pixels best.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .shapes import BACKGROUNDS, COLORS, MAX_EXTENT, MIN_EXTENT, SHAPES, shape_mask

# Farther than this in RGB (0 to 255 a channel) from every known colour is none of them.
MAX_COLOR_DISTANCE = 75.0
# A pixel of the object differs from the background by at least this much.
MIN_CONTRAST = 60.0
# A shape whose best fit leaves more than this share of its area unexplained is not recognised.
MAX_MISFIT = 0.35


@dataclass(frozen=True)
class Verdict:
    """What a picture shows; None where it is nothing known."""

    color: str | None
    shape: str | None
    background: str | None


@dataclass(frozen=True)
class Scores:
    """Shares in [0, 1] of pictures that show what their captions say."""

    color: float
    shape: float
    background: float
    pictures: int


def judge(image: Image.Image) -> Verdict:
    """Say what a picture shows.

    Args:
        image: A square picture of at least 8x8 pixels; converted to RGB.

    Raises:
        ValueError: if it is not square or too small.
    """
    if image.width != image.height or image.width < 8:
        raise ValueError(f"image must be square and at least 8x8 pixels, got {image.width}x{image.height}")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    difference = np.linalg.norm(pixels - background, axis=-1)
    inside = _without_specks(difference > max(MIN_CONTRAST, 0.5 * np.quantile(difference, 0.98)))
    background_name = _nearest(background, BACKGROUNDS)
    # The smallest shape that the set draws, a triangle, covers half of its bounding box.
    if inside.mean() < 0.5 * MIN_EXTENT**2 / 2:
        return Verdict(None, None, background_name)
    color = np.median(pixels[inside], axis=0)
    # How much of each pixel the object covers: the pixel's place on the line from the background's colour to its own.
    direction = color - background
    coverage = np.clip((pixels - background) @ direction / (direction @ direction), 0.0, 1.0)
    return Verdict(_nearest(color, COLORS), _fitting_shape(coverage, inside), background_name)


def score(images: Sequence[Image.Image], wanted: Sequence[tuple[str, str, str]]) -> Scores:
    """Judge pictures against what they should show.

    Args:
        images: Pictures.
        wanted: (color, shape, background) of each.

    Raises:
        ValueError: if there are none, or not as many of the one as of the other.
    """
    if not images or len(images) != len(wanted):
        raise ValueError(f"images and wanted must be of one length, at least 1; got {len(images)} and {len(wanted)}")
    verdicts = [judge(image) for image in images]
    pairs = list(zip(verdicts, wanted, strict=True))
    return Scores(
        color=float(np.mean([verdict.color == color for verdict, (color, _, _) in pairs])),
        shape=float(np.mean([verdict.shape == shape for verdict, (_, shape, _) in pairs])),
        background=float(np.mean([verdict.background == background for verdict, (_, _, background) in pairs])),
        pictures=len(pairs),
    )


def _without_specks(inside: np.ndarray) -> np.ndarray:
    """Drop pixels with fewer than three neighbours of the eight inside: noise would stretch the bounding box."""
    padded = np.pad(inside, 1).astype(int)
    height, width = inside.shape
    around = sum(padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)) - inside
    return inside & (around >= 3)


def _nearest(color: np.ndarray, known: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(color - np.array(rgb, dtype=np.float32))) for name, rgb in known.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOR_DISTANCE else None


def _fitting_shape(coverage: np.ndarray, inside: np.ndarray) -> str | None:
    size = len(coverage)
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    extent = max(bottom - top, right - left)
    best_misfit, best_shape = MAX_MISFIT, None
    step = max(size / 64, 0.5)
    offsets = np.arange(-2, 3) * step
    extents = [e for e in extent + np.arange(-3, 5) * step if 0.8 * MIN_EXTENT <= e / size <= 1.2 * MAX_EXTENT]
    for shape in SHAPES:
        for extent in extents:
            for dy in offsets:
                for dx in offsets:
                    center = ((left + right) / 2 + dx, (top + bottom) / 2 + dy)
                    mask = shape_mask(shape, size, center, extent)
                    misfit = float(np.abs(mask - coverage).sum() / mask.sum())
                    if misfit < best_misfit:
                        best_misfit, best_shape = misfit, shape
    return best_shape
