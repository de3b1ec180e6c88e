"""The ahead-of-time table: every kernel as machine code for three generations of cards, without a card.

``python -m benchmarks.aot`` compiles a representative part of the launches that the U-Nets Base, Super, BaseTest and
SuperTest can make, and of attention with other head widths, and prints what became of each configuration as a Markdown
table; ``--all`` compiles all of them, ``--changed`` all of the kernels that changed, or are launched in other ways,
since the kept table was made, of which the rest is taken; with either ``--write`` keeps the table in
benchmarks/results/aot.md. It is not written while a kernel has complaints: what one need not meet stands in
:mod:`.aot_code`, with its reason. Nor is it where a row is worse than the kept one, unless ``--worse`` takes that in.
After a change of how kernels are launched ``--search`` looks for sizes of images that ``ALL_SIZES`` then lacks.

tests/test_aot.py holds the representative part to :func:`.aot_code.complaints`, and to the kept table, and knows by the
kernels' :func:`.fingerprints.fingerprint` and by the :func:`.fingerprints.digests` of what is launched whether all were
compiled since they were changed last. With ``TRITON_CACHE_DIR`` set to a folder, an
interrupted run goes on where it was.

:mod:`.aot_builds` enumerates what there is to compile, :mod:`.aot_code` compiles and judges it, :mod:`.aot_table`
writes and reads the table.
"""

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import triton

from minimagen_fast.kernels import launch

from .aot_builds import Build, Key, Kind, enumerate_builds, representatives
from .aot_code import Row, compile_builds, complaints, regressions
from .aot_table import overview, parse, parse_overview, table, worst
from .fingerprints import digests, fingerprint

TABLE = Path(__file__).parent / "results" / "aot.md"


