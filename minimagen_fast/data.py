"""Captioned pictures for training: from the web, from a folder; splitting and collating them."""

import csv
import io
import json
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset, Subset, default_collate, get_worker_info, random_split

from .caption_store import CaptionEncodings, CaptionStore
from .decode import REASONS, ImageError, decode_image
from .fetch import RETRIES, TIMEOUT_SECONDS, fetch_image
from .helpers import resize_image_to
from .shared_counts import SharedCounts
from .t5 import MAX_LENGTH

CONCEPTUAL_CAPTIONS = "google-research-datasets/conceptual_captions"
SMALL_ROWS = 16
SPLIT_SEED = 0
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Besides what goes wrong in fetching and decoding: a file of a folder that cannot be opened (any more), and a picture
# that the caller's own transform gave None for.
FAILURES = (*REASONS, "unreadable", "transform")

Item = dict[str, torch.Tensor]


class _CaptionedPictures(Dataset):
    """Items of a picture and its encoded caption; what cannot be had is counted and becomes None."""

    def __init__(self, *, side_length: int, encoder_name: str, max_length: int, captions: CaptionStore | None):
        for name, value in (("side_length", side_length), ("max_length", max_length)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.side_length = side_length
        self.encoder_name = encoder_name
        self.max_length = max_length
        self._encodings = CaptionEncodings(captions, encoder_name, max_length)
        self._failures = SharedCounts(FAILURES)

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

    def _picture(self, index: int) -> Image.Image:
        raise NotImplementedError

    def _caption(self, index: int) -> Any:
        raise NotImplementedError

    def _to_tensor(self, picture: Image.Image) -> torch.Tensor | None:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Item | None:
        index = int(index)
        try:
            caption = self._caption(index)
            if not isinstance(caption, str):
                raise ImageError("caption", f"a caption must be a string, got {caption!r}")
            picture = self._picture(index)
        except ImageError as error:
            self._failures.add(error.reason)
            return None
        except OSError:
            self._failures.add("unreadable")
            return None
        image = self._to_tensor(picture)
        if image is None:
            self._failures.add("transform")
            return None
        encoding, mask = self._encodings(caption)
        return {"image": image, "encoding": encoding, "mask": mask}


def _tensor(picture: Image.Image) -> torch.Tensor:
    """(1, 3, h, w), float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float().div(255)


class MinimagenDataset(_CaptionedPictures):
    """Captioned pictures from the web.

    An item is ``{'image': (3, side_length, side_length) float32 in [0, 1], 'encoding': (1, n, dim), 'mask': (1, n)
    bool}``, or None where the picture or the caption could not be had; :attr:`failures` counts these. A picture is
    scaled to a square, each axis on its own, and its values are stretched to fill [0, 1].

    Args:
        hf_dataset: A Hugging Face ``DatasetDict``, or a mapping with the keys 'train' and 'validation' and below each
            'image_url' and 'caption', lists of one length.
        encoder_name: Name of the text encoder, see :func:`.t5.t5_encode_text`.
        max_length: Number of tokens after which a caption is cut off.
        side_length: Side length in pixels to scale the pictures to.
        train: Whether to take the split 'train' (else 'validation').
        img_transform: Applied to the finished image tensor; where it gives None, the item is None.
        timeout: Seconds for one attempt to fetch a picture.
        retries: How often to try again after an error that may pass.
        captions: Pre-encoded captions. Those that are not among them are encoded when they are needed.

    Raises:
        ValueError: if the split is missing, a number is out of range, or the captions were encoded otherwise.
    """

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
    ):
        super().__init__(side_length=side_length, encoder_name=encoder_name, max_length=max_length, captions=captions)
        split = "train" if train else "validation"
        if split not in hf_dataset:
            raise ValueError(f"hf_dataset has no split {split!r}, it has {list(hf_dataset)}")
        self.rows = hf_dataset[split]
        self.img_transform = img_transform
        self.timeout = timeout
        self.retries = retries

    def __len__(self) -> int:
        return len(self.rows["image_url"]) if isinstance(self.rows, Mapping) else len(self.rows)

    def _value(self, column: str, index: int) -> Any:
        # By row where there are rows: a whole column of a Hugging Face data set may be millions of strings.
        return self.rows[column][index] if isinstance(self.rows, Mapping) else self.rows[index][column]

    def all_captions(self) -> Iterator[str]:
        return (caption for caption in self.rows["caption"] if isinstance(caption, str))

    def _caption(self, index: int) -> Any:
        return self._value("caption", index)

    def _picture(self, index: int) -> Image.Image:
        return fetch_image(self._value("image_url", index), timeout=self.timeout, retries=self.retries)

    def _to_tensor(self, picture: Image.Image) -> torch.Tensor | None:
        image = resize_image_to(_tensor(picture), self.side_length)[0]
        low, high = image.min(), image.max()
        # A picture of one colour has nothing to stretch.
        image = (image - low) / (high - low) if high - low > 1e-4 else image.clamp(0, 1)
        return image if self.img_transform is None else self.img_transform(image)


class FolderDataset(_CaptionedPictures):
    """A folder of captioned pictures.

    The captions stand in ``metadata.jsonl`` or ``metadata.csv`` with the fields ``file_name`` (relative to the folder)
    and ``text``; without such a file, beside each picture ``x.jpg`` in a file ``x.txt``. Folders within are searched
    too; files and folders whose name starts with a dot are not. Every picture must have a caption, and every caption a
    picture. Items are like those of :class:`MinimagenDataset`, but a picture is cropped to its middle square before it
    is scaled, and its values are left as they are.

    Args:
        directory: The folder.
        side_length: Side length in pixels to scale the pictures to.
        encoder_name: Name of the text encoder, see :func:`.t5.t5_encode_text`.
        max_length: Number of tokens after which a caption is cut off.
        captions: Pre-encoded captions. Those that are not among them are encoded when they are needed.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no captioned picture, both metadata files, a picture without a caption or a caption
            without a picture, or an entry that cannot be read or points outside the folder; or if the captions were
            encoded otherwise.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        side_length: int,
        encoder_name: str,
        max_length: int = MAX_LENGTH,
        captions: CaptionStore | None = None,
    ):
        super().__init__(side_length=side_length, encoder_name=encoder_name, max_length=max_length, captions=captions)
        self.directory = Path(directory).absolute()
        if not self.directory.is_dir():
            raise FileNotFoundError(f"there is no folder {self.directory}")
        self.entries = _folder_entries(self.directory)

    def __len__(self) -> int:
        return len(self.entries)

    def all_captions(self) -> Iterator[str]:
        return (caption for _, caption in self.entries)

    def _caption(self, index: int) -> str:
        return self.entries[index][1]

    def _picture(self, index: int) -> Image.Image:
        return decode_image((self.directory / self.entries[index][0]).read_bytes())

    def _to_tensor(self, picture: Image.Image) -> torch.Tensor:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        return resize_image_to(_tensor(square), self.side_length, clamp_range=(0.0, 1.0))[0].clamp(0.0, 1.0)


