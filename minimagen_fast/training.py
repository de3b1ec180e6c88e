"""Training: the command line arguments, the training directory, and the training loop.

A training directory holds

- ``parameters/``: ``imagen_params_TIMESTAMP.json``, ``unet_I_params_TIMESTAMP.json`` (I counts from 0) and
  ``training_parameters_TIMESTAMP.txt``;
- ``state_dicts/unet_I_state_TIMESTAMP.pth``: the weights with the lowest validation loss;
- ``tmp/unet_I_tmp.pth``: the latest weights;
- ``checkpoints/``: all that is needed to go on exactly there, see :mod:`.snapshots`;
- ``training_progess.txt``: the losses, and whatever happened.
"""

import inspect
import json
import os
import re
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .arguments import argument_of
from .data import ConceptualCaptions, MinimagenCollator, MinimagenDataset, get_minimagen_dl_opts
from .files import lines_of
from .given_loader import GivenLoader
from .Imagen import Imagen
from .settings import TrainingSettings
from .trainer import Trainer, TrainingStep
from .Unet import Unet

__all__ = [
    "ConceptualCaptions",
    "MinimagenCollator",
    "MinimagenDataset",
    "MinimagenTrain",
    "TrainingStep",
    "create_directory",
    "get_default_args",
    "get_minimagen_dl_opts",
    "get_minimagen_parser",
    "get_model_params",
    "get_model_size",
    "load_restart_training_parameters",
    "load_testing_parameters",
    "save_training_info",
]

SUBDIRECTORIES = ("parameters", "state_dicts", "tmp")
# Seconds beyond which a time limit is none; timers know no such times.
_FOREVER = 10**8
# What of an optimizer the training uses, besides its steps: checkpoints hold its state.
_OF_OPTIMIZERS = ("param_groups", "state_dict", "load_state_dict")
# Arguments of Imagen that minimagen 0.0.9 does not have. They are written only where they change something: so it can
# read the training directory too.
ADDED_DEFAULTS = (("lowres_max_noise_level", 1.0),)


def get_minimagen_parser() -> ArgumentParser:
    """The parser of the training arguments; each is an upper-case attribute of the namespace that it returns."""
    parser = ArgumentParser()

    def add(short: str, name: str, kind: type, default: Any, explanation: str) -> None:
        parser.add_argument(short, f"--{name}", dest=name, type=kind, default=default, help=explanation)

    add("-p", "PARAMETERS", str, None, "parameters folder that describes the Imagen to train")
    add("-n", "NUM_WORKERS", int, 0, "number of processes that load the data; 0 for the training process itself")
    add("-b", "BATCH_SIZE", int, 2, "number of images in a batch")
    add("-mw", "MAX_NUM_WORDS", int, 64, "number of tokens after which a caption is cut off")
    add("-s", "IMG_SIDE_LEN", int, 128, "side length in pixels of the square images that Imagen makes")
    add("-e", "EPOCHS", int, 5, "number of passes over the training data")
    add("-t5", "T5_NAME", str, "t5_base", "name of the T5 text encoder")
    add("-f", "TRAIN_VALID_FRAC", float, 0.9, "share of the data to train on; the rest is for validation")
    add("-t", "TIMESTEPS", int, 1000, "number of steps of the diffusion process, at least 20")
    add("-lr", "OPTIM_LR", float, 0.0001, "learning rate of the Adam optimizer")
    add("-ai", "ACCUM_ITER", int, 1, "number of batches whose gradients are averaged for one optimizer step")
    add("-cn", "CHCKPT_NUM", int, 500, "number of batches after which to save and validate")
    add("-vn", "VALID_NUM", int, None, "number of validation images; by default all that TRAIN_VALID_FRAC leaves")
    add("-rd", "RESTART_DIRECTORY", str, None, "training directory of the run to continue")
    parser.add_argument(
        "-test", "--TESTING", dest="TESTING", action="store_true", help="train on a small part of the data, as a test"
    )
    return parser


def _values(args: Namespace | dict[str, Any]) -> dict[str, Any]:
    """The arguments as a dictionary that is the namespace's own: what is changed in it changes `args`."""
    return args if isinstance(args, dict) else vars(args)


