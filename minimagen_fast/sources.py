"""From ``--DATA`` to a data set: where captioned pictures may come from, and how they are divided for validation."""

import argparse
import functools
import glob
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from .caption_store import CaptionStore
from .captioned import CROPS, CaptionedPictures
from .data import (
    CONCEPTUAL_CAPTIONS,
    SMALL_ROWS,
    ConceptualCaptions,
    MinimagenDataset,
    split_train_valid,
)
from .files import path_text
from .folders import FolderDataset, is_picture, visible_files
from .shapes import ShapesDataset
from .streams import StreamedPictures
from .tables import TableDataset, find_columns, import_datasets, open_tables, undecoded
from .tar_files import TarDataset
from .tar_members import CAPTION_FIELDS, tar_examples

__all__ = ["add_data_arguments", "add_source_arguments", "check_columns", "open_captions", "open_data"]

BUILT_IN, CONCEPTUAL = "built-in", "conceptual-captions"
BUILT_IN_PICTURES = 10_000
TESTING_PICTURES = 64
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar")
KINDS = {".tar": "tar", ".parquet": "parquet", ".arrow": "arrow"}
# What `datasets` leaves in a folder that it saves a data set to.
_SAVED = ({"dataset_dict.json"}, {"state.json", "dataset_info.json"})


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where captioned pictures are."""
    add = parser.add_argument
    add(
        "--DATA",
        type=path_text,
        default=CONCEPTUAL,
        help=f"{CONCEPTUAL} (%(default)s), {BUILT_IN} (shapes drawn on the spot), a folder of captioned pictures, a"
        " data set saved by Hugging Face datasets, or .tar (WebDataset), .parquet or .arrow files: a folder of them, a"
        " pattern in quotation marks (** for folders within), or names with commas between",
    )
    add(
        "--STREAMING",
        action="store_true",
        help="read the files from beginning to end instead of by index; they may be addresses then",
    )
    add(
        "--IMAGE_COLUMN",
        default=None,
        help="column of .parquet, .arrow or saved data with the pictures or their addresses (image, image_url or the"
        " like); not for other data",
    )
    add(
        "--CAPTION_COLUMN",
        default=None,
        help="column with the captions (caption, text or txt); of tar files the field of x.json (caption, text), of a"
        f" folder of pictures that of metadata.jsonl or .csv (text); not for {CONCEPTUAL} and {BUILT_IN}",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`open_data` reads, besides the documented ones of a training."""
    add_source_arguments(parser)
    add = parser.add_argument
    add(
        "--CAPTIONS",
        type=path_text,
        default=None,
        help="folder of captions that `minimagen-fast encode-captions` has encoded: T5 is then not loaded",
    )
    add(
        "--CROP",
        choices=CROPS,
        default=None,
        help="train on the largest square from the middle or from anywhere (center, but conceptual-captions: the whole"
        " picture, squeezed into a square)",
    )
    add("--FLIP", action="store_true", help="mirror every second picture, left to right, at random")
    add(
        "--MAX_BAD_FRACTION",
        type=float,
        default=None,
        help="stop when more than this share of an epoch's samples cannot be had (by default never)",
    )


@dataclass(frozen=True)
class _Found:
    """What ``--DATA`` names: 'pictures' and 'saved' are folders, 'tar', 'parquet' and 'arrow' are files."""

    kind: str
    files: tuple[str, ...]


