"""``minimagen-fast train``: from command line arguments to a training directory, on one process or many."""

import argparse
import errno
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch.utils.data import IterableDataset

from .arguments import check_seed
from .files import replace_file
from .generate import build_imagen, checked_params
from .helpers import device_for_values
from .Imagen import Imagen
from .loading import ShardedLoader
from .optimizers import SCHEDULES, build_optimizer, learning_rate_factor, learning_rate_schedule
from .parallel import CHOICES, shard
from .progress import say
from .ranks import DEFAULT_TIMEOUT, Ranks, as_lost, open_ranks
from .sampled_prompts import sampled_prompts
from .settings import TrainingSettings
from .snapshots import Snapshots
from .sources import add_data_arguments, open_data
from .stopping import STOPPED, StopRequest, stop_on_signals
from .streams import StreamedLoader
from .t5 import absolute_name, get_encoded_dim
from .trainer import Trainer, TrainingDiverged
from .training import (
    check_counts,
    create_directory,
    get_default_args,
    get_minimagen_parser,
    get_model_size,
    load_restart_training_parameters,
    load_testing_parameters,
    save_training_info,
)
from .Unet import Base, BaseTest, Super, SuperTest, Unet
from .watching import Watch
from .weights_files import EXPORTED, TrainedFolder, is_newer

COND_DROP_PROB = 0.15
# Exit statuses: the numbers of sysexits.h, besides STOPPED.
DIVERGED, RANK_LOST = 70, 76
CONFIG, ENDED, LOCK = "config.json", "ended.json", ".lock"


class _Noted(argparse.Action):
    """Stores a value, and in `given` that the command line has it: no default is to be taken for a wish."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        namespace.given = {*namespace.given, self.dest}


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the documented arguments of a training, where the data is, and how to train at scale."""
    parser.set_defaults(given=frozenset())
    documented = get_minimagen_parser()
    for action in documented._actions:
        if action.nargs == 0:
            if action.dest != "help":
                parser._add_action(action)
            continue
        options = {name: getattr(action, name) for name in ("dest", "type", "default", "help")}
        parser.add_argument(*action.option_strings, action=_Noted, **options)
    add_data_arguments(parser)
    add = parser.add_argument_group("where").add_argument
    add("--DEVICE", help="where to train, such as cpu or cuda:1 (cuda if there is one; under torchrun each its own)")
    add(
        "--OUT",
        type=Path,
        help="training directory (training_ and the time). If it holds a training already, that is continued there:"
        " the same command starts and continues",
    )
    add("--PARALLEL", choices=CHOICES, default="ddp", help="with several ranks: replicate or shard (%(default)s)")
    add("--RANK_TIMEOUT", type=float, default=DEFAULT_TIMEOUT, help="seconds to wait for a rank (%(default)s)")
    add = parser.add_argument_group("what to train, and how").add_argument
    add("--UNET", default=None, help="number of the one U-Net to train, or all (all; on several ranks 1)")
    add("--SEED", type=int, default=0, help="seed of weights, order and noise (%(default)s)")
    add("--PRECISION", choices=("bfloat16",), help="run the forward pass in it (on CUDA it is, where it is fast)")
    add("--CHECKPOINT_LEVELS", help="levels of the U-Nets to compute twice to save memory, such as 0,1")
    add("--UNET_LRS", help="learning rates of the U-Nets, such as 1e-4,2e-4, instead of OPTIM_LR")
    add("--LR_SCHEDULE", choices=SCHEDULES, default="constant", help="of the learning rate (%(default)s)")
    add("--WARMUP_STEPS", type=int, default=0, help="optimizer steps until the learning rate is reached (%(default)s)")
    add("--TOTAL_STEPS", type=int, help="optimizer steps of a cosine schedule (those of all epochs)")
    add("--WEIGHT_DECAY", type=float, default=0.0, help="of AdamW; Adam without (%(default)s)")
    add("--MAX_GRAD_NORM", type=float, default=50.0, help="larger gradients are scaled down to it (%(default)s)")
    add("--EMA_DECAY", type=float, help="keep, validate and save averaged weights, such as 0.9999")
    add("--MIN_SNR_GAMMA", type=float, help="weigh timesteps by min(SNR, gamma) / SNR, such as 5")
    add(
        "--MAX_BAD_STEPS",
        type=int,
        default=10,
        help="give up after so many steps in a row without finite gradients (%(default)s)",
    )
    add = parser.add_argument_group("watching").add_argument
    add("--LOG_INTERVAL", type=int, default=10, help="optimizer steps from line to line of log.jsonl (%(default)s)")
    add("--TENSORBOARD", action="store_true", help="write for TensorBoard too")
    add("--PEAK_TFLOPS", type=float, help="what one device can do at most, for the share of it that is reached")
    add("--SAMPLE_INTERVAL", type=int, help="optimizer steps from one grid of sampled pictures to the next")
    add("--SAMPLE_PROMPTS", help="captions to sample: a .txt file with one a line; else the validation pictures'")
    add("--SAMPLE_STEPS", type=int, default=50, help="steps of each U-Net, with DDIM (%(default)s)")
    add("--SAMPLE_COND_SCALE", type=float, default=3.0, help="guidance weight (%(default)s)")
    add = parser.add_argument_group("checkpoints").add_argument
    add("--KEEP_LAST", type=int, default=2, help="how many checkpoints to keep (%(default)s)")
    add("--KEEP_EVERY", type=int, help="also keep those at multiples of so many optimizer steps")
    add("--MAX_SECONDS", type=float, help="end in good order after so many seconds")


