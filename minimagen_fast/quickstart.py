"""From nothing to pictures: train a small cascade on the built-in set, sample it, judge the result, write a report.

Everything goes through the documented interface: the same training directory, loop and loading as for a model of any
size. What is chosen here are sizes and a schedule that two CPU cores get through in a few minutes.
"""

import math
import platform
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from . import __version__
from .generate import load_minimagen, sample_and_save
from .Imagen import Imagen
from .judge import Scores, score
from .pictures import captioned_grid, loss_curve
from .shapes import BACKGROUNDS, COLORS, SHAPES, ShapesDataset, caption
from .t5 import get_encoded_dim
from .tiny_t5 import TINY_T5_NAME
from .training import (
    MinimagenTrain,
    create_directory,
    get_default_args,
    get_minimagen_dl_opts,
    get_minimagen_parser,
    get_model_size,
    save_training_info,
)
from .Unet import Unet

DEFAULT_MINUTES = 5.0

IMAGE_SIZES = (16, 32)
TIMESTEPS = (100, 50)
COND_SCALE = (4.0, 1.0)
# A little noise hides the base model's mistakes of a pixel from the second U-Net; more would hide the shape.
LOWRES_SAMPLE_NOISE_LEVEL = 0.1
UNETS = (
    dict(
        dim=32,
        dim_mults=(1, 2, 2),
        num_resnet_blocks=1,
        layer_attns=False,
        layer_cross_attns=False,
    ),
    dict(
        dim=16,
        dim_mults=(1, 2),
        num_resnet_blocks=1,
        layer_attns=False,
        layer_cross_attns=False,
        memory_efficient=True,
    ),
)
BATCH_SIZES = (32, 16)
LEARNING_RATES = (2e-3, 2e-3)
# Optimizer steps for each minute asked for; a machine that is too slow for them ends by the clock instead.
STEPS_PER_MINUTE = (300, 60)
# Shares of the time for training each U-Net. The rest is for loading, sampling and judging.
TIME_SHARES = (0.70, 0.14)
WARM_UP_STEPS = 100
EMA_DECAY = 0.99
MAX_GRAD_NORM = 1.0
VALIDATION_PICTURES = 64


def wanted_pictures() -> list[tuple[str, str, str]]:
    """All 24 pairs of colour and shape, the backgrounds taking turns: (color, shape, background)."""
    backgrounds = list(BACKGROUNDS)
    return [
        (color, shape, backgrounds[(row + column) % len(backgrounds)])
        for row, color in enumerate(COLORS)
        for column, shape in enumerate(SHAPES)
    ]


def run_quickstart(out: Path, seed: int, minutes: float = DEFAULT_MINUTES) -> int:
    """Train, sample and judge; write everything to a folder and say what to look at.

    Args:
        out: Folder for the results; made if it does not exist, and must be empty if it does.
        seed: Seed of the initial weights, the pictures and the samples; at least 0.
        minutes: About how long all of it may take, at least 0.5. More minutes give better pictures.

    Returns:
        0, the exit status of the command.

    Raises:
        FileExistsError: if the folder has something in it.
        ValueError: if the seed or the time is out of range.
    """
    started = time.monotonic()
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if not 0.5 <= minutes < math.inf:
        raise ValueError(f"minutes must be at least 0.5, got {minutes}")
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and not empty: choose another folder")

    torch.manual_seed(seed)
    imagen, settings = _new_imagen()
    directory = out / "training"
    timestamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    training_dir = create_directory(directory)
    args = _arguments(settings)
    save_training_info(args, timestamp, *settings, get_model_size(imagen), training_dir)
    print(f"Training {_count(imagen)} on pictures of {IMAGE_SIZES[0]} and {IMAGE_SIZES[1]} pixels, drawn on the spot.")

    losses: dict[str, list[tuple[float, float]]] = {}
    for number in (1, 2):
        name = f"U-Net {number}, {IMAGE_SIZES[number - 1]}x{IMAGE_SIZES[number - 1]}"
        losses[name] = []
        _train(imagen, number, args, timestamp, training_dir, seed, minutes, _smoothed_into(losses[name]))
    trained = time.monotonic()

    print("Sampling 24 pictures.")
    pictures = wanted_pictures()
    captions = [caption(*names) for names in pictures]
    sample_and_save(
        captions,
        minimagen=load_minimagen(directory),
        save_directory=out,
        sample_args={
            "cond_scale": COND_SCALE,
            "lowres_sample_noise_level": LOWRES_SAMPLE_NOISE_LEVEL,
            "seed": seed,
        },
    )
    images = _saved_images(out, len(captions))
    captioned_grid(images, captions, columns=len(SHAPES)).save(out / "grid.png")
    loss_curve(losses, log_y=True).save(out / "loss.png")
    scores = score(images, pictures)
    ended = time.monotonic()
    report = _report(imagen, losses, scores, seed, minutes, trained - started, ended - started)
    (out / "report.md").write_text(report, encoding="utf-8")
    print(_farewell(out, directory, scores))
    return 0


