"""Captioned pictures for training: from the web; splitting and collating them."""

import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset, Subset, default_collate, get_worker_info, random_split

from .arguments import argument_of
from .caption_store import CaptionStore
from .captioned import FAILURES, CaptionedPictures, Item
from .fetch import RETRIES, TIMEOUT_SECONDS, fetch_image
from .folders import IMAGE_SUFFIXES, FolderDataset

__all__ = [
    "CONCEPTUAL_CAPTIONS",
    "FAILURES",
    "IMAGE_SUFFIXES",
    "ConceptualCaptions",
    "FolderDataset",
    "Item",
    "MinimagenCollator",
    "MinimagenDataset",
    "conceptual_rows",
    "get_minimagen_dl_opts",
    "split_train_valid",
]

CONCEPTUAL_CAPTIONS = "google-research-datasets/conceptual_captions"
SMALL_ROWS = 16
SPLIT_SEED = 0


class MinimagenDataset(CaptionedPictures):
    """Captioned pictures from the web.

    An item is ``{'image': (3, side_length, side_length) float32 in [0, 1], 'encoding': (1, n, dim) float32, 'mask':
    (1, n) bool}``, or None where the picture or the caption could not be had; :attr:`failures` counts these. A picture
    is scaled to a square, without `crop` each axis on its own, and its values are stretched to fill [0, 1] as in
    minimagen's ``_Rescale`` (those of a picture of one colour stay as they are).

    Args:
        hf_dataset: A Hugging Face ``DatasetDict``, or a mapping, which has below the key of the split that is taken
            'image_url' and 'caption', lists of one length, as a mapping or a table of pandas.
        encoder_name: Name of the text encoder, see :func:`.t5.t5_encode_text`.
        max_length: Number of tokens after which a caption is cut off.
        side_length: Side length in pixels to scale the pictures to.
        train: Whether to take the split 'train' (else 'validation').
        img_transform: Applied to the finished image tensor; where it gives None, the item is None.
        timeout: Seconds for one attempt to fetch a picture.
        retries: How often to try again after an error that may pass.
        captions: Pre-encoded captions. Those that are not among them are encoded when they are needed.
        crop: 'center' or 'random' to take the largest square from the middle or from anywhere before scaling; without
            it the whole picture is squeezed into a square.
        flip: Whether to mirror every second picture, left to right, at random.

    Raises:
        ValueError: if the split is missing, `side_length`, `max_length` or `crop` cannot be used, or the captions were
            encoded otherwise.
    """

    _default_crop = None
    _stretches = True

    def __init__(
        self,
        hf_dataset: Any,
        *,
        encoder_name: str,
        max_length: int,
        side_length: int,
        train: bool = True,
        img_transform: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
        timeout: float = TIMEOUT_SECONDS,
        retries: int = RETRIES,
        captions: CaptionStore | None = None,
        crop: str | None = None,
        flip: bool = False,
    ):
        super().__init__(
            side_length=side_length,
            encoder_name=encoder_name,
            max_length=max_length,
            captions=captions,
            crop=crop,
            flip=flip,
        )
        split = "train" if train else "validation"
        if split not in hf_dataset:
            raise ValueError(f"hf_dataset has no split {split!r}, it has {list(hf_dataset)}")
        self.rows = hf_dataset[split]
        if hasattr(self.rows, "columns"):
            # A table of pandas or the like, which gives no row by its number.
            self.rows = {column: list(self.rows[column]) for column in ("image_url", "caption")}
        self._last_transform = img_transform
        self._only_transform: Callable[[Image.Image], torch.Tensor | None] | None = None
        self.timeout = timeout
        self.retries = retries

    @property
    def urls(self) -> Sequence[str]:
        """The address of each picture, all read at once; others may be set in their place, as in minimagen."""
        return self.rows["image_url"]

    @urls.setter
    def urls(self, urls: Sequence[str]) -> None:
        self.rows = {"image_url": urls, "caption": self.captions}

    @property
    def captions(self) -> Sequence[str]:
        """Its caption, likewise."""
        return self.rows["caption"]

    @captions.setter
    def captions(self, captions: Sequence[str]) -> None:
        self.rows = {"image_url": self.urls, "caption": captions}

    @property
    def img_transform(self) -> Callable[[Image.Image], torch.Tensor | None]:
        """What makes the finished tensor, or None, of a PIL image.

        As in minimagen, what was given as `img_transform` is its last part, and what is set takes the place of all.
        """
        return self._transformed if self._only_transform is None else self._only_transform

    @img_transform.setter
    def img_transform(self, transform: Callable[[Image.Image], torch.Tensor | None] | None) -> None:
        self._only_transform = transform

    def _transformed(self, picture: Image.Image) -> torch.Tensor | None:
        return self._to_tensor(picture, None)

    def __len__(self) -> int:
        return len(self.rows["image_url"]) if isinstance(self.rows, Mapping) else len(self.rows)

    def _value(self, column: str, index: int) -> Any:
        # By row where there are rows: a whole column of a Hugging Face data set may be millions of strings.
        return self.rows[column][index] if isinstance(self.rows, Mapping) else self.rows[index][column]

    def all_captions(self) -> Iterator[str]:
        return (caption for caption in self.rows["caption"] if isinstance(caption, str))

    def _row(self, key: int) -> tuple[Any, Any]:
        return self._value("caption", key), key

    def _picture(self, source: int) -> Image.Image:
        return fetch_image(self._value("image_url", source), timeout=self.timeout, retries=self.retries)

    def _to_tensor(self, picture: Image.Image, chance: Sequence[float] | None) -> torch.Tensor | None:
        if self._only_transform is not None:
            return self._only_transform(picture.convert("RGB"))
        image = super()._to_tensor(picture, chance)
        return image if image is None or self._last_transform is None else self._last_transform(image)


