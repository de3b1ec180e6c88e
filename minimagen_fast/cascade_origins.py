"""A cascade out of the directories in which its U-Nets were trained: one description, one origin for each U-Net."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .generate import load_params, text_width
from .Imagen import Imagen
from .training import get_default_args
from .Unet import Unet
from .weights_files import TrainedFolder

__all__ = ["description", "open_folders", "origins_of"]

# Imagen gives these to each U-Net for its place in the cascade.
FITTED = ("lowres_cond", "text_embed_dim", "channels", "channels_out")
# Differs between trainings of one cascade by its purpose.
PER_TRAINING = "only_train_unet_number"


def open_folders(directories: Sequence[Path]) -> dict[Path, TrainedFolder]:
    """The directories by resolved path: one that is named twice counts once."""
    if not directories:
        raise ValueError("directories must name at least one training directory, got none")
    return {_real(directory): TrainedFolder(Path(directory)) for directory in directories}


def _real(directory: Path) -> Path:
    # Of links that lead in a circle resolve() makes a RuntimeError; they are no folder, which is said where it is read.
    return Path(os.path.realpath(directory))


def description(folders: Sequence[TrainedFolder]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The parameters of the cascade, on which all directories agree."""
    first, *others = folders
    unets_params, imagen_params = load_params(first.directory)
    imagen_params = dict(imagen_params)
    here = _comparable(first, unets_params, imagen_params)
    for other in others:
        other_unets, other_imagen = load_params(other.directory)
        there = _comparable(other, other_unets, other_imagen)
        if different := [name for name in {**here, **there} if here.get(name) != there.get(name)]:
            details = "; ".join(f"{name} is {here.get(name)} and {there.get(name)}" for name in different)
            raise ValueError(
                f"{first.directory} and {other.directory} describe different cascades in their parameters: {details}."
                " Export trainings of the same cascade"
            )
        if imagen_params.get(PER_TRAINING) != other_imagen.get(PER_TRAINING):
            imagen_params[PER_TRAINING] = None
    return unets_params, imagen_params


def _comparable(
    folder: TrainedFolder, unets_params: Sequence[dict[str, Any]], imagen_params: dict[str, Any]
) -> dict[str, Any]:
    """All that a description says, by name, as if it had named every default."""
    imagen = {**get_default_args(Imagen), **imagen_params}
    imagen["text_embed_dim"] = text_width(imagen, folder.directory / "parameters")
    values: dict[str, Any] = {"the number of U-Nets": len(unets_params)}
    values |= {f"imagen_params: {name}": value for name, value in imagen.items() if name != PER_TRAINING}
    for index, params in enumerate(unets_params):
        full = {**get_default_args(Unet), **params}
        values |= {f"unet_{index}_params: {name}": value for name, value in full.items() if name not in FITTED}
    # JSON has no tuples: a default and what was read must be comparable.
    return json.loads(json.dumps(values))


def origins_of(
    folders: Mapping[Path, TrainedFolder], chosen: Mapping[int, Path], available: int
) -> dict[int, TrainedFolder]:
    """Which directory each U-Net comes from, by number."""
    if beyond := [number for number in chosen if not 1 <= number <= available]:
        raise ValueError(f"--UNET {beyond[0]}=... must name a U-Net from 1 to {available}, as the cascade has")
    origins: dict[int, TrainedFolder] = {}
    trained = {path: folder.trained(available) for path, folder in folders.items()}
    for number in range(1, available + 1):
        if number in chosen:
            origins[number] = folders[_real(chosen[number])]
            continue
        candidates = [folder for path, folder in folders.items() if number in trained[path]]
        if not candidates:
            names = ", ".join(str(folder.directory) for folder in folders.values())
            raise ValueError(
                f"U-Net {number} of {available} was not trained in {names}, or never had a finite validation loss: name"
                f" the directory where it was trained, too (or --UNET {number}=DIR, to take what DIR has all the same)"
            )
        if len(candidates) > 1:
            names = " and in ".join(str(folder.directory) for folder in candidates)
            raise ValueError(f"U-Net {number} was trained in {names}: choose with --UNET {number}=DIR")
        origins[number] = candidates[0]
    return origins
