"""Steps of training that run from a recording of their operators."""

import copy
import gc
import pickle
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from fast_path import distance, make_imagen, make_unet, make_words
from replayed_steps import (
    BATCH,
    assert_same,
    count_recordings,
    eager,
    gradients_of,
    loss_of,
    step,
    warm,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel

from minimagen_fast import acceleration, captured_training, recorded_training
from minimagen_fast.kept import KEPT
from minimagen_fast.kernels import dispatch
from minimagen_fast.recorded import NotRecordable, Recording, record


@pytest.fixture
def recordings(monkeypatch):
    return count_recordings(monkeypatch)


def passes(recordings):
    return [tuple(runs.passes) for runs in recordings]


def change_weights(imagen):
    with torch.no_grad():
        for parameter in imagen.parameters():
            parameter.mul_(1.01)


OPTIONS = [{}, {"seeds": [5, 6, 7]}, {"min_snr_gamma": 5.0}, {"masked": False}, {"tokens": 300}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_recorded_steps_are_the_same_to_the_bit(recordings, monkeypatch, stage, options):
    imagen = make_imagen(stages=2)
    for seed in range(5):
        # Other images, texts, noise, times and dropped texts, and other weights.
        expected = eager(monkeypatch, imagen, seed, stage=stage, **options)
        assert_same(step(imagen, seed, stage=stage, **options), expected)
        change_weights(imagen)
    assert passes(recordings) == [(3, 3)]


@pytest.mark.parametrize(
    "settings", [{"precision": "bfloat16"}, {"memory_format": "contiguous"}, {"kernels": "reference"}], ids=str
)
def test_in_every_way_to_run(recordings, monkeypatch, settings):
    imagen = make_imagen().accelerate(**settings)
    for seed in range(4):
        assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
        change_weights(imagen)
    assert passes(recordings) == [(2, 2)]


def test_weights_in_half_precision(recordings, monkeypatch):
    imagen = make_imagen().to(torch.bfloat16)
    for seed in range(4):
        assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert passes(recordings) == [(2, 2)]


@pytest.mark.parametrize("settings", [{"recorded_steps": "off"}, {"checkpoint_levels": [0]}], ids=str)
def test_where_they_are_off(recordings, settings):
    imagen = make_imagen().accelerate(**settings)
    for seed in range(4):
        step(imagen, seed)
    assert not recordings


def turned(images):
    return images.mT.contiguous().mT


def next_to_others(images):
    return torch.cat([images, images])[BATCH:]


LAYOUTS = [torch.Tensor.contiguous, lambda x: x.contiguous(memory_format=torch.channels_last), turned, next_to_others]


@pytest.mark.parametrize("laid_out", LAYOUTS)
@pytest.mark.parametrize("texts", [1, BATCH])
def test_inputs_in_any_layout(recordings, monkeypatch, laid_out, texts):
    # So wide that torch multiplies a single text, which all images share, in another way than as many.
    imagen = make_imagen(unets=[make_unet(cond_dim=64)])

    def run(imagen, seed):
        torch.manual_seed(seed)
        imagen.zero_grad()
        embeds = torch.randn(texts, 3, 512)
        loss = imagen(laid_out(torch.rand(BATCH, 3, 8, 8)), text_embeds=embeds, min_snr_gamma=5.0)
        loss.backward()
        return loss.detach(), gradients_of(imagen)

    for seed in range(4):
        with monkeypatch.context() as patched:
            patched.setattr(captured_training, "_may_be_replayed", lambda inputs: False)
            expected = run(copy.deepcopy(imagen), seed)
        assert_same(run(imagen, seed), expected)
    assert passes(recordings) == [(2, 2)]


def test_another_layout_is_another_kind(recordings, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    images, words = turned(torch.rand(BATCH, 3, 8, 8)), make_words(BATCH, 5)
    imagen(images, **words).backward()
    assert passes(recordings) == [(1, 1)]


def bytes_of(tensors):
    """Of the memory of tensors, each piece once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_between_its_passes_a_step_holds_what_autograd_saves(monkeypatch):
    imagen, saved, held = make_imagen(), [], []
    warm(imagen)
    weights = {parameter.data_ptr() for parameter in imagen.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = loss_of(imagen)
    autograd = bytes_of([x for x in saved if x.untyped_storage().data_ptr() not in weights])
    del loss

    def watched(*args):
        recording = record(*args)

        def run(**inputs):
            passes = recording.run(**inputs)
            gradient = yield next(passes)
            held.append(bytes_of([x for x in passes.gi_frame.f_locals.values() if isinstance(x, torch.Tensor)]))
            yield passes.send(gradient)

        return Recording(run, recording.kept)

    monkeypatch.setattr(recorded_training, "record", watched)
    step(imagen)
    assert 0.5 * autograd < held[0] < 1.02 * autograd


# Passes that overlap


def test_gradients_accumulate(recordings, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    expected = [eager(monkeypatch, imagen, seed)[1] for seed in (5, 6)]
    imagen.zero_grad()
    for seed in (5, 6):
        loss_of(imagen, seed).backward()
    for mine, *theirs in zip(gradients_of(imagen), *expected, strict=True):
        assert mine is None or torch.equal(mine, sum(theirs))
    assert passes(recordings) == [(2, 2)]


def test_losses_keep_what_their_backward_passes_need(recordings, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    expected = [eager(monkeypatch, imagen, seed) for seed in (5, 6)]
    first, second = loss_of(imagen, 5), loss_of(imagen, 6)
    for loss, (value, gradients) in ((second, expected[1]), (first, expected[0])):
        imagen.zero_grad()
        loss.backward()
        assert_same((loss.detach(), gradients_of(imagen)), (value, gradients))
    assert passes(recordings) == [(2, 2)]


def test_losses_may_be_changed(recordings, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    value, gradients = eager(monkeypatch, imagen, 5)
    imagen.zero_grad()
    loss = loss_of(imagen, 5)
    loss /= 4
    loss.backward()
    assert torch.equal(loss.detach(), value / 4) and passes(recordings) == [(1, 1)]
    for mine, theirs in zip(gradients_of(imagen), gradients, strict=True):
        assert mine is None or distance(mine, theirs / 4) < 1e-6


def test_a_second_backward_pass(recordings, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    weight, seen = imagen.unets[0].final_conv.weight, []
    value, gradients = eager(monkeypatch, imagen, 5)
    weight.register_hook(lambda gradient: seen.append(1))
    imagen.zero_grad()
    loss = loss_of(imagen, 5)
    for number in (1, 2):
        loss.backward(retain_graph=number == 1)
        assert_same((loss.detach(), gradients_of(imagen)), (value, [g if g is None else number * g for g in gradients]))
    assert len(seen) == 2 and passes(recordings) == [(1, 1)]
    # One more was not announced.
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_second_backward_pass_when_another_loss_was_set(recordings):
    imagen = make_imagen()
    warm(imagen)
    weight, loss = imagen.unets[0].init_conv.convs[0].weight, loss_of(imagen, 5)
    imagen.loss_fn = torch.nn.functional.l1_loss
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and passes(recordings) == [(1, 1)]


def test_gradients_of_gradients(recordings, monkeypatch):
    imagen = make_imagen().accelerate(kernels="reference", attention="reference")
    warm(imagen)
    weight = imagen.unets[0].final_conv.weight

    def second():
        (gradient,) = torch.autograd.grad(loss_of(imagen, 5), weight, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), weight)[0]

    actual = second()
    assert passes(recordings) == [(1, 0)]
    imagen.accelerate("reference", memory_format="channels_last")
    assert actual.abs().max() > 0 and distance(actual, second()) < 1e-5


@pytest.mark.parametrize(
    "chosen", [lambda: dispatch.use_implementation("reference"), lambda: sdpa_kernel(SDPBackend.MATH)]
)
def test_gradients_of_gradients_by_the_kernels_that_were_chosen_for_the_losses(recordings, chosen):
    imagen = make_imagen()
    weight = imagen.unets[0].init_conv.convs[0].weight
    seconds = []
    for _ in range(4):
        with chosen():
            loss = loss_of(imagen, 5)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        seconds.append(torch.autograd.grad(gradient.square().sum(), weight)[0])
    assert passes(recordings) == [(2, 0)]
    assert seconds[0].abs().max() > 0 and distance(seconds[0], seconds[3]) < 1e-5


def test_some_gradients_alone(recordings, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    weight = imagen.unets[0].final_conv.weight
    expected = dict(zip(imagen.parameters(), eager(monkeypatch, imagen, 5)[1], strict=True))[weight]
    assert torch.equal(torch.autograd.grad(loss_of(imagen, 5), weight)[0], expected)
    assert passes(recordings) == [(1, 1)]


def test_images_that_change_before_the_backward_pass(recordings, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    expected = eager(monkeypatch, imagen, 5)
    imagen.zero_grad()
    torch.manual_seed(5)
    images, words = torch.rand(BATCH, 3, 20, 20), make_words(BATCH, 5, seed=5)
    loss = imagen(images, **words)
    # They were noised before, and are needed no more.
    images.zero_()
    loss.backward()
    assert_same((loss.detach(), gradients_of(imagen)), expected)
    assert passes(recordings) == [(1, 1)]


def test_inputs_that_are_needed_and_change_are_noticed(recordings, monkeypatch):
    imagen, given = make_imagen(), []
    warm(imagen)
    as_recorded = recorded_training._as_recorded
    monkeypatch.setattr(recorded_training, "_as_recorded", lambda inputs: given.append(as_recorded(inputs)) or given[0])
    loss = loss_of(imagen)
    given[0]["noise"].zero_()
    with pytest.raises(RuntimeError, match="texts or noise that the step was given, were changed in place"):
        loss.backward()


@pytest.mark.parametrize("masked", [True, False])
def test_text_that_changes_before_the_backward_pass_is_noticed(recordings, masked):
    imagen, images, words = make_imagen(), torch.rand(BATCH, 3, 20, 20), make_words(BATCH, 5)
    if not masked:
        del words["text_masks"]
    for _ in range(3):
        imagen(images, **words).backward()
    assert len(recordings) == 1
    loss = imagen(images, **words)
    words["text_embeds"].zero_()
    with pytest.raises(RuntimeError, match="images, texts or noise that the step was given, were changed in place"):
        loss.backward()


def test_what_changes_before_a_second_backward_pass_is_noticed(recordings):
    imagen = make_imagen()
    warm(imagen)
    images = torch.rand(BATCH, 3, 8, 8)
    loss = imagen(images, **make_words(BATCH, 5))
    loss.backward(retain_graph=True)
    # The recorded pass did not need them. The next takes the step as it is.
    images.zero_()
    with pytest.raises(RuntimeError, match="images, texts or noise that the step was given, were changed in place"):
        loss.backward()
    assert passes(recordings) == [(1, 1)]


def test_losses_that_are_kept_do_not_hold_what_the_step_was_given(recordings):
    imagen = make_imagen()
    warm(imagen)
    images, words = torch.rand(BATCH, 3, 8, 8), make_words(BATCH, 5)
    given = [weakref.ref(images), *map(weakref.ref, words.values())]
    loss = imagen(images, **words)
    loss.backward()
    del images, words
    assert [each() for each in given] == [None, None, None] and loss.grad_fn is not None
    assert passes(recordings) == [(1, 1)]


def test_a_backward_pass_under_autocast(recordings, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    expected = eager(monkeypatch, imagen, 5)
    imagen.zero_grad()
    loss = loss_of(imagen, 5)
    for number in (1, 2):
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward(retain_graph=number == 1)
        assert_same(
            (loss.detach(), gradients_of(imagen)), (expected[0], [g if g is None else number * g for g in expected[1]])
        )
    assert passes(recordings) == [(1, 1)]


def test_steps_of_two_threads(recordings, monkeypatch):
    imagen, seen = make_imagen(), {}
    expected = {seed: eager(monkeypatch, imagen, seed)[0] for seed in range(4)}
    warm(imagen)
    step(imagen)

    def losses(seeds):
        for seed in seeds:
            generator_lock.acquire()
            try:
                loss = loss_of(imagen, seed)
            finally:
                generator_lock.release()
            seen[seed] = loss.detach()

    generator_lock = threading.Lock()
    threads = [threading.Thread(target=losses, args=(seeds,)) for seeds in ((0, 1), (2, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(seen[seed], expected[seed]) for seed in range(4))


# What is recorded anew, or not at all


def test_onednn_that_is_switched_off_is_recorded_anew(recordings, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    for seed in range(3):
        assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert passes(recordings) == [(1, 1), (1, 1)]


def test_autocast_of_the_caller_is_followed(recordings, monkeypatch):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    with torch.autocast("cpu", torch.bfloat16):
        for seed in range(3):
            assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert_same(step(imagen, 5), eager(monkeypatch, imagen, 5))
    assert passes(recordings) == [(2, 2)]


def test_what_tritons_interpreter_does_is_not_recorded(recordings, monkeypatch):
    settings = SimpleNamespace(implementation=lambda: "triton", attention_override=lambda _: None)
    monkeypatch.setattr(acceleration, "dispatch", settings)
    imagen = make_imagen()
    for seed in range(4):
        step(imagen, seed)
    assert not recordings


def test_steps_of_many_kinds_are_not_all_recorded(recordings):
    imagen = make_imagen()
    for _ in range(3):
        for tokens in range(1, 9):
            step(imagen, tokens=tokens)
    assert len(recordings) == recorded_training._AT_ONCE
    # Where one kind comes again and again it pays.
    while len(recordings) < recorded_training._AT_ONCE + 1:
        step(imagen, tokens=8)
        assert vars(imagen.unets[0])[KEPT[1]].steps < 100
    for batch in range(1, 2 * recorded_training.RecordedStep.MOST_KINDS):
        step(imagen, batch=batch)
    assert len(vars(imagen.unets[0])[KEPT[1]].graphs) == recorded_training.RecordedStep.MOST_KINDS


def test_steps_of_large_u_nets_are_not_recorded(recordings, monkeypatch):
    monkeypatch.setattr(recorded_training, "MOST_BYTES", 2**10)
    imagen = make_imagen()
    for seed in range(3):
        step(imagen, seed)
    assert not recordings
    imagen.accelerate(recorded_steps="on")
    for seed in range(3):
        step(imagen, seed)
    assert passes(recordings) == [(1, 1)]


def test_a_recording_that_fails_is_said_once(monkeypatch):
    def refuse(*_):
        raise NotRecordable("it reads a value")

    imagen = make_imagen()
    warm(imagen)
    monkeypatch.setattr(recorded_training, "record", refuse)
    with pytest.warns(UserWarning, match="could not be recorded and runs as it is: it reads.*steps='off'") as said:
        for seed in range(3):
            assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert len(said) == 1
    imagen.accelerate(recorded_steps="on")
    warm(imagen)
    with pytest.raises(NotRecordable, match="it reads a value"):
        step(imagen)


def test_a_u_net_that_cannot_be_copied_trains_as_it_is(recordings, monkeypatch):
    imagen = make_imagen()
    expected = [eager(monkeypatch, imagen, seed) for seed in range(4)]
    imagen.unets[0].log_lock = threading.Lock()
    with pytest.warns(UserWarning, match="runs as it is: .* attribute that cannot be copied .*lock") as said:
        for seed in range(4):
            assert_same(step(imagen, seed), expected[seed])
    assert len(said) == 1 and not recordings


# What is kept


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda imagen: pickle.loads(pickle.dumps(imagen))])
def test_a_copy_begins_without_recordings(recordings, monkeypatch, copied):
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    other = copied(imagen)
    change_weights(other)
    for seed in range(3):
        assert_same(step(other, seed), eager(monkeypatch, other, seed))
        assert_same(step(imagen, seed), eager(monkeypatch, imagen, seed))
    assert passes(recordings) == [(4, 4), (1, 1)]


def test_nothing_of_it_is_saved():
    imagen = make_imagen()
    before = list(imagen.state_dict())
    warm(imagen)
    step(imagen)
    assert list(imagen.state_dict()) == before


def test_a_model_that_is_let_go_goes_at_once():
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    weight = imagen.unets[0].final_conv.weight
    gone, memory = (weakref.ref(imagen.unets[0]), weakref.ref(weight)), StorageWeakRef(weight.untyped_storage())
    gc.disable()
    try:
        del imagen, weight
        assert [each() for each in gone] == [None, None] and memory.expired()
    finally:
        gc.enable()


def test_a_model_that_is_converted_leaves_its_memory_at_once():
    imagen = make_imagen()
    warm(imagen)
    step(imagen)
    memory = StorageWeakRef(imagen.unets[0].final_conv.weight.untyped_storage())
    gc.disable()
    try:
        imagen.double()
        assert memory.expired()
    finally:
        gc.enable()
