"""The training directory, the training arguments and the training loop."""

import json
import signal
import threading
import time
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from minimagen_fast import checkpoint, training
from minimagen_fast.Imagen import Imagen
from minimagen_fast.interrupts import TimeLimitExceeded, time_limit, uninterrupted
from minimagen_fast.training import (
    MinimagenCollator,
    MinimagenTrain,
    TrainingStep,
    create_directory,
    get_default_args,
    get_minimagen_parser,
    get_model_params,
    get_model_size,
    load_restart_training_parameters,
    load_testing_parameters,
    save_training_info,
)
from minimagen_fast.Unet import Base, BaseTest, SuperTest, Unet


class Pictures(Dataset):
    """Random pictures in memory; those in `missing` could not be had."""

    def __init__(self, number=8, size=16, missing=(), seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.missing = missing
        self.items = [
            {
                "image": torch.rand(3, size, size, generator=generator),
                "encoding": torch.randn(1, 3, 512, generator=generator),
                "mask": torch.ones(1, 3, dtype=torch.bool),
            }
            for _ in range(number)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return None if index in self.missing else dict(self.items[index])


def make_imagen(stages=1, **options):
    torch.manual_seed(0)
    smallest = {"dim_mults": (1,), "num_resnet_blocks": 0}
    unets = [BaseTest(**smallest), SuperTest(lowres_cond=True, **smallest)][:stages]
    settings = {"text_encoder_name": "t5_small", "image_sizes": (8, 16)[:stages], "timesteps": 25}
    return Imagen(unets, **{**settings, **options})


class Run:
    """What MinimagenTrain needs, at a size that trains in no time; the same every time it is made."""

    def __init__(self, folder, stages=1, data=None, valid=None, imagen=None, optimizer="adam", loader=None, **args):
        self.folder = Path(folder)
        self.imagen = make_imagen(stages) if imagen is None else imagen
        kinds = {
            "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
            "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        }
        self.optimizer = kinds[optimizer](self.imagen.parameters())
        data = Pictures() if data is None else data
        valid = Pictures(2, seed=2) if valid is None else valid
        options = {"batch_size": 2, "shuffle": True, "collate_fn": MinimagenCollator("cpu"), **(loader or {})}
        self.train_loader = DataLoader(data, **options)
        self.valid_loader = DataLoader(valid, batch_size=2, collate_fn=MinimagenCollator("cpu")) if len(valid) else []
        self.args = Namespace(**{**vars(get_minimagen_parser().parse_args([])), "EPOCHS": 1, **args})

    def train(self, timestamp="1", timeout=60, **options):
        torch.manual_seed(7)
        result = MinimagenTrain(
            timestamp,
            self.args,
            list(self.imagen.unets),
            self.imagen,
            self.train_loader,
            self.valid_loader,
            create_directory(self.folder),
            self.optimizer,
            timeout,
            **{"progress": False, **options},
        )
        assert result is None
        return self

    @property
    def weights(self):
        return {name: value.detach().clone() for name, value in self.imagen.state_dict().items()}

    @property
    def log(self):
        return (self.folder / "training_progess.txt").read_text()

    def file(self, name):
        return checkpoint.load(self.folder / name)


def identical(one, other):
    """Whether two nested states are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return one == other


class Interruption(Exception):
    pass


def interrupt_at(epoch, batch, error=Interruption):
    def callback(step):
        if (step.epoch, step.batch) == (epoch, batch):
            raise error("now")

    return callback


# Arguments


def test_parser_has_the_documented_flags_and_defaults():
    expected = {
        "PARAMETERS": ("-p", str, None),
        "NUM_WORKERS": ("-n", int, 0),
        "BATCH_SIZE": ("-b", int, 2),
        "MAX_NUM_WORDS": ("-mw", int, 64),
        "IMG_SIDE_LEN": ("-s", int, 128),
        "EPOCHS": ("-e", int, 5),
        "T5_NAME": ("-t5", str, "t5_base"),
        "TRAIN_VALID_FRAC": ("-f", float, 0.9),
        "TIMESTEPS": ("-t", int, 1000),
        "OPTIM_LR": ("-lr", float, 0.0001),
        "ACCUM_ITER": ("-ai", int, 1),
        "CHCKPT_NUM": ("-cn", int, 500),
        "VALID_NUM": ("-vn", int, None),
        "RESTART_DIRECTORY": ("-rd", str, None),
        "TESTING": ("-test", None, False),
    }
    parser = get_minimagen_parser()
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert list(actions) == list(expected)
    for name, (flag, kind, default) in expected.items():
        assert actions[name].option_strings == [flag, f"--{name}"]
        assert (actions[name].type, actions[name].default) == (kind, default)
    args = parser.parse_args("-t 25 -t5 t5_small -test -e 1 -f 0.5 --RESTART_DIRECTORY there".split())
    assert (args.TIMESTEPS, args.T5_NAME, args.TESTING, args.EPOCHS) == (25, "t5_small", True, 1)
    assert (args.TRAIN_VALID_FRAC, args.RESTART_DIRECTORY) == (0.5, "there")


@pytest.mark.parametrize("kind", [Namespace, dict])
def test_testing_parameters(kind):
    args = kind(vars(get_minimagen_parser().parse_args(["-ai", "3"]))) if kind is dict else Namespace(ACCUM_ITER=3)
    assert load_testing_parameters(args) is args
    values = args if kind is dict else vars(args)
    expected = {
        "BATCH_SIZE": 2,
        "MAX_NUM_WORDS": 32,
        "IMG_SIDE_LEN": 128,
        "EPOCHS": 2,
        "T5_NAME": "t5_small",
        "TRAIN_VALID_FRAC": 0.5,
        "TIMESTEPS": 25,
        "OPTIM_LR": 0.0001,
    }
    assert {name: values[name] for name in expected} == expected
    assert values["ACCUM_ITER"] == 3


@pytest.mark.parametrize("justparams", [False, True])
def test_restart_takes_over_four_arguments_and_no_others(tmp_path, justparams):
    earlier = get_minimagen_parser().parse_args("-mw 10 -s 32 -t5 folder=with=signs -t 50 -lr 0.5 -e 9".split())
    save_training_info(earlier, "20240101", [], {}, 1.0, create_directory(tmp_path))
    earlier.TIMESTEPS = 60
    save_training_info(earlier, "20240102", [], {}, 1.0, create_directory(tmp_path))

    source = {"PARAMETERS": str(tmp_path / "parameters")} if justparams else {"RESTART_DIRECTORY": str(tmp_path)}
    args = Namespace(**{**vars(get_minimagen_parser().parse_args([])), **source})
    assert load_restart_training_parameters(args, justparams=justparams) is args
    assert (args.MAX_NUM_WORDS, args.IMG_SIDE_LEN, args.T5_NAME) == (10, 32, "folder=with=signs")
    assert args.TIMESTEPS == 60, "the newest of several files counts"
    assert (args.OPTIM_LR, args.EPOCHS, args.VALID_NUM) == (0.0001, 5, None)


def test_restart_parameters_that_are_missing_or_wrong_are_named(tmp_path):
    with pytest.raises(ValueError, match="args.RESTART_DIRECTORY must name"):
        load_restart_training_parameters(Namespace(RESTART_DIRECTORY=None))
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load_restart_training_parameters(Namespace(PARAMETERS=str(tmp_path / "nowhere")), justparams=True)
    with pytest.raises(FileNotFoundError, match="no training_parameters_TIMESTAMP.txt: check PARAMETERS"):
        load_restart_training_parameters(Namespace(PARAMETERS=str(tmp_path)), justparams=True)
    (tmp_path / "training_parameters_1.txt").write_text("--T5_NAME=None\n--TIMESTEPS=2.5")
    with pytest.raises(ValueError, match="TIMESTEPS must be of type int, got '2.5'"):
        load_restart_training_parameters(Namespace(PARAMETERS=str(tmp_path)), justparams=True)


def test_default_args_of_classes_and_functions():
    assert get_default_args(Unet)["dim_mults"] == (1, 2, 4) and "self" not in get_default_args(Unet)
    base = get_default_args(Base)
    assert base.keys() == get_default_args(Unet).keys()
    assert (base["dim"], base["num_resnet_blocks"], base["attn_heads"]) == (512, 3, 8)

    class Wide(Unet):
        defaults = {"dim": 64}

    assert get_default_args(Wide) == {**get_default_args(Unet), "dim": 64}
    assert get_default_args(Imagen)["timesteps"] == 1000 and "unets" not in get_default_args(Imagen)
    assert get_default_args(create_directory) == {}
    assert get_default_args(load_restart_training_parameters) == {"justparams": False}


# Training directory


def test_directory_is_found_from_anywhere_and_left_on_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "tmp").mkdir(parents=True)  # there already, but without its other folders
    training_dir = create_directory("run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"parameters", "state_dicts", "tmp"}

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with training_dir():
        assert Path.cwd() == tmp_path / "run"
        with training_dir("tmp") as path:
            assert Path.cwd() == tmp_path / "run" / "tmp" == path
        assert Path.cwd() == tmp_path / "run"
    with pytest.raises(Interruption), training_dir("parameters"):
        raise Interruption
    assert Path.cwd() == elsewhere


def test_training_info_is_written_and_read_back(tmp_path, capsys):
    training_dir = create_directory(tmp_path)
    unets = [{"dim": number, "dim_mults": (1, 2), "cond_dim": None} for number in range(12)]
    args = Namespace(EPOCHS=5, T5_NAME="t5_base", RESTART_DIRECTORY="earlier", VALID_NUM=None)
    save_training_info(args, "20240101_000000", unets, {"image_sizes": (8, 16)}, 1.5, training_dir)

    folder = tmp_path / "parameters"
    assert (folder / "training_parameters_20240101_000000.txt").read_text() == (
        "--EPOCHS=5\n--T5_NAME=t5_base\n--RESTART_DIRECTORY=earlier\n--VALID_NUM=None\n"
    )
    assert "1.500 MB" in (tmp_path / "training_progess.txt").read_text()
    assert "earlier" in (tmp_path / "training_progess.txt").read_text()

    for foreign in ("unet_notes.json", "imagen.txt", ".DS_Store", "unet_3_params_20240101_000000.json~"):
        (folder / foreign).write_text("not JSON")
    unets_params, imagen_params = get_model_params(folder)
    assert [params["dim"] for params in unets_params] == list(range(12))
    assert unets_params[0] == {"dim": 0, "dim_mults": [1, 2], "cond_dim": None}
    assert imagen_params == {"image_sizes": [8, 16]}
    assert capsys.readouterr().out == ""

    save_training_info(vars(args), "20240102_000000", [{"dim": 99}], {"image_sizes": [4]}, 1.5, training_dir)
    unets_params, imagen_params = get_model_params(folder)
    assert unets_params[0] == {"dim": 99} and len(unets_params) == 12
    assert imagen_params == {"image_sizes": [4]}


def test_parameters_that_json_does_not_have_leave_no_half_written_file(tmp_path):
    with pytest.raises(TypeError, match=r"unets_params\[1\] must hold only values that JSON has"):
        save_training_info(Namespace(), "1", [{}, {"device": torch.device("cpu")}], {}, 1.0, create_directory(tmp_path))
    assert list((tmp_path / "parameters").iterdir()) == []


def test_missing_parameters_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        get_model_params(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no imagen_params_TIMESTAMP.json"):
        get_model_params(tmp_path)
    (tmp_path / "imagen_params_1.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no unet_0_params_TIMESTAMP.json"):
        get_model_params(tmp_path)
    (tmp_path / "unet_1_params_1.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="lacks the parameters of U-Net 0, but has those of 1"):
        get_model_params(tmp_path)
    (tmp_path / "unet_0_params_1.json").write_text('{"dim": ')
    with pytest.raises(ValueError, match=r"unet_0_params_1\.json is not valid JSON"):
        get_model_params(tmp_path)


def test_model_size_counts_parameters_and_buffers():
    module = nn.BatchNorm1d(1024)  # 2 parameters and 2 buffers of 1024 float32, and one int64
    assert get_model_size(module) == (4 * 1024 * 4 + 8) / 2**20


# The training loop


def test_training_changes_the_weights_and_writes_the_documented_files(tmp_path):
    run = Run(tmp_path, stages=2, CHCKPT_NUM=3)
    before = run.weights
    steps = []
    run.train("20240101_000000", callback=steps.append)

    after = run.weights
    moved = {int(name.split(".")[1]) for name in after if not torch.equal(after[name], before[name])}
    assert moved == {0, 1}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "state_dicts/unet_0_state_20240101_000000.pth",
        "state_dicts/unet_1_state_20240101_000000.pth",
        "tmp/unet_0_tmp.pth",
        "tmp/unet_1_tmp.pth",
        "tmp/training_state.pth",
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


def test_accumulated_gradients_are_averaged_also_in_the_last_partial_group(tmp_path):
    data = Pictures(10)  # 5 batches: one group of 3 and one of 2
    run = Run(tmp_path, data=data, loader={"shuffle": False}, optimizer="sgd", valid=[], ACCUM_ITER=3)
    run.train(max_grad_norm=None)

    other = Run(tmp_path / "other", data=data, loader={"shuffle": False}, optimizer="sgd")
    torch.manual_seed(7)
    batches = list(other.train_loader)
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
        run = Run(tmp_path / str(batches), data=Pictures(2 * batches), optimizer="sgd", loader={"shuffle": False})
        reads.clear()
        run.train()
        counts.append(len(reads))
    assert counts[0] == counts[1]


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
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, stages=2).train(**options)


@pytest.mark.parametrize("name, value", [("EPOCHS", -1), ("ACCUM_ITER", 0), ("CHCKPT_NUM", 0), ("CHCKPT_NUM", 1.5)])
def test_wrong_args_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        Run(tmp_path, **{name: value}).train()


def test_training_that_cannot_work_is_refused(tmp_path):
    run = Run(tmp_path)
    run.optimizer = torch.optim.Adam(BaseTest().parameters())
    with pytest.raises(ValueError, match=r"optimizer holds no parameter of imagen.unets\[0\]"):
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
    assert run.file("tmp/training_state.pth")["position"]["batch"] == 3


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
    assert run.file("tmp/training_state.pth")["position"]["batch"] == 2


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
    state, expected = second.file("tmp/training_state.pth"), whole.file("tmp/training_state.pth")
    for part in ("optimizer", "averages", "lr_scheduler", "best_losses", "position"):
        assert identical(state[part], expected[part])
    assert identical(second.file("state_dicts/unet_0_state_2.pth"), whole.file("state_dicts/unet_0_state_1.pth"))
    for line in ("Mean training loss", "Validation loss", "Best validation loss"):
        assert [text for text in whole.log.splitlines() if text.startswith(line)][-1] in second.log
    assert {path: path.read_bytes() for path in files} == files, "the first directory is left as it was"


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


def test_a_restart_in_the_same_directory_and_out_of_time(tmp_path):
    data = Pictures(4)
    whole = Run(tmp_path / "whole", data=data, EPOCHS=2).train()
    for part in range(4):
        run = Run(tmp_path / "parts", data=data, EPOCHS=2)
        run.args.RESTART_DIRECTORY = str(tmp_path / "parts") if part else None
        run.train(str(part), max_seconds=1e-6)  # one batch
        assert run.log.count("Time is up") == min(part + 1, 3)
    assert identical(run.weights, whole.weights)
    assert run.file("tmp/training_state.pth")["position"]["epoch"] == 2


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


def test_best_weights_come_along_even_if_they_are_never_improved_on(tmp_path):
    Run(tmp_path / "first").train()
    state = checkpoint.load(tmp_path / "first" / "tmp" / "training_state.pth")
    state["best_losses"][1] = -1.0
    checkpoint.save(state, tmp_path / "first" / "tmp" / "training_state.pth")
    second = restart(Run(tmp_path / "second", EPOCHS=2), tmp_path / "first")
    best = checkpoint.load(tmp_path / "first" / "state_dicts" / "unet_0_state_1.pth")
    assert identical(second.file("state_dicts/unet_0_state_2.pth"), best)
    assert "Best validation loss: U-Net 1: -1.0000" in second.log


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"stages": 2}, {}, "number of U-Nets: 1 in that training, 2 in this one"),
        ({"optimizer": "sgd"}, {}, "optimizer: Adam in that training, SGD in this one"),
        ({"data": Pictures(6)}, {}, "batches in an epoch: 4 in that training, 3 in this one"),
        ({}, {"ema_decay": 0.9}, "ema_decay"),
        ({"imagen": "larger"}, {}, "size mismatch"),
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
    with pytest.raises(ValueError, match="cannot be continued: there is no checkpoint file .*training_state.pth"):
        restart(Run(tmp_path / "second"), tmp_path / "nowhere")
    Run(tmp_path / "first").train()
    state = tmp_path / "first" / "tmp" / "training_state.pth"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be continued: .*cut short or damaged"):
        restart(Run(tmp_path / "second"), tmp_path / "first")
    checkpoint.save({"version": 1}, state)
    with pytest.raises(ValueError, match="cannot be continued: lacks 'position'"):
        restart(Run(tmp_path / "second"), tmp_path / "first")


def test_a_directory_of_the_original_package_starts_anew_with_a_warning(tmp_path):
    Run(tmp_path / "first").train()
    (tmp_path / "first" / "tmp" / "training_state.pth").unlink()
    second = Run(tmp_path / "second")
    with pytest.warns(UserWarning, match="no tmp/training_state.pth"):
        restart(second, tmp_path / "first")
    assert identical(second.weights, Run(tmp_path / "plain").train().weights)


# The documented way to use it all


def test_a_training_script_as_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, valid_data = Pictures(4, size=128), Pictures(2, size=128, seed=2)
    device = torch.device("cpu")
    args = load_testing_parameters(get_minimagen_parser().parse_args([]))
    args.EPOCHS = 1
    training_dir = create_directory("./training_1")

    options = {**training.get_minimagen_dl_opts(device), "batch_size": args.BATCH_SIZE, "num_workers": args.NUM_WORKERS}
    train_dataloader, valid_dataloader = DataLoader(data, **options), DataLoader(valid_data, **options)

    unets_params = [get_default_args(BaseTest), get_default_args(SuperTest)]
    unets = [Unet(**params).to(device) for params in unets_params]
    imagen_params = {
        "image_sizes": (args.IMG_SIDE_LEN // 2, args.IMG_SIDE_LEN),
        "timesteps": args.TIMESTEPS,
        "cond_drop_prob": 0.15,
        "text_encoder_name": args.T5_NAME,
    }
    with pytest.warns(UserWarning, match="U-Net 2 was replaced"):
        imagen = Imagen(unets=unets, **imagen_params).to(device)
    unets_params = [{**get_default_args(Unet), **params} for params in unets_params]
    imagen_params = {**get_default_args(Imagen), **imagen_params}
    save_training_info(args, "1", unets_params, imagen_params, get_model_size(imagen), training_dir)
    optimizer = torch.optim.Adam(imagen.parameters(), lr=args.OPTIM_LR)
    before = {name: value.clone() for name, value in imagen.state_dict().items()}
    MinimagenTrain("1", args, unets, imagen, train_dataloader, valid_dataloader, training_dir, optimizer, timeout=30)
    assert not identical(before, imagen.state_dict())
    assert Path.cwd() == tmp_path
    assert {path.name for path in Path("training_1").rglob("*.pth")} == {
        "unet_0_tmp.pth",
        "unet_1_tmp.pth",
        "training_state.pth",
        "unet_0_state_1.pth",
        "unet_1_state_1.pth",
    }
    assert json.loads(Path("training_1/parameters/imagen_params_1.json").read_text())["image_sizes"] == [64, 128]


def test_data_names_are_members_of_the_module():
    for name in ("ConceptualCaptions", "MinimagenDataset", "MinimagenCollator", "get_minimagen_dl_opts"):
        assert name in training.__all__ and hasattr(training, name)
