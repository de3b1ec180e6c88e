"""Counts that worker processes add to and the parent reads."""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any


class SharedCounts:
    """How often each of some things has happened, in this process and in the workers that were started from it.

    Args:
        names: What is counted.
        counts: Where to begin, one for each name; at 0 if not given.
    """

    def __init__(self, names: Sequence[str], counts: Sequence[int] | None = None):
        self.names = tuple(names)
        # Of the spawn context, which workers can share however they are started; a lock of the fork context cannot be
        # handed to a spawned one.
        start = counts or [0] * len(self.names)
        self._counts: Any = multiprocessing.get_context("spawn").Array("q", start)

    def add(self, name: str) -> int:
        """Count one more, and return how often it has happened now: each number comes once, whoever asks."""
        with self._counts.get_lock():
            index = self.names.index(name)
            self._counts[index] += 1
            return self._counts[index]

    def as_dict(self) -> dict[str, int]:
        """What has happened at all, and how often."""
        return {name: count for name, count in zip(self.names, self._counts, strict=True) if count}

    def __getstate__(self) -> Any:
        # Shared memory can only be handed to a process that is being started; any other copy counts for itself.
        return self.names, self._counts if get_spawning_popen() is not None else list(self._counts)

    def __setstate__(self, state: Any) -> None:
        self.names, counts = state
        if isinstance(counts, list):
            self.__init__(self.names, counts)  # type: ignore[misc]
        else:
            self._counts = counts