def split_train_valid(
    dataset: Dataset, train_fraction: float, valid_num: int | None = None, *, seed: int = SPLIT_SEED
) -> tuple[Subset, Subset]:
    """Split a data set at random, the same way every time.

    Args:
        dataset: A data set with a length.
        train_fraction: Share of it to train on, between 0 and 1.
        valid_num: How many of the others to validate on; all, if not given.
        seed: Another seed gives another split.

    Returns:
        The part to train on and the part to validate on.

    Raises:
        ValueError: if the share is out of range or leaves one part empty, or ``valid_num`` is less than 1.
    """
    if not 0 < train_fraction < 1:
        raise ValueError(f"TRAIN_VALID_FRAC must lie between 0 and 1, got {train_fraction}")
    if valid_num is not None and valid_num < 1:
        raise ValueError(f"VALID_NUM must be at least 1, or None for all, got {valid_num}")
    number: int = len(dataset)  # type: ignore[arg-type]
    for_training = int(train_fraction * number)
    if not 0 < for_training < number:
        raise ValueError(
            f"TRAIN_VALID_FRAC={train_fraction} leaves one part of {number} pictures empty: use more pictures or"
            " another share"
        )
    generator = torch.Generator().manual_seed(seed)
    train, valid = random_split(dataset, [for_training, number - for_training], generator=generator)
    if valid_num is not None:
        if valid_num > len(valid):
            warnings.warn(
                f"VALID_NUM={valid_num}, but only {len(valid)} pictures are left to validate on", stacklevel=2
            )
        valid = Subset(valid.dataset, list(valid.indices)[:valid_num])
    return train, valid