def run_train(args: argparse.Namespace) -> int:
    """Train as the arguments say.

    Returns:
        The exit status: 0; 75 if it was asked to stop and can be continued; 70 if the training diverged. If another
        process was lost, it does not return but ends this one, with 76.

    Raises:
        ValueError, OSError, ImportError: if an argument or the data cannot be used.
        KeyboardInterrupt: after Ctrl-C; weights and state are saved by then, and it has been said where.
    """
    if args.RESTART_DIRECTORY is not None and args.PARAMETERS is not None:
        raise ValueError("give either --RESTART_DIRECTORY or --PARAMETERS, not both")
    name = args.DEVICE or ("cuda:" + os.environ.get("LOCAL_RANK", "0") if torch.cuda.is_available() else "cpu")
    device = device_for_values(name, "--DEVICE")
    check_seed(args.SEED, "--SEED")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        with open_ranks(device, args.RANK_TIMEOUT) as ranks, _stop_requests(ranks) as stop, ExitStack() as held:
            return _train(args, device, ranks, stop, held)
    except TrainingDiverged as error:
        print(f"minimagen-fast train: {error}", file=sys.stderr)
        return DIVERGED
    except RuntimeError as error:
        lost = as_lost(error)
        if lost is None:
            raise
        print(
            f"minimagen-fast train: rank {os.environ.get('RANK')}: {lost}. The last checkpoint is whole: start all"
            " processes again with the same command and --OUT",
            file=sys.stderr,
        )
        _leave(RANK_LOST)


