"""The training loop and its validation."""

import numpy as np
import pytest
import torch
from fast_path import Counts
from torch.utils.data import Subset
from training_runs import Adapting, Interruption, Pictures, Run, identical, make_imagen

from minimagen_fast.given_loader import GivenLoader
from minimagen_fast.Imagen import Imagen
from minimagen_fast.loading import ShardedLoader
from minimagen_fast.optimizers import fuse
from minimagen_fast.ranks import Ranks
from minimagen_fast.settings import TrainingSettings
from minimagen_fast.trainer import Trainer, TrainingDiverged
from minimagen_fast.training import (
    TrainingStep,
    create_directory,
    save_training_info,
)
from minimagen_fast.Unet import BaseTest

# The training loop


def test_training_changes_the_weights_and_writes_the_documented_files(tmp_path):
    run = Run(tmp_path, stages=2, CHCKPT_NUM=3)
    before = run.weights
    steps = []
    run.train("20240101_000000", callback=steps.append)

    after = run.weights
    moved = {int(name.split(".")[1]) for name in after if not torch.equal(after[name], before[name])}
    assert moved == {0, 1}
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    # Names within a checkpoint are its own business.
    assert {name if name.count("/") < 2 else name.rsplit("/", 1)[0] for name in files} == {
        "state_dicts/unet_0_state_20240101_000000.pth",
        "state_dicts/unet_1_state_20240101_000000.pth",
        "tmp/unet_0_tmp.pth",
        "tmp/unet_1_tmp.pth",
        "checkpoints/latest",
        "checkpoints/step_000000003",
        "checkpoints/step_000000004",
        "training_progess.txt",
    }
    for index in range(2):
        assert identical(run.file(f"tmp/unet_{index}_tmp.pth"), run.imagen.unets[index].state_dict())
    assert run.log.count("checkpoint") == 2, "after 3 of the 4 batches, and at the end"
    for words in ("Mean training loss", "last batch", "Validation loss", "Best validation loss", "Skipped: nothing"):
        assert words in run.log
    assert [(step.epoch, step.batch, step.unet_number) for step in steps] == [
        (0, batch, number) for batch in range(4) for number in (1, 2)
    ]
    assert all(isinstance(step, TrainingStep) and isinstance(step.loss, float) for step in steps)
    assert all(0 < a.seconds <= b.seconds for a, b in zip(steps, steps[1:], strict=False))
    mean = sum(step.loss for step in steps if step.unet_number == 2) / 4
    assert f"Mean training loss in this epoch: U-Net 1: {sum(s.loss for s in steps[::2]) / 4:.4f}" in run.log
    assert f"U-Net 2: {mean:.4f}" in run.log
    assert run.imagen.training and all(parameter.grad is None for parameter in run.imagen.parameters())


def test_args_may_be_a_dictionary_and_need_only_what_is_used(tmp_path):
    run = Run(tmp_path)
    run.args = {"EPOCHS": 1, "ACCUM_ITER": 1, "CHCKPT_NUM": 500}
    run.train()
    del run.args["ACCUM_ITER"]
    with pytest.raises(ValueError, match="args lacks ACCUM_ITER"):
        run.train()


def test_what_only_steps_is_no_optimizer(tmp_path):
    class Warmed:
        def __init__(self, optimizer):
            self.step, self.zero_grad = optimizer.step, optimizer.zero_grad

    run = Run(tmp_path)
    run.optimizer = Warmed(run.optimizer)
    with pytest.raises(TypeError, match="Warmed, which has no param_groups.*as lr_scheduler"):
        run.train()


def test_args_may_be_an_object_with_attributes(tmp_path):
    class Settings:
        EPOCHS, ACCUM_ITER, CHCKPT_NUM, RESTART_DIRECTORY = 1, 1, 500, None

    run = Run(tmp_path)
    run.args = Settings()
    run.train()
    assert run.file("tmp/unet_0_tmp.pth")
    Settings.RESTART_DIRECTORY = tmp_path / "nowhere"
    with pytest.raises(ValueError, match="nowhere"):
        run.train()
    save_training_info(Settings(), "2", [{}], {}, 1.0, create_directory(tmp_path))
    assert f"Continues the training in {tmp_path / 'nowhere'}" in run.log


