"""Imagen: the faults of the original that are fixed here, and what is new in sampling."""

import copy
import math
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from minimagen_fast.diffusion_model import GaussianDiffusion
from minimagen_fast.Imagen import Imagen
from minimagen_fast.pictures import to_pil_images
from minimagen_fast.t5 import register_text_encoder
from minimagen_fast.Unet import BaseTest, SuperTest

SIZES = (8, 16)
STEPS = 20


def make_imagen(stages=2, **arguments):
    torch.manual_seed(0)
    channels = arguments.get("channels", 3)
    unets = [BaseTest(channels=channels), *(SuperTest(lowres_cond=True, channels=channels) for _ in range(stages - 1))]
    defaults = dict(text_encoder_name="t5_small", image_sizes=tuple(8 * 2**i for i in range(stages)), timesteps=STEPS)
    return Imagen(unets, **{**defaults, **arguments})


@pytest.fixture(scope="module")
def imagen():
    return make_imagen()


@pytest.fixture
def words():
    torch.manual_seed(1)
    return dict(text_embeds=torch.randn(2, 4, 512), text_masks=torch.ones(2, 4, dtype=torch.bool))


def snapshot(imagen):
    return (
        {name: (p.device, p.data_ptr(), p.requires_grad, p.grad) for name, p in imagen.named_parameters()},
        {name: module.training for name, module in imagen.named_modules()},
        imagen.device,
    )


# Making one


def test_u_nets_in_a_list_are_registered_again(words):
    # The original's own code puts them there.
    imagen = make_imagen()
    expected, unets = imagen.state_dict(), list(imagen.unets)
    del imagen.unets
    imagen.unets = unets
    imagen(torch.rand(2, 3, 16, 16), **words, unet_number=2)
    assert imagen.state_dict().keys() == expected.keys() and list(imagen.unets) == unets
    imagen.load_state_dict(expected)


def test_the_loss_of_a_float64_model_is_float64(words):
    losses = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        losses.append(make_imagen(stages=1).to(dtype)(torch.rand(2, 3, 8, 8), **words))
    assert losses[1].dtype == torch.float64
    torch.testing.assert_close(losses[1].float(), losses[0], rtol=1e-3, atol=1e-4)


def test_parameters_are_there_after_a_training_step(words):
    # The original unregisters its U-Nets in the first training step: clipping and optimizers then see nothing.
    imagen = make_imagen()
    before = list(imagen.parameters())
    imagen(torch.rand(2, 3, 16, 16), **words, unet_number=2).backward()
    assert [id(p) for p in imagen.parameters()] == [id(p) for p in before] and len(before) > 100
    assert isinstance(imagen.unets, torch.nn.ModuleList)
    assert any(p.grad is not None for p in imagen.parameters())


def test_a_replaced_unet_is_said():
    match = "U-Net 2 was replaced by a new one.*lowres_cond=True instead of False"
    with pytest.warns(UserWarning, match=match) as said:
        imagen = Imagen([BaseTest(), SuperTest()], text_encoder_name="t5_small", image_sizes=SIZES)
    assert isinstance(imagen.unets[1], SuperTest) and imagen.unets[1].lowres_cond
    assert Path(said[0].filename).name == "test_imagen.py"