def _new_imagen() -> tuple[Imagen, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """A fresh cascade, and the full parameters of its U-Nets and itself as a training directory keeps them."""
    fitted = {"text_embed_dim": get_encoded_dim(TINY_T5_NAME)}
    unets_params = [
        {**get_default_args(Unet), **params, **fitted, "lowres_cond": place > 0} for place, params in enumerate(UNETS)
    ]
    imagen_params = {
        **get_default_args(Imagen),
        "text_encoder_name": TINY_T5_NAME,
        "image_sizes": IMAGE_SIZES,
        "timesteps": TIMESTEPS,
        "lowres_sample_noise_level": LOWRES_SAMPLE_NOISE_LEVEL,
    }
    return Imagen([Unet(**params) for params in unets_params], **imagen_params), (unets_params, imagen_params)


def _arguments(settings: tuple) -> Any:
    args = get_minimagen_parser().parse_args([])
    args.T5_NAME = TINY_T5_NAME
    args.IMG_SIDE_LEN = IMAGE_SIZES[-1]
    args.TIMESTEPS = max(TIMESTEPS)
    args.EPOCHS = 1
    return args


def _train(
    imagen: Imagen,
    number: int,
    args: Any,
    timestamp: str,
    training_dir: Callable,
    seed: int,
    minutes: float,
    callback: Callable,
) -> None:
    index = number - 1
    side, batch_size = IMAGE_SIZES[index], BATCH_SIZES[index]
    steps, seconds = round(STEPS_PER_MINUTE[index] * minutes), TIME_SHARES[index] * minutes * 60
    args.BATCH_SIZE, args.OPTIM_LR, args.CHCKPT_NUM = batch_size, LEARNING_RATES[index], steps
    options = {**get_minimagen_dl_opts(imagen.device), "batch_size": batch_size}
    data = ShapesDataset(steps * batch_size, side_length=side, seed=2 * seed, encoder_name=TINY_T5_NAME)
    held_out = ShapesDataset(VALIDATION_PICTURES, side_length=side, seed=2 * seed + 1, encoder_name=TINY_T5_NAME)
    optimizer = torch.optim.AdamW(
        imagen.unets[index].parameters(), lr=LEARNING_RATES[index], betas=(0.9, 0.99), fused=True
    )
    MinimagenTrain(
        timestamp,
        args,
        list(imagen.unets),
        imagen,
        DataLoader(data, **options),
        DataLoader(held_out, **{**options, "shuffle": False}),
        training_dir,
        optimizer,
        unet_numbers=[number],
        lr_scheduler=_schedule(optimizer, steps, seconds),
        ema_decay=EMA_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        max_seconds=seconds,
        callback=callback,
    )


def _schedule(optimizer: torch.optim.Optimizer, steps: int, seconds: float) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to zero, which comes with the last step or the last second."""
    started = time.monotonic()

    def factor(step: int) -> float:
        # By the step alone where the machine is fast enough, so that one seed gives one result there.
        progress = max(step / steps, min((time.monotonic() - started) / seconds, 1.0))
        return min((step + 1) / WARM_UP_STEPS, 1.0) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _smoothed_into(points: list[tuple[float, float]]) -> Callable:
    """A callback that adds the mean loss of every 20 steps to ``points`` as (step, loss)."""
    window: list[float] = []

    def callback(step: Any) -> None:
        window.append(step.loss)
        if len(window) == 20:
            points.append((step.batch + 1, sum(window) / len(window)))
            window.clear()

    return callback


def _saved_images(out: Path, number: int) -> list:
    from PIL import Image

    images = []
    for index in range(number):
        with Image.open(out / "generated_images" / f"image_{index}.png") as image:
            images.append(image.convert("RGB"))
    return images


def _count(imagen: Imagen) -> str:
    sizes = [sum(p.numel() for p in unet.parameters()) / 1e6 for unet in imagen.unets]
    return " and ".join(f"a U-Net of {size:.1f} million parameters" for size in sizes)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _report(
    imagen: Imagen,
    losses: dict[str, list[tuple[float, float]]],
    scores: Scores,
    seed: int,
    minutes: float,
    training_seconds: float,
    all_seconds: float,
) -> str:
    stages = "\n".join(
        f"| {name} | {sum(p.numel() for p in unet.parameters()):,} | {int(points[-1][0]) if points else 0} of"
        f" {round(STEPS_PER_MINUTE[index] * minutes)} | {BATCH_SIZES[index]} |"
        f" {f'{points[-1][1]:.4f}' if points else 'too few steps to tell'} |"
        for index, (unet, (name, points)) in enumerate(zip(imagen.unets, losses.items(), strict=True))
    )
    return f"""# Quickstart report

minimagen_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}; on {imagen.device.type},
{torch.get_num_threads()} threads; seed {seed}, {minutes:g} minutes asked for.

![The pictures, each above its caption](grid.png)

A judge that knows nothing of the model looked at the {scores.pictures} pictures. It found right:

| color | background | shape |
|---|---|---|
| {_percent(scores.color)} | {_percent(scores.background)} | {_percent(scores.shape)} |

| U-Net | parameters | steps | batch size | last training loss |
|---|---|---|---|---|
{stages}

Training took {training_seconds:.0f} s, everything together {all_seconds:.0f} s.

![Training loss](loss.png)
"""


def _farewell(out: Path, directory: Path, scores: Scores) -> str:
    return f"""
Right, says the judge: color {_percent(scores.color)}, background {_percent(scores.background)},\
 shape {_percent(scores.shape)} of {scores.pictures} pictures.

Look at   {out / "grid.png"}
          {out / "loss.png"}
          {out / "report.md"}
Try next  minimagen-fast sample -d {directory} -c "a yellow cross on gray" --cond-scale 4
          minimagen-fast quickstart --minutes 15     (longer training, better shapes)
          minimagen-fast train --DATA FOLDER         (your own captioned pictures)
"""
