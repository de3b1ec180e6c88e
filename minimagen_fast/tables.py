"""Captioned pictures in the rows of tables: Parquet and Arrow files, and data sets of Hugging Face ``datasets``."""

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .caption_store import CaptionStore
from .captioned import CaptionedPictures
from .decode import ImageError, decode_image, rgb_of
from .fetch import fetch_image
from .t5 import MAX_LENGTH

__all__ = ["CAPTION_COLUMNS", "IMAGE_COLUMNS", "TableDataset", "find_columns", "open_tables", "picture_from"]

# Looked for in this order where no column is named. The file suffixes are what `datasets` makes of WebDataset tars.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_url", "url")
CAPTION_COLUMNS = ("caption", "text", "txt")
ROWS_AT_A_TIME = 256
# Protocols in the paths that `datasets` gives pictures that it has not read.
ARCHIVES_AND_HUB = {"zip", "tar", "hf"}


def find_columns(names: Iterable[str], image: str | None = None, caption: str | None = None) -> tuple[str, str]:
    """The columns that hold the pictures and the captions.

    Args:
        names: The columns that there are.
        image: The one with the pictures, where it is known.
        caption: The one with the captions, where it is known.

    Raises:
        ValueError: if there is no such column.
    """
    there = list(names)
    found = []
    for option, name, usual in (
        ("IMAGE_COLUMN", image, IMAGE_COLUMNS),
        ("CAPTION_COLUMN", caption, CAPTION_COLUMNS),
    ):
        wanted = usual if name is None else (name,)
        column = next((column for column in wanted if column in there), None)
        if column is None:
            raise ValueError(
                f"there is no column {' or '.join(wanted)} among {', '.join(there) or 'none'}: name it with {option}"
            )
        found.append(column)
    return found[0], found[1]


def picture_from(value: Any) -> Image.Image:
    """The picture that a cell of a table holds.

    Args:
        value: The bytes of an image file; or a mapping with these as 'bytes', or the path or address of one as 'path',
            which may lead into a zip or tar file or to the Hugging Face hub; or an http or https address; or a picture
            that has been decoded already.

    Raises:
        ImageError, OSError: if it cannot be had.
    """
    if isinstance(value, Image.Image):
        return rgb_of(value)
    if isinstance(value, Mapping):
        path = value.get("path")
        value = value.get("bytes")
        if value is None and isinstance(path, str):
            value = path if path.startswith(("http://", "https://")) else _content(path)
    if isinstance(value, str):
        return fetch_image(value)
    if not isinstance(value, bytes):
        raise ImageError("not_an_image", f"neither an image file nor an address: {str(value)[:100]}")
    return decode_image(value)


def _content(path: str) -> bytes | None:
    """The bytes of the file at a path, as `datasets` writes it: also in an archive, or on the Hugging Face hub."""
    if Path(path).is_file():
        return Path(path).read_bytes()
    # Such as zip://0001.png::hf://datasets/someone/something/pictures.zip; other protocols are not opened.
    *outer, last = path.split("::")
    if "://" in last:
        outer.append(last)
    elif not Path(last).is_file():  # a pipe or a device would be read for ever
        return None
    if not {part.partition("://")[0] for part in outer} <= ARCHIVES_AND_HUB:
        return None
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except OSError:
        raise
    except Exception as error:  # a damaged archive, a name that it has not: each raises errors of its own
        raise OSError(f"{path} cannot be read: {error!r}") from error


class TableDataset(CaptionedPictures):
    """Captioned pictures in a Hugging Face ``datasets.Dataset``.

    Items are like those of :class:`.folders.FolderDataset`.

    Args:
        rows: The data set, with a column of captions and one of pictures, see :func:`picture_from`.
        side_length: Side length in pixels to scale the pictures to.
        encoder_name: Name of the text encoder, see :func:`.t5.t5_encode_text`.
        max_length: Number of tokens after which a caption is cut off.
        captions: Pre-encoded captions. Those that are not among them are encoded when they are needed.
        crop: 'center' (the default) or 'random': which of the largest squares of a picture to take.
        flip: Whether to mirror every second picture, left to right, at random.
        image_column: The column with the pictures; the first of `IMAGE_COLUMNS` that there is, if not given.
        caption_column: The column with the captions; the first of `CAPTION_COLUMNS` that there is, if not given.

    Raises:
        ValueError: if there are no such columns or no rows; or if the captions were encoded otherwise.
    """

    def __init__(
        self,
        rows: Any,
        *,
        side_length: int,
        encoder_name: str,
        max_length: int = MAX_LENGTH,
        captions: CaptionStore | None = None,
        crop: str | None = None,
        flip: bool = False,
        image_column: str | None = None,
        caption_column: str | None = None,
    ):
        super().__init__(
            side_length=side_length,
            encoder_name=encoder_name,
            max_length=max_length,
            captions=captions,
            crop=crop,
            flip=flip,
        )
        columns = find_columns(rows.column_names, image_column, caption_column)
        self.image_column, self.caption_column = columns
        # Other columns would be read with every row, and pictures decoded by other rules than ours.
        self.rows = undecoded(rows).select_columns(list(dict.fromkeys(columns)))
        if len(self.rows) == 0:
            raise ValueError("the table has no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def all_captions(self) -> Iterator[str]:
        for batch in self.rows.select_columns([self.caption_column]).iter(batch_size=1000):
            yield from (caption for caption in batch[self.caption_column] if isinstance(caption, str))

    def _row(self, key: int) -> tuple[Any, Any]:
        row = self.rows[key]
        return row[self.caption_column], row[self.image_column]

    def _picture(self, source: Any) -> Image.Image:
        return picture_from(source)


def undecoded(rows: Any) -> Any:
    """A data set or stream of ``datasets`` whose pictures stay the bytes that they are stored as."""
    from datasets import Image as ImageFeature

    # A format that it was given hides columns, or makes arrays or tables of cells.
    rows = rows.with_format(None)
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, ImageFeature):
            rows = rows.cast_column(name, ImageFeature(decode=False))
    return rows