def open_data(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Open what ``--DATA`` names.

    Args:
        args: What :func:`add_data_arguments` and :func:`.training.get_minimagen_parser` add.

    Returns:
        The data to train on, a :class:`.streams.StreamedPictures` if it is streamed, and the data to validate on, which
        is read by index and neither cropped nor mirrored at random.

    Raises:
        ImportError: if the package ``datasets`` is needed and not installed.
        FileNotFoundError: if there is no such folder or file.
        ValueError: if the data or an argument cannot be used.
    """
    check_columns(args)
    captions = None if args.CAPTIONS is None else CaptionStore(args.CAPTIONS)
    options: dict[str, Any] = dict(
        side_length=args.IMG_SIDE_LEN, encoder_name=args.T5_NAME, max_length=args.MAX_NUM_WORDS, captions=captions
    )
    if args.DATA == BUILT_IN:
        if args.STREAMING or args.CROP is not None or args.FLIP:
            raise ValueError(f"{BUILT_IN} pictures are drawn as they are: leave out --STREAMING, --CROP and --FLIP")
        number = TESTING_PICTURES if args.TESTING else BUILT_IN_PICTURES
        return split_train_valid(ShapesDataset(number, **options), args.TRAIN_VALID_FRAC, args.VALID_NUM)
    options |= dict(crop=args.CROP, flip=args.FLIP)
    if args.STREAMING:
        return _streamed(args, options)
    if args.DATA == CONCEPTUAL:
        parts = ConceptualCaptions(args, smalldata=args.TESTING, captions=captions, crop=args.CROP, flip=args.FLIP)
        assert isinstance(parts, tuple), "testset was not asked for"
        train, valid = parts
    else:
        dataset = _by_index(_found(args), args, options)
        train, valid = split_train_valid(dataset, args.TRAIN_VALID_FRAC, args.VALID_NUM)
        if args.TESTING:
            train, valid = (Subset(part.dataset, part.indices[: TESTING_PICTURES // 2]) for part in (train, valid))
    assert isinstance(valid.dataset, CaptionedPictures)
    return train, Subset(valid.dataset.unaugmented(), valid.indices)


def check_columns(args: argparse.Namespace) -> None:
    """See that no column is named of data that has none to choose from.

    Raises:
        ValueError: if one is.
    """
    if args.DATA in (BUILT_IN, CONCEPTUAL):
        _refuse_columns(f"{args.DATA} has", args, "IMAGE_COLUMN", "CAPTION_COLUMN")


def _refuse_columns(what: str, args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            kind = name.partition("_")[0].lower()
            raise ValueError(f"{what} no {kind} column to choose: leave out --{name} {getattr(args, name)}")


def open_captions(args: argparse.Namespace) -> Iterable[str]:
    """All captions of the files or the folder that ``--DATA`` names; no picture is decoded.

    Args:
        args: What :func:`add_source_arguments` adds, `T5_NAME` and `MAX_NUM_WORDS`.

    Raises:
        ImportError, FileNotFoundError, ValueError: as :func:`open_data`.
    """
    found = _found(args)
    if args.STREAMING:
        return _streamed_captions(_streamable(found), args)
    options: dict[str, Any] = dict(side_length=1, encoder_name=args.T5_NAME, max_length=args.MAX_NUM_WORDS)
    return _by_index(found, args, options).all_captions()


def _streamed_captions(found: _Found, args: argparse.Namespace) -> Iterator[str]:
    stream = _stream(found, args, pictures=False)
    column = "caption"
    if found.kind != "tar":
        column = find_columns(stream.column_names, args.IMAGE_COLUMN, args.CAPTION_COLUMN)[1]
        stream = stream.select_columns([column])
    for example in stream:
        if isinstance(example[column], str):
            yield example[column]


def _found(args: argparse.Namespace) -> _Found:
    found = _find(args.DATA)
    if found.kind in ("pictures", "tar"):
        what = "a folder of pictures has" if found.kind == "pictures" else "tar files have"
        _refuse_columns(what, args, "IMAGE_COLUMN")
    return found


def _find(data: str) -> _Found:
    # Not Path's methods: names with commas between may be longer together than a name can be, which is an error there.
    path = Path(os.path.expanduser(data))
    if os.path.isdir(path):
        if any(all((path / name).is_file() for name in names) for names in _SAVED):
            return _Found("saved", (str(path),))
        inside = visible_files(path)
        files = [str(path / file) for file in inside if file.suffix.lower() in KINDS]
        if packed := [path / file for file in inside if file.suffix.lower() in PACKED]:
            warnings.warn(
                f"{len(packed)} files in {data} are packed and are left out, such as {packed[0]}: unpack them",
                stacklevel=2,
            )
        files = _without_caches(files)
        if not files:
            return _Found("pictures", (str(path),))
        if any(map(is_picture, inside)):
            raise ValueError(
                f"{data} holds both pictures and files such as {files[0]}: separate them, or name the files by a"
                f" pattern, such as '{path}/*{Path(files[0]).suffix}'"
            )
        return _of_one_kind(data, files)
    if os.path.isfile(path):
        return _of_one_kind(data, [str(path)])
    files = []
    for part in data.split(","):
        if "://" in part:
            files.append(part)
            continue
        named = Path(os.path.expanduser(part))
        matching = [str(named)]
        if not named.is_file():
            matching = _without_caches(sorted(glob.glob(str(named), recursive=True)))
        if not matching:
            raise FileNotFoundError(f"there is no folder {part}, and no file or pattern of files of this name")
        files += matching
    return _of_one_kind(data, files)


def _without_caches(files: Iterable[str]) -> list[str]:
    """Those that are not what `datasets` has kept, beside a data set, of what was made of it."""

    @functools.cache
    def is_saved(folder: Path) -> bool:
        return any((folder / name).is_file() for name in ("state.json", "dataset_info.json"))

    return [file for file in files if not (Path(file).name.startswith("cache-") and is_saved(Path(file).parent))]


def _of_one_kind(data: str, named: Sequence[str]) -> _Found:
    # Each file once, however often and by whatever links it was named: else one picture might be on both sides.
    once: dict[str, str] = {}
    for file in named:
        once.setdefault(file if "://" in file else os.path.realpath(file), file)
    files = list(once.values())
    kinds = {KINDS.get(Path(file.partition("?")[0] if "://" in file else file).suffix.lower()) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise ValueError(
            f"--DATA {data} must be a folder, or files of one kind out of {', '.join(KINDS)}; it names"
            f" {', '.join(files[:3])}{' and more' if len(files) > 3 else ''}"
        )
    return _Found(str(kinds.pop()), tuple(files))


def _columns(found: _Found, args: argparse.Namespace) -> dict[str, Any]:
    if found.kind == "tar":
        return {}  # the examples that are made of them have names of their own
    return {"image_column": args.IMAGE_COLUMN, "caption_column": args.CAPTION_COLUMN}


def _by_index(found: _Found, args: argparse.Namespace, options: dict[str, Any]) -> CaptionedPictures:
    remote = [file for file in found.files if "://" in file]
    if remote:
        raise ValueError(f"{remote[0]} cannot be read by index: give --STREAMING, or download it")
    if found.kind == "pictures":
        return FolderDataset(found.files[0], caption_field=args.CAPTION_COLUMN, **options)
    if found.kind == "tar":
        return TarDataset(found.files, caption_field=args.CAPTION_COLUMN, **options)
    columns = _columns(found, args)
    rows = _saved_rows(found.files[0]) if found.kind == "saved" else open_tables(found.kind, found.files, **columns)
    return TableDataset(rows, **columns, **options)


def _saved_rows(folder: str) -> Any:
    datasets = import_datasets()
    try:
        saved = datasets.load_from_disk(folder)
    except (ValueError, KeyError) as error:
        raise ValueError(f"the data set saved in {folder} cannot be read ({error}): save it again") from error
    except IndexError as error:  # the first of no files
        raise ValueError(f"the data set saved in {folder} has no rows") from error
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            raise ValueError(f"{folder} has the splits {', '.join(saved)}: give the folder of one of them")
        return saved["train"]
    return saved


def _streamed(args: argparse.Namespace, options: dict[str, Any]) -> tuple[Dataset, Dataset]:
    """Streams cannot be split at random: whole files are kept for validation."""
    if not 0 < args.TRAIN_VALID_FRAC < 1:
        raise ValueError(f"TRAIN_VALID_FRAC must lie between 0 and 1, got {args.TRAIN_VALID_FRAC}")
    if args.VALID_NUM is not None and args.VALID_NUM < 1:
        raise ValueError(f"VALID_NUM must be at least 1, or None for all, got {args.VALID_NUM}")
    if args.DATA == CONCEPTUAL:
        return _streamed_conceptual(args, options)
    found = _streamable(_found(args))
    columns = _columns(found, args)
    number = len(found.files)
    for_validation = min(max(1, round((1 - args.TRAIN_VALID_FRAC) * number)), number - 1)
    if for_validation < 1:
        raise ValueError(
            f"--STREAMING keeps whole files for validation, and there is only {found.files[0]}: divide it, or leave out"
            " --STREAMING"
        )
    first, last = (_Found(found.kind, part) for part in (found.files[:-for_validation], found.files[-for_validation:]))
    stream = _stream(first, args)
    train = StreamedPictures(stream.take(TESTING_PICTURES // 2) if args.TESTING else stream, **columns, **options)
    if not any("://" in file for file in last.files):
        valid = _by_index(last, args, options).unaugmented()
    elif args.VALID_NUM is None:
        raise ValueError(
            "the pictures for validation are kept in memory, since they are streamed from elsewhere: say how many with"
            " --VALID_NUM"
        )
    else:
        rows = list(islice(undecoded(_stream(last, args)), args.VALID_NUM))
        valid = TableDataset(import_datasets().Dataset.from_list(rows), **columns, **options).unaugmented()
    length: int = len(valid)  # type: ignore[arg-type]
    most = TESTING_PICTURES // 2 if args.TESTING else length
    return train, Subset(valid, range(min(length, most, args.VALID_NUM or length)))


class _StreamedConceptual(StreamedPictures):
    _default_crop = MinimagenDataset._default_crop
    _stretches = MinimagenDataset._stretches


def _streamed_conceptual(args: argparse.Namespace, options: dict[str, Any]) -> tuple[Dataset, Dataset]:
    streams = import_datasets().load_dataset(CONCEPTUAL_CAPTIONS, streaming=True)
    train, valid = streams["train"], streams["validation"]
    if args.TESTING:
        train, valid = train.take(SMALL_ROWS), valid.take(SMALL_ROWS)
    rows = list(valid if args.VALID_NUM is None else valid.take(args.VALID_NUM))
    columns = {name: [row[name] for row in rows] for name in ("image_url", "caption")}
    kept = MinimagenDataset({"validation": columns}, train=False, **options).unaugmented()
    return _StreamedConceptual(train, **options), Subset(kept, range(len(rows)))


def _streamable(found: _Found) -> _Found:
    if found.kind not in KINDS.values():
        raise ValueError(
            f"{found.files[0]} is read by index already: leave out --STREAMING, which is for {', '.join(KINDS)} files"
        )
    return found


def _stream(found: _Found, args: argparse.Namespace, pictures: bool = True) -> Any:
    if found.kind == "tar":
        named = args.CAPTION_COLUMN is not None
        fields = (args.CAPTION_COLUMN,) if named else CAPTION_FIELDS
        arguments = {"files": list(found.files), "fields": fields, "pictures": pictures, "json_first": named}
        return import_datasets().IterableDataset.from_generator(tar_examples, gen_kwargs=arguments)
    return open_tables(found.kind, found.files, streaming=True, **_columns(found, args))
