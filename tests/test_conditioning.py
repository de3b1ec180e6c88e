"""What the blocks are told once for a whole sampling is what `Unet.forward` tells them at every step."""

import pytest
import torch
from fast_path import Counts, T, distance, make_imagen, make_super, make_unet, make_words, tensors_of

from minimagen_fast.conditioning import Conditions, SharedConditions
from minimagen_fast.kernels import use_implementation
from minimagen_fast.predictions import CachedPrediction, PlainPrediction, Task
from minimagen_fast.samplers import Sampler, Update

TIMES = torch.arange(T - 1, -1, -1)
UNETS = {
    "base": make_unet,
    "super": make_super,
    "efficient": lambda: make_unet(memory_efficient=True, num_resnet_blocks=2, layer_cross_attns=True),
    "wide": lambda: make_unet(cond_dim=96, layer_cross_attns=True),
}


def made(unet, *, with_text=(True,), batch=2, text=True, tokens=5, mask=True, dtype=torch.float32, seed=1):
    """Conditions of all steps, and what `Unet.forward` is to be given for them."""
    words = make_words(batch, tokens, seed)
    embeds, mask = words["text_embeds"] if text else None, words["text_masks"] if text and mask else None
    level = torch.full((batch,), 4) if unet.lowres_cond else None
    shared = SharedConditions(unet, TIMES, lowres_noise_time=None if level is None else level[:1], dtype=dtype)
    conditions = Conditions(shared, unet, text_embeds=embeds, text_mask=mask, batch=batch, with_text=with_text)
    return conditions, {"text_embeds": embeds, "text_mask": mask, "lowres_noise_times": level}


def images(unet, batch=2, side=8):
    generator = torch.Generator().manual_seed(3)
    x, lowres = torch.randn(2, batch, 3, side, side, generator=generator)
    return x, lowres if unet.lowres_cond else None


def largest_error(unet, conditions, given, with_text=(True,), steps=(0, 7, T - 1)):
    """Of all predictions of some steps, relative to the largest prediction."""
    x, lowres = images(unet, len(given["text_embeds"]) if given["text_embeds"] is not None else 2)
    errors = []
    for step in steps:
        actual = unet.denoise(x, lowres, conditions.at(torch.tensor([step])))
        time = TIMES[step].expand(len(x))
        plain = [
            unet(x, time, lowres_cond_img=lowres, **given, cond_drop_prob=0.0 if has_text else 1.0)
            for has_text in with_text
        ]
        expected = torch.cat(plain)
        assert actual.shape == expected.shape
        errors.append(distance(actual, expected) / expected.abs().max().item())
    return max(errors)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("with_text", [(True,), (False,), (True, False)])
def test_all_steps_are_those_of_forward(name, with_text):
    unet = UNETS[name]()
    conditions, given = made(unet, with_text=with_text)
    assert largest_error(unet, conditions, given, with_text, range(T)) < 2e-5


@pytest.mark.parametrize("name", ["base", "super"])
def test_without_text(name):
    unet = UNETS[name]()
    conditions, given = made(unet, text=False)
    assert largest_error(unet, conditions, given) < 2e-5


@pytest.mark.parametrize("tokens", [1, 256, 300])
def test_any_number_of_words(tokens):
    unet = make_unet()
    conditions, given = made(unet, tokens=tokens, with_text=(True, False))
    assert largest_error(unet, conditions, given, (True, False)) < 2e-5


def test_without_a_mask():
    unet = make_unet()
    masked, _ = made(unet)
    conditions, given = made(unet, mask=False)
    assert largest_error(unet, conditions, given) < 2e-5
    assert largest_error(unet, masked, given) > 1e-3, "the mask changes nothing"


@pytest.mark.parametrize("keeps_keys", [True, False])
def test_keys_that_are_kept_and_keys_that_are_not(keeps_keys, monkeypatch):
    monkeypatch.setattr("minimagen_fast.conditioning.keys_are_worth_keeping", lambda *_, **__: keeps_keys)
    unet = make_unet(layer_cross_attns=True)
    conditions, given = made(unet, with_text=(True, False))
    kinds = {frozenset(one) for one in conditions.at(torch.tensor([0]))}
    assert kinds == {frozenset(("scale_shift",)), frozenset(("scale_shift", "keys_values" if keeps_keys else "cond"))}
    assert largest_error(unet, conditions, given, (True, False)) < 2e-5


def test_keys_are_kept_where_they_are_fewer_multiplications():
    narrow, wide = made(make_unet())[0], made(make_unet(cond_dim=512))[0]
    assert not narrow._shared.keeps_keys and wide._shared.keeps_keys
    with use_implementation("reference"):
        assert made(make_unet())[0]._shared.keeps_keys


@pytest.mark.parametrize("name", ["base", "super"])
def test_the_kernels_choice_does_not_matter(name):
    unet = UNETS[name]()
    with use_implementation("reference"):
        conditions, given = made(unet, with_text=(True, False))
        assert largest_error(unet, conditions, given, (True, False)) < 2e-5


def test_under_autocast():
    unet = make_unet()
    exact, given = made(unet, with_text=(True, False))
    with torch.autocast("cpu", torch.bfloat16):
        conditions, _ = made(unet, with_text=(True, False), dtype=torch.bfloat16)
        assert all(value.dtype == torch.bfloat16 for value in tensors_of(conditions))
        assert largest_error(unet, conditions, given, (True, False)) < 0.02
        x, step = images(unet)[0], torch.tensor([0])
        rounded = unet.denoise(x, None, conditions.at(step))
    assert 1e-4 < distance(rounded, unet.denoise(x, None, exact.at(step))) < 0.1, "there was no autocast"


