"""Result files read back, reported and drawn."""

import json
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from made_results import FAILURES, REFERENCE_PATH, STARTED, kernels, make_file, networks, record, write
from PIL import Image

from benchmarks.plots import DPI, PICTURES, WIDTH
from benchmarks.reading import read
from benchmarks.report import markdown
from benchmarks.summary import kernel_ratios, losses
from benchmarks.units import (
    digits,
    readable_bytes,
    readable_rate,
    readable_ratio,
    readable_share,
    readable_time,
)
from minimagen_fast import cli


@pytest.fixture
def cpu(tmp_path) -> Path:
    return make_file(tmp_path, "cpu")


@pytest.fixture
def gpu(tmp_path) -> Path:
    return make_file(tmp_path, "gpu")


# Units


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (readable_time(12.34e-6), "12.3 µs"),
        (readable_time(0.9996), "1 s"),
        (readable_time(0.9994e-3), "999 µs"),
        (readable_time(3e-10), "0.3 ns"),
        (readable_time(90), "90 s"),
        (readable_time(550), "9.17 min"),
        (readable_time(4 * 3600), "4 h"),
        (readable_bytes(0), "0 B"),
        (readable_bytes(1536 * 1024), "1.5 MiB"),
        (readable_bytes(2**30 - 1), "1 GiB"),
        (readable_rate(4.283e12, "B"), "4.28 TB/s"),
        (readable_rate(7.9e14, "FLOP"), "790 TFLOP/s"),
        (readable_ratio(2.149), "2.1x"),
        (readable_ratio(9.96), "10x"),
        (readable_ratio(0.987), "0.99x"),
        (readable_ratio(0.999), "1.0x"),
        (readable_share(0.0312), "3.1%"),
        (readable_share(0.0999), "10%"),
        (digits(1234.5), "1230"),
        (digits(0), "0"),
    ],
)
def test_units(shown, expected):
    assert shown == expected


# Reading


def test_what_is_written_is_read(cpu):
    run = read(cpu)
    records = [*networks(), *kernels(("float32",)), *FAILURES]
    assert [case.id for case in run.cases] == [entry.identity.id for entry in records]
    assert (run.profile, run.complete, run.started, run.seconds) == ("cpu", True, STARTED, 83.4)
    assert run.stem == "cpu-2026-11-22-abc1234"
    by_id = {case.id: case for case in run.cases}
    ours = by_id["kernels/group_norm_silu/forward/b1-512x64x64/float32/ours"]
    assert ours.seconds.q1 < ours.seconds.median < ours.seconds.q3 and len(ours.seconds.samples) == 5
    assert ours.times_floor == pytest.approx(1.3)
    assert run.limit_share(ours) == (pytest.approx(1 / 1.3), "bandwidth")
    attention = by_id["kernels/null_key_attention/forward/b8-512x64x64/float32/ours"]
    share, what = run.limit_share(attention)
    assert what == "matrix rate" and share == pytest.approx(attention.flops / attention.seconds.median / 1e11)
    assert ("peer minimagen", "not installed: pip install minimagen") in run.missing


ONE_SECOND = {"median": 1.0, "q1": 1.0, "q3": 1.0, "min": 1.0, "samples": [1.0]}


