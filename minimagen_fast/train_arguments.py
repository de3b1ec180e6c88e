"""The arguments of ``minimagen-fast train``, and what they come to."""

import argparse
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch

from .arguments import finite_number
from .files import named_path
from .generate import checked_params
from .optimizers import SCHEDULES
from .parallel import CHOICES
from .ranks import DEFAULT_TIMEOUT, Ranks
from .run_directory import Run, read_config, tell
from .settings import TrainingSettings
from .sources import add_data_arguments
from .t5 import absolute_name, get_encoded_dim
from .training import check_counts, get_minimagen_parser, load_restart_training_parameters
from .weights_files import TrainedFolder


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
        type=named_path,
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


def asked_for(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line has of the documented arguments."""
    return {name: getattr(args, name) for name in sorted(args.given)}


def tell_ignored(args: argparse.Namespace, asked: dict[str, Any], where: str, ranks: Ranks) -> None:
    """Says what of the command line something else has overruled."""
    for name, value in asked.items():
        if getattr(args, name) != value:
            tell(ranks, f"--{name} {value} is ignored: {where} it is {getattr(args, name)}")


def tell_unused(args: argparse.Namespace, ranks: Ranks) -> None:
    """Says which flags do nothing beside the others, or without one that they go with."""
    if args.SAMPLE_PROMPTS is not None and args.SAMPLE_INTERVAL is None:
        tell(ranks, f"--SAMPLE_PROMPTS {args.SAMPLE_PROMPTS} is ignored: nothing is sampled without --SAMPLE_INTERVAL")
    if args.TOTAL_STEPS is not None and args.LR_SCHEDULE != "cosine":
        tell(ranks, f"--TOTAL_STEPS {args.TOTAL_STEPS} is ignored: it is of --LR_SCHEDULE cosine")


def take_over(args: argparse.Namespace, folder: str, ranks: Ranks, *, justparams: bool = False) -> None:
    """Takes over what is fixed by the folder, and says what of the command line does not count then."""
    asked = asked_for(args)
    load_restart_training_parameters(args, justparams)
    began = args.T5_NAME
    args.T5_NAME = absolute_name(began)
    if not justparams and _can_replace(asked.get("T5_NAME", began), began, Path(folder) / "parameters"):
        args.T5_NAME = asked["T5_NAME"]
        tell(ranks, f"--T5_NAME {args.T5_NAME} is used in the place of {began}, with which {folder} began")
    if justparams and "TIMESTEPS" in asked:
        args.TIMESTEPS = asked["TIMESTEPS"]
    tell_ignored(args, asked, f"in {folder}", ranks)
    if not justparams and args.PARAMETERS is not None:
        begun = TrainedFolder(Path(folder)).arguments.get("PARAMETERS")
        if begun != args.PARAMETERS:
            tell(ranks, f"--PARAMETERS {args.PARAMETERS} is ignored: {folder} goes on with the parameters it has")


def _can_replace(encoder: str, began: str, parameters: Path) -> bool:
    """Whether a text encoder is a folder, as one that has moved is, that gives what the U-Nets take."""
    if encoder == absolute_name(began) or not Path(encoder).is_dir():
        return False
    unets_params, imagen_params = checked_params(parameters)
    widths = [params.get("text_embed_dim") for params in (imagen_params, *unets_params)]
    return get_encoded_dim(encoder) in widths


def training_settings(args: argparse.Namespace, numbers: list[int]) -> TrainingSettings:
    """The settings of a training of the U-Nets of these numbers.

    Raises:
        ValueError, ImportError: they cannot be used.
    """
    check_counts(vars(args))
    for name in ("LOG_INTERVAL", "SAMPLE_STEPS"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.TOTAL_STEPS is not None and args.TOTAL_STEPS < 1:
        raise ValueError(f"TOTAL_STEPS must be at least 1, got {args.TOTAL_STEPS}")
    if args.PEAK_TFLOPS is not None and not 0 < args.PEAK_TFLOPS < math.inf:
        raise ValueError(f"PEAK_TFLOPS must be positive and finite, got {args.PEAK_TFLOPS}")
    finite_number("SAMPLE_COND_SCALE", args.SAMPLE_COND_SCALE)
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


def unet_numbers(args: argparse.Namespace, available: int, run: Run, ranks: Ranks) -> list[int]:
    """The numbers, from 1, of the U-Nets to train, out of so many."""
    if args.UNET is None and run.restart is not None:
        # Those that it trains: the default is another on another number of ranks.
        numbers = read_config(run.restart).get("unet_numbers")
        if (
            isinstance(numbers, list)
            and numbers
            and all(type(number) is int and 1 <= number <= available for number in numbers)
        ):
            return numbers
    default = "all" if ranks.size == 1 else "1"
    chosen = default if args.UNET is None else args.UNET
    if chosen == "all":
        return list(range(1, available + 1))
    if not chosen.isdecimal() or not 1 <= int(chosen) <= available:
        raise ValueError(f"--UNET must be a number from 1 to {available}, or all; got {chosen!r}")
    return [int(chosen)]


def checkpoint_levels(text: str) -> list[int]:
    """The levels that --CHECKPOINT_LEVELS names."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--CHECKPOINT_LEVELS must be numbers from 0 with commas between, got {text!r}")
    return [int(word) for word in words]


def learning_rates(args: argparse.Namespace, numbers: list[int]) -> dict[int, float]:
    """The learning rate of each U-Net, by its number."""
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


def used_rates(
    args: argparse.Namespace, asked: list[float], optimizer: torch.optim.Optimizer, ranks: Ranks
) -> list[float]:
    """The learning rates, which a continued training has from its checkpoint; says so where others are asked for."""
    used = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if used != asked and (args.UNET_LRS is not None or "OPTIM_LR" in args.given):
        name = "OPTIM_LR" if args.UNET_LRS is None else "UNET_LRS"
        tell(ranks, f"--{name} {getattr(args, name)} is ignored: the training goes on with {used}, as it began")
    decay = optimizer.param_groups[0]["weight_decay"]
    if decay != args.WEIGHT_DECAY:
        tell(ranks, f"--WEIGHT_DECAY {args.WEIGHT_DECAY} is ignored: the training goes on with {decay}, as it began")
    return used
