"""A run as a Markdown report: losses first, then the tables of every section, then what could not be measured."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from .reading import COMPETING, MARGIN, Case, Question, Run
from .summary import Ratios, ablations, in_order, kernel_ratios, losses
from .units import (
    NOTHING,
    digits,
    readable_bytes,
    readable_rate,
    readable_ratio,
    readable_share,
    readable_time,
)

REPORT = "report.md"
STATUS_WORDS = {"ok": "timed", "parity_failed": "wrong", "error": "failed", "unavailable": "not available"}
# Where a list of things with one reason gets longer than this, it is folded.
FOLD = 4
# What of ``extra`` has no column: it is told elsewhere, or is of no interest.
HIDDEN = ("step", "copies_of_inputs", "original")
# Sections whose variants are compared with the first of them, which does more.
AGAINST_FIRST = ("few-steps",)
# What stands above a table if it is the same for all of its rows.
IDENTITY = ("shape", "direction", "dtype", "graph")
ABOVE = (*IDENTITY, "guidance", "optimizer", "loader workers")

READING = f"""\
Times are medians, ± half the distance between their quartiles. A ratio is the time of what stands above the column over
that of the row: 2.0x is twice as fast. **Bold** is a peer that is faster than ours beyond the noise: quartiles that do
not overlap, and medians more than {MARGIN:.0%} apart. Where a peer was timed in turn with ours (on a CPU: denoisers,
steps of sampling and training; in a process of its own) the ratio is the median of those of neighbouring samples, not
that of the two times in the table. The floor is the least time that this machine can need, by the rates measured in
this run: 1.0x floor cannot be beaten, but for what stays in a cache. "Of limit" is what is reached of the measured
bandwidth (bytes) or matrix rate (FLOP), whichever is more. More in `benchmarks/README.md`."""


def write_report(run: Run, folder: Path) -> Path:
    """Write the report and its pictures.

    Args:
        run: What to report.
        folder: Where to; it is made if it is not there. Files of earlier reports in it are replaced.

    Returns:
        The report.

    Raises:
        ImportError: without matplotlib.
    """
    from .plots import draw_all  # matplotlib takes a second

    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(run, folder)
    report = folder / REPORT
    report.write_text(markdown(run, pictures), encoding="utf-8")
    return report


def markdown(run: Run, pictures: Mapping[str, Path]) -> str:
    """The report's text. ``pictures`` are files beside it, by the names in :data:`.plots.PICTURES`."""
    parts = [f"# Benchmark report: {run.machine['device']}, profile {run.profile}"]
    if not run.complete:
        parts.append("**Partial result:** the run was stopped, or only a part of its profile was asked for.")
    parts += [_facts(run), READING, "## Open losses", _losses(run)]
    for section, title, tables in _SECTIONS:
        body = tables(run)
        if body:
            shown = [_picture(pictures, name) for name in _PICTURES_OF.get(section, ()) if name in pictures]
            parts += [f"## {title}", *shown, *body]
    if "memory" in pictures:
        parts += ["## Memory", _picture(pictures, "memory")]
    parts += ["## Failed", _failed(run), "## Not measured", _missing(run)]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _plain(text: str) -> str:
    """Text of others as it is: not taken for HTML."""
    return html.escape(text, quote=False)


def time_of(case: Case | None) -> str:
    """Median and spread as ``12.3 µs ± 2%``."""
    if case is None or case.seconds is None:
        return NOTHING
    seconds = case.seconds
    if len(seconds.samples) == 1:
        return readable_time(seconds.median)
    return f"{readable_time(seconds.median)} ± {readable_share((seconds.q3 - seconds.q1) / 2 / seconds.median)}"


def ratio_cell(row: Case, peer: Case | None) -> str:
    """How many times as fast as a peer a row is, bold where it is ours and loses."""
    if peer is None or peer is row:
        return NOTHING
    text = readable_ratio(row.factor(peer))
    return f"**{text}**" if row.ours and row.loses_to(peer) else text


