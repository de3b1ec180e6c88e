"""Captured steps of sampling, and recorded ones: they serve every sampling of their kind, and no other.

Captured with a stand-in for CUDA graphs that checks addresses.
"""

import contextlib
import gc
import itertools
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from fast_path import (
    FEW,
    FLOAT32,
    SAMPLERS,
    FakeGraph,
    Refused,
    T,
    denoise_by,
    distance,
    fake_cuda_graphs,
    kept_graphs,
    make_imagen,
    make_words,
    refuse,
    run,
    sample,
    tensors_of,
    watched_recordings,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from minimagen_fast import acceleration, sampled_steps, sampling
from minimagen_fast.acceleration import ASKED_FOR
from minimagen_fast.kept import Kept, kept_with
from minimagen_fast.kernels import dispatch
from minimagen_fast.predictions import CachedPrediction
from minimagen_fast.recorded import NotRecordable
from minimagen_fast.Unet import Unet

every_sampler = pytest.mark.parametrize("arguments", SAMPLERS, ids=str)


@pytest.fixture(params=["captured", "recorded"])
def graphs(request, monkeypatch):
    return (fake_cuda_graphs if request.param == "captured" else watched_recordings)(monkeypatch)


@pytest.fixture
def cuda_graphs(monkeypatch):
    return fake_cuda_graphs(monkeypatch)


@pytest.mark.parametrize("arguments, cond_scale", [*((one, 3.0) for one in SAMPLERS), (FEW, 1.0)], ids=str)
def test_replayed_steps_give_the_same_images(graphs, monkeypatch, arguments, cond_scale):
    imagen, other = make_imagen(), make_words(seed=3)
    arguments = {**arguments, "cond_scale": cond_scale}
    runs = ((None, 0), (other, 1), (None, 0))
    with nothing_replayed(monkeypatch):
        expected = [sample(imagen, words, seed=seed, **arguments) for words, seed in runs]
    steps = arguments.get("steps", T)
    late = 2 if arguments.get("sampler") == "dpmpp_2m" else 1
    for number, (words, seed) in enumerate(runs):
        assert torch.equal(sample(imagen, words, seed=seed, **arguments), expected[number])
        (graph,) = graphs
        # The first step that is like the others has run before it was captured; later calls replay all such.
        assert graph.replays == steps - late + number * (steps - late + 1)


def test_both_stages_have_their_graphs(graphs):
    imagen = make_imagen(stages=2)
    expected = run(imagen, "reference")
    for _ in range(3):
        assert distance(run(imagen), expected) < FLOAT32
    assert len(graphs) == 2 and distance(run(imagen, words=make_words(seed=9)), expected) > 1e-3


@contextlib.contextmanager
def nothing_replayed(monkeypatch):
    def steps_of(graphs, task, unet, x, acceleration):
        steps = sampled_steps.Steps(CachedPrediction(task, unet, acceleration.layout, unet.dtype), task.update, x)
        steps.rest = lambda: None
        return steps

    with monkeypatch.context() as plain:
        plain.setattr(sampling, "replayed_steps", steps_of)
        yield


@pytest.mark.parametrize("arguments", [{"steps": 5}, {"sampler": "dpmpp_2m", "steps": 4}], ids=str)
def test_a_noise_schedule_that_is_edited_in_place_is_followed(graphs, monkeypatch, arguments):
    imagen = make_imagen()
    before = run(imagen, arguments=arguments)
    scheduler = imagen.noise_schedulers[0]
    scheduler.sqrt_alphas_cumprod.mul_(0.9)
    scheduler.sqrt_one_minus_alphas_cumprod.mul_(1.05)
    after = run(imagen, arguments=arguments)
    with nothing_replayed(monkeypatch):
        assert torch.equal(after, run(imagen, arguments=arguments))
    assert len(graphs) == 1 and distance(after, before) > 1e-3


def test_a_noise_level_and_a_start_image_are_taken_over(graphs, monkeypatch):
    imagen = make_imagen(stages=2)
    start = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    changes = [{}, {"lowres_sample_noise_level": 0.6}, {"start_image": start}]
    for change in (*changes, *changes):
        images = run(imagen, arguments={**FEW, **change})
        with nothing_replayed(monkeypatch):
            assert torch.equal(images, run(imagen, arguments={**FEW, **change}))
    assert len(graphs) == 2


def check_taken_over(graphs, monkeypatch, imagen, first, *others):
    """That settings, each functions that set one and give arguments of a sampling, share one captured step."""
    seen = []
    for change in (first, *others, first):
        arguments = change(imagen)
        images = run(imagen, arguments=arguments)
        with nothing_replayed(monkeypatch):
            assert torch.equal(images, run(imagen, arguments=arguments))
        seen.append(images)
    assert len(graphs) == 1 and torch.equal(seen[0], seen[-1])
    assert all(distance(before, after) > 1e-3 for before, after in itertools.pairwise(seen))


@every_sampler
def test_another_guidance_weight_is_taken_over(graphs, monkeypatch, arguments):
    scales = (lambda imagen, scale=scale: {**arguments, "cond_scale": scale} for scale in (3.0, 1.5, -2.0))
    check_taken_over(graphs, monkeypatch, make_imagen(), *scales)


@every_sampler
def test_another_percentile_is_taken_over(graphs, monkeypatch, arguments):
    def setter(percentile):
        def change(imagen):
            imagen.dynamic_thresholding_percentile = percentile
            return {**arguments, "cond_scale": 3.0}

        return change

    check_taken_over(graphs, monkeypatch, make_imagen(), *map(setter, (0.95, 0.5, 0.8)))


def test_another_eta_is_taken_over(graphs, monkeypatch):
    steps = {"steps": 5, "cond_scale": 3.0}
    # Respaced ddpm is ddim with all noise.
    ways = {"sampler": "ddim", "eta": 0.3}, {"sampler": "ddim", "eta": 0.9}, {"sampler": "ddpm"}
    check_taken_over(graphs, monkeypatch, make_imagen(), *(lambda imagen, way=way: {**steps, **way} for way in ways))


@pytest.mark.parametrize(
    "change",
    [
        {"words": make_words(3)},
        {"arguments": {**FEW, "cond_scale": 1.0}},
        {"arguments": {**FEW, "cond_scale": 0.0}},
        {"arguments": {**FEW, "steps": 5}},
        {"arguments": {**FEW, "sampler": "ddim"}},
        {"arguments": {**FEW, "sampler": "ddim", "eta": 0.5}},
        {"arguments": {**FEW, "batch_size": 1}},
        {"precision": "bfloat16"},
        {"memory_format": "contiguous"},
        {"attention": "reference"},
    ],
    ids=str,
)
def test_what_is_captured_anew(graphs, change):
    imagen = make_imagen()
    run(imagen)
    expected = run(make_imagen(), **change)
    graphs.clear()
    assert torch.equal(run(imagen, **change), expected)
    assert len(graphs) == 1, "the captured step of another task was taken"


def test_noise_where_there_was_none_is_captured_anew(graphs):
    imagen, without = make_imagen(), {"sampler": "ddim", "steps": 5}
    for eta in (0.0, 0.5):
        expected = run(make_imagen(), arguments={**without, "eta": eta})
        graphs.clear()
        assert torch.equal(run(imagen, arguments={**without, "eta": eta}), expected) and len(graphs) == 1


@pytest.mark.parametrize("use", [dispatch.use_implementation, dispatch.use_attention])
def test_other_kernels_are_captured_anew(graphs, use):
    imagen = make_imagen()
    run(imagen)
    graphs.clear()
    with use("reference"):
        run(imagen)
    assert len(graphs) == 1


def converted(imagen):
    imagen.to(torch.float64)


def without_u_nets(imagen):
    del imagen.unets[0]


@pytest.mark.parametrize("change", [converted, without_u_nets])
def test_what_is_kept_goes_with_the_last_that_needs_it(graphs, change):
    """At once, without the collector of cycles: it is the memory that what comes next needs."""
    imagen = make_imagen()
    run(imagen, precision="bfloat16")
    run(imagen, precision="bfloat16")
    kept = kept_with(imagen.unets[0])
    steps = next(iter(kept.graphs.values()))
    parts = [kept, kept._copy.unet, steps, steps._conditions]
    waiting = [weakref.ref(part) for part in parts]
    gc.disable()
    try:
        del kept, steps, parts
        graphs.clear()
        change(imagen)
        assert [part() for part in waiting] == [None] * 4
    finally:
        gc.enable()


def test_more_words_need_no_other_graph(graphs):
    imagen = make_imagen()
    for tokens in (1, 5, 200, 300):
        words = make_words(tokens=tokens)
        assert distance(run(imagen, words=words), run(make_imagen(), "reference", words=words)) < FLOAT32
    assert len(kept_graphs(imagen)) == 1 and len(graphs) == 1


def test_few_graphs_are_kept_and_the_last_used_among_them(graphs):
    imagen = make_imagen()
    for steps in range(3, 9):
        run(imagen, arguments={**FEW, "steps": steps})
        run(imagen, arguments={**FEW, "steps": 3})
        assert len(kept_graphs(imagen)) <= sampled_steps._MOST_GRAPHS
    assert len(kept_graphs(imagen)) == sampled_steps._MOST_GRAPHS
    # 3 was used again each time and never captured anew.
    assert len(graphs) == 6


def test_moved_weights_are_captured_anew(graphs):
    imagen = make_imagen()
    run(imagen)
    with torch.no_grad():
        imagen.unets[0].final_conv.weight.mul_(2)
    run(imagen)
    assert len(graphs) == 1, "an edit in place moves nothing"
    imagen.unets[0].final_conv.weight.data = imagen.unets[0].final_conv.weight * 2
    run(imagen)
    assert len(graphs) == 2 and len(kept_graphs(imagen)) == 1, "graphs of weights that are gone"
    run(imagen)
    assert len(graphs) == 2


def test_graphs_of_a_u_net_share_their_memory_while_one_of_them_lives(cuda_graphs):
    imagen = make_imagen()
    for steps in (3, 4, 5):
        run(imagen, arguments={**FEW, "steps": steps})
    assert len(cuda_graphs) == 3 and {graph.memory for graph in cuda_graphs} == {cuda_graphs[0]}
    # The memory of graphs that are gone is gone.
    kept_with(imagen.unets[0]).forget_graphs()
    run(imagen)
    assert cuda_graphs[3].memory is cuda_graphs[3]


def forget_by_customising(imagen):
    imagen.unets[0].register_forward_hook(lambda *_: None)
    run(imagen)


def forget_by_autocast(imagen):
    with torch.autocast("cpu", torch.bfloat16):
        run(imagen)


FORGETTING = {
    "reference": lambda imagen: run(imagen, "reference"),
    "customised": forget_by_customising,
    "autocast": forget_by_autocast,
    "double": lambda imagen: imagen.double(),
    "meta": lambda imagen: imagen.to("meta"),
}


@pytest.mark.parametrize("way", FORGETTING)
def test_graphs_hold_no_memory_once_they_are_not_used(graphs, way):
    imagen = make_imagen()
    run(imagen)
    assert kept_graphs(imagen)
    FORGETTING[way](imagen)
    assert not kept_graphs(imagen)


@pytest.mark.parametrize(
    "owner, name",
    [
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "deterministic"),
    ],
    ids=["matmul", "convolutions", "deterministic"],
)
def test_settings_of_torch_are_followed(graphs, owner, name):
    imagen, before = make_imagen(), getattr(owner, name)
    setattr(owner, name, before)  # said aloud it is not the default any more
    run(imagen)
    try:
        setattr(owner, name, not before)
        run(imagen)
    finally:
        setattr(owner, name, before)
    assert len(graphs) == 2
    run(imagen)
    assert len(graphs) == 2


