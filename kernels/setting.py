"""A value that blocks of code set for a time, for all threads of the process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Setting(Generic[T]):
    """What was set last and is not over yet; ``default`` outside of all blocks.

    One value for the process, since torch.compile sees neither thread-local nor context variables change, and backward
    passes run in threads of their own. Blocks of several threads may end in any order: none leaves its value behind.

    Attributes:
        value: What is in force.
    """

    def __init__(self, default: T):
        self.value = default
        self._default = default
        self._set: list[tuple[object, T]] = []
        self._lock = threading.Lock()

    @contextmanager
    def use(self, value: T) -> Iterator[None]:
        """Set it for a block of code."""
        block = object()
        with self._lock:
            self._set.append((block, value))
            self.value = value
        try:
            yield
        finally:
            with self._lock:
                self._set = [entry for entry in self._set if entry[0] is not block]
                self.value = self._set[-1][1] if self._set else self._default