def MinimagenTrain(
    timestamp: str,
    args: Namespace | dict[str, Any],
    unets: Sequence[nn.Module],
    imagen: Imagen,
    train_dataloader: Iterable,
    valid_dataloader: Iterable | None,
    training_dir: Callable[..., AbstractContextManager],
    optimizer: torch.optim.Optimizer,
    timeout: float | None = 60,
    *,
    unet_numbers: Sequence[int] | None = None,
    lr_scheduler: Any = None,
    ema_decay: float | None = None,
    autocast_dtype: torch.dtype | None = None,
    max_grad_norm: float | None = 50.0,
    max_seconds: float | None = None,
    callback: Callable[[TrainingStep], None] | None = None,
    progress: bool = True,
) -> None:
    """Trains an Imagen, saving as it goes.

    Every batch trains one U-Net after the other. The optimizer steps once for every `ACCUM_ITER` batches, with the mean
    of their gradients; what is left at the end of an epoch makes a smaller group. Batches without images are passed
    over and counted.

    After every `CHCKPT_NUM` batches of an epoch, and at its end, the latest weights go to ``tmp/`` and the state of the
    training to ``checkpoints/``; the validation loss is computed (with the same timesteps and noise every time, and no
    text dropped), and a U-Net that has improved is saved to ``state_dicts/``; ``training_progess.txt`` is told.
    Whatever ends the training, Ctrl-C included, the weights and the state are saved before the exception goes on.

    With `RESTART_DIRECTORY` in `args` the training of that directory is continued where its state was saved: weights,
    optimizer and its learning rate, schedule, averages, best losses, epoch, place in the epoch's order, random numbers.
    Give everything else as in that training; `EPOCHS` counts the epochs of both. On the CPU, and wherever the
    operations are deterministic, the weights become those of a training that was never interrupted, to the bit.
    Without it the checkpoints of another training in the directory stay, and it is said that they do.

    Args:
        timestamp: Name of this run in the names of its files.
        args: What :func:`get_minimagen_parser` returns, as a namespace or a dictionary, or another object with these
            attributes. `EPOCHS`, `ACCUM_ITER`, `CHCKPT_NUM` and `RESTART_DIRECTORY` are used.
        unets: The U-Nets that `imagen` was made of.
        imagen: The Imagen to train, on the device to train on; batches are moved there.
        train_dataloader: Gives dictionaries of ``image``, float in [0, 1], shape (b, c, s, s); ``encoding``, float,
            shape (b, n, text_embed_dim); ``mask``, bool, shape (b, n), or None, see :meth:`.Imagen.Imagen.forward`; or
            None for a batch without images.
        valid_dataloader: Gives the same, for validation. If it is None or gives no image, ``state_dicts/`` gets the
            latest weights instead of the best.
        training_dir: What :func:`create_directory` returned.
        optimizer: Optimizer of ``imagen.parameters()``, or of part of them. Adam and AdamW are made to update all
            parameters in one launch, unless they were told how (``fused=False``), and a step does not wait for the
            device then; with other optimizers it does, see :class:`.settings.TrainingSettings`.
        timeout: Seconds after which the forward and backward pass of a batch is given up, with the gradients that wait
            for the next step; None or 0 for no limit. Works in the main thread, and not on Windows. Where the U-Nets'
            blocks are compiled, as they are on CUDA, the first batch of a shape takes as long as that takes.
        unet_numbers: Numbers, from 1, of the U-Nets to train. By default Imagen's `only_train_unet_number`, or those of
            `unets` whose parameters `optimizer` holds.
        lr_scheduler: Learning rate scheduler, stepped once after each optimizer step, without arguments: not
            ``ReduceLROnPlateau``.
        ema_decay: If given, an exponential moving average of the weights is kept (see :class:`.ema.EMA`), validated
            and saved to ``state_dicts/``, while ``tmp/`` has the weights themselves.
        autocast_dtype: If given, ``torch.bfloat16``: the forward pass runs under ``torch.autocast``.
        max_grad_norm: Gradients with a larger norm, taken over all trained U-Nets, are scaled down to it; None for no
            limit.
        max_seconds: Seconds after which the training ends in good order after the batch in hand.
        callback: Called after each batch with one :class:`TrainingStep` for each trained U-Net. It costs a
            synchronisation with the device per batch.
        progress: Whether to show a progress bar for each epoch, and messages.

    Raises:
        TypeError: `optimizer` is no optimizer.
        ValueError: An argument is out of range, does not fit the others, or the training in `RESTART_DIRECTORY`
            cannot be continued with them.
        TrainingDiverged: (of :mod:`.trainer`) At least ten optimizer steps in a row had gradients that are not finite.
        OSError: The training directory cannot be written, as when the disk is full; the checkpoints before are whole.
    """
    used = ("EPOCHS", "ACCUM_ITER", "CHCKPT_NUM", "RESTART_DIRECTORY")
    values = {name: argument_of(args, name, None) for name in used}
    restart = values["RESTART_DIRECTORY"]
    with training_dir() as entered:
        directory = Path.cwd() if entered is None else Path(entered)
    Trainer(
        _settings(
            values,
            imagen,
            optimizer,
            len(unets),
            unet_numbers,
            timeout,
            ema_decay,
            autocast_dtype,
            max_grad_norm,
            max_seconds,
        ),
        imagen,
        optimizer,
        GivenLoader(train_dataloader),
        None if valid_dataloader is None else GivenLoader(valid_dataloader),
        directory,
        timestamp=timestamp,
        lr_scheduler=lr_scheduler,
        restart_directory=None if restart is None else Path(restart),
        callback=callback,
        progress=progress,
    ).run()


