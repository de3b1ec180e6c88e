"""The report of a training: every number from the log, every picture in the page."""

import base64
import io
import json
import os
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from test_run_log import record, write

from minimagen_fast.cli import main
from minimagen_fast.training_report import write_training_report

pytest.importorskip("matplotlib")
from minimagen_fast import training_plots  # noqa: E402
from minimagen_fast.run_log import RunRecords  # noqa: E402

PLOTS = ["loss", "validation", "loss_by_timestep", "gradient", "speed", "rate_and_memory"]
UNET = {"parameters": 1234567, "image_size": 64, "timesteps": 25, "flops_per_image": 2_500_000_000}


class Page(HTMLParser):
    """Tables as rows of cells, pictures, text; that every tag is closed."""

    def __init__(self, path):
        super().__init__()
        self.rows, self.pictures, self.text, self.open = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            attrs = dict(attrs)
            data = base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,"))
            self.pictures.append((attrs["alt"], Image.open(io.BytesIO(data))))
        elif tag == "tr":
            self.rows.append([])
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def value(self, name):
        (row,) = [row for row in self.rows if row[0] == name]
        return row[1] if len(row) == 2 else row[1:]


def loss(value, first=None):
    return {"loss": value, "loss_by_timestep": [first, *[value] * 9]}


def trained(folder, steps=40, **values):
    """A log of two parts: stopped after step 30, continued from step 20."""
    folder.mkdir(exist_ok=True)

    def line(step, value):
        unets = {"1": loss(value), "2": loss(2 * value)}
        return record("step", step, **{"unets": unets, "batch": step, **values})

    start = {
        "settings": {"epochs": 3, "name": "<b>bold</b>", "betas": [0.9, 0.99], "seed": None},
        "unets": {"1": UNET, "2": UNET},
    }
    first = [record("start", 0, **start, ranks=2), *(line(step, 9.0) for step in range(2, 31, 2))]
    second = [record("start", 20, **start, ranks=4), *(line(step, 1 / step) for step in range(22, steps + 1, 2))]
    checks = [record("validation", step, losses={"1": 0.5 - step / 100, "2": None}) for step in (10, 20)]
    write(folder / "log.jsonl", *first, *checks, record("event", 30, text="stopped by <SIGTERM> & co"), *second)
    return folder


@pytest.fixture
def words_alone(monkeypatch):
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(training_plots, "draw_all", lambda records, folder: {})


def report(folder):
    return Page(write_training_report(folder, folder / "report"))


@pytest.mark.usefixtures("words_alone")
def test_totals_are_those_of_the_steps_that_count(tmp_path):
    page = report(trained(tmp_path / "run", data_wait_share=0.25, mfu=0.5, seconds_to_end=3725.0, bad_steps=2))
    assert "Training run" in page.text and "at optimizer step 40, is from" in page.text
    assert page.value("optimizer steps") == "40, in epoch 1"
    assert page.value("images trained on") == str(20 * 8), "not those of the steps that were done over"
    assert page.value("time in training").startswith("00:40 ")
    assert page.value("images per second") == "4 on 1 rank"
    assert page.value("share of it spent waiting for data") == "25.0%"
    assert page.value("model FLOPs per second") == "1.00GFLOP/s"
    assert page.value("model FLOPs utilisation") == "50.0%"
    assert page.value("peak memory of a rank") == "1.00GB"
    assert page.value("steps left out, gradient not finite") == "2"
    assert page.value("time to the end") == "1:02:05"
    assert page.value("1") == ["64×64", "1,234,567", "2.50GFLOP", "0.025", "0.3 at step 20"]
    assert page.value("2")[-2:] == ["0.05", "–"]
    assert page.value("epochs") == "3" and page.value("betas") == "[0.9, 0.99]" and page.value("seed") == "null"


