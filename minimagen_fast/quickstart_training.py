"""The small cascade of the quickstart and how its U-Nets are trained: sizes and a schedule for two CPU cores.

Everything goes through the documented interface: the same training directory, loop and data loaders as for a model of
any size. The U-Nets of a cascade are independent of each other, so each can be trained by a process of its own.
"""

import io
import math
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from .Imagen import Imagen
from .shapes import ShapesDataset
from .t5 import get_encoded_dim
from .tiny_t5 import TINY_T5_NAME
from .training import (
    MinimagenTrain,
    TrainingStep,
    create_directory,
    get_default_args,
    get_minimagen_dl_opts,
    get_minimagen_parser,
    get_model_size,
    save_training_info,
)
from .Unet import Unet

LEARNING_RATE = 3e-3
WARM_UP_STEPS = 100
EMA_DECAY = 0.995
MAX_GRAD_NORM = 1.0
VALIDATION_PICTURES = 64
LOSS_WINDOW = 20
# The last part of the time, in which the learning rate goes down to zero however few steps there were.
CLOCK_SHARE = 0.2

Losses = list[tuple[float, float]]


@dataclass(frozen=True)
class Recipe:
    """Sizes of the cascade and of its training, one entry for each U-Net.

    Attributes:
        image_sizes: Side lengths in pixels.
        timesteps: Diffusion steps.
        unets: Arguments of the U-Nets. Shapes come out well only with the middle of the first, where the text is
            attended to, at 8x8 and not at 4x4 pixels.
        batch_sizes: Pictures in a batch. Small: what counts in these first thousands of steps is their number.
        steps_per_minute: Optimizer steps for each minute that the quickstart may take. A machine too slow for them
            ends by the clock instead.
    """

    image_sizes: tuple[int, int] = (16, 32)
    timesteps: tuple[int, int] = (100, 50)
    unets: tuple[dict[str, Any], dict[str, Any]] = (
        dict(dim=32, dim_mults=(1, 2), layer_attns=False, layer_cross_attns=False),
        dict(dim=32, dim_mults=(1, 1, 2), num_resnet_blocks=0, layer_attns=False, layer_cross_attns=False),
    )
    batch_sizes: tuple[int, int] = (16, 6)
    steps_per_minute: tuple[int, int] = (680, 390)

    def steps(self, number: int, minutes: float) -> int:
        """Optimizer steps of U-Net ``number`` (from 1) in a quickstart of so many minutes."""
        return max(1, round(self.steps_per_minute[number - 1] * minutes))

    def cascade(self) -> tuple[Imagen, list[dict[str, Any]], dict[str, Any]]:
        """A fresh cascade, and the full parameters of its U-Nets and itself as a training directory keeps them."""
        fitted = {"text_embed_dim": get_encoded_dim(TINY_T5_NAME)}
        unets_params = [
            {**get_default_args(Unet), **params, **fitted, "lowres_cond": place > 0}
            for place, params in enumerate(self.unets)
        ]
        imagen_params = {
            **get_default_args(Imagen),
            "text_encoder_name": TINY_T5_NAME,
            "image_sizes": self.image_sizes,
            "timesteps": self.timesteps,
            # Weighs the noisiest timesteps, where text and low-resolution image matter most, far more than l2.
            "loss_type": "l1",
            # Low-resolution images that are drowned in noise teach the second U-Net nothing about enlarging them: over
            # the whole range of noise it would take several times as many steps.
            "lowres_max_noise_level": 0.1,
            "lowres_sample_noise_level": 0.0,
        }
        return Imagen([Unet(**params) for params in unets_params], **imagen_params), unets_params, imagen_params


def train_unet(
    recipe: Recipe,
    number: int,
    directory: Path,
    timestamp: str,
    seed: int,
    minutes: float,
    deadline: float,
    threads: int,
    progress: bool,
    after_step: Callable[[], None] | None = None,
) -> Losses:
    """Train one U-Net of a fresh cascade, on CUDA if there is a device.

    Args:
        recipe: Sizes.
        number: Which U-Net, from 1.
        directory: Training directory to make.
        timestamp: Name of the run in the names of its files.
        seed: Seed of the weights, the pictures, and all else that is random.
        minutes: How long the whole quickstart may take; decides the number of steps.
        deadline: When training must end, in seconds of ``time.time()``.
        threads: How many threads to use.
        progress: Whether to show a progress bar.
        after_step: Called after every step.

    Returns:
        (step, mean loss of the last 20 steps), every 20 steps; of a training of fewer steps, the mean of all.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    imagen, unets_params, imagen_params = recipe.cascade()
    imagen.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    without_compiling(imagen)
    index = number - 1
    steps, batch_size, side = recipe.steps(number, minutes), recipe.batch_sizes[index], recipe.image_sizes[index]
    args = get_minimagen_parser().parse_args([])
    args.T5_NAME, args.IMG_SIDE_LEN, args.TIMESTEPS = TINY_T5_NAME, recipe.image_sizes[-1], max(recipe.timesteps)
    args.BATCH_SIZE, args.OPTIM_LR, args.EPOCHS, args.CHCKPT_NUM = batch_size, LEARNING_RATE, 1, steps
    training_dir = create_directory(directory)
    save_training_info(args, timestamp, unets_params, imagen_params, get_model_size(imagen), training_dir)

    unet = imagen.unets[index].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    data = ShapesDataset(steps * batch_size, side_length=side, seed=2 * seed, encoder_name=TINY_T5_NAME)
    held_out = ShapesDataset(VALIDATION_PICTURES, side_length=side, seed=2 * seed + 1, encoder_name=TINY_T5_NAME)
    options = {**get_minimagen_dl_opts(imagen.device), "batch_size": batch_size}
    losses: Losses = []
    window: list[float] = []
    seconds = max(deadline - time.time(), 1.0)
    # Its messages, which the progress file has too, are those of training scripts: they name flags that no command has.
    with redirect_stdout(io.StringIO()):
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
            lr_scheduler=learning_rate_schedule(optimizer, steps, seconds),
            ema_decay=EMA_DECAY,
            autocast_dtype=_fast_dtype(imagen.device),
            max_grad_norm=MAX_GRAD_NORM,
            max_seconds=seconds,
            callback=_averaging_into(losses, window, after_step),
            progress=progress,
        )
    if not losses:
        losses.append((len(window), sum(window) / len(window)))
    return losses


def without_compiling(imagen: Imagen) -> Imagen:
    """Have a cascade run uncompiled: to compile its blocks may take longer than to train it so briefly."""
    return imagen.accelerate(compile="off")


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, steps: int, seconds: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to zero, which comes with the last step or the last second."""
    started = time.monotonic()

    def factor(step: int) -> float:
        # By the step alone where the machine keeps up, so that one seed gives one result there. The clock has a say in
        # the last part of its time only: where steps are slow at first, an earlier one would end the learning too soon.
        clock = 1 - (1 - (time.monotonic() - started) / seconds) / CLOCK_SHARE
        progress = min(max(step / steps, clock), 1.0)
        return min((step + 1) / WARM_UP_STEPS, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device has instructions for it; without them it is slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else None


def _averaging_into(
    losses: Losses, window: list[float], after_step: Callable[[], None] | None
) -> Callable[[TrainingStep], None]:
    def callback(step: TrainingStep) -> None:
        window.append(step.loss)
        if len(window) == LOSS_WINDOW:
            losses.append((step.batch + 1, sum(window) / len(window)))
            window.clear()
        if after_step is not None:
            after_step()

    return callback
