"""Training that is cut short: time limits, errors, Ctrl-C, restarts."""

import shutil
import signal
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_runs import Adapting, Interruption, Pictures, Run, identical, interrupt_at, state_of

from minimagen_fast import checkpoint
from minimagen_fast.given_loader import GivenLoader
from minimagen_fast.Imagen import Imagen
from minimagen_fast.interrupts import TimeLimitExceeded, time_limit, uninterrupted
from minimagen_fast.ranks import Ranks
from minimagen_fast.snapshots import Snapshots
from minimagen_fast.Unet import BaseTest

# Time limits


needs_alarm = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="time limits need SIGALRM")


class Ringing(Imagen):
    """Lets the alarm ring in the forward pass of the training batches whose indices are in `slow`."""

    slow: tuple = ()

    def __init__(self, **options):
        torch.manual_seed(0)
        super().__init__(BaseTest(), text_encoder_name="t5_small", image_sizes=8, timesteps=25, **options)
        self.batch = -1
        self.timers = []

    def forward(self, *args, **kwargs):
        loss = super().forward(*args, **kwargs)
        self.batch += self.training
        self.timers.append((self.training, signal.getitimer(signal.ITIMER_REAL)[0] > 0))
        if self.training and self.batch in self.slow:
            signal.raise_signal(signal.SIGALRM)
        return loss


@needs_alarm
def test_a_slow_batch_is_given_up_but_validation_is_not(tmp_path):
    before = signal.getsignal(signal.SIGALRM)
    imagen = Ringing()
    imagen.slow = (1,)
    run = Run(tmp_path, data=Pictures(6), imagen=imagen)
    steps = []
    run.train(timeout=30.5, callback=steps.append)
    assert [step.batch for step in steps] == [0, 2]
    assert "Epoch 1, batch 2: given up after 30.5 seconds" in run.log
    assert "Skipped: 1 batches over the time limit" in run.log
    assert imagen.timers == [(True, True)] * 3 + [(False, False)]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@needs_alarm
@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_of_a_batch_that_was_given_up_are_dropped(tmp_path, accumulated):
    imagen = Ringing()
    imagen.slow = (accumulated - 1,)
    run = Run(tmp_path, data=Pictures(2 * accumulated), imagen=imagen, valid=[], ACCUM_ITER=accumulated)
    before = run.weights
    run.train()
    assert identical(run.weights, before)
    assert all(parameter.grad is None for parameter in run.imagen.parameters())


@needs_alarm
@pytest.mark.parametrize("timeout", [0, None])
def test_without_a_time_limit_there_is_no_alarm(tmp_path, timeout):
    imagen = Ringing()
    Run(tmp_path, data=Pictures(2), imagen=imagen, valid=[]).train(timeout=timeout)
    assert imagen.timers == [(True, False)]


@needs_alarm
def test_what_is_compiled_for_the_first_batch_of_a_shape_takes_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(Ringing, "acceleration", SimpleNamespace(compile="blocks"))
    imagen = Ringing()
    Run(tmp_path, data=Pictures(5), imagen=imagen, valid=[]).train()
    assert imagen.timers == [(True, False), (True, True), (True, False)], "two batches of two pictures, one of one"


def test_training_outside_the_main_thread_says_that_it_has_no_time_limit(tmp_path):
    run = Run(tmp_path)
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert "No timeout" in run.log and "Validation loss" in run.log