def changed(file: Path, way: str, value) -> Path:
    content = json.loads(file.read_text())
    *parents, last = [int(word) if word.isdigit() else word for word in way.split(".")]
    place = content
    for word in parents:
        place = place[word]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("way", "value", "message"),
    [
        ("profile", KeyError, "profile is missing"),
        ("complete", 1, "complete must be true or false; it is 1"),
        ("started", "yesterday", "started must be a date and time"),
        ("started", "2026-11-22T12:30:00", "with its time zone"),
        ("seconds", -1, "seconds must be a number of at least 0; it is -1"),
        ("seconds", True, "seconds must be a number"),
        ("machine.type", "tpu", "machine.type must be one of cuda, cpu; it is 'tpu'"),
        ("machine.clocks", {"sm_mhz": "fast"}, "machine.clocks.sm_mhz must be a number"),
        ("software.peers.xformers", 1, "software.peers.xformers must be a string or null"),
        ("ceilings.copy_bytes_per_second", 0, "ceilings.copy_bytes_per_second must be a number above 0"),
        ("ceilings.flops_per_second", {"float32": 1e11}, "ceilings.flops_per_second.bfloat16 must be a number"),
        ("cases", {}, "cases must be a list"),
        ("cases.2", None, "cases[2] must be an object; it is None"),
        ("cases.2.section", "misc", "cases[2].section must be one of sampling-step"),
        ("cases.2.direction", "up", "cases[2].direction must be one of forward, backward, both, or null"),
        ("cases.2.bytes", 1.5, "cases[2].bytes must be a whole number or null; it is 1.5"),
        ("cases.2.launches", -1, "cases[2].launches must be a whole number of at least 0"),
        ("cases.2.seconds", None, "cases[2].seconds must be an object, as the status is 'ok'"),
        ("cases.2.seconds.q1", KeyError, "cases[2].seconds.q1 must be a number above 0; it is None"),
        ("cases.2.seconds.q1", 9.0, "cases[2].seconds must be in the order min, q1, median, q3"),
        ("cases.2.seconds.samples", [], "cases[2].seconds.samples must be a list of at least one number"),
        ("cases.2.seconds.samples", [0.1, "x"], "cases[2].seconds.samples[1] must be a number above 0; it is 'x'"),
        ("cases.2.status", "error", "cases[2].seconds must be null, as the status is 'error'"),
        ("cases.2.floor_by_family.convolution", None, "cases[2].floor_by_family.convolution must be a number"),
        ("cases.2.beside", {"variant": "a"}, "cases[2].beside.seconds is missing"),
        ("cases.2.beside", {"variant": 1, "seconds": ONE_SECOND}, "beside.seconds.samples must be as many as"),
        ("cases.2.extra", [], "cases[2].extra must be an object"),
        ("missing.0.why", KeyError, "missing[0].why is missing"),
        ("schema", 2, "schema is 2, this code reads 1. Use the version of minimagen_fast that wrote"),
        ("schema", KeyError, "schema is None"),
    ],
)
def test_malformed_files_are_refused(cpu, way, value, message):
    with pytest.raises(ValueError) as caught:
        read(changed(cpu, way, value))
    assert str(caught.value).startswith(str(cpu)) and message in str(caught.value)


def test_what_is_no_result_file_is_refused(cpu):
    text = cpu.read_text()
    for broken, message in (
        (text[:-20], "is no JSON file"),
        ("[]", "must be an object"),
        (text.replace("83.4", "NaN"), "NaN stands where a finite number must be"),
    ):
        cpu.write_text(broken)
        with pytest.raises(ValueError, match=message):
            read(cpu)
    failed = changed(write(cpu.parent / "failed.json", FAILURES), "cases.0.reason", None)
    with pytest.raises(ValueError, match=r"cases\[0\].reason must be a string, as the status is 'parity_failed'"):
        read(failed)
    twice = write(cpu.parent / "twice.json", [*kernels(("float32",)), next(kernels(("float32",)))])
    with pytest.raises(ValueError, match=r"cases\[\d+\].id must be the id of no other case"):
        read(twice)


# Report