def test_the_first_and_the_last_step_differ():
    unet = make_unet()
    conditions, _ = made(unet)
    first = [one["scale_shift"].clone() for one in conditions.at(torch.tensor([0]))]
    last = [one["scale_shift"] for one in conditions.at(torch.tensor([T - 1]))]
    assert all(distance(a, b) > 1e-3 for a, b in zip(first, last, strict=True))


@pytest.mark.parametrize("name", ["base", "super", "wide"])
def test_conditions_are_taken_over_in_place(name):
    unet = UNETS[name]()
    conditions, _ = made(unet, with_text=(True, False))
    addresses = [value.data_ptr() for value in tensors_of(conditions)]
    for block in unet.resnet_blocks:
        block.time_mlp[1].weight.mul_(1.5)
    unet.text_to_cond.weight.mul_(1.5)
    unet.to_time_tokens[0].weight.mul_(1.5)
    _, given = made(unet, with_text=(True, False), tokens=9, seed=7)
    assert largest_error(unet, conditions, given, (True, False)) > 1e-3
    level = given["lowres_noise_times"]
    conditions._shared.load(unet, TIMES, None if level is None else level[:1])
    conditions.load(unet, given["text_embeds"], given["text_mask"])
    assert [value.data_ptr() for value in tensors_of(conditions)] == addresses
    assert largest_error(unet, conditions, given, (True, False)) < 2e-5


def test_weights_are_read_once():
    unet = make_unet()
    conditions, _ = made(unet)
    before = [one["scale_shift"].clone() for one in conditions.at(torch.tensor([3]))]
    for block in unet.resnet_blocks:
        block.time_mlp[1].weight.zero_()
    after = [one["scale_shift"] for one in conditions.at(torch.tensor([3]))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", UNETS)
def test_work_before_the_conditions_differ_is_done_once(name):
    # Two groups of conditions: what comes before the first block's scale and shift sees each image once.
    unet = UNETS[name]()
    conditions, _ = made(unet, with_text=(True, False))
    x, lowres = images(unet)
    with Counts() as seen:
        unet.denoise(x, lowres, conditions.at(torch.tensor([0])))
    rows = [shapes[0][0] for name, *shapes in seen.products if name == "convolution"]
    before = len(unet.init_conv.convs) + 1 + (unet.downs[0][0] is not None)
    assert rows[:before] == [2] * before and set(rows[before:]) == {4}


def test_a_step_projects_no_text_and_no_time_but_all_scales_and_shifts_in_one():
    unet = make_unet(cond_dim=512, layer_cross_attns=True)
    conditions, given = made(unet, with_text=(True, False))
    x, _ = images(unet)
    with Counts() as seen:
        told = conditions.at(torch.tensor([0]))
    width = sum(2 * block.block2.project.out_channels for block in unet.resnet_blocks)
    assert len(told) == len(unet.resnet_blocks)
    ((_, *shapes),) = seen.products
    assert (width,) in shapes, shapes
    with Counts() as seen:
        unet.denoise(x, None, told)
    shapes = {shape for _, *shapes in seen.products for shape in shapes}
    text_width, kv_width = unet.text_to_cond.in_features, 2 * 8 * 64
    assert not [shape for shape in shapes if text_width in shape[-2:] and kv_width in shape[-2:]], "keys of text"
    # The reference makes them: in every call.
    with Counts() as seen, use_implementation("reference"):
        unet(x, TIMES[:1].expand(2), **given)
    shapes = {shape for _, *shapes in seen.products for shape in shapes}
    assert [shape for shape in shapes if text_width in shape[-2:] and kv_width in shape[-2:]], "nothing was looked for"


def task_of(imagen, words, batch_size):
    update = Update(Sampler(), imagen.noise_schedulers[0], percentile=0.9, cond_scale=3.0)
    return Task(imagen.unets[0], update, 3.0, words["text_embeds"], words["text_masks"], None, None, batch_size)


@pytest.mark.parametrize("cond_dim", [8, 64], ids=["tokens", "keys"])
def test_pieces_of_a_batch_hold_together_what_the_batch_does(cond_dim):
    imagen, words = make_imagen(unets=[make_unet(cond_dim=cond_dim)]), make_words(8)

    def held(predict):
        tensors = [tensor for conditions in predict._conditions for tensor in tensors_of(conditions)]
        return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())

    whole, divided = (
        CachedPrediction(task_of(imagen, words, size), imagen.unets[0], torch.contiguous_format, torch.float32)
        for size in (None, 1)
    )
    assert len(divided._conditions) == 8 and held(divided) == held(whole)
    divided._divide(2, guides_at_once=False)
    divided._prepare()
    assert len(divided._conditions) == 8 and held(divided) == held(whole)


def test_the_two_predictions_of_a_step_agree_for_pieces_of_a_batch():
    imagen = make_imagen()
    words = make_words(5)
    x = torch.randn(5, 3, 8, 8)
    whole = None
    for size in (None, 1, 2, 3, 5, 9):
        task = task_of(imagen, words, size)
        cached = CachedPrediction(task, imagen.unets[0], torch.contiguous_format, torch.float32)
        plain = PlainPrediction(task, imagen.unets[0], torch.contiguous_format)
        pred = cached(x, torch.tensor([4]))
        whole = pred if whole is None else whole
        assert distance(pred, whole) < 2e-5, size
        assert distance(plain(x, torch.tensor([4])), whole) < 2e-5, size
        cached._divide(2, guides_at_once=False)
        assert cached._conditions == []
        assert distance(cached(x, torch.tensor([4])), whole) < 2e-5, size