def check_counts(values: Mapping[str, Any]) -> None:
    """Refuses documented arguments that count epochs or batches and are no such numbers, under their names.

    Raises:
        ValueError: One is no whole number, or too small.
    """
    for name, least in (("EPOCHS", 0), ("ACCUM_ITER", 1), ("CHCKPT_NUM", 1)):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _settings(
    values: dict[str, Any],
    imagen: Imagen,
    optimizer: torch.optim.Optimizer,
    given_unets: int,
    unet_numbers: Sequence[int] | None,
    timeout: float | None,
    ema_decay: float | None,
    autocast_dtype: torch.dtype | None,
    max_grad_norm: float | None,
    max_seconds: float | None,
) -> TrainingSettings:
    """The documented arguments as settings, checked under their documented names."""
    if missing := [name for name in ("EPOCHS", "ACCUM_ITER", "CHCKPT_NUM") if values.get(name) is None]:
        raise ValueError(f"args lacks {', '.join(missing)}: parse it with get_minimagen_parser()")
    check_counts(values)
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout must be a number of seconds, or 0 or None for no limit, got {timeout!r}")
    if autocast_dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast_dtype must be None or torch.bfloat16, got {autocast_dtype!r}: float16 needs loss scaling, "
            "which this loop does not do"
        )
    if lacks := [name for name in _OF_OPTIMIZERS if not hasattr(optimizer, name)]:
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}, which has no"
            f" {' and '.join(lacks)}: give the optimizer that it is made of, and what it does to the learning rate as"
            " lr_scheduler"
        )
    available = len(imagen.unets)
    if unet_numbers is None and given_unets > available:
        raise ValueError(f"unets has {given_unets} U-Nets, but imagen has {available}: pass those that it was made of")
    if unet_numbers is None and imagen.only_train_unet_number is None:
        unet_numbers = _default_numbers(imagen, optimizer, given_unets)
    return TrainingSettings(
        epochs=int(values["EPOCHS"]),
        accumulate=int(values["ACCUM_ITER"]),
        checkpoint_interval=int(values["CHCKPT_NUM"]),
        unet_numbers=unet_numbers,
        ema_decay=ema_decay,
        precision=None if autocast_dtype is None else "bfloat16",
        max_grad_norm=max_grad_norm,
        max_seconds=max_seconds,
        batch_seconds=None if timeout is None or timeout > _FOREVER else timeout,
    )


def _default_numbers(imagen: Imagen, optimizer: torch.optim.Optimizer, given_unets: int) -> list[int]:
    """Numbers of the U-Nets to train: of those given, the ones that the optimizer is of."""
    every = list(range(1, given_unets + 1))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # Parameters of no U-Net here are those of one that Imagen has replaced: that it would not learn is to be said.
    if not held <= {id(parameter) for parameter in imagen.parameters()}:
        return every
    return [n for n in every if any(id(parameter) in held for parameter in imagen.unets[n - 1].parameters())] or every


