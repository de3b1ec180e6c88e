"""What is in a tar file of captioned pictures, as WebDataset lays them out, and what must not be in one.

The members ``x.jpg`` and ``x.txt``, or ``x.json`` with a caption in it, make one item.
"""

import json
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar

from .decode import ImageError
from .folders import IMAGE_SUFFIXES, is_below

__all__ = [
    "CAPTION_FIELDS",
    "LeftOut",
    "Member",
    "Pair",
    "caption_of",
    "captioned_members",
    "read_member",
    "tar_examples",
]

CAPTION_FIELDS = ("caption", "text")
_CAPTION_SUFFIXES = (".txt", ".json")
_SUFFIXES = (*IMAGE_SUFFIXES, *_CAPTION_SUFFIXES)
_PICTURE, _CAPTION = "picture", "caption"

T = TypeVar("T")


class Member(NamedTuple):
    """Where the bytes of a member lie in its tar file."""

    offset: int
    size: int


class Pair(NamedTuple):
    """The picture and the caption of an item, and whether the latter is in a JSON file."""

    picture: Member
    caption: Member
    is_json: bool


class LeftOut(NamedTuple):
    """Pictures and captions that are in no item, by the reason.

    Attributes:
        alone: How many have nothing that they belong to.
        dotted: How many have another dot before their suffix, and what stands before it is not the name of an item.
    """

    alone: int
    dotted: int

    def told(self, where: str) -> str:
        """In words; empty if there are none."""
        told = [f"{self.alone} pictures or captions in {where} are alone and are left out"] if self.alone else []
        if self.dotted:
            told.append(
                f"{self.dotted} pictures or captions in {where} are left out since there is another dot in their names,"
                " which ends at the first: rename them"
            )
        return "; ".join(told)


def captioned_members(file: IO[bytes], name: str, *, json_first: bool = False) -> tuple[list[Pair], LeftOut]:
    """What a tar file holds, its members' contents unread.

    Args:
        file: The tar file, not compressed, in which one can seek.
        name: Its name, for errors.
        json_first: Whether of two captions of an item that in JSON is taken, as where a field of it was asked for.

    Returns:
        The items, in the order of their first members, and how many pictures and captions are in none.

    Raises:
        ValueError: if it is damaged or cut short, or has members that no data set needs and an attacker may: links,
            devices, and names that are absolute or lead to a parent folder; or if an item has two pictures, or two
            captions of one kind.
    """
    items: dict[str, dict[str, tuple[str, Member]]] = {}
    dotted = Counter[str]()
    problems: list[str] = []
    for key, suffix, info in _files(file, name, problems):
        if suffix not in _SUFFIXES:
            dotted[key] += 1
            continue
        member = Member(info.offset_data, info.size)
        _take(items.setdefault(key, {}), info.name, suffix, member, problems, json_first)
    _refuse(name, problems)
    whole = {key: item for key, item in items.items() if len(item) == 2}
    pairs = [Pair(item[_PICTURE][1], item[_CAPTION][1], item[_CAPTION][0] == ".json") for item in whole.values()]
    outside = sum(count for key, count in dotted.items() if key not in whole)
    return pairs, LeftOut(len(items) - len(pairs), outside)


def tar_examples(
    files: Iterable[str], fields: Sequence[str] = CAPTION_FIELDS, pictures: bool = True, json_first: bool = False
) -> Iterator[dict[str, Any]]:
    """The items of tar files one after the other, for streaming; the members of an item must follow one another.

    Args:
        files: Paths, or addresses that ``fsspec`` can open and seek in.
        fields: Names of the fields of JSON files that hold captions.
        pictures: Whether to read the pictures; they are empty otherwise.
        json_first: See :func:`captioned_members`.

    Yields:
        'image', the bytes of the picture, and 'caption', None where it is in no shape to be read.

    Raises:
        ValueError: see :func:`captioned_members`; but what comes before the fault has been given by then.
    """
    import fsspec

    for name in files:
        alone = dotted = 0
        with fsspec.open(name, "rb") as file:
            for item, others in _items_in_turn(file, name, pictures, json_first):
                if len(item) == 2:
                    suffix, content = item[_CAPTION]
                    try:
                        caption = caption_of(content, suffix == ".json", fields)
                    except ImageError:
                        caption = None
                    yield {"image": item[_PICTURE][1], "caption": caption}
                else:
                    alone += bool(item)
                    dotted += others
        if told := LeftOut(alone, dotted).told(name):
            warnings.warn(told, stacklevel=2)


