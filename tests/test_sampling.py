"""The sampling loop: the same images however it is run, and captured steps that serve the next call too."""

import contextlib
import gc
import itertools
import threading
import warnings
import weakref

import pytest
import torch
from fast_path import FakeGraph, T, denoise_by, distance, fake_cuda_graphs, make_imagen, make_words, sample

from minimagen_fast import layers, sampling
from minimagen_fast.acceleration import ASKED_FOR
from minimagen_fast.conditioning import Conditions
from minimagen_fast.kept import Kept, kept_with
from minimagen_fast.kernels import dispatch
from minimagen_fast.kernels.images import is_channels_last
from minimagen_fast.predictions import CachedPrediction
from minimagen_fast.Unet import BaseTest, Unet

# Rounding, which the steps carry on; images are in [0, 1].
FLOAT32 = 2e-4
# The mean over the pixels: bfloat16 has 8 bits.
HALF = 0.02
SAMPLERS = [
    {},
    {"steps": 5},
    {"sampler": "ddim", "steps": 5},
    {"sampler": "ddim", "steps": 5, "eta": 0.7},
    {"sampler": "dpmpp_2m", "steps": 5},
]
every_sampler = pytest.mark.parametrize("arguments", SAMPLERS, ids=str)
every_scale = pytest.mark.parametrize("cond_scale", [0.0, 1.0, 3.0])
FEW = {"sampler": "dpmpp_2m", "steps": 4, "cond_scale": 3.0}


@pytest.fixture(scope="module")
def imagen():
    return make_imagen(stages=2)


def run(imagen, preset="auto", *, arguments=FEW, words=None, **settings):
    return sample(imagen.accelerate(preset, **settings), words, **arguments)


@pytest.fixture
def predictions(monkeypatch):
    """What the U-Nets predict: number of images, dtype."""
    seen, denoise = [], Unet.denoise

    def watched(self, x, *args):
        out = denoise(self, x, *args)
        seen.append((len(out), out.dtype))
        return out

    denoise_by(monkeypatch, watched)
    return seen


# The same images


@every_sampler
@every_scale
def test_the_same_images_with_and_without_the_fast_path(imagen, arguments, cond_scale):
    arguments = {**arguments, "cond_scale": cond_scale, "stop_at_unet_number": 1}
    fast = run(imagen, arguments=arguments)
    assert distance(fast, run(imagen, arguments=arguments, condition_cache="off")) < FLOAT32
    assert distance(fast, run(imagen, "reference", arguments=arguments)) < FLOAT32
    assert fast.std() > 0.05


@every_sampler
def test_the_same_images_of_a_cascade(imagen, arguments):
    arguments = {**arguments, "cond_scale": [3.0, 2.0]}
    fast = run(imagen, arguments=arguments)
    assert fast.shape == (2, 3, 16, 16)
    assert distance(fast, run(imagen, "reference", arguments=arguments)) < FLOAT32
    assert distance(fast, run(imagen, arguments={**arguments, "cond_scale": [3.0, 3.0]})) > 100 * FLOAT32


@every_sampler
def test_half_precision_is_near(imagen, arguments):
    arguments = {**arguments, "cond_scale": 3.0, "stop_at_unet_number": 1}
    exact, half = run(imagen, "reference", arguments=arguments), run(imagen, precision="bfloat16", arguments=arguments)
    assert 1e-5 < (exact - half).abs().mean() < HALF
    # No farther than without the cache, which rounds as often.
    plain = run(imagen, precision="bfloat16", condition_cache="off", arguments=arguments)
    assert (exact - half).abs().mean() < 2 * (exact - plain).abs().mean()


def test_words_matter_and_so_does_each_image(imagen):
    one, other = (run(imagen, words=make_words(seed=seed)) for seed in (1, 2))
    assert distance(one[0], other[0]) > 1e-3 and distance(one[0], one[1]) > 1e-3


def test_bfloat16_weights():
    imagen = make_imagen().to(torch.bfloat16)
    assert distance(run(imagen), run(imagen, "reference")) < 0.1
    assert run(imagen).dtype == torch.float32


def test_start_images_and_what_is_left_of_the_model(imagen):
    start = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    arguments = {**FEW, "start_image": start}
    state = {name: value.clone() for name, value in imagen.state_dict().items()}
    fast = run(imagen, arguments=arguments, precision="bfloat16")
    assert (fast - run(imagen, "reference", arguments=arguments)).abs().mean() < HALF
    assert all(torch.equal(value, state[name]) for name, value in imagen.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in imagen.parameters())


