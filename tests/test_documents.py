"""What README.md and docs/ say: their commands have the flags that there are, their figures can be counted."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minimagen_fast.cli import _parser
from minimagen_fast.kernels import use_implementation
from minimagen_fast.layers import UpsampleConv
from minimagen_fast.Unet import Base, Super

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


def share_of_enlargements(kind, side, **settings):
    """Of the FLOPs of a U-Net's forward pass in plain torch."""
    with torch.device("meta"):
        unet = kind(**settings)
        image, time = torch.empty(1, 3, side, side), torch.empty(1, dtype=torch.int64)
        text = torch.empty(1, 256, unet._config["text_embed_dim"])
    lowres = {"lowres_cond_img": image, "lowres_noise_times": time} if unet.lowres_cond else {}
    names = {name for name, module in unet.named_modules() if isinstance(module, UpsampleConv)}
    with use_implementation("reference"), FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(image, time, text_embeds=text, **lowres)
    flops = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return sum(flops[name] for name in names) / counter.get_total_flops()


def test_readme_says_how_much_of_the_model_enlargements_are():
    base, large = share_of_enlargements(Base, 64), share_of_enlargements(Super, 256, lowres_cond=True)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"It is {base:.1%} of the FLOPs of `Base`, {large:.1%} of those of `Super`." in readme
