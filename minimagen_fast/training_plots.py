"""The course of a training in pictures, from its log."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .pictures import LINE_COLORS
from .run_log import RunRecords

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise ImportError(
        f"the report needs matplotlib, which cannot be imported ({error}): pip install 'minimagen_fast[report]'"
    ) from error

__all__ = ["draw_all"]

PALETTE = ["#{:02x}{:02x}{:02x}".format(*color) for color in LINE_COLORS]
INK, GRAY, FAINT = "#222222", "#a0a0a0", "#e4e4e4"
WIDTH, HEIGHT, DPI = 9.0, 3.4, 130
SMALL, LARGE = 8.5, 11.5
# A smooth line is a mean over this share of the points, and there are at most so many points in a line.
SMOOTHED_SHARE, MOST_POINTS = 1 / 40, 2000
# Above this ratio of the largest to the smallest value an axis is logarithmic.
LOGARITHMIC_FROM = 5.0

Points = tuple[np.ndarray, np.ndarray]


def draw_all(records: RunRecords, folder: Path) -> dict[str, Path]:
    """Draws what a log has something for.

    Args:
        records: The log.
        folder: Where the PNG files go; those of an earlier call that are not drawn now are removed.

    Returns:
        The files by what they show, in the order in which to show them.
    """
    files = {}
    for name, draw in PICTURES.items():
        figure, file = draw(records), folder / f"{name}.png"
        if figure is None:
            file.unlink(missing_ok=True)
            continue
        figure.savefig(file, dpi=DPI)
        files[name] = file
    return files


def points_of(records: Iterable[dict[str, Any]], value: Callable[[dict[str, Any]], Any]) -> Points:
    """Steps and values as float64 arrays; NaN where there is no value."""
    pairs = []
    for record in records:
        found = value(record)
        pairs.append((record["step"], math.nan if found is None else float(found)))
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the `width` values around each, over as many on both sides, without the missing ones (NaN)."""
    half = np.minimum(width // 2, np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]))
    there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    first, last = np.arange(len(values)) - half, np.arange(len(values)) + half + 1
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def unet_numbers(records: Sequence[dict[str, Any]], key: str) -> list[str]:
    """Numbers of the U-Nets that any of these records tells of."""
    return sorted({number for record in records for number in record.get(key, {})}, key=int)


# The pictures


def draw_loss(records: RunRecords) -> Figure | None:
    """Training loss of every U-Net: as it is, faint, and smoothed."""
    lines = {
        f"U-Net {number}": points_of(records.steps, _loss_of(number)) for number in unet_numbers(records.steps, "unets")
    }
    return _one_panel(records, "Training loss", lines, smooth=True)


def draw_validation(records: RunRecords) -> Figure | None:
    """Validation loss of every U-Net."""
    lines = {
        f"U-Net {number}": points_of(records.validations, _validation_loss_of(number))
        for number in unet_numbers(records.validations, "losses")
    }
    return _one_panel(records, "Validation loss (the same images, timesteps and noise every time)", lines, mark=True)


def draw_timesteps(records: RunRecords) -> Figure | None:
    """Loss by timestep, smoothed, a panel for each U-Net."""
    numbers = unet_numbers(records.steps, "unets")
    panels = {}
    for number in numbers:
        buckets = max(len(r["unets"].get(number, {}).get("loss_by_timestep", ())) for r in records.steps)
        panels[number] = {
            f"{place / buckets:.1f}–{(place + 1) / buckets:.1f}": points_of(records.steps, _bucket_of(number, place))
            for place in range(buckets)
        }
    panels = {number: lines for number, lines in panels.items() if any(map(_has_points, lines.values()))}
    if not panels:
        return None
    figure, axes = _figure(len(panels), "Training loss by timestep (0: hardly any noise, 1: nothing but noise)")
    for ax, (number, lines) in zip(axes, panels.items(), strict=True):
        # From light to dark, as the noise grows; the lightest would not be seen on paper.
        colors = _colormap()(np.linspace(0.92, 0.0, len(lines)))
        _draw_lines(ax, lines, colors, smooth="only")
        _finish(ax, records, lines.values(), f"U-Net {number}")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=SMALL, frameon=False)
    return figure


def draw_gradient(records: RunRecords) -> Figure | None:
    """Norm of the gradient, and how many steps were left out."""
    lines = {"mean norm of the gradient": points_of(records.steps, lambda record: record["grad_norm"])}
    figure = _one_panel(records, "Gradient norm before clipping", lines, smooth=True)
    steps, bad = points_of(records.steps, lambda record: record["bad_steps"])
    if figure is not None and len(bad) and np.nanmax(bad) > 0:
        grown = steps[np.flatnonzero(np.diff(bad, prepend=0.0) > 0)]
        ax = figure.axes[0]
        for place, step in enumerate(grown):
            ax.axvline(step, color=PALETTE[1], linewidth=0.9, label=None if place else "steps left out: not finite")
        ax.legend(fontsize=SMALL, frameon=False)
    return figure


def draw_speed(records: RunRecords) -> Figure | None:
    """Images per second; the share of the time that goes to waiting for data; how well the device is used."""
    panels = {
        "images per second, all ranks": (lambda record: record["images_per_second"], None),
        "share of the time for which the rank that waits longest waits for data": (
            lambda record: record["data_wait_share"],
            1.0,
        ),
        "model FLOPs utilisation": (lambda record: record["mfu"], 1.0),
    }
    return _panels(records, "Speed", panels, smooth=True)


