"""The performance section of the README, made from the committed results."""

import os
import subprocess
from pathlib import Path

from .machine import ROOT
from .reading import MARGIN, Case, Question, Run, read
from .report import REPORT, ratio_cell, table, time_of, versions
from .results import FOLDER
from .summary import Ratios, in_order, kernel_ratios, losses
from .units import NOTHING, digits, readable_ratio

BEGIN, END = "<!-- benchmark begin -->", "<!-- benchmark end -->"
# A smoke run is to see that everything runs; a few samples of tiny networks say nothing of speed.
UNFIT = ("smoke",)
NOTHING_MEASURED = (
    "No results are committed yet. Measure on your machine with `minimagen-fast bench run`, and see"
    " [benchmarks/README.md](benchmarks/README.md)."
)


def committed_results(root: Path = ROOT, folder: Path = FOLDER) -> list[Path]:
    """The result files that git knows of (``git add`` is enough); outside of a git checkout, all that are there."""
    files = sorted(folder.glob("*/*.json"))
    if not (root / ".git").exists():
        return files
    done = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--", str(folder)], capture_output=True, text=True, check=True
    )
    known = {root / name for name in done.stdout.split("\0")}
    return [file for file in files if file in known]


def newest_per_device(runs: list[Run]) -> list[Run]:
    """The newest complete run of every device, GPUs first."""
    newest: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.started):
        if run.complete and run.profile not in UNFIT:
            newest[run.path.parent.name] = run
    return sorted(newest.values(), key=lambda run: (run.machine["type"] != "cuda", run.machine["device"]))


def readme_section(files: list[Path], root: Path = ROOT) -> str:
    """The section's text, from result files below ``root``.

    Raises:
        ValueError: if one of the files is malformed.
    """
    runs = newest_per_device([read(file) for file in files])
    return "\n\n".join(_device(run, root) for run in runs) if runs else NOTHING_MEASURED


def replace_section(text: str, section: str) -> str:
    """The README's text with the section between its markers replaced.

    Raises:
        ValueError: if the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must have one {BEGIN} and, after it, one {END}: the section goes between them")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def update_readme(root: Path = ROOT, folder: Path = FOLDER) -> tuple[Path, bool]:
    """Rewrite the section in README.md; gives the file, and whether it changed.

    Raises:
        ValueError: if a result file is malformed, or README.md has no markers.
    """
    readme = root / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = replace_section(before, readme_section(committed_results(root, folder), root))
    if after != before:
        readme.write_text(after, encoding="utf-8")
    return readme, after != before


def _device(run: Run, root: Path) -> str:
    place = Path(os.path.relpath(run.path, root)).as_posix()
    report = f"{place.removesuffix('.json')}/{REPORT}"
    threads = f", {run.machine['threads']} threads" if run.machine["type"] == "cpu" else ""
    parts = [
        f"**{run.machine['device']}**{threads} ([report]({report}), [all numbers]({place})): {versions(run)}.",
    ]
    networks = [
        *_network_rows(run, "sampling-step", "step of sampling"),
        *_network_rows(run, "denoiser", "denoiser"),
        *_network_rows(run, "sampling", "sampling"),
        *_network_rows(run, "training", "training"),
    ]
    if networks:
        originals = in_order([str(case.extra["original"]) for case in run.cases if "original" in case.extra])
        parts.append(f"What stands for the original: {', '.join(originals) or NOTHING}.")
        header = (
            "what",
            "ours",
            "as a variant of ours",
            "against the original",
            "against the original, compiled",
            "x floor",
        )
        parts.append(table(header, networks))
    kernels = _kernel_rows(run)
    if kernels:
        parts.append(kernels)
    count, left_out = len(losses(run)), sum(case.status == "unavailable" for case in run.cases)
    parts.append(
        "A ratio above one means that ours is faster; bold ones are lost. "
        + (f"Open losses: {count}, [listed in the report]({report}#open-losses)." if count else "No open losses.")
        + (f" Cases not measured: {left_out}, [with the reasons]({report}#not-measured)." if left_out else "")
    )
    return "\n\n".join(parts)


def _network_rows(run: Run, section: str, title: str) -> list[tuple[str, ...]]:
    """A row for each question: the fastest of ours, as in the report's table."""
    rows = []
    for question in run.questions(section):
        best = question.fastest_of_ours
        if best is None:
            continue
        name = f"{title}: {question.first.name}"
        words = [question.first.direction, question.first.shape, "CUDA graph" if question.first.graph else None]
        rows.append(
            (
                ", ".join([name, *(word for word in words if word)]),
                time_of(best) + _speed(best),
                best.variant,
                _against(question, best, "original"),
                _against(question, best, "original-compiled"),
                readable_ratio(best.times_floor) if best.times_floor else NOTHING,
            )
        )
    return rows


def _speed(case: Case) -> str:
    speed = case.extra.get("images_per_second")
    return f" ({digits(speed)} images/s)" if isinstance(speed, int | float) else ""


def _against(question: Question, ours: Case, variant: str) -> str:
    return ratio_cell(ours, next((case for case in question.peers if case.variant == variant), None))


def _kernel_rows(run: Run) -> str:
    """Geometric means over the shapes of every operation."""
    ratios = kernel_ratios(run)
    with_graphs = any(graph for *_, graph in ratios)
    kept = {key[:3]: by_peer for key, by_peer in ratios.items() if key[3] == with_graphs}
    if not kept:
        return ""
    peers = in_order([peer for by_peer in kept.values() for peer in by_peer])
    rows = [
        (name, direction or NOTHING, dtype, *(_mean(by_peer.get(peer)) for peer in peers))
        for (name, direction, dtype), by_peer in kept.items()
    ]
    above = "Kernels, geometric mean over their shapes" + (", as CUDA graphs" if with_graphs else "") + ":"
    return f"{above}\n\n" + table(("kernel", "direction", "dtype", *(f"against {peer}" for peer in peers)), rows)


def _mean(ratios: Ratios | None) -> str:
    if ratios is None:
        return NOTHING
    text = readable_ratio(ratios.mean)
    return f"**{text}**" if ratios.mean * (1 + MARGIN) < 1 else text