def test_a_fitting_unet_is_kept():
    unets = [BaseTest(), SuperTest(lowres_cond=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imagen = Imagen(unets, text_encoder_name="t5_small", image_sizes=SIZES)
    assert list(imagen.unets) == unets


def test_a_replaced_unet_keeps_dtype_and_mode():
    with pytest.warns(UserWarning, match="text_embed_dim=768 instead of 512"):
        imagen = Imagen(BaseTest().bfloat16().eval(), text_encoder_name="t5_base", image_sizes=8)
    assert imagen.unets[0].dtype == torch.bfloat16 and not imagen.unets[0].training


def test_one_size_may_be_an_int():
    assert Imagen(BaseTest(), text_encoder_name="t5_small", image_sizes=8).image_sizes == (8,)


def test_numpy_integers_are_integers(words):
    imagen = make_imagen(
        image_sizes=tuple(np.array(SIZES)), timesteps=np.int64(20), channels=3, only_train_unet_number=np.int64(2)
    )
    numbers = (*imagen.image_sizes, imagen.noise_schedulers[0].num_timesteps, imagen.only_train_unet_number)
    assert numbers == (8, 16, 20, 2) and {type(number) for number in numbers} == {int}
    images = [imagen.sample(**words, progress=False, seed=seed, steps=2, sampler="ddim") for seed in (3, np.int64(3))]
    assert torch.equal(*images)


def test_the_u_net_that_is_trained_is_told(words):
    imagen = make_imagen()
    assert imagen.unet_being_trained_index == -1
    imagen(torch.rand(2, 3, 16, 16), **words, unet_number=2)
    assert imagen.unet_being_trained_index == 1
    imagen.state_dict()
    assert imagen.unet_being_trained_index == -1


def test_an_imagen_that_the_original_has_pickled(words):
    imagen = make_imagen()
    state = dict(copy.deepcopy(imagen).__getstate__())
    for name in ("lowres_max_noise_level", "_acceleration"):
        del state[name]
    # After a training step the original has its U-Nets in a list.
    state["unets"] = list(state["_modules"].pop("unets"))
    loaded = Imagen.__new__(Imagen)
    loaded.__setstate__(state)
    assert loaded.state_dict().keys() == imagen.state_dict().keys()
    losses = []
    for each in (imagen, loaded):
        torch.manual_seed(2)
        losses.append(each(torch.full((2, 3, 16, 16), 0.3), **words, unet_number=2))
    assert torch.equal(*losses)


def test_timesteps_may_be_given_for_each_unet(words):
    imagen = make_imagen(timesteps=(20, 25))
    assert [scheduler.num_timesteps for scheduler in imagen.noise_schedulers] == [20, 25]
    assert imagen.lowres_noise_schedule.num_timesteps == 25
    steps = []
    imagen.sample(**words, progress=False, callback=lambda unet, step, images: steps.append((unet, step)))
    assert steps == [(1, i) for i in range(20)] + [(2, i) for i in range(25)]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(image_sizes=(8,)), ValueError, "image_sizes must have 2 entries"),
        (dict(image_sizes=(8, 15)), ValueError, "must be multiples of 4"),
        (dict(timesteps=(20, 20, 20)), ValueError, "timesteps must be one value or 2"),
        (dict(timesteps=10), ValueError, "timesteps must be at least 20"),
        (dict(loss_type="l3"), ValueError, "loss_type must be one of l1, l2, huber"),
        (dict(cond_drop_prob=1.2), ValueError, "cond_drop_prob must lie in"),
        (dict(cond_drop_prob="0.1"), TypeError, "cond_drop_prob must be a number, got '0.1'"),
        (dict(dynamic_thresholding_percentile=None), TypeError, "dynamic_thresholding_percentile must be a number"),
        (dict(lowres_max_noise_level="1"), TypeError, "lowres_max_noise_level must be a number"),
        (dict(lowres_sample_noise_level=None), TypeError, "lowres_sample_noise_level must be a number"),
        (dict(lowres_sample_noise_level=1.0), ValueError, "lowres_sample_noise_level must lie in"),
        (dict(lowres_max_noise_level=0.0), ValueError, "lowres_max_noise_level must lie in"),
        (dict(lowres_max_noise_level=0.1), ValueError, "lowres_sample_noise_level is 0.2, more than"),
        (dict(dynamic_thresholding_percentile=95), ValueError, "dynamic_thresholding_percentile must lie in"),
        (dict(only_train_unet_number=3), ValueError, "only_train_unet_number must lie in 1 to 2"),
        (dict(only_train_unet_number=1.0), TypeError, "only_train_unet_number must be an int, got 1.0"),
        (dict(image_sizes=(8.0, 16.0)), TypeError, "image_sizes must be an int, got 8.0"),
        (dict(text_encoder_name="t6"), ValueError, "t6"),
    ],
)
def test_arguments_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        make_imagen(**arguments)