@pytest.mark.usefixtures("words_alone")
def test_shares_are_weighed_by_time(tmp_path):
    lines = [record("step", 1, seconds=1.0, data_wait_share=1.0, flops_per_second=4e9, mfu=1.0, memory_bytes=None)]
    lines += [record("step", 2, seconds=3.0, data_wait_share=0.0, flops_per_second=0.0, mfu=0.0, memory_bytes=2**31)]
    lines += [record("step", 3, seconds=6.0, data_wait_share=0.0, flops_per_second=0.0, memory_bytes=2**20)]
    write(tmp_path / "log.jsonl", *lines)
    page = report(tmp_path)
    assert page.value("share of it spent waiting for data") == "10.0%"
    assert page.value("model FLOPs per second") == "400MFLOP/s"
    assert page.value("model FLOPs utilisation") == "25.0%", "where it is known"
    assert page.value("peak memory of a rank") == "2.00GB"
    unknown = {"1": {**UNET, "flops_per_image": None}}
    lines = [record("start", 0, settings={}, unets=unknown), record("step", 1, flops_per_second=None)]
    write(tmp_path / "log.jsonl", *lines)
    page = report(tmp_path)
    assert page.value("model FLOPs per second") == "–" and page.value("1")[2] == "–"


@pytest.mark.usefixtures("words_alone")
def test_what_others_have_written_is_not_taken_for_html(tmp_path):
    page = report(trained(tmp_path / "a <i> run"))
    assert page.value("name") == "<b>bold</b>"
    assert any(row[-1] == "stopped by <SIGTERM> & co" for row in page.rows)
    assert "a <i> run" in page.text