def versions(run: Run) -> str:
    """What the run ran on, in a line: versions, commit, date."""
    software = run.software
    words = [f"minimagen_fast {software['minimagen_fast']}", f"torch {software['torch']}"]
    words += [f"{name} {software[name]}" for name in ("triton", "cuda") if software[name]]
    commit = f"commit {software['commit'] or 'unknown'}" + (" with changes" if software["dirty"] else "")
    return ", ".join([*words, f"Python {software['python']}", commit, f"{run.started:%Y-%m-%d}"])


def _picture(pictures: Mapping[str, Path], name: str) -> str:
    return f"![{name}]({pictures[name].name})"


def _facts(run: Run) -> str:
    machine, ceilings = run.machine, run.ceilings
    device = f"{machine['device']} ({machine['type']}), {digits(machine['memory_gib'])} GiB"
    if machine["capability"]:
        device += f", capability {'.'.join(map(str, machine['capability']))}"
    clocks = ", ".join(f"{name.replace('_', ' ')} {digits(value)}" for name, value in (machine["clocks"] or {}).items())
    rates = ", ".join(f"{name} {readable_rate(rate, 'FLOP')}" for name, rate in ceilings["flops_per_second"].items())
    peers = ", ".join(f"{name} {version or 'not available'}" for name, version in run.software["peers"].items())
    statuses = [case.status for case in run.cases]
    originals = in_order([str(case.extra["original"]) for case in run.cases if "original" in case.extra])
    return table(
        ("", ""),
        (
            ("device", device),
            ("CPU cores, threads of torch", f"{machine['cores']}, {machine['threads']}"),
            ("driver", machine["driver"] or NOTHING),
            ("clocks at the start", clocks or NOTHING),
            ("versions", versions(run)),
            ("peers", peers or NOTHING),
            ("what stands for the original", ", ".join(originals) or NOTHING),
            (
                "measured limits",
                f"copy {readable_rate(ceilings['copy_bytes_per_second'], 'B')} (read + write); {rates}",
            ),
            ("begun, and time taken", f"{run.started:%Y-%m-%d %H:%M} UTC, {readable_time(run.seconds)}"),
            ("cases", ", ".join(f"{statuses.count(status)} {words}" for status, words in STATUS_WORDS.items())),
            ("file", f"`{run.path.name}`"),
        ),
    )


def _losses(run: Run) -> str:
    found = losses(run)
    if not any(question.ours and question.peers for question in run.questions(*COMPETING)):
        return "Nothing of ours was timed beside a peer."
    if not found:
        return "None: no peer was faster than ours beyond the noise."
    rows = [
        (
            f"{loss.question.first.section}: {loss.question.title}",
            loss.peer.variant,
            time_of(loss.peer),
            time_of(loss.question.ours),
            readable_ratio(loss.factor),
            f"{loss.better.variant}: {time_of(loss.better)}" if loss.better else "nothing",
        )
        for loss in found
    ]
    header = ("what", "faster peer", "its time", "ours", "times as fast", "what of ours it does not beat")
    return f"{len(found)}, the largest first.\n\n" + table(header, rows)


def _memory(case: Case) -> str:
    return NOTHING if case.peak_bytes is None else readable_bytes(case.peak_bytes)


def _floor(case: Case) -> str:
    return readable_ratio(case.times_floor) if case.times_floor else NOTHING


def _limit(run: Run, case: Case) -> str:
    found = run.limit_share(case)
    return f"{readable_share(found[0])} of {found[1]}" if found else NOTHING


def _extra(key: str, value: object) -> tuple[str, str]:
    """A heading and a cell for something in ``extra``, by the unit in its name."""
    name = key.replace("_", " ")
    if isinstance(value, dict):
        # Percentiles, or the like, in one unit.
        cells = {part: _extra(key, number) for part, number in value.items()}
        return f"{_extra(key, 0.0)[0]} {' / '.join(cells)}", " / ".join(cell for _, cell in cells.values())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return name, str(value)
    if key == "mfu":
        return "MFU", readable_share(value)
    if key.endswith("_per_second"):
        return f"{name.removesuffix(' per second')}/s", digits(value)
    if key.endswith("_bytes_per_image"):
        return f"{name.removesuffix(' bytes per image')} an image", readable_bytes(value)
    if key.endswith("_share"):
        return name, readable_share(value)
    if key.startswith("seconds_to_"):
        return f"time to {name.removeprefix('seconds to ')}", readable_time(value)
    if key.endswith("_seconds"):
        return name.removesuffix(" seconds"), readable_time(value)
    return name, digits(value)