def test_unets_that_cannot_be():
    unet = BaseTest()
    with pytest.raises(TypeError, match="unets must be"):
        Imagen([unet, "unet"], text_encoder_name="t5_small", image_sizes=SIZES)
    with pytest.raises(ValueError, match="same U-Net twice"):
        Imagen([unet, unet], text_encoder_name="t5_small", image_sizes=SIZES)


def test_state_dict_round_trip():
    imagen, other = make_imagen(), make_imagen()
    for p in other.parameters():
        torch.nn.init.normal_(p)
    other.load_state_dict(imagen.state_dict())
    for a, b in zip(imagen.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


# Training


@pytest.mark.parametrize("level, expected", [(1.0, set(range(20))), (0.25, {0, 1, 2, 3, 4}), (0.01, {0})])
def test_noise_of_low_resolution_images_is_limited(words, monkeypatch, level, expected):
    imagen = make_imagen(lowres_max_noise_level=level, lowres_sample_noise_level=0.0)
    seen = set()

    def forward(x, times, *, lowres_noise_times, **condition):
        seen.update(lowres_noise_times.tolist())
        return x

    monkeypatch.setattr(imagen.unets[1], "forward", forward)
    torch.manual_seed(0)
    for _ in range(200):
        imagen(torch.rand(2, 3, 16, 16), **words, unet_number=2)
    assert seen == expected


def test_images_need_not_be_square(imagen, words):
    for number in (1, 2):
        assert imagen(torch.rand(2, 3, 24, 17), **words, unet_number=number).isfinite()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_one_to_four_channels(channels, words):
    imagen = make_imagen(channels=channels)
    assert imagen(torch.rand(2, channels, 16, 16), **words, unet_number=2).isfinite()
    images = imagen.sample(**words, progress=False, return_pil_images=True)
    assert [image.mode for image in images] == [{1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype, words):
    imagen = make_imagen().to(dtype)
    assert imagen.noise_schedulers[0].betas.dtype == torch.float32
    for number in (1, 2):
        imagen(torch.rand(2, 3, 16, 16), **words, unet_number=number).backward()
    images = imagen.sample(**words, progress=False, cond_scale=2.0)
    assert images.dtype == torch.float32 and images.isfinite().all()


def test_autocast(words):
    imagen = make_imagen()
    images = torch.rand(2, 3, 16, 16)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(imagen(images, **words, unet_number=2))
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert imagen.sample(**words, progress=False).dtype == torch.float32


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(unet_number=None), ValueError, "unet_number must say which U-Net"),
        (dict(unet_number=3), ValueError, "unet_number must lie in 1 to 2"),
        (dict(unet_number=0), ValueError, "unet_number must lie in 1 to 2"),
        (dict(unet_number=1.0), TypeError, "unet_number must be an int, got 1.0"),
        (dict(images=torch.rand(2, 3, 12, 20)), ValueError, "at least 16x16 pixels for U-Net 2, got 12x20"),
        (dict(images=torch.rand(2, 4, 16, 16)), ValueError, "images must have shape"),
        (dict(images=torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), TypeError, "must be floating point"),
        (dict(text_embeds=None), ValueError, "texts or text_embeds must be given"),
        (dict(text_embeds=None, texts=["one"]), ValueError, "one caption for each of the 2 images, got 1"),
        (dict(text_embeds=torch.zeros(2, 4, 100)), ValueError, "text_embeds must have shape"),
        (dict(text_embeds=torch.zeros(3, 4, 512)), ValueError, "one entry for each of the 2 images, got 3"),
        (dict(text_masks=torch.ones(2, 5).bool()), ValueError, "text_masks must have shape"),
        (dict(images=np.zeros((2, 3, 16, 16))), TypeError, "images must be a tensor, got ndarray"),
        (
            dict(images=torch.empty(2, 3, 16, 16, device="meta")),
            ValueError,
            "images must be on .* cpu; they are on meta",
        ),
        (dict(text_embeds=np.zeros((2, 4, 512))), TypeError, "text_embeds must be a tensor, got ndarray"),
        (dict(text_masks=[[True] * 4] * 2), TypeError, "text_masks must be a tensor, got list"),
        (dict(min_snr_gamma="5"), TypeError, "min_snr_gamma must be a number"),
        (dict(seeds=[1.0, 2.0]), TypeError, "seeds must be an int, got 1.0"),
    ],
)
def test_training_input_that_cannot_be(imagen, words, change, error, message):
    arguments = dict(images=torch.rand(2, 3, 16, 16), **words, unet_number=2)
    with pytest.raises(error, match=message):
        imagen(**{**arguments, **change})


