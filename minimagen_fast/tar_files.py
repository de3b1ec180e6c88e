"""Captioned pictures in tar files, as WebDataset lays them out, read where they are and by index."""

import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .caption_store import CaptionStore
from .captioned import CaptionedPictures
from .decode import ImageError, decode_image
from .files import replace_file
from .folders import IMAGE_SUFFIXES
from .t5 import MAX_LENGTH
from .tar_members import CAPTION_FIELDS, LeftOut, Member, caption_of, captioned_members, read_member
from .tiny_t5 import cache_root

__all__ = ["TarDataset"]

INDEX_VERSION = 3


class TarDataset(CaptionedPictures):
    """Captioned pictures in tar files on this machine.

    Nothing is unpacked or copied. Where the members lie is found out once, by reading the headers of the files, and
    kept in the cache folder (see :func:`.tiny_t5.embedded_t5_directory`) until a file changes; pictures are then read
    by index from any number of processes. Items are like those of :class:`.folders.FolderDataset`. A picture or caption
    that is alone, or has another dot in its name, is left out, with a warning.

    Args:
        files: The tar files, not compressed.
        side_length: Side length in pixels to scale the pictures to.
        encoder_name: Name of the text encoder, see :func:`.t5.t5_encode_text`.
        max_length: Number of tokens after which a caption is cut off.
        captions: Pre-encoded captions. Those that are not among them are encoded when they are needed.
        crop: 'center' (the default) or 'random': which of the largest squares of a picture to take.
        flip: Whether to mirror every second picture, left to right, at random.
        caption_field: The field of ``x.json`` that holds the caption, also where there is ``x.txt``, too; if not given,
            'caption' or 'text', where there is none.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file cannot be used (see :func:`.tar_members.captioned_members`), or none holds a captioned
            picture; or if the captions were encoded otherwise.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
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
        self.files = [Path(file).absolute() for file in files]
        self.caption_fields = CAPTION_FIELDS if caption_field is None else (caption_field,)
        read = [_index(file, json_first=caption_field is not None) for file in self.files]
        self._indices = [rows for rows, _ in read]
        self._ends = np.cumsum([len(rows) for rows in self._indices])
        left_out = LeftOut(sum(left.alone for _, left in read), sum(left.dotted for _, left in read))
        told = left_out.told(f"{len(self.files)} tar files")
        if len(self) == 0:
            raise ValueError(
                f"there is no captioned picture in {len(self.files)} tar files, the first of them"
                f" {self.files[0] if self.files else 'missing'}: an item is x{'/'.join(IMAGE_SUFFIXES)} and x.txt or"
                f" x.json{told and f'. {told}'}"
            )
        if told:
            warnings.warn(f"{told}; {len(self)} pictures have a caption", stacklevel=2)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def all_captions(self) -> Iterator[str]:
        for path, rows in zip(self.files, self._indices, strict=True):
            with open(path, "rb") as file:
                for _, _, offset, size, is_json in rows.tolist():
                    try:
                        caption = caption_of(
                            read_member(file, Member(offset, size)), bool(is_json), self.caption_fields
                        )
                    except ImageError:
                        continue  # counted when the item is asked for
                    if isinstance(caption, str):
                        yield caption

    def _row(self, key: int) -> tuple[Any, tuple[Path, Member]]:
        if not 0 <= key < len(self):
            raise IndexError(f"index is {key}, but the data set has {len(self)} items")
        number = int(np.searchsorted(self._ends, key, side="right"))
        row = self._indices[number][key - int(self._ends[number])]  # counted from the end of its file
        picture_offset, picture_size, offset, size, is_json = row.tolist()
        content = _read_from(self.files[number], Member(offset, size))
        caption = caption_of(content, bool(is_json), self.caption_fields)
        return caption, (self.files[number], Member(picture_offset, picture_size))

    def _picture(self, source: tuple[Path, Member]) -> Image.Image:
        return decode_image(_read_from(*source))


def _read_from(path: Path, member: Member) -> bytes:
    # Opened anew for every member: there may be more tar files than a process can hold open, in many workers.
    with open(path, "rb") as file:
        return read_member(file, member)


def _index(path: Path, *, json_first: bool) -> tuple[np.ndarray, LeftOut]:
    """(offset and size of a picture, those of its caption, whether that is JSON) of each item, and what is in none."""
    state = os.stat(path)
    signature = [INDEX_VERSION, state.st_size, state.st_mtime_ns]
    name = f"{path}\njson first" if json_first else f"{path}"
    kept = cache_root() / "tar_index" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"
    try:
        with open(kept, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            if arrays["signature"].tolist() == signature:
                return arrays["rows"], LeftOut(*arrays["left_out"].tolist())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there, or not whole: it is made anew
    with open(path, "rb") as file:
        pairs, left_out = captioned_members(file, str(path), json_first=json_first)
    rows = np.array(
        [(*pair.picture, *pair.caption, pair.is_json) for pair in pairs],
        dtype=np.int64,
    ).reshape(-1, 5)
    content = io.BytesIO()
    np.savez(content, rows=rows, left_out=left_out, signature=np.array(signature, dtype=np.int64))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(kept, content.getvalue())
    except OSError as error:
        warnings.warn(
            f"the index of {path} cannot be kept in {kept.parent} ({error}) and will be made anew every time: set"
            " MINIMAGEN_FAST_CACHE to a folder that can be written",
            stacklevel=2,
        )
    return rows, left_out
