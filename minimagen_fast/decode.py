"""From the bytes of an image file to an RGB picture, or to the reason why not."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Beyond this many pixels a file is not decoded: a few kilobytes can claim to be gigabytes of picture.
MAX_PIXELS = 64_000_000
# Nor beyond so many in a row or a column, as many as JPEG has: the other side, enlarged, would make it gigabytes.
MAX_SIDE = 65_535

# What undoes the orientations of EXIF; 1 needs nothing.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Formats of pictures on the web and in folders. PIL knows more, but some of those start other programs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF")

REASONS = ("scheme", "http", "timeout", "network", "too_large", "not_an_image", "truncated", "caption")


class ImageError(Exception):
    """A picture that could not be had.

    Attributes:
        reason: One of `REASONS`.
    """

    def __init__(self, reason: str, message: str):
        assert reason in REASONS
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.reason, str(self))


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file of any of the `FORMATS`, in any mode.

    Grey, palette, CMYK and 16-bit pictures become RGB, transparent ones stand on white, and a camera's orientation mark
    is obeyed.

    Args:
        data: The file's bytes.
        max_pixels: Larger pictures are refused before they are decoded, as are those with a side beyond `MAX_SIDE`.

    Raises:
        ImageError: 'not_an_image', also for other formats that PIL reads, 'truncated' or 'too_large'.
    """
    with _faults_named(), Image.open(io.BytesIO(data), formats=_formats()) as image:
        return _checked_rgb(image, max_pixels)


def rgb_of(image: Image.Image) -> Image.Image:
    """A picture that PIL has opened already, as :func:`decode_image` makes it of a file.

    Raises:
        ImageError: 'truncated' or 'too_large'.
    """
    with _faults_named():
        return _checked_rgb(image, MAX_PIXELS)


@contextmanager
def _faults_named() -> Iterator[None]:
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", "no image format that is known") from error
    except ImageError:
        raise
    except Exception as error:
        # PIL's decoders raise anything at all on files that end early or contradict themselves.
        raise ImageError("truncated", f"the picture is damaged: {error}") from error


def _checked_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise ImageError("too_large", f"{image.width}x{image.height} pixels, at most {max_pixels} are allowed")
    if max(image.size) > MAX_SIDE:
        raise ImageError("too_large", f"{image.width}x{image.height} pixels, a side has at most {MAX_SIDE}")
    image.load()
    return _as_rgb(_upright(image))


@lru_cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this PIL was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    """As the camera was held; a picture whose EXIF cannot be read stays as it is."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # anything at all, as decoders
        return image
    return image if turn is None else image.transpose(turn)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # PIL would cut these at 255 instead of scaling them.
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1.0)
        return Image.fromarray(np.clip(values / top * 255, 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
