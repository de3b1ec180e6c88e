"""The tables of docs/scaling.md are what the command prints."""

import json
import re
import shlex
from pathlib import Path

import pytest

from minimagen_fast import cli

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n\$ (minimagen-fast plan (?:[^\n]*\\\n)*[^\n]*)\n(.*?)^```$", PAGE, flags=re.M | re.S)


def test_the_page_has_its_tables():
    commands = [command for command, _ in BLOCKS]
    for gpus in (8, 64, 1024):
        for unet in ("Base", "Super"):
            assert any(f"--unet {unet} " in c and f"--gpus {gpus} " in c for c in commands), (unet, gpus)


@pytest.mark.parametrize("command, shown", BLOCKS, ids=range(len(BLOCKS)))
def test_a_table_is_what_the_command_prints(capsys, command, shown):
    _, *words = shlex.split(command.replace("\\\n", " "))
    assert cli.main(words) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    # Three dots stand for lines that the page leaves out.
    for part in shown.split("...\n"):
        lines = part.rstrip("\n").split("\n") if part.strip() else []
        places = [n for n in range(len(printed)) if printed[n : n + len(lines)] == lines]
        assert places, f"not printed:\n{part}\nbut:\n" + "\n".join(printed)
        printed = printed[places[0] + len(lines) :]
    assert shown.endswith("...\n") or not printed


def test_figures_in_the_text_are_those_of_the_tables(capsys):
    assert cli.main(["plan", *"--unet Base --batch 256 --gpus 8 --ema --images 1 --t5 xl1.1 --json".split()]) == 0
    found = json.loads(capsys.readouterr().out)
    ddp, fsdp = (found["strategies"][name]["memory"]["peak"] / 2**30 for name in ("ddp", "fsdp"))
    assert f"saves {ddp - fsdp:.0f} GiB of {ddp:.0f}" in PAGE
    assert f"{found['counted']['activation_bytes_per_image'] / 2**20:.0f} MiB an image times 256" in PAGE
    assert f"has {found['data']['caption_bytes'] / 1e3:.0f} kB packed" in PAGE
    assert f"it would have {found['data']['padded_float32_caption_bytes'] / 1e3:.0f} kB" in " ".join(PAGE.split())