def test_only_one_unet_may_be_trained(words):
    imagen = make_imagen(only_train_unet_number=1)
    with pytest.raises(ValueError, match="only_train_unet_number=1"):
        imagen(torch.rand(2, 3, 16, 16), **words, unet_number=2)


def test_captions_are_encoded_by_the_named_encoder():
    def encode(captions, max_length, device):
        lengths = torch.tensor([len(caption.split()) for caption in captions])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return mask[:, :, None].float().expand(-1, -1, 6), mask

    register_text_encoder("counting", encode, 6)
    unet = BaseTest(text_embed_dim=6)
    imagen = Imagen(unet, text_encoder_name="counting", image_sizes=8, timesteps=STEPS)
    texts = ["a b", "a b c"]
    embeds, masks = encode(texts, 256, torch.device("cpu"))
    losses = []
    for given in (dict(texts=texts), dict(text_embeds=embeds, text_masks=masks)):
        torch.manual_seed(0)
        losses.append(imagen(torch.full((2, 3, 8, 8), 0.3), **given))
    assert torch.equal(*losses)
    by_text = imagen.sample(texts=texts, seed=1, progress=False)
    assert torch.equal(by_text, imagen.sample(text_embeds=embeds, text_masks=masks, seed=1, progress=False))


class Halved(GaussianDiffusion):
    def q_sample(self, x_start, t, noise=None):
        return super().q_sample(0.5 * x_start, t, noise)