def _leave(status: int) -> NoReturn:
    """Ends the process at once; an ordinary end would wait for the thread that writes a checkpoint with the others."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


@contextmanager
def _stop_requests(ranks: Ranks) -> Iterator[StopRequest]:
    # On one process Ctrl-C is Python's: it ends a slow batch too.
    with stop_on_signals(interrupt=ranks.size > 1) as stop:
        yield stop


@dataclass(frozen=True)
class _Run:
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


def _find_run(args: argparse.Namespace, ranks: Ranks) -> _Run:
    now = ranks.from_first(datetime.now().strftime("%Y%m%d_%H%M%S"))
    restart = None if args.RESTART_DIRECTORY is None else Path(args.RESTART_DIRECTORY).absolute()
    if args.OUT is None:
        return _Run(Path(f"training_{now}").absolute(), now, restart)
    directory = args.OUT.absolute()
    exported = [path.name for path in (directory / EXPORTED, *directory.glob("unet_*.safetensors")) if path.is_file()]
    if ranks.from_first(bool(exported)):
        raise ValueError(
            f"--OUT {directory} holds exported weights, which would be taken for those of the training: name another"
            f" folder. To train what it describes, add -p {_word(directory / 'parameters')}"
        )
    # Where no step was made, nothing is lost that the same command would not do again.
    if not ranks.from_first(any(Snapshots(directory / "checkpoints", ranks).steps())):
        if ranks.from_first(_has_weights_alone(directory)):
            raise ValueError(
                f"--OUT {directory} holds weights of a training but no checkpoint to go on from, and they would be"
                f" written over: name another folder. To start from them, add -rd {_word(directory)}"
            )
        return _Run(directory, now, restart)
    if restart not in (None, directory):
        _tell(ranks, f"--RESTART_DIRECTORY {restart} is ignored: {directory} holds a training, which goes on")
    return _Run(directory, _read_config(directory).get("timestamp", now), directory)


def _has_weights_alone(directory: Path) -> bool:
    """Whether weights are all that is left of a training, or all that minimagen has kept of it.

    A training that was killed before its first checkpoint was whole has weights, too, and the folder of checkpoints.
    """
    if not any((directory / "tmp").glob("unet_*")) and not any((directory / "state_dicts").glob("unet_*")):
        return False
    folder = directory / "checkpoints"
    return not folder.is_dir() or ((directory / ENDED).is_file() and not any(folder.glob("step_*")))


def _tell(ranks: Ranks, text: str) -> None:
    if ranks.first:
        say(f"minimagen-fast train: {text}", on_stderr=True)


def _word(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Delete it, or restore it") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got a {type(values).__name__}. Delete it, or restore it")
    return values


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line has of the documented arguments."""
    return {name: getattr(args, name) for name in sorted(args.given)}


def _tell_ignored(args: argparse.Namespace, asked: dict[str, Any], where: str, ranks: Ranks) -> None:
    for name, value in asked.items():
        if getattr(args, name) != value:
            _tell(ranks, f"--{name} {value} is ignored: {where} it is {getattr(args, name)}")


def _tell_unused(args: argparse.Namespace, ranks: Ranks) -> None:
    """Says which flags do nothing beside the others, or without one that they go with."""
    if args.SAMPLE_PROMPTS is not None and args.SAMPLE_INTERVAL is None:
        _tell(ranks, f"--SAMPLE_PROMPTS {args.SAMPLE_PROMPTS} is ignored: nothing is sampled without --SAMPLE_INTERVAL")
    if args.TOTAL_STEPS is not None and args.LR_SCHEDULE != "cosine":
        _tell(ranks, f"--TOTAL_STEPS {args.TOTAL_STEPS} is ignored: it is of --LR_SCHEDULE cosine")


def _take_over(args: argparse.Namespace, folder: str, ranks: Ranks, *, justparams: bool = False) -> None:
    """Takes over what is fixed by the folder, and says what of the command line does not count then."""
    asked = _asked(args)
    load_restart_training_parameters(args, justparams)
    began = args.T5_NAME
    args.T5_NAME = absolute_name(began)
    if not justparams and _can_replace(asked.get("T5_NAME", began), began, Path(folder) / "parameters"):
        args.T5_NAME = asked["T5_NAME"]
        _tell(ranks, f"--T5_NAME {args.T5_NAME} is used in the place of {began}, with which {folder} began")
    if justparams and "TIMESTEPS" in asked:
        args.TIMESTEPS = asked["TIMESTEPS"]
    _tell_ignored(args, asked, f"in {folder}", ranks)
    if not justparams and args.PARAMETERS is not None:
        begun = TrainedFolder(Path(folder)).arguments.get("PARAMETERS")
        if begun != args.PARAMETERS:
            _tell(ranks, f"--PARAMETERS {args.PARAMETERS} is ignored: {folder} goes on with the parameters it has")


def _can_replace(encoder: str, began: str, parameters: Path) -> bool:
    """Whether a text encoder is a folder, as one that has moved is, that gives what the U-Nets take."""
    if encoder == absolute_name(began) or not Path(encoder).is_dir():
        return False
    unets_params, imagen_params = checked_params(parameters)
    widths = [params.get("text_embed_dim") for params in (imagen_params, *unets_params)]
    return get_encoded_dim(encoder) in widths


