"""What a step does on the kernels, counted without a card: on the meta device operators have names and shapes only."""

import itertools
from collections import Counter

import pytest
import torch
from fast_path import Counts, make_imagen, make_super, make_unet, make_words

from minimagen_fast import sampled_steps
from minimagen_fast.Imagen import Imagen
from minimagen_fast.kernels import launch, use_implementation
from minimagen_fast.layers import Attention, ChanLayerNorm, CrossAttention
from minimagen_fast.plan_trace import _Live
from minimagen_fast.predictions import CachedPrediction, Task
from minimagen_fast.samplers import Sampler, Update
from minimagen_fast.Unet import Base, Super, Unet

META = torch.device("meta")
SAMPLERS = [Sampler(), Sampler("ddpm", 6), Sampler("ddim", 6), Sampler("ddim", 6, 0.5), Sampler("dpmpp_2m", 6)]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=str)


@pytest.fixture(autouse=True)
def on_triton():
    with use_implementation("triton"), torch.no_grad():
        yield


def steps_of(sampler=SAMPLERS[0], cond_scale=3.0, stage=1, batch=2, batch_size=None, unet=None):
    """The loop's steps for one U-Net, its weights in bfloat16."""
    imagen = make_imagen(stages=stage, unets=unet and [unet]).to(torch.bfloat16).to(META)
    unet, words = imagen.unets[-1], make_words(batch, device=META)
    side = imagen.image_sizes[-1]
    x = torch.empty(batch, 3, side, side, device=META)
    lowres = {"lowres_cond_img": x, "lowres_noise_times": torch.zeros(batch, dtype=torch.long, device=META)}
    task = Task(
        unet=unet,
        update=Update(sampler, imagen.noise_schedulers[-1], percentile=0.9, cond_scale=cond_scale),
        cond_scale=cond_scale,
        text_embeds=words["text_embeds"],
        text_mask=words["text_masks"],
        batch_size=batch_size,
        **(lowres if unet.lowres_cond else dict.fromkeys(lowres)),
    )
    predict = CachedPrediction(task, unet, torch.channels_last, torch.bfloat16)
    return unet, sampled_steps.Steps(predict, task.update, x)


def counted(steps, first=False):
    with Counts() as seen:
        steps.advance(first)
    return seen


def convolutions(unet):
    """Of one evaluation; those of two inputs at once are products of their own."""
    with Counts() as seen:
        x, time = torch.empty(2, 3, 8, 8, device=META), torch.zeros(2, dtype=torch.long, device=META)
        lowres = {"lowres_cond_img": x, "lowres_noise_times": time} if unet.lowres_cond else {}
        unet(x, time, **lowres)
    return seen.names["convolution"]


@every_sampler
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("cond_scale", [0.0, 1.0, 3.0])
def test_one_evaluation_a_step_with_and_without_guidance(sampler, stage, cond_scale):
    unet, steps = steps_of(sampler, cond_scale, stage)
    expected = convolutions(unet)
    assert expected > 10
    for number in range(3):
        seen = counted(steps, first=number == 0)
        assert seen.names["convolution"] == expected
        rows = {shapes[0][0] for name, *shapes in seen.products if name == "convolution"}
        assert rows == ({2, 4} if cond_scale == 3 else {2})


@every_sampler
@pytest.mark.parametrize("stage", [1, 2])
def test_every_step_does_the_same_and_waits_for_nothing(sampler, stage):
    _, steps = steps_of(sampler, stage=stage)
    first, *others = [counted(steps, first=number == 0) for number in range(6)]
    assert all(seen.names == others[0].names and seen.products == others[0].products for seen in others)
    if not steps._update.multistep:
        assert first.names == others[0].names
    for seen in (first, *others):
        assert seen.waits() == seen.between_devices == []