def load_restart_training_parameters(
    args: Namespace | dict[str, Any], justparams: bool = False
) -> Namespace | dict[str, Any]:
    """Takes over from an earlier training the arguments that must be the same when it goes on.

    These are `MAX_NUM_WORDS`, `IMG_SIDE_LEN`, `T5_NAME` and `TIMESTEPS`, and no others. Of several
    ``training_parameters`` files the last by name, that is by timestamp, counts.

    Args:
        args: Arguments from :func:`get_minimagen_parser`; they are changed in place.
        justparams: Whether to read the parameters folder `PARAMETERS` instead of the training directory
            `RESTART_DIRECTORY`.

    Returns:
        `args`.

    Raises:
        FileNotFoundError: The folder or the file is missing.
        ValueError: The directory is not given, the file is no text, or a value in it is not of its argument's type.
    """
    values = _values(args)
    source = "PARAMETERS" if justparams else "RESTART_DIRECTORY"
    directory = argument_of(args, source, None)
    if directory is None:
        raise ValueError(f"args.{source} must name the folder to read, got None")
    folder = Path(directory) if justparams else Path(directory) / "parameters"
    files = _newest_files(folder, r"(training_).*\.txt")
    if not files:
        raise FileNotFoundError(f"{folder} has no training_parameters_TIMESTAMP.txt: check {source}")
    [file] = files.values()
    kinds = {"MAX_NUM_WORDS": int, "IMG_SIDE_LEN": int, "T5_NAME": str, "TIMESTEPS": int}
    for line in lines_of(file):
        name, _, value = line.removeprefix("--").partition("=")
        if name in kinds:
            try:
                values[name] = None if value == "None" else kinds[name](value)
            except ValueError:
                raise ValueError(
                    f"{file}: {name} must be of type {kinds[name].__name__}, got {value!r}: correct the file"
                ) from None
    return args


def load_testing_parameters(args: Namespace | dict[str, Any]) -> Namespace | dict[str, Any]:
    """Sets the arguments to values that make a quick test of a training script.

    These are BATCH_SIZE = 2, MAX_NUM_WORDS = 32, IMG_SIDE_LEN = 128, EPOCHS = 2, T5_NAME = 't5_small',
    TRAIN_VALID_FRAC = 0.5, TIMESTEPS = 25 and OPTIM_LR = 0.0001.

    Args:
        args: Arguments from :func:`get_minimagen_parser`; they are changed in place.

    Returns:
        `args`.
    """
    _values(args).update(
        BATCH_SIZE=2,
        MAX_NUM_WORDS=32,
        IMG_SIDE_LEN=128,
        EPOCHS=2,
        T5_NAME="t5_small",
        TRAIN_VALID_FRAC=0.5,
        TIMESTEPS=25,
        OPTIM_LR=0.0001,
    )
    return args


def create_directory(dir_path: str | os.PathLike) -> Callable[..., AbstractContextManager[Path]]:
    """Makes a training directory with its folders ``parameters``, ``state_dicts`` and ``tmp``, where they are missing.

    Args:
        dir_path: Path of the directory. A relative one counts from the working directory of this call.

    Returns:
        A function of a path within the directory, by default the directory itself. It gives a context manager that
        makes that the working directory, and on leaving, also through an exception, goes back to the one before. Its
        value is the absolute path.
    """
    root = Path(dir_path).absolute()
    for name in SUBDIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def training_dir(subpath: str | os.PathLike = "") -> Iterator[Path]:
        before = os.getcwd()
        os.chdir(root / subpath)
        try:
            yield root / subpath
        finally:
            os.chdir(before)

    return training_dir


def get_model_size(imagen: nn.Module) -> float:
    """The size of a model's parameters and buffers in MB (2^20 bytes)."""
    tensors = (*imagen.parameters(), *imagen.buffers())
    return sum(tensor.nelement() * tensor.element_size() for tensor in tensors) / 2**20


