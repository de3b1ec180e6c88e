"""What is shown while something is under way: bars and lines. That nobody can read them ends nothing."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

__all__ = ["progress_bar", "say"]


class _Forgiving:
    """A stream whose writes may fail: on a full disk, on a terminal or pipe that has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError is what a closed file raises
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    # tqdm compares streams, to find the bars that a line would be written into.
    def __eq__(self, other: object) -> bool:
        return self._stream == getattr(other, "_stream", other)

    def __hash__(self) -> int:
        return hash(self._stream)


def progress_bar(iterable: Iterable | None = None, *, shown: bool = True, **options: Any) -> tqdm:
    """A progress bar on stderr, as tqdm makes it with these options; an invisible one where there is no stderr.

    That it cannot be written raises no error, now or later.
    """
    if shown and sys.stderr is not None:  # None if it was closed when the program began
        with suppress(OSError, ValueError):  # tqdm flushes stderr itself at the start
            return tqdm(iterable, file=_Forgiving(sys.stderr), **options)
    return tqdm(iterable, disable=True, **options)


def say(text: str, *, on_stderr: bool = False) -> None:
    """Prints a line without tearing a progress bar, on stdout if not told otherwise; raises no error either."""
    stream = sys.stderr if on_stderr else sys.stdout
    if stream is not None:
        tqdm.write(text, file=_Forgiving(stream))
