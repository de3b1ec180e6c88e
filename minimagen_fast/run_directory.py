"""The directory in which a training runs: what it continues there, that it is alone, what an attempt has left."""

import errno
import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from .files import folder_fault
from .Imagen import Imagen
from .progress import say
from .ranks import Ranks
from .snapshots import Snapshots
from .weights_files import EXPORTED, TrainedFolder, is_newer

CONFIG, ENDED, LOCK = "config.json", "ended.json", ".lock"


@dataclass(frozen=True)
class Run:
    """Where a training is kept, and what it continues."""

    directory: Path
    timestamp: str
    restart: Path | None

    @property
    def in_place(self) -> bool:
        return self.restart == self.directory

    def has_checkpoint(self, ranks: Ranks) -> bool:
        """Whether what it continues has a checkpoint; all ranks must ask."""
        there = self.restart is not None and Snapshots(self.restart / "checkpoints", ranks).steps()
        return ranks.from_first(bool(there))


def find_run(out: Path | None, restart_directory: str | None, ranks: Ranks) -> Run:
    """Where a training with these of its arguments runs, and what it continues; all ranks must ask.

    Raises:
        ValueError: there is something in the directory that it would write over.
        NotADirectoryError: there can be no such directory.
    """
    now = ranks.from_first(datetime.now().strftime("%Y%m%d_%H%M%S"))
    restart = None if restart_directory is None else Path(restart_directory).absolute()
    if out is None:
        return Run(Path(f"training_{now}").absolute(), now, restart)
    directory = out.absolute()
    if (fault := ranks.from_first(folder_fault("--OUT", directory))) is not None:
        raise NotADirectoryError(fault)
    exported = [path.name for path in (directory / EXPORTED, *directory.glob("unet_*.safetensors")) if path.is_file()]
    if ranks.from_first(bool(exported)):
        raise ValueError(
            f"--OUT {directory} holds exported weights, which would be taken for those of the training: name another"
            f" folder. To train what it describes, add -p {shell_word(directory / 'parameters')}"
        )
    # Where no step was made, nothing is lost that the same command would not do again.
    if not ranks.from_first(any(Snapshots(directory / "checkpoints", ranks).steps())):
        if ranks.from_first(_has_weights_alone(directory)):
            raise ValueError(
                f"--OUT {directory} holds weights of a training but no checkpoint to go on from, and they would be"
                f" written over: name another folder. To start from them, add -rd {shell_word(directory)}"
            )
        return Run(directory, now, restart)
    if restart not in (None, directory):
        tell(ranks, f"--RESTART_DIRECTORY {restart} is ignored: {directory} holds a training, which goes on")
    return Run(directory, read_config(directory).get("timestamp", now), directory)


def _has_weights_alone(directory: Path) -> bool:
    """Whether weights are all that is left of a training, or all that minimagen has kept of it.

    A training that was killed before its first checkpoint was whole has weights, too, and the folder of checkpoints.
    """
    if not any((directory / "tmp").glob("unet_*")) and not any((directory / "state_dicts").glob("unet_*")):
        return False
    folder = directory / "checkpoints"
    return not folder.is_dir() or ((directory / ENDED).is_file() and not any(folder.glob("step_*")))


def read_config(directory: Path) -> dict[str, Any]:
    """What a training has kept of its settings, or nothing.

    Raises:
        ValueError: it cannot be read.
    """
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Delete it, or restore it") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got a {type(values).__name__}. Delete it, or restore it")
    return values


@contextmanager
def alone_in(directory: Path, ranks: Ranks) -> Iterator[None]:
    """Keeps other trainings out of a directory: they would remove each other's checkpoints.

    Raises:
        ValueError: another one is under way there.
    """
    with open(directory / LOCK, "a") if ranks.first else nullcontext() as file:
        if ranks.from_first(file is not None and not _locked(file)):
            raise ValueError(f"another training is under way in {directory}: wait for its end, or name another --OUT")
        if ranks.first:
            _remove_unfinished(directory)
        yield


def _remove_unfinished(directory: Path) -> None:
    """Removes what trainings that were killed have left of files that they were writing, which may be whole U-Nets."""
    for folder in (directory, directory / "checkpoints", directory / "state_dicts", directory / "tmp"):
        for path in folder.glob(".*.[0-9]*.part"):
            if path.is_file():  # folders are checkpoints, which are seen to when the next one is written
                path.unlink()


def _locked(file: IO) -> bool:
    """Locks a file until the end of the process; False if another one has. Systems without locks let everyone in."""
    if os.name == "nt":
        return True
    import fcntl

    try:
        # Not flock: loader processes, which may outlive a killed training by seconds, would hold that.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def load_weights(imagen: Imagen, directory: Path, ranks: Ranks) -> None:
    """Starts from the weights in a directory without checkpoints, such as minimagen's, as sampling takes them."""
    folder = TrainedFolder(directory)
    found = [folder.weights(number) for number in range(1, len(imagen.unets) + 1)]
    for unet, weights in zip(imagen.unets, found, strict=True):
        weights.load_into(unet)
    files = ", ".join(str(weights.path.relative_to(directory)) for weights in found)
    tell(
        ranks,
        f"{directory} has no checkpoint: the training starts with its weights ({files}), at epoch 1, with a new"
        " optimizer",
    )


def remove_attempt(directory: Path) -> None:
    """Removes what an attempt that made no step has left: with other U-Nets it would be read as if it were of these.

    If there is anything else's among it, all stays.
    """
    timestamp = read_config(directory).get("timestamp")
    snapshots = Snapshots(directory / "checkpoints", Ranks())
    try:
        saved = snapshots.newest()
    except ValueError:  # damaged
        return
    if not isinstance(timestamp, str) or saved is not None and saved.values.get("timestamp") != timestamp:
        return
    own = [] if saved is None else [directory / "tmp" / f"unet_{i}_tmp.pth" for i in range(saved.values["unets"])]
    there = [path for name in ("tmp", "state_dicts") for path in (directory / name).iterdir()]
    if not set(there) <= set(own):
        return
    # From the time before the checkpoint: later ones are of steps that were made, and lost as it was killed.
    if saved is not None and any(is_newer(path, saved) for path in there):
        return
    named = rf"(imagen_params|unet_\d+_params|training_parameters)_{re.escape(timestamp)}\.(json|txt)"
    for path in [*there, *(directory / "parameters").iterdir()]:
        if path in own or re.fullmatch(named, path.name):
            path.unlink()
    snapshots.remove_all()


def describes_more(directory: Path, unets: int) -> bool:
    """Whether a directory has parameters of U-Nets beyond the first so many, which would be read with these."""
    names = (path.name for path in (directory / "parameters").iterdir())
    return any(int(match[1]) >= unets for match in (re.match(r"unet_(\d+)_params", name) for name in names) if match)


def tell(ranks: Ranks, text: str) -> None:
    """Says something once, on the terminal of the first rank."""
    if ranks.first:
        say(f"minimagen-fast train: {text}", on_stderr=True)


def shell_word(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))