def _items_in_turn(
    file: IO[bytes], name: str, pictures: bool, json_first: bool
) -> Iterator[tuple[dict[str, tuple[str, bytes]], int]]:
    """The members of each item that are taken, and how many others of its name there are, which may be all."""
    current, item, others = None, dict[str, tuple[str, bytes]](), 0
    problems: list[str] = []
    for key, suffix, info in _files(file, name, problems):
        if key != current and (item or others):
            yield item, others
            item, others = {}, 0
        current = key
        if suffix not in _SUFFIXES:
            others += 1
            continue
        wanted = pictures or suffix in _CAPTION_SUFFIXES
        content = read_member(file, Member(info.offset_data, info.size)) if wanted else b""
        _take(item, info.name, suffix, content, problems, json_first)
        _refuse(name, problems)
    _refuse(name, problems)
    if item or others:
        yield item, others


def read_member(file: IO[bytes], member: Member) -> bytes:
    """The contents of a member."""
    file.seek(member.offset)
    return file.read(member.size)


def caption_of(content: bytes, is_json: bool, fields: Sequence[str] = CAPTION_FIELDS) -> Any:
    """The caption in a caption file.

    Args:
        content: The file's bytes.
        is_json: Whether it is JSON, with the caption in the first of `fields` that it has; else it is text.
        fields: Names of fields.

    Raises:
        ImageError: 'caption', if there is none.
    """
    try:
        text = content.decode("utf-8-sig")
        if not is_json:
            return text.strip()
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError("caption", f"the caption is not {'JSON' if is_json else 'UTF-8'} ({error})") from error
    found = [values[field] for field in fields if field in values] if isinstance(values, dict) else []
    if not found:
        raise ImageError("caption", f"the caption file has none of the fields {', '.join(fields)}")
    return found[0]


def _files(file: IO[bytes], name: str, problems: list[str]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(name of the item, what stands behind its first dot, member) of all that ends as a picture or caption does.

    What is refused becomes a problem.
    """
    for member in _members(file, name):
        fault = _fault(member)
        if fault is not None:
            problems.append(f"{member.name!r} {fault}")
            continue
        path = PurePosixPath(member.name)
        stem, dot, suffix = path.name.partition(".")
        # Hidden files, which systems leave beside pictures, have no stem.
        if member.isreg() and stem and path.suffix.lower() in _SUFFIXES:
            yield str(path.with_name(stem)), dot + suffix.lower(), member


def _members(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, whole and to its end: the library takes a damaged header for the end."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # which it would keep, all of them
                yield member
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{name} is no tar file, or it is damaged or cut short ({error}): get it anew") from error
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError(f"{name} is cut short: it ends at byte {end + len(block)} without an end mark: get it anew")
    while block:
        if block.strip(b"\0"):
            raise ValueError(
                f"{name} is damaged at about byte {end}, or something was appended to it there: get it anew (tar files"
                " are joined with `tar --concatenate`)"
            )
        block = file.read(1 << 20)


def _fault(member: tarfile.TarInfo) -> str | None:
    if not is_below(member.name):
        return "is outside the folder that it would be unpacked to"
    if member.issym() or member.islnk():
        return f"is a link, to {member.linkname!r}"
    if member.issparse():
        return "is a sparse file"
    return None if member.isreg() or member.isdir() else "is no file but a device or the like"


def _take(
    item: dict[str, tuple[str, T]], name: str, suffix: str, value: T, problems: list[str], json_first: bool
) -> None:
    """Add a member to its item.

    Of two captions the text is taken, since JSON stands beside it with everything else, unless ``json_first``.
    """
    kind = _PICTURE if suffix in IMAGE_SUFFIXES else _CAPTION
    if kind in item and (kind == _PICTURE or item[kind][0] == suffix):
        problems.append(f"{name!r} is the second {kind} of its item")
    elif kind not in item or suffix == (".json" if json_first else ".txt"):
        item[kind] = (suffix, value)


def _refuse(name: str, problems: list[str]) -> None:
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{name} cannot be used:\n{shown}{more}")