def halve(schedule):
    original = schedule.q_sample
    schedule.q_sample = lambda x_start, t, noise=None: original(0.5 * x_start, t, noise)
    return schedule


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", ["class", "instance", "normalize_img"])
def test_noising_and_normalising_may_be_replaced(words, kind, number):
    def loss(imagen, images):
        torch.manual_seed(3)
        return imagen(images, **words, unet_number=number)

    images = torch.linspace(0, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    # Half of an image that lies in [-1, 1].
    expected = loss(make_imagen(auto_normalize_img=False), images - 0.5)
    imagen = make_imagen()
    if kind == "normalize_img":
        imagen.normalize_img = lambda image: image - 0.5
    else:
        make = Halved if kind == "class" else lambda timesteps: halve(GaussianDiffusion(timesteps=timesteps))
        imagen.noise_schedulers = torch.nn.ModuleList(make(timesteps=STEPS) for _ in SIZES)
        imagen.lowres_noise_schedule = make(timesteps=STEPS)
    torch.testing.assert_close(loss(imagen, images), expected)
    assert abs(loss(make_imagen(), images) - expected) > 1e-4


def test_an_encoder_that_was_put_in_place_is_called_as_the_original_calls_it(words):
    def encode(text, name="t5_base", max_length=256):
        assert text == ["a", "b"] and name == "t5_small"
        return words["text_embeds"], words["text_masks"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimagen_fast.Imagen.t5_encode_text", encode)
        assert make_imagen()(torch.rand(2, 3, 16, 16), texts=["a", "b"], unet_number=1).isfinite()


def test_one_text_stands_for_all_images(imagen, words):
    one = {name: value[:1] for name, value in words.items()}
    both = {name: value[:1].expand(2, *value.shape[1:]) for name, value in words.items()}
    losses = []
    for given in (one, both):
        torch.manual_seed(3)
        losses.append(imagen(torch.full((2, 3, 16, 16), 0.3), **given, unet_number=2))
    assert torch.equal(*losses)
    start = torch.rand(2, 3, 8, 8)
    samples = [imagen.sample(**given, progress=False, seed=1, start_image=start) for given in (one, both)]
    assert torch.equal(*samples)


def test_noise_lies_as_the_images_do_where_none_is_resized(words):
    # Noise is drawn in the order of memory, see `noise_for`, and stages of one size leave images as they are.
    imagen = make_imagen(image_sizes=(16, 16))
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimagen_fast.Imagen.noise_for", lambda image, resized: drawn.append(resized) or image)
        for side in (16, 20):
            imagen(torch.rand(2, 3, side, side), **words, unet_number=2)
    assert drawn == [False, False, True, True]


# Sampling


def test_one_seed_gives_one_set_of_images(imagen, words):
    first = imagen.sample(**words, seed=5, progress=False)
    torch.rand(7)
    state = torch.get_rng_state()
    second = imagen.sample(**words, seed=5, progress=False)
    assert torch.equal(torch.get_rng_state(), state), "a seeded call leaves the global random state alone"
    third = imagen.sample(**words, generator=torch.Generator().manual_seed(5), progress=False)
    assert torch.equal(first, second) and torch.equal(first, third)
    assert not torch.equal(first, imagen.sample(**words, seed=6, progress=False))
    assert first.shape == (2, 3, 16, 16) and first.min() >= 0 and first.max() <= 1


def test_images_without_normalisation_lie_in_their_own_range(words):
    imagen = make_imagen(auto_normalize_img=False)
    images = imagen.sample(**words, seed=0, progress=False)
    assert images.min() < 0 and images.min() >= -1
    pil = imagen.sample(**words, seed=0, progress=False, return_pil_images=True)
    assert pil[0].tobytes() == to_pil_images((images + 1) / 2)[0].tobytes()


def test_low_resolution_images_are_noised_after_normalising(words):
    imagen = make_imagen()
    seen = []
    unet = imagen.unets[1]
    original = unet.forward
    unet.forward = lambda *args, **kwargs: seen.append(kwargs["lowres_cond_img"]) or original(*args, **kwargs)
    start = torch.full((2, 3, 8, 8), 0.5)
    level = 0.4
    for match_original in (False, True):
        imagen.sample(
            **words,
            seed=3,
            progress=False,
            start_image=start,
            lowres_sample_noise_level=level,
            match_original=match_original,
        )
    right, as_original = seen[0], seen[-1]
    schedule, t = imagen.lowres_noise_schedule, int(STEPS * level)
    signal, noise = schedule.sqrt_alphas_cumprod[t], schedule.sqrt_one_minus_alphas_cumprod[t]
    # Grey is 0 once it is normalised: only noise of the level's own strength is left.
    assert right.mean().abs() < 0.1
    assert right.std().item() == pytest.approx(noise.item(), rel=0.1)
    assert as_original.std().item() == pytest.approx(2 * noise.item(), rel=0.1)
    assert as_original.mean().item() == pytest.approx(signal.item() - 1, abs=0.1)


def test_guidance_may_differ_by_unet(imagen, words):
    guided = imagen.sample(**words, seed=0, progress=False, cond_scale=(3.0, 1.0), stop_at_unet_number=1)
    assert torch.equal(guided, imagen.sample(**words, seed=0, progress=False, cond_scale=3.0, stop_at_unet_number=1))
    both = imagen.sample(**words, seed=0, progress=False, cond_scale=3.0)
    first_only = imagen.sample(**words, seed=0, progress=False, cond_scale=[3.0, 1.0])
    assert not torch.equal(both, first_only)


def test_the_layout_of_a_start_image_does_not_count(words):
    imagen, start = make_imagen(image_sizes=(16, 16)), torch.rand(2, 3, 16, 16)
    layouts = (torch.contiguous_format, torch.channels_last)
    first, second = (
        imagen.sample(**words, seed=0, progress=False, start_image=start.contiguous(memory_format=layout))
        for layout in layouts
    )
    torch.testing.assert_close(first, second)


def test_stop_and_start(imagen, words):
    small = imagen.sample(**words, seed=0, progress=False, stop_at_unet_number=1)
    assert small.shape == (2, 3, 8, 8)
    calls = []
    large = imagen.sample(
        **words, seed=0, progress=False, start_image=small, callback=lambda unet, step, images: calls.append(unet)
    )
    assert large.shape == (2, 3, 16, 16) and set(calls) == {2}
    # A start image of any size is brought to the base model's.
    other = imagen.sample(**words, seed=0, progress=False, start_image=torch.rand(2, 3, 20, 12))
    assert other.shape == (2, 3, 16, 16)


def test_callback_sees_images_that_can_be_shown(imagen, words):
    seen = []
    final = imagen.sample(**words, progress=False, callback=lambda *call: seen.append(call))
    assert [(unet, step) for unet, step, _ in seen] == [(u, s) for u in (1, 2) for s in range(STEPS)]
    assert all(images.min() >= 0 and images.max() <= 1 for _, _, images in seen)
    assert torch.equal(seen[-1][2], final)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("offload", [False, True])
def test_a_failed_sample_leaves_the_model_as_it_was(words, failure, offload):
    imagen = make_imagen()
    imagen.train()
    imagen.unets[0].mid_block1.eval()
    before = snapshot(imagen)

    def fail(unet, step, images):
        if (unet, step) == (2, 3):
            raise failure("stop")

    with pytest.raises(failure, match="stop"):
        imagen.sample(**words, progress=False, callback=fail, offload_idle_unets=offload)
    assert snapshot(imagen) == before
    imagen.sample(**words, progress=False, device="cpu")
    assert snapshot(imagen) == before


def test_progress_is_one_bar_for_each_unet_and_can_be_silenced(imagen, words, capfd):
    imagen.sample(**words)
    shown = capfd.readouterr().err
    bars = {line.split(":")[0].strip() for line in shown.replace("\r", "\n").splitlines() if line.strip()}
    assert bars == {"U-Net 1 of 2, 8x8", "U-Net 2 of 2, 16x16"}
    imagen.sample(**words, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(cond_scale=(1.0, 2.0, 3.0)), ValueError, "cond_scale must be one value or 2"),
        (dict(stop_at_unet_number=3), ValueError, "stop_at_unet_number must lie in 1 to 2"),
        (dict(stop_at_unet_number=1.0), TypeError, "stop_at_unet_number must be an int, got 1.0"),
        (dict(stop_at_unet_number=True), TypeError, "stop_at_unet_number must be an int, got True"),
        (dict(seed=1.5), TypeError, "seed must be an int or None, got 1.5"),
        (dict(seed=2**64), ValueError, "seed must be a whole number below"),
        (dict(generator=3), TypeError, "generator must be a torch.Generator or None, got 3"),
        (dict(callback=3), TypeError, "callback must be a function or None, got 3"),
        (dict(start_image=PIL.Image.new("RGB", (8, 8))), TypeError, "start_image must be a tensor, got Image"),
        (dict(start_image=[[0.5]]), TypeError, "start_image must be a tensor, got list"),
        (dict(text_embeds=np.zeros((2, 4, 512))), TypeError, "text_embeds must be a tensor, got ndarray"),
        (dict(text_masks=[[True] * 4] * 2), TypeError, "text_masks must be a tensor, got list"),
        (dict(device="meta"), ValueError, "device 'meta' cannot be used here: U-Net 1 is on cpu"),
        (dict(device="meta", seed=1), ValueError, "device 'meta' cannot be used here: U-Net 1 is on cpu"),
        (dict(text_embeds=torch.zeros(0, 4, 512), text_masks=None), ValueError, "at least one caption, got none"),
        (dict(lowres_sample_noise_level=-0.1), ValueError, "lowres_sample_noise_level must lie in"),
        (dict(seed=1, generator=torch.Generator()), ValueError, "either seed or generator"),
        (dict(start_image=torch.rand(2, 4, 8, 8)), ValueError, "start_image must have shape"),
        (dict(start_image=torch.zeros(2, 3, 8, 8).byte()), TypeError, "start_image must be floating point"),
        (dict(start_image=torch.rand(3, 3, 8, 8)), ValueError, "one entry for each of the 3 images, got 2"),
        (dict(start_image=torch.rand(2, 3, 8, 8), stop_at_unet_number=1), ValueError, "needs a super-resolution U-Net"),
        (dict(text_embeds=None, text_masks=None), ValueError, "texts or text_embeds must be given"),
        (dict(device="nowhere"), ValueError, "device 'nowhere' cannot be used here"),
    ],
)
def test_sampling_arguments_that_cannot_be(imagen, words, change, error, message):
    with pytest.raises(error, match=message):
        imagen.sample(**{**words, "progress": False, **change})


