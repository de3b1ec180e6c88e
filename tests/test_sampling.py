"""The sampling loop: the same images however it is run, and captured steps that serve the next call too."""

import warnings
import weakref

import pytest
import torch
from fast_path import (
    FEW,
    FLOAT32,
    SAMPLERS,
    denoise_by,
    distance,
    fake_cuda_graphs,
    kept_graphs,
    make_imagen,
    make_words,
    refuse,
    run,
)

from minimagen_fast import layers
from minimagen_fast.acceleration import ASKED_FOR
from minimagen_fast.conditioning import Conditions
from minimagen_fast.kept import kept_with
from minimagen_fast.kernels.images import is_channels_last
from minimagen_fast.Unet import BaseTest, Unet

# The mean over the pixels: bfloat16 has 8 bits.
HALF = 0.02
every_sampler = pytest.mark.parametrize("arguments", SAMPLERS, ids=str)
every_scale = pytest.mark.parametrize("cond_scale", [0.0, 1.0, 3.0])


@pytest.fixture(scope="module")
def imagen():
    return make_imagen(stages=2)


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
        monkeypatch.setattr(warnings, "warn", lambda *_, **__: None)
    run(imagen, words=words, arguments=arguments)
    # A graph that was captured takes no memory when it is replayed: only an eager step can find that there is less.
    if captures and arguments is not FEW:
        kept_graphs(imagen)[0].drop()
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


def test_no_warning_and_no_progress(imagen, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(imagen)
    assert capsys.readouterr() == ("", "")
    imagen.sample(**make_words(), **FEW, seed=0)
    assert "U-Net 2 of 2, 16x16" in capsys.readouterr().err
