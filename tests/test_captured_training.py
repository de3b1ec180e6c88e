"""Replayed steps of training, on a CPU with a stand-in for CUDA graphs."""

import contextlib
import copy
import gc
import itertools
import pickle
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from fast_path import distance, make_imagen, make_words
from recorded_graph import record_cuda_graphs
from replayed_steps import (
    assert_same,
    eager,
    gradients_of,
    loss_of,
    replays,
    step,
    warm,
)

from minimagen_fast import captured_training, cuda_capture
from minimagen_fast.acceleration import ASKED_FOR, ENVIRONMENT_VARIABLE
from minimagen_fast.kept import KEPT


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(cuda_capture, "_failed", [])
    return record_cuda_graphs(monkeypatch)


OPTIONS = [{}, {"seeds": [5, 6, 7]}, {"min_snr_gamma": 5.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_replayed_steps_are_the_same_to_the_bit(graphs, monkeypatch, stage, options):
    imagen = make_imagen(stages=2)
    for seed in range(6):
        # Texts of other lengths, other images, noise, times and dropped texts, and other weights.
        options = {**options, "tokens": 3 + 50 * seed, "stage": stage}
        expected = eager(monkeypatch, imagen, seed, **options)
        assert_same(step(imagen, seed, **options), expected)
        with torch.no_grad():
            for parameter in imagen.parameters():
                parameter.mul_(1.01)
    assert replays(graphs) == [(4, 4)]


@pytest.mark.parametrize("tokens", [1, 5, 256, 300])
@pytest.mark.parametrize("masked", [True, False])
def test_the_text_is_that_of_a_step_without_graphs(graphs, masked, tokens):
    imagen = make_imagen()
    for seed in range(4):
        expected = step(copy.deepcopy(imagen).accelerate(condition_cache="off"), seed, tokens=tokens, masked=masked)
        actual = step(imagen, seed, tokens=tokens, masked=masked)
        assert distance(actual[0], expected[0]) < 1e-6
        for mine, theirs in zip(actual[1], expected[1], strict=True):
            assert mine is theirs or distance(mine, theirs) < 1e-5
    assert replays(graphs) == [(2, 2)]


# Passes that overlap


def test_gradients_accumulate(graphs, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    expected = [eager(monkeypatch, imagen, seed)[1] for seed in (5, 6)]
    imagen.zero_grad()
    for seed in (5, 6):
        loss_of(imagen, seed).backward()
    for mine, *theirs in zip(gradients_of(imagen), *expected, strict=True):
        assert mine is None or distance(mine, sum(theirs)) < 1e-6
    assert replays(graphs) == [(2, 2)]


def test_losses_whose_backward_pass_has_not_run_keep_what_they_need(graphs, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    expected = [eager(monkeypatch, imagen, seed) for seed in (5, 6)]
    first, second = loss_of(imagen, 5), loss_of(imagen, 6)
    for loss, (value, gradients) in ((second, expected[1]), (first, expected[0])):
        imagen.zero_grad()
        loss.backward()
        assert_same((loss.detach(), gradients_of(imagen)), (value, gradients))
    assert replays(graphs) == [(1, 1)]
    # Also one of another shape, whose graphs share the memory.
    warm(imagen, batch=2)
    step(imagen, batch=2)
    loss = loss_of(imagen, 5)
    step(imagen, batch=2)
    assert replays(graphs) == [(2, 1), (1, 1)]
    imagen.zero_grad()
    loss.backward()
    assert_same((loss.detach(), gradients_of(imagen)), expected[0])


def test_losses_that_are_dropped_are_waited_for_no_more(graphs):
    imagen = make_imagen()
    warm(imagen)
    for seed in range(3):
        loss_of(imagen, seed)
    assert replays(graphs) == [(3, 0)]


def test_a_second_backward_pass_is_refused(graphs, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    loss = loss_of(imagen, 5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph=True say imagen.accelerate"):
        loss.backward()
    assert_same(step(imagen, 6), eager(monkeypatch, imagen, 6))
    # As it says, without graphs there may be two.
    imagen.accelerate("reference")
    loss = loss_of(imagen, 5)
    loss.backward(retain_graph=True)
    loss.backward()


def test_gradients_of_gradients_are_refused(graphs):
    imagen = make_imagen()
    warm(imagen)
    with pytest.raises(RuntimeError, match="create_graph=True say imagen.accelerate"):
        torch.autograd.grad(loss_of(imagen), imagen.unets[0].final_conv.weight, create_graph=True)


def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_a_step_in_another_thread_during_a_capture(graphs, monkeypatch):
    imagen, seen, capture = make_imagen(), [], torch.cuda.graph
    expected = eager(monkeypatch, imagen, 7)
    warm(imagen)

    @contextlib.contextmanager
    def watched(graph, **options):
        if not seen:
            seen.append(None)
            in_a_thread(lambda: seen.append(step(imagen, 7)))
        with capture(graph, **options):
            yield

    monkeypatch.setattr(torch.cuda, "graph", watched)
    step(imagen)
    assert_same(seen[1], expected)
    assert replays(graphs) == [(1, 1)]


def test_a_step_in_another_thread_during_a_backward_pass(graphs, monkeypatch):
    imagen, run_backward = make_imagen(), captured_training._Captured.run_backward
    warm(imagen)
    expected = eager(monkeypatch, imagen, 5)

    def watched(captured, gradient):
        in_a_thread(lambda: loss_of(imagen, 6))
        return run_backward(captured, gradient)

    monkeypatch.setattr(captured_training._Captured, "run_backward", watched)
    assert_same(step(imagen, 5), expected)
    assert replays(graphs) == [(1, 1)]


# What is captured anew, or not at all


@pytest.mark.parametrize(
    "settings", [{"precision": "bfloat16"}, {"memory_format": "contiguous"}, {"checkpoint_levels": [0, 1]}], ids=str
)
def test_other_settings_are_captured_anew(graphs, monkeypatch, settings):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    imagen.accelerate(**settings)
    for seed in range(4):
        assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert replays(graphs) == [(1, 1), (2, 2)]


def test_other_settings_of_the_environment_are_captured_anew(graphs, monkeypatch):
    # Nothing is called that could drop what was captured.
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "memory_format=contiguous")
    for seed in range(3):
        assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert replays(graphs) == [(1, 1), (1, 1)]


def test_a_probability_that_cannot_be_is_still_refused(graphs):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    imagen.cond_drop_prob = 1.5
    with pytest.raises(ValueError, match="cond_drop_prob must lie in"):
        step(imagen)


def test_autocast_of_the_caller_is_followed(graphs, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    expected = step(imagen, 5)
    with torch.autocast("cpu", torch.bfloat16):
        for seed in range(4):
            # What autocast has converted must not be read in a replay, when the weights are others.
            with torch.no_grad():
                imagen.unets[0].mid_block1.block1.project.weight.mul_(1.5)
            torch.clear_autocast_cache()
            assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert replays(graphs) == [(1, 1), (2, 2)]
    with torch.no_grad():
        imagen.unets[0].mid_block1.block1.project.weight.div_(1.5**4)
    assert distance(step(imagen, 5)[0], expected[0]) < 1e-5
    assert replays(graphs) == [(2, 2), (2, 2)]


def test_few_kinds_are_kept(graphs):
    imagen = make_imagen()
    for batch in range(1, 7):
        warm(imagen, batch=batch)
        step(imagen, batch=batch)
    kept = vars(imagen.unets[0])[KEPT[1]]
    assert len(kept.graphs) == captured_training._Step.MOST_KINDS
    assert {each.memory for each in graphs} == {graphs[0]}, "graphs of one U-Net share their memory"


def test_a_default_device_is_no_obstacle(graphs, monkeypatch):
    imagen = make_imagen()
    with torch.device("cpu"):
        for seed in range(3):
            step(imagen, seed)
    assert replays(graphs) == [(1, 1)]


def test_settings_of_torch_are_followed(graphs, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for seed in range(3):
        step(imagen, seed)
    assert replays(graphs) == [(1, 1), (1, 1)]


def steps_that_take_much(imagen, monkeypatch, measure):
    with monkeypatch.context() as patched:
        sizes = itertools.count(0, 2**30)
        patched.setattr(captured_training, measure, lambda device: next(sizes))
        for seed in range(5):
            assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))


def test_large_steps_are_not_captured(graphs, monkeypatch):
    imagen = make_imagen()
    steps_that_take_much(imagen, monkeypatch, "_allocated")
    assert not graphs
    # What one pass took, another need not.
    for seed in range(3):
        step(imagen, seed)
    assert replays(graphs) == [(2, 2)]


def test_large_graphs_are_not_kept(graphs, monkeypatch):
    imagen = make_imagen()
    steps_that_take_much(imagen, monkeypatch, "_reserved")
    assert replays(graphs) == [(0, 0)], "captured once, and not again"
    step(imagen)
    assert replays(graphs) == [(0, 0)]


def refuse(graph, **_):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_that_fails_is_said_once(graphs, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.warns(UserWarning, match="a step of training could not be captured.*cuda_graphs='off'") as said:
        for seed in range(3):
            assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert len(said) == 1


def test_a_capture_that_fails_gives_up_its_memory(graphs, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    given_up = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "reset", lambda graph: given_up.append(graph), raising=False)

    @contextlib.contextmanager
    def ended_all_the_same(graph, **_):
        yield
        raise torch.OutOfMemoryError("while it was ended")

    monkeypatch.setattr(torch.cuda, "graph", ended_all_the_same)
    with pytest.warns(UserWarning, match="could not be captured"):
        step(imagen)
    assert len(given_up) == 1 and given_up[0] in cuda_capture._failed


def test_after_a_capture_that_cannot_be_ended_another_one_is(graphs, monkeypatch):
    """It is what has torch's default generator draw numbers again."""
    imagen = make_imagen()
    warm(imagen)
    begun, ended = [], []

    @contextlib.contextmanager
    def invalidated(graph, **_):
        begun.append(graph)
        yield
        if len(begun) == 1:
            raise RuntimeError("operation failed due to a previous error during capture")
        ended.append(graph)

    monkeypatch.setattr(torch.cuda, "graph", invalidated)
    with pytest.warns(UserWarning, match="could not be captured"):
        step(imagen)
    assert ended == begun[1:] and len(ended) == 1
    assert cuda_capture._failed == begun[:1]


def test_memory_of_a_capture_that_cannot_be_ended_is_given_back_and_not_captured_in_again(graphs, monkeypatch):
    """torch keeps it for the graph, and takes it for being captured in: another capture in it cannot begin."""
    calls, pools, ways = [], iter(["first", "second"]), ("_cuda_endAllocateToPool", "_cuda_releasePool")
    for name in ways:
        monkeypatch.setattr(torch._C, name, lambda *what, name=name: calls.append((name, *what)), raising=False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(cuda_capture, "_have_numbers_drawn_again", lambda device: None)
    captured_in = []

    @contextlib.contextmanager
    def capture(graph, *, pool, **_):
        captured_in.append(pool)
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    beside = SimpleNamespace(pool=lambda: "that of another")
    for other in (beside, beside, None):
        with pytest.raises(RuntimeError), cuda_capture.capturing(torch.cuda.CUDAGraph(), torch.device("cuda:1"), other):
            pass
    assert captured_in == ["that of another", "first", "second"]
    assert calls == [
        (name, 1, pool) for pool in captured_in for name in ("_cuda_endAllocateToPool", "_cuda_releasePool")
    ]


def test_what_is_captured_has_workspaces_of_its_own(graphs, monkeypatch):
    cleared = []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(len(graphs)), raising=False)
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    # Before and after the forward pass, and the backward pass, of which both graphs are made beforehand.
    assert len(graphs) == 2 and cleared == [2] * 4


@pytest.mark.parametrize("failed_before", [False, True])
def test_a_capture_that_was_asked_for_and_fails(graphs, monkeypatch, failed_before):
    imagen = make_imagen()
    warm(imagen)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    if failed_before:
        with pytest.warns(UserWarning, match="could not be captured"):
            step(imagen)
    record_cuda_graphs(monkeypatch, reason=ASKED_FOR)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(RuntimeError, match="not permitted"):
        step(imagen)


# Where it is kept


def test_copies_and_files_begin_without_it(graphs):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    unet = imagen.unets[0]
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert not any(name in vars(other) for name in KEPT)
    assert KEPT[1] in vars(unet)
    unet.double()
    assert not any(name in vars(unet) for name in KEPT)


def test_it_goes_when_another_way_is_chosen(graphs):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    imagen.accelerate()
    assert KEPT[1] not in vars(imagen.unets[0])


def test_it_goes_with_the_u_net(graphs):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    kept = weakref.ref(vars(imagen.unets[0])[KEPT[1]])
    gc.disable()
    try:
        del imagen
        assert kept() is None, "it waits for the collector of cycles, which does not know how much memory a graph holds"
    finally:
        gc.enable()


def test_sampling_between_steps_takes_nothing_away(graphs, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    other = copy.deepcopy(imagen).accelerate("reference")
    other.unets[0] = imagen.unets[0]
    other.sample(**make_words(), progress=False, steps=2, sampler="ddim")
    assert_same(step(imagen, 7), eager(monkeypatch, imagen, 7))
    assert replays(graphs) == [(2, 2)]