def save_training_info(
    args: Namespace | dict[str, Any],
    timestamp: str,
    unets_params: Sequence[dict[str, Any]],
    imagen_params: dict[str, Any],
    model_size: float,
    training_dir: Callable[..., AbstractContextManager],
) -> None:
    """Writes the arguments and parameters of a training to its directory, and the model's size to its progress file.

    Args:
        args: Arguments from :func:`get_minimagen_parser`, as a namespace or a dictionary.
        timestamp: Name of the run in the names of the files.
        unets_params: The parameters of each U-Net, of values that JSON has (a tuple becomes a list).
        imagen_params: The parameters of the Imagen, likewise.
        model_size: Size of the model in MB, see :func:`get_model_size`.
        training_dir: What :func:`create_directory` returned.

    Raises:
        TypeError: A parameter is of a type that JSON does not have.
    """
    values = _values(args)
    files = {f"training_parameters_{timestamp}.txt": "".join(f"--{name}={value}\n" for name, value in values.items())}
    for index, parameters in enumerate(unets_params):
        files[f"unet_{index}_params_{timestamp}.json"] = _as_json(parameters, f"unets_params[{index}]")
    known = {name: value for name, value in imagen_params.items() if (name, value) not in ADDED_DEFAULTS}
    files[f"imagen_params_{timestamp}.json"] = _as_json(known, "imagen_params")

    with training_dir("parameters"):
        for name, text in files.items():
            Path(name).write_text(text, encoding="utf-8")
    with training_dir(), open("training_progess.txt", "a", encoding="utf-8") as file:
        if (restart := argument_of(args, "RESTART_DIRECTORY", None)) is not None:
            file.write(f"Continues the training in {restart}\n")
        file.write(f"Model size: {model_size:.3f} MB\n\n")


def _as_json(parameters: dict[str, Any], name: str) -> str:
    try:
        return json.dumps(parameters, indent=4, default=_plain)
    except TypeError as error:
        raise TypeError(f"{name} must hold only values that JSON has: {error}") from error


def _plain(value: Any) -> Any:
    """A number of numpy's as one of Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is of type {type(value).__name__}")


def _newest_files(folder: Path, pattern: str) -> dict[str, Path]:
    """The files in `folder` whose whole name matches `pattern`; of those that agree in its group, the last by name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: check the path")
    matches = [match for file in sorted(folder.iterdir()) if (match := re.fullmatch(pattern, file.name))]
    return {match[1]: folder / match[0] for match in matches}


def _only_files(folder: Path, pattern: str) -> dict[str, Path]:
    """As `_newest_files`, but only those files that no other agrees with."""
    matches = [match for file in folder.iterdir() if (match := re.fullmatch(pattern, file.name))]
    number = Counter(match[1] for match in matches)
    return {match[1]: folder / match[0] for match in matches if number[match[1]] == 1}


def get_model_params(parameters_dir: str | os.PathLike) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reads the parameters that :func:`save_training_info` wrote. Other files in the folder are let be.

    Args:
        parameters_dir: The ``parameters`` folder of a training directory. Of several files for the same U-Net the last
            by name, that is by timestamp, counts. Where none has the documented name, another ``unet_I_*.json`` or
            ``imagen*.json`` is taken if it is the only one.

    Returns:
        The parameters of each U-Net in their order, and those of the Imagen.

    Raises:
        FileNotFoundError: The folder, the Imagen's file, or that of a U-Net is missing.
        ValueError: A file is not valid JSON.
    """
    folder = Path(parameters_dir)
    imagen_files = _newest_files(folder, r"(imagen)_params.*\.json") or _only_files(folder, r"(imagen).*\.json")
    found = _newest_files(folder, r"unet_(\d+)_params.*\.json") or _only_files(folder, r"unet_(\d+)_.*\.json")
    unet_files = {int(number): file for number, file in found.items()}
    if not imagen_files or not unet_files:
        missing = "unet_0_params_TIMESTAMP.json" if imagen_files else "imagen_params_TIMESTAMP.json"
        raise FileNotFoundError(f"{folder} has no {missing}: it is not the parameters folder of a training directory")
    if gaps := set(range(max(unet_files))) - set(unet_files):
        raise FileNotFoundError(
            f"{folder} has no unet_{min(gaps)}_params_TIMESTAMP.json, but has {unet_files[max(unet_files)].name}:"
            " restore the file that is missing"
        )
    return [_read_json(unet_files[index]) for index in sorted(unet_files)], _read_json(imagen_files["imagen"])


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}. Restore it, or save the parameters again") from error


def get_default_args(object: Callable) -> dict[str, Any]:
    """The arguments of a class or function that have defaults, with these.

    Args:
        object: A class or function. For a subclass of :class:`.Unet.Unet` with an attribute ``defaults``, such as
            :class:`.Unet.Base`, these take the place of Unet's own.
    """
    if inspect.isclass(object) and issubclass(object, Unet) and hasattr(object, "defaults"):
        return {**get_default_args(Unet), **object.defaults}
    parameters = inspect.signature(object).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty
    }