def _folder_entries(directory: Path) -> list[tuple[str, str]]:
    """(file name, caption) of every picture of a folder, checked."""
    problems: list[str] = []
    jsonl, table = directory / "metadata.jsonl", directory / "metadata.csv"
    files = _visible_files(directory)
    if jsonl.is_file() and table.is_file():
        raise ValueError(f"{directory} has both {jsonl.name} and {table.name}: keep one")
    if jsonl.is_file():
        entries = _from_metadata(jsonl, _json_rows(jsonl, problems), files, problems)
    elif table.is_file():
        entries = _from_metadata(table, _csv_rows(table, problems), files, problems)
    else:
        entries = _from_pairs(directory, files, problems)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the captions of {directory} cannot all be used:\n{shown}{more}")
    if not entries:
        raise ValueError(
            f"{directory} holds no captioned pictures: it needs metadata.jsonl or metadata.csv with file_name and"
            f" text, or a caption x.txt beside each picture x{'/'.join(IMAGE_SUFFIXES)}"
        )
    return entries


def _visible_files(directory: Path) -> list[PurePosixPath]:
    """Every file below a folder, relative to it; systems leave hidden ones that only look like pictures."""
    files = []
    for parent, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(parent).relative_to(directory)
        files += [PurePosixPath(below, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _is_picture(file: PurePosixPath) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _text(file: Path, problems: list[str]) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{file.name} is not UTF-8 text ({error})")
        return ""


def _json_rows(file: Path, problems: list[str]) -> list[tuple[str, Any]]:
    rows = []
    # Not splitlines(), which also breaks at the separators that JSON allows inside a string.
    for number, line in enumerate(_text(file, problems).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"line {number}", json.loads(line)))
        except ValueError as error:
            problems.append(f"{file.name}, line {number}: not JSON ({error})")
    return rows


def _csv_rows(file: Path, problems: list[str]) -> list[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(_text(file, problems), newline=""))
    try:
        return [(f"line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        problems.append(f"{file.name}, line {reader.line_num}: not CSV ({error})")
        return []


def _from_metadata(
    file: Path, rows: list[tuple[str, Any]], files: list[PurePosixPath], problems: list[str]
) -> list[tuple[str, str]]:
    entries = []
    for place, row in rows:
        name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            problems.append(f"{file.name}, {place}: needs file_name and text, both strings")
        elif not _is_below(name):
            problems.append(f"{file.name}, {place}: {name!r} is outside the folder")
        elif "\0" in name or not (file.parent / name).is_file():
            problems.append(f"{file.name}, {place}: there is no file {name!r}")
        else:
            entries.append((name, text))
    if not problems:
        named = {PurePosixPath(name) for name, _ in entries}
        problems += [f"{path} is not in {file.name}" for path in files if _is_picture(path) and path not in named]
    return entries


def _is_below(name: str) -> bool:
    """Whether a name stays in the folder on every system. Links in the folder are its owner's business."""
    windows = PureWindowsPath(name)
    return not (windows.drive or windows.root or ".." in windows.parts)


def _from_pairs(directory: Path, files: list[PurePosixPath], problems: list[str]) -> list[tuple[str, str]]:
    entries = []
    captions = {path for path in files if path.suffix == ".txt"}
    for picture in filter(_is_picture, files):
        caption = picture.with_suffix(".txt")
        if caption in captions:
            entries.append((str(picture), _text(directory / caption, problems).strip()))
        else:
            problems.append(f"{picture} has no caption file {caption.name} beside it")
    alone = captions - {path.with_suffix(".txt") for path in files if _is_picture(path)}
    problems += [f"{caption} has no picture beside it" for caption in sorted(alone)]
    return entries


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
) -> tuple[Subset, Subset] | MinimagenDataset:
    """The Conceptual Captions data set (Sharma et al., 2018): 3.3 million captions with addresses of pictures.

    About a third of the pictures are no longer there; such items are None.

    Args:
        args: Arguments from :func:`.training.get_minimagen_parser`; `T5_NAME`, `MAX_NUM_WORDS`, `IMG_SIDE_LEN`,
            `TRAIN_VALID_FRAC` and `VALID_NUM` are used.
        smalldata: Whether to take the first 16 rows alone.
        testset: Whether to return the data set's own validation split, for testing.
        captions: Pre-encoded captions. Those that are not among them are encoded when they are needed.

    Returns:
        The test data set, or the parts of the training split to train and to validate on, the same every time.

    Raises:
        ImportError: if the package ``datasets`` is not installed.
        ValueError: if an argument is out of range.
    """
    values = args if isinstance(args, dict) else vars(args)
    rows = conceptual_rows()
    if smalldata:
        rows = {name: _first_rows(rows[name]) for name in ("train", "validation")}
    dataset = MinimagenDataset(
        rows,
        encoder_name=values["T5_NAME"],
        max_length=values["MAX_NUM_WORDS"],
        side_length=values["IMG_SIDE_LEN"],
        train=not testset,
        captions=captions,
    )
    if testset:
        return dataset
    return split_train_valid(dataset, values["TRAIN_VALID_FRAC"], values.get("VALID_NUM"))


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
            {
                **item,
                "mask": F.pad(mask, (0, longest - len(mask)), value=False),
                "encoding": F.pad(encoding, (0, 0, 0, longest - len(encoding))),
            }
            for item, mask, encoding in zip(items, masks, encodings, strict=True)
        ]
        collated = default_collate(padded)
        if get_worker_info() is not None:
            return collated
        return {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in collated.items()
        }


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
