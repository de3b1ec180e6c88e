"""``minimagen-fast encode-captions``: every caption of a data set, encoded once and stored for training."""

import argparse
import os
import shlex
from collections.abc import Iterable
from itertools import chain
from typing import Any

from .caption_encoding import BATCH_SIZE, SHARD_SIZE, encode_captions
from .caption_format import DTYPES
from .data import MinimagenDataset, conceptual_rows
from .files import check_folder, named_path
from .helpers import device_of_rank
from .shapes import all_captions
from .sources import BUILT_IN, CONCEPTUAL, add_source_arguments, check_columns, open_captions
from .t5 import absolute_name
from .training import get_minimagen_parser


def add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command; those that a training has too are written as there."""
    documented = {action.dest: action for action in get_minimagen_parser()._actions}
    add = parser.add_argument
    add_source_arguments(parser)
    add("--OUT", required=True, type=named_path, help="folder for the encodings")
    for name in ("T5_NAME", "MAX_NUM_WORDS"):
        parser._add_action(documented[name])
    add("--DTYPE", choices=list(DTYPES), default="float16", help="what the encodings are rounded to (%(default)s)")
    add("-b", "--BATCH_SIZE", type=int, default=BATCH_SIZE, help="captions encoded at once (%(default)s)")
    add("--SHARD_SIZE", type=int, default=SHARD_SIZE, help="captions in a file (%(default)s)")
    add("--DEVICE", default=None, help="where to encode, such as cpu or cuda:1 (by default the rank's GPU, if any)")


def run_encode_captions(args: argparse.Namespace) -> int:
    """Encode the captions of a data set as the arguments say. Under torchrun every process does its share.

    Returns:
        The exit status, 0.

    Raises:
        ValueError, OSError, ImportError: if an argument, the data or the folder for the encodings cannot be used.
    """
    rank, world_size, local_rank = (
        _from_environment(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = device_of_rank(args.DEVICE, local_rank)
    check_folder("--OUT", args.OUT)
    args.T5_NAME = absolute_name(args.T5_NAME)  # as a training keeps it
    report = encode_captions(
        _captions(args),
        args.OUT,
        encoder=args.T5_NAME,
        max_length=args.MAX_NUM_WORDS,
        dtype=args.DTYPE,
        batch_size=args.BATCH_SIZE,
        shard_size=args.SHARD_SIZE,
        device=device,
        rank=rank,
        world_size=world_size,
        progress=rank == 0,
    )
    for shard in report.damaged:
        print(f"Made anew, since it was damaged: {shard}")
    who = f"Process {rank + 1} of {world_size}: " if world_size > 1 else ""
    rate = report.encoded / max(report.seconds, 1e-9)
    done = f"{report.encoded:,} captions encoded in {report.seconds:.1f} s"
    print(f"{who}{done} ({rate:,.0f}/s), on {device}." if report.encoded else f"{who}Nothing was left to encode.")
    if report.shards_left:
        print(f"{who}{report.shards_left} files are left to other processes; if none is running, run this again.")
        return 0
    each, padded = report.bytes / report.captions, report.padded_bytes / report.captions
    print(
        f"{args.OUT}: {report.captions:,} captions, {report.bytes / 1e6:,.2f} MB, {each:,.0f} bytes per caption;"
        f" padded to {args.MAX_NUM_WORDS} tokens in float32 it would be {padded:,.0f} ({padded / each:.1f} times as"
        f" much).\nTo train with them: minimagen-fast train {_training_words(args)}"
    )
    return 0


def _training_words(args: argparse.Namespace) -> str:
    """The arguments of a training with these captions, as a shell takes them."""
    words = ["--DATA", args.DATA, *(["--STREAMING"] if args.STREAMING else [])]
    for name in ("IMAGE_COLUMN", "CAPTION_COLUMN"):
        if getattr(args, name) is not None:
            words += [f"--{name}", getattr(args, name)]
    words += ["--CAPTIONS", str(args.OUT), "--T5_NAME", args.T5_NAME, "--MAX_NUM_WORDS", str(args.MAX_NUM_WORDS)]
    return shlex.join(words)


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(f"the environment variable {name} must be a whole number, as torchrun sets it, got {value!r}")
    return int(value)


def _captions(args: argparse.Namespace) -> Iterable[str]:
    check_columns(args)
    if args.DATA == BUILT_IN:
        return all_captions()
    if args.DATA == CONCEPTUAL:
        options: dict[str, Any] = dict(side_length=1, encoder_name=args.T5_NAME, max_length=args.MAX_NUM_WORDS)
        rows = conceptual_rows()
        parts = (MinimagenDataset(rows, train=train, **options) for train in (True, False))
        return chain.from_iterable(part.all_captions() for part in parts)
    return open_captions(args)