def test_uses_of_what_is_kept_wait_for_one_another(monkeypatch):
    seen = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            seen.append((self.name, "waits for", event))

        def record_event(self):
            return f"the end of {self.name}"

    kept, device = Kept(), torch.device("cuda", 0)
    for name in ("first", "second"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, name=name: Stream(name))
        with contextlib.suppress(KeyboardInterrupt), kept.in_order(device):
            seen.append((name, "runs"))
            raise KeyboardInterrupt
    assert seen == [("first", "runs"), ("second", "waits for", "the end of first"), ("second", "runs")]


def test_a_capture_that_fails_is_said_once(cuda_graphs, monkeypatch):
    imagen, expected = make_imagen(), run(make_imagen())
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.warns(UserWarning, match="could not be captured.*not permitted.*cuda_graphs='off'") as said:
        images = run(imagen)
        again = run(imagen)
    assert len(said) == 1 and torch.equal(images, again) and torch.equal(images, expected)
    assert FakeGraph.streams == ["before on cpu"] * 2, "the stream of the capture stays the current one"


def test_a_capture_that_fails_is_an_error_where_it_was_asked_for(monkeypatch):
    fake_cuda_graphs(monkeypatch, reason=ASKED_FOR)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    imagen = make_imagen()
    with pytest.raises(Refused):
        run(imagen)
    assert not kept_with(imagen.unets[0]).lock.locked()


