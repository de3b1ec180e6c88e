"""Random numbers that belong to an image, and training losses that are made of them."""

import numpy as np
import pytest
import torch
from training_runs import make_imagen

from minimagen_fast.image_random import ImageRandom, image_seeds

CPU = torch.device("cpu")


def draws(seeds):
    random, images = ImageRandom(seeds, CPU), torch.empty(len(seeds), 3, 4, 4)
    return (
        random.times(1000),
        random.lowres_times(1000),
        random.keep(0.5),
        random.noise(images),
        random.lowres_noise(images),
    )


def test_an_image_has_the_same_numbers_in_any_company():
    together, alone = draws([5, 6, 7]), draws([6])
    for of_all, of_one in zip(together, alone, strict=True):
        assert torch.equal(of_all[1:2], of_one)
    assert not torch.equal(together[3][0], together[3][1])
    assert not torch.equal(together[3], together[4]), "noise and low-resolution noise are two"


def test_they_are_distributed_as_they_should_be():
    random = ImageRandom(image_seeds(range(4000), 1), CPU)
    times = random.times(10)
    assert times.dtype == torch.int64 and set(times.tolist()) == set(range(10))
    assert times.bincount().float().std() < 60 and random.keep(0.25).float().mean() == pytest.approx(0.25, abs=0.03)
    both = torch.stack([times.float(), random.lowres_times(10).float(), random.keep(0.5).float()])
    assert (torch.corrcoef(both) - torch.eye(3)).abs().max() < 0.06
    assert random.keep(1.0).all() and not random.keep(0.0).any()
    noise = ImageRandom(range(50), CPU).noise(torch.empty(50, 3, 16, 16))
    assert noise.mean().abs() < 0.02 and noise.std() == pytest.approx(1, abs=0.02)


def test_seeds_depend_on_everything_they_are_made_of():
    seeds = {seed for run in range(3) for epoch in range(3) for seed in image_seeds(range(50), run, epoch)}
    assert len(seeds) == 450 and all(0 <= seed < 2**63 for seed in seeds)
    with pytest.raises(ValueError, match="seeds must be whole numbers of at least 0, got -1"):
        ImageRandom([3, -1], CPU)


def test_seeds_may_be_a_tensor_or_an_array():
    for seeds in (torch.tensor([5, 6]), np.array([5, 6])):
        assert all(map(torch.equal, draws(seeds), draws([5, 6])))


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 16, 16, generator=generator)
    return images, {"text_embeds": torch.randn(4, 3, 512, generator=generator)}


@pytest.mark.parametrize("number", [1, 2])
def test_losses_do_not_depend_on_the_batch_nor_on_global_random_numbers(batch, number):
    imagen, (images, text) = make_imagen(2), batch
    state = torch.get_rng_state()
    losses, times = imagen(images, **text, unet_number=number, seeds=[1, 2, 3, 4], per_image=True)
    assert torch.equal(state, torch.get_rng_state())
    for place in range(4):
        part = {"text_embeds": text["text_embeds"][place : place + 1]}
        one, time = imagen(images[place : place + 1], **part, unet_number=number, seeds=[place + 1], per_image=True)
        torch.testing.assert_close(one[0], losses[place])
        assert time[0] == times[place]
    mean = imagen(images, **text, unet_number=number, seeds=[1, 2, 3, 4])
    torch.testing.assert_close(mean, losses.mean())
    assert imagen(images, **text, unet_number=number, seeds=[5, 6, 7, 8]) != mean


def test_text_is_dropped_image_by_image(batch):
    imagen, (images, text) = make_imagen(cond_drop_prob=0.5), batch
    other = {"text_embeds": text["text_embeds"] + 1}
    seeds = list(range(4))
    losses = [imagen(images, **given, seeds=seeds, per_image=True)[0] for given in (text, other)]
    kept = ImageRandom(seeds, CPU).keep(0.5)
    assert 0 < kept.sum() < 4, "choose other seeds"
    assert torch.equal(losses[0] != losses[1], kept)


def test_timesteps_weighed_by_their_signal_to_noise_ratio(batch):
    imagen, (images, text) = make_imagen(), batch
    losses, times = imagen(images, **text, seeds=[1, 2, 3, 4], per_image=True)
    alpha_bar = imagen.noise_schedulers[0].alphas_cumprod[times].double()
    ratio = alpha_bar / (1 - alpha_bar)
    weighted = imagen(images, **text, seeds=[1, 2, 3, 4], min_snr_gamma=0.5)
    expected = (losses.double() * ratio.clamp(max=0.5) / ratio).mean()
    assert weighted.item() == pytest.approx(expected.item(), rel=1e-5)
    assert weighted != losses.mean()
    assert imagen(images, **text, seeds=[1, 2, 3, 4], min_snr_gamma=float("inf")) == losses.mean()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seeds": [1, 2]}, "seeds must hold one whole number for each of the 4 images"),
        ({"min_snr_gamma": 0}, "positive"),
    ],
)
def test_wrong_options_are_refused(batch, options, message):
    with pytest.raises(ValueError, match=message):
        make_imagen()(batch[0], **batch[1], **options)
