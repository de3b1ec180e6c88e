"""From nothing to pictures: train a small cascade on the built-in set, sample it, judge the result, write a report."""

import math
import multiprocessing
import platform
import shlex
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image

from . import __version__
from .files import check_folder
from .generate import load_minimagen, sample_and_save
from .Imagen import Imagen
from .judge import Scores, score
from .pictures import captioned_grid, loss_curve
from .quickstart_training import Losses, Recipe, train_unet, without_compiling
from .shapes import BACKGROUNDS, COLORS, SHAPES, caption
from .train_command import DIVERGED
from .trainer import TrainingDiverged

DEFAULT_MINUTES = 4.0
# What is not for training is for starting, sampling and judging.
TRAINING_SHARE = 0.93
COND_SCALE = (5.0, 2.0)
# The judge finds no less in these few steps than in all: see benchmarks/judged_steps.py.
SAMPLER, SAMPLING_STEPS = "ddim", 25


def wanted_pictures() -> list[tuple[str, str, str]]:
    """All 24 pairs of colour and shape, the backgrounds taking turns: (color, shape, background)."""
    backgrounds = list(BACKGROUNDS)
    return [
        (color, shape, backgrounds[(row + column) % len(backgrounds)])
        for row, color in enumerate(COLORS)
        for column, shape in enumerate(SHAPES)
    ]


def run_quickstart(out: Path, seed: int, minutes: float = DEFAULT_MINUTES, *, recipe: Recipe | None = None) -> int:
    """Train, sample and judge; write everything to a folder and say what to look at.

    Args:
        out: Folder for the results; made if it does not exist, and must be empty if it does.
        seed: Seed of the initial weights, the pictures and the samples; at least 0.
        minutes: About how long all of it may take, at least 0.5. More minutes give better pictures.
        recipe: Sizes of the cascade and its training; those of :class:`.Recipe` if not given.

    Returns:
        The exit status of the command: 0, or that of a training that diverged.

    Raises:
        FileExistsError: if the folder has something in it.
        NotADirectoryError: if there can be no folder, because a file is there.
        ValueError: if the seed or the time is out of range.
    """
    started = time.time()
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if not 0.5 <= minutes < math.inf:
        raise ValueError(f"minutes must be at least 0.5, got {minutes}")
    out = Path(out).absolute()
    check_folder("--out", out)
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is there already and not empty: choose another folder")
    recipe = recipe or Recipe()
    directory = out / "training"

    print(f"Training two U-Nets on pictures of {' and '.join(map(str, recipe.image_sizes))} pixels, drawn on the spot.")
    try:
        losses = _train(recipe, directory, seed, minutes, started)
    except TrainingDiverged as error:
        print(f"minimagen-fast quickstart: {error}; or choose another seed", file=sys.stderr)
        return DIVERGED
    trained = time.time()

    pictures = wanted_pictures()
    captions = [caption(*names) for names in pictures]
    print(f"Sampling {len(captions)} pictures.")
    imagen = without_compiling(load_minimagen(directory))
    steps = [min(SAMPLING_STEPS, timesteps) for timesteps in recipe.timesteps]
    sample_and_save(
        captions,
        minimagen=imagen,
        save_directory=out,
        sample_args={"cond_scale": COND_SCALE, "seed": seed, "sampler": SAMPLER, "steps": steps},
    )
    images = _saved_images(out, len(captions))
    captioned_grid(images, captions, columns=len(SHAPES)).save(out / "grid.png")
    loss_curve({_name(recipe, number): points for number, points in losses.items()}, log_y=True).save(out / "loss.png")
    scores = score(images, pictures)
    report = _report(recipe, imagen, losses, scores, seed, minutes, trained - started, time.time() - started)
    (out / "report.md").write_text(report, encoding="utf-8")
    print(_farewell(out, directory, scores))
    return 0


def _train(recipe: Recipe, directory: Path, seed: int, minutes: float, started: float) -> dict[int, Losses]:
    """Train both U-Nets at once, each in a process of its own; both end up in ``directory``.

    Two threads make a step of such small networks no more than 1.5 times faster: side by side they take less time. The
    second needs fewer steps; when it is done, the first goes on with all threads.
    """
    timestamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    beside = directory.with_name("training_of_unet_2")
    deadline = started + TRAINING_SHARE * minutes * 60
    all_threads = torch.get_num_threads()
    threads = max(1, all_threads // 2)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            second = pool.submit(train_unet, recipe, 2, beside, timestamp, seed, minutes, deadline, threads, False)

            def use_freed_threads() -> None:
                if second.done():
                    torch.set_num_threads(all_threads)

            first = train_unet(
                recipe, 1, directory, timestamp, seed, minutes, deadline, threads, True, after_step=use_freed_threads
            )
            losses = {1: first, 2: second.result()}
    except KeyboardInterrupt:
        print(f"\nWhat was learned so far is saved in {directory} and {beside}.")
        raise
    finally:
        torch.set_num_threads(all_threads)
    for folder in ("state_dicts", "tmp"):
        for file in (beside / folder).glob("unet_1_*.pth"):
            shutil.move(file, directory / folder / file.name)
    shutil.rmtree(beside)
    return losses


def _name(recipe: Recipe, number: int) -> str:
    side = recipe.image_sizes[number - 1]
    return f"U-Net {number}, {side}x{side}"


def _saved_images(out: Path, number: int) -> list[Image.Image]:
    images = []
    for index in range(number):
        with Image.open(out / "generated_images" / f"image_{index}.png") as image:
            images.append(image.convert("RGB"))
    return images


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _report(
    recipe: Recipe,
    imagen: Imagen,
    losses: dict[int, Losses],
    scores: Scores,
    seed: int,
    minutes: float,
    training_seconds: float,
    all_seconds: float,
) -> str:
    sizes = [sum(p.numel() for p in unet.parameters()) for unet in imagen.unets]
    stages = "\n".join(
        f"| {_name(recipe, number)} | {sizes[number - 1]:,} | {recipe.batch_sizes[number - 1]} |"
        f" {int(points[-1][0])} of {recipe.steps(number, minutes)} | {points[-1][1]:.4f} |"
        for number, points in losses.items()
    )
    return f"""# Quickstart report

minimagen_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}; {imagen.device.type}, \
{torch.get_num_threads()} threads; seed {seed}, {minutes:g} minutes asked for.

![The pictures, each above its caption](grid.png)

A judge that knows nothing of the model looked at the {scores.pictures} pictures. It found right:

| color | background | shape |
|---|---|---|
| {_percent(scores.color)} | {_percent(scores.background)} | {_percent(scores.shape)} |

| U-Net | parameters | batch size | steps | last training loss |
|---|---|---|---|---|
{stages}

Training took {training_seconds:.0f} s, everything together {all_seconds:.0f} s.

![Training loss](loss.png)
"""


def _farewell(out: Path, directory: Path, scores: Scores) -> str:
    return f"""
The judge found right: color {_percent(scores.color)}, background {_percent(scores.background)}, \
shape {_percent(scores.shape)} of {scores.pictures} pictures.

Look at   {out / "grid.png"}
          {out / "loss.png"}
          {out / "report.md"}
Try next  minimagen-fast sample -d {shlex.quote(str(directory))} -c "a yellow cross on gray" --cond-scale 4 --grid
          minimagen-fast quickstart --minutes 15 --out longer    (trains longer)
          minimagen-fast train --DATA FOLDER                     (your own captioned pictures)
"""
