"""``minimagen-fast train``: from command line arguments to a training directory, on one process or many."""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.data import IterableDataset, Subset

from .arguments import check_seed
from .captioned import CaptionedPictures
from .files import replace_file
from .generate import build_imagen, checked_params
from .helpers import device_of_rank
from .Imagen import Imagen
from .loading import ShardedLoader
from .optimizers import build_optimizer, learning_rate_factor, learning_rate_schedule
from .parallel import shard
from .progress import say
from .ranks import Ranks, as_lost, open_ranks
from .run_directory import (
    CONFIG,
    ENDED,
    Run,
    alone_in,
    describes_more,
    find_run,
    load_weights,
    remove_attempt,
    shell_word,
    tell,
)
from .sampled_prompts import sampled_prompts
from .snapshots import Snapshots
from .sources import open_data
from .stopping import STOPPED, StopRequest, stop_on_signals
from .streams import StreamedLoader
from .t5 import absolute_name
from .train_arguments import (
    asked_for,
    checkpoint_levels,
    learning_rates,
    take_over,
    tell_ignored,
    tell_unused,
    training_settings,
    unet_numbers,
    used_rates,
)
from .trainer import Trainer, TrainingDiverged
from .training import (
    create_directory,
    get_default_args,
    get_model_size,
    load_testing_parameters,
    save_training_info,
)
from .Unet import Base, BaseTest, Super, SuperTest, Unet
from .watching import Watch

COND_DROP_PROB = 0.15
# Exit statuses: the numbers of sysexits.h, besides STOPPED.
DIVERGED, RANK_LOST = 70, 76


def run_train(args: argparse.Namespace) -> int:
    """Train as the arguments say.

    Returns:
        The exit status: 0; 75 if it was asked to stop and can be continued; 70 if the training diverged. If another
        process was lost, it does not return but ends this one, with 76.

    Raises:
        ValueError, OSError, ImportError: if an argument or the data cannot be used.
        KeyboardInterrupt: after Ctrl-C; weights and state are saved by then, and it has been said where.
    """
    for name in ("RESTART_DIRECTORY", "PARAMETERS"):
        if getattr(args, name) == "":
            raise ValueError(f"--{name} must not be empty, as of a variable that is not set: name a path")
    if args.RESTART_DIRECTORY is not None and args.PARAMETERS is not None:
        raise ValueError("give either --RESTART_DIRECTORY or --PARAMETERS, not both")
    device = device_of_rank(args.DEVICE, os.environ.get("LOCAL_RANK", "0"))
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


def _train(args: argparse.Namespace, device: torch.device, ranks: Ranks, stop: StopRequest, held: ExitStack) -> int:
    if args.TESTING:
        given = asked_for(args)
        load_testing_parameters(args)
        if args.DATA == "built-in":
            args.T5_NAME = "t5_tiny"  # needs no files
        tell_ignored(args, given, "with --TESTING", ranks)
    run = find_run(args.OUT, args.RESTART_DIRECTORY, ranks)
    args.T5_NAME = absolute_name(args.T5_NAME)  # what is kept must be found from anywhere
    if run.restart is not None:
        args.RESTART_DIRECTORY = str(run.restart)
        take_over(args, args.RESTART_DIRECTORY, ranks)
    elif args.PARAMETERS is not None:
        take_over(args, args.PARAMETERS, ranks, justparams=True)

    train_data, valid_data = open_data(args)
    if device.type != "cuda":
        _encode_on_cpu(train_data, valid_data)
    # The same weights on every rank, whatever was drawn while the data was opened.
    torch.manual_seed(args.SEED)
    imagen, unets_params, imagen_params = _model(args)
    continues = run.has_checkpoint(ranks)
    if run.restart is not None and not continues:
        load_weights(imagen, run.restart, ranks)
    imagen.to(device)
    numbers = unet_numbers(args, len(imagen.unets), run, ranks)
    settings = training_settings(args, numbers)
    tell_unused(args, ranks)
    sharded = ranks.size > 1 and args.PARALLEL != "ddp"
    # What is not said here is left to the environment variable.
    asked: dict[str, Any] = (
        {} if args.CHECKPOINT_LEVELS is None else {"checkpoint_levels": checkpoint_levels(args.CHECKPOINT_LEVELS)}
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
    rates = learning_rates(args, numbers)
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
    held.enter_context(alone_in(run.directory, ranks))
    if run.restart is None and ranks.from_first(any(Snapshots(run.directory / "checkpoints", ranks).steps())):
        raise ValueError(f"another training has begun in {run.directory} meanwhile: give the command again to go on")
    if not run.in_place:
        if ranks.first:
            remove_attempt(run.directory)
        if ranks.from_first(describes_more(run.directory, len(imagen.unets))):
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
    used = used_rates(args, list(rates.values()), optimizer, ranks)
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
            f"\nSaved in {run.directory}. To go on: minimagen-fast train --RESTART_DIRECTORY"
            f" {shell_word(run.directory)} and the same other arguments"
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
        if why == "done" and len(numbers) < len(imagen.unets):
            say(
                "Done. To sample, put it together with the trainings of the other U-Nets: minimagen-fast export"
                f" {shell_word(run.directory)} DIR --OUT FOLDER"
            )
        elif why == "done":
            say(f'Done. Try: minimagen-fast sample -d {shell_word(run.directory)} -c "a caption"')
        else:
            say(f"Saved in {run.directory}. To go on: the same command with --OUT {shell_word(run.directory)}")
    return STOPPED if why == "stopped" else 0


def _introduce(
    imagen: Imagen, numbers: list[int], train_data: Any, device: torch.device, ranks: Ranks, run: Run
) -> None:
    sizes = " and ".join(f"{sum(p.numel() for p in imagen.unets[n - 1].parameters()):,}" for n in numbers)
    pixels = " and ".join(str(imagen.image_sizes[n - 1]) for n in numbers)
    pictures = "a stream of pictures" if isinstance(train_data, IterableDataset) else f"{len(train_data)} pictures"
    where = f"{device}" if ranks.size == 1 else f"{ranks.size} ranks ({device.type})"
    say(
        f"Training U-Nets of {sizes} parameters at {pixels} pixels on {pictures}, on {where}.\n"
        f"Training directory: {run.directory}"
    )


def _end_with(trainer: Trainer, scheduler: Any, args: argparse.Namespace, ranks: Ranks) -> None:
    """Has a cosine end with the training: how many steps that takes is known once the continued one is taken over."""
    total = trainer.total_steps
    scheduler.lr_lambdas = [learning_rate_factor("cosine", args.WARMUP_STEPS, total)] * len(scheduler.lr_lambdas)
    if total != trainer.total_steps_before:
        tell(ranks, f"the cosine schedule ends at step {total} now, before it was to at {trainer.total_steps_before}")


def _encode_on_cpu(*data: Any) -> None:
    # Of themselves they would take a CUDA device, which --DEVICE says not to use.
    for part in data:
        whole = part.dataset if isinstance(part, Subset) else part
        if isinstance(whole, CaptionedPictures):
            whole.encode_on("cpu")


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