@needs_alarm
def test_time_limit_puts_back_an_earlier_timer_and_handler():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeLimitExceeded), time_limit(0.05):
            time.sleep(1)
        assert not rang
        time.sleep(0.3)
        assert rang == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_ctrl_c_waits_for_the_end_of_a_block():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("the block")
    assert done == ["the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_max_seconds_ends_the_training_in_good_order(tmp_path):
    run = Run(tmp_path, EPOCHS=10**6)
    steps = []
    started = time.monotonic()
    run.train(max_seconds=0.3, callback=steps.append)
    assert 0.3 <= time.monotonic() - started < 5
    assert "Time is up" in run.log
    assert identical(run.file("tmp/unet_0_tmp.pth"), run.imagen.unets[0].state_dict())
    assert "Validation loss" in run.log.split("Epoch")[-1]
    assert (tmp_path / "state_dicts" / "unet_0_state_1.pth").exists()


# Errors


@pytest.mark.parametrize("error", [Interruption, KeyboardInterrupt, RuntimeError])
def test_an_exception_is_noted_then_raised_with_the_state_saved(tmp_path, error):
    run = Run(tmp_path, stages=2)
    with pytest.raises(error, match="now"):
        run.train(callback=interrupt_at(0, 2, error))
    assert f"TRAINING ABORTED in epoch 1 after 3 of its batches by {error.__name__}: now" in run.log
    for index in range(2):
        assert identical(run.file(f"tmp/unet_{index}_tmp.pth"), run.imagen.unets[index].state_dict())
    assert state_of(run.folder)["position"]["batch"] == 3


def test_where_an_interrupted_training_is_saved_is_shown(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).train(progress=True, callback=interrupt_at(0, 1, KeyboardInterrupt))
    assert f"--RESTART_DIRECTORY {tmp_path}" in capsys.readouterr().out


def test_an_error_in_the_data_is_raised(tmp_path):
    class Broken(Pictures):
        def __getitem__(self, index):
            if index == 5:
                raise Interruption("broken item")
            return super().__getitem__(index)

    run = Run(tmp_path, data=Broken(), loader={"shuffle": False})
    with pytest.raises(Interruption, match="broken item"):
        run.train()
    assert state_of(run.folder)["position"]["batch"] == 2


def test_the_first_error_is_raised_even_if_saving_fails(tmp_path, monkeypatch):
    run = Run(tmp_path)

    def no_space(value, path):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save", no_space)
    with pytest.warns(UserWarning, match="no space left"), pytest.raises(Interruption, match="now"):
        run.train(callback=interrupt_at(0, 0))


# Restart


def restart(run, folder, timestamp="2", **options):
    """A new process's view of it: everything is built anew, with other random numbers, and the state is taken up."""
    torch.manual_seed(1234)
    run.args.RESTART_DIRECTORY = str(folder)
    return run.train(timestamp, **options)


@contextmanager
def scheduled(run, kind):
    """The options of a training with all that has a state of its own."""
    if kind == "plain":
        yield {}
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 12)
        yield {"lr_scheduler": scheduler, "ema_decay": 0.9}


@pytest.mark.parametrize(
    "kind, accumulated, epoch, batch",
    [
        ("plain", 1, 0, 0),
        ("plain", 3, 1, 1),
        ("average and schedule", 1, 0, 2),
        ("average and schedule", 1, 1, 3),
        ("average and schedule", 3, 0, 3),
    ],
)
def test_a_restarted_training_ends_with_the_same_weights_to_the_bit(tmp_path, kind, epoch, batch, accumulated):
    settings = {"EPOCHS": 2, "ACCUM_ITER": accumulated, "CHCKPT_NUM": 3}
    whole = Run(tmp_path / "whole", **settings)
    with scheduled(whole, kind) as options:
        whole.train(**options)

    first = Run(tmp_path / "first", **settings)
    with scheduled(first, kind) as options, pytest.raises(Interruption):
        first.train(**options, callback=interrupt_at(epoch, batch))
    files = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}

    second = Run(tmp_path / "second", **settings)
    with torch.no_grad():
        for parameter in second.imagen.parameters():
            parameter.zero_()
    with scheduled(second, kind) as options:
        restart(second, tmp_path / "first", **options)

    assert identical(second.weights, whole.weights)
    state, expected = state_of(second.folder), state_of(whole.folder)
    for part in ("tensors", "optimizer", "averages", "lr_scheduler", "best_losses", "position", "own"):
        assert identical(state[part], expected[part])
    assert identical(second.file("state_dicts/unet_0_state_2.pth"), whole.file("state_dicts/unet_0_state_1.pth"))
    for line in ("Mean training loss", "Validation loss", "Best validation loss"):
        assert [text for text in whole.log.splitlines() if text.startswith(line)][-1] in second.log
    assert {path: path.read_bytes() for path in files} == files, "the first directory is left as it was"