def draw_rate_and_memory(records: RunRecords) -> Figure | None:
    """Learning rates and peak memory."""
    groups = max((len(record["learning_rates"]) for record in records.steps), default=0)
    rates = {
        f"learning rate of group {place + 1}" if groups > 1 else "learning rate": (_rate_of(place), None)
        for place in range(groups)
    }
    memory = {"peak memory of the fullest rank, GiB": (_gib, None)}
    return _panels(records, "Learning rate and memory", {**rates, **memory})


def _loss_of(number: str) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record["unets"].get(number, {}).get("loss")


def _validation_loss_of(number: str) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record["losses"].get(number)


def _bucket_of(number: str, place: int) -> Callable[[dict[str, Any]], Any]:
    def value(record: dict[str, Any]) -> Any:
        buckets = record["unets"].get(number, {}).get("loss_by_timestep", ())
        return buckets[place] if place < len(buckets) else None

    return value


def _rate_of(place: int) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record["learning_rates"][place] if place < len(record["learning_rates"]) else None


def _gib(record: dict[str, Any]) -> float | None:
    return None if record["memory_bytes"] is None else record["memory_bytes"] / 2**30


# How they are drawn


def _figure(rows: int, title: str) -> tuple[Figure, list[Axes]]:
    height = HEIGHT if rows == 1 else 2.6 * rows + 0.4
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=LARGE, color=INK)
    axes = figure.subplots(rows, 1, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=SMALL, color=GRAY)
        ax.grid(axis="y", color=FAINT, linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, list(axes.flat)


def _has_points(line: Points) -> bool:
    return bool(np.isfinite(line[1]).any())


def _one_panel(
    records: RunRecords, title: str, lines: dict[str, Points], *, smooth: bool = False, mark: bool = False
) -> Figure | None:
    lines = {name: line for name, line in lines.items() if _has_points(line)}
    if not lines:
        return None
    figure, (ax,) = _figure(1, title)
    _draw_lines(ax, lines, PALETTE, smooth="too" if smooth else None, mark=mark)
    _finish(ax, records, lines.values())
    ax.legend(fontsize=SMALL, frameon=False)
    return figure


def _panels(records: RunRecords, title: str, panels: dict[str, tuple], *, smooth: bool = False) -> Figure | None:
    drawn = {name: (points_of(records.steps, value), top) for name, (value, top) in panels.items()}
    drawn = {name: (line, top) for name, (line, top) in drawn.items() if _has_points(line)}
    if not drawn:
        return None
    figure, axes = _figure(len(drawn), title)
    for ax, color, (name, (line, top)) in zip(axes, PALETTE, drawn.items(), strict=False):
        _draw_lines(ax, {name: line}, [color], smooth="too" if smooth else None)
        _finish(ax, records, [line], name, logarithmic=False, percent=top is not None)
    return figure


def _draw_lines(
    ax: Axes, lines: dict[str, Points], colors: Sequence[Any], *, smooth: str | None = None, mark: bool = False
) -> None:
    """`smooth`: ``too`` for a smooth line over a faint one, ``only`` without that, None for the line as it is."""
    for place, (name, (steps, values)) in enumerate(lines.items()):
        color = colors[place % len(colors)]
        width = max(1, round(len(values) * SMOOTHED_SHARE))
        kept = slice(None, None, -(-len(values) // MOST_POINTS))
        # A point between gaps has no line.
        marker = "o" if mark or np.isfinite(values).sum() < 3 else None
        if smooth and width > 1:
            if smooth == "too":
                ax.plot(steps[kept], values[kept], color=color, alpha=0.25, linewidth=0.8)
            values = smoothed(values, width)
        ax.plot(steps[kept], values[kept], color=color, linewidth=1.6, label=name, marker=marker, markersize=3.5)


def _finish(
    ax: Axes,
    records: RunRecords,
    lines: Iterable[Points],
    title: str | None = None,
    *,
    logarithmic: bool = True,
    percent: bool = False,
) -> None:
    every = np.concatenate([values for _, values in lines])
    every = every[np.isfinite(every)]
    if logarithmic and every.min() > 0 and every.max() > LOGARITHMIC_FROM * every.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        # Over many powers of ten, these alone have room.
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if every.max() < 1e3 * every.min() else (1.0,)))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(bottom=min(0.0, every.min()), top=every.max() * 1.08 if every.max() > 0 else None)
    if percent:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    for start in records.starts[1:]:
        ax.axvline(start["step"], color=GRAY, linewidth=0.8, linestyle=":")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("optimizer steps" + (" (dotted: continued here)" if records.starts[1:] else ""), fontsize=SMALL)
    if title is not None:
        ax.set_title(title, fontsize=SMALL + 1, color=INK, loc="left")


def _colormap() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"]


PICTURES: dict[str, Callable[[RunRecords], Figure | None]] = {
    "loss": draw_loss,
    "validation": draw_validation,
    "loss_by_timestep": draw_timesteps,
    "gradient": draw_gradient,
    "speed": draw_speed,
    "rate_and_memory": draw_rate_and_memory,
}
