"""What all data sets of captioned pictures share: from a picture and a caption to an item, or to the reason why not."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .caption_store import CaptionEncodings, CaptionStore
from .decode import REASONS, ImageError
from .helpers import resize_image_to
from .shared_counts import SharedCounts

# Besides what goes wrong in fetching and decoding: a file that cannot be opened (any more), and a picture that the
# caller's own transform gave None for.
FAILURES = (*REASONS, "unreadable", "transform")
CROPS = ("center", "random")

Item = dict[str, torch.Tensor]


class NoItem(Exception):
    """An item that could not be had; it has been counted.

    Attributes:
        reason: One of `FAILURES`.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class CaptionedPictures(Dataset):
    """Items of a picture and its encoded caption; what cannot be had is counted.

    An item is ``{'image': (3, side_length, side_length) float32 in [0, 1], 'encoding': (1, n, dim) float32, 'mask':
    (1, n) bool}``. Subclasses say where pictures and captions come from.

    Args:
        side_length: Side length in pixels to scale the pictures to.
        encoder_name: Name of the text encoder, see :func:`.t5.t5_encode_text`.
        max_length: Number of tokens after which a caption is cut off.
        captions: Pre-encoded captions. Those that are not among them are encoded when they are needed.
        crop: What becomes of a picture that is not square: 'center' and 'random' take the largest square, from its
            middle or from anywhere; None is what this kind of data set does by default.
        flip: Whether to mirror every second picture, left to right, at random.

    Raises:
        ValueError: if an argument is out of range, or the captions were encoded otherwise.
    """

    # Where `crop` is not given: a square crop, or None to squeeze the whole picture into a square.
    _default_crop: str | None = "center"
    # Whether values are stretched to fill [0, 1].
    _stretches = False

    def __init__(
        self,
        *,
        side_length: int,
        encoder_name: str,
        max_length: int,
        captions: CaptionStore | None,
        crop: str | None = None,
        flip: bool = False,
    ):
        for name, value in (("side_length", side_length), ("max_length", max_length)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if crop not in (None, *CROPS):
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, or None, got {crop!r}")
        self.side_length = int(side_length)
        self.crop = crop or self._default_crop
        self.flip = bool(flip)
        self._encodings = CaptionEncodings(captions, encoder_name, int(max_length))
        self._failures = SharedCounts(FAILURES)

    @property
    def encoder_name(self) -> str:
        """Name of the text encoder; another may be set."""
        return self._encodings.name

    @encoder_name.setter
    def encoder_name(self, name: str) -> None:
        self._encodings = self._encodings.encoded_as(name, self.max_length)

    @property
    def max_length(self) -> int:
        """Number of tokens after which a caption is cut off; another may be set."""
        return self._encodings.max_length

    @max_length.setter
    def max_length(self, max_length: int) -> None:
        self._encodings = self._encodings.encoded_as(self.encoder_name, max_length)

    @property
    def failures(self) -> dict[str, int]:
        """How many items could not be had so far, by reason, those of worker processes included."""
        return self._failures.as_dict()

    @property
    def captions_not_stored(self) -> int:
        """How many items so far had a caption that was not in the store of pre-encoded ones and was encoded instead."""
        return self._encodings.not_stored

    def all_captions(self) -> Iterator[str]:
        """The captions of all items, in order and as often as they come; what is no string is left out."""
        raise NotImplementedError

    def encode_on(self, device: torch.device | str | None) -> None:
        """Encode captions that are not stored on this device, here and in what :meth:`unaugmented` gives.

        Args:
            device: See :func:`.t5.t5_encode_text`, which chooses where none is given.
        """
        self._encodings.device = device

    def unaugmented(self) -> "CaptionedPictures":
        """The same data without chance, for validation: cropped to the middle where it was at random, not mirrored.

        Failures of both are counted together.
        """
        plain = copy.copy(self)
        plain.crop = "center" if self.crop == "random" else self.crop
        plain.flip = False
        return plain

    def item(self, key: Any, chance: Sequence[float] | None = None) -> Item:
        """An item, or the reason why it cannot be had.

        Args:
            key: What :meth:`_row` takes; the number of the item, where items have one.
            chance: Three numbers in [0, 1) that decide where a random crop lies (from the left, from the top) and, if
                below a half, that the picture is mirrored. Drawn from torch's global generator if not given.

        Raises:
            NoItem: if it cannot be had.
        """
        try:
            caption, source = self._row(key)
            if not isinstance(caption, str):
                raise ImageError("caption", f"a caption must be a string, got {caption!r}")
            picture = self._picture(source)
        except ImageError as error:
            raise self._counted(error.reason) from error
        except OSError as error:
            raise self._counted("unreadable") from error
        image = self._to_tensor(picture, chance)
        if image is None:
            raise self._counted("transform")
        encoding, mask = self._encodings(caption)
        return {"image": image, "encoding": encoding, "mask": mask}

    def __getitem__(self, index: int) -> Item | None:
        try:
            return self.item(int(index))
        except NoItem:
            return None

    def _row(self, key: Any) -> tuple[Any, Any]:
        """Caption of an item, and whatever :meth:`_picture` gets its picture from."""
        raise NotImplementedError

    def _picture(self, source: Any) -> Image.Image:
        raise NotImplementedError

    def _counted(self, reason: str) -> NoItem:
        self._failures.add(reason)
        return NoItem(reason)

    def _to_tensor(self, picture: Image.Image, chance: Sequence[float] | None) -> torch.Tensor | None:
        if chance is None:
            chance = torch.rand(3).tolist() if self.flip or self.crop == "random" else (0.5, 0.5, 0.5)
        if self.crop is not None:
            picture = _square(picture, chance if self.crop == "random" else None)
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float().div(255)
        if self.flip and chance[2] < 0.5:
            pixels = pixels.flip(-1)
        if not self._stretches:
            return resize_image_to(pixels, self.side_length, clamp_range=(0.0, 1.0))[0].clamp(0.0, 1.0)
        image = resize_image_to(pixels, self.side_length)[0]
        low, high = image.min(), image.max()
        # A picture of one colour has nothing to stretch.
        return (image - low) / (high - low) if high - low > 1e-4 else image.clamp(0, 1)


def _square(picture: Image.Image, chance: Sequence[float] | None) -> Image.Image:
    side = min(picture.size)
    spare = picture.width - side, picture.height - side
    if chance is None:
        left, top = (pixels // 2 for pixels in spare)
    else:
        left, top = (int(share * (pixels + 1)) for share, pixels in zip(chance, spare, strict=False))
    return picture.crop((left, top, left + side, top + side))
