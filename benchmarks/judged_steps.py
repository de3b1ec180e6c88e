"""How many steps a sampler needs: the quickstart's cascade, sampled in several ways and judged.

``python -m benchmarks.judged_steps quickstart/training`` samples the 24 captions of the quickstart with several seeds,
lets the judge look at the pictures, and prints a table; ``--write`` keeps it in
benchmarks/results/quickstart/judged_steps.md.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minimagen_fast.generate import load_minimagen
from minimagen_fast.Imagen import Imagen
from minimagen_fast.judge import Scores, score
from minimagen_fast.quickstart import COND_SCALE, wanted_pictures
from minimagen_fast.shapes import caption

from .machine import ROOT

RESULT = ROOT / "benchmarks" / "results" / "quickstart" / "judged_steps.md"
WAYS: tuple[dict[str, Any], ...] = (
    {"sampler": "ddpm"},
    *({"sampler": name, "steps": steps} for name in ("dpmpp_2m", "ddim", "ddpm") for steps in (50, 25, 20, 10)),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one way to sample."""

    way: dict[str, Any]
    steps: int
    scores: Scores


def try_ways(imagen: Imagen, seeds: range, ways: tuple[dict[str, Any], ...] = WAYS) -> list[Outcome]:
    """Sample and judge, in each way with the same seeds."""
    wanted = wanted_pictures()
    texts = [caption(*names) for names in wanted]
    outcomes = []
    for way in ways:
        images = []
        for seed in seeds:
            images += imagen.sample(
                texts, cond_scale=COND_SCALE, seed=seed, return_pil_images=True, progress=False, **way
            )
        totals = [scheduler.num_timesteps for scheduler in imagen.noise_schedulers]
        steps = sum(totals) if "steps" not in way else way["steps"] * len(totals)
        outcomes.append(Outcome(way, steps, score(images, wanted * len(seeds))))
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Markdown."""
    lines = ["| sampler | steps, all U-Nets | color | background | shape |", "|---|--:|--:|--:|--:|"]
    for outcome in outcomes:
        scores = outcome.scores
        shares = " | ".join(f"{share:.0%}" for share in (scores.color, scores.background, scores.shape))
        lines.append(f"| {outcome.way['sampler']} | {outcome.steps} | {shares} |")
    return "\n".join(lines) + "\n"


_HEAD = """# How many steps a sampler needs

Written by `python -m benchmarks.judged_steps DIRECTORY --seeds {seeds} --write`: the cascade of the quickstart ({sizes}
pixels, {timesteps} timesteps), its {captions} captions with {seeds} seeds each, on {device}, torch {torch}. The judge's
shares are of {pictures} pictures: one picture is {share:.1%}. The first row is the documented default.

"""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judged_steps", description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="training directory of a quickstart")
    parser.add_argument("--seeds", type=int, default=4, help="number of seeds (%(default)s)")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {RESULT.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    imagen = load_minimagen(options.directory)
    outcomes = try_ways(imagen, range(options.seeds))
    pictures = outcomes[0].scores.pictures
    head = _HEAD.format(
        sizes=" to ".join(map(str, imagen.image_sizes)),
        timesteps=" and ".join(str(scheduler.num_timesteps) for scheduler in imagen.noise_schedulers),
        captions=pictures // options.seeds,
        seeds=options.seeds,
        device=f"{imagen.device.type}, {torch.get_num_threads()} threads",
        torch=torch.__version__,
        pictures=pictures,
        share=1 / pictures,
    )
    print(table(outcomes))
    if options.write:
        RESULT.write_text(head + table(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