def test_a_sampling_within_a_sampling_takes_no_graph_from_it(graphs):
    imagen, inner = make_imagen(), []
    expected = run(imagen)

    def callback(unet, step, images):
        if len(inner) < 3:
            inner.append(run(imagen))

    assert torch.equal(run(imagen, arguments={**FEW, "callback": callback}), expected)
    assert len(inner) == 3 and all(torch.equal(images, expected) for images in inner)
    with pytest.raises(KeyError):
        run(imagen, arguments={**FEW, "callback": lambda *_: {}["no"]})
    assert torch.equal(run(imagen), expected), "an error left something behind"


def test_threads_that_sample_with_one_model(graphs):
    imagen = make_imagen()
    expected = [sample(imagen, seed=seed, **FEW) for seed in range(3)]
    found = {}

    def work(seed):
        found[seed] = sample(imagen, seed=seed, **FEW)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(3))


def test_a_step_runs_once_before_it_is_captured(cuda_graphs, monkeypatch):
    order, capture, advance = [], torch.cuda.graph, sampled_steps.Steps.advance

    def noted(steps, first):
        order.append("captured" if FakeGraph.capturing else "first" if first else "run")
        advance(steps, first)

    monkeypatch.setattr(sampled_steps.Steps, "advance", noted)
    run(make_imagen())
    assert order == ["first", "run", "captured"], "the second step of a multistep sampler is not like the first"
    order.clear()
    run(make_imagen(), arguments={"sampler": "ddim", "steps": 4})
    assert order == ["run", "captured"]
    assert capture is torch.cuda.graph


