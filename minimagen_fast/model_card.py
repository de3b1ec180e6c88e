"""The model card of an exported cascade: what it is, how it was trained, how to use it.

A ``README.md`` as the Hugging Face Hub shows it: a YAML header, then Markdown. Only what the files of a training say
gets in; no path of the machine that it ran on.
"""

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .Imagen import Imagen
from .snapshots import Saved
from .t5 import T5_VERSIONS
from .training import ADDED_DEFAULTS
from .weights_files import TrainedFolder

__all__ = ["KIND_WORDS", "ExportedUnet", "model_card", "training_facts"]

KIND_WORDS = {
    "best": "the best of the training",
    "latest": "the latest of the training",
    "ema": "the latest averages of the training",
}


@dataclass(frozen=True)
class ExportedUnet:
    """What has been written of a U-Net.

    Attributes:
        number: Its number, from 1.
        image_size: Side length of its images in pixels.
        timesteps: Number of diffusion steps.
        parameters: Number of its parameters.
        dtypes: Names of the dtypes of its tensors.
        kind: ``best``, ``latest`` or ``ema``.
        source: Where the weights were read.
        file: Where they are now, within the exported folder.
        bytes: Size of that file.
        sha256: Digest of that file, in hexadecimal.
        training: What is known of its training, by name, to be shown.
    """

    number: int
    image_size: int
    timesteps: int
    parameters: int
    dtypes: tuple[str, ...]
    kind: str
    source: Path
    file: str
    bytes: int
    sha256: str
    training: Mapping[str, str]


def training_facts(folder: TrainedFolder, number: int, available: int) -> dict[str, str]:
    """What a directory says of the training of one of its U-Nets, by name, to be shown.

    Args:
        folder: The directory.
        number: Number of the U-Net, from 1.
        available: How many U-Nets the cascade has.
    """
    try:
        saved = folder.saved
    except ValueError as error:
        warnings.warn(f"{error}. The model card does not say how far the training came", stacklevel=2)
        saved = None
    if saved is not None and number not in saved.values["unet_numbers"]:
        # The best of it are from another training, of which nothing is known here.
        elsewhere = folder.best_file(number) is not None
        return {} if elsewhere else {"optimizer steps": "none: this U-Net was not trained there"}
    facts = {**_reached(folder, saved, number), **_settings(folder, number, available)}
    return {name: str(value) for name, value in facts.items()}


def _reached(folder: TrainedFolder, saved: Saved | None, number: int) -> dict[str, Any]:
    """How far the training came."""
    if saved is None:
        logged = _logged_best(folder.directory / "training_progess.txt", number)
        return {} if logged is None else {"best validation loss": logged}
    loss = saved.values["best_losses"].get(number, math.inf)
    reached = {"optimizer steps": f"{saved.step:,}", "whole epochs": saved.values["position"]["epoch"]}
    return reached | ({"best validation loss": f"{loss:.4f}"} if math.isfinite(loss) else {})


def _logged_best(path: Path, number: int) -> str | None:
    """The last best validation loss in a progress file: there are trainings without checkpoints."""
    if not path.is_file():
        return None
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("Best validation loss:")]
    found = re.search(rf"U-Net {number}: (\d+\.\d+)", lines[-1]) if lines else None
    return found[1] if found else None


def _settings(folder: TrainedFolder, number: int, available: int) -> dict[str, Any]:
    """How the training was set up; entries that are not set are left out."""
    config, arguments = folder.config, folder.arguments
    if not config:
        documented = {
            "BATCH_SIZE": "batch size",
            "OPTIM_LR": "learning rate",
            "ACCUM_ITER": "batches per step",
            "MAX_NUM_WORDS": "longest caption in tokens",
        }
        return {words: arguments[name] for name, words in documented.items() if name in arguments}
    numbers = config.get("unet_numbers") or list(range(1, available + 1))
    rates = dict(zip(numbers, config.get("learning_rates", []), strict=False))
    values = {
        "batch size": config.get("batch_size"),
        "batches per step": config.get("accumulate"),
        "learning rate": rates.get(number),
        "largest gradient norm": config.get("max_grad_norm"),
        "decay of averaged weights": config.get("ema_decay"),
        "min-SNR gamma": config.get("min_snr_gamma"),
        "autocast": config.get("precision"),
        "seed": config.get("seed"),
        "processes": config.get("ranks"),
        "longest caption in tokens": arguments.get("MAX_NUM_WORDS"),
    }
    return {name: value for name, value in values.items() if value is not None}