@pytest.mark.parametrize("kind, end", [(make_imagen, []), (Adapting, []), (make_imagen, [None])])
def test_accumulated_gradients_are_averaged_also_in_the_last_partial_group(tmp_path, kind, end):
    data = Pictures(10)  # 5 batches: one group of 3 and one of 2, whose end is not known beforehand if nothing follows
    options = {"data": data, "loader": {"shuffle": False}, "optimizer": "sgd"}
    run = Run(tmp_path, imagen=kind(), valid=[], ACCUM_ITER=3, **options)
    batches = list(run.train_loader)
    run.train_loader = [*batches, *end]
    run.train(max_grad_norm=None)

    other = Run(tmp_path / "other", imagen=kind(), **options)
    torch.manual_seed(7)
    for group in (batches[:3], batches[3:]):
        for batch in group:
            loss = other.imagen(batch["image"], text_embeds=batch["encoding"], text_masks=batch["mask"], unet_number=1)
            (loss / len(group)).backward()
        other.optimizer.step()
        other.optimizer.zero_grad()
    weights, expected = run.weights, other.weights
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped(tmp_path):
    run = Run(tmp_path, data=Pictures(2), optimizer="sgd")
    before = run.weights
    run.train(max_grad_norm=1e-2)
    change = torch.cat([(run.weights[name] - before[name]).flatten() for name in before]).norm()
    assert change == pytest.approx(0.1 * 1e-2, rel=1e-2)  # learning rate times the norm


def test_learning_rate_schedule_steps_once_per_optimizer_step(tmp_path):
    run = Run(tmp_path, data=Pictures(10), EPOCHS=2, ACCUM_ITER=2)
    scheduler = torch.optim.lr_scheduler.LinearLR(run.optimizer, 0.1, total_iters=100)
    run.train(lr_scheduler=scheduler)
    assert scheduler.last_epoch == 6  # 2 epochs of 2 whole groups and a partial one


def test_losses_are_read_from_the_device_only_at_checkpoints(tmp_path, monkeypatch):
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, original=original):
            reads.append(original)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    counts = []
    for batches in (2, 6):
        run = Run(tmp_path / str(batches), data=Pictures(2 * batches), loader={"shuffle": False})
        reads.clear()
        run.train()
        counts.append(len(reads))
    assert counts[0] == counts[1]


def operators_of_a_step(folder, optimizer, **settings):
    """How often each operator runs in one more step of training two U-Nets."""
    counts, accumulate = [], settings.get("accumulate", 1)
    for batches in (accumulate, 2 * accumulate):
        data = Pictures(2 * batches)
        for number, item in enumerate(data.items):
            item["id"] = torch.tensor(number)
        run = Run(folder / str(batches), stages=2, data=data, optimizer=optimizer)
        trainer = Trainer(
            TrainingSettings(epochs=1, **settings),
            run.imagen,
            run.optimizer,
            GivenLoader(run.train_loader),
            None,
            run.folder,
            timestamp="1",
            progress=False,
        )
        with Counts() as seen:
            trainer.run()
        counts.append(seen.names)
    return {name.partition(".")[0]: number - counts[0][name] for name, number in counts[1].items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 3, "min_snr_gamma": 5.0, "ema_decay": 0.9},
        {"precision": "bfloat16", "max_grad_norm": None, "accumulate": 2},
    ],
    ids=str,
)
def test_a_step_waits_for_nothing_and_updates_all_parameters_at_once(tmp_path, settings):
    seen = operators_of_a_step(tmp_path, "adam", **settings)
    assert {name: seen[name] for name in Counts.WAITING if seen.get(name)} == {}
    assert seen["_fused_adam_"] == 1 and "addcdiv_" not in seen and "_foreach_addcdiv_" not in seen
    assert seen["_foreach_norm"] == 1 and not seen.get("linalg_vector_norm", 0) > 1
    assert seen.get("_foreach_mul_", 0) == ("seed" in settings), "clipping"
    # One for each U-Net.
    assert seen.get("_foreach_lerp_", 0) == (2 if "ema_decay" in settings else 0)


def test_with_a_seed_images_need_numbers(tmp_path):
    run = Run(tmp_path)
    options = {"timestamp": "1", "progress": False}
    loader = GivenLoader(run.train_loader)
    trainer = Trainer(TrainingSettings(epochs=1, seed=3), run.imagen, run.optimizer, loader, None, tmp_path, **options)
    with pytest.raises(ValueError, match="with a seed, here 3, batches need the numbers of their images as 'id'"):
        trainer.run()


def test_batches_may_have_no_mask(tmp_path):
    run = Run(tmp_path)
    run.train_loader, run.valid_loader = (
        [{**batch, "mask": None} for batch in loader] for loader in (run.train_loader, run.valid_loader)
    )
    seen, forward = [], run.imagen.forward
    run.imagen.forward = lambda *images, **text: seen.append(text["text_masks"]) or forward(*images, **text)
    run.train()
    assert seen == [None] * 5 and "Best validation loss" in run.log