@pytest.mark.parametrize("settings", [{}, {"condition_cache": "off"}, {"precision": "bfloat16"}], ids=str)
def test_a_callback_gets_the_images_of_each_step(imagen, settings):
    seen = []
    arguments = {**FEW, "callback": lambda unet, step, images: seen.append((unet, step, images))}
    last = run(imagen, arguments=arguments, **settings)
    assert [entry[:2] for entry in seen] == [(unet, step) for unet in (1, 2) for step in range(4)]
    assert torch.equal(seen[-1][2], last) and seen[0][2].shape == (2, 3, 8, 8)
    assert all(distance(a[2], b[2]) > 1e-3 for a, b in zip(seen[:3], seen[1:4], strict=True)), "all are the last"
    assert torch.equal(last, run(imagen, **settings)), "the callback changes the images"


def test_one_evaluation_a_step_of_all_that_guidance_needs(imagen, predictions):
    for cond_scale, rows in ((0.0, 2), (1.0, 2), (3.0, 4)):
        predictions.clear()
        run(imagen, arguments={**FEW, "cond_scale": cond_scale, "stop_at_unet_number": 1})
        assert [number for number, _ in predictions] == [rows] * 4


@pytest.mark.parametrize("cache", ["on", "off"])
def test_images_stay_in_channels_last_memory(imagen, monkeypatch, cache):
    seen = {}

    def watched(name):
        operation = getattr(layers, name)

        def watch(x, *args, **kwargs):
            seen.setdefault(name, set()).add(is_channels_last(x))
            return operation(x, *args, **kwargs)

        return watch

    for name in ("wide_conv2d", "group_norm_silu"):
        monkeypatch.setattr(layers, name, watched(name))
    run(imagen, memory_format="channels_last", condition_cache=cache)
    assert seen == {"wide_conv2d": {True}, "group_norm_silu": {True}}


# Parts of a batch


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_parts_of_a_batch_give_the_same_images(imagen, predictions, size, cache):
    words = make_words(5)
    whole = run(imagen, words=words, condition_cache=cache)
    predictions.clear()
    split = run(imagen, words=words, arguments={**FEW, "batch_size": size}, condition_cache=cache)
    assert distance(split, whole) < FLOAT32
    guided = 2 if cache == "on" else 1
    assert max(number for number, _ in predictions) == guided * min(size, 5)


def scarce(monkeypatch, most):
    """Memory for this many images at a time."""
    denoise, tried = Unet.denoise, []

    def out_of_memory(self, x, *args):
        tried.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError("no more")
        return denoise(self, x, *args)

    denoise_by(monkeypatch, out_of_memory)
    return tried


@pytest.mark.parametrize("most, sizes", [(3, (5, 3)), (2, (5, 3, 2)), (1, (5, 3, 2, 1))])
@pytest.mark.parametrize("graphs", [False, True])
def test_too_little_memory_halves_the_batch(monkeypatch, most, sizes, graphs):
    imagen, words, first_stage = make_imagen(), make_words(5), FEW
    expected = run(imagen, words=words, arguments=first_stage)
    if graphs:
        fake_cuda_graphs(monkeypatch)
    tried = scarce(monkeypatch, most)
    with pytest.warns(UserWarning, match=r"does not suffice for \d images at a time.*batch_size") as said:
        images = run(imagen, words=words, arguments=first_stage)
    assert distance(images, expected) < FLOAT32
    assert sorted(set(tried), reverse=True)[: len(sizes)] == [*sizes] and len(said) == len(sizes) - 1
    if graphs:
        # What was found out is kept with the graph: the next call tries nothing that failed.
        tried.clear()
        assert torch.equal(run(imagen, words=words, arguments=first_stage), images)
        assert max(tried) <= most