@pytest.mark.parametrize("share", [95, -0.1, math.nan, "0.9"])
def test_a_percentile_that_was_set_later_is_checked(imagen, words, monkeypatch, share):
    monkeypatch.setattr(imagen, "dynamic_thresholding_percentile", share)
    with pytest.raises((TypeError, ValueError), match=f"dynamic_thresholding_percentile must .*{share}"):
        imagen.sample(**words, progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(imagen, words):
    with pytest.raises(ValueError, match="device 'cuda' cannot be used here"):
        imagen.sample(**words, device="cuda")


@pytest.mark.gpu
def test_sampling_on_another_device_brings_the_model_back(words):
    imagen = make_imagen()
    before = snapshot(imagen)[1:]
    for offload in (False, True):
        images = imagen.sample(**words, progress=False, device="cuda", seed=0, offload_idle_unets=offload)
        assert images.is_cuda
    assert snapshot(imagen)[1:] == before
    assert all(p.device.type == "cpu" for p in imagen.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_count(imagen, words, dtype):
    def run():
        torch.manual_seed(0)
        loss = imagen(torch.full((2, 3, 16, 16), 0.3, dtype=torch.float32), **words, unet_number=2)
        return loss, imagen.sample(**words, progress=False, seed=0, steps=2, sampler="ddim")

    expected = run()
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_are_assigned_on_meta_stay(imagen, words, whole):
    with torch.device("meta"):
        other = make_imagen()
    values = imagen.state_dict()
    with pytest.raises(ValueError, match="device 'cpu' cannot be used here: U-Net 1 is on meta"):
        other.sample(**words, device="cpu")
    if whole:
        other.load_state_dict(values, assign=True)
    else:
        for own, unet in zip(other.unets, imagen.unets, strict=True):
            own.load_state_dict(unet.state_dict(), assign=True)
    arguments = dict(**words, progress=False, seed=0, steps=2, sampler="ddim")
    assert torch.equal(other.sample(**arguments), imagen.sample(**arguments))
    for name, value in other.state_dict().items():
        assert torch.equal(value, values[name])
    losses = []
    for one in (imagen, other):
        torch.manual_seed(0)
        losses.append(one(torch.full((2, 3, 16, 16), 0.3), **words, unet_number=2))
    assert torch.equal(*losses)


@pytest.mark.parametrize("way", ["auto", "reference"])
def test_derivatives_in_forward_mode(words, way):
    imagen, images = make_imagen().accelerate(way), torch.full((2, 3, 16, 16), 0.3)

    def loss(images):
        torch.manual_seed(3)
        return imagen(images, **words, unet_number=2)

    along = torch.linspace(-1, 1, images.numel()).view_as(images)
    _, slope = torch.func.jvp(loss, (images,), (along,))
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(slope, (gradient * along).sum(), rtol=1e-3, atol=1e-5)


class OfOriginal(Imagen):
    """With methods as they are in minimagen 0.0.9."""

    def _p_losses(
        self,
        unet,
        x_start,
        times,
        *,
        noise_scheduler,
        lowres_cond_img=None,
        lowres_aug_times=None,
        text_embeds=None,
        text_mask=None,
        noise=None,
    ):
        given = {"lowres_cond_img": lowres_cond_img, "lowres_aug_times": lowres_aug_times}
        text = {"text_embeds": text_embeds, "text_mask": text_mask}
        return 2 * super()._p_losses(
            unet, x_start, times, noise_scheduler=noise_scheduler, noise=noise, **given, **text
        )


class UnetOfOriginal(SuperTest):
    def forward(
        self,
        x,
        time,
        *,
        lowres_cond_img=None,
        lowres_noise_times=None,
        text_embeds=None,
        text_mask=None,
        cond_drop_prob=0.0,
    ):
        lowres = {"lowres_cond_img": lowres_cond_img, "lowres_noise_times": lowres_noise_times}
        text = {"text_embeds": text_embeds, "text_mask": text_mask, "cond_drop_prob": cond_drop_prob}
        return super().forward(x, time, **lowres, **text)


def test_losses_that_were_written_for_the_original(words):
    losses, images = [], torch.full((2, 3, 16, 16), 0.3)
    imagen = make_imagen()
    for kind, unet_kind in ((Imagen, SuperTest), (OfOriginal, SuperTest), (Imagen, UnetOfOriginal)):
        imagen.__class__, imagen.unets[1].__class__ = kind, unet_kind
        torch.manual_seed(0)
        losses.append(imagen(images, **words, unet_number=2))
    # The same random numbers, drawn in the same order.
    torch.testing.assert_close(losses[1:], [2 * losses[0], losses[0]])
    imagen.__class__ = OfOriginal
    with pytest.raises(TypeError, match="OfOriginal was overridden and does not take keep_text and lowres_noise"):
        imagen(images, **words, unet_number=2, seeds=[1, 2])


def test_what_a_loss_of_ones_own_gives_is_handed_on(words):
    imagen, images = make_imagen(), torch.full((2, 3, 16, 16), 0.3)
    imagen.loss_fn = lambda pred, noise: (pred - noise).square().mean(dim=(1, 2, 3))
    losses = imagen(images, **words, unet_number=1)
    assert losses.shape == (2,)
    imagen.loss_fn = lambda pred, noise: {"loss": (pred - noise).square().mean()}
    assert imagen(images, **words, unet_number=1)["loss"].ndim == 0


def test_methods_that_only_the_original_calls_are_named(words):
    class Own(Imagen):
        def _p_mean_variance(self, *args, **kwargs):
            raise AssertionError

    with pytest.warns(UserWarning, match="^_p_mean_variance of this Own is not called") as said:
        Own(BaseTest(), text_encoder_name="t5_small", image_sizes=8)
    imagen = make_imagen(1)
    imagen._p_sample = imagen._p_sample_loop = None
    with pytest.warns(UserWarning, match="^_p_sample and _p_sample_loop of this Imagen is not called") as also:
        imagen.sample(**words, progress=False, steps=1, sampler="ddim")
    assert {Path(each.filename).name for each in (*said, *also)} == {"test_imagen.py"}


def test_guidance_needs_training_without_text(words):
    imagen = make_imagen(cond_drop_prob=0.0)
    with pytest.raises(ValueError, match="cond_drop_prob=0"):
        imagen.sample(**words, cond_scale=2.0)
    assert imagen.sample(**words, progress=False).isfinite().all()


def test_pil_images_round_to_the_nearest():
    images = torch.tensor([0.0, 0.5, 1.0, 254.6 / 255]).reshape(1, 1, 2, 2)
    (image,) = to_pil_images(images)
    assert isinstance(image, PIL.Image.Image) and list(image.tobytes()) == [0, 128, 255, 255]
    with pytest.raises(ValueError, match="1 to 4 channels"):
        to_pil_images(torch.zeros(1, 5, 2, 2))


def test_a_u_net_that_was_moved_in_inference_mode_can_be_trained():
    unet = BaseTest()
    with torch.inference_mode():
        Imagen._move(unet, torch.device("meta"))
    assert all(value.is_meta and not value.is_inference() for value in (*unet.parameters(), *unet.buffers()))


def test_schedules_that_were_moved_in_inference_mode_can_be_trained_with():
    imagen = make_imagen(stages=2)
    with torch.inference_mode():
        imagen._move_schedules(torch.device("meta"))
    schedules = [*imagen.noise_schedulers.buffers(), *imagen.lowres_noise_schedule.buffers(), imagen._temp]
    assert len(schedules) > 20 and all(value.is_meta and not value.is_inference() for value in schedules)