def test_without_a_seed_images_may_be_called_whatever_a_loader_calls_them(tmp_path):
    run = Run(tmp_path)
    run.train_loader = [{**batch, "id": ["a.png", "b.png"]} for batch in run.train_loader]
    for batch in run.train_loader:
        batch["image"][:] = torch.nan
    with pytest.raises(TrainingDiverged, match=r"these batches: \['a.png', 'b.png'\]; "):
        run.args.EPOCHS = 5
        run.train()


def test_what_is_learned_besides_the_u_nets_is_refused_on_several_ranks(tmp_path):
    run = Run(tmp_path, imagen=Adapting())
    ranks, options = Ranks(0, 2), {"timestamp": "1", "progress": False}
    loader = ShardedLoader(Pictures(), 4, seed=0, ranks=2)
    with pytest.raises(ValueError, match="optimizer holds adapter.weight of imagen, which is part of no U-Net: .* 2 r"):
        Trainer(TrainingSettings(seed=3), run.imagen, run.optimizer, loader, None, tmp_path, ranks=ranks, **options)


def test_weights_may_be_laid_out_anew_between_trainings():
    def trained(fuses):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3)
        optimizer = torch.optim.Adam(conv.parameters(), lr=0.1)
        for layout in (torch.contiguous_format, torch.channels_last):
            conv.to(memory_format=layout)
            assert not fuses or fuse(optimizer)
            optimizer.zero_grad()
            conv(torch.randn(2, 3, 8, 8)).square().sum().backward()
            optimizer.step()
        return conv.weight

    torch.testing.assert_close(trained(fuses=True), trained(fuses=False))


def test_with_other_optimizers_a_step_waits_once(tmp_path):
    seen = operators_of_a_step(tmp_path, "sgd")
    assert {name: seen[name] for name in Counts.WAITING if seen.get(name)} == {"_local_scalar_dense": 1}


def test_steps_whose_gradients_are_not_finite_are_left_out(tmp_path):
    class Spoiled(Imagen):
        def forward(self, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(*args, **kwargs) * (float("nan") if self.calls == 2 else 1)

    for optimizer in ("adam", "sgd"):
        imagen = Spoiled([BaseTest(dim_mults=(1,))], text_encoder_name="t5_small", image_sizes=8, timesteps=25)
        run, seen = Run(tmp_path / optimizer, imagen=imagen, optimizer=optimizer, data=Pictures(6), valid=[]), []
        run.train(callback=lambda step, run=run, seen=seen: seen.append(run.weights))
        assert identical(seen[1], seen[0]) and not identical(seen[2], seen[1]), optimizer
        assert "1 optimizer steps whose gradients were not finite" in run.log


def test_batches_without_images_are_counted(tmp_path):
    data = Pictures(10, missing=(2, 3))
    data.failures = {"not found": 2}
    parts = Subset(data, range(8)), Subset(data, range(8, 10))
    run = Run(tmp_path, data=parts[0], valid=parts[1], loader={"shuffle": False})
    steps = []
    run.train(callback=steps.append)
    assert [step.batch for step in steps] == [0, 2, 3]
    assert "Skipped: 1 batches without images; images of Pictures: {'not found': 2}\n" in run.log


def test_an_epoch_without_any_image_is_said_and_does_not_end_the_run(tmp_path):
    run = Run(tmp_path, data=Pictures(4, missing=range(4)))
    before = run.weights
    run.train()
    assert identical(run.weights, before)
    assert "No batch of epoch 1 could be used" in run.log


def test_only_chosen_unets_are_trained(tmp_path):
    run = Run(tmp_path, stages=2)
    before = run.weights
    run.train(unet_numbers=[2])
    after = run.weights
    assert {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])} == {"1"}
    assert [path.name for path in (tmp_path / "state_dicts").iterdir()] == ["unet_1_state_1.pth"]
    assert (tmp_path / "tmp" / "unet_0_tmp.pth").exists()

    run = Run(tmp_path / "only", imagen=make_imagen(2, only_train_unet_number=1))
    before = run.weights
    run.train()
    after = run.weights
    assert {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])} == {"0"}


def test_autocast_and_bfloat16_weights(tmp_path):
    run = Run(tmp_path, stages=2).train(autocast_dtype=torch.bfloat16, ema_decay=0.9)
    assert all(value.isfinite().all() for value in run.weights.values())
    assert not identical(run.weights, Run(tmp_path / "plain", stages=2).train().weights)
    run = Run(tmp_path / "bf16", imagen=make_imagen(2).to(torch.bfloat16)).train(ema_decay=0.9)
    assert run.imagen.unets[0].dtype == torch.bfloat16