def section_of(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_open_losses_are_those_beyond_the_noise(tmp_path):
    question = "kernels/q_sample/forward/b1/float32/"
    network = "denoiser/net/forward/b1/float32/"
    file = write(
        tmp_path / "a.json",
        [
            record(question + "ours", 1.0),
            record(question + "twice", 0.5),
            record(question + "a-little", 0.985, noise=1e-4),
            record(question + "noisy", 0.8, noise=0.3),
            record(question + "slower", 2.0),
            record(network + "ours", 4.0),
            record(network + "ours-compiled", 1.0),
            record(network + "original-compiled", 1.25),
            record("ablation/net/forward/b1/float32/ours", 4.0),
            record("ablation/net/forward/b1/float32/reference", 1.0),
        ],
    )
    found = losses(read(file))
    assert [(loss.peer.variant, loss.factor, loss.better and loss.better.variant) for loss in found] == [
        ("original-compiled", pytest.approx(3.2), "ours-compiled"),
        ("twice", pytest.approx(2.0), None),
    ]
    lines = section_of(markdown(read(file), {}), "Open losses").strip().splitlines()
    assert lines[0].startswith("2, ") and "| 3.2x | ours-compiled: 1 s ± 1.0% |" in lines[4]
    assert (
        "| kernels: q_sample, forward, b1, float32 | twice | 500 ms ± 1.0% | 1 s ± 1.0% | 2.0x | nothing |" == lines[5]
    )
    table = section_of(markdown(read(file), {}), "Kernels")
    assert "**0.50x**" in table and "**0.98x**" not in table and "0.98x" in table and "2.0x" in table


def test_samples_taken_in_turn_are_compared_one_by_one(tmp_path):
    words = "training/net/both/b1/float32/"
    # The machine is slowed down more and more; at any one time ours takes half as long.
    slower = (1.0, 2.0, 4.0, 8.0, 16.0)
    beside = "original", [1.1 * seconds for seconds in slower]
    ours = record(words + "ours", 1.0, beside=beside)
    ours.samples = tuple(seconds / 2 for seconds in slower)
    alone = [record(words + "original", 1.0), record(words + "other", 1.0)]
    run = read(write(tmp_path / "a.json", [ours, *alone]))
    own, original, other = run.cases
    assert own.factor(original) == pytest.approx(2.2) and not own.loses_to(original)
    assert own.factor(other) == pytest.approx(0.5)
    assert "| 2.2x | 0.50x |" in section_of(markdown(run, {}), "Training").replace("**", "")
    ours.beside = "original", [0.45 * seconds for seconds in slower]
    own, original, _ = read(write(tmp_path / "b.json", [ours, *alone])).cases
    assert own.loses_to(original)
    (loss,) = losses(read(tmp_path / "b.json"))
    assert loss.peer is not original and loss.peer.variant == "original" and loss.factor == pytest.approx(1 / 0.9)


def test_files_without_samples_in_turn_are_read(cpu):
    content = json.loads(cpu.read_text())
    for case in content["cases"]:
        assert case.pop("beside") is None
    cpu.write_text(json.dumps(content))
    assert read(cpu).cases[0].beside is None


def test_the_report_says_what_there_is(cpu):
    run = read(cpu)
    text = markdown(run, {})
    facts = text.split("## Open losses")[0]
    for words in ("Test CPU", "torch 2.13.0", "triton 3.7.1", "commit abc1234", "2026-11-22", "xformers 0.0.35"):
        assert words in facts
    for words in (
        "copy 20 GB/s",
        "float32 100 GFLOP/s",
        "83.4 s",
        "minimagen not available",
        REFERENCE_PATH,
        " timed, 1 wrong, 1 failed, 1 not",
    ):
        assert words in facts
    assert "Partial" not in text
    assert "| parity_failed | 0.3 away from the reference |" in section_of(text, "Failed")
    assert "TypeError: &lt;lambda&gt; \\| takes none" in section_of(text, "Failed")
    missing = section_of(text, "Not measured")
    assert missing.count("kernels/q_sample/forward/b9/float32/xformers") == 1 and "pip install minimagen" in missing
    sampling, training = section_of(text, "Sampling"), section_of(text, "Training")
    assert "guidance 3" in sampling and "| images/s | time to first image |" in sampling
    step, few = section_of(text, "A step of sampling"), section_of(text, "Few steps")
    assert "| b8-3x64x64 | ours-compiled | 650 ms ± 1.0% | 4.0x | 1.8x | 1.2x | float32 | 31% | memory_format" in step
    assert "| all-timesteps | 4 s ± 1.0% | – | 1 |" in few and "| dpmpp_2m-20 | 800 ms ± 1.0% | 5.0x | 5 |" in few
    assert "against all-timesteps" in few
    assert "| step p50 / p90 / p99 |" in training and "| 500 ms / 610 ms / 700 ms | 7 MiB | 6.5 MiB |" in training
    assert "| peak an image | saved an image |" in training
    denoiser = section_of(text, "Denoiser")
    assert "| 110 ms ± 1.0% | 1.8x | 0.82x" in denoiser.replace("**", ""), "ours, against original and compiled"
    assert "2.8x | 157 MiB | 412 | float32 | 31% | 2.5 s |" in denoiser
    assert "| 80% | 15% | 5.0% |" in denoiser, "the floor by family"
    ablation = section_of(text, "Ablation: one switch more at a time")
    assert re.findall(r"\| (\S+) \| \d+ ms", ablation) == ["reference", "+kernels", "+channels_last", "+bfloat16"]
    assert "| +channels_last | 125 ms ± 1.0% | 1.6x | 0.96x | 4.2x |" in ablation


def test_without_a_floor_there_is_a_dash(tmp_path):
    words = "denoiser/net/forward/b1/float32/"
    file = write(tmp_path / "a.json", [record(words + "ours", 1.0), record(words + "original", 3.0, floor_seconds=1.0)])
    rows = [line for line in markdown(read(file), {}).splitlines() if line.startswith("| ours |")]
    assert rows == ["| ours | 1 s ± 1.0% | 3.0x | – |"]


def test_a_partial_result_is_reported_as_one(tmp_path):
    text = markdown(read(write(tmp_path / "a.json", (), complete=False)), {})
    assert "**Partial result:**" in text and "Nothing of ours was timed beside a peer." in text
    assert section_of(text, "Failed").strip() == "Nothing."


def test_ratios_are_geometric_means(tmp_path):
    words = "kernels/q_sample/forward/{}/float32/{}"
    times = {"b1": (1.0, 2.0), "b8": (1.0, 8.0)}
    records = [
        record(words.format(shape, variant), seconds)
        for shape, both in times.items()
        for variant, seconds in zip(("ours", "reference"), both, strict=True)
    ]
    run = read(write(tmp_path / "a.json", records))
    ((key, by_peer),) = kernel_ratios(run).items()
    assert key == ("q_sample", "forward", "float32", False)
    assert by_peer["reference"].mean == pytest.approx(4.0)
    assert "4.0x (2.0x to 8.0x)" in markdown(run, {})


def test_the_report_beside_the_file(cpu, capsys):
    folder = cpu.parent / "cpu-2026-11-22-abc1234"
    assert cli.main(["bench", "report", str(cpu)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.md")
    text = (folder / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[\w-]+\]\((\S+)\)", text)
    assert sorted(shown) == sorted(f"{name}.png" for name in PICTURES) == sorted(p.name for p in folder.glob("*.png"))
    for name in shown:
        with Image.open(folder / name) as image:
            assert image.width == WIDTH * DPI
            assert len(image.convert("L").getcolors()) > 50

    less = write(cpu.parent / "less.json", networks())
    assert cli.main(["bench", "report", str(less), "--out", str(folder)]) == 0
    assert not (folder / "roofline.png").exists(), "of an earlier report"
    assert "roofline" not in (folder / "report.md").read_text(encoding="utf-8")


# Pictures

# Those that show more there.
SEEN_ON_GPU = [("gpu", "kernels"), ("gpu", "roofline")]


@pytest.mark.parametrize(("device", "name"), [*(("cpu", name) for name in PICTURES), *SEEN_ON_GPU])
def test_no_text_is_over_another_or_cut_off(request, device, name):
    figure = PICTURES[name](read(request.getfixturevalue(device)))
    figure.set_dpi(DPI)
    figure.draw_without_rendering()
    # A hair's breadth of touching is no overlap.
    boxes = [(text, box) for text in texts_of(figure) if (box := text.get_window_extent().padded(-1)).width > 0]
    assert len(boxes) > 5
    for (one, box), (other, other_box) in combinations(boxes, 2):
        apart = box.x1 <= other_box.x0 or other_box.x1 <= box.x0 or box.y1 <= other_box.y0 or other_box.y1 <= box.y0
        assert apart, f"{one.get_text()!r} and {other.get_text()!r}"
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text.get_text()!r} is cut off"
        assert text.get_fontsize() >= 7.5


def texts_of(figure):
    """All text that is drawn; tick labels beyond the ends of an axis are not."""
    from matplotlib.text import Text

    outside = set()
    for ax in figure.axes:
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            low, high = sorted(limits)
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            outside |= {id(t.label1) for t in ticks if not low <= t.get_loc() <= high or not t.label1.get_visible()}
            outside |= {id(t.label2) for t in ticks}
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible() and id(t) not in outside]


def test_every_kernel_is_on_the_roofline(gpu):
    run = read(gpu)
    (left, right) = PICTURES["roofline"](run).axes
    points = [line for ax in (left, right) for line in ax.get_lines() if line.get_linestyle() == "None"]
    assert len(points) == len([q for q in run.questions("kernels") if q.first.graph])


def test_what_is_computed_in_tf32_is_held_to_its_rate(gpu):
    run = read(gpu)
    rates = run.ceilings["flops_per_second"] | {"tf32": 8e11}
    found = next(case for case in run.cases if case.flops and case.seconds and case.dtype == "float32" and case.graph)
    case = replace(found, extra={"computes_in": "tf32"}, bytes=1)
    run = replace(run, cases=(case,), ceilings={**run.ceilings, "flops_per_second": rates})
    assert run.limit_share(case) == (pytest.approx(case.flops / case.seconds.median / 8e11), "matrix rate")
    words = [text.get_text() for text in texts_of(PICTURES["roofline"](run))]
    assert {"tf32: 800 GFLOP/s", "tf32"} <= {*words} and not any("float32" in word for word in words)


@pytest.mark.parametrize("name", PICTURES)
def test_nothing_is_drawn_of_nothing(tmp_path, name):
    assert PICTURES[name](read(write(tmp_path / "a.json", FAILURES))) is None