def conceptual_rows() -> Any:
    """The rows of the Conceptual Captions data set, downloaded where they are not here yet, by split.

    Raises:
        ImportError: if the package ``datasets`` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "Conceptual Captions needs the package datasets: pip install 'minimagen_fast[data]'"
        ) from error
    return load_dataset(CONCEPTUAL_CAPTIONS)


def ConceptualCaptions(
    args: Namespace | dict[str, Any],
    smalldata: bool = False,
    testset: bool = False,
    *,
    captions: CaptionStore | None = None,
    crop: str | None = None,
    flip: bool = False,
) -> tuple[Subset, Subset] | MinimagenDataset:
    """The Conceptual Captions data set (Sharma et al., 2018): 3.3 million captions with addresses of pictures.

    About a third of the pictures are no longer there; such items are None.

    Args:
        args: Arguments from :func:`.training.get_minimagen_parser`; `T5_NAME`, `MAX_NUM_WORDS`, `IMG_SIDE_LEN`,
            `TRAIN_VALID_FRAC` and `VALID_NUM` are used.
        smalldata: Whether to take the first 16 rows alone.
        testset: Whether to return the data set's own validation split, for testing.
        captions: Pre-encoded captions. Those that are not among them are encoded when they are needed.
        crop: See :class:`MinimagenDataset`.
        flip: See :class:`MinimagenDataset`.

    Returns:
        The test data set, or the parts of the training split to train and to validate on, the same every time.

    Raises:
        ImportError: if the package ``datasets`` is not installed.
        ValueError: if an argument is out of range.
    """
    rows = conceptual_rows()
    if smalldata:
        rows = {name: _first_rows(rows[name]) for name in ("train", "validation")}
    dataset = MinimagenDataset(
        rows,
        encoder_name=argument_of(args, "T5_NAME"),
        max_length=argument_of(args, "MAX_NUM_WORDS"),
        side_length=argument_of(args, "IMG_SIDE_LEN"),
        train=not testset,
        captions=captions,
        crop=crop,
        flip=flip,
    )
    if testset:
        return dataset
    return split_train_valid(dataset, argument_of(args, "TRAIN_VALID_FRAC"), argument_of(args, "VALID_NUM", None))


def _first_rows(split: Any) -> Any:
    if isinstance(split, Mapping):
        return {column: split[column][:SMALL_ROWS] for column in ("image_url", "caption")}
    return split.select(range(min(SMALL_ROWS, len(split))))


class MinimagenCollator:
    """Makes a batch of items: drops those that are None, pads the captions, stacks.

    Args:
        device: Where to put the batch. In a worker process it stays in main memory, since workers must not touch CUDA;
            :func:`.training.MinimagenTrain` moves it.
    """

    def __init__(self, device: torch.device | str):
        self.device = device

    def __call__(self, batch: Sequence[Item | None]) -> Item | None:
        """Collate items of 'image' (c, s, s), 'encoding' (n, dim) or (1, n, dim) and 'mask' (n,) or (1, n).

        Returns:
            'image' (b, c, s, s), 'encoding' (b, max n, dim), zero where padded, and 'mask' bool (b, max n), False
            there; or None if there is nothing left.
        """
        items = [item for item in batch if item is not None and item["image"] is not None]
        if not items:
            return None
        masks = [item["mask"].reshape(-1).bool() for item in items]
        encodings = [item["encoding"].reshape(-1, item["encoding"].shape[-1]) for item in items]
        longest = max(len(mask) for mask in masks)
        padded = [
            {**item, "mask": _padded(mask, longest), "encoding": _padded(encoding, longest)}
            for item, mask, encoding in zip(items, masks, encodings, strict=True)
        ]
        collated = default_collate(padded)
        if get_worker_info() is not None:
            return collated
        return {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in collated.items()
        }


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Rows, and zeros after them, if there are fewer."""
    missing = length - len(rows)
    return F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows


def get_minimagen_dl_opts(device: torch.device | str) -> dict[str, Any]:
    """The default options of a data loader: batches of 4, shuffled, whole ones only, in this process.

    Args:
        device: Where the batches go, see :class:`MinimagenCollator`.
    """
    return {
        "batch_size": 4,
        "shuffle": True,
        "num_workers": 0,
        "drop_last": True,
        "collate_fn": MinimagenCollator(device),
    }
