"""Settings of a training, its optimizer and its learning rate."""

import json
import math

import pytest
import torch
from fast_path import Counts
from training_runs import make_imagen

from minimagen_fast.optimizers import build_optimizer, fuse, learning_rate_schedule
from minimagen_fast.settings import TrainingSettings


def test_settings_survive_a_file_with_other_entries(tmp_path):
    settings = TrainingSettings(epochs=3, unet_numbers=[2], seed=7, ema_decay=0.99, min_snr_gamma=5.0, keep_every=100)
    settings.save(tmp_path / "config.json", batch_size=8)
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 8
    assert TrainingSettings.load(tmp_path / "config.json") == settings
    for content, message in (("{", "is not valid JSON"), ("[" * 100_000, "is not valid JSON"), ("[]", "an object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
            TrainingSettings.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    "name, value",
    [
        ("epochs", -1),
        ("epochs", True),
        ("accumulate", 0),
        ("checkpoint_interval", 1.5),
        ("max_bad_steps", 0),
        ("keep_last", 0),
        ("keep_every", 0),
        ("sample_interval", -1),
        ("max_grad_norm", 0),
        ("max_seconds", -1),
        ("min_snr_gamma", 0),
        ("seed", -1),
        ("ema_decay", 1),
        ("precision", "float16"),
        ("max_seconds", "60"),
        ("max_grad_norm", True),
        ("ema_decay", "0.9"),
        ("batch_seconds", -1),
        ("unet_numbers", 1),
    ],
)
def test_what_is_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must"):
        TrainingSettings(**{name: value})


def rates(kind, warmup, total, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = learning_rate_schedule(optimizer, kind, warmup, total)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_and_cosine():
    assert rates("constant", 4, None, 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    expected = [1.0, 2.0] + [1 + math.cos(math.pi * step / 8) for step in range(9)]
    assert rates("cosine", 2, 10, 11) == pytest.approx([*expected[:2], *expected[2:]], abs=1e-12)
    assert rates("cosine", 0, 4, 6)[-2:] == pytest.approx([0.0, 0.0], abs=1e-12)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    assert learning_rate_schedule(optimizer, "constant", 0, None) is None
    for arguments in (("linear", 0, 5), ("cosine", 0, None), ("cosine", 5, 5), ("constant", -1, None)):
        with pytest.raises(ValueError):
            learning_rate_schedule(optimizer, *arguments)


def test_each_unet_has_its_learning_rate_and_the_others_none():
    imagen = make_imagen(2)
    optimizer = build_optimizer(imagen, {2: 1e-3})
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 1e-3
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in imagen.unets[1].parameters()
    }
    both = build_optimizer(imagen, {1: 1e-3, 2: 1e-4}, weight_decay=0.1)
    assert type(both) is torch.optim.AdamW and [group["lr"] for group in both.param_groups] == [1e-3, 1e-4]
    with pytest.raises(ValueError, match="learning rates must be positive"):
        build_optimizer(imagen, {1: 0.0})


def steps(optimizer, parameter, number=3):
    """The operators of some steps."""
    with Counts() as seen:
        for _ in range(number):
            optimizer.zero_grad()
            (parameter**2).sum().backward()
            optimizer.step()
    return seen.names


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_optimizer_that_is_built_updates_all_parameters_at_once(weight_decay):
    imagen = make_imagen(2)
    optimizer = build_optimizer(imagen, {1: 1e-3, 2: 1e-4}, weight_decay)
    name = "_fused_adamw_" if weight_decay else "_fused_adam_"
    for parameter in imagen.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Counts() as seen:
        optimizer.step()
    assert {name: 2} == {key: count for key, count in seen.names.items() if "fused" in key}, "one for each rate"
    assert seen.waits() == []


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_that_is_fused_goes_on_where_it_was(make):
    values = torch.randn(5, generator=torch.Generator().manual_seed(0))
    plain, fused = (torch.nn.Parameter(values.clone()) for _ in range(2))
    optimizers = make([plain], lr=0.1), make([fused], lr=0.1)
    for optimizer, parameter in zip(optimizers, (plain, fused), strict=True):
        steps(optimizer, parameter)
    assert fuse(optimizers[1]) and fuse(optimizers[1]), "the second time there is nothing to do"
    assert any("fused" in name for name in steps(optimizers[1], fused))
    steps(optimizers[0], plain)
    torch.testing.assert_close(fused, plain)
    assert optimizers[1].state[fused]["step"] == 6

    before = fused.detach().clone()
    optimizers[1].found_inf = torch.ones(())
    steps(optimizers[1], fused)
    assert torch.equal(fused, before) and optimizers[1].state[fused]["step"] == 6

    # A state of one that was not fused brings its settings along.
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    del optimizers[1].found_inf
    assert not optimizers[1].param_groups[0]["fused"] and fuse(optimizers[1])
    assert any("fused" in name for name in steps(optimizers[1], fused))


class Derived(torch.optim.Adam):
    pass


@pytest.mark.parametrize(
    "make, options, heeds",
    [
        (torch.optim.Adam, {"fused": False}, False),
        (torch.optim.Adam, {"foreach": True}, False),
        (torch.optim.Adam, {"differentiable": True}, False),
        (torch.optim.Adam, {"fused": True}, True),
        (torch.optim.SGD, {}, False),
        (torch.optim.SGD, {"fused": True}, True),
        (torch.optim.SGD, {"fused": True, "momentum": 0.9}, False),
        (Derived, {}, False),
    ],
)
def test_what_an_optimizer_was_told_stays(make, options, heeds):
    optimizer = make([torch.nn.Parameter(torch.zeros(2))], lr=0.1, **options)
    before = optimizer.state_dict()
    assert fuse(optimizer) == heeds and optimizer.state_dict() == before


def test_parameters_on_devices_without_a_fused_step():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2, device="meta"))])
    assert not fuse(optimizer) and optimizer.param_groups[0]["fused"] is None
