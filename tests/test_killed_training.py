"""Training that is killed without warning, and checkpoints that are damaged or do not fit on the disk."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from rank_processes import start
from training_runs import Pictures, identical, make_imagen, state_of

from minimagen_fast.files import file_digest
from minimagen_fast.loading import ShardedLoader
from minimagen_fast.ranks import Ranks
from minimagen_fast.run_log import read_run
from minimagen_fast.settings import TrainingSettings
from minimagen_fast.snapshots import SnapshotError, Snapshots
from minimagen_fast.stopping import StopRequest, stop_on_signals
from minimagen_fast.trainer import Trainer
from minimagen_fast.watching import Watch

KILLS = 20


def make_trainer(folder, **options):
    imagen = make_imagen()
    optimizer = torch.optim.AdamW(imagen.parameters(), lr=1e-3, fused=True)
    settings = {"epochs": 6, "checkpoint_interval": 1, "seed": 5, "ema_decay": 0.9, "keep_last": 2, "accumulate": 2}
    continued = (folder / "checkpoints" / "latest").is_file()
    given = {name: options.pop(name) for name in ("stop", "callback", "watch", "sample") if name in options}
    return Trainer(
        TrainingSettings(**{**settings, **options}),
        imagen,
        optimizer,
        ShardedLoader(Pictures(16), 2, seed=3),
        ShardedLoader(Pictures(2, seed=2), 2, seed=3, shuffle=False),
        folder,
        timestamp="1",
        lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40),
        restart_directory=folder if continued else None,
        progress=False,
        **given,
    )


def train(folder, **options):
    """Trains in a folder, from where it was left; keeps the losses in a file, so that none is lost."""

    def note(step):
        with open(folder / "losses.txt", "a") as file:
            file.write(f"{step.epoch} {step.batch} {step.loss!r}\n")

    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    return make_trainer(folder, callback=note, **options).run()


def losses(folder):
    """Loss by epoch and batch; every time it was computed it must have been the same."""
    found = {}
    for line in (folder / "losses.txt").read_text().splitlines():
        words = line.split()
        if len(words) == 3:  # a kill may cut the last line
            found.setdefault(tuple(words[:2]), set()).add(float(words[2]))
    assert all(len(values) == 1 for values in found.values())
    return found


def part_of(folder):
    return next((folder / "checkpoints").glob(".step_*.part"), None)


def test_killed_twenty_times_it_ends_with_the_same_losses_and_weights(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (process,) = [start(train, whole)]
    process.join()
    assert process.exitcode == 0
    chance, inside = random.Random(0), 0
    for kill in range(KILLS):
        process = start(train, killed)
        # Half of them while a checkpoint is being written, the others at any moment.
        begun = time.monotonic()
        before = len((killed / "losses.txt").read_text()) if (killed / "losses.txt").is_file() else 0
        while process.is_alive() and time.monotonic() - begun < 60:
            moved = (killed / "losses.txt").is_file() and len((killed / "losses.txt").read_text()) > before
            if moved and (kill % 2 or part_of(killed)):
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        inside += part_of(killed) is not None
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
    (process,) = [start(train, killed)]
    process.join()
    assert process.exitcode == 0
    assert inside >= 3, "too few of the kills fell into a save"
    assert losses(killed) == losses(whole)
    ends = [state_of(folder) for folder in (killed, whole)]
    for part in ("tensors", "optimizer", "averages", "lr_scheduler", "best_losses", "position"):
        assert identical(ends[0][part], ends[1][part]), part
    for name in ("tmp/unet_0_tmp.pth", "state_dicts/unet_0_state_1.pth"):
        assert identical(*(torch.load(folder / name, weights_only=True) for folder in (killed, whole)))


@pytest.fixture
def snapshots(tmp_path):
    return Snapshots(tmp_path / "checkpoints", Ranks(), keep_last=3)


def saved_steps(snapshots, *steps):
    for step in steps:
        snapshots.save(step, {"weight": torch.full((1000,), float(step))}, {"step": step}, {"rank": 0})
    snapshots.finish()


def weight(saved):
    tensors = {"weight": torch.zeros(1000)}
    saved.read_into(tensors, Ranks())
    return tensors["weight"][0].item()


@pytest.mark.parametrize("file", ["*.distcp", ".metadata", "values.pth", "rank_00000.pth", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(snapshots, file, damage):
    saved_steps(snapshots, 1, 2)
    (path,) = (snapshots.folder / "step_000000002").glob(file)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else flipped)
    if (file, damage) == ("manifest.json", "changed"):  # a digest is another one
        assert path.read_bytes() != content
    with pytest.warns(UserWarning, match="step_000000002 is damaged .*step_000000001 is used instead"):
        saved = snapshots.newest()
    assert (saved.step, saved.values, weight(saved)) == (1, {"step": 1}, 1.0)


def test_what_was_saved_is_that_moment_and_not_what_came_after(snapshots):
    value = torch.zeros(100_000)
    snapshots.save(1, {"weight": value}, {}, {})
    value.add_(1)
    snapshots.finish()
    tensors = {"weight": torch.full((100_000,), 7.0)}
    snapshots.newest().read_into(tensors, Ranks())
    assert not tensors["weight"].any()


def test_old_checkpoints_go_but_for_every_so_many_steps(tmp_path):
    snapshots = Snapshots(tmp_path / "checkpoints", Ranks(), keep_last=2, keep_every=4)
    saved_steps(snapshots, *range(1, 11))
    names = sorted(path.name for path in snapshots.folder.iterdir())
    assert names == ["latest", "step_000000004", "step_000000008", "step_000000009", "step_000000010"]


def test_of_a_step_that_is_saved_again_and_again_one_is_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    saved_steps(Snapshots(folder, Ranks(), keep_every=4), *range(1, 9))
    for _ in range(4):
        goes_on = Snapshots(folder, Ranks(), keep_every=4)
        assert goes_on.newest().step == 8
        saved_steps(goes_on, 8)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "step_000000004", "step_000000008_3", "step_000000008_4"]
    saved_steps(goes_on, 9, 10)
    assert goes_on.steps() == [10, 9, 8, 4]


def test_of_a_step_whose_newest_checkpoint_is_damaged_the_other_is_kept(tmp_path):
    snapshots = Snapshots(tmp_path / "checkpoints", Ranks())
    saved_steps(snapshots, 8, 8)
    (snapshots.folder / "step_000000008_1" / "values.pth").unlink()
    goes_on = Snapshots(snapshots.folder, Ranks(), keep_last=1, keep_every=4)
    assert goes_on.newest().path.name == "step_000000008"
    saved_steps(goes_on, 9)
    names = sorted(path.name for path in snapshots.folder.iterdir())
    assert names == ["latest", "step_000000008", "step_000000009"]


def test_the_same_step_twice_and_what_a_kill_has_left(snapshots):
    saved_steps(snapshots, 3)
    (snapshots.folder / ".step_000000009.part").mkdir()
    saved_steps(snapshots, 3)
    assert not part_of(snapshots.folder.parent)
    assert snapshots.newest().path.name == "step_000000003_1"
    (snapshots.folder / "latest").unlink()
    assert snapshots.newest().path.name == "step_000000003_1", "without the pointer the newest counts"
    (snapshots.folder / "latest").write_bytes(b"\xff\0step")
    assert snapshots.newest().path.name == "step_000000003_1", "nor with one that is damaged"


def test_a_copy_of_a_checkpoint_is_let_be(snapshots):
    saved_steps(snapshots, 1)
    copies = [f"step_000000001{word}" for word in ("_backup", ".bak", "_1_old")]
    for name in copies:
        shutil.copytree(snapshots.folder / "step_000000001", snapshots.folder / name)
    saved_steps(snapshots, 2, 3, 4)
    assert snapshots.steps() == [4, 3, 2] and snapshots.newest().step == 4
    assert all((snapshots.folder / name / "values.pth").is_file() for name in copies)


def test_after_a_damaged_one_the_one_that_was_continued_is_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    saved_steps(Snapshots(folder, Ranks()), 1, 2)
    (folder / "step_000000002" / "values.pth").unlink()
    snapshots = Snapshots(folder, Ranks(), keep_last=2)
    with pytest.warns(UserWarning, match="step_000000001 is used instead"):
        snapshots.newest()
    saved_steps(snapshots, 2)
    assert sorted(path.name for path in snapshots._all()) == ["step_000000001", "step_000000002_1"]
    saved_steps(snapshots, 3)
    assert snapshots.steps() == [3, 2]


def test_trainings_in_one_folder_neither_remove_nor_continue_each_other(tmp_path):
    folder = tmp_path / "checkpoints"
    first, second = (Snapshots(folder, Ranks(), keep_last=2) for _ in range(2))
    saved_steps(first, 7, 8, 9)
    saved_steps(second, 1, 2, 3)
    assert first.steps() == [9, 8, 3, 2]
    (folder / "step_000000003" / "values.pth").unlink()
    third = Snapshots(folder, Ranks(), keep_last=2)
    with pytest.warns(UserWarning, match="step_000000002 is used instead"):
        assert third.newest().step == 2
    saved_steps(third, 4)
    assert third.steps() == [9, 8, 4, 2], "it goes on with the second, so what that was to do over goes"
    for step in (2, 4):
        (folder / f"step_{step:09d}" / "values.pth").unlink()
    with pytest.raises(ValueError, match="is damaged .*No other of this training is left"):
        Snapshots(folder, Ranks()).newest()
    (folder / "step_000000008" / "manifest.json").unlink()
    (folder / "latest").unlink()
    assert Snapshots(folder, Ranks()).newest().step == 9, "without the pointer the newest counts"


def test_a_wait_that_ctrl_c_ends_is_waited_for_again(snapshots, monkeypatch):
    written = threading.Event()
    monkeypatch.setattr("minimagen_fast.snapshots.file_digest", lambda path: written.wait() and file_digest(path))
    snapshots.save(2, {"weight": torch.zeros(1000)}, {}, {})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(snapshots._pending, "exception", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        snapshots.finish()
    threading.Timer(0.1, written.set).start()
    saved_steps(snapshots, 2)
    assert sorted(path.name for path in snapshots._all()) == ["step_000000002", "step_000000002_1"]
    assert snapshots.newest().path.name == "step_000000002_1"


@pytest.mark.parametrize("name", ["values.pth", "rank_00000.pth"])
def test_a_checkpoint_that_was_never_whole_is_damaged(snapshots, name):
    saved_steps(snapshots, 1, 2)
    manifest = snapshots.folder / "step_000000002" / "manifest.json"
    recorded = json.loads(manifest.read_text())
    recorded["files"] = [file for file in recorded["files"] if file["name"] != name]
    manifest.write_text(json.dumps(recorded))
    with pytest.warns(UserWarning, match=f"is damaged .there is no {name}"):
        assert snapshots.newest().step == 1


def limited(folder, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    snapshots = Snapshots(folder, Ranks())
    snapshots.save(2, {"weight": torch.zeros(1_000_000)}, {}, {})
    try:
        snapshots.finish()
    except SnapshotError as error:
        assert "before it are whole" in str(error) and os.strerror(errno.EFBIG) in str(error)
        os._exit(7)


def test_a_full_disk_is_said_and_leaves_the_last_good_checkpoint_whole(snapshots):
    saved_steps(snapshots, 1)
    process = start(limited, snapshots.folder, 1_000_000)
    process.join()
    assert process.exitcode == 7
    assert snapshots.newest().step == 1
    assert sorted(path.name for path in snapshots.folder.iterdir()) == ["latest", "step_000000001"]


def test_a_training_whose_checkpoint_fails_ends_with_that_error(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(
        "minimagen_fast.snapshots.file_digest", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space"))
    )
    with pytest.raises(SnapshotError, match="no space"), pytest.warns(UserWarning, match="could not be saved"):
        trainer.run()
    assert trainer.position.epoch == 0, "it did not go on until the end"


def stopping(folder, number):
    torch.set_num_threads(1)
    with stop_on_signals() as stop:
        trainer = make_trainer(folder, stop=stop, epochs=1000, callback=lambda step: (folder / "begun").touch())
        why = trainer.run()
        os._exit(75 if why == "stopped" and stop.why == signal.Signals(number).name else 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_next_step_and_ends_the_training(tmp_path, number):
    process = start(stopping, tmp_path, number)
    while process.is_alive() and not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 75
    assert f"Stopped ({number.name})" in Path(tmp_path, "training_progess.txt").read_text()
    assert state_of(tmp_path)["position"]["step"] >= 0


def test_a_file_stops_the_training_too_and_an_old_one_does_not(tmp_path):
    (tmp_path / "stop").touch()
    trainer = make_trainer(tmp_path, epochs=1000, callback=lambda step: step.epoch == 1 and (tmp_path / "stop").touch())
    assert trainer.run() == "stopped"
    assert trainer.position.epoch >= 1
    assert "Stopped (by the file" in Path(tmp_path, "training_progess.txt").read_text()


@pytest.mark.parametrize("restart, stays", [("0", True), ("1", False)])
def test_of_a_stop_by_signal_those_know_that_torchrun_starts_next(tmp_path, monkeypatch, restart, stays):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    stop = StopRequest()
    stop.ask("SIGTERM")
    assert make_trainer(tmp_path, stop=stop).run() == "stopped"
    assert (tmp_path / "stop").exists() == stays
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    make_trainer(tmp_path)
    assert not (tmp_path / "stop").exists(), "a new start is none of them"


def test_a_training_that_torchrun_starts_again_after_a_stop_stops_again(tmp_path, monkeypatch):
    (tmp_path / "stop").touch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    trainer = make_trainer(tmp_path, epochs=1000)
    assert trainer.run() == "stopped"
    assert trainer.position.step == 0 and trainer.position.batch == 0, "a group of two batches was not finished"


SHORT = {"epochs": 2, "checkpoint_interval": 4}  # 8 batches an epoch
GROUPS = {**SHORT, "accumulate": 3}


def make_watch(folder, log_interval):
    folder.mkdir()
    return Watch(folder, make_imagen(), [1], Ranks(), log_interval=log_interval, steps=None)


def validations(folder):
    lines = (folder / "training_progess.txt").read_text().splitlines()
    return [line for line in lines if line.startswith(("Validation loss", "Best validation loss"))]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    assert make_trainer(folder, **SHORT).run() == "done"
    return folder


@pytest.mark.parametrize("at", [(0, 3), (0, 7), (1, 7), "validating"])
def test_a_validation_that_a_stop_leaves_no_time_for_is_made_up_for(tmp_path, short, at):
    stop = StopRequest()
    ask = {"callback": lambda step: (step.epoch, step.batch) == at and stop.ask("by the test")}
    trainer = make_trainer(tmp_path / "run", stop=stop, **ask, **SHORT)
    if at == "validating":
        save = trainer._save_weights
        trainer._save_weights = lambda: (save(), stop.ask("by the test"))
    assert trainer.run() == "stopped"
    expected = (0, 4) if at in ((0, 3), "validating") else (at[0] + 1, 0)
    assert (trainer.position.epoch, trainer.position.batch) == expected, "no further batch was trained"
    assert len(validations(tmp_path / "run")) == {(1, 7): 6, (0, 7): 2}.get(at, 0)

    assert make_trainer(tmp_path / "run", **SHORT).run() == "done"
    assert validations(tmp_path / "run") == validations(short)
    for name in ("tmp/unet_0_tmp.pth", "state_dicts/unet_0_state_1.pth"):
        assert identical(*(torch.load(folder / name, weights_only=True) for folder in (tmp_path / "run", short)))
    assert identical(*(state_of(folder)["position"] for folder in (tmp_path / "run", short)))


def test_a_stop_while_a_training_out_of_time_validates_is_a_stop(tmp_path):
    stop = StopRequest()
    trainer = make_trainer(tmp_path, stop=stop, max_seconds=1e-6, **SHORT)
    trainer._save_weights = lambda: stop.ask("by the test")
    assert trainer.run() == "stopped" and trainer.position.validation_due


def test_a_checkpoint_that_does_not_say_whether_a_validation_is_due_is_continued(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    state = state_of(short)
    tensors, own = state.pop("tensors"), state.pop("own")
    del state["position"]["validation_due"]
    snapshots = Snapshots(tmp_path / "run" / "checkpoints", Ranks())
    snapshots.save(7, tensors, state, own)
    snapshots.finish()
    assert make_trainer(tmp_path / "run", **{**SHORT, "epochs": 3}).run() == "done"


def test_steps_of_groups_that_the_end_of_an_epoch_cuts_short_are_sampled_too(tmp_path):
    sampled = []
    make_trainer(tmp_path, sample_interval=3, sample=lambda path: sampled.append(path.name), **GROUPS).run()
    assert sampled == ["step_000000003.png", "step_000000006.png"]


def test_the_last_steps_are_logged(tmp_path):
    watch = make_watch(tmp_path / "run", 4)
    make_trainer(tmp_path / "run", watch=watch, **GROUPS).run()
    log = read_run(tmp_path / "run" / "log.jsonl")
    assert [(line["step"], line["images"]) for line in log.steps] == [(4, 22), (6, 10)]
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines[-2:]] == ["step", "event"]


def test_what_watches_may_fail_and_the_state_is_saved_whole(tmp_path):
    watch = make_watch(tmp_path / "run", 1)

    def fail(step, *_):
        if step == 2:
            raise OSError("planned")

    watch.step = watch.event = fail
    trainer = make_trainer(tmp_path / "run", watch=watch, **GROUPS)
    with pytest.raises(OSError, match="planned"), pytest.warns(UserWarning, match="could not be noted"):
        trainer.run()
    state = state_of(tmp_path / "run")
    counts = {value.item() for name, value in state["tensors"].items() if name.startswith("optimizer.step.")}
    assert counts == {2.0} and state["averages"] == {1: 2} and state["lr_scheduler"]["state"]["last_epoch"] == 2
    assert (state["position"]["step"], state["position"]["batch"]) == (2, 6)
