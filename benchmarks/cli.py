"""``minimagen-fast bench``: measure, report, compare, and keep the README up to date.

The benchmarks are in a checkout only, so the package's command line looks for them and hands over.
"""

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from .compare import DEFAULT_THRESHOLD, NotComparable, check_comparable, compare, comparison_text
from .machine import ROOT
from .profiles import PROFILES
from .reading import read
from .results import FOLDER

REGRESSED, REFUSED = 1, 2
# Of pytest: tests failed; here cases whose parity failed, or that ended in an error.
SOME_FAILED = 1
NO_MATPLOTLIB = "the pictures need matplotlib: pip install 'minimagen_fast[bench]'"


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the commands ``run``, ``report``, ``compare`` and ``readme``.

    What each sets as ``run`` takes the parsed arguments and returns the exit status.
    """
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_report(commands)
    _add_compare(commands)
    readme = commands.add_parser(
        "readme",
        help="rewrite the performance section of README.md",
        description="Rewrite the performance section of README.md from the newest complete result of every device"
        " among those that git knows of.",
    )
    readme.set_defaults(run=_readme)


def _add_run(commands) -> None:
    command = commands.add_parser(
        "run", help="measure", description="Measure, and write a result file, case by case. Ctrl-C keeps what is there."
    )
    command.add_argument("--profile", choices=[*PROFILES], help="how much (gpu with a CUDA device, else cpu)")
    command.add_argument(
        "--results", type=Path, metavar="DIR", help="folder for the result file (benchmarks/results/DEVICE)"
    )
    command.add_argument("-k", metavar="WORDS", help="only cases whose ids fit, as pytest's -k; the result is partial")
    command.set_defaults(run=_run)


def _add_report(commands) -> None:
    command = commands.add_parser(
        "report", help="a result file as Markdown and pictures", description="Write report.md and PNG pictures."
    )
    command.add_argument("file", type=Path, help="a result file")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (beside the file, of its name)")
    command.set_defaults(run=_report)


def _add_compare(commands) -> None:
    command = commands.add_parser(
        "compare",
        help="what moved from one run to another",
        description="Show what moved beyond the noise from run A to run B: by more than the threshold, and quartiles"
        " that do not overlap. Exit status 1 if B is slower, takes more memory or fails somewhere, 2 if the two cannot"
        " be compared.",
    )
    command.add_argument("a", type=Path, metavar="A", help="the earlier result file")
    command.add_argument("b", type=Path, metavar="B", help="the later one")
    command.add_argument(
        "--threshold",
        type=_share,
        default=DEFAULT_THRESHOLD,
        metavar="PERCENT",
        help=f"least change that counts, such as 10%% ({DEFAULT_THRESHOLD * 100:g}%%)",
    )
    command.add_argument("--force", action="store_true", help="compare also other devices, threads or profiles")
    command.set_defaults(run=_compare)


def _share(text: str) -> float:
    """``5%`` as 0.05."""
    # Without the sign 0.05 could be either.
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not per cent; write it with the sign, such as 5% or 2.5%")
    return float(found[1]) / 100


def _run(args: argparse.Namespace) -> int:
    for module, package in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"measuring needs {package}, which is not installed: pip install 'minimagen_fast[bench]'")
    words = [sys.executable, "-m", "pytest", "benchmarks"]
    if args.profile:
        words += ["--profile", args.profile]
    if args.results:
        if args.results.exists() and not args.results.is_dir():
            raise ValueError(f"--results {args.results} is a file: name a folder")
        # pytest works at the root of the checkout.
        words += ["--results", str(args.results.resolve())]
    if args.k:
        words += ["-k", args.k]
    started = time.time()
    with subprocess.Popen(words, cwd=ROOT) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # pytest was interrupted, too, and still finishes its file.
            process.wait()
            _say_what_next(args.results or FOLDER, started)
            raise
    if status == SOME_FAILED:
        print("Some cases failed: the result file says which, and why.", file=sys.stderr)
    _say_what_next(args.results or FOLDER, started)
    return status


def _say_what_next(folder: Path, started: float) -> None:
    """Name the result file, which pytest does far above, and how to go on."""
    for file in folder.rglob("*.json"):
        if file.stat().st_mtime >= started:
            print(f"\nResult: {file}\nReport it: minimagen-fast bench report {shlex.quote(str(file))}")


def _report(args: argparse.Namespace) -> int:
    from .report import write_report

    run = read(args.file)
    folder = args.out or args.file.parent / run.stem
    if folder.is_file():
        raise ValueError(f"the report cannot be written to {folder}, which is a file: name a folder with --out")
    try:
        report = write_report(run, folder)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError(NO_MATPLOTLIB) from error
    print(report)
    return 0


def _compare(args: argparse.Namespace) -> int:
    first, second = read(args.a), read(args.b)
    if not args.force:
        try:
            check_comparable(first, second)
        except NotComparable as error:
            print(error, file=sys.stderr)
            return REFUSED
    found = compare(first, second, args.threshold)
    if not found.timed:
        print(f"{args.a} and {args.b} cannot be compared: no case was timed in both", file=sys.stderr)
        return REFUSED
    print(comparison_text(first, second, found, args.threshold))
    return REGRESSED if found.regressed else 0


def _readme(args: argparse.Namespace) -> int:
    from .readme import update_readme

    readme, changed = update_readme()
    print(f"{readme}: {'rewritten' if changed else 'as it was'}")
    return 0