def test_progress_is_silent_on_request_and_one_bar_an_epoch_otherwise(tmp_path, capfd):
    Run(tmp_path / "silent").train(progress=False)
    assert capfd.readouterr() == ("", "")
    Run(tmp_path / "shown", EPOCHS=2).train(progress=True)
    shown = capfd.readouterr()
    assert "Epoch 1/2" in shown.err and "Epoch 2/2" in shown.err and "loss=" in shown.err
    assert shown.out.count("Validation loss") == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"unet_numbers": [3]}, "unet_numbers must be one or more different numbers from 1 to 2"),
        ({"unet_numbers": []}, "unet_numbers"),
        ({"unet_numbers": [1, 1]}, "unet_numbers"),
        ({"autocast_dtype": torch.float16}, "autocast_dtype must be None or torch.bfloat16"),
        ({"ema_decay": 1.0}, "decay must lie in"),
        ({"max_grad_norm": 0}, "max_grad_norm must be positive or None"),
        ({"max_seconds": -1}, "max_seconds must be positive or None"),
        ({"timeout": -1}, "timeout must be"),
        ({"timeout": float("nan")}, "timeout must be"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, stages=2).train(**options)


@pytest.mark.parametrize("name, value", [("EPOCHS", -1), ("ACCUM_ITER", 0), ("CHCKPT_NUM", 0), ("CHCKPT_NUM", 1.5)])
def test_wrong_args_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        Run(tmp_path, **{name: value}).train()


def test_of_an_optimizer_of_some_u_nets_only_these_are_trained(tmp_path):
    run = Run(tmp_path, stages=2)
    run.optimizer = torch.optim.Adam(run.imagen.unets[1].parameters(), lr=1e-3)
    before = run.weights
    steps = []
    run.train(callback=steps.append)
    moved = {int(name.split(".")[1]) for name, x in run.weights.items() if not torch.equal(x, before[name])}
    assert moved == {1} and {step.unet_number for step in steps} == {2}
    # Not where Imagen has replaced a U-Net whose parameters it holds: that one was meant to learn.
    run.optimizer.add_param_group({"params": list(BaseTest().parameters())})
    with pytest.raises(ValueError, match=r"optimizer holds no parameter of imagen.unets\[0\]"):
        run.train("2")


def test_args_may_be_numpy_integers(tmp_path):
    run = Run(tmp_path, EPOCHS=np.int64(1), ACCUM_ITER=np.int64(2), CHCKPT_NUM=np.int64(3)).train()
    assert run.log.count("checkpoint") == 2


def test_training_that_cannot_work_is_refused(tmp_path):
    run = Run(tmp_path)
    run.optimizer = torch.optim.Adam(BaseTest().parameters())
    with pytest.raises(ValueError, match=r"optimizer holds no parameter of imagen.unets\[0\]"):
        run.train()
    run = Run(tmp_path)
    run.imagen.unets.requires_grad_(False)
    with pytest.raises(ValueError, match=r"all parameters of imagen.unets\[0\] .* have requires_grad=False"):
        run.train()
    with pytest.raises(ValueError, match="train_dataloader has no batch"):
        Run(tmp_path, data=Pictures(1), loader={"drop_last": True}).train()


# Validation


def test_validation_is_the_mean_over_images_with_fixed_noise_and_no_dropout(tmp_path):
    imagen = make_imagen(cond_drop_prob=1.0)
    valid = Pictures(5, missing=(2, 3), seed=2)  # batches of 2, 0 and 1 images
    run = Run(tmp_path, data=Pictures(2), valid=valid, imagen=imagen, EPOCHS=2)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.train()
    logged = [line for line in run.log.splitlines() if line.startswith("Validation loss")]
    assert len(logged) == 2 and logged[0] == logged[1], "the same weights have the same loss"

    expected, images = 0.0, 0
    imagen.cond_drop_prob = 0.0
    torch.manual_seed(0)  # what validation starts from; DataLoader draws one number, then times and noise are drawn
    with torch.no_grad():
        for batch in run.valid_loader:
            if batch is not None:
                loss = imagen(batch["image"], text_embeds=batch["encoding"], text_masks=batch["mask"])
                expected, images = expected + loss.item() * len(batch["image"]), images + len(batch["image"])
    assert images == 3
    assert logged[0] == f"Validation loss: U-Net 1: {expected / images:.4f}"
    assert "validation batches without images" in run.log


def test_validation_has_no_influence_on_the_training(tmp_path):
    with_validation = Run(tmp_path / "1", CHCKPT_NUM=1).train().weights
    without = Run(tmp_path / "2", valid=[]).train().weights
    assert identical(with_validation, without)