def _extras(case: Case) -> dict[str, str]:
    return dict(_extra(key, value) for key, value in case.extra.items() if key not in HIDDEN)


def _rows_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of rows that give cells by heading; what shape, direction and so on all rows share stands above it."""
    headings = in_order([heading for row in rows for heading in row])
    headings = [h for h in headings if any(row.get(h, NOTHING) not in (NOTHING, "") for row in rows)]
    alike = [h for h in headings if h in ABOVE and len({row.get(h) for row in rows}) == 1]
    above = ", ".join(rows[0][h] if h in IDENTITY else f"{h} {rows[0][h]}" for h in alike)
    columns = [h for h in headings if h not in alike]
    text = table(columns, [[row.get(h) or NOTHING for h in columns] for row in rows])
    return f"All of them: {above}.\n\n{text}" if above else text


def _identity(case: Case) -> dict[str, str]:
    graph = "CUDA graph" if case.graph else "one by one"
    return {"shape": case.shape, "direction": case.direction or "", "dtype": case.dtype, "graph": graph}


def _without_graph_if_never(rows: Sequence[dict[str, str]]) -> Sequence[dict[str, str]]:
    """A machine without CUDA has no graphs: no need to say so in every table."""
    if all(row["graph"] == "one by one" for row in rows):
        for row in rows:
            del row["graph"]
    return rows


def _by_name(questions: Iterable[Question]) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(question.first.name, []).append(question)
    return found


def _variant_tables(run: Run, section: str) -> list[str]:
    """A table for each name, with a row for each variant."""
    parts = []
    for name, questions in _by_name(run.questions(section)).items():
        peers = in_order([peer.variant for question in questions for peer in question.peers])
        rows = []
        for question in questions:
            by_variant = {case.variant: case for case in question.cases}
            for case in question.cases:
                row = {**_identity(case), "variant": case.variant, "time": time_of(case)}
                if section in COMPETING:
                    row |= {f"against {peer}": ratio_cell(case, by_variant.get(peer)) for peer in peers}
                elif section in AGAINST_FIRST:
                    row[f"against {question.first.variant}"] = ratio_cell(case, question.first)
                row |= {"x floor": _floor(case), "peak memory": _memory(case)}
                row["launches"] = NOTHING if case.launches is None else str(case.launches)
                rows.append(row | _extras(case))
        parts += [f"### {name}", _rows_table(_without_graph_if_never(rows))]
    return parts


def _denoiser_tables(run: Run) -> list[str]:
    parts = _variant_tables(run, "denoiser")
    floors = {}
    for question in run.questions("denoiser"):
        for case in question.cases:
            if case.floor_by_family:
                floors[case.name, case.direction or "", case.shape, case.computes_in] = case
    if floors:
        families = in_order([family for case in floors.values() for family in case.floor_by_family])
        rows = [
            (*key, readable_time(case.floor_seconds), *(_part(case, family) for family in families))
            for key, case in floors.items()
        ]
        parts += [
            "### Floors by kind of operation",
            "The least time for a call, and what share of it each kind of operation has.",
            table(("network", "direction", "shape", "computed in", "floor", *families), rows),
        ]
    return parts


def _part(case: Case, family: str) -> str:
    seconds = case.floor_by_family.get(family)
    return readable_share(seconds / case.floor_seconds) if seconds and case.floor_seconds else NOTHING


def _kernel_tables(run: Run) -> list[str]:
    parts = []
    ratios = kernel_ratios(run)
    if ratios:
        peers = in_order([peer for by_peer in ratios.values() for peer in by_peer])
        rows = []
        for (name, direction, dtype, graph), by_peer in ratios.items():
            row = {"operation": name, "direction": direction or "", "dtype": dtype}
            row["graph"] = "CUDA graph" if graph else "one by one"
            rows.append(row | {f"against {peer}": _range(by_peer.get(peer)) for peer in peers})
        parts += [
            "### All operations",
            "Geometric mean over the shapes, and the least and most.",
            _rows_table(_without_graph_if_never(rows)),
        ]
    for name, questions in _by_name(run.questions("kernels")).items():
        peers = in_order([peer.variant for question in questions for peer in question.peers])
        rows = []
        for question in questions:
            ours = question.ours
            by_variant = {case.variant: case for case in question.cases}
            row = {**_identity(question.first), "ours": time_of(ours)}
            for peer in peers:
                cell = ratio_cell(ours, by_variant.get(peer)) if ours else time_of(by_variant.get(peer))
                row[f"against {peer}"] = cell
            if ours:
                row |= {"x floor": _floor(ours), "of limit": _limit(run, ours), "peak memory": _memory(ours)}
            rows.append(row)
        parts += [f"### {name}", _rows_table(_without_graph_if_never(rows))]
    return parts


def _range(ratios: Ratios | None) -> str:
    if ratios is None:
        return NOTHING
    if len(ratios.values) == 1:
        return readable_ratio(ratios.mean)
    least, most = readable_ratio(min(ratios.values)), readable_ratio(max(ratios.values))
    return f"{readable_ratio(ratios.mean)} ({least} to {most})"


def _ablation_tables(run: Run) -> list[str]:
    parts = []
    for steps in ablations(run):
        rows = []
        for before, case in zip([None, *steps], steps, strict=False):
            row = {**_identity(case), "switched on": case.variant, "time": time_of(case)}
            row |= {
                "against the start": ratio_cell(case, steps[0]),
                "against the step before": ratio_cell(case, before),
            }
            row |= {"x floor": _floor(case), "peak memory": _memory(case)}
            row["launches"] = NOTHING if case.launches is None else str(case.launches)
            rows.append(row)
        parts += [f"### {steps[0].name}", _rows_table(_without_graph_if_never(rows))]
    return parts


def _failed(run: Run) -> str:
    rows = [
        (case.id, case.status, _plain(case.reason)) for case in run.cases if case.status in ("parity_failed", "error")
    ]
    return table(("case", "status", "reason"), rows) if rows else "Nothing."


def _missing(run: Run) -> str:
    """What was not measured, by reason."""
    by_reason: dict[str, list[str]] = {}
    unavailable = [(case.id, case.reason) for case in run.cases if case.status == "unavailable"]
    for what, why in dict.fromkeys((*run.missing, *unavailable)):
        by_reason.setdefault(why, []).append(what)
    rows = []
    for why, whats in by_reason.items():
        listed = "<br>".join(map(_plain, whats))
        if len(whats) > FOLD:
            listed = f"<details><summary>{len(whats)} cases</summary>{listed}</details>"
        rows.append((_plain(why), listed))
    return table(("reason", "what"), rows) if rows else "Nothing."


_SECTIONS: tuple[tuple[str, str, Callable[[Run], list[str]]], ...] = (
    ("sampling-step", "A step of sampling", lambda run: _variant_tables(run, "sampling-step")),
    ("denoiser", "Denoiser", _denoiser_tables),
    ("kernels", "Kernels", _kernel_tables),
    ("sampling", "Sampling", lambda run: _variant_tables(run, "sampling")),
    ("few-steps", "Few steps", lambda run: _variant_tables(run, "few-steps")),
    ("training", "Training", lambda run: _variant_tables(run, "training")),
    ("ablation", "Ablation: one switch more at a time", _ablation_tables),
    ("startup", "Start-up", lambda run: _variant_tables(run, "startup")),
)
_PICTURES_OF = {
    "sampling-step": ("sampling-step",),
    "denoiser": ("denoiser",),
    "kernels": ("kernels", "roofline"),
    "sampling": ("sampling",),
    "training": ("training",),
    "ablation": ("ablation",),
}
