"""`minimagen-fast train` on several processes: started by torchrun, stopped, continued, and when a process is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rank_processes import start_ranks
from training_runs import state_of

from minimagen_fast import cli, shapes
from minimagen_fast.generate import load_minimagen, load_params
from minimagen_fast.ranks import RankLost
from minimagen_fast.run_directory import remove_attempt
from minimagen_fast.tiny_t5 import embedded_t5_directory
from minimagen_fast.train_command import DIVERGED, RANK_LOST
from minimagen_fast.training import create_directory, get_minimagen_parser, save_training_info

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"dim": 8, "dim_mults": [1, 2], "num_resnet_blocks": 1, "layer_attns": False, "layer_cross_attns": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of captioned pictures, their captions, and a description of a small cascade."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    kinds = product(list(shapes.COLORS)[:4], list(shapes.SHAPES)[:3], list(shapes.BACKGROUNDS)[:2])
    for number, kind in enumerate(kinds):
        shapes.draw(*kind, 32, rng).save(folder / "pictures" / f"{number:02d}.png")
        (folder / "pictures" / f"{number:02d}.txt").write_text(shapes.caption(*kind))
    args = get_minimagen_parser().parse_args(["-t5", "t5_tiny", "-mw", "32", "-s", "16", "-t", "25"])
    unets = [SMALL, {**SMALL, "lowres_cond": True}]
    save_training_info(args, "1", unets, {"image_sizes": [8, 16]}, 0.0, create_directory(folder / "model"))
    words = ["encode-captions", "--DATA", str(folder / "pictures"), "--OUT", str(folder / "captions")]
    assert cli.main([*words, "-t5", "t5_tiny", "-mw", "32"]) == 0
    return folder


def command(data, out, *further):
    words = ["train", "-p", str(data / "model" / "parameters"), "--DATA", str(data / "pictures")]
    words += ["--CAPTIONS", str(data / "captions"), "-t5", "t5_tiny", "-mw", "32", "-s", "16", "-t", "25", "-b", "4"]
    return [*words, "-f", "0.84", "--OUT", str(out), "--DEVICE", "cpu", *further]


def call(words, folder):
    """What a rank does in these tests: the command, with what it says on stderr kept in a file."""
    with open(folder / f"stderr_{os.environ['RANK']}", "w", buffering=1) as file:
        sys.stderr = file
        os._exit(cli.main(words))


def said(folder, rank):
    return (folder / f"stderr_{rank}").read_text()


def when_trained(folder, processes, batches=1):
    """Waits until some batches are done; an epoch is a few of them."""
    progress = folder / "run" / "checkpoints" / "latest"
    while not progress.exists():
        assert all(process.is_alive() for process in processes), said(folder, 0) + said(folder, 1)
        time.sleep(0.02)


def test_under_torchrun_on_a_captioned_folder_with_encoded_captions(data, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINIMAGEN_FAST_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", "1", "--monitor-interval", "0.05"]
    words = command(data, tmp_path / "run", "-e", "8", "--PARALLEL", "fsdp", "--EMA_DECAY", "0.9", "-ai", "2")
    words += ["--WARMUP_STEPS", "2", "--LR_SCHEDULE", "cosine", "--MIN_SNR_GAMMA", "5", "--CHECKPOINT_LEVELS", "0"]
    run = tmp_path / "run"
    with open(tmp_path / "said", "w") as file:
        process = subprocess.Popen(
            [*torchrun, "-m", "minimagen_fast", *words], env=environment, cwd=tmp_path, stdout=file, stderr=file
        )
    # A process is lost after the first epoch; torchrun starts both again, and they go on.
    while not (run / "checkpoints" / "latest").exists():
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait() == 0, (tmp_path / "said").read_text()
    assert "20 pictures, on 2 ranks (cpu)" in (tmp_path / "said").read_text()
    assert not (tmp_path / "cache").exists(), "no text encoder was needed"
    assert json.loads((run / "ended.json").read_text()) == {"why": "done", "step": 24, "epoch": 8}
    config = json.loads((run / "config.json").read_text())
    assert (config["batch_size"], config["ranks"], config["parallel"], config["unet_number"]) == (4, 2, "fsdp", 1)
    state = state_of(run)
    assert state["position"]["step"] == 24 and state["lr_scheduler"]["state"]["last_epoch"] == 24
    assert any(name.startswith("averages.1.") for name in state["tensors"])
    assert load_minimagen(run).image_sizes == (8, 16)

    # The same command goes on, on one process.
    words[words.index("-e") + 1] = "9"
    for flag in ("--PARALLEL",):
        del words[words.index(flag) : words.index(flag) + 2]
    assert cli.main([*words, "--UNET", "1"]) == 0
    assert state_of(run)["position"]["step"] == 27
    assert (run / "training_progess.txt").read_text().count("Continuing") == 2


@pytest.mark.parametrize("to", [0, 1])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(data, tmp_path, to):
    words = command(data, tmp_path / "run", "-e", "10000", "-cn", "2")
    processes = start_ranks(call, 2, words, tmp_path)
    when_trained(tmp_path, processes)
    os.kill(processes[to].pid, signal.SIGTERM)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [75, 75], said(tmp_path, 0) + said(tmp_path, 1)
    ended = json.loads((tmp_path / "run" / "ended.json").read_text())
    assert ended["why"] == "stopped"
    assert state_of(tmp_path / "run")["position"]["step"] == ended["step"]


def test_a_lost_rank_is_said_and_the_training_can_go_on(data, tmp_path):
    words = command(data, tmp_path / "run", "-e", "10000", "-cn", "2")
    processes = start_ranks(call, 2, words, tmp_path)
    when_trained(tmp_path, processes)
    processes[1].kill()
    processes[0].join()
    assert processes[0].exitcode == RANK_LOST, said(tmp_path, 0)
    message = said(tmp_path, 0)
    assert "rank 0: another process of this training has gone" in message and "--OUT" in message
    step = state_of(tmp_path / "run")["position"]["step"]
    assert step >= 2

    words[words.index("-e") + 1] = "1"
    assert cli.main([*words, "--UNET", "1"]) == 0, "there is nothing left to train, but it is taken up"
    assert state_of(tmp_path / "run")["position"]["step"] >= step


def test_a_lost_rank_ends_the_process_though_a_checkpoint_waits_for_it(data, tmp_path, monkeypatch, capsys):
    def lost(*_):
        raise RankLost("it has gone")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr("minimagen_fast.train_command._train", lost)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as end:
        cli.main(command(data, tmp_path / "run"))
    assert end.value.code == RANK_LOST and "it has gone. The last checkpoint is whole" in capsys.readouterr().err


class Poisoned:
    """Pictures of which some are not a number."""

    def __init__(self, dataset, every):
        self.dataset, self.every = dataset, every

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        item = dict(self.dataset[index])
        if index % self.every == 0:
            item["image"] = item["image"] * float("nan")
        return item


@pytest.fixture
def poisoned(monkeypatch):
    def with_every(every):
        from minimagen_fast import train_command

        opened = train_command.open_data

        def poisoning(args):
            train, valid = opened(args)
            return Poisoned(train, every), valid

        monkeypatch.setattr(train_command, "open_data", poisoning)

    return with_every


def test_steps_without_finite_gradients_are_left_out_and_counted(data, tmp_path, poisoned):
    poisoned(20)  # one picture, in one of five batches
    words = command(data, tmp_path / "run", "-e", "1", "--UNET", "1")
    assert cli.main(words) == 0
    assert "1 optimizer steps whose gradients were not finite" in (tmp_path / "run/training_progess.txt").read_text()
    state = state_of(tmp_path / "run")
    assert state["bad_steps"] == 1 and state["position"]["step"] == 5
    assert all(value.isfinite().all() for value in state["tensors"].values() if value.is_floating_point())
    steps = {value.item() for name, value in state["tensors"].items() if name.startswith("optimizer.step.")}
    assert steps == {4.0}, "Adam has not counted it either"


def test_too_many_of_them_end_the_training_with_the_ids_and_a_checkpoint(data, tmp_path, poisoned, capsys):
    poisoned(1)
    words = command(data, tmp_path / "run", "-e", "3", "--UNET", "1", "--MAX_BAD_STEPS", "4")
    before = torch.get_rng_state()
    assert cli.main(words) == DIVERGED
    torch.set_rng_state(before)
    message = capsys.readouterr().err
    assert "gradients of the last 4 optimizer steps were not finite" in message and "Traceback" not in message
    ids = [int(word.strip("[],;")) for word in message.split("these batches: ")[1].split() if word[0] in "[0123456789"]
    assert len(ids) == 16 and set(ids) <= set(range(24))
    state = state_of(tmp_path / "run")
    assert state["position"]["step"] == state["bad_steps"] == 3, "the last one is left to the next start"


def kinds(run):
    return [json.loads(line)["kind"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_it_is_logged_and_sampled(data, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    words = command(
        data, tmp_path / "run", "-e", "2", "--EMA_DECAY", "0.5", "--LOG_INTERVAL", "3", "--SAMPLE_STEPS", "3"
    )
    before = torch.get_rng_state()
    assert cli.main([*words, "--SAMPLE_INTERVAL", "4", "--SAMPLE_PROMPTS", str(prompts)]) == 0
    assert [kind for kind in kinds(tmp_path / "run") if kind != "event"] == [
        *("start", "step", "samples", "validation", "step", "samples", "step", "validation", "step")
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "step_000000004.png",
        "step_000000008.png",
    ]
    # Looking on changes nothing.
    words[words.index("--OUT") + 1] = str(tmp_path / "unseen")
    words[words.index("--LOG_INTERVAL") + 1] = "1000"
    assert cli.main(words) == 0
    states = [state_of(tmp_path / name)["tensors"] for name in ("run", "unseen")]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    torch.set_rng_state(before)


def test_a_super_resolution_u_net_alone_enlarges_validation_pictures(data, tmp_path, capsys):
    words = command(data, tmp_path / "run", "-e", "1", "--UNET", "2", "--SAMPLE_INTERVAL", "5", "--SAMPLE_STEPS", "2")
    assert cli.main(words) == 0
    with Image.open(tmp_path / "run" / "samples" / "step_000000005.png") as grid:
        assert grid.width > 32
    assert cli.main([*words, "--SAMPLE_PROMPTS", "prompts.txt"]) == cli.MISUSED
    assert "enlarges validation pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    "further, message",
    [
        (["--UNET", ""], "--UNET must be a number from 1 to 2, or all; got ''"),
        (["--UNET", "3"], "--UNET must be a number from 1 to 2, or all; got '3'"),
        (["--UNET_LRS", "1e-3"], "--UNET_LRS must be 2 numbers"),
        (["--CHECKPOINT_LEVELS", "a"], "--CHECKPOINT_LEVELS must be numbers"),
        (["--LR_SCHEDULE", "cosine", "--WARMUP_STEPS", "1000"], "more than the 1000 of the warm-up"),
        (["--EMA_DECAY", "1"], "ema_decay must lie in"),
        (["--MIN_SNR_GAMMA", "0"], "min_snr_gamma must be positive"),
        (["-b", "100"], "less than one batch of 100"),
        (["--LOG_INTERVAL", "0"], "LOG_INTERVAL must be at least 1"),
        (["--SAMPLE_INTERVAL", "1", "--SAMPLE_PROMPTS", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--WEIGHT_DECAY", "-1"], "WEIGHT_DECAY must be at least 0"),
        (["-lr", "inf"], "learning rates must be positive and finite, got {1: inf, 2: inf}"),
        (["--UNET_LRS", "1e-3,nan"], "learning rates must be positive and finite, got {2: nan}"),
        (["--SAMPLE_STEPS", "0"], "SAMPLE_STEPS must be at least 1, got 0"),
        (["--SAMPLE_COND_SCALE", "nan"], "SAMPLE_COND_SCALE must be finite, got nan"),
        (["--SAMPLE_COND_SCALE", "1e39"], "SAMPLE_COND_SCALE must be finite as float32"),
        (["--SEED", str(10**30)], "--SEED must be a whole number below 2^64"),
        (["--RANK_TIMEOUT", "inf"], "RANK_TIMEOUT must be finite, got inf"),
        (["--RANK_TIMEOUT", "0"], "RANK_TIMEOUT must be more than 0 seconds, at most 1e+09, got 0.0"),
        (["--DEVICE", "meta"], "--DEVICE 'meta' cannot be used here"),
        (["--TOTAL_STEPS", "0"], "TOTAL_STEPS must be at least 1, got 0"),
        (["-ai", "0"], "ACCUM_ITER must be a whole number of at least 1, got 0"),
        (["-cn", "0"], "CHCKPT_NUM must be a whole number of at least 1, got 0"),
        (["-e", "-1"], "EPOCHS must be a whole number of at least 0, got -1"),
        *((["--PEAK_TFLOPS", value], "PEAK_TFLOPS must be positive and finite") for value in ("0", "nan", "inf")),
    ],
)
def test_wrong_arguments_are_one_line(data, tmp_path, capsys, further, message):
    assert cli.main(command(data, tmp_path / "run", *further)) == cli.MISUSED
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_the_same_weights_whatever_the_learning_rates_of_other_unets(data, tmp_path):
    both = command(data, tmp_path / "both", "-e", "1", "--UNET_LRS", "1e-3,1e-4", "--MAX_GRAD_NORM", "1e9")
    one = command(data, tmp_path / "one", "-e", "1", "--UNET", "2", "-lr", "1e-4", "--MAX_GRAD_NORM", "1e9")
    assert cli.main(both) == 0 and cli.main(one) == 0
    files = [torch.load(tmp_path / name / "tmp" / "unet_1_tmp.pth", weights_only=True) for name in ("both", "one")]
    for name, value in files[0].items():
        torch.testing.assert_close(value, files[1][name], rtol=0, atol=1e-6)


# The same command again, and not quite the same


@pytest.fixture
def started(data, tmp_path):
    """The words of a command that has trained for an epoch."""
    words = command(data, tmp_path / "run", "-e", "1", "--UNET", "1", "-lr", "1e-3")
    assert cli.main(words) == 0
    return words


def test_of_one_u_net_it_is_said_how_to_come_to_a_cascade(capsys, started, tmp_path):
    said = capsys.readouterr().out
    assert f"minimagen-fast export {tmp_path / 'run'} DIR --OUT FOLDER" in said and "minimagen-fast sample" not in said


def changed(words, **flags):
    words = list(words)
    for flag, value in flags.items():
        words[words.index(f"-{flag}") + 1] = value
    return words


def test_what_a_training_keeps_is_named_where_the_command_line_differs(started, tmp_path, capsys):
    assert cli.main([*changed(started, e="2", lr="1e-2", mw="16", t="30")]) == 0
    said = capsys.readouterr().err
    assert "--OPTIM_LR 0.01 is ignored: the training goes on with [0.001], as it began" in said
    assert f"--MAX_NUM_WORDS 16 is ignored: in {tmp_path / 'run'} it is 32" in said
    assert "--TIMESTEPS 30 is ignored" in said and "T5_NAME" not in said and "PARAMETERS" not in said
    assert json.loads((tmp_path / "run" / "config.json").read_text())["learning_rates"] == [1e-3]
    assert {group["lr"] for group in state_of(tmp_path / "run")["optimizer"]["groups"]} == {1e-3}
    assert cli.main(changed(started, e="2")) == 0
    assert "is ignored" not in capsys.readouterr().err
    assert cli.main(changed(started, p="elsewhere")) == 0
    assert "--PARAMETERS elsewhere is ignored" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [{"b": "2"}, {"f": "0.5"}])
def test_other_batches_between_epochs_are_named(started, tmp_path, capsys, flags):
    assert cli.main(changed(started, e="2", **flags)) == 0
    said = (tmp_path / "run" / "training_progess.txt").read_text()
    assert re.search(r"From here on an epoch has (?!5 )\d+ batches, before it had 5:", said)


def test_it_goes_on_where_latest_was_deleted_and_says_what_else_is_ignored(started, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    words = changed(started, e="2")
    del words[words.index("-p") : words.index("-p") + 2]
    assert cli.main([*words, "-rd", str(tmp_path / "other")]) == 0
    assert state_of(tmp_path / "run")["position"]["step"] == 10
    assert f"--RESTART_DIRECTORY {tmp_path / 'other'} is ignored" in capsys.readouterr().err


def lines(folder, kind):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def test_a_cosine_ends_with_the_training_also_where_batches_become_larger(started, tmp_path, capsys):
    words = [*changed(started, b="2"), "--LR_SCHEDULE", "cosine", "--LOG_INTERVAL", "1"]
    words[words.index("--OUT") + 1] = str(tmp_path / "cosine")
    assert cli.main(words) == 0 and "cosine" not in capsys.readouterr().err
    assert cli.main(changed(words, b="4", e="2")) == 0
    assert "the cosine schedule ends at step 15 now, before it was to at 10" in capsys.readouterr().err
    rates = [record["learning_rates"][0] for record in lines(tmp_path / "cosine", "step")]
    assert len(rates) == 15 and rates[11:] == sorted(rates[11:], reverse=True) and rates[-1] > 0
    assert state_of(tmp_path / "cosine")["optimizer"]["groups"][0]["lr"] == 0


def test_the_time_to_the_end_is_that_of_the_training_and_not_of_its_schedule(data, tmp_path):
    words = command(data, tmp_path / "run", "-e", "1", "--UNET", "1", "--LOG_INTERVAL", "1")
    assert cli.main([*words, "--LR_SCHEDULE", "cosine", "--TOTAL_STEPS", "2"]) == 0
    assert [record["seconds_to_end"] > 0 for record in lines(tmp_path / "run", "step")] == [True] * 4 + [False]


def test_with_another_weight_of_timesteps_the_best_begin_anew(started, tmp_path):
    assert cli.main([*changed(started, e="2"), "--MIN_SNR_GAMMA", "0.1"]) == 0
    said = (tmp_path / "run" / "training_progess.txt").read_text()
    assert "validation is with {'min_snr_gamma': 0.1}, before it was with {'min_snr_gamma': None}" in said
    assert cli.main(changed(started, e="3")) == 0, "whose losses are larger"
    [best] = (tmp_path / "run" / "state_dicts").iterdir()
    best, last = (torch.load(file, weights_only=True) for file in (best, tmp_path / "run" / "tmp" / "unet_0_tmp.pth"))
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_without_a_number_the_u_nets_are_those_that_it_trains(started, tmp_path):
    words = changed(started, e="2")
    del words[words.index("--UNET") : words.index("--UNET") + 2]
    assert cli.main(words) == 0
    assert state_of(tmp_path / "run")["unet_numbers"] == [1]


@pytest.mark.parametrize("content", ["[]", "["])
def test_a_config_that_holds_no_settings_is_named(started, tmp_path, capsys, content):
    (tmp_path / "run" / "config.json").write_text(content)
    assert cli.main(started) == cli.MISUSED
    assert re.search(r"config.json (must hold an object|is not valid JSON).* restore it", capsys.readouterr().err)


def test_where_no_step_was_made_the_command_line_counts(data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("minimagen_fast.trainer.Trainer._train_batch", lambda *_: (_ for _ in ()).throw(OSError("no T5")))
        assert cli.main(changed(command(data, tmp_path / "run", "-e", "1"), t="30")) == cli.MISUSED
    assert state_of(tmp_path / "run")["position"]["step"] == 0
    assert cli.main(command(data, tmp_path / "run", "-e", "1")) == 0
    assert "is ignored" not in capsys.readouterr().err
    assert load_minimagen(tmp_path / "run").noise_schedulers[0].num_timesteps == 25


def test_of_an_attempt_without_a_step_nothing_is_left_to_other_parameters(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("minimagen_fast.trainer.Trainer._train_batch", lambda *_: (_ for _ in ()).throw(OSError("no T5")))
        assert cli.main(command(data, run, "-e", "1")) == cli.MISUSED
    other = run / "state_dicts" / "unet_0_state_1.pth"
    other.write_bytes(b"of another training")
    (run / "parameters" / "notes.json").write_text("{}")
    before = sorted(run.rglob("*"))
    remove_attempt(run)
    assert sorted(run.rglob("*")) == before, "it may be the other's too"

    other.unlink()
    args = get_minimagen_parser().parse_args(["-t5", "t5_tiny", "-mw", "32", "-s", "16", "-t", "25"])
    save_training_info(args, "1", [SMALL], {"image_sizes": [16]}, 0.0, create_directory(tmp_path / "one"))
    assert cli.main(changed(command(data, run, "-e", "1"), p=str(tmp_path / "one" / "parameters"))) == 0
    assert len(list((run / "parameters").iterdir())) == 4 and (run / "parameters" / "notes.json").is_file()
    assert [file.name for file in (run / "tmp").iterdir()] == ["unet_0_tmp.pth"]
    assert not (run / "checkpoints" / "step_000000000").exists() and len(load_minimagen(run).unets) == 1


def test_parameters_of_more_u_nets_that_a_kill_has_left_are_not_mixed_with_others(data, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(data / "model", run)
    (run / "checkpoints").mkdir()
    (run / "tmp" / "unet_1_tmp.pth").write_bytes(b"killed before its first checkpoint was whole")
    before = contents(run)
    args = get_minimagen_parser().parse_args(["-t5", "t5_tiny", "-mw", "32", "-s", "16", "-t", "25"])
    save_training_info(args, "2", [SMALL], {"image_sizes": [16]}, 0.0, create_directory(tmp_path / "one"))
    words = changed(command(data, run, "-e", "1"), p=str(tmp_path / "one" / "parameters"))
    assert cli.main(words) == cli.MISUSED
    assert f"{run / 'parameters'} is of more U-Nets than these 1" in capsys.readouterr().err
    assert {path: content for path, content in contents(run).items() if path.name != ".lock"} == before


def test_no_picture_that_can_be_used_is_an_error_and_makes_no_best_weights(data, tmp_path, capsys):
    shutil.copytree(data / "pictures", tmp_path / "pictures")
    for picture in (tmp_path / "pictures").glob("*.png"):
        picture.write_bytes(b"not a picture")
    words = command(data, tmp_path / "run", "-e", "2")
    words[words.index("--DATA") + 1] = str(tmp_path / "pictures")
    assert cli.main(words) == cli.MISUSED
    said = capsys.readouterr()
    assert "no step could be made in 2 epochs" in said.err and "Done" not in said.out
    assert not list((tmp_path / "run" / "state_dicts").iterdir())


def test_a_folder_with_exported_weights_is_not_trained_in(started, data, tmp_path, capsys):
    assert (
        cli.main(["export", str(tmp_path / "run"), "--UNET", f"2={tmp_path / 'run'}", "--OUT", str(tmp_path / "out")])
        == 0
    )
    before = sorted((tmp_path / "out").rglob("*"))
    assert cli.main(command(data, tmp_path / "out", "-e", "1")) == cli.MISUSED
    assert "out holds exported weights" in capsys.readouterr().err
    assert sorted((tmp_path / "out").rglob("*")) == before


def without(words, flag):
    place = words.index(flag)
    return [*words[:place], *words[place + 2 :]]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_where_there_is_no_checkpoint_the_weights_are_taken(started, data, tmp_path, capsys):
    first = tmp_path / "run"
    shutil.rmtree(first / "checkpoints")
    words = [*without(command(data, tmp_path / "second", "-e", "0"), "-p"), "-rd", str(first)]
    assert cli.main(words) == 0
    [best] = (first / "state_dicts").glob("unet_0_*.pth")
    assert f"{first} has no checkpoint: the training starts with its weights (state_dicts/{best.name}," in (
        capsys.readouterr().err
    )
    for number, file in enumerate((best, first / "tmp" / "unet_1_tmp.pth")):
        here, there = (
            torch.load(path, weights_only=True) for path in (tmp_path / "second" / f"tmp/unet_{number}_tmp.pth", file)
        )
        assert all(torch.equal(value, there[name]) for name, value in here.items())

    for folder in ("tmp", "state_dicts"):
        shutil.rmtree(first / folder)
    assert cli.main([*without(words, "--OUT"), "--OUT", str(tmp_path / "third")]) == cli.MISUSED
    assert f"{first} has no weights of U-Net 1" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_weights_without_checkpoints_are_not_written_over(started, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    assert cli.main(started) == cli.MISUSED
    assert f"they would be written over: name another folder. To start from them, add -rd {run}" in (
        capsys.readouterr().err
    )
    assert cli.main([*without(started, "-p"), "-rd", str(run)]) == cli.MISUSED
    (run / "checkpoints").mkdir()
    assert cli.main(started) == cli.MISUSED, "it has ended, so it had one"
    assert contents(run) == before
    # As one that was killed within its first save.
    (run / "ended.json").unlink()
    assert cli.main(started) == 0


def test_a_text_encoder_in_a_folder_is_found_from_anywhere(data, tmp_path, monkeypatch, capsys):
    encoder, run = tmp_path / "my t5", tmp_path / "my run"
    shutil.copytree(embedded_t5_directory(), encoder)
    shutil.copytree(data / "model", tmp_path / "model")
    [file] = (tmp_path / "model" / "parameters").glob("training_*.txt")
    file.write_text(file.read_text().replace("T5_NAME=t5_tiny", "T5_NAME=my t5"))
    monkeypatch.chdir(tmp_path)
    words = without(without(command(tmp_path, run, "-e", "0"), "--CAPTIONS"), "-t5")
    words[words.index("--DATA") + 1] = str(data / "pictures")
    assert cli.main(words) == 0
    assert f"minimagen-fast sample -d '{run}' -c" in capsys.readouterr().out
    assert load_params(run)[1]["text_encoder_name"] == str(encoder)
    assert f"--T5_NAME={encoder}\n" in next((run / "parameters").glob("training_*.txt")).read_text()

    # One that was named in another way, from elsewhere.
    for file in (run / "parameters").iterdir():
        file.write_text(file.read_text().replace(str(encoder), "my_t5"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = [*changed(without(words, "-p"), **{"-OUT": str(tmp_path / "second")}), "-rd", str(run)]
    for refused in (["sample", "-d", str(run), "-c", "a"], ["export", str(run), "--OUT", "out"], again):
        assert cli.main(refused) == cli.MISUSED
        said = capsys.readouterr().err
        assert "'my_t5' is no text encoder and no folder" in said
        assert f"write its absolute path as text_encoder_name in {run}/parameters/imagen_params_*.json" in said
    assert cli.main([*again, "-t5", "../my t5"]) == 0
    assert f"--T5_NAME {encoder} is used in the place of my_t5" in capsys.readouterr().err
    assert load_params(tmp_path / "second")[1]["text_encoder_name"] == str(encoder)


def test_captions_and_prompts_are_encoded_where_it_trains(data, tmp_path, monkeypatch):
    monkeypatch.setattr("minimagen_fast.t5._default_device", lambda: pytest.fail("a CUDA device if there is one"))
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = command(data, tmp_path / "run", "-e", "1", "--UNET", "1", "--SAMPLE_INTERVAL", "4", "--SAMPLE_STEPS", "1")
    assert cli.main([*without(words, "--CAPTIONS"), "--SAMPLE_PROMPTS", str(tmp_path / "prompts.txt")]) == 0


def test_timesteps_of_each_u_net_are_kept_unless_the_command_line_has_others(data, tmp_path):
    model = tmp_path / "model" / "parameters"
    shutil.copytree(data / "model" / "parameters", model)
    values = json.loads((model / "imagen_params_1.json").read_text())
    (model / "imagen_params_1.json").write_text(json.dumps({**values, "timesteps": [30, 20]}))
    words = command(data, tmp_path / "both", "-e", "1")
    words[words.index("-p") + 1] = str(model)
    for out, further, steps in (("both", [], [30, 20]), ("one", ["-t", "22"], [22, 22])):
        words[words.index("--OUT") + 1] = str(tmp_path / out)
        if "-t" in words:
            del words[words.index("-t") : words.index("-t") + 2]
        assert cli.main([*words, *further]) == 0
        assert [diffusion.num_timesteps for diffusion in load_minimagen(tmp_path / out).noise_schedulers] == steps


def test_one_training_at_a_time(started, tmp_path, capsys):
    holding = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    words = [sys.executable, "-c", holding, str(tmp_path / "run" / ".lock")]
    unfinished = [tmp_path / "run" / "tmp" / f".unet_0_tmp.pth.{number}.part" for number in (7, 123456)]
    for path in unfinished:
        path.write_bytes(b"half of the weights")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "1\n"
        assert cli.main(changed(started, e="2")) == cli.MISUSED
        assert f"another training is under way in {tmp_path / 'run'}" in capsys.readouterr().err
        assert all(path.is_file() for path in unfinished), "they may be the other's"
        other.communicate("\n")
    assert cli.main(changed(started, e="2")) == 0, "a lock goes with its process"
    assert not any(path.exists() for path in unfinished), "what a kill has left fills no disk"


def test_files_say_nothing_of_how_it_was_called(started, tmp_path):
    [file] = (tmp_path / "run" / "parameters").glob("training_parameters_*.txt")
    assert "--run=" not in file.read_text() and "--given=" not in file.read_text()
    assert "--MAX_NUM_WORDS=32\n" in file.read_text()
