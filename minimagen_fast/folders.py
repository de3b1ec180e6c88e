"""A folder of captioned pictures."""

import csv
import functools
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from PIL import Image

from .caption_store import CaptionStore
from .captioned import CaptionedPictures
from .decode import decode_image
from .t5 import MAX_LENGTH

# Of the formats that are decoded: see FORMATS.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")

# At the root of a disk, and for nobody else to read than the system's administrator.
LOST_FOUND = "lost+found"
# In every training directory, and in no other folder. Its texts and sampled pictures are no data.
TRAINING = "training_progess.txt"


class FolderDataset(CaptionedPictures):
    """A folder of captioned pictures.

    The captions stand in ``metadata.jsonl`` or ``metadata.csv`` with the fields ``file_name`` (relative to the folder)
    and ``text``; without such a file, beside each picture ``x.jpg`` in a file ``x.txt``. Folders within are searched
    too, also those that links lead to, each once; not ``lost+found``, training directories, nor files and folders whose
    name starts with a dot. Every picture must have a caption, and every caption a picture. Items are like those of
    :class:`.data.MinimagenDataset`, but a picture is cropped to its middle square before it is scaled, and its values
    are left as they are.

    Args:
        directory: The folder.
        side_length: Side length in pixels to scale the pictures to.
        encoder_name: Name of the text encoder, see :func:`.t5.t5_encode_text`.
        max_length: Number of tokens after which a caption is cut off.
        captions: Pre-encoded captions. Those that are not among them are encoded when they are needed.
        crop: 'center' (the default) or 'random': which of the largest squares of a picture to take.
        flip: Whether to mirror every second picture, left to right, at random.
        caption_field: The field of the metadata that holds the caption; 'text' if not given.

    Raises:
        FileNotFoundError: if there is no such folder.
        OSError: if a folder within cannot be read.
        ValueError: if it holds no captioned picture, both metadata files, a picture without a caption or a caption
            without a picture, or an entry that cannot be read or points outside the folder; if a field is named where
            there is no metadata; or if the captions were encoded otherwise.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        side_length: int,
        encoder_name: str,
        max_length: int = MAX_LENGTH,
        captions: CaptionStore | None = None,
        crop: str | None = None,
        flip: bool = False,
        caption_field: str | None = None,
    ):
        super().__init__(
            side_length=side_length,
            encoder_name=encoder_name,
            max_length=max_length,
            captions=captions,
            crop=crop,
            flip=flip,
        )
        self.directory = Path(directory).absolute()
        if not self.directory.is_dir():
            raise FileNotFoundError(f"there is no folder {self.directory}")
        self.entries = _entries(self.directory, caption_field)

    def __len__(self) -> int:
        return len(self.entries)

    def all_captions(self) -> Iterator[str]:
        return (caption for _, caption in self.entries)

    def _row(self, key: int) -> tuple[str, str]:
        file, caption = self.entries[key]
        return caption, file

    def _picture(self, source: str) -> Image.Image:
        path = self.directory / source
        # A pipe or a device would be read for ever.
        if not path.is_file() and path.exists():
            raise OSError(f"{path} is no file")
        return decode_image(path.read_bytes())


def _entries(directory: Path, caption_field: str | None) -> list[tuple[str, str]]:
    """(file name, caption) of every picture of a folder, checked."""
    problems: list[str] = []
    jsonl, table = directory / "metadata.jsonl", directory / "metadata.csv"
    files = visible_files(directory)
    if jsonl.is_file() and table.is_file():
        raise ValueError(f"{directory} has both {jsonl.name} and {table.name}: keep one")
    field = "text" if caption_field is None else caption_field
    if jsonl.is_file():
        entries = _from_metadata(jsonl, _json_rows(jsonl, problems), field, files, problems)
    elif table.is_file():
        entries = _from_metadata(table, _csv_rows(table, field, problems), field, files, problems)
    elif caption_field is not None:
        raise ValueError(
            f"{directory} has neither {jsonl.name} nor {table.name} with a field {caption_field}: leave out"
            " CAPTION_COLUMN"
        )
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


def visible_files(directory: Path) -> list[PurePosixPath]:
    """Every file below a folder, relative to it; systems leave hidden ones that only look like pictures.

    What is in training directories within is left out, so that a training may be kept beside its data and go on.
    Links to folders are followed where they lead to one that has not been searched by then: a loop has an end, and what
    has a name without links goes by it.

    Raises:
        OSError: if a folder cannot be read.
    """
    files, links = [], [str(directory)]
    searched: set[str] = set()
    for start in links:  # which grows
        for parent, folders, names in os.walk(start, onerror=_raise):
            real = os.path.realpath(parent)
            if real in searched or (TRAINING in names and parent != str(directory)):
                folders.clear()
                continue
            searched.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != LOST_FOUND)
            links += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            below = Path(parent).relative_to(directory)
            files += [PurePosixPath(below, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _raise(error: OSError) -> NoReturn:
    raise error


def is_picture(file: PurePosixPath) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _text(file: Path, problems: list[str]) -> str:
    if not file.is_file() and file.exists():
        problems.append(f"{file.name} is no file")
        return ""
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
        except (ValueError, RecursionError) as error:
            problems.append(f"{file.name}, line {number}: not JSON ({error})")
    return rows


def _csv_rows(file: Path, field: str, problems: list[str]) -> list[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(_text(file, problems), newline=""))
    rows = []
    try:
        names = list(reader.fieldnames or ())
        problems += [
            f"{file.name}, line {reader.line_num}: there are {names.count(name)} columns {name}: keep one"
            for name in ("file_name", field)
            if names.count(name) > 1
        ]
        for row in reader:
            if None in row:  # where the reader puts what is beyond the header
                problems.append(
                    f"{file.name}, line {reader.line_num}: has {len(names) + len(row[None])} fields, the header"
                    f" {len(names)}: a caption with commas needs quotation marks"
                )
            else:
                rows.append((f"line {reader.line_num}", row))
    except csv.Error as error:
        problems.append(f"{file.name}, line {reader.line_num}: not CSV ({error})")
    return rows


def _from_metadata(
    file: Path, rows: list[tuple[str, Any]], field: str, files: list[PurePosixPath], problems: list[str]
) -> list[tuple[str, str]]:
    entries = []
    for place, row in rows:
        name, text = (row.get("file_name"), row.get(field)) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            problems.append(f"{file.name}, {place}: needs file_name and {field}, both strings")
        elif not is_below(name):
            problems.append(f"{file.name}, {place}: {name!r} is outside the folder")
        elif "\0" in name or not (file.parent / name).is_file():
            problems.append(f"{file.name}, {place}: there is no file {name!r}")
        else:
            entries.append((name, text))
    if not problems:
        # Of a folder with several links metadata may name another than was followed.
        real = functools.cache(lambda folder: os.path.realpath(file.parent / folder))
        named = {(real(path.parent), path.name) for path in (PurePosixPath(name) for name, _ in entries)}
        for path in filter(is_picture, files):
            if (real(path.parent), path.name) not in named:
                problems.append(f"{path} is not in {file.name}")
    return entries


def is_below(name: str) -> bool:
    """Whether a name stays in the folder on every system. Links in the folder are its owner's business."""
    windows = PureWindowsPath(name)
    return not (windows.drive or windows.root or ".." in windows.parts)


def _from_pairs(directory: Path, files: list[PurePosixPath], problems: list[str]) -> list[tuple[str, str]]:
    entries = []
    captions = {path for path in files if path.suffix == ".txt"}
    for picture in filter(is_picture, files):
        caption = picture.with_suffix(".txt")
        if caption in captions:
            entries.append((str(picture), _text(directory / caption, problems).strip()))
        else:
            problems.append(f"{picture} has no caption file {caption.name} beside it")
    alone = captions - {path.with_suffix(".txt") for path in files if is_picture(path)}
    problems += [f"{caption} has no picture beside it" for caption in sorted(alone)]
    return entries