def test_every_plot_is_beside_the_page_and_in_it(tmp_path):
    page = report(trained(tmp_path / "run"))
    files = sorted(file.name for file in (tmp_path / "run" / "report").iterdir())
    assert files == sorted([f"{name}.png" for name in PLOTS] + ["report.html"])
    assert len(page.pictures) == len(PLOTS)
    for name, (_, picture) in zip(PLOTS, page.pictures, strict=True):
        with Image.open(tmp_path / "run" / "report" / f"{name}.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(picture))
            assert image.width > 1000 and np.asarray(image).std() > 5


def test_a_plot_that_has_nothing_to_show_goes(tmp_path):
    trained(tmp_path / "run")
    report(tmp_path / "run")
    write(tmp_path / "run" / "log.jsonl", record("start", 0))
    page = report(tmp_path / "run")
    assert page.pictures == [] and [f.name for f in (tmp_path / "run" / "report").iterdir()] == ["report.html"]
    assert "No step has been logged yet." in page.text


@pytest.mark.usefixtures("words_alone")
def test_sample_grids_are_shown_from_the_last_to_the_first_and_not_all(tmp_path):
    trained(tmp_path)
    (tmp_path / "samples").mkdir()
    for step in range(10, 30):
        Image.new("RGB", (step, 5)).save(tmp_path / "samples" / f"{step}.png")
    lines = [record("samples", step, file=f"samples/{step}.png") for step in range(10, 40)]  # some are gone
    write(tmp_path / "log.jsonl", *lines)
    page = report(tmp_path)
    widths = [picture.width for title, picture in page.pictures if title.startswith("samples")]
    assert widths == [29, 25, 21, 18, 14, 10]
    assert "after step 29" in page.text and "14 more in samples." in page.text


@pytest.mark.usefixtures("words_alone")
def test_one_sample_grid_alone(tmp_path):
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
    write(tmp_path / "log.jsonl", record("samples", 3))
    page = report(tmp_path)
    assert [picture.width for _, picture in page.pictures] == [7] and "more in" not in page.text


@pytest.mark.parametrize("why, words", [("done", "is done"), ("time", "time was up"), ("stopped", "on request")])
@pytest.mark.usefixtures("words_alone")
def test_how_it_ended(tmp_path, why, words):
    trained(tmp_path)
    assert "Under way, or ended without a word." in report(tmp_path).text
    (tmp_path / "ended.json").write_text(json.dumps({"why": why, "step": 40, "epoch": 1}))
    page = report(tmp_path)
    assert words in page.text and "after 40 optimizer steps" in page.text
    before = time.time() - 3600
    os.utime(tmp_path / "ended.json", (before, before))
    assert "Under way" in report(tmp_path).text, "that was the end of an earlier part"
    (tmp_path / "ended.json").write_text('{"why": ["x"], "step": 40}')
    assert 'The training is ["x"], after 40' in report(tmp_path).text
    (tmp_path / "ended.json").write_text('{"why"')
    assert "ended.json cannot be read" in report(tmp_path).text


@pytest.mark.usefixtures("words_alone")
def test_lines_that_could_not_be_read_are_told_of(tmp_path):
    trained(tmp_path)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"kind": "st\n{"kind"')
    assert "1 of its lines could not be read" in report(tmp_path).text
    assert "could not be read" not in report(trained(tmp_path / "whole")).text


@pytest.fixture
def far_away(monkeypatch):
    """Where it is another hour."""
    if not hasattr(time, "tzset"):
        yield
        return
    with monkeypatch.context() as context:
        context.setenv("TZ", "XYZ-9")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("words_alone")
def test_events_and_processes_are_listed(tmp_path, far_away):
    write(tmp_path / "log.jsonl", *(record("event", step, text=f"event {step}") for step in range(250)))
    write(tmp_path / "log.jsonl", record("start", 7, ranks=3, machine={"device": "H", "x": None}, time=0))
    page = report(tmp_path)
    texts = [row[-1] for row in page.rows]
    assert "event 249" in texts and "event 50" in texts and "event 49" not in texts and "50 earlier ones" in texts
    assert ["1970-01-01 00:00:00 UTC", "7", "3", "device H", ""] in page.rows


# Plots


def lines_of(figure, panel=0):
    return {line.get_label(): line for line in figure.axes[panel].lines}


def logged(*values, key="grad_norm", **further):
    steps = [record("step", 10 * place, **{key: value}, **further) for place, value in enumerate(values)]
    return RunRecords(steps=steps)


def test_a_smooth_line_is_the_mean_around_every_point():
    values = np.array([1.0, 3.0, np.nan, 5.0, 100.0, 0.0])
    assert training_plots.smoothed(values, 1).tolist()[:2] == [1.0, 3.0]
    smooth = training_plots.smoothed(values, 3)
    assert smooth.tolist() == [1.0, 2.0, 4.0, 52.5, 35.0, 0.0], "as wide on both sides, and less at the ends"
    assert np.isnan(training_plots.smoothed(np.array([np.nan] * 3), 3)).all()
    assert len(training_plots.smoothed(np.array([]), 3)) == 0


def test_losses_are_drawn_at_their_steps_with_gaps():
    records = RunRecords(steps=[record("step", 10 * n, unets={"2": loss(v)}) for n, v in enumerate((4.0, None, 2.0))])
    line = lines_of(training_plots.draw_loss(records))["U-Net 2"]
    assert line.get_xdata().tolist() == [0, 10, 20]
    np.testing.assert_equal(line.get_ydata(), [4.0, np.nan, 2.0])


def test_long_lines_are_smoothed_and_thinned_out():
    values = np.linspace(9.0, 1.0, 5000) + np.resize([0.5, -0.5], 5000)
    records = RunRecords(steps=[record("step", n, unets={"1": loss(v)}) for n, v in enumerate(values.tolist())])
    figure = training_plots.draw_loss(records)
    faint, smooth = figure.axes[0].lines
    assert len(smooth.get_xdata()) == len(faint.get_xdata()) <= 2000
    assert faint.get_alpha() < 1 and smooth.get_label() == "U-Net 1"
    assert np.abs(smooth.get_ydata() - np.linspace(9.0, 1.0, 5000)[::3]).max() < 0.51
    assert np.abs(np.diff(smooth.get_ydata()[20:-20])).max() < 0.05 < np.abs(np.diff(faint.get_ydata())).max()


def test_validation_losses_are_marked():
    checks = [record("validation", step, losses={"1": step / 10}) for step in (5, 10, 15)]
    line = lines_of(training_plots.draw_validation(RunRecords(validations=checks)))["U-Net 1"]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist(), line.get_marker()) == (
        [5, 10, 15],
        [0.5, 1.0, 1.5],
        "o",
    )


