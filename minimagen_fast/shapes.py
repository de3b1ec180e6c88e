"""Built-in captioned picture set: "a red circle on black", at any size, seeded, as many as asked for.

Every shape here is symmetric about a vertical axis and meets every horizontal line in at most one interval, so a shape
is described by one function: its half-width at a given height. `shape_mask` turns that into antialiased pixel coverage;
the pictures are drawn with it, and a judge that looks for shapes can match against the very same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from minimagen_fast.caption_store import CaptionEncodings, CaptionStore

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 190),
    "white": (240, 240, 240),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (20, 20, 20), "gray": (120, 120, 120)}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")

# Bounds of a drawn shape's extent, as a share of the picture's side.
MIN_EXTENT, MAX_EXTENT = 0.6, 0.9

# Rows sampled per pixel; along a row the coverage is exact, so this alone sets the antialiasing error.
ROWS_PER_PIXEL = 8

_COMBINATIONS = tuple((c, s, b) for c in COLORS for s in SHAPES for b in BACKGROUNDS)


def caption(color: str, shape: str, background: str) -> str:
    """Returns the caption of a picture, such as ``"a red circle on black"``.

    Raises:
        ValueError: If a name is not one of `COLORS`, `SHAPES`, `BACKGROUNDS`.
    """
    _check_names(color, shape, background)
    return f"a {color} {shape} on {background}"


def all_combinations() -> list[tuple[str, str, str]]:
    """Returns the 48 ``(color, shape, background)`` triples, colours slowest and backgrounds fastest."""
    return list(_COMBINATIONS)


def all_captions() -> list[str]:
    """Returns the 48 captions in the order of `all_combinations`."""
    return [caption(*names) for names in _COMBINATIONS]


def shape_mask(shape: str, size: int, center: tuple[float, float], extent: float) -> np.ndarray:
    """Computes how much of each pixel a shape covers.

    Args:
        shape: One of `SHAPES`. The triangle points up and is as high as it is wide; the arms of the cross (a plus sign)
            are a third of its extent wide.
        size: Side of the picture in pixels.
        center: ``(x, y)`` of the middle of the shape's bounding box in pixels, from the picture's upper left corner;
            the middle of the first pixel is (0.5, 0.5). Parts outside the picture are cut off.
        extent: Side of the shape's (square) bounding box in pixels, greater than 0.

    Returns:
        Array of shape (size, size), rows from top to bottom, float32 in [0, 1].

    Raises:
        ValueError: If `shape` is unknown, or `size` or `extent` is not positive.
    """
    if shape not in _HALF_WIDTHS:
        raise ValueError(f"shape is {shape!r}, but must be one of {', '.join(SHAPES)}.")
    if size < 1 or not extent > 0:
        raise ValueError(f"size and extent must be positive, but size is {size!r} and extent is {extent!r}.")
    return _shape_masks([shape], size, np.array([center]), np.array([extent]))[0]


def _shape_masks(shapes: Sequence[str], size: int, centers: np.ndarray, extents: np.ndarray) -> np.ndarray:
    """The masks of n shapes, as `shape_mask` does one, with centers (n, 2) and extents (n,): shape (n, size, size)."""
    radii = (extents / 2).astype(np.float32)[:, None]
    x, y = centers.astype(np.float32).T
    rows = (np.arange(size * ROWS_PER_PIXEL, dtype=np.float32) + 0.5) / ROWS_PER_PIXEL
    heights = (rows - y[:, None]) / radii
    half_widths = np.empty_like(heights)
    for shape in set(shapes):
        these = [place for place, each in enumerate(shapes) if each == shape]
        half_widths[these] = _HALF_WIDTHS[shape](heights[these])
    half_widths = (np.where(np.abs(heights) <= 1, half_widths, 0.0) * radii)[..., None]
    # Covered length left of each pixel edge; the difference over a pixel is the covered part of that pixel.
    edges = (np.arange(size + 1, dtype=np.float32) - x[:, None])[:, None]
    covered = np.minimum(np.maximum(edges, -half_widths), half_widths)
    covered = covered.reshape(len(shapes), size, ROWS_PER_PIXEL, size + 1).sum(axis=2)
    return np.clip(np.diff(covered, axis=2) / ROWS_PER_PIXEL, 0.0, 1.0)


def draw(color: str, shape: str, background: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Draws one picture, with the shape's size and position taken from `rng`.

    The extent is uniform in [0.6, 0.9] of the side, and the position uniform among those where the shape lies wholly
    inside the picture.

    Args:
        color: Colour of the shape, a key of `COLORS`.
        shape: One of `SHAPES`.
        background: A key of `BACKGROUNDS`.
        size: Side of the picture in pixels, at least 1.
        rng: Source of the random numbers; three are drawn.

    Returns:
        RGB image of `size` x `size` pixels.

    Raises:
        ValueError: If a name is unknown or `size` is not positive.
    """
    _check_names(color, shape, background)
    return Image.fromarray(_drawn([(color, shape, background)], size, [rng])[0])


