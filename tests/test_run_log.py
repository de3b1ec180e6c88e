"""The log of a run: whole lines of valid JSON, whatever was killed while writing, and repeated steps only once."""

import json
import math
import time

import pytest

from minimagen_fast.run_log import RunLog, finite, read_run

STEP = {
    "epoch": 0,
    "batch": 1,
    "unets": {"1": {"loss": 0.5, "loss_by_timestep": [0.5] * 10}},
    "grad_norm": 1.0,
    "learning_rates": [1e-4],
    "images": 8,
    "seconds": 2.0,
    "images_per_second": 4.0,
    "seconds_per_step": 2.0,
    "data_wait_share": 0.1,
    "memory_bytes": 2**30,
    "flops_per_second": 1e9,
    "mfu": None,
    "bad_steps": 0,
    "seconds_to_end": 10.0,
    "ranks": 1,
}
START = {"settings": {}, "unets": {}, "ranks": 1, "machine": {}, "versions": {}}
BESIDES = {"step": STEP, "start": START, "validation": {"losses": {"1": 0.5}}, "samples": {"file": "a.png"}}


def record(kind, step, **values):
    return {"kind": kind, "time": time.time(), "step": step, **BESIDES.get(kind, {"text": "said"}), **values}


def write(path, *records):
    log = RunLog(path)
    for entry in records:
        log.append(entry)
    log.close()


def strictly(line):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_every_record_is_a_line_of_valid_json_that_is_there_at_once(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    log.append(record("event", 3, text="two\nlines, ü", folder=tmp_path, values=[math.nan, {"a": -math.inf}, 1.5]))
    (line,) = path.read_text(encoding="utf-8").splitlines()
    read = strictly(line)
    assert read["text"] == "two\nlines, ü" and read["folder"] == str(tmp_path)
    assert read["values"] == [None, {"a": None}, 1.5]
    log.append(record("event", 4))
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    log.close()


def test_what_is_not_finite_becomes_none_and_nothing_else():
    assert finite({1: (math.inf, 0.0, 3, True, "nan", None)}) == {"1": [None, 0.0, 3, True, "nan", None]}


@pytest.mark.parametrize("cut", [1, 20, 2])
def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    write(path, record("step", 1), record("step", 2))
    path.write_bytes(path.read_bytes()[:-cut])
    cut_off = read_run(path)
    # Without its line feed alone a line is whole.
    whole = [1, 2] if cut == 1 else [1]
    assert [entry["step"] for entry in cut_off.steps] == whole and cut_off.unreadable == 0

    write(path, record("step", 3), record("step", 4))
    read = read_run(path)
    assert [entry["step"] for entry in read.steps] == [*whole, 3, 4]
    assert read.unreadable == 2 - len(whole)


def test_lines_that_are_no_records_are_counted(tmp_path):
    path = tmp_path / "log.jsonl"
    incomplete = record("step", 5)
    del incomplete["grad_norm"]
    lines = [
        b"[1]",
        b'"step"',
        b"\0\0\xff",
        b"[" * 100_000,
        json.dumps(incomplete).encode(),
        b'{"kind": "other", "step": 1, "time": 1}',
    ]
    lines += [json.dumps(record("step", 6)).encode(), b"", json.dumps(record("step", "7")).encode()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    read = read_run(path)
    assert [entry["step"] for entry in read.steps] == [6]
    assert read.unreadable == 7


def test_of_repeated_steps_the_last_count(tmp_path):
    path = tmp_path / "log.jsonl"
    first = [record("start", 0), *(record("step", step, grad_norm=1.0) for step in (10, 20, 30, 40))]
    first += [record("validation", 20), record("samples", 20), record("validation", 40), record("samples", 40)]
    write(path, *first, record("event", 40, text="stopped"))
    # Continued from the checkpoint after step 20, with other log steps.
    second = [record("start", 20), record("step", 24, grad_norm=2.0), record("event", 24, text="going on")]
    write(path, *second)
    read = read_run(path)
    assert [(entry["step"], entry["grad_norm"]) for entry in read.steps] == [(10, 1.0), (20, 1.0), (24, 2.0)]
    assert [entry["step"] for entry in read.validations] == [20] == [entry["step"] for entry in read.samples]
    assert [entry["text"] for entry in read.events] == ["stopped", "going on"], "they have happened"
    assert [entry["step"] for entry in read.starts] == [0, 20]
    assert read.last["text"] == "going on"


def test_steps_are_repeated_also_where_no_start_says_so(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, *(record("step", step, epoch=0) for step in (1, 2, 3)), record("step", 2, epoch=1))
    assert [(entry["step"], entry["epoch"]) for entry in read_run(path).steps] == [(1, 0), (2, 1)]


class Disk:
    """A file on a disk with so many free bytes; None: which fails."""

    def __init__(self, file, free):
        self.file, self.free = file, free

    def write(self, data):
        if self.free is None:
            raise OSError(28, "No space left on device")
        return self.file.write(data[: self.free])

    def close(self):
        self.file.close()


@pytest.mark.parametrize("free", [None, 7, 0])
def test_a_full_disk_costs_lines_and_not_the_training(tmp_path, free):
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    log.append(record("step", 1))
    disk = log._file
    log._file = Disk(disk, free)
    with pytest.warns(UserWarning, match="log.jsonl is lost.*training goes on"):
        log.append(record("step", 2))
    log._file = disk
    log.append(record("step", 3))
    log.close()
    assert [entry["step"] for entry in read_run(path).steps] == [1, 3]


def test_a_log_is_named_as_text_or_by_its_training_directory(tmp_path):
    write(tmp_path / "log.jsonl", record("step", 1))
    for name in (tmp_path / "log.jsonl", tmp_path, str(tmp_path / "log.jsonl"), str(tmp_path)):
        assert [entry["step"] for entry in read_run(name).steps] == [1]


def test_without_a_log_it_is_said_what_to_name(tmp_path):
    for name in (tmp_path / "log.jsonl", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="log.jsonl: name a training directory"):
            read_run(name)
    (tmp_path / "log.jsonl").touch()
    assert read_run(tmp_path / "log.jsonl").last is None
