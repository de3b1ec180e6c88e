"""What is the same for steps of training that are captured in graphs and for those that are recorded."""

import io

import pytest
import torch
from fast_path import distance, make_imagen
from recorded_graph import record_cuda_graphs
from replayed_steps import (
    BACKWARD_PASSES_FIRST,
    INTERFERENCES,
    assert_same,
    count_recordings,
    eager,
    freeze,
    gradients_of,
    loss_of,
    not_normalised,
    other_eps,
    other_loss,
    other_schedule,
    replace,
    replays,
    step,
    warm,
    weighed,
)
from torch.utils.flop_counter import FlopCounterMode

from minimagen_fast.kernels import dispatch


@pytest.fixture(params=["captured", "recorded"])
def replayed(request, monkeypatch):
    """How often each step that was taken down was replayed: (forward, backward)."""
    if request.param == "captured":
        graphs = record_cuda_graphs(monkeypatch)
        return lambda: replays(graphs)
    recordings = count_recordings(monkeypatch)
    return lambda: [tuple(runs.passes) for runs in recordings]


def test_the_losses_of_two_u_nets_in_one_backward_pass(replayed, monkeypatch):
    imagen = make_imagen(stages=2)
    for stage in (1, 2):
        warm(imagen, stage=stage)
    expected = [eager(monkeypatch, imagen, 5, stage=stage)[1] for stage in (1, 2)]
    imagen.zero_grad()
    (loss_of(imagen, 5, stage=1) + loss_of(imagen, 5, stage=2)).backward()
    for mine, *theirs in zip(gradients_of(imagen), *expected, strict=True):
        (one,) = [each for each in theirs if each is not None] or [None]
        assert mine is one or torch.equal(mine, one)
    assert replayed() == [(1, 1), (1, 1)]


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_change_before_the_backward_pass_are_noticed(replayed, frozen):
    imagen = make_imagen()
    weight = imagen.unets[0].final_conv.weight.requires_grad_(not frozen)
    warm(imagen)
    loss = loss_of(imagen)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between"):
        loss.backward()


def test_weights_that_lie_elsewhere_are_taken_down_anew(replayed, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    weight = imagen.unets[0].final_conv.weight
    weight.data = weight.data * 2
    for seed in range(4):
        assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert replayed() == [(1, 1), (2, 2)]


@pytest.mark.parametrize("change", [freeze, replace, other_eps, torch.nn.Module.eval])
def test_a_u_net_that_changes_is_taken_down_anew(replayed, monkeypatch, change):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    change(imagen.unets[0])
    for seed in range(4):
        assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert replayed() == [(1, 1), (2, 2)]


@pytest.mark.parametrize("use", [dispatch.use_implementation, dispatch.use_attention])
def test_other_kernels_are_taken_down_anew(replayed, monkeypatch, use):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    with use("reference"):
        for seed in range(3):
            assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert replayed() == [(1, 1), (1, 1)]


@pytest.mark.parametrize("change", [other_loss, not_normalised, other_schedule, weighed])
def test_what_is_computed_otherwise_is_taken_down_anew(replayed, monkeypatch, change):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    options = change(imagen) or {}
    for seed in range(3):
        assert_same(step(imagen, seed, **options), eager(monkeypatch, imagen, seed, **options))
    assert replayed() == [(1, 1), (1, 1)]


def test_a_noise_schedule_that_is_edited_in_place_is_followed(replayed, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    before = step(imagen)
    imagen.noise_schedulers[0].sqrt_one_minus_alphas_cumprod.mul_(0.5)
    after = step(imagen)
    assert_same(after, eager(monkeypatch, imagen))
    assert distance(after[0], before[0]) > 1e-4 and replayed() == [(2, 2)]


@pytest.mark.parametrize("interfere", INTERFERENCES)
def test_what_does_more_than_compute_is_called(replayed, interfere):
    imagen, called = make_imagen(), []
    warm(imagen)
    undo = interfere(imagen, called)
    try:
        for number in range(1, 6):
            step(imagen)
            assert len(called) == number
    finally:
        if undo:
            undo()
    assert not replayed()


def test_modes_and_hooks_of_saved_tensors_see_the_step(replayed):
    imagen, saved = make_imagen(), []
    warm(imagen)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(1) or x, lambda x: x):
        step(imagen)
    with FlopCounterMode(display=False) as counter:
        step(imagen)
    with torch.no_grad():
        loss_of(imagen)
    assert saved and counter.get_total_flops() and not replayed()


@pytest.mark.parametrize("early", [False, True])
def test_hooks_of_parameters_are_called_once(replayed, monkeypatch, early):
    imagen, seen = make_imagen(), []
    expected = eager(monkeypatch, imagen)
    warm(imagen)
    if not early:
        step(imagen)
    weight = imagen.unets[0].final_conv.weight
    weight.register_hook(lambda gradient: seen.append("hook") or gradient * 2)
    weight.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    actual = step(imagen)
    index = [id(parameter) for parameter in imagen.parameters()].index(id(weight))
    expected[1][index] *= 2
    assert_same(actual, expected)
    assert seen == ["hook", "accumulated"] and replayed() == [(1, 1) if early else (2, 2)]


def test_hooks_of_unused_parameters_are_not_called(replayed, monkeypatch):
    imagen = make_imagen()
    unused = imagen.unets[0].final_conv.extra = torch.nn.Parameter(torch.ones(3))
    unused.register_hook(lambda gradient: gradient * 2)
    for seed in range(4):
        assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert unused.grad is None and replayed() == [(2, 2)]


@pytest.mark.filterwarnings("error")
def test_losses_can_be_saved(replayed):
    imagen = make_imagen()
    for _ in range(BACKWARD_PASSES_FIRST + 1):
        file, loss = io.BytesIO(), loss_of(imagen)
        torch.save({"loss": loss}, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True)["loss"], loss)
        loss.backward()
    assert replayed() == [(1, 1)]


def test_several_processes_take_nothing_down(replayed, monkeypatch):
    imagen = make_imagen()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for _ in range(4):
        step(imagen)
    assert not replayed()
