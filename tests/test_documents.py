"""The commands that README.md and docs/ show have the flags that there are."""

import re
import shlex
from pathlib import Path

import pytest

from minimagen_fast.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
# A command in a block, possibly over several lines, or in a table's or a sentence's backquotes.
COMMAND = re.compile(
    r"(?:minimagen-fast|-m minimagen_fast) ((?:train|encode-captions|sample|export|plan|report)\b(?:[^`\n\\]|\\\n)*)"
)


def commands():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for text in COMMAND.findall(path.read_text()):
            words = shlex.split(text.replace("\\\n", " "), comments=True)
            # A synopsis is not a command, and a name alone is none either.
            if (
                len(words) > 1
                and "--help" not in words
                and not any(word.startswith("[") or word in ("...", "|") for word in words)
            ):
                yield pytest.param(words, id=f"{path.name}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_in_the_documents_has_flags_that_there_are(words):
    _parser(words[0]).parse_args(words)


def test_the_documents_show_commands():
    assert len(list(commands())) > 5