HEADER = """\
---
library_name: minimagen_fast
pipeline_tag: text-to-image
tags:
- text-to-image
- imagen
- diffusion
- minimagen
# license: choose one, see https://huggingface.co/docs/hub/repositories-licenses
---
"""

USE = """\
## Use

```python
from minimagen_fast.generate import load_minimagen

imagen = load_minimagen(".")  # this folder
[image] = imagen.sample(texts=["a caption"], cond_scale={cond_scale}, return_pil_images=True)
image.save("image.png")
```

or `minimagen-fast sample -d . -c "a caption"`.
"""


def unknown_to_the_original(imagen_params: Mapping[str, Any]) -> list[str]:
    """What minimagen 0.0.9 cannot load of the parameters of an Imagen, in words."""
    reasons = [f"it has no `{name}`" for name, kept in ADDED_DEFAULTS if imagen_params.get(name, kept) != kept]
    if not isinstance(imagen_params.get("timesteps", 1000), int):
        reasons.append("it takes one number of `timesteps` for all U-Nets")
    if not isinstance(imagen_params["image_sizes"], list | tuple):
        reasons.append("it takes `image_sizes` as a list")
    encoder = imagen_params["text_encoder_name"]
    if encoder not in T5_VERSIONS:
        reasons.append(f"it has no text encoder `{_without_folders(encoder)}`")
    return reasons


def _without_folders(encoder: str) -> str:
    """The name of a text encoder; of one in a folder, which goes by its absolute path, that folder's name alone."""
    return os.path.basename(encoder) if os.path.isabs(encoder) else encoder


def model_card(
    name: str, imagen: Imagen, exported: Sequence[ExportedUnet], imagen_params: Mapping[str, Any], *, pth: bool
) -> str:
    """The text of the card.

    Args:
        name: Name of the cascade.
        imagen: The cascade; its weights are not looked at.
        exported: What has been written, in the order of the U-Nets.
        imagen_params: The parameters of `imagen` as they have been written.
        pth: Whether the folder has the layout of a training directory.
    """
    original = ""
    if pth:
        reasons = unknown_to_the_original(imagen_params)
        can = f"cannot load this folder ({'; '.join(reasons)}), though" if reasons else "loads this folder too:"
        original = f"minimagen 0.0.9 {can} it has the layout of a training directory.\n"
    sizes = ", then ".join(f"{unet.image_size}x{unet.image_size}" for unet in exported)
    stages = "One U-Net makes" if len(exported) == 1 else f"{len(exported)} U-Nets, one after the other, make"
    total = sum(unet.parameters for unet in exported)
    parts = [
        HEADER,
        f"# {name}\n",
        "A text-to-image diffusion model of the Imagen kind"
        " ([Saharia et al., 2022](https://arxiv.org/abs/2205.11487))."
        f" {stages} images of {sizes} pixels in {imagen.channels} channels; {total:,} parameters in all.\n",
        _table(
            ("U-Net", "images", "parameters", "dtype", "diffusion steps", "weights", "file"),
            [
                (
                    unet.number,
                    f"{unet.image_size}x{unet.image_size}",
                    f"{unet.parameters:,}",
                    ", ".join(unet.dtypes),
                    unet.timesteps,
                    KIND_WORDS[unet.kind],
                    f"`{unet.file}`",
                )
                for unet in exported
            ],
        ),
        f"Text encoder: `{_without_folders(imagen.text_encoder_name)}`, embeddings {imagen.text_embed_dim} wide. It is"
        " not part of this folder.\n",
        USE.format(cond_scale=3.0 if imagen.can_classifier_guidance else 1.0),
        original,
        "## Training\n",
        _training(exported),
        "Data, intended use and limits: to be said by those who publish the model.\n",
        "## Checksums\n",
        "```\n" + "".join(f"{unet.sha256}  {unet.file}\n" for unet in exported) + "```\n",
        "As `sha256sum --check` reads them.\n",
    ]
    return "\n".join(part for part in parts if part)


def _training(exported: Sequence[ExportedUnet]) -> str:
    names = list(dict.fromkeys(name for unet in exported for name in unet.training))
    if not names:
        return "Nothing is recorded.\n"
    rows = [(name, *(unet.training.get(name, "") for unet in exported)) for name in names]
    return _table(("", *(f"U-Net {unet.number}" for unet in exported)), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)