def test_numbers_of_numpy_do_not_keep_a_training_from_going_on(tmp_path):
    def run(name, epochs, restart=None):
        run = Run(tmp_path / name, EPOCHS=epochs, RESTART_DIRECTORY=restart)
        run.optimizer = torch.optim.Adam(run.imagen.parameters(), lr=np.float64(1e-3))
        factor = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: np.minimum(1.0, (step + 1) / 5))
        return run.train(lr_scheduler=factor, unet_numbers=np.array([1]))

    whole = run("whole", 2)
    run("parts", 1)
    assert identical(run("parts", 2, str(tmp_path / "parts")).weights, whole.weights)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_training_goes_on_with_an_optimizer_that_was_made_fused_later(tmp_path, kind):
    def run(name, epochs, fused, restart=None):
        run = Run(tmp_path / name, EPOCHS=epochs, RESTART_DIRECTORY=restart)
        run.optimizer = kind(run.imagen.parameters(), lr=1e-3, fused=fused)
        return run.train()

    whole = run("whole", 2, False)
    run("parts", 1, False)
    # As it began: what is kept of the optimizer says how it steps.
    assert identical(run("parts", 2, True, str(tmp_path / "parts")).weights, whole.weights)


def test_a_schedule_that_no_checkpoint_can_hold_is_refused_before_the_training(tmp_path):
    run, steps = Run(tmp_path), []
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)
    schedule.folder = tmp_path
    with pytest.raises(ValueError, match=r"lr_scheduler.state_dict\(\)\['folder'\] is a \w+Path"):
        run.train(lr_scheduler=schedule, callback=steps.append)
    assert not steps


def test_an_optimizer_that_keeps_its_state_in_its_own_way_is_refused_before_the_training(tmp_path):
    class Around(torch.optim.SGD):
        def state_dict(self):
            return {"slow_weights": [], "inner": super().state_dict()}

    run, steps = Run(tmp_path), []
    run.optimizer = Around(run.imagen.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="of this Around has no state and param_groups .* but slow_weights, inner:"):
        run.train(callback=steps.append)
    assert not steps


def test_a_schedule_that_wants_to_be_told_a_loss_is_refused(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(ValueError, match="lr_scheduler is a ReduceLROnPlateau, whose step needs metrics"):
        run.train(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer))


def test_a_restart_after_an_error_in_the_middle_of_a_batch(tmp_path):
    settings = {"stages": 2, "ACCUM_ITER": 2}
    whole = Run(tmp_path / "whole", **settings).train()
    first = Run(tmp_path / "first", **settings)
    forward, calls = first.imagen.unets[1].forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the first U-Net has already added the gradients of this batch
            raise Interruption
        return forward(*args, **kwargs)

    first.imagen.unets[1].forward = failing
    with pytest.raises(Interruption):
        first.train()
    second = restart(Run(tmp_path / "second", **settings), tmp_path / "first")
    assert identical(second.weights, whole.weights)


def test_what_an_imagen_learns_besides_its_u_nets_is_continued_too(tmp_path):
    def run(name, **args):
        run = Run(tmp_path / name, imagen=Adapting(), **args)
        trained = [parameter for parameter in run.imagen.parameters() if parameter.requires_grad]
        run.optimizer = torch.optim.Adam(trained, lr=1e-3)
        return run

    whole = run("whole", EPOCHS=2).train()
    run("parts").train()
    second = restart(run("parts", EPOCHS=2), tmp_path / "parts")
    assert identical(second.weights, whole.weights)
    assert not any("frozen" in name for name in state_of(second.folder)["tensors"])


class Counting(torch.nn.Module):
    """Counts its calls, beside all tensors."""

    calls = 0

    def forward(self, x):
        self.calls += self.training
        return x

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_what_a_module_keeps_beside_its_tensors_is_continued_too(tmp_path):
    def run(name, **args):
        run = Run(tmp_path / name, **args)
        run.imagen.unets[0].counting = Counting()
        run.imagen.unets[0].register_forward_hook(lambda unet, inputs, output: unet.counting(output))
        return run

    run("parts").train()
    second = restart(run("parts", EPOCHS=2), tmp_path / "parts")
    assert second.imagen.unets[0].counting.calls == 8
    assert second.file("tmp/unet_0_tmp.pth")["counting._extra_state"] == {"calls": 8}


