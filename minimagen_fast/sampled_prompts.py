"""What ``minimagen-fast train --SAMPLE_INTERVAL`` samples: given prompts, or what the validation pictures show."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .data import MinimagenCollator
from .files import lines_of
from .Imagen import Imagen
from .ranks import Ranks
from .sample_grids import sample_grid
from .t5 import t5_encode_text

__all__ = ["sampled_prompts"]

MOST_PROMPTS = 64
VALIDATION_PICTURES = 8


def sampled_prompts(
    args: argparse.Namespace, imagen: Imagen, numbers: Sequence[int], valid_data: Any, ranks: Ranks
) -> Callable[[Path], bool]:
    """A function that samples the same prompts every time, see :func:`.sample_grids.sample_grid`.

    A super-resolution U-Net that is trained alone enlarges validation pictures: what the U-Nets before it would make is
    still noise.

    Args:
        args: `SAMPLE_PROMPTS`, `SAMPLE_STEPS`, `SAMPLE_COND_SCALE`, `T5_NAME` and `MAX_NUM_WORDS` are used.
        imagen: The Imagen, on its device.
        numbers: Numbers of the U-Nets that are trained, from 1.
        valid_data: The validation data, by index.
        ranks: The ranks. Only the first encodes and samples.

    Raises:
        FileNotFoundError: there is no such file of prompts.
        ValueError: there is nothing to sample, or too much.
    """
    alone = len(numbers) == 1 and numbers[0] > 1
    if alone and args.SAMPLE_PROMPTS is not None:
        raise ValueError(
            f"--SAMPLE_PROMPTS cannot be had with --UNET {numbers[0]}, which enlarges validation pictures: leave it out"
        )
    scale = args.SAMPLE_COND_SCALE if imagen.can_classifier_guidance else 1.0
    options: dict[str, Any] = {"unet_number": max(numbers), "cond_scale": scale, "ranks": ranks, "sampler": "ddim"}
    options["steps"] = args.SAMPLE_STEPS
    if not ranks.first:
        return partial(sample_grid, imagen, [""], **options)
    if args.SAMPLE_PROMPTS is not None:
        prompts = _read(Path(args.SAMPLE_PROMPTS))
        embeds, masks = t5_encode_text(prompts, args.T5_NAME, args.MAX_NUM_WORDS, device=imagen.device)
        return partial(sample_grid, imagen, prompts, text_embeds=embeds, text_masks=masks, **options)
    batch = MinimagenCollator("cpu")([valid_data[place] for place in range(min(VALIDATION_PICTURES, len(valid_data)))])
    if batch is None:
        raise ValueError("--SAMPLE_INTERVAL needs validation pictures, or --SAMPLE_PROMPTS: there are none")
    options |= {"text_embeds": batch["encoding"], "text_masks": batch["mask"]}
    if alone:
        options["start_images"] = batch["image"]
    return partial(sample_grid, imagen, [f"validation {place}" for place in range(len(batch["image"]))], **options)


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give --SAMPLE_PROMPTS a .txt file with one caption a line")
    prompts = lines_of(path)
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise ValueError(f"{path} must hold 1 to {MOST_PROMPTS} captions, it holds {len(prompts)}")
    return prompts