def _versions() -> str:
    return f"triton {triton.__version__}"


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if there are complaints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="all configurations: an hour or so on two cores")
    parser.add_argument(
        "--changed",
        action="store_true",
        help="all configurations of kernels that changed, or are launched otherwise, since the kept table was made",
    )
    parser.add_argument("--write", action="store_true", help=f"keep the tables in benchmarks/results/{TABLE.name}")
    parser.add_argument(
        "--worse", action="store_true", help="with --write: also where rows are worse than the kept ones"
    )
    parser.add_argument(
        "--search", type=float, metavar="MINUTES", help="compile nothing: look for sizes that launch something else"
    )
    options = parser.parse_args(arguments)
    if options.write and not (options.all or options.changed):
        parser.error("the table is of all configurations: --write needs --all, or --changed")
    if options.changed and _versions() not in TABLE.read_text():
        parser.error(f"the kept table is not of {_versions()}, and none of it can be taken: use --all")
    if launch.INTERPRETED:
        parser.error("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    if options.search is not None:
        return _search(options.search)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        if options.changed:
            return _run_changed(options.write, options.worse)
        return _run(options.all, options.write, options.worse)


def _run(everything: bool, write: bool, worse: bool) -> int:
    builds = enumerate_builds(ALL_SIZES)
    chosen = representatives(enumerate_builds(SOME_SIZES))
    recorded = TABLE.read_text() if TABLE.exists() else ""
    # Another compiler makes other code: then there is nothing to compare with.
    comparable = _versions() in recorded
    before = parse(recorded) if comparable else {}
    expected = chosen if comparable and not write else []
    rows, wrong = _compiled(builds, list(builds) if everything else chosen, before, expected, worse)
    launched = digests(builds)
    text = overview(worst(rows.values()), launched)
    if comparable and not write:
        for kernel, target in sorted(_stale(launched, recorded)):
            wrong = True
            print(f"{kernel} on {target}: code or launches are not those of the table: {_REMEDY}", file=sys.stderr)
    return _finish(text, [rows[build] for build in chosen], len(rows), write, wrong)


def _stale(launched: dict[Kind, str], text: str) -> set[Kind]:
    """The kernels and targets of which a table has other code or other configurations, or that only one of both has."""
    codes = {kernel: fingerprint(kernel) for kernel in {kernel for kernel, _ in launched}}
    now = {kind: (codes[kind[0]], digest) for kind, digest in launched.items()}
    then = {kind: (line["fingerprint"], line["launches"]) for kind, line in parse_overview(text).items()}
    return {kind for kind in now.keys() | then.keys() if now.get(kind) != then.get(kind)}


def _run_changed(write: bool, worse: bool) -> int:
    """The kept table, with new rows for the kernels that are not the ones it was made of, or launched in other ways."""
    text, builds = TABLE.read_text(), enumerate_builds(ALL_SIZES)
    chosen = representatives(enumerate_builds(SOME_SIZES))
    kinds = {build: (build.key[0], build.key[2]) for build in builds}
    recorded, launched = parse(text), digests(builds)
    # Other sizes than those of the table may be chosen.
    stale = _stale(launched, text) | {kinds[build] for build in chosen if build.key not in recorded}
    rows, wrong = _compiled(builds, [build for build in builds if kinds[build] in stale], recorded, [], worse)
    lines = parse_overview(text) | worst(rows.values())
    details = [rows[build] if build in rows else recorded[build.key] for build in chosen]
    return _finish(overview({kind: lines[kind] for kind in launched}, launched), details, len(builds), write, wrong)


def _compiled(
    builds: dict[Build, bool], wanted: list[Build], before: dict[Key, Row], expected: list[Build], worse: bool
) -> tuple[dict[Build, Row], bool]:
    """The rows of the wanted builds, and whether something is wrong with one, which is said.

    It is also wrong if one is worse than its row ``before``, unless that is wanted, or if an expected one had none.
    """
    print(f"{len(wanted)} of {len(builds)} configurations", file=sys.stderr)
    rows, wrong, steps_back = {}, False, False
    for build, row in zip(wanted, compile_builds(wanted), strict=True):
        rows[build] = row
        found = complaints(row, wide=builds[build])
        back = regressions(row, before) if build.key in before or build in expected else []
        wrong, steps_back = wrong or bool(found), steps_back or bool(back)
        for complaint in [*found, *back]:
            print(f"{row.kernel} ({row.config}) on {row.target} {complaint}", file=sys.stderr)
    if steps_back and not worse:
        print(f"To take what is worse, or new, into the table on purpose: {_REMEDY} --worse", file=sys.stderr)
    return rows, wrong or (steps_back and not worse)


def _search(minutes: float) -> int:
    """Print sizes of random images that launch what none of the table's sizes does; 1 if there are any."""
    end, known, found = time.monotonic() + 60 * minutes, set(enumerate_builds(ALL_SIZES)), 0
    while time.monotonic() < end:
        # Most heuristics are about small images and few of them.
        most_side, most_batch = random.choice(((64, 4), (128, 16), (1024, 256)))
        size = random.randrange(8, most_side + 1, 2), random.randint(1, most_batch)
        if more := set(enumerate_builds([size])) - known:
            known |= more
            found += 1
            print(f"{size}: {len(more)} more, of {', '.join(sorted({build.key[0] for build in more}))}")
    return int(found > 0)


def _finish(lines: str, chosen: list[Row], number: int, write: bool, wrong: bool) -> int:
    details = table(chosen)
    print(f"{lines}\n{details}")
    if write and wrong:
        print(f"benchmarks/results/{TABLE.name} is left as it was: see above", file=sys.stderr)
    elif write:
        TABLE.write_text(_HEAD.format(versions=_versions(), number=number, overview=lines, details=details))
    return int(wrong)


_REMEDY = "python -m benchmarks.aot --changed --write"

# Sides of square images in pixels, and batch sizes. Sides in powers of two, and some that are none, in batches of few
# and of many; and where --search found launches that none of these makes, mostly sides that only the Test U-Nets take.
ALL_SIZES = (
    *itertools.product([2**i for i in range(3, 11)], (1, 2, 16, 256)),
    *itertools.product((24, 40, 48, 104, 144, 200), (3, 100)),
    *((side, 1) for side in (10, 12, 20, 22, 24, 28, 34, 40, 42, 48, 50, 52, 72, 80, 86, 100, 112, 430, 1000)),
    *((54, 1), (58, 1), (62, 1), (66, 1), (70, 1), (54, 16), (62, 2), (66, 100)),
    *((20, 2), (46, 2), (80, 2), (12, 3), (10, 4), (14, 4), (154, 4), (218, 5), (80, 6), (22, 20), (56, 20), (30, 26)),
    *((78, 52), (14, 74), (20, 133), (112, 133), (10, 137), (72, 192), (12, 203), (18, 217), (142, 224), (34, 245)),
)
SOME_SIZES = tuple(itertools.product((16, 64, 256), (2, 16)))

_HEAD = """# Machine code of the kernels

Written by `python -m benchmarks.aot --write` with {versions}, no card needed: what the kernels compile to for an
A100 (sm_80), an H200 (sm_90) and a B200 (sm_100), in bfloat16 and float32, NCHW and channels_last. Parameters are
float32, as under autocast, and, beside images in bfloat16, also bfloat16. Registers and spills are those of a
thread (spills in bytes), shared memory in bytes of a program, occupancy the share of a multiprocessor's warps that
programs of this kind can fill. The widest global loads and stores are in bytes; narrow ones are those of the Test
U-Nets, which have 8 channels, of images of a few pixels, and of kernels that sum up vectors. Products: HGMMA, UTCMMA
and HMMA are the tensor cores' instructions of sm_90, sm_100 and sm_80.

## The worst of every kernel

All {number} configurations: those of square images of 8 to 1024 pixels a side in batches of 1 to 256, of every size of
which a search found that it launches another one; attention with all head widths. The fingerprint is that of a kernel's
code and of the functions it calls, launches that of its configurations; a test fails when one of the two has changed
since. What is moved, over the floor, is the operation's that the kernel belongs to, at worst, from
[traffic.md](traffic.md): counted at small shapes, launched as on an H200.

{overview}
## Representative configurations

A configuration is the types of the arguments (addresses and numbers; `?` after those that are not known to be multiples
of 16, a value or None for a constant), the constants by name, and the size of a program. The tests compile these, and
fail if one gets worse.

{details}"""


if __name__ == "__main__":
    sys.exit(main())
