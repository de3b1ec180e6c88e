"""Asking a training to stop where it can be gone on from: what a cluster does before it takes a machine away."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["STOPPED", "STOP_FILE", "StopRequest", "stop_on_signals"]

#: Exit status of a training that was asked to stop and can be continued: EX_TEMPFAIL of sysexits.h, "try again".
STOPPED = 75
# SIGUSR1 is what Slurm's --signal is usually set to, SIGTERM what it and others send in the end.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


#: Name of the file in a training directory that asks for a stop too: signals do not reach every process everywhere.
STOP_FILE = "stop"
SECONDS_BETWEEN_LOOKS = 1.0


class StopRequest:
    """Whether a training is to stop after the step in hand.

    Attributes:
        why: Who asked for it; None as long as nobody has.
    """

    def __init__(self) -> None:
        self.why: str | None = None
        self._file: Path | None = None
        self._looked = float("-inf")

    def watch(self, directory: Path) -> None:
        """Takes a file ``stop`` in the directory for a request. One that is there already is an old one, and removed.

        A training that torchrun has started once more after it was stopped is to stop again, though.
        """
        self._file = directory / STOP_FILE
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            self._file.unlink(missing_ok=True)

    def leave_word(self) -> None:
        """Leaves the file where torchrun, to which a stop is a failure, is about to start the training once more."""
        made, allowed = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
        if self._file is not None and made < allowed:
            self._file.touch()

    @property
    def requested(self) -> bool:
        """Whether anybody has asked. For a file it is looked every second at most."""
        if self.why is None and self._file is not None and time.monotonic() - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked = time.monotonic()
            if self._file.exists():
                self.ask(f"by the file {self._file}")
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