@contextmanager
def _alone_in(directory: Path, ranks: Ranks) -> Iterator[None]:
    """Keeps other trainings out of a directory: they would remove each other's checkpoints.

    Raises:
        ValueError: another one is under way there.
    """
    with open(directory / LOCK, "a") if ranks.first else nullcontext() as file:
        if ranks.from_first(file is not None and not _locked(file)):
            raise ValueError(f"another training is under way in {directory}: wait for its end, or name another --OUT")
        yield


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


def _train(args: argparse.Namespace, device: torch.device, ranks: Ranks, stop: StopRequest, held: ExitStack) -> int:
    if args.TESTING:
        given = _asked(args)
        load_testing_parameters(args)
        if args.DATA == "built-in":
            args.T5_NAME = "t5_tiny"  # needs no files
        _tell_ignored(args, given, "with --TESTING", ranks)
    run = _find_run(args, ranks)
    args.T5_NAME = absolute_name(args.T5_NAME)  # what is kept must be found from anywhere
    if run.restart is not None:
        args.RESTART_DIRECTORY = str(run.restart)
        _take_over(args, args.RESTART_DIRECTORY, ranks)
    elif args.PARAMETERS is not None:
        _take_over(args, args.PARAMETERS, ranks, justparams=True)

    train_data, valid_data = open_data(args)
    # The same weights on every rank, whatever was drawn while the data was opened.
    torch.manual_seed(args.SEED)
    imagen, unets_params, imagen_params = _model(args)
    continues = run.has_checkpoint(ranks)
    if run.restart is not None and not continues:
        _load_weights(imagen, run.restart, ranks)
    imagen.to(device)
    numbers = _unet_numbers(args, len(imagen.unets), run, ranks)
    settings = _settings(args, numbers)
    _tell_unused(args, ranks)
    sharded = ranks.size > 1 and args.PARALLEL != "ddp"
    # What is not said here is left to the environment variable.
    asked: dict[str, Any] = (
        {} if args.CHECKPOINT_LEVELS is None else {"checkpoint_levels": _levels(args.CHECKPOINT_LEVELS)}
    )
    levels = imagen.accelerate(**asked).acceleration.checkpoint_levels
    train_loader, valid_loader = _loaders(args, train_data, valid_data, device, ranks)
    sample = None
    if args.SAMPLE_INTERVAL is not None:
        if sharded:
            raise ValueError(f"--SAMPLE_INTERVAL cannot be had with --PARALLEL {args.PARALLEL}: sample its checkpoints")
        sample = sampled_prompts(args, imagen, numbers, valid_data, ranks)
    if sharded:
        _shard(imagen, numbers, ranks, args)
    rates = _learning_rates(args, numbers)
    optimizer = build_optimizer(imagen, rates, args.WEIGHT_DECAY)
    batches = train_loader.batches_in_epoch
    steps = None if batches is None else math.ceil(batches / args.ACCUM_ITER) * args.EPOCHS
    scheduler = learning_rate_schedule(
        optimizer, args.LR_SCHEDULE, args.WARMUP_STEPS, steps if args.TOTAL_STEPS is None else args.TOTAL_STEPS
    )

    if ranks.first:
        create_directory(run.directory)
        # Before the first weights: those of a training that is killed then are not taken for all that is left of one.
        (run.directory / "checkpoints").mkdir(exist_ok=True)
    ranks.wait()
    held.enter_context(_alone_in(run.directory, ranks))
    if run.restart is None and ranks.from_first(any(Snapshots(run.directory / "checkpoints", ranks).steps())):
        raise ValueError(f"another training has begun in {run.directory} meanwhile: give the command again to go on")
    if not run.in_place:
        if ranks.first:
            _remove_attempt(run.directory)
        if ranks.from_first(_describes_more(run.directory, len(imagen.unets))):
            raise ValueError(
                f"{run.directory / 'parameters'} is of more U-Nets than these {len(imagen.unets)}, and there is no"
                " checkpoint to go on from: name another folder, or delete this one"
            )
    watch = Watch(
        run.directory,
        imagen,
        numbers,
        ranks,
        log_interval=args.LOG_INTERVAL,
        steps=steps,
        tensorboard=args.TENSORBOARD,
        precision_peak_flops=None if args.PEAK_TFLOPS is None else args.PEAK_TFLOPS * 1e12,
    )
    held.callback(watch.close)  # also where the training cannot be continued
    trainer = Trainer(
        settings,
        imagen,
        optimizer,
        train_loader,
        valid_loader,
        run.directory,
        timestamp=run.timestamp,
        ranks=ranks,
        lr_scheduler=scheduler,
        restart_directory=run.restart if continues else None,
        stop=stop,
        watch=watch,
        sample=sample,
    )
    if args.LR_SCHEDULE == "cosine" and args.TOTAL_STEPS is None:
        _end_with(trainer, scheduler, args, ranks)
    used = _used_rates(args, list(rates.values()), optimizer, ranks)
    # Not before it is sure that the training can go on with these.
    if ranks.first:
        (run.directory / ENDED).unlink(missing_ok=True)
        if not run.in_place:
            arguments = {name: value for name, value in vars(args).items() if name not in ("run", "given")}
            size, training_dir = get_model_size(imagen), create_directory(run.directory)
            save_training_info(arguments, run.timestamp, unets_params, imagen_params, size, training_dir)
        settings.save(
            run.directory / CONFIG,
            timestamp=run.timestamp,
            unets=unets_params,
            imagen=imagen_params,
            batch_size=args.BATCH_SIZE,
            ranks=ranks.size,
            parallel=args.PARALLEL,
            checkpoint_levels=levels,
            learning_rates=used,
            unet_number=numbers[0] if len(numbers) == 1 else None,
        )
        _introduce(imagen, numbers, train_data, device, ranks, run)
    try:
        why = trainer.run()
    except KeyboardInterrupt:
        say(
            f"\nSaved in {run.directory}. To go on: minimagen-fast train --RESTART_DIRECTORY {_word(run.directory)}"
            " and the same other arguments"
        )
        raise
    if why == "done" and args.EPOCHS and trainer.steps_made <= 0:
        raise ValueError(
            f"no step could be made in {args.EPOCHS} epochs, so nothing was learned: use a smaller BATCH_SIZE if there"
            " are fewer pictures, or check the data, of which"
            f" {run.directory / 'training_progess.txt'} says what was skipped"
        )
    if ranks.first:
        ended = {"why": why, "step": trainer.position.step, "epoch": trainer.position.epoch}
        replace_file(run.directory / ENDED, (json.dumps(ended) + "\n").encode())
        if why == "done":
            say(f'Done. Try: minimagen-fast sample -d {_word(run.directory)} -c "a caption"')
        else:
            say(f"Saved in {run.directory}. To go on: the same command with --OUT {_word(run.directory)}")
    return STOPPED if why == "stopped" else 0