@every_sampler
@pytest.mark.parametrize("stage", [1, 2])
def test_memory_does_not_grow_from_step_to_step(sampler, stage):
    unet, steps = steps_of(sampler, stage=stage)
    live, sizes = _Live([*unet.parameters(), *unet.buffers()]), []
    with live:
        for number in range(4):
            steps.advance(first=number == 0)
            sizes.append(live.now)
            live.live.append(0)
    peaks = [max(group) for is_end, group in itertools.groupby(live.live, bool) if is_end]
    assert len(set(sizes)) == 1, sizes
    assert len(peaks) == 4 and len(set(peaks[1:])) == 1, peaks


def test_what_would_wait_is_seen():
    with Counts() as seen:
        torch.ones(3).nonzero()
        torch.ones(1).item()
        torch.ones(1).to(META)
    assert set(seen.waits()) == {"nonzero", "_local_scalar_dense"} and seen.between_devices == ["_to_copy"]


@pytest.mark.parametrize("cond_dim", [24, 512])
def test_no_work_on_the_text_in_a_step(cond_dim):
    unet, steps = steps_of(unet=make_unet(cond_dim=cond_dim, layer_cross_attns=True))
    steps.advance(True)
    seen = counted(steps)
    # Whatever is multiplied with the words has their width, and whatever makes keys of tokens the width of all heads.
    weights = [shapes[-1] for name, *shapes in seen.products if name != "convolution"]
    assert (512, cond_dim) not in weights and (cond_dim, 2 * 8 * 64) not in weights, weights
    assert not any(258 in shapes[0] or 2 * 258 in shapes[0] for _, *shapes in seen.products), seen.products


@pytest.mark.parametrize("make", [make_unet, make_super])
def test_all_scales_and_shifts_of_a_step_are_one_product(make):
    unet, steps = steps_of(stage=1 if make is make_unet else 2)
    steps.advance(True)
    width = sum(2 * block.block2.project.out_channels for block in unet.resnet_blocks)
    seen = counted(steps)
    time_width = unet.resnet_blocks[0].time_mlp[1].in_features
    of_time = [shapes for _, *shapes in seen.products if (4, time_width) in shapes]
    assert of_time == [[(width,), (4, time_width), (time_width, width)]]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_times_of_all_steps_are_embedded_at_once(stage):
    before = []
    for number in (3, 6):
        with Counts() as seen:
            steps_of(Sampler("ddim", number), stage=stage)
        before.append(seen)
    few, many = before
    assert few.names == many.names
    # Three products for the times, and as many for those of the low-resolution images.
    rows = [sum(shapes[1][0] == number for _, *shapes in seen.products) for seen, number in ((few, 3), (many, 6))]
    assert rows == [3 * stage, 3 * stage], many.products


def test_parts_of_a_batch_are_evaluated_one_by_one():
    unet, steps = steps_of(batch=5, batch_size=2)
    expected = convolutions(unet)
    seen = counted(steps, first=True)
    assert seen.names["convolution"] == 3 * expected


@every_sampler
def test_the_update_is_one_launch_and_a_step_few(sampler):
    unet, steps = steps_of(sampler)
    steps.advance(True)
    with launch.record() as launches:
        steps.advance(False)
    modules = Counter(one.kernel.fn.__module__.rpartition(".")[2] for one in launches)
    attentions = sum(isinstance(module, Attention | CrossAttention) for module in unet.modules())
    channel_norms = sum(isinstance(module, ChanLayerNorm) for module in unet.modules())
    assert attentions == 7 and channel_norms == 4
    assert modules["sampling_kernels"] == 1 and modules["null_key_flash"] == attentions
    # One launch for each norm: two of each block, two of each attention, and those of the feed-forwards.
    norms = 2 * len(unet.resnet_blocks) + 2 * attentions + channel_norms
    assert modules.total() == norms + attentions + 1, modules
    with launch.record() as again:
        steps.advance(False)
    assert [one.kernel for one in again] == [one.kernel for one in launches], "not the same in every step"


