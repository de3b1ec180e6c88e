"""The command line: train, go on, sample, doctor, and how errors end."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from PIL import Image

from minimagen_fast import cli, kernels, train_command
from minimagen_fast.acceleration import CHOICES, ENVIRONMENT_VARIABLE, resolve
from minimagen_fast.doctor import REQUIRED
from minimagen_fast.generate import load_minimagen
from minimagen_fast.shapes import ShapesDataset

TINY = ["--DATA", "built-in", "--DEVICE", "cpu", "--TESTING"]


@pytest.fixture
def short(monkeypatch):
    """A testing run in seconds: fewer pictures, smaller, one epoch."""

    def parameters(args):
        args.BATCH_SIZE, args.IMG_SIDE_LEN, args.TIMESTEPS, args.TRAIN_VALID_FRAC = 4, 16, 20, 0.9
        return args

    monkeypatch.setattr(train_command, "load_testing_parameters", parameters)


def run(*words):
    return subprocess.run([sys.executable, "-m", "minimagen_fast", *words], capture_output=True, text=True)


def only_directory(path: Path, pattern: str) -> Path:
    (directory,) = path.glob(pattern)
    return directory


def test_train_then_sample(short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *TINY, "-e", "1"]) == 0
    directory = only_directory(tmp_path, "training_*")
    assert str(directory) in capsys.readouterr().out
    assert len(list((directory / "state_dicts").iterdir())) == 2
    assert load_minimagen(directory).text_encoder_name == "t5_tiny"

    captions = tmp_path / "captions.txt"
    captions.write_text("a red circle on black\n\na blue cross on gray\n")
    words = ["sample", "-d", str(directory), "-c", str(captions), "--cond-scale", "2", "--seed", "1", "--device", "cpu"]
    for out in ("first", "second"):
        assert cli.main([*words, "--out", out, "--grid"]) == 0
    first, second = (tmp_path / out / "generated_images" / "image_1.png" for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image, Image.open(tmp_path / "first" / "grid.png") as grid:
        assert image.size == (16, 16) and grid.width > 200

    assert cli.main(["sample", "-d", str(directory), "-c", "a red circle", "--device", "cpu"]) == 0
    assert (only_directory(tmp_path, "generated_images_*") / "captions.txt").read_text() == "a red circle\n"


def test_what_testing_overrides_is_said(short, tmp_path, capsys):
    words = ["-b", "3", "-s", "16", "-lr", "0.1", "--CROP", "center"]
    assert cli.main(["train", *TINY, *words, "--OUT", str(tmp_path / "run")]) == cli.MISUSED
    said = [line for line in capsys.readouterr().err.splitlines() if "ignored" in line]
    assert said == ["minimagen-fast train: --BATCH_SIZE 3 is ignored: with --TESTING it is 4"]


def test_flags_that_do_nothing_are_said(short, tmp_path, capsys):
    # The last ends it before anything is trained.
    words = ["train", *TINY, "--TOTAL_STEPS", "9", "--SAMPLE_PROMPTS", "a.txt", "--UNET_LRS", "a"]
    assert cli.main([*words, "--OUT", str(tmp_path / "run")]) == cli.MISUSED
    said = [line.partition(" is ignored")[0] for line in capsys.readouterr().err.splitlines() if "ignored" in line]
    assert said == ["minimagen-fast train: --SAMPLE_PROMPTS a.txt", "minimagen-fast train: --TOTAL_STEPS 9"]
    assert cli.main([*words, "--LR_SCHEDULE", "cosine", "--SAMPLE_INTERVAL", "5"]) == cli.MISUSED
    assert "ignored" not in capsys.readouterr().err


def test_a_training_goes_on(short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *TINY, "-e", "1"]) == 0
    first = only_directory(tmp_path, "training_*").rename(tmp_path / "before")
    assert cli.main(["train", *TINY, "-e", "2", "-rd", str(first)]) == 0
    second = only_directory(tmp_path, "training_*")
    assert str(first) in (second / "training_progess.txt").read_text()
    assert load_minimagen(second).image_sizes == (8, 16)


def test_parameters_describe_the_model(short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Of how it is run the command says nothing where no flag does.
    with monkeypatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, "checkpoint_levels=1")
        assert cli.main(["train", *TINY, "-e", "1"]) == 0
    first = only_directory(tmp_path, "training_*").rename(tmp_path / "before")
    assert json.loads((first / "config.json").read_text())["checkpoint_levels"] == [1]
    assert cli.main(["train", *TINY, "-e", "1", "-p", str(first / "parameters"), "-t", "22"]) == 0
    imagen = load_minimagen(only_directory(tmp_path, "training_*"))
    assert imagen.noise_schedulers[0].num_timesteps == 20, "testing parameters win, as documented"
    assert len(imagen.unets) == 2


def test_ctrl_c_saves_and_says_where(short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    original, served = ShapesDataset.__getitem__, []

    def interrupted(self, index):
        served.append(index)
        if len(served) > 20:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(ShapesDataset, "__getitem__", interrupted)
    assert cli.main(["train", *TINY, "-e", "1"]) == cli.INTERRUPTED
    directory = only_directory(tmp_path, "training_*")
    shown = capsys.readouterr()
    assert f"--RESTART_DIRECTORY {directory}" in shown.out and "Traceback" not in shown.err
    assert (directory / "checkpoints" / "latest").is_file()


@pytest.mark.parametrize(
    "words, message",
    [
        (["sample", "-d", "nowhere", "-c", "x"], "nowhere"),
        (["sample", "-d", "nowhere", "-c", "captions.txt"], "there is no file captions.txt"),
        (["train", "--DATA", "nowhere", "-t5", "t5_tiny"], "there is no folder"),
        (["train", "--DATA", "built-in", "--DEVICE", "moon"], "--DEVICE 'moon' cannot be used here"),
        (["train", "-rd", "a", "-p", "b"], "not both"),
        (["train", "--DATA", "built-in", "-t5", "t5_tiny", "-f", "2"], "TRAIN_VALID_FRAC must lie between"),
        (["quickstart", "--minutes", "0"], "minutes must be at least"),
        (["quickstart", "--seed", str(10**30)], "--seed must be a whole number below 2^64"),
        (["sample", "-d", "nowhere", "-c", "x", "--seed", str(10**30)], "--seed must be a whole number below 2^64"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == cli.MISUSED
    error = capsys.readouterr().err
    assert message in error and error.startswith("minimagen-fast: error: ") and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("command", ["train --DATA built-in", "encode-captions --DATA built-in --OUT store"])
def test_a_rank_that_is_told_cuda_takes_the_device_of_its_number(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "99")
    assert cli.main([*command.split(), "--DEVICE", "cuda"]) == cli.MISUSED
    assert "--DEVICE 'cuda:99' cannot be used here" in capsys.readouterr().err


def test_captions_are_lines_of_utf8(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_bytes("a\u2028b\x0cc\r\n\r\nd".encode())
    assert cli._captions(str(file)) == ["a\u2028b\x0cc", "d"]
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="captions.txt is not UTF-8 text"):
        cli._captions(str(file))


def test_ctrl_c_while_the_command_is_loaded(monkeypatch, capsys):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupted)
    assert cli.main(["train"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "\nStopped.\n"


def test_ctrl_c_that_foreign_code_swallows_counts_all_the_same(monkeypatch):
    make = cli._parser

    def swallowing(command):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return make(command)

    monkeypatch.setattr(cli, "_parser", swallowing)
    assert cli.main(["doctor"]) == cli.INTERRUPTED


@pytest.fixture(params=["a line", "nothing"])
def gone(request):
    """A pipe whose reader has gone, with a buffer for this."""
    read, write = os.pipe()
    os.close(read)
    buffer = open(write, "wb", buffering=0 if request.param == "nothing" else -1)
    how = {"write_through": True} if request.param == "nothing" else {"line_buffering": True}
    with suppress(BrokenPipeError), io.TextIOWrapper(buffer, **how) as pipe:
        yield pipe


def test_a_reader_that_has_gone_is_no_error(monkeypatch, capsys, gone):
    words = [sys.executable, "-m", "minimagen_fast", "--help"]
    done = subprocess.run(words, stdout=gone, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")

    def printing(args):
        print("something", file=sys.stdout)

    monkeypatch.setattr(cli, "_doctor", printing)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        assert cli.main(["doctor"]) == cli.UNREAD
    assert capsys.readouterr().err == ""

    def failing(args):
        raise BrokenPipeError("a worker has gone")

    monkeypatch.setattr(cli, "_doctor", failing)
    assert cli.main(["doctor"]) == cli.MISUSED
    assert capsys.readouterr().err == "minimagen-fast: error: a worker has gone\n"


def test_letters_that_the_output_cannot_show_are_no_error(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(cli, "_doctor", lambda args: print("bücher/漢") or 0)
    assert cli.main(["doctor"]) == 0
    assert shown.buffer.getvalue() == b"b\\xfccher/\\u6f22\n"


def test_a_grid_of_others_is_not_written_over(tmp_path, capsys):
    (tmp_path / "grid.png").write_text("mine")
    assert cli.main(["sample", "-d", "nowhere", "-c", "a", "--out", str(tmp_path), "--grid"]) == cli.MISUSED
    assert "grid.png is there already: name another --out" in capsys.readouterr().err


def test_the_command_as_a_program():
    assert run("--version").stdout.startswith("minimagen_fast ")
    for words, named in (
        (["--help"], "COMMAND"),
        (["train", "--help"], "--RESTART_DIRECTORY"),
        (["sample", "--help"], "--cond-scale"),
        (["quickstart", "--help"], "--minutes"),
    ):
        shown = run(*words)
        assert shown.returncode == 0 and "usage: minimagen-fast" in shown.stdout and named in shown.stdout
    nothing = run()
    assert nothing.returncode == 2 and "COMMAND" in nothing.stderr


def test_the_doctor_asks_for_what_the_installation_does():
    demands = [one for one in requires("minimagen_fast") if "extra ==" not in one]
    # Triton is asked for on Linux alone.
    assert {re.match(r"[\w-]+", one)[0] for one in demands} | {"triton"} == {*REQUIRED, "triton"}


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    for words in ("torch", "t5_tiny", "cpu:", "cuda", "Kernels: ", "Acceleration of a float32 model on cpu"):
        assert words in report


@pytest.mark.parametrize("missing", ["safetensors.torch", "huggingface_hub"])
def test_the_doctor_says_what_can_be_said_where_something_is_missing(monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "safetensors.torch":
        monkeypatch.delitem(sys.modules, "minimagen_fast.tiny_t5")  # which imports it at the start
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "Kernels: " in report and f"Text encoders: cannot be looked into: import of {missing} halted" in report


def test_the_doctor_goes_on_where_the_choice_of_kernels_is_none(monkeypatch, capsys):
    def refuse():
        raise ValueError("the environment variable must be one of these")

    monkeypatch.setattr(kernels, "implementation", refuse)
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "Kernels: cannot be looked into: the environment variable must be" in report and "Text encoders" in report


def acceleration_on_cpu(capsys):
    """What the doctor says of it: a line for each setting, split into its name, its value and the reason."""
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    section = report.partition("Acceleration of a float32 model on cpu\n")[2].partition("\n\n")[0]
    return report, [line.split(maxsplit=2) for line in section.splitlines()]


def test_the_doctor_gives_the_reason_of_every_setting(monkeypatch, capsys):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    report, lines = acceleration_on_cpu(capsys)
    assert f"{ENVIRONMENT_VARIABLE}: not set" in report
    assert [name for name, *_ in lines] == [*CHOICES, "checkpoint_levels"]
    expected = resolve({}, torch.device("cpu"), torch.float32)
    for name, value, reason in lines:
        assert value == str(getattr(expected, name)) and reason == expected.reasons[name] != ""


def test_the_doctor_says_what_the_environment_has_changed(monkeypatch, capsys):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "precision=bfloat16,checkpoint_levels=1")
    report, lines = acceleration_on_cpu(capsys)
    assert f"{ENVIRONMENT_VARIABLE}: 'precision=bfloat16,checkpoint_levels=1'" in report
    asked = {name: value for name, value, reason in lines if reason == f"asked for in {ENVIRONMENT_VARIABLE}"}
    assert asked == {"precision": "bfloat16", "checkpoint_levels": "(1,)"}


@pytest.mark.parametrize(
    "text, why",
    [("precision=half", "precision must be auto or one of"), ("cuda_graphs=on", "cuda_graphs='on' cannot be had")],
)
def test_the_doctor_says_what_is_wrong_with_the_environment(monkeypatch, capsys, text, why):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, text)
    # Of the CPU alone: where there is a CUDA device the doctor says it of that, too.
    report, (words,) = acceleration_on_cpu(capsys)
    line = " ".join(words)
    assert line.startswith(f"none, models there raise an error: the environment variable {ENVIRONMENT_VARIABLE}")
    assert why in line
    assert "Text encoders" in report, "the report goes on"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--OUT", ""],
        ["train", "--DATA", ""],
        ["train", "--CAPTIONS="],
        ["train", "-rd", ""],
        ["train", "-p", ""],
        ["encode-captions", "--DATA", "pictures", "--OUT", ""],
        ["export", "run", "--OUT", ""],
        ["sample", "-d", "", "-c", "a circle"],
        ["report", ""],
        ["quickstart", "--out", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_folder_one_is_in(words, tmp_path, monkeypatch, capsys):
    """As of a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(words)
    except SystemExit as ended:
        status = ended.code
    assert status == cli.MISUSED
    assert "must not be empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["taken", "taken/inside", "lost"])
@pytest.mark.parametrize(
    "words",
    [
        ["train", "--OUT"],
        ["encode-captions", "--DATA", "built-in", "--OUT"],
        ["export", "run", "--OUT"],
        ["sample", "-d", "nowhere", "-c", "a circle", "--out"],
        ["quickstart", "--out"],
    ],
    ids=" ".join,
)
def test_where_there_is_a_file_no_folder_can_be(words, path, tmp_path, monkeypatch, capsys):
    """Said before data is loaded, or anything made."""
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("mine")
    Path("lost").symlink_to("nothing")
    assert cli.main([*words, path]) == cli.MISUSED
    error = capsys.readouterr().err
    reason = "lost is a link that leads nowhere" if path == "lost" else "taken is a file"
    assert f"{reason}. Name another path" in error and len(error.splitlines()) == 1
    assert sorted(os.listdir()) == ["lost", "taken"] and Path("taken").read_text() == "mine"
