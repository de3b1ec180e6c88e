"""Where the weights of a cascade are, in training directories and in exported folders, and how they are read.

An exported folder holds ``unet_I.safetensors`` (I counts from 0) beside ``parameters/``; a training directory holds
``state_dicts/``, ``tmp/`` and ``checkpoints/``, any of which may be missing. See :mod:`.training` for these.
"""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from . import checkpoint
from .checkpoint_index import read_index
from .files import lines_of
from .ranks import Ranks
from .snapshots import MANIFEST, Saved, Snapshots

__all__ = ["EXPORTED", "KINDS", "TrainedFolder", "Weights", "fit", "is_newer"]

EXPORTED = "export.json"
KINDS = ("best", "latest", "ema")


@dataclass(frozen=True)
class Weights:
    """Weights of a U-Net that are there to be read.

    Attributes:
        number: Number of the U-Net, from 1.
        kind: ``best``, ``latest`` or ``ema``.
        path: The file, or the folder of the checkpoint.
        saved: The checkpoint, if it is one.
    """

    number: int
    kind: str
    path: Path
    saved: Saved | None = None

    def read(self) -> dict[str, Tensor]:
        """The state dict, on the CPU, to the bit as it was saved.

        Raises:
            ValueError: The file is damaged, or lacks what it should have.
        """
        if self.saved is not None:
            return _read_checkpoint(self.saved, self.number, averaged=self.kind == "ema")
        return _read_safetensors(self.path) if self.path.suffix == ".safetensors" else checkpoint.load(self.path)

    def load_into(self, unet: nn.Module) -> None:
        """Loads them into a U-Net, whose device and dtypes stay as they are.

        Raises:
            ValueError: They cannot be read, or belong to another U-Net.
        """
        fit(unet, self.read(), self.path)


def fit(unet: nn.Module, state: Mapping[str, Tensor], path: Path, *, assign: bool = False) -> None:
    """Loads a state dict that was read from `path`; with `assign` its tensors become those of the U-Net.

    Raises:
        ValueError: Names or shapes are those of another U-Net.
    """
    try:
        unet.load_state_dict(state, assign=assign)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the weights in {path} do not fit this {type(unet).__name__}: it must be built with the parameters that "
            f"they were trained with (the parameters folder of the same directory). {error}"
        ) from error


