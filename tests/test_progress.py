"""Progress bars and lines where they cannot be written."""

import errno
import io
import sys

import pytest
from training_runs import Run

from minimagen_fast.progress import progress_bar, say


class Full(io.StringIO):
    """As /dev/full: everything is refused."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        self.write("")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, Full(), closed()], ids=["none", "full", "closed"])
def test_what_cannot_be_shown_costs_nothing(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    done = []
    bar = progress_bar(range(3), desc="steps", mininterval=0)
    for number in bar:
        done.append(number)
        bar.set_postfix(loss=number)
        say("a line")
        say("another", on_stderr=True)
    assert done == [0, 1, 2]
    with progress_bar(total=2, unit=" captions") as bar:
        bar.update(2)


def test_a_training_needs_neither_stdout_nor_stderr(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    run = Run(tmp_path / "run").train(progress=True)
    assert list((run.folder / "state_dicts").glob("unet_0_*"))


def test_they_are_shown(monkeypatch, capsys):
    assert list(progress_bar(range(2), desc="steps", mininterval=0)) == [0, 1]
    assert list(progress_bar(range(2), desc="others", shown=False)) == [0, 1]
    say("a line")
    say("another", on_stderr=True)
    shown = capsys.readouterr()
    assert shown.out == "a line\n"
    assert "steps: 100%" in shown.err and "others" not in shown.err and "another\n" in shown.err