def _load_weights(imagen: Imagen, directory: Path, ranks: Ranks) -> None:
    """Starts from the weights in a directory without checkpoints, such as minimagen's, as sampling takes them."""
    folder = TrainedFolder(directory)
    found = [folder.weights(number) for number in range(1, len(imagen.unets) + 1)]
    for unet, weights in zip(imagen.unets, found, strict=True):
        weights.load_into(unet)
    files = ", ".join(str(weights.path.relative_to(directory)) for weights in found)
    _tell(
        ranks,
        f"{directory} has no checkpoint: the training starts with its weights ({files}), at epoch 1, with a new"
        " optimizer",
    )


def _remove_attempt(directory: Path) -> None:
    """Removes what an attempt that made no step has left: with other U-Nets it would be read as if it were of these.

    If there is anything else's among it, all stays.
    """
    timestamp = _read_config(directory).get("timestamp")
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


def _describes_more(directory: Path, unets: int) -> bool:
    """Whether a directory has parameters of U-Nets beyond the first so many, which would be read with these."""
    names = (path.name for path in (directory / "parameters").iterdir())
    return any(int(match[1]) >= unets for match in (re.match(r"unet_(\d+)_params", name) for name in names) if match)


def _introduce(
    imagen: Imagen, numbers: list[int], train_data: Any, device: torch.device, ranks: Ranks, run: _Run
) -> None:
    sizes = " and ".join(f"{sum(p.numel() for p in imagen.unets[n - 1].parameters()):,}" for n in numbers)
    pixels = " and ".join(str(imagen.image_sizes[n - 1]) for n in numbers)
    pictures = "a stream of pictures" if isinstance(train_data, IterableDataset) else f"{len(train_data)} pictures"
    where = f"{device}" if ranks.size == 1 else f"{ranks.size} ranks ({device.type})"
    say(
        f"Training U-Nets of {sizes} parameters at {pixels} pixels on {pictures}, on {where}.\n"
        f"Training directory: {run.directory}"
    )