class ShapesDataset(torch.utils.data.Dataset):
    """Captioned pictures of shapes for training, drawn on demand.

    Item i depends on (`seed`, i) alone, so any length costs nothing, and the same item comes back in every process. An
    item is ``{'image': (3, side_length, side_length) float32 in [0, 1], 'encoding': (1, n, dim) float, 'mask': (1, n)
    bool}`` with n the number of tokens of its caption. The 48 captions are encoded together, on the CPU, once per
    process and encoder, when the first item is asked for; items share these tensors, so do not change them in place.

    Args:
        length: Number of items.
        side_length: Side of the pictures in pixels.
        seed: Chooses the pictures; an integer of at least 0.
        encoder_name: Text encoder, as in `minimagen_fast.t5.t5_encode_text`.
        max_length: Largest number of tokens of a caption; longer ones are cut.
        captions: Pre-encoded captions, which spare loading the text encoder as long as all 48 are among them.

    Raises:
        ValueError: If a number is out of its range, or the captions were encoded otherwise.
    """

    def __init__(
        self,
        length: int = 10_000,
        *,
        side_length: int,
        seed: int = 0,
        encoder_name: str = "t5_tiny",
        max_length: int = 64,
        captions: CaptionStore | None = None,
    ) -> None:
        for name, value, least in (
            ("length", length, 1),
            ("side_length", side_length, 1),
            ("seed", seed, 0),
            ("max_length", max_length, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}.")
        self.length = length
        self.side_length = side_length
        self.seed = seed
        self.encoder_name = encoder_name
        self.max_length = max_length
        self._encodings = None if captions is None else CaptionEncodings(captions, encoder_name, max_length)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._items([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Returns several items, drawn together: what torch's data loader asks for, a batch at a time."""
        if type(self).__getitem__ is not ShapesDataset.__getitem__:
            # A subclass's own, which knows nothing of this.
            return [self[index] for index in indices]
        return self._items(indices) if len(indices) else []

    def _items(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        combinations, pixels = self._pixels(indices)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return [
            {"image": image, "encoding": encoding, "mask": mask}
            for image, (encoding, mask) in zip(images, map(self._encoded, combinations), strict=True)
        ]

    def _encoded(self, combination: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._encodings is not None:
            return self._encodings(caption(*_COMBINATIONS[combination]), device="cpu")
        from minimagen_fast.t5 import registrations

        return _encoded_captions(self.encoder_name, self.max_length, registrations(self.encoder_name))[combination]

    def raw(self, index: int) -> tuple[Image.Image, str]:
        """Returns picture `index` as an RGB image, and its caption.

        Raises:
            IndexError: If `index` is not in [-length, length).
        """
        (combination,), (pixels,) = self._pixels([index])
        return Image.fromarray(pixels), caption(*_COMBINATIONS[combination])

    def _pixels(self, indices: Sequence[int]) -> tuple[list[int], np.ndarray]:
        rngs = []
        for index in map(int, indices):
            if not -self.length <= index < self.length:
                raise IndexError(f"index is {index}, but the data set has {self.length} items.")
            rngs.append(np.random.default_rng((self.seed, index % self.length)))
        combinations = [int(rng.integers(len(_COMBINATIONS))) for rng in rngs]
        names = [_COMBINATIONS[combination] for combination in combinations]
        return combinations, _drawn(names, self.side_length, rngs)


def _drawn(pictures: Sequence[tuple[str, str, str]], size: int, rngs: Sequence[np.random.Generator]) -> np.ndarray:
    """Draws as `draw` does, several of known names, into an array of shape (n, size, size, 3), uint8."""
    extents, centers = [], []
    for rng in rngs:
        extent = rng.uniform(MIN_EXTENT, MAX_EXTENT) * size
        extents.append(extent)
        centers.append([rng.uniform(extent / 2, size - extent / 2) for _ in "xy"])
    colors, shapes, backgrounds = zip(*pictures, strict=True)
    masks = _shape_masks(shapes, size, np.array(centers), np.array(extents))[..., None]
    front = np.array([COLORS[name] for name in colors], dtype=np.float32)[:, None, None]
    back = np.array([BACKGROUNDS[name] for name in backgrounds], dtype=np.float32)[:, None, None]
    return np.rint(back + masks * (front - back)).astype(np.uint8)


def _check_names(color: str, shape: str, background: str) -> None:
    for argument, name, known in (
        ("color", color, COLORS),
        ("shape", shape, SHAPES),
        ("background", background, BACKGROUNDS),
    ):
        if name not in known:
            raise ValueError(f"{argument} is {name!r}, but must be one of {', '.join(known)}.")


def _cross_half_width(height: np.ndarray) -> np.ndarray:
    return np.where(np.abs(height) <= 1 / 3, 1.0, 1 / 3)


# Half-width of each shape at a height between -1 (top) and 1 (bottom), in units of half its extent.
_HALF_WIDTHS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "circle": lambda height: np.sqrt(np.maximum(1 - height**2, 0.0)),
    "square": np.ones_like,
    "triangle": lambda height: (height + 1) / 2,
    "cross": _cross_half_width,
}


@lru_cache(maxsize=8)
def _encoded_captions(
    encoder_name: str, max_length: int, registrations: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Encodes all captions, each without the padding that the longest one caused.

    Args:
        encoder_name: Name of the text encoder.
        max_length: Largest number of tokens of a caption.
        registrations: How often that name was registered; with another number it is another encoder.
    """
    from minimagen_fast.t5 import t5_encode_text

    encodings, masks = t5_encode_text(all_captions(), encoder_name, max_length, device="cpu")
    lengths = masks.sum(dim=1).clamp(min=1).tolist()
    return [(encodings[i : i + 1, :n].clone(), masks[i : i + 1, :n].clone()) for i, n in enumerate(lengths)]