class TrainedFolder:
    """A training directory or an exported folder, and the weights in it.

    Args:
        directory: Its path.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # What is known of the training

    @property
    def saved(self) -> Saved | None:
        """The newest checkpoint that is whole; None if there is no checkpoint.

        Raises:
            ValueError: There are checkpoints, but none is whole.
        """
        if isinstance(self._newest, ValueError):
            raise self._newest
        return self._newest

    @cached_property
    def _newest(self) -> Saved | ValueError | None:
        # Kept either way: all of a checkpoint is read to find out.
        try:
            return Snapshots(self.directory / "checkpoints", Ranks()).newest()
        except ValueError as error:
            return error

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings that ``minimagen-fast train`` has written; empty where another program trained.

        Raises:
            ValueError: The file is not a JSON object.
        """
        return _read_object(self.directory / "config.json")

    @cached_property
    def exported(self) -> dict[int, dict[str, Any]]:
        """What an export has noted of each U-Net, by number; empty in a training directory.

        Raises:
            ValueError: The file is not what an export writes.
        """
        path = self.directory / EXPORTED
        noted = _read_object(path)
        for number, entry in noted.items():
            fine = isinstance(entry, dict) and entry.get("kind") in KINDS and isinstance(entry.get("training"), dict)
            if not number.isdecimal() or not fine:
                raise ValueError(f"{path} is not as it was exported, at {number!r}. Restore it, or delete it")
        return {int(number): entry for number, entry in noted.items()}

    @cached_property
    def arguments(self) -> dict[str, str]:
        """The arguments of the training by name, as text; empty where none are kept."""
        files = sorted((self.directory / "parameters").glob("training_*.txt"))
        pairs = [line.removeprefix("--").partition("=") for line in (lines_of(files[-1]) if files else [])]
        return {name: value for name, equals, value in pairs if equals}

    def trained(self, available: int) -> list[int]:
        """Numbers, from 1, of the U-Nets that were trained here, as far as the files tell.

        A training of one U-Net keeps the others too, as they began, in ``tmp/`` and in its checkpoints.

        Args:
            available: How many U-Nets the cascade has.
        """
        every = list(range(1, available + 1))
        # Nothing but a U-Net that was trained comes to be among the best.
        if best := [number for number in every if self.best_file(number) is not None]:
            return best
        if "unet_numbers" in self.config:
            numbers = self.config["unet_numbers"]
            return every if numbers is None else list(numbers)
        if self.saved is not None:
            return list(self.saved.values["unet_numbers"])
        return [number for number in every if self.latest_file(number).is_file()]

    # Weights

    def best_file(self, number: int) -> Path | None:
        """The exported weights, or the best of the training by name, that is by timestamp; None if there are none.

        Where no name is the documented one, the only ``unet_I_*.pt`` is taken.
        """
        exported = self.directory / f"unet_{number - 1}.safetensors"
        if exported.is_file():
            return exported
        folder = self.directory / "state_dicts"
        matching = _matching(folder, rf"unet_{number - 1}_.*\.pth")
        return matching[-1] if matching else _only_one(folder, number)

    def latest_file(self, number: int) -> Path:
        """Where the training keeps its latest weights, or the only other file of them there is."""
        folder = self.directory / "tmp"
        documented = folder / f"unet_{number - 1}_tmp.pth"
        return documented if documented.is_file() else _only_one(folder, number) or documented

    def weights(self, number: int, kind: str = "best") -> Weights:
        """The weights of a U-Net.

        Args:
            number: Number of the U-Net, from 1.
            kind: ``best``, or the latest where there are none; ``latest``: those in ``tmp/``, or in the newest
                checkpoint if that is newer and has trained this U-Net; ``ema``: the averages in the newest checkpoint.

        Raises:
            ValueError: There are no such weights.
        """
        assert kind in KINDS
        if kind == "ema":
            return self._averaged(number)
        best = self.best_file(number) if kind == "best" else None
        return self._latest(number) if best is None else Weights(number, "best", best)

    def _averaged(self, number: int) -> Weights:
        saved = self.saved
        if saved is None:
            raise ValueError(f"{self.directory} has no checkpoint, and averages are kept there: choose best or latest")
        if number not in saved.values["averages"]:
            raise ValueError(
                f"{saved.path} has no averages of U-Net {number}: it was trained without --EMA_DECAY, or elsewhere."
                " Choose best or latest"
            )
        return Weights(number, "ema", saved.path, saved)

    def _latest(self, number: int) -> Weights:
        file = self.latest_file(number)
        there = file.is_file()
        if there and self._only_others_trained(number):
            return Weights(number, "latest", file)
        try:
            saved = self.saved
        except ValueError as error:
            if not there:
                raise
            warnings.warn(f"{error}, or use {file}, as is done here", stacklevel=3)
            saved = None
        # A checkpoint has those that it did not train as they began; their files may be from elsewhere.
        if there and (saved is None or number not in saved.values["unet_numbers"] or is_newer(file, saved)):
            return Weights(number, "latest", file)
        if saved is None or number > saved.values["unets"]:
            if best := self.best_file(number):
                raise ValueError(
                    f"{self.directory} has no latest weights of U-Net {number}, neither tmp/{file.name} nor a"
                    f" checkpoint, but {best}, as an exported folder has: choose best"
                )
            raise ValueError(
                f"{self.directory} has no weights of U-Net {number}, neither state_dicts/unet_{number - 1}_state_"
                f"TIMESTAMP.pth nor tmp/{file.name} nor a checkpoint: train the model first"
            )
        return Weights(number, "latest", saved.path, saved)

    def _only_others_trained(self, number: int) -> bool:
        """Whether the best of others are there and of this one not, which then is the same in every file."""
        folder = self.directory / "state_dicts"
        return self.best_file(number) is None and bool(_matching(folder, r"unet_.*\.pth?"))


def is_newer(file: Path, saved: Saved) -> bool:
    """Whether a file was written after a checkpoint, or with it."""
    return file.stat().st_mtime_ns >= (saved.path / MANIFEST).stat().st_mtime_ns


def _matching(folder: Path, pattern: str) -> list[Path]:
    """The files in a folder, if it is there, whose whole names match, in the order of their names."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if re.fullmatch(pattern, path.name)]


def _only_one(folder: Path, number: int) -> Path | None:
    """Weights of a U-Net whose name is not the documented one, as minimagen takes them too."""
    others = _matching(folder, rf"unet_{number - 1}_.*\.pth?")
    return others[0] if len(others) == 1 else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Restore it, or delete it") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got a {type(values).__name__}. Restore it, or delete it")
    return values


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): it was cut short or damaged. Fetch or export it again"
        ) from error


def _read_checkpoint(saved: Saved, number: int, *, averaged: bool) -> dict[str, Tensor]:
    found = read_index(saved.path)
    prefix, average = f"unets.{number - 1}.", f"averages.{number}."
    own = [name.removeprefix(prefix) for name in found if name.startswith(prefix)]
    if not own:
        raise ValueError(f"{saved.path} has no weights of U-Net {number}: use another checkpoint")
    # Buffers have no averages.
    places = {name: average + name if averaged and average + name in found else prefix + name for name in own}
    state = {}
    for name, place in places.items():
        shape, dtype = found[place]
        state[name] = torch.empty(shape, dtype=dtype)
    try:
        saved.read_into({places[name]: value for name, value in state.items()}, Ranks())
    except (CheckpointException, RuntimeError, OSError) as error:
        raise ValueError(f"the checkpoint {saved.path} cannot be read ({error}): use another one") from error
    return {name: value.to(found[prefix + name][1]) for name, value in state.items()}
