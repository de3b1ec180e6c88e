"""The quickstart from end to end, with a training too short to learn anything."""

import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from minimagen_fast import acceleration, cli, quickstart, quickstart_training
from minimagen_fast.generate import load_minimagen
from minimagen_fast.Imagen import Imagen
from minimagen_fast.quickstart_training import Recipe
from minimagen_fast.shapes import BACKGROUNDS, COLORS, SHAPES
from minimagen_fast.train_command import DIVERGED
from minimagen_fast.trainer import TrainingDiverged

TINY = dict(dim=8, dim_mults=(1, 2), layer_attns=False, layer_cross_attns=False)
SHORT = Recipe(timesteps=(20, 20), unets=(TINY, TINY), batch_sizes=(2, 2), steps_per_minute=(80, 50))


def test_the_help_says_how_long_it_takes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["quickstart", "--help"])
    assert f"more gives better pictures ({quickstart.DEFAULT_MINUTES:g})" in " ".join(capsys.readouterr().out.split())


def test_it_leaves_what_it_says(tmp_path, capsys):
    out = tmp_path / "results"
    assert quickstart.run_quickstart(out, seed=3, minutes=0.5, recipe=SHORT) == 0

    with Image.open(out / "grid.png") as grid, Image.open(out / "loss.png") as curve:
        assert grid.width > 4 * 100 and grid.height > 6 * 100 and curve.width >= 400
    captions = (out / "captions.txt").read_text().splitlines()
    assert len(captions) == 24 == len(list((out / "generated_images").glob("image_*.png")))
    assert {caption.split()[1] + caption.split()[2] for caption in captions} == {c + s for c in COLORS for s in SHAPES}

    report = (out / "report.md").read_text()
    shown = capsys.readouterr().out
    assert "seed 3" in report and "24 pictures" in report
    shares = next(line for line in report.splitlines() if line.startswith("|") and "%" in line)
    for share in shares.strip("| ").split(" | "):
        assert share in shown
    assert str(out / "grid.png") in shown

    assert sorted(path.name for path in out.iterdir()) == [
        "captions.txt",
        "generated_images",
        "grid.png",
        "loss.png",
        "report.md",
        "training",
    ]
    imagen = load_minimagen(out / "training")
    assert imagen.image_sizes == (16, 32)
    # The folder's own command line finds the same encoder again.
    images = imagen.sample(["a red circle on black"], progress=False, seed=0)
    assert images.shape == (1, 3, 32, 32)


class Seen(Exception):
    """Enough of the quickstart has run."""


def test_nothing_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setitem(acceleration._AUTOMATIC, "compile", lambda *_: ("blocks", "as on CUDA"))

    def run(*args, **kwargs):
        (imagen,) = (value for value in (*args, kwargs.get("minimagen")) if isinstance(value, Imagen))
        assert imagen.acceleration.compile == "off"
        raise Seen

    monkeypatch.setattr(quickstart_training, "MinimagenTrain", run)
    with pytest.raises(Seen):
        quickstart_training.train_unet(SHORT, 1, tmp_path / "run", "1", 3, 0.5, time.time() + 9, 1, False)
    monkeypatch.setattr(quickstart, "_train", lambda *_: {})
    monkeypatch.setattr(quickstart, "load_minimagen", lambda _: SHORT.cascade()[0])
    monkeypatch.setattr(quickstart, "sample_and_save", run)
    with pytest.raises(Seen):
        quickstart.run_quickstart(tmp_path / "results", seed=3, minutes=0.5, recipe=SHORT)


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        quickstart.run_quickstart(tmp_path, seed=0, minutes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("seed, minutes, name", [(-1, 1, "seed"), (0, 0, "minutes"), (0, float("nan"), "minutes")])
def test_arguments_that_cannot_be(tmp_path, seed, minutes, name):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        quickstart.run_quickstart(tmp_path / "out", seed=seed, minutes=minutes)
    assert not (tmp_path / "out").exists()


def test_the_same_seed_gives_the_same_weights(tmp_path, monkeypatch):
    # On CUDA the gradients of convolutions are the library's, which does not promise the same bits.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    weights = []
    for name in ("first", "second"):
        far = time.time() + 600
        threads = torch.get_num_threads()
        losses = quickstart_training.train_unet(SHORT, 2, tmp_path / name, "t", 5, 0.2, far, threads, False)
        assert [step for step, _ in losses] == [10], "fewer steps than the loss is averaged over have one to draw"
        (file,) = (tmp_path / name / "state_dicts").glob("unet_1_*")
        weights.append(torch.load(file, weights_only=True))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_machine_that_is_too_slow_is_told_of_no_flag_that_there_is_not(tmp_path, capsys):
    endless = replace(SHORT, steps_per_minute=(9999, 9999))
    late = time.time()
    quickstart_training.train_unet(endless, 1, tmp_path, "t", 5, 1.0, late, torch.get_num_threads(), True)
    assert "Time is up" in (tmp_path / "training_progess.txt").read_text()
    assert capsys.readouterr().out == ""


def test_an_error_in_the_second_process_is_raised_here(tmp_path):
    broken = replace(SHORT, batch_sizes=(2, 0))
    with pytest.raises(ValueError, match="length is 0"):
        quickstart.run_quickstart(tmp_path / "out", seed=0, minutes=0.5, recipe=broken)


def test_a_training_that_diverges_is_said_without_a_traceback(tmp_path, capsys, monkeypatch):
    def diverge(*_):
        raise TrainingDiverged("the gradients were not finite")

    monkeypatch.setattr(quickstart, "_train", diverge)
    assert cli.main(["quickstart", "--out", str(tmp_path / "out")]) == DIVERGED
    assert capsys.readouterr().err == (
        "minimagen-fast quickstart: the gradients were not finite; or choose another seed\n"
    )


def test_every_pair_is_wanted_once_and_backgrounds_alternate():
    pictures = quickstart.wanted_pictures()
    assert len({(color, shape) for color, shape, _ in pictures}) == 24 == len(pictures)
    assert [background for *_, background in pictures].count("black") == 12 and len(BACKGROUNDS) == 2


def test_the_learning_rate_ends_with_the_steps_or_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(quickstart_training.time, "monotonic", lambda: now[0])

    def rates(seconds_per_step):
        now[0] = 0.0
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = quickstart_training.learning_rate_schedule(optimizer, steps=400, seconds=100.0)
        out = []
        for _ in range(400):
            out.append(schedule.get_last_lr()[0])
            optimizer.step()
            now[0] += seconds_per_step
            schedule.step()
        return out

    fast, slow = rates(0.1), rates(0.5)
    assert rates(0.24) == fast, "a machine that keeps up follows the steps alone"
    assert fast[0] == pytest.approx(0.01) and max(fast) > 0.8 and fast[-1] < 1e-4
    assert slow[:160] == fast[:160], "the clock has no say until the last part of its time"
    assert slow[199] < 2e-3 and slow[300] == 0.0
