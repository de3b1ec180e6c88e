"""Asking a training to stop where it can be gone on from: what a cluster does before it takes a machine away."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["STOPPED", "StopRequest", "stop_on_signals"]

#: Exit status of a training that was asked to stop and can be continued: EX_TEMPFAIL of sysexits.h, "try again".
STOPPED = 75
# SIGUSR1 is what Slurm's --signal is usually set to, SIGTERM what it and others send in the end.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Whether a training is to stop after the step in hand.

    Attributes:
        why: Who asked for it; None as long as nobody has.
    """

    def __init__(self) -> None:
        self.why: str | None = None

    @property
    def requested(self) -> bool:
        return self.why is not None

    def ask(self, why: str) -> None:
        """Asks the training to stop."""
        self.why = why


@contextmanager
def stop_on_signals(*, interrupt: bool = False) -> Iterator[StopRequest]:
    """Within the block SIGTERM and SIGUSR1 ask for a stop instead of ending the process. In the main thread.

    Args:
        interrupt: Whether Ctrl-C does so too.
    """
    request = StopRequest()
    before = {}
    if threading.current_thread() is not threading.main_thread():  # no other may install a handler
        yield request
        return
    for number in (*SIGNALS, signal.SIGINT) if interrupt else SIGNALS:
        before[number] = signal.signal(number, lambda received, frame: request.ask(signal.Signals(received).name))
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not installed from Python and cannot be named.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
