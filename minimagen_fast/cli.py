"""The command line: ``minimagen-fast`` and ``python -m minimagen_fast``."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from . import __version__
from .files import lines_of, named_path
from .interrupts import uninterrupted

PROGRAM = "minimagen-fast"
# The status of a program that was stopped by Ctrl-C, of one whose reader has gone (as SIGPIPE's, which Python ignores),
# and of one that was called wrongly.
INTERRUPTED, UNREAD, MISUSED = 130, 141, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The words after the program's name; those of this process if not given.

    Returns:
        The exit status: 0, 2 after a user's error, 130 after Ctrl-C, 141 if nobody was left to read what it prints.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    # A letter of a path that the output's encoding lacks is written as its code, as on stderr: it would be an error,
    # after all that was asked for had been done.
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.closed and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(words)
    finally:
        # What cannot be written when Python ends would spoil the status. A full disk is to be seen in it, though, where
        # it has cost what was asked for.
        _is_lost(sys.stdout, BrokenPipeError)
        _is_lost(sys.stderr, OSError)


def _run(words: list[str]) -> int:
    try:
        # For train this imports torch, which takes seconds. Within them an interrupt may be lost in foreign code.
        with uninterrupted():
            parser = _parser(words[0] if words else None)
        args = parser.parse_args(words)
        return args.run(args)
    except KeyboardInterrupt:
        _tell("\nStopped.")
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError) as error:
        # With a line of its own, since where nothing is buffered (python -u) nothing is left to be written.
        if isinstance(error, BrokenPipeError) and _is_lost(sys.stdout, BrokenPipeError, "\n"):
            return UNREAD
        # Errors of this package are written for the user; a traceback would only hide them.
        _tell(f"{PROGRAM}: error: {error}")
        return MISUSED


def _tell(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr)


def _is_lost(stream: TextIO | None, error: type[OSError], text: str = "") -> bool:
    """Whether a stream cannot be written for this error, as when its reader has gone. Then nothing more goes there."""
    if stream is None or stream.closed:
        return False
    try:
        stream.write(text)
        stream.flush()
    except error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    except OSError:
        return False
    return False


def _import_torch() -> None:
    """Imports torch so that Ctrl-C meanwhile counts afterwards, and is not lost in foreign code."""
    with uninterrupted(), suppress(ImportError):
        import torch  # noqa: F401


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Train Imagen text-to-image models and sample from them."
    )
    parser.add_argument("--version", action="version", version=f"minimagen_fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_quickstart(commands)
    _add_train(commands, command == "train")
    _add_encode_captions(commands, command == "encode-captions")
    _add_sample(commands)
    _add_export(commands, command == "export")
    _add_report(commands, command == "report")
    _add_plan(commands, command == "plan")
    _add_bench(commands, command == "bench")
    doctor = commands.add_parser("doctor", help="say what is installed, what can be used, and why not")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_quickstart(commands) -> None:
    command = commands.add_parser(
        "quickstart",
        help="train a small cascade on pictures drawn on the spot, sample it, judge the result",
        description="Train a small cascade on pictures of shapes drawn on the spot, sample it, judge the result.",
    )
    command.add_argument(
        "--out", type=named_path, default=Path("quickstart"), help="folder for the results (%(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of weights, pictures and samples (%(default)s)")
    command.add_argument("--minutes", type=float, help="about how long it may take; more gives better pictures (4)")
    command.set_defaults(run=_quickstart)


def _quickstart(args: argparse.Namespace) -> int:
    _import_torch()
    from .arguments import check_seed
    from .quickstart import DEFAULT_MINUTES, run_quickstart

    check_seed(args.seed, "--seed")
    return run_quickstart(args.out, args.seed, DEFAULT_MINUTES if args.minutes is None else args.minutes)


def _add_train(commands, with_arguments: bool) -> None:
    command = commands.add_parser("train", help="train a cascade on captioned pictures")
    if with_arguments:  # they live with the training, and importing that takes seconds
        from .train_arguments import add_train_arguments

        add_train_arguments(command)
    command.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from .train_command import run_train

    return run_train(args)


def _add_encode_captions(commands, with_arguments: bool) -> None:
    command = commands.add_parser(
        "encode-captions",
        help="encode the captions of a data set once, so that training needs no T5",
        description="Encode every distinct caption of a data set once and keep the encodings, packed, for training.",
    )
    if with_arguments:
        from .encode_command import add_encode_arguments

        add_encode_arguments(command)
    command.set_defaults(run=_encode_captions)


def _encode_captions(args: argparse.Namespace) -> int:
    from .encode_command import run_encode_captions

    return run_encode_captions(args)


def _add_plan(commands, with_arguments: bool) -> None:
    command = commands.add_parser(
        "plan",
        help="say what a training on many GPUs would take: memory, exchange, time, data",
        description="What a training on many GPUs takes, from what is counted, measured and assumed.",
    )
    if with_arguments:
        from .plan_command import add_plan_arguments

        add_plan_arguments(command)
    command.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    from .plan_command import run_plan

    return run_plan(args)


def _add_sample(commands) -> None:
    command = commands.add_parser("sample", help="make pictures with a trained cascade")
    add = command.add_argument
    add(
        "-d", "--TRAINING_DIRECTORY", required=True, type=named_path, help="training directory to load the cascade from"
    )
    add("-c", "--CAPTIONS", required=True, help="a caption, or a .txt file with one caption a line")
    add("--cond-scale", type=float, default=1.0, help="guidance weight: more follows the text more (%(default)s)")
    add("--seed", type=int, help="the same seed makes the same pictures")
    add("--sampler", default="ddpm", help="ddpm, or ddim or dpmpp_2m, which need fewer steps (%(default)s)")
    add("--steps", type=int, help="number of steps of each U-Net (all of its timesteps)")
    add("--out", type=named_path, help="folder for the pictures (generated_images_ and the time)")
    add("--grid", action="store_true", help="also save all pictures in one, with their captions, as grid.png")
    add("--device", help="where to sample, such as cpu or cuda:1 (cuda if there is one)")
    command.set_defaults(run=_sample)


def _captions(words: str) -> list[str]:
    if not words.endswith(".txt"):
        return [words]
    path = Path(words)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a caption, or a .txt file with one caption a line")
    captions = lines_of(path)
    if not captions:
        raise ValueError(f"{path} holds no caption")
    return captions


def _sample(args: argparse.Namespace) -> int:
    _import_torch()
    from datetime import datetime

    from PIL import Image

    from .arguments import check_seed
    from .generate import sample_and_save
    from .pictures import captioned_grid

    check_seed(args.seed, "--seed")
    captions = _captions(args.CAPTIONS)
    if args.grid and args.out and (args.out / "grid.png").exists():
        raise FileExistsError(f"{args.out / 'grid.png'} is there already: name another --out, or delete it")
    out = args.out or Path(datetime.now().strftime("generated_images_%Y%m%d_%H%M%S"))
    sample_and_save(
        captions,
        training_directory=args.TRAINING_DIRECTORY,
        save_directory=out,
        sample_args={
            "cond_scale": args.cond_scale,
            "seed": args.seed,
            "sampler": args.sampler,
            "steps": args.steps,
        },
        device=args.device,
    )
    print(f"{len(captions)} pictures in {out / 'generated_images'}")
    if args.grid:
        images = [Image.open(out / "generated_images" / f"image_{index}.png") for index in range(len(captions))]
        captioned_grid(images, captions).save(out / "grid.png")
        for image in images:
            image.close()
        print(f"All in one: {out / 'grid.png'}")
    return 0


def _add_export(commands, with_arguments: bool) -> None:
    command = commands.add_parser(
        "export",
        help="put a trained cascade into a folder of its own, to hand on",
        description="Put a trained cascade, with a model card, into a folder of its own, as safetensors or .pth files.",
    )
    if with_arguments:
        from .export_command import add_export_arguments

        add_export_arguments(command)
    command.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from .export_command import run_export

    return run_export(args)


def _add_report(commands, with_arguments: bool) -> None:
    command = commands.add_parser(
        "report",
        help="write a page with plots of a training, ended or under way",
        description="Write a page about a training, ended or under way: losses, speed, memory, samples, settings.",
    )
    if with_arguments:
        from .training_report import add_report_arguments

        add_report_arguments(command)
    command.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from .training_report import run_training_report

    return run_training_report(args)


def _add_bench(commands, with_arguments: bool) -> None:
    command = commands.add_parser(
        "bench",
        help="run the benchmark suite, report, compare (in a checkout)",
        description="How fast every part is, against its peers and the limits of this machine.",
    )
    if with_arguments and _BENCHMARKS.is_file():
        _import_benchmarks().add_bench_arguments(command)
        return
    command.add_argument("words", nargs=argparse.REMAINDER, help="run, report, compare or readme: in a checkout only")
    command.set_defaults(run=_no_benchmarks)


# Beside the package in a checkout; a wheel has none.
_BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks" / "cli.py"


def _import_benchmarks():
    """The suite's command line, wherever the program was started."""
    import importlib
    import importlib.util

    if "benchmarks" not in sys.modules:
        # The root of the checkout does not become part of the path: `kernels` must not be found there a second time.
        spec = importlib.util.spec_from_file_location("benchmarks", _BENCHMARKS.with_name("__init__.py"))
        assert spec and spec.loader
        sys.modules["benchmarks"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return importlib.import_module("benchmarks.cli")


def _no_benchmarks(args: argparse.Namespace) -> int:
    raise FileNotFoundError(
        f"the benchmark suite is not installed with the package: there is no {_BENCHMARKS}. Clone the repository, run"
        " `pip install -e '.[bench]'` in it, and then this command"
    )


def _doctor(args: argparse.Namespace) -> int:
    _import_torch()
    from .doctor import diagnosis

    print(diagnosis())
    return 0
