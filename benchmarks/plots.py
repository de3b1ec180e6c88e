"""A run in pictures: bars against peers, the roofline, the ablation, memory. Legible at the width of a README."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from minimagen_fast.pictures import LINE_COLORS

from .reading import RATE_OF, Case, Question, Run
from .summary import ablations, in_order, kernel_ratios
from .units import (
    BYTE_UNITS,
    TIME_UNITS,
    digits,
    readable_bytes,
    readable_rate,
    readable_ratio,
    readable_time,
)

PALETTE = ["#{:02x}{:02x}{:02x}".format(*color) for color in LINE_COLORS]
BLUE, VERMILION, GREEN = PALETTE[:3]
INK, GRAY, FAINT = "#222222", "#a0a0a0", "#e4e4e4"
MARKERS = "osD^v<>Pp*Xh"
WIDTH, DPI = 9.0, 130
# Text of a bar, of a title; in points.
SMALL, PLAIN, LARGE = 8.5, 9.5, 11.5
BAR = 0.21  # inches from one bar to the next


def draw_all(run: Run, folder: Path) -> dict[str, Path]:
    """Draw what a run has something for.

    Args:
        run: The run.
        folder: Where the PNG files go, named like the pictures; those of pictures that are not drawn are removed.

    Returns:
        The files by name of the picture, of :data:`PICTURES`.
    """
    files = {}
    for name, draw in PICTURES.items():
        figure, file = draw(run), folder / f"{name}.png"
        if figure is None:
            file.unlink(missing_ok=True)
            continue
        figure.savefig(file, dpi=DPI)
        files[name] = file
    return files


def _figure(height: float, title: str, rows: int = 1, columns: int = 1, **settings: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=LARGE, color=INK)
    axes = figure.subplots(rows, columns, squeeze=False, **settings)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=SMALL, color=GRAY)
        ax.set_axisbelow(True)
    return figure, list(axes.flat)


def _plain_log(ax: Axes, axis: str, subs: Sequence[float], shown: Callable[[float], str]) -> None:
    """A logarithmic axis with ticks in words, and none but those."""
    which = ax.xaxis if axis == "x" else ax.yaxis
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    which.set_major_locator(LogLocator(subs=subs))
    which.set_minor_locator(NullLocator())
    which.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    which.set_minor_formatter(NullFormatter())
    ax.grid(axis=axis, color=FAINT, linewidth=0.8)


def _graphs_if_any(cases: Sequence) -> Sequence:
    """Of cases with and without CUDA graphs those with: there the device alone is timed."""
    return [case for case in cases if case.graph] or cases


# Bars against peers


def draw_kernels(run: Run) -> Figure | None:
    """For every operation how many times as fast as each peer it is, over all shapes."""
    ratios = kernel_ratios(run)
    with_graphs = any(graph for *_, graph in ratios)
    ratios = {key[:3]: by_peer for key, by_peer in ratios.items() if key[3] == with_graphs}
    if not ratios:
        return None
    dtypes = in_order([dtype for _, _, dtype in ratios])
    rows = in_order([(name, direction) for name, direction, _ in ratios])
    peers = in_order([peer for by_peer in ratios.values() for peer in by_peer])
    # As many bars for an operation as it has peers in any dtype.
    peers_of = {
        row: [peer for peer in peers if any(peer in ratios.get((*row, dtype), ()) for dtype in dtypes)] for row in rows
    }
    bars = sum(len(peers_of[row]) + 0.7 for row in rows)
    figure, axes = _figure(
        1.5 + BAR * bars + 0.25 * math.ceil(len(peers) / 5),
        "Kernels: how many times as fast as each peer" + (", CUDA graphs" if with_graphs else ""),
        columns=len(dtypes),
        sharey=True,
    )
    for ax, dtype in zip(axes, dtypes, strict=True):
        place, ticks, most, least = 0.0, [], 1.0, 1.0
        for row in rows:
            ticks.append(place + (len(peers_of[row]) - 1) / 2)
            for peer in peers_of[row]:
                found = ratios.get((*row, dtype), {}).get(peer)
                if found:
                    low, mean, high = min(found.values), found.mean, max(found.values)
                    ax.barh(place, mean - 1, left=1, height=0.8, color=_color(peers, peer))
                    if len(found.values) > 1:
                        ax.plot((low, high), (place, place), color=INK, linewidth=0.9)
                    ax.text(max(high, 1) * 1.04, place, readable_ratio(mean), fontsize=7.5, va="center", color=INK)
                    most, least = max(most, high), min(least, low)
                place += 1
            place += 0.7
        _plain_log(ax, "x", _few_subs(least, most), readable_ratio)
        # Room for the words behind the longest bar.
        ax.set_xlim(least / 1.1, most * max(1.25, (most / least) ** (0.16 * len(dtypes))))
        ax.axvline(1, color=INK, linewidth=1)
        ax.set_title(dtype, fontsize=PLAIN, color=INK)
        ax.set_xlabel("peer's time / our time\n(left of 1.0x the peer is faster)", fontsize=SMALL)
        ax.set_yticks(ticks, [f"{name}, {direction}" if direction else name for name, direction in rows])
        ax.set_ylim(place - 0.7, -0.9)
    handles = [Line2D([], [], color=_color(peers, peer), linewidth=7, label=f"against {peer}") for peer in peers]
    if any(len(found.values) > 1 for by_peer in ratios.values() for found in by_peer.values()):
        handles.append(Line2D([], [], color=INK, linewidth=1, label="least to most over the shapes"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
    return figure


def _color(names: Sequence[str], name: str) -> str:
    colors = [*PALETTE, GRAY, "#6a3d9a", INK]
    return colors[names.index(name) % len(colors)]


def _few_subs(low: float, high: float) -> tuple[float, ...]:
    """What of a decade gets a tick: more where there are few decades."""
    return (1, 1.5, 2, 3, 5, 7) if high / low < 7 else (1, 2, 5) if high / low < 100 else (1,)


# Bars of a section


def _bars(
    questions: Sequence[Question],
    title: str,
    value: Callable[[Case], float | None],
    units: Sequence[tuple[float, str]],
    shown: Callable[[float], str],
    what: str,
    *,
    spread: bool,
    named: bool = False,
) -> Figure | None:
    """A panel for each question, a bar for each variant; where there is a spread also that, and the floors."""
    panels = [[case for case in question.cases if value(case) is not None] for question in questions]
    panels = [cases for cases in panels if cases]
    if not panels:
        return None
    columns = min(2, len(panels))
    heights = [
        0.85 + BAR * 1.25 * max(map(len, panels[first : first + columns])) for first in range(0, len(panels), columns)
    ]
    figure, axes = _figure(sum(heights) + 0.7, title, len(heights), columns, gridspec_kw={"height_ratios": heights})
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax, cases in zip(axes, panels, strict=False):
        values = [value(case) for case in cases]
        largest = max([*values, *(case.seconds.q3 for case in cases if spread)])
        size, unit = next((entry for entry in units if largest >= entry[0]), units[-1])
        for place, (case, number) in enumerate(zip(cases, values, strict=True)):
            ax.barh(place, number / size, height=0.72, color=BLUE if case.ours else GRAY)
            end = number
            if spread:
                end = max(number, case.seconds.q3)
                ax.plot((case.seconds.q1 / size, case.seconds.q3 / size), (place, place), color=INK, linewidth=1)
                if case.floor_seconds:
                    edges = (place - 0.36, place + 0.36)
                    ax.plot((case.floor_seconds / size,) * 2, edges, color=VERMILION, linewidth=2)
            ax.text((end + 0.015 * largest) / size, place, shown(number), fontsize=SMALL, va="center", color=INK)
        ax.set_yticks(range(len(cases)), [case.variant for case in cases])
        ax.set_ylim(len(cases) - 0.4, -0.6)
        ax.set_xlim(0, largest / size * 1.28)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.grid(axis="x", color=FAINT, linewidth=0.8)
        ax.set_xlabel(f"{what}, {unit}", fontsize=SMALL)
        ax.set_title(_panel_title(cases[0], named), fontsize=SMALL, color=INK)
    handles = [
        Line2D([], [], color=color, linewidth=7, label=name) for color, name in ((BLUE, "ours"), (GRAY, "peers"))
    ]
    if spread:
        handles.append(Line2D([], [], color=INK, linewidth=1, label="quartiles"))
        if any(case.floor_seconds for cases in panels for case in cases):
            handles.append(Line2D([], [], color=VERMILION, linewidth=2, label="floor of this machine"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
    return figure


def _panel_title(case: Case, with_section: bool) -> str:
    words = (case.direction, case.shape, "CUDA graph" if case.graph else None)
    name = f"{case.section}: {case.name}" if with_section else case.name
    return f"{name}\n{', '.join(word for word in words if word)}"


def _time_bars(section: str) -> Callable[[Run], Figure | None]:
    def draw(run: Run) -> Figure | None:
        title = f"{section.replace('-', ' ').capitalize()}: time of each variant"
        return _bars(
            run.questions(section), title, _median, TIME_UNITS, readable_time, "median time of a call", spread=True
        )

    return draw


def _median(case: Case) -> float | None:
    return case.seconds.median if case.seconds else None


def draw_memory(run: Run) -> Figure | None:
    """Peak memory of denoisers and training."""
    return _bars(
        [question for question in run.questions("denoiser", "training") if not question.first.graph],
        "Peak memory of a call, its inputs and weights aside",
        lambda case: case.peak_bytes,
        BYTE_UNITS,
        readable_bytes,
        "peak memory",
        spread=False,
        named=True,
    )


# Roofline


def draw_roofline(run: Run) -> Figure | None:
    """Every kernel of ours: bytes over time against the copy, or FLOPs over time under the roof."""
    cases = [question.ours for question in run.questions("kernels") if question.ours and question.ours.bytes]
    cases = _graphs_if_any(cases)
    moving = [case for case in cases if not case.flops]
    computing = [case for case in cases if case.flops]
    panels = [(draw, some) for draw, some in ((_bandwidth_panel, moving), (_roof_panel, computing)) if some]
    if not panels:
        return None
    names = in_order([case.name for case in cases])
    figure, axes = _figure(
        4.6 + 0.2 * math.ceil(len(names) / 2), "Roofline: our kernels against the measured limits", columns=len(panels)
    )
    for ax, (draw, some) in zip(axes, panels, strict=True):
        draw(ax, run, some)
    return figure


def _point(ax: Axes, x: float, y: float, color: str, marker: str, case: Case) -> None:
    face = "none" if case.direction == "backward" else color
    ax.plot(x, y, marker=marker, color=color, markerfacecolor=face, markersize=6, linestyle="none", alpha=0.85)


def _log_room(values: Sequence[float], below: float = 1.6, above: float = 1.6) -> tuple[float, float]:
    return min(values) / below, max(values) * above


def _bandwidth_panel(ax: Axes, run: Run, cases: Sequence[Case]) -> None:
    """Operations that are all reading and writing."""
    names = in_order([case.name for case in cases])
    limit = run.ceilings["copy_bytes_per_second"]
    sizes, rates = [case.bytes for case in cases], [case.bytes / case.seconds.median for case in cases]
    for case, size, rate in zip(cases, sizes, rates, strict=True):
        _point(ax, size, rate, _color(names, case.name), MARKERS[names.index(case.name) % len(MARKERS)], case)
    low, high = _log_room([*rates, limit])
    # Ticks are powers of two for bytes, of ten for rates.
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: readable_bytes(value)))
    ax.grid(axis="x", color=FAINT, linewidth=0.8)
    _plain_log(ax, "y", _few_subs(low, high), lambda value: readable_rate(value, "B"))
    ax.set_xlim(*_log_room(sizes))
    ax.set_ylim(low, high)
    ax.axhline(limit, color=INK, linewidth=1.4)
    ax.annotate(f"copy: {readable_rate(limit, 'B')}", (0.02, limit), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", fontsize=SMALL, color=INK)  # fmt: skip
    ax.set_title("Limited by bandwidth", fontsize=PLAIN, color=INK)
    ax.set_xlabel("least bytes of a call", fontsize=SMALL)
    ax.set_ylabel("bytes over time", fontsize=SMALL)
    _legend_below(ax, [_entry(_color(names, n), MARKERS[names.index(n) % len(MARKERS)], n) for n in names], cases)


def _roof_panel(ax: Axes, run: Run, cases: Sequence[Case]) -> None:
    """Operations with matrix products."""
    names, dtypes = (in_order([getattr(case, key) for case in cases]) for key in ("name", "computes_in"))
    limit = run.ceilings["copy_bytes_per_second"]
    roofs = {dtype: run.ceilings["flops_per_second"].get(RATE_OF.get(dtype, dtype)) for dtype in dtypes}
    points = [(case.flops / case.bytes, case.flops / case.seconds.median) for case in cases]
    for case, (intensity, rate) in zip(cases, points, strict=True):
        color, marker = _color(dtypes, case.computes_in), MARKERS[names.index(case.name) % len(MARKERS)]
        _point(ax, intensity, rate, color, marker, case)
    known = {dtype: roof for dtype, roof in roofs.items() if roof}
    left, right = _log_room([*(x for x, _ in points), *(roof / limit for roof in known.values())], 3, 3)
    for dtype, roof in known.items():
        color = _color(dtypes, dtype)
        ax.plot((left, roof / limit, right), (left * limit, roof, roof), color=color, linewidth=1.4)
        ax.annotate(f"{dtype}: {readable_rate(roof, 'FLOP')}", (0.98, roof), xycoords=("axes fraction", "data"),
                    xytext=(0, 3), textcoords="offset points", ha="right", fontsize=SMALL, color=color)  # fmt: skip
    low, high = _log_room([*(y for _, y in points), *known.values()], 2, 2)
    _plain_log(ax, "x", _few_subs(left, right), digits)
    _plain_log(ax, "y", _few_subs(low, high), lambda value: readable_rate(value, "FLOP"))
    ax.set_xlim(left, right)
    ax.set_ylim(low, high)
    ax.set_title("With matrix products", fontsize=PLAIN, color=INK)
    ax.set_xlabel("FLOP per byte", fontsize=SMALL)
    ax.set_ylabel("FLOP over time", fontsize=SMALL)
    entries = [_entry(INK, MARKERS[n % len(MARKERS)], name) for n, name in enumerate(names)]
    _legend_below(ax, [*entries, *(_entry(_color(dtypes, dtype), "_", dtype) for dtype in dtypes)], cases)


def _entry(color: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, linestyle="none", label=label)


def _legend_below(ax: Axes, handles: list[Line2D], cases: Sequence[Case]) -> None:
    if any(case.direction == "backward" for case in cases):
        handles.append(
            Line2D([], [], color=INK, marker="o", fillstyle="none", linestyle="none", label="hollow: backward")
        )
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=2,
        fontsize=7.5,
        frameon=False,
        columnspacing=0.8,
        handletextpad=0.2,
    )


# Ablation


def draw_ablation(run: Run) -> Figure | None:
    """Waterfalls: what each switch takes from the time, or adds to it."""
    panels = ablations(run)
    if not panels:
        return None
    heights = [0.9 + 0.3 * len(steps) for steps in panels]
    figure, axes = _figure(
        sum(heights) + 0.4,
        "Ablation: one switch more at a time",
        rows=len(panels),
        gridspec_kw={"height_ratios": heights},
    )
    for ax, steps in zip(axes, panels, strict=True):
        times = [case.seconds.median for case in steps]
        size, unit = next(entry for entry in TIME_UNITS if max(times) >= entry[0])
        for place, (before, now) in enumerate(zip([0.0, *times], times, strict=False)):
            color = GRAY if place == 0 else GREEN if now < before else VERMILION
            ax.barh(place, (now - before) / size, left=before / size, height=0.66, color=color)
            if place + 1 < len(times):
                ax.plot((now / size,) * 2, (place - 0.33, place + 1.33), color=INK, linewidth=0.9)
            text = readable_time(now) + (f", {readable_ratio(times[0] / now)} as fast as at first" if place else "")
            ax.text((max(before, now) + 0.012 * max(times)) / size, place, text, va="center", fontsize=SMALL, color=INK)
        ax.set_yticks(range(len(steps)), [case.variant for case in steps])
        ax.set_ylim(len(steps) - 0.4, -0.6)
        ax.set_xlim(0, max(times) / size * 1.36)
        ax.grid(axis="x", color=FAINT, linewidth=0.8)
        ax.set_xlabel(f"median time of a call, {unit}", fontsize=SMALL)
        ax.set_title(_panel_title(steps[0], False).replace("\n", ", "), fontsize=PLAIN, color=INK)
    return figure


PICTURES: dict[str, Callable[[Run], Figure | None]] = {
    "sampling-step": _time_bars("sampling-step"),
    "denoiser": _time_bars("denoiser"),
    "kernels": draw_kernels,
    "roofline": draw_roofline,
    "sampling": _time_bars("sampling"),
    "training": _time_bars("training"),
    "ablation": draw_ablation,
    "memory": draw_memory,
}
