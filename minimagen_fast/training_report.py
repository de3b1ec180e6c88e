"""``minimagen-fast report``: a training as a page: what was trained, how far, how fast, and how it went."""

import argparse
import base64
import html
import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .files import named_path, replace_file
from .run_log import LOG, RunRecords, read_run

__all__ = ["add_report_arguments", "run_training_report", "write_training_report"]

PAGE, ENDED = "report.html", "ended.json"
NOTHING = "–"
# What ended.json says, in words.
_ENDS = {"done": "done", "time": "ended because its time was up", "stopped": "stopped on request"}
MOST_GRIDS, MOST_EVENTS = 6, 200
_CAPTIONS = {
    "loss": "Training loss",
    "validation": "Validation loss",
    "loss_by_timestep": "Training loss by timestep",
    "gradient": "Gradient norm",
    "speed": "Speed",
    "rate_and_memory": "Learning rate and memory",
}
_STARTS_HEADER = ("begun", "at step", "ranks", "machine", "versions")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; }
td, th { text-align: left; vertical-align: top; padding: 0.15em 1.2em 0.15em 0; border-bottom: 1px solid #e4e4e4; }
img { max-width: 100%; }
td { overflow-wrap: anywhere; }
"""


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``minimagen-fast report``."""
    parser.add_argument(
        "DIRECTORY", type=named_path, help=f"training directory with a {LOG}; the training may be under way"
    )
    parser.add_argument("--out", type=named_path, help="folder for the page and its pictures (DIRECTORY/report)")


def run_training_report(args: argparse.Namespace) -> int:
    """Write the report that the arguments ask for.

    Returns:
        The exit status, 0.

    Raises:
        OSError, ImportError: there is no log, the report cannot be written, or matplotlib is not installed.
    """
    page = write_training_report(args.DIRECTORY, args.out or args.DIRECTORY / "report")
    print(f"Look at {page}")
    return 0


def write_training_report(directory: Path, folder: Path) -> Path:
    """Write the report of a training, ended or under way.

    Args:
        directory: The training directory; nothing in it is changed, unless `folder` lies there.
        folder: Where to; made if needed. ``report.html`` holds all of its pictures, so that it can be sent alone; the
            plots are also beside it, as PNG files. Files of an earlier report are replaced.

    Returns:
        The page.

    Raises:
        FileNotFoundError: the directory has no ``log.jsonl``.
        ImportError: matplotlib is not installed.
        OSError: the report cannot be written.
    """
    records = read_run(directory / LOG)
    from .training_plots import draw_all  # takes a second

    folder.mkdir(parents=True, exist_ok=True)
    plots = draw_all(records, folder)
    page = folder / PAGE
    replace_file(page, _page(records, directory, plots).encode())
    return page


def _page(records: RunRecords, directory: Path, plots: dict[str, Path]) -> str:
    name = html.escape(directory.resolve().name)
    settings = records.starts[-1]["settings"] if records.starts else {}
    parts = [
        f"<h1>Training {name}</h1>",
        f"<p>{html.escape(_state(records, directory))}</p>",
        _table(_totals(records)),
        _unets(records),
        *(f"<h2>{_CAPTIONS[plot]}</h2>{_image(file, _CAPTIONS[plot])}" for plot, file in plots.items()),
        _grids(records, directory),
        _section("Events", _table(_events(records), ("time", "step", ""))),
        _section("Machine and versions", _table(_starts(records), _STARTS_HEADER)),
        _section("Settings", _table((name, _plain(value)) for name, value in settings.items())),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Training {name}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(filter(None, parts)) + "\n</body></html>\n"
    )


def _state(records: RunRecords, directory: Path) -> str:
    """How the training stands, in a sentence."""
    last = records.last
    if last is None:
        return "Nothing has been logged yet."
    step = records.steps[-1]["step"] if records.steps else last["step"]
    text = f"The last line of the log, at optimizer step {step}, is from {_moment(last['time'])}."
    if not records.steps:
        text += " No step has been logged yet."
    if records.unreadable:
        text += f" {records.unreadable} of its lines could not be read and were left out."
    return f"{_end(records, directory)} {text}"


def _end(records: RunRecords, directory: Path) -> str:
    file = directory / ENDED
    begun = records.starts[-1]["time"] if records.starts else 0.0
    try:
        # What ended an earlier part of the run says nothing of the one after it.
        ended = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_mtime >= begun else None
    except FileNotFoundError:
        ended = None
    except (ValueError, RecursionError) as error:
        return f"{file.name} cannot be read ({error})."
    if not isinstance(ended, dict) or "why" not in ended:
        return "Under way, or ended without a word."
    why = _plain(ended["why"])
    return f"The training is {_ENDS.get(why, why)}, after {ended.get('step')} optimizer steps."


def _totals(records: RunRecords) -> list[tuple[str, str]]:
    steps = records.steps
    if not steps:
        return []
    last = steps[-1]
    seconds, images = (sum(record[key] for record in steps) for key in ("seconds", "images"))
    waited = sum(record["data_wait_share"] * record["seconds"] for record in steps) / seconds
    flops, mfu = (_mean_over_time(steps, key) for key in ("flops_per_second", "mfu"))
    memory = max((record["memory_bytes"] for record in steps if record["memory_bytes"] is not None), default=None)
    to_end = last["seconds_to_end"]
    return [
        ("optimizer steps", f"{last['step']:,}, in epoch {last['epoch'] + 1}"),
        ("images trained on", f"{images:,}"),
        ("time in training", f"{tqdm.format_interval(seconds)} without validation, checkpoints and samples"),
        ("images per second", f"{images / seconds:.4g} on {last['ranks']} rank{'s' if last['ranks'] > 1 else ''}"),
        ("share of it spent waiting for data", f"{waited:.1%}"),
        ("model FLOPs per second", NOTHING if flops is None else tqdm.format_sizeof(flops, "FLOP/s", 1000)),
        ("model FLOPs utilisation", NOTHING if mfu is None else f"{mfu:.1%}"),
        ("peak memory of a rank", NOTHING if memory is None else tqdm.format_sizeof(memory, "B", 1024)),
        ("steps left out, gradient not finite", str(last["bad_steps"])),
        ("time to the end", NOTHING if to_end is None else tqdm.format_interval(to_end)),
    ]


def _mean_over_time(steps: list[dict[str, Any]], key: str) -> float | None:
    known = [(record[key], record["seconds"]) for record in steps if record[key] is not None]
    return sum(value * time for value, time in known) / sum(time for _, time in known) if known else None


def _unets(records: RunRecords) -> str:
    from .training_plots import unet_numbers

    facts = records.starts[-1]["unets"] if records.starts else {}
    rows = []
    for number in unet_numbers(records.steps, "unets") or sorted(facts, key=int):
        fact = facts.get(number, {})
        losses = [record["losses"].get(number) for record in records.validations]
        known = [
            (loss, record["step"]) for loss, record in zip(losses, records.validations, strict=True) if loss is not None
        ]
        best = min(known, default=None)
        last = records.steps[-1]["unets"].get(number, {}).get("loss") if records.steps else None
        rows.append(
            (
                number,
                f"{fact['image_size']}×{fact['image_size']}" if "image_size" in fact else NOTHING,
                f"{fact['parameters']:,}" if "parameters" in fact else NOTHING,
                NOTHING if (flops := fact.get("flops_per_image")) is None else tqdm.format_sizeof(flops, "FLOP"),
                _number(last),
                NOTHING if best is None else f"{_number(best[0])} at step {best[1]:,}",
            )
        )
    header = ("U-Net", "pixels", "parameters", "FLOPs an image", "last training loss", "best validation loss")
    return _table(rows, header)


def _grids(records: RunRecords, directory: Path) -> str:
    """The last sample grids, and some from the way there."""
    there = [(record["step"], directory / record["file"]) for record in records.samples]
    there = [(step, file) for step, file in there if file.is_file()]
    if not there:
        return ""
    count = min(MOST_GRIDS, len(there))
    places = sorted({round(place * (len(there) - 1) / max(1, count - 1)) for place in range(count)}, reverse=True)
    shown = [there[place] for place in places] if count > 1 else there[-1:]
    pictures = [f"<h3>after step {step:,}</h3>{_image(file, f'samples after step {step}')}" for step, file in shown]
    left_out = len(there) - len(shown)
    note = f"<p>{left_out} more in {html.escape(there[0][1].parent.name)}.</p>" if left_out else ""
    return "<h2>Samples</h2>" + "".join(pictures) + note


def _events(records: RunRecords) -> list[tuple[str, str, str]]:
    shown = records.events[-MOST_EVENTS:]
    rows = [(_moment(event["time"]), f"{event['step']:,}", str(event["text"])) for event in shown]
    if len(shown) < len(records.events):
        rows.insert(0, ("", "", f"{len(records.events) - len(shown)} earlier ones"))
    return rows


def _starts(records: RunRecords) -> list[tuple[str, ...]]:
    return [
        (
            _moment(start["time"]),
            f"{start['step']:,}",
            str(start["ranks"]),
            ", ".join(f"{name} {value}" for name, value in start["machine"].items() if value is not None),
            ", ".join(f"{name} {value}" for name, value in start["versions"].items() if value is not None),
        )
        for start in records.starts
    ]


# Pieces of HTML


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] | None = None) -> str:
    lines = [_row(row, "td") for row in rows]
    if not lines:
        return ""
    head = [] if header is None else [_row(header, "th")]
    return "<table>\n" + "\n".join([*head, *lines]) + "\n</table>"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _image(file: Path, title: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<p><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></p>'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4g}"


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, tz=timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
