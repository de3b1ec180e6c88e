"""Files that are whole or not there, and how to tell; captions in a file."""

import argparse
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "check_folder",
    "file_digest",
    "file_fault",
    "folder_fault",
    "lines_of",
    "named_path",
    "naming_file",
    "path_text",
    "replace_file",
    "size_fault",
    "sync_folder",
    "system_error",
]


def path_text(text: str) -> str:
    """The text of a path, as a type of argparse.

    Raises:
        ArgumentTypeError: for an empty text, as of a variable that is not set. It would be the folder that one is in.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty, as of a variable that is not set: name a path")
    return text


def named_path(text: str) -> Path:
    """A path, as a type of argparse; refuses what :func:`path_text` does."""
    return Path(path_text(text))


def check_folder(name: str, directory: Path) -> None:
    """Refuse a path that :func:`folder_fault` finds fault with.

    Args:
        name: The argument that gives it.
        directory: The path.

    Raises:
        NotADirectoryError: there can be no folder.
    """
    if (fault := folder_fault(name, directory)) is not None:
        raise NotADirectoryError(fault)


def folder_fault(name: str, directory: Path) -> str | None:
    """Why there can be no folder at a path that the argument `name` gives: a file lies there, or further up in it."""
    there = next((path for path in (directory, *directory.absolute().parents) if os.path.lexists(path)), None)
    if there is None or there.is_dir():
        return None
    kind = "a file" if there.exists() else "a link that leads nowhere"
    return f"{name} {directory} cannot be a folder: {there} is {kind}. Name another path"


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that `path` holds either what it held or all of `content`, on the disk, whatever happens."""
    # In the same folder, because only a rename within one file system is atomic; with the process id, so that two runs
    # do not share it.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming_file(path), open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Has an error of the system within the block, such as a full disk, come out as that, with the file's name.

    Raises:
        OSError: there was one, hidden in whatever error a library made of it or not.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer of archives ends with the latter
        cause = system_error(error)
        # Without a number it is somebody else's; with a name it says itself what it is of.
        if cause is None or cause.errno is None or cause.filename is not None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def system_error(error: BaseException | None) -> OSError | None:
    """The error of the system that an error came from; None if there is none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def sync_folder(directory: Path) -> None:
    """Have the names in a folder, not only the contents of its files, on the disk."""
    if os.name == "nt":  # which has no such thing, and does not need it
        return
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not blank, without white space around them.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    # Not splitlines(), which also breaks at characters that may stand in a caption.
    return [line.strip() for line in text.split("\n") if line.strip()]


def file_digest(path: Path) -> str:
    """The SHA-256 digest of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_fault(path: Path, size: int, sha256: str) -> str | None:
    """What is wrong with a file, reading all of it; None if nothing is.

    Args:
        path: The file.
        size: Its size in bytes as recorded.
        sha256: Its digest as recorded.
    """
    return size_fault(path, size) or (None if file_digest(path) == sha256 else "its checksum is another one")


def size_fault(path: Path, size: int) -> str | None:
    """What is wrong with a file at first sight: whether it is there and of its recorded size in bytes."""
    if not path.is_file():
        return "it is missing"
    found = path.stat().st_size
    return None if found == size else f"it has {found} bytes instead of {size}"