def test_the_loop_has_no_more_to_do_than_its_steps():
    # Conditions once, then for each step its noise and its operators: nothing that grows with the steps.
    totals = {}
    for number in (2, 3, 6):
        imagen, words = make_imagen().to(META), make_words(device=META)
        with Counts() as seen:
            imagen.sample(**words, steps=number, cond_scale=3.0, progress=False)
        assert seen.waits() == []
        totals[number] = seen.names.total()
    assert totals[6] - totals[3] == 3 * (totals[3] - totals[2])


def train(stage, seen):
    imagen = make_imagen(stages=stage).to(META).accelerate(memory_format="channels_last")
    x, words = torch.empty(2, 3, 8, 8, device=META), make_words(device=META)
    lowres = {"lowres_cond_img": x} if stage == 2 else {}
    times = torch.zeros(2, dtype=torch.long, device=META)
    with torch.enable_grad(), seen:
        loss = imagen._p_losses(
            imagen.unets[-1],
            x,
            times,
            noise_scheduler=imagen.noise_schedulers[-1],
            text_embeds=words["text_embeds"],
            text_mask=words["text_masks"],
            **lowres,
        )
        loss.backward()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_step_waits_for_nothing(stage):
    train(stage, seen := Counts())
    assert seen.waits() == seen.between_devices == [] and seen.names["convolution_backward"] > 10


@pytest.mark.parametrize("stage", [1, 2])
def test_pictures_are_normalised_noised_and_laid_out_in_one_operation(monkeypatch, stage):
    seen, before, forward = Counts(), [], Unet.forward

    def watched(self, x, *args, lowres_cond_img, **kwargs):
        images = (x,) if lowres_cond_img is None else (x, lowres_cond_img)
        assert all(each.is_contiguous(memory_format=torch.channels_last) for each in images)
        before.append({name.partition(".")[0]: number for name, number in seen.names.items()})
        return forward(self, x, *args, lowres_cond_img=lowres_cond_img, **kwargs)

    monkeypatch.setattr(Unet, "forward", watched)
    train(stage, seen)
    (names,) = before
    assert names["minimagen_fast::mix"] == stage
    assert not names.keys() & {"mul", "add", "sub", "rsub", "copy_", "_to_copy"}, names


# GiB of a step of the paper's super-resolution U-Net in bfloat16, guided, for one image, the weights' 1.3 GiB aside.
MOST = {256: 0.3, 512: 0.7, 1024: 2.3}


@pytest.fixture(scope="module")
def cascade():
    with META:
        unets = [Base(), Super(lowres_cond=True), Super(lowres_cond=True)]
        return Imagen(unets, text_encoder_name="t5_small", image_sizes=(64, 256, 1024)).to(torch.bfloat16)


@pytest.mark.parametrize("side", MOST)
def test_large_images_fit_one_card(cascade, side):
    unet, x = cascade.unets[1], torch.empty(1, 3, side, side, device=META)
    task = Task(
        unet=unet,
        update=Update(Sampler(), cascade.noise_schedulers[1], percentile=0.9, cond_scale=3.0),
        cond_scale=3.0,
        text_embeds=make_words(1, tokens=256, device=META)["text_embeds"],
        text_mask=None,
        lowres_cond_img=x,
        lowres_noise_times=torch.zeros(1, dtype=torch.long, device=META),
        batch_size=None,
    )
    live = _Live([*cascade.parameters(), *cascade.buffers()])
    with live:
        steps = sampled_steps.Steps(CachedPrediction(task, unet, torch.channels_last, torch.bfloat16), task.update, x)
        steps.advance(True)
    assert 0.9 * MOST[side] < max(live.live) / 2**30 < MOST[side]


def test_a_cascade_to_1024_pixels_waits_for_nothing(cascade):
    with Counts() as seen:
        images = cascade.sample(
            **make_words(1, device=META),
            cond_scale=3.0,
            sampler="ddim",
            steps=2,
            seed=0,
            progress=False,
        )
    assert images.shape == (1, 3, 1024, 1024) and seen.waits() == []