def open_tables(
    kind: str,
    files: Sequence[str],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
) -> Any:
    """Open Parquet or Arrow files through ``datasets``: by row, or as a stream.

    Arrow files in the stream format are mapped into memory where they are. Of others, ``datasets`` keeps the two
    columns that are needed a second time, as Arrow in its own cache folder, unless they are streamed.

    Args:
        kind: 'parquet' or 'arrow'.
        files: Paths; addresses too, if they are streamed.
        image_column: The column with the pictures, see :func:`find_columns`.
        caption_column: The column with the captions.
        streaming: Whether to stream.

    Returns:
        A ``datasets.Dataset`` or ``datasets.IterableDataset``; of files on this machine, with these two columns alone.

    Raises:
        ImportError: if the package ``datasets`` is not installed.
        ValueError: if a file is damaged, no file has a row, or a file on this machine lacks one of the columns.
    """
    datasets = import_datasets()
    import pyarrow

    local = [file for file in files if "://" not in file]
    checked = [_check_file(kind, file, count=not streaming) for file in local]
    numbers = [number for number, _ in checked]
    rows = None if len(local) < len(files) or None in numbers else sum(filter(None, numbers))
    if rows == 0:
        raise ValueError(f"there are no rows in the {kind} files from {files[0]} on")
    columns: list[str] | None = None
    if local:
        columns = list(dict.fromkeys(find_columns(checked[0][1], image_column, caption_column)))
    for file, (_, names) in zip(local, checked, strict=True):
        # `datasets` would take cells that are not there for empty ones, or end in the middle of an epoch.
        if missing := [column for column in columns or () if column not in names]:
            raise ValueError(
                f"{file} has no column {' and no column '.join(missing)}, which {local[0]} has, but {', '.join(names)}:"
                " leave it out, or give it the same columns"
            )
    try:
        if kind == "arrow" and not streaming:
            try:
                tables = [datasets.Dataset.from_file(file).select_columns(columns) for file in files]
                return datasets.concatenate_datasets(tables)
            except pyarrow.ArrowInvalid:
                pass  # in the file format, which `datasets` has to copy
        # By itself `datasets` reads whole row groups at a time, which may be gigabytes of pictures.
        options: dict[str, Any] = {"batch_size": ROWS_AT_A_TIME} if kind == "parquet" else {}
        if kind == "parquet" and columns is not None:
            options["columns"] = columns
        # By itself `datasets` takes names for patterns.
        named = [file if "://" in file else glob.escape(file) for file in files]
        table = datasets.load_dataset(kind, data_files=named, split="train", streaming=streaming, **options)
    except (pyarrow.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"the {kind} files from {files[0]} on cannot be read: {cause}") from error
    if rows is not None and not streaming and len(table) != rows:
        raise ValueError(f"datasets read {len(table)} of the {rows} rows in the {kind} files from {files[0]} on")
    return table if columns is None else table.select_columns(columns)


def _check_file(kind: str, file: str, *, count: bool) -> tuple[int | None, list[str]]:
    """See that a file is what its name says, before hours of training have gone by.

    Args:
        kind: 'parquet' or 'arrow'.
        file: Its path.
        count: Whether to go through a stream of Arrow, for the number of its rows.

    Returns:
        The number of rows, where it is known, and the names of the columns.

    Raises:
        ValueError: if it is not, or is cut short.
    """
    import pyarrow.parquet

    try:
        if kind == "parquet":
            metadata = pyarrow.parquet.read_metadata(file)
            return metadata.num_rows, metadata.schema.to_arrow_schema().names
        with pyarrow.memory_map(file) as mapped:
            try:
                stream = pyarrow.ipc.open_stream(mapped)
            except pyarrow.ArrowInvalid:
                mapped.seek(0)
                return None, pyarrow.ipc.open_file(mapped).schema.names
            # Of batches in mapped memory nothing but their description is read, unless they are compressed.
            return sum(batch.num_rows for batch in stream) if count else None, stream.schema.names
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no {kind} file, or it is damaged or cut short ({error}): get it anew") from error


def import_datasets() -> Any:
    """The package ``datasets``.

    Raises:
        ImportError: if it is not installed, saying how to.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("this data needs the package datasets: pip install 'minimagen_fast[data]'") from error
    return datasets