def _settings(args: argparse.Namespace, numbers: list[int]) -> TrainingSettings:
    check_counts(vars(args))
    for name in ("LOG_INTERVAL", "SAMPLE_STEPS"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.TOTAL_STEPS is not None and args.TOTAL_STEPS < 1:
        raise ValueError(f"TOTAL_STEPS must be at least 1, got {args.TOTAL_STEPS}")
    if args.PEAK_TFLOPS is not None and not 0 < args.PEAK_TFLOPS < math.inf:
        raise ValueError(f"PEAK_TFLOPS must be positive and finite, got {args.PEAK_TFLOPS}")
    if not math.isfinite(args.SAMPLE_COND_SCALE):
        raise ValueError(f"SAMPLE_COND_SCALE must be a finite number, got {args.SAMPLE_COND_SCALE}")
    if args.TENSORBOARD and importlib.util.find_spec("tensorboard") is None:
        raise ImportError("--TENSORBOARD needs the package tensorboard: pip install 'minimagen_fast[tensorboard]'")
    return TrainingSettings(
        epochs=args.EPOCHS,
        accumulate=args.ACCUM_ITER,
        checkpoint_interval=args.CHCKPT_NUM,
        unet_numbers=tuple(numbers),
        seed=args.SEED,
        max_grad_norm=args.MAX_GRAD_NORM,
        ema_decay=args.EMA_DECAY,
        precision=args.PRECISION,
        min_snr_gamma=args.MIN_SNR_GAMMA,
        max_seconds=args.MAX_SECONDS,
        max_bad_steps=args.MAX_BAD_STEPS,
        keep_last=args.KEEP_LAST,
        keep_every=args.KEEP_EVERY,
        sample_interval=args.SAMPLE_INTERVAL,
    )


def _unet_numbers(args: argparse.Namespace, available: int, run: _Run, ranks: Ranks) -> list[int]:
    if args.UNET is None and run.restart is not None:
        # Those that it trains: the default is another on another number of ranks.
        numbers = _read_config(run.restart).get("unet_numbers")
        if (
            isinstance(numbers, list)
            and numbers
            and all(type(number) is int and 1 <= number <= available for number in numbers)
        ):
            return numbers
    chosen = args.UNET or ("all" if ranks.size == 1 else "1")
    if chosen == "all":
        return list(range(1, available + 1))
    if not chosen.isdecimal() or not 1 <= int(chosen) <= available:
        raise ValueError(f"--UNET must be a number from 1 to {available}, or all; got {chosen!r}")
    return [int(chosen)]


def _levels(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--CHECKPOINT_LEVELS must be numbers from 0 with commas between, got {text!r}")
    return [int(word) for word in words]


def _learning_rates(args: argparse.Namespace, numbers: list[int]) -> dict[int, float]:
    if args.UNET_LRS is None:
        return dict.fromkeys(numbers, args.OPTIM_LR)
    try:
        rates = [float(word) for word in args.UNET_LRS.split(",")]
    except ValueError:
        rates = []
    if len(rates) != len(numbers):
        raise ValueError(
            f"--UNET_LRS must be {len(numbers)} numbers with commas between, one for each U-Net that is trained; got"
            f" {args.UNET_LRS!r}"
        )
    return dict(zip(numbers, rates, strict=True))


def _used_rates(
    args: argparse.Namespace, asked: list[float], optimizer: torch.optim.Optimizer, ranks: Ranks
) -> list[float]:
    """The learning rates, which a continued training has from its checkpoint; says so where others are asked for."""
    used = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if used != asked and (args.UNET_LRS is not None or "OPTIM_LR" in args.given):
        name = "OPTIM_LR" if args.UNET_LRS is None else "UNET_LRS"
        _tell(ranks, f"--{name} {getattr(args, name)} is ignored: the training goes on with {used}, as it began")
    decay = optimizer.param_groups[0]["weight_decay"]
    if decay != args.WEIGHT_DECAY:
        _tell(ranks, f"--WEIGHT_DECAY {args.WEIGHT_DECAY} is ignored: the training goes on with {decay}, as it began")
    return used


def _end_with(trainer: Trainer, scheduler: Any, args: argparse.Namespace, ranks: Ranks) -> None:
    """Has a cosine end with the training: how many steps that takes is known once the continued one is taken over."""
    total = trainer.total_steps
    scheduler.lr_lambdas = [learning_rate_factor("cosine", args.WARMUP_STEPS, total)] * len(scheduler.lr_lambdas)
    if total != trainer.total_steps_before:
        _tell(ranks, f"the cosine schedule ends at step {total} now, before it was to at {trainer.total_steps_before}")


def _loaders(
    args: argparse.Namespace, train_data: Any, valid_data: Any, device: torch.device, ranks: Ranks
) -> tuple[Any, ShardedLoader]:
    options = {
        "seed": args.SEED,
        "rank": ranks.rank,
        "ranks": ranks.size,
        "num_workers": args.NUM_WORKERS,
        "pin_memory": device.type == "cuda",
        "max_bad_fraction": args.MAX_BAD_FRACTION,
    }
    kind = StreamedLoader if isinstance(train_data, IterableDataset) else ShardedLoader
    # The last, smaller batch counts too where there is nothing to be compared between batches.
    valid = ShardedLoader(valid_data, args.BATCH_SIZE, shuffle=False, drop_last=False, **options)
    return kind(train_data, args.BATCH_SIZE, **options), valid


def _shard(imagen: Imagen, numbers: list[int], ranks: Ranks, args: argparse.Namespace) -> None:
    # What autocast would make of the weights of a block is gathered so at once: half the bytes.
    half = "bfloat16" in (args.PRECISION, imagen.acceleration.precision)
    for number in numbers:
        shard(imagen._get_unet(number), ranks, imagen.device, args.PARALLEL, torch.bfloat16 if half else None)


def _model(args: argparse.Namespace) -> tuple[Imagen, list[dict[str, Any]], dict[str, Any]]:
    """The cascade, and the full parameters of its U-Nets and itself as a training directory keeps them."""
    described_in = None
    if args.RESTART_DIRECTORY is not None:
        described_in = Path(args.RESTART_DIRECTORY) / "parameters"
    elif args.PARAMETERS is not None:
        described_in = Path(args.PARAMETERS)
    if described_in is not None:
        unets_params, imagen_params = checked_params(described_in)
    else:
        classes = (BaseTest, SuperTest) if args.TESTING else (Base, Super)
        unets_params = [get_default_args(unet_class) for unet_class in classes]
        imagen_params = dict(image_sizes=(args.IMG_SIDE_LEN // 2, args.IMG_SIDE_LEN), cond_drop_prob=COND_DROP_PROB)
    if args.RESTART_DIRECTORY is None or Path(args.T5_NAME).is_dir():
        imagen_params = {**imagen_params, "text_encoder_name": args.T5_NAME}
    if args.RESTART_DIRECTORY is None:
        # What is described may have other timesteps for each U-Net; the command line has the last word.
        if args.PARAMETERS is None or "timesteps" not in imagen_params or "TIMESTEPS" in args.given:
            imagen_params["timesteps"] = args.TIMESTEPS
    unets_params = [
        {**get_default_args(Unet), **params, "lowres_cond": place > 0} for place, params in enumerate(unets_params)
    ]
    imagen_params = {**get_default_args(Imagen), **imagen_params}
    imagen = build_imagen(unets_params, imagen_params, described_in=described_in)
    # As they were fitted to their places: whoever loads them makes them once.
    for params, unet in zip(unets_params, imagen.unets, strict=True):
        params |= {name: getattr(unet, name) for name in ("text_embed_dim", "channels", "channels_out")}
    return imagen, unets_params, imagen_params
