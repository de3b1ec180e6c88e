"""What may cut a piece of work short (a time limit), and what must wait until it is whole (Ctrl-C)."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["TimeLimitExceeded", "has_time_limit", "time_limit", "uninterrupted"]


class TimeLimitExceeded(Exception):
    """The block under :func:`time_limit` took too long."""


def _in_main_thread() -> bool:
    # Python runs signal handlers in the main thread alone, and lets no other thread install one.
    return threading.current_thread() is threading.main_thread()


def has_time_limit() -> bool:
    """Whether :func:`time_limit` can act here: in the main thread of a system with SIGALRM (not Windows)."""
    return hasattr(signal, "SIGALRM") and _in_main_thread()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises :class:`TimeLimitExceeded` inside the block once it has run for `seconds`.

    Python must come to run in between: one long call into a library is cut short only when it returns. The handler of
    SIGALRM and a timer that was running before are put back afterwards.

    Args:
        seconds: The limit; None or 0 for none. Without effect where :func:`has_time_limit` is false.
    """
    if not seconds or not has_time_limit():
        yield
        return

    def stop(signal_number: int, frame: object) -> None:
        raise TimeLimitExceeded(f"took longer than {seconds} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        # Two levels, because the alarm may still ring on the way out: it rings only once, so the outer one is safe.
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        # None stands for a handler that was not installed from Python and cannot be named.
        signal.signal(signal.SIGALRM, signal.SIG_DFL if previous is None else previous)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - started), 1e-3), interval)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C wait until the block is over, so that what belongs together is done together.

    Outside the main thread, and where Ctrl-C is not handled in Python, there is nothing to hold back.
    """
    handler = signal.getsignal(signal.SIGINT) if _in_main_thread() else None
    if not callable(handler):
        yield
        return
    held: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *received: held.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(*held[0])