def test_a_restart_in_the_same_directory_and_out_of_time(tmp_path):
    data = Pictures(4)
    whole = Run(tmp_path / "whole", data=data, EPOCHS=2).train()
    for part in range(4):
        run = Run(tmp_path / "parts", data=data, EPOCHS=2)
        run.args.RESTART_DIRECTORY = str(tmp_path / "parts") if part else None
        run.train(str(part), max_seconds=1e-6)  # one batch
        assert run.log.count("Time is up") == min(part + 1, 3)
    assert identical(run.weights, whole.weights)
    assert state_of(run.folder)["position"]["epoch"] == 2


@pytest.mark.parametrize("owner", ["loader", "none, with worker processes"])
def test_a_restart_keeps_the_order_of_other_loaders(tmp_path, owner):
    def loader():
        return {"generator": torch.Generator().manual_seed(3)} if owner == "loader" else {"num_workers": 1}

    whole = Run(tmp_path / "whole", loader=loader(), EPOCHS=2).train()
    first = Run(tmp_path / "first", loader=loader(), EPOCHS=2)
    with pytest.raises(Interruption):
        first.train(callback=interrupt_at(0, 1))
    second = restart(Run(tmp_path / "second", loader=loader(), EPOCHS=2), tmp_path / "first")
    assert identical(second.weights, whole.weights)


def test_a_finished_training_goes_on_when_epochs_are_added(tmp_path):
    whole = Run(tmp_path / "whole", EPOCHS=2).train()
    Run(tmp_path / "first", EPOCHS=1).train()
    assert identical(restart(Run(tmp_path / "second", EPOCHS=2), tmp_path / "first").weights, whole.weights)
    again = restart(Run(tmp_path / "third", EPOCHS=1), tmp_path / "first")
    assert "Nothing to train: 1 epochs are done, EPOCHS is 1" in again.log
    assert identical(again.file("tmp/unet_0_tmp.pth"), first_weights := again.imagen.unets[0].state_dict())
    assert identical(first_weights, checkpoint.load(tmp_path / "first" / "tmp" / "unet_0_tmp.pth"))


def set_best_loss(directory, loss):
    """Has the checkpoint of a training say that U-Net 1 was best with this loss."""
    snapshots, state = Snapshots(directory / "checkpoints", Ranks()), state_of(directory)
    tensors, own = state.pop("tensors"), state.pop("own")
    state["best_losses"][1] = loss
    snapshots.save(5, tensors, state, own)
    snapshots.finish()


def test_best_weights_come_along_even_if_they_are_never_improved_on(tmp_path):
    Run(tmp_path / "first").train()
    set_best_loss(tmp_path / "first", -1.0)
    second = restart(Run(tmp_path / "second", EPOCHS=2), tmp_path / "first")
    best = checkpoint.load(tmp_path / "first" / "state_dicts" / "unet_0_state_1.pth")
    assert identical(second.file("state_dicts/unet_0_state_2.pth"), best)
    assert "Best validation loss: U-Net 1: -1.0000" in second.log


@pytest.mark.parametrize("images, anew", [(3, True), (0, False)])
def test_best_weights_begin_anew_with_other_validation_images(tmp_path, images, anew):
    Run(tmp_path / "first").train()
    set_best_loss(tmp_path / "first", -1.0)
    second = restart(Run(tmp_path / "second", valid=Pictures(images, seed=2), EPOCHS=2), tmp_path / "first")
    assert (
        "validation is with {'validation images': 3}, before it was with {'validation images': 2}" in second.log
    ) == anew
    best = second.file("state_dicts/unet_0_state_2.pth")
    assert identical(best, second.file("tmp/unet_0_tmp.pth")) == anew
    assert state_of(tmp_path / "second")["measure"]["validation images"] == (3 if anew else 2), "those of the best"


@pytest.mark.parametrize("accumulated, steps", [(1, 8), (2, 4 + 1)])
def test_the_number_of_steps_is_reckoned_anew_only_with_other_settings(tmp_path, accumulated, steps):
    settings = {"data": Pictures(missing=(0, 1)), "loader": {"shuffle": False}, "EPOCHS": 2}
    with pytest.raises(Interruption):
        Run(tmp_path / "first", **settings).train(callback=interrupt_at(1, 1))
    second = restart(Run(tmp_path / "second", **settings, ACCUM_ITER=accumulated), tmp_path / "first")
    assert state_of(second.folder)["total_steps"] == steps, "batches without images make no step"