@pytest.mark.parametrize("fails", [False, True])
def test_validation_runs_in_evaluation_mode_and_restores_everything(tmp_path, fails):
    seen = []

    class Watched(Imagen):
        def forward(self, *args, **kwargs):
            seen.append((self.training, self.cond_drop_prob, torch.is_grad_enabled()))
            if fails and not self.training:
                raise Interruption
            return super().forward(*args, **kwargs)

    imagen = Watched([BaseTest()], text_encoder_name="t5_small", image_sizes=8, timesteps=25, cond_drop_prob=0.3)
    run = Run(tmp_path, data=Pictures(2), imagen=imagen)
    if fails:
        with pytest.raises(Interruption):
            run.train()
    else:
        run.train()
    assert seen == [(True, 0.3, True), (False, 0.0, False)]
    assert imagen.training and imagen.unets[0].training and imagen.cond_drop_prob == 0.3


@pytest.mark.parametrize("valid", [[], Pictures(2, missing=(0, 1))])
def test_without_validation_images_the_latest_weights_are_kept(tmp_path, valid):
    run = Run(tmp_path, stages=2, valid=valid, CHCKPT_NUM=2).train()
    assert "No validation image" in run.log
    for index in range(2):
        assert identical(run.file(f"state_dicts/unet_{index}_state_1.pth"), run.imagen.unets[index].state_dict())


def test_only_the_best_weights_are_kept(tmp_path):
    imagen = make_imagen()
    run = Run(tmp_path, imagen=imagen, optimizer="sgd")
    run.train()
    best = run.file("state_dicts/unet_0_state_1.pth")
    assert identical(best, imagen.unets[0].state_dict())

    # Weights that get worse after the first checkpoint.
    run = Run(tmp_path / "2", imagen=imagen, data=Pictures(4), optimizer="sgd", CHCKPT_NUM=1)

    def spoil(step):
        if step.batch == 1:
            with torch.no_grad():
                imagen.unets[0].final_conv.weight.add_(100)

    run.train(callback=spoil)
    assert not identical(run.file("state_dicts/unet_0_state_1.pth"), run.file("tmp/unet_0_tmp.pth"))
    assert run.file("state_dicts/unet_0_state_1.pth")["final_conv.weight"].max() < 50


def test_best_weights_stay_when_validation_images_cannot_be_had_any_more(tmp_path):
    valid = Pictures(2, seed=2)
    run = Run(tmp_path, data=Pictures(4), valid=valid, CHCKPT_NUM=1)

    def lose(step):
        if step.batch == 1:
            valid.missing = (0, 1)

    run.train(callback=lose)
    assert "No validation image" in run.log
    assert not identical(run.file("state_dicts/unet_0_state_1.pth"), run.file("tmp/unet_0_tmp.pth"))


def test_a_loss_that_is_not_a_number_is_never_the_best(tmp_path):
    run = Run(tmp_path, data=Pictures(2), optimizer="sgd")
    for group in run.optimizer.param_groups:
        group["lr"] = float("nan")
    run.train()
    assert "Validation loss: U-Net 1: nan" in run.log
    assert not list((tmp_path / "state_dicts").iterdir())


def test_averaged_weights_are_validated_and_saved(tmp_path):
    run = Run(tmp_path).train(ema_decay=0.9)
    plain = Run(tmp_path / "plain").train()
    assert identical(run.weights, plain.weights), "the average has no influence on the training"
    assert identical(run.file("tmp/unet_0_tmp.pth"), run.imagen.unets[0].state_dict())
    best = run.file("state_dicts/unet_0_state_1.pth")
    assert not identical(best, run.imagen.unets[0].state_dict())

    # The weights saved are those that the validation loss was computed with.
    imagen = make_imagen(cond_drop_prob=0.0)
    imagen.unets[0].load_state_dict(best)
    [batch] = run.valid_loader
    torch.manual_seed(0)
    iter(run.valid_loader)
    loss = imagen.eval()(batch["image"], text_embeds=batch["encoding"], text_masks=batch["mask"])
    assert f"Validation loss: U-Net 1: {loss.item():.4f}" in run.log


def test_a_loss_per_image_is_trained_by_its_mean(tmp_path):
    runs = []
    for name, dims in (("mean", (0, 1, 2, 3)), ("per_image", (1, 2, 3))):
        run = Run(tmp_path / name)
        run.imagen.loss_fn = lambda predicted, noise, dims=dims: (predicted - noise).square().mean(dims)
        runs.append(run.train())
    one, other = runs
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-4, atol=1e-6)