@pytest.mark.filterwarnings("ignore:the memory of cpu")
@pytest.mark.parametrize("arguments", [FEW, {"sampler": "ddim", "steps": 4, "cond_scale": 3.0}], ids=str)
@pytest.mark.parametrize("captures", [True, False])
def test_less_memory_than_in_the_last_call_and_other_words(monkeypatch, arguments, captures):
    imagen, words, other = make_imagen(), make_words(4), make_words(4, seed=2)
    expected = run(imagen, words=other, arguments=arguments)
    graphs = fake_cuda_graphs(monkeypatch)
    if not captures:
        monkeypatch.setattr(torch.cuda, "graph", refuse)
        monkeypatch.setattr(sampling.warnings, "warn", lambda *_, **__: None)
    run(imagen, words=words, arguments=arguments)
    # A graph that was captured takes no memory when it is replayed: only an eager step can find that there is less.
    if captures and arguments is not FEW:
        kept_graphs(imagen)[0].drop_graph()
    scarce(monkeypatch, 2)
    for _ in range(2):
        assert distance(run(imagen, words=other, arguments=arguments), expected) < FLOAT32
    assert len(graphs) > 1 or not captures, "the graph of undivided images was replayed"


@pytest.mark.parametrize("whole", [False, True])
def test_memory_of_another_u_nets_graphs_is_freed_before_the_batch_is_divided(monkeypatch, whole):
    imagen, words = make_imagen(2), make_words(3)
    if whole:
        hooked(imagen.unets[1])
    expected = run(imagen, words=words, arguments=FEW)
    fake_cuda_graphs(monkeypatch)
    base, denoise = imagen.unets[0], Unet.denoise

    def out_of_memory(self, x, *args):
        if self.lowres_cond and kept_with(base).graphs:
            raise torch.OutOfMemoryError("no more")
        return denoise(self, x, *args)

    denoise_by(monkeypatch, out_of_memory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distance(run(imagen, words=words, arguments=FEW), expected) < FLOAT32


def test_memory_of_another_u_nets_graphs_is_freed_for_a_capture(monkeypatch):
    imagen = make_imagen(2)
    fake_cuda_graphs(monkeypatch)
    (base, enlarging), graph = map(kept_with, imagen.unets), torch.cuda.graph

    def out_of_memory(*args, **kwargs):
        if enlarging.lock.locked() and base.graphs:
            raise torch.OutOfMemoryError("no more")
        return graph(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "graph", out_of_memory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(imagen, arguments=FEW)
    assert [steps.graph is not None for steps in enlarging.graphs.values()] == [True] and not base.graphs


def scarce_for_conditions(monkeypatch, most):
    """Memory for predictions under this many conditions at a time."""
    denoise, tried = Unet.denoise, []

    def out_of_memory(self, x, lowres_cond_img, conditions):
        tried.append(len(conditions[0]["scale_shift"]))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("no more")
        return denoise(self, x, lowres_cond_img, conditions)

    denoise_by(monkeypatch, out_of_memory)
    return tried


@pytest.mark.parametrize("graphs", [False, True])
def test_too_little_memory_for_one_image_with_and_without_text_at_once(monkeypatch, graphs):
    imagen, words = make_imagen(), make_words(3)
    expected = run(imagen, words=words)
    if graphs:
        fake_cuda_graphs(monkeypatch)
    tried = scarce_for_conditions(monkeypatch, 1)
    with pytest.warns(UserWarning, match="going on with its predictions with and without text apart") as said:
        images = run(imagen, words=words)
    assert distance(images, expected) < FLOAT32 and len(said) == 3
    tried.clear()
    if graphs:
        assert torch.equal(run(imagen, words=words), images) and set(tried) == {1}


@pytest.mark.parametrize("graphs", [False, True])
def test_too_little_memory_for_the_conditions(monkeypatch, graphs):
    imagen, words = make_imagen(), make_words(5)
    expected = run(imagen, words=words)
    if graphs:
        fake_cuda_graphs(monkeypatch)
        # A captured step, whose conditions are worked out anew where they are.
        run(imagen, words=make_words(5, seed=2))
    tokens_of = Unet._text_tokens

    def out_of_memory(self, text_embeds, *args):
        if len(text_embeds) > 2:
            raise torch.OutOfMemoryError("no more")
        return tokens_of(self, text_embeds, *args)

    monkeypatch.setattr(Unet, "_text_tokens", out_of_memory)
    with pytest.warns(UserWarning, match="does not suffice for 5 images at a time; going on with 3"):
        images = run(imagen, words=words)
    assert distance(images, expected) < FLOAT32


@pytest.mark.filterwarnings("ignore:the memory of cpu")
def test_conditions_of_larger_parts_are_freed_before_there_are_others(monkeypatch):
    alive, images = weakref.WeakSet(), []

    class Watched(Conditions):
        def __init__(self, *args, batch, **kwargs):
            alive.add(self)
            super().__init__(*args, batch=batch, **kwargs)
            images.append(sum(conditions._batch for conditions in alive))

    monkeypatch.setattr("minimagen_fast.predictions.Conditions", Watched)
    scarce(monkeypatch, 1)
    run(make_imagen(), words=make_words(5))
    assert images == [5, 3, 5, 2, 4, 5, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("way", ["uncached", "customised"])
def test_too_little_memory_where_the_u_net_is_called_whole(monkeypatch, way):
    imagen, words = make_imagen(), make_words(5)
    settings = {"condition_cache": "off"} if way == "uncached" else {}
    if way == "customised":
        hooked(imagen.unets[0])
    expected = run(imagen, words=words, **settings)
    tried = scarce(monkeypatch, 2)
    with pytest.warns(UserWarning, match="does not suffice for 5 images at a time; going on with 3"):
        assert distance(run(imagen, words=words, **settings), expected) < FLOAT32
    assert set(tried) == {5, 3, 2, 1}


@pytest.mark.filterwarnings("ignore:the memory of cpu")
def test_too_little_memory_for_one_image(imagen, monkeypatch):
    scarce(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        run(imagen)
    monkeypatch.undo()
    assert run(imagen).isfinite().all()


@pytest.mark.filterwarnings("ignore:the memory of cpu")
def test_another_size_of_parts_after_too_little_memory(monkeypatch):
    # 3 + 1 images and 2 + 2 are as many parts: they must not be taken for one another.
    imagen, words = make_imagen(), make_words(4)
    expected = run(imagen, words=words)
    fake_cuda_graphs(monkeypatch)
    scarce(monkeypatch, 2)
    for _ in range(2):
        assert distance(run(imagen, words=words, arguments={**FEW, "batch_size": 3}), expected) < FLOAT32


# Models in which someone has taken a hand


class Custom(BaseTest):
    def forward(self, *args, **kwargs):
        calls.append("subclass")
        return super().forward(*args, **kwargs)


calls: list[str] = []


def replaced(unet):
    forward = unet.forward

    def own(*args, **kwargs):
        calls.append("replaced")
        return forward(*args, **kwargs)

    unet.forward = own


def hooked(unet):
    unet.register_forward_hook(lambda *_: calls.append("hook"))


def hooked_before(unet):
    unet.register_forward_pre_hook(lambda *_: calls.append("pre-hook"))


def hooked_inside(unet):
    unet.mid_block1.register_forward_hook(lambda *_: calls.append("hook of a part"))


def replaced_inside(unet):
    replaced(unet.mid_block1)


def compiled(unet):
    def backend(graph, inputs):
        calls.append("compiled")
        return lambda *args: calls.append("compiled") or graph(*args)

    unet.mid_block2.compile(backend=backend)


CUSTOMISED = [replaced, hooked, hooked_before, hooked_inside, replaced_inside, compiled]


@pytest.mark.parametrize("customise", CUSTOMISED, ids=lambda customise: customise.__name__)
def test_a_u_net_with_its_own_ways_is_really_called(customise, monkeypatch, predictions):
    fake_cuda_graphs(monkeypatch)
    imagen = make_imagen()
    before = run(imagen, precision="bfloat16")
    customise(imagen.unets[0])
    calls.clear()
    predictions.clear()
    after = run(imagen, precision="bfloat16")
    assert len(calls) >= 8, "one for each step, with text and without"
    assert {dtype for _, dtype in predictions} == {torch.bfloat16}, "autocast stands for the copy"
    assert (after - before).abs().mean() < HALF
    for name in ("condition_cache", "reference"):
        if name == "reference":
            calls.clear()
            assert run(imagen, "reference").isfinite().all() and len(calls) >= 8
        else:
            with pytest.raises(ValueError, match="condition_cache='on' cannot be had: .*forward of the U-Net"):
                run(imagen, condition_cache="on")


def test_a_subclass_is_really_called():
    torch.manual_seed(0)
    imagen = make_imagen(unets=[Custom()])
    calls.clear()
    run(imagen)
    assert calls == ["subclass"] * 8


def test_a_u_net_compiled_in_place_is_really_called():
    imagen, graphs = make_imagen(unets=[BaseTest()]), []
    arguments = {"sampler": "ddim", "steps": 2}
    expected = run(imagen, arguments=arguments)
    imagen.unets[0].compile(backend=lambda graph, inputs: graphs.append(1) or graph.forward, dynamic=False)
    assert distance(run(imagen, arguments=arguments), expected) < FLOAT32 and graphs


def test_graphs_that_were_asked_for_and_cannot_be_had(monkeypatch):
    fake_cuda_graphs(monkeypatch, reason=ASKED_FOR)
    imagen = make_imagen()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="cuda_graphs='on'.*autocast is in"):
        run(imagen)
    hooked(imagen.unets[0])
    with pytest.raises(ValueError, match="cuda_graphs='on' cannot be had: .*forward of the U-Net"):
        run(imagen)


@pytest.mark.parametrize("settings", [{}, {"precision": "float32"}, {"condition_cache": "off"}], ids=str)
def test_a_users_autocast_is_respected(imagen, predictions, settings):
    exact = run(imagen, **settings)
    assert {dtype for _, dtype in predictions} == {torch.float32}
    predictions.clear()
    with torch.autocast("cpu", torch.bfloat16):
        half = run(imagen, **settings)
    assert {dtype for _, dtype in predictions} == {torch.bfloat16}
    assert 1e-5 < (half - exact).abs().mean() < HALF


def test_autocast_outdoes_the_precision(imagen, predictions):
    with torch.autocast("cpu", torch.bfloat16):
        run(imagen, precision="float32")
    assert {dtype for _, dtype in predictions} == {torch.bfloat16}


# Captured steps, with a stand-in for CUDA graphs that checks addresses


@pytest.fixture
def graphs(monkeypatch):
    return fake_cuda_graphs(monkeypatch)


def kept_graphs(imagen):
    return list(kept_with(imagen.unets[0]).graphs.values())


@pytest.mark.parametrize("arguments, cond_scale", [*((one, 3.0) for one in SAMPLERS), (FEW, 1.0)], ids=str)
def test_replayed_steps_give_the_same_images(monkeypatch, arguments, cond_scale):
    imagen, other = make_imagen(), make_words(seed=3)
    arguments = {**arguments, "cond_scale": cond_scale}
    runs = ((None, 0), (other, 1), (None, 0))
    expected = [sample(imagen, words, seed=seed, **arguments) for words, seed in runs]
    graphs = fake_cuda_graphs(monkeypatch)
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
        steps = sampling._Steps(CachedPrediction(task, unet, acceleration.layout, unet.dtype), task.update, x)
        steps.rest = lambda: None
        return steps

    with monkeypatch.context() as plain:
        plain.setattr(sampling, "_replayed", steps_of)
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
        assert len(kept_graphs(imagen)) <= sampling._MOST_GRAPHS
    assert len(kept_graphs(imagen)) == sampling._MOST_GRAPHS
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


def test_graphs_of_a_u_net_share_their_memory_while_one_of_them_lives(graphs):
    imagen = make_imagen()
    for steps in (3, 4, 5):
        run(imagen, arguments={**FEW, "steps": steps})
    assert len(graphs) == 3 and {graph.memory for graph in graphs} == {graphs[0]}
    # The memory of graphs that are gone is gone.
    kept_with(imagen.unets[0]).forget_graphs()
    run(imagen)
    assert graphs[3].memory is graphs[3]


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


class Refused(RuntimeError):
    pass


@contextlib.contextmanager
def refuse(graph, **_):
    raise Refused("operation not permitted when stream is capturing")
    yield


def test_a_capture_that_fails_is_said_once(graphs, monkeypatch):
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


def test_a_step_runs_once_before_it_is_captured(graphs, monkeypatch):
    order, capture, advance = [], torch.cuda.graph, sampling._Steps.advance

    def noted(steps, first):
        order.append("captured" if FakeGraph.capturing else "first" if first else "run")
        advance(steps, first)

    monkeypatch.setattr(sampling._Steps, "advance", noted)
    run(make_imagen())
    assert order == ["first", "run", "captured"], "the second step of a multistep sampler is not like the first"
    order.clear()
    run(make_imagen(), arguments={"sampler": "ddim", "steps": 4})
    assert order == ["first", "captured"]
    assert capture is torch.cuda.graph


def test_no_warning_and_no_progress(imagen, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(imagen)
    assert capsys.readouterr() == ("", "")
    imagen.sample(**make_words(), **FEW, seed=0)
    assert "U-Net 2 of 2, 16x16" in capsys.readouterr().err