# Recorded steps


@pytest.fixture
def recordings(monkeypatch):
    least = sampled_steps._PAID_BACK_BY
    made = watched_recordings(monkeypatch)
    monkeypatch.setattr(sampled_steps, "_PAID_BACK_BY", least)
    return made


def test_a_step_is_recorded_once_that_pays(recordings):
    least = sampled_steps._PAID_BACK_BY
    run(make_imagen(), arguments={"sampler": "ddim", "steps": least + 2})
    assert [each.replays for each in recordings] == [least + 1]
    imagen = make_imagen()
    for _ in range(2):
        run(imagen, arguments={"sampler": "ddim", "steps": least})
    # In the first sampling too few steps were left.
    assert [each.replays for each in recordings[1:]] == [least]


def test_a_recording_is_asked_for(recordings):
    for setting, number in (("off", 0), ("on", 1)):
        run(make_imagen(), arguments={"sampler": "ddim", "steps": 3}, recorded_steps=setting)
        assert len(recordings) == number


def test_what_is_set_for_a_time_is_not_recorded(recordings):
    """As another thread may, for all of the process."""
    imagen, few = make_imagen(), {"sampler": "ddim", "steps": 5}
    expected = run(imagen, arguments=few, recorded_steps="off")
    with contextlib.ExitStack() as other:

        def callback(unet, step, images):
            if step == 0:
                other.enter_context(dispatch.use_implementation("reference"))
            if step == 2:
                other.close()

        run(imagen, arguments={**few, "callback": callback}, recorded_steps="on")
    assert len(recordings) == 1
    assert torch.equal(run(imagen, arguments=few, recorded_steps="on"), expected) and len(recordings) == 1


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Weight(nn.Parameter):
    pass