def test_every_tenth_of_the_timesteps_has_a_line_and_every_unet_a_panel():
    unets = {"1": loss(1.0, first=3.0), "2": loss(2.0)}
    figure = training_plots.draw_timesteps(RunRecords(steps=[record("step", n, unets=unets) for n in (1, 2)]))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["U-Net 1", "U-Net 2"]
    lines = lines_of(figure)
    assert list(lines) == [f"{n / 10:.1f}–{(n + 1) / 10:.1f}" for n in range(10)]
    assert lines["0.0–0.1"].get_ydata().tolist() == [3.0, 3.0] and lines["0.9–1.0"].get_ydata().tolist() == [1.0, 1.0]
    assert len({line.get_color().tobytes() for line in lines.values()}) == 10


def test_a_unet_whose_losses_were_never_finite_has_no_panel():
    unets = {"1": loss(1.0), "2": loss(None)}
    figure = training_plots.draw_timesteps(RunRecords(steps=[record("step", n, unets=unets) for n in (1, 2)]))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["U-Net 1"]


def test_steps_that_were_left_out_are_marked_where_they_were():
    steps = [record("step", 10 * n, bad_steps=bad) for n, bad in enumerate((0, 0, 2, 2, 3))]
    marks = [line.get_xdata()[0] for line in training_plots.draw_gradient(RunRecords(steps=steps)).axes[0].lines[1:]]
    assert marks == [20, 40]
    assert len(training_plots.draw_gradient(logged(1.0, 2.0)).axes[0].lines) == 1


def test_speed_and_memory_in_their_units():
    figure = training_plots.draw_speed(logged(0.1, 0.2, key="data_wait_share", images_per_second=12.0))
    assert [lines.lines[0].get_ydata().tolist() for lines in figure.axes] == [[12.0, 12.0], [0.1, 0.2]], "no MFU known"
    assert figure.axes[1].yaxis.get_major_formatter()(0.25, 0) == "25%"
    figure = training_plots.draw_rate_and_memory(logged([0.1, 0.2], [0.3], key="learning_rates"))
    drawn = [ax.lines[0].get_ydata() for ax in figure.axes]
    np.testing.assert_equal([line.tolist() for line in drawn], [[0.1, 0.3], [0.2, np.nan], [1.0, 1.0]])
    assert figure.axes[0].get_title(loc="left") == "learning rate of group 1"


def test_an_axis_is_logarithmic_where_values_differ_much_and_are_positive():
    def scale(*values):
        return training_plots.draw_gradient(logged(*values)).axes[0].get_yscale()

    assert scale(1.0, 10.0) == "log" and scale(1.0, 2.0) == "linear" and scale(0.0, 10.0) == "linear"


def test_a_continuation_is_dotted():
    records = logged(1.0, 2.0)
    records.starts = [record("start", 0), record("start", 10)]
    dotted = [line.get_xdata()[0] for line in training_plots.draw_gradient(records).axes[0].lines[1:]]
    assert dotted == [10]


# The command


def test_the_command_writes_it_where_it_is_told_to(tmp_path, capsys):
    trained(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert f"Look at {tmp_path / 'run' / 'report' / 'report.html'}" in capsys.readouterr().out
    assert (tmp_path / "run" / "report" / "report.html").is_file()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "b" / "c")]) == 0
    assert (tmp_path / "b" / "c" / "loss.png").is_file()
    assert main(["report", str(tmp_path)]) == 2
    assert "name a training directory" in capsys.readouterr().err


def test_without_matplotlib_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    import sys

    trained(tmp_path)
    monkeypatch.delitem(sys.modules, "minimagen_fast.training_plots")
    for name in ("matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'minimagen_fast\[report\]'"):
        write_training_report(tmp_path, tmp_path / "report")
    assert not (tmp_path / "report").exists()