def test_a_stream_goes_on_with_batches_of_the_same_size(tmp_path, monkeypatch):
    layout = {"batch size": 2, "ranks": 1, "workers": 0}
    monkeypatch.setattr(GivenLoader, "layout", property(lambda self: dict(layout)))
    monkeypatch.setattr(GivenLoader, "batches_in_epoch", None)
    with pytest.raises(Interruption):
        Run(tmp_path / "first").train(callback=interrupt_at(0, 1))
    layout["workers"] = 2
    second = restart(Run(tmp_path / "second"), tmp_path / "first")
    assert "goes on with 2 workers, before there were 0: until it ends pictures may come twice" in second.log
    layout["batch size"] = 4
    with pytest.raises(ValueError, match="BATCH_SIZE within an epoch: 2 in that training, 4 in this one"):
        restart(Run(tmp_path / "third"), tmp_path / "first")


def test_another_training_in_the_same_directory_leaves_what_the_first_has_saved(tmp_path):
    Run(tmp_path, EPOCHS=3).train("1")
    second = Run(tmp_path, EPOCHS=2).train("2")
    assert "holds checkpoints of another training, up to step 12. They stay; but" in second.log
    folder = tmp_path / "checkpoints"
    assert Snapshots(folder, Ranks()).steps() == [12, 8, 8, 4]
    (folder / (folder / "latest").read_text().strip() / "values.pth").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="step_000000004 is used instead"):
        restart(Run(tmp_path / "third", EPOCHS=3), tmp_path, "3")
    assert state_of(tmp_path / "third")["position"]["step"] == 12


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"stages": 2}, {}, "number of U-Nets: 1 in that training, 2 in this one"),
        ({"optimizer": "sgd"}, {}, "optimizer: Adam in that training, SGD in this one"),
        ({"data": Pictures(6)}, {}, "batches in an epoch: 4 in that training, 3 in this one"),
        (
            {"data": Pictures(12), "loader": {"batch_size": 3}},
            {},
            "BATCH_SIZE within an epoch: 2 in that training, 3 in this one",
        ),
        ({}, {"ema_decay": 0.9}, "ema_decay"),
        ({"imagen": "larger"}, {}, "tensors are in one of the two trainings only, such as unets.0"),
        ({"loader": {"generator": torch.Generator()}}, {}, "0 data loader generators, this run has 1"),
    ],
)
def test_a_training_that_does_not_fit_is_not_continued(tmp_path, changes, options, message):
    with pytest.raises(Interruption):
        Run(tmp_path / "first").train(callback=interrupt_at(0, 1))
    if changes.get("imagen"):
        larger = Imagen([BaseTest()], text_encoder_name="t5_small", image_sizes=8, timesteps=25)
        changes = {**changes, "imagen": larger}
    second = Run(tmp_path / "second", **changes)
    with pytest.raises(ValueError, match=f"(?s)RESTART_DIRECTORY .*first cannot be continued: .*{message}"):
        restart(second, tmp_path / "first", **options)


def test_a_missing_or_damaged_state_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be continued: there is no checkpoint in .*checkpoints"):
        restart(Run(tmp_path / "second"), tmp_path / "nowhere")
    Run(tmp_path / "first").train()
    folder = tmp_path / "first" / "checkpoints"
    (file,) = folder.glob("step_*/values.pth")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be continued: .*is damaged .values.pth: it has 1000 bytes.*No other"):
        restart(Run(tmp_path / "second"), tmp_path / "first")
    snapshots = Snapshots(folder, Ranks())
    snapshots.save(9, {}, {"version": 1}, {})
    snapshots.finish()
    with pytest.raises(ValueError, match="cannot be continued: lacks 'unets'"):
        restart(Run(tmp_path / "second"), tmp_path / "first")


@pytest.mark.parametrize("lost", ["state_dicts", "tmp"])
def test_a_directory_of_the_original_package_starts_anew_with_a_warning(tmp_path, lost):
    Run(tmp_path / "first").train()
    for folder in ("checkpoints", lost):
        shutil.rmtree(tmp_path / "first" / folder)
    second = Run(tmp_path / "second")
    with pytest.warns(UserWarning, match="holds weights but no checkpoints"):
        restart(second, tmp_path / "first")
    assert identical(second.weights, Run(tmp_path / "plain").train().weights)