def of_another_class(imagen):
    conv = imagen.unets[0].final_conv
    conv.weight = Weight(conv.weight.detach())
    return contextlib.nullcontext()


def parametrised(imagen):
    parametrize.register_parametrization(imagen.unets[0].final_conv, "weight", nn.Identity())
    return contextlib.nullcontext()


@pytest.mark.parametrize(
    "change",
    [
        lambda imagen: SeesFunctions(),
        lambda imagen: FlopCounterMode(display=False),
        lambda imagen: torch.autocast("cpu", torch.bfloat16),
        of_another_class,
        parametrised,
        lambda imagen: contextlib.nullcontext(imagen.accelerate("reference")),
        lambda imagen: contextlib.nullcontext(imagen.accelerate(condition_cache="off")),
    ],
    ids=["function mode", "counter", "autocast", "weight", "parametrised", "reference", "no condition cache"],
)
def test_steps_that_are_not_recorded(monkeypatch, change):
    recordings, imagen = watched_recordings(monkeypatch), make_imagen()
    with change(imagen):
        sample(imagen, **FEW)
    assert not recordings


class Pictures(torch.Tensor):
    pass


def test_steps_that_read_a_start_image_of_another_class_are_not_recorded(monkeypatch):
    recordings, imagen = watched_recordings(monkeypatch), make_imagen(stages=2)
    start = torch.rand(2, 3, 8, 8)
    images = run(imagen, arguments={**FEW, "start_image": start.as_subclass(Pictures)})
    assert not recordings and torch.equal(images, run(imagen, arguments={**FEW, "start_image": start}))
    assert len(recordings) == 1


def test_what_tritons_interpreter_does_is_not_recorded(monkeypatch):
    recordings = watched_recordings(monkeypatch)
    settings = SimpleNamespace(implementation=lambda: "triton", attention_override=lambda _: None)
    monkeypatch.setattr(acceleration, "dispatch", settings)
    run(make_imagen())
    assert not recordings


def draws(imagen):
    denoise = Unet.denoise

    def drawing(self, x, *args):
        return denoise(self, x + 0 * torch.rand(()), *args)

    return drawing


def test_a_step_that_cannot_be_recorded_is_said_once(recordings, monkeypatch):
    monkeypatch.setattr(sampled_steps, "_PAID_BACK_BY", 0)
    imagen, expected = make_imagen(), run(make_imagen())
    recordings.clear()
    denoise_by(monkeypatch, draws(imagen))
    with pytest.warns(UserWarning, match="could not be recorded.*draws random numbers.*recorded_steps='off'") as said:
        images = run(imagen)
        again = run(imagen)
    assert len(said) == 1 and not recordings and torch.equal(images, again) and torch.equal(images, expected)
    with pytest.raises(NotRecordable, match="draws random numbers"):
        run(imagen, recorded_steps="on")
    assert not kept_with(imagen.unets[0]).lock.locked()


def test_recordings_that_hold_much_are_not_kept(recordings, monkeypatch):
    imagen, expected = make_imagen(), run(make_imagen())
    run(imagen)
    (steps,) = kept_graphs(imagen)
    (conditions,) = steps._conditions._conditions
    held = sum(tensor.nbytes for tensor in (steps.x, steps.noise, steps._x_start, *tensors_of(conditions)))
    monkeypatch.setattr(sampled_steps, "_PAID_BACK_BY", 0)
    for most, are_kept in ((held, True), (held - 1, False)):
        monkeypatch.setattr(sampled_steps, "_MOST_KEPT", most)
        imagen = make_imagen()
        recordings.clear()
        assert torch.equal(run(imagen), expected) and torch.equal(run(imagen), expected)
        assert len(recordings) == 2 - are_kept and bool(kept_graphs(imagen)) == are_kept
