"""Sample grids: the pictures that the weights make, and a training that does not notice."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from rank_processes import run_ranks
from training_runs import identical, make_imagen

from minimagen_fast.ema import EMA
from minimagen_fast.Imagen import Imagen
from minimagen_fast.parallel import shard
from minimagen_fast.pictures import captioned_grid
from minimagen_fast.ranks import Ranks, open_ranks
from minimagen_fast.sample_grids import sample_grid
from minimagen_fast.t5 import register_text_encoder
from minimagen_fast.Unet import BaseTest, SuperTest

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a dog on a lawn"]
FEW = {"sampler": "ddim", "steps": 2}


def words(number=2):
    return {
        "text_embeds": torch.randn(number, 3, 512, generator=torch.Generator().manual_seed(1)),
        "text_masks": torch.ones(number, 3, dtype=torch.bool),
    }


def three_stages():
    torch.manual_seed(0)
    smallest = {"dim_mults": (1,), "num_resnet_blocks": 0}
    unets = [BaseTest(**smallest), SuperTest(lowres_cond=True, **smallest), SuperTest(lowres_cond=True, **smallest)]
    return Imagen(unets, text_encoder_name="t5_small", image_sizes=(8, 16, 32), timesteps=[20, 25, 30])


def expected(imagen, number, **options):
    images = imagen.sample(
        seed=5, progress=False, return_pil_images=True, stop_at_unet_number=number, **words(), **FEW, **options
    )
    return captioned_grid(images, PROMPTS)


def same_picture(path, picture):
    with Image.open(path) as image:
        return image.format == "PNG" and np.array_equal(np.asarray(image), np.asarray(picture))


@pytest.mark.parametrize("number", [1, 2])
def test_the_cascade_runs_up_to_the_unet_that_is_trained(tmp_path, number):
    imagen = make_imagen(2)
    path = tmp_path / "samples" / "step_1.png"
    assert sample_grid(imagen, PROMPTS, path, unet_number=number, seed=5, cond_scale=2.0, **words(), **FEW)
    assert same_picture(path, expected(imagen, number, cond_scale=2.0))
    assert not same_picture(path, expected(imagen, number, cond_scale=1.0))
    assert [file.name for file in path.parent.iterdir()] == ["step_1.png"], "nothing unfinished is left"


def test_captions_are_encoded_where_no_encodings_are_given(tmp_path):
    def encode(captions, max_length, device):
        torch.rand(1), np.random.rand(), random.random()  # loading a model may draw
        embeds = torch.stack([torch.full((1, 512), float(len(caption))) for caption in captions])
        return embeds.to(device), torch.ones(len(captions), 1, dtype=torch.bool, device=device)

    register_text_encoder("sample-grid-test", encode, 512)
    imagen = make_imagen(text_encoder_name="sample-grid-test")
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    sample_grid(imagen, PROMPTS, tmp_path / "a.png", unet_number=1, **FEW)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert np.array_equal(np.random.get_state()[1], before[1])
    lengths = torch.tensor([5.0, 15.0])[:, None, None].expand(2, 1, 512)
    masks = torch.ones(2, 1, dtype=torch.bool)
    sample_grid(imagen, PROMPTS, tmp_path / "b.png", unet_number=1, text_embeds=lengths, text_masks=masks, **FEW)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def refuse_to_run(unet):
    def refuse(*_, **__):
        raise AssertionError("this U-Net was not to run")

    unet.forward = unet.denoise = refuse


def test_a_super_resolution_unet_that_is_trained_alone_starts_from_images(tmp_path):
    imagen = make_imagen(2)
    start = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    wanted = expected(imagen, 2, start_image=start)
    refuse_to_run(imagen.unets[0])
    sample_grid(imagen, PROMPTS, tmp_path / "a.png", unet_number=2, seed=5, start_images=start, **words(), **FEW)
    assert same_picture(tmp_path / "a.png", wanted)


def test_the_third_unet_starts_from_images_of_the_size_of_the_second(tmp_path):
    imagen = three_stages()
    start = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    # By itself: a cascade of the second and the third alone, whose second does not run.
    smallest = {"dim_mults": (1,), "num_resnet_blocks": 0}
    alone = Imagen(
        [BaseTest(**smallest), imagen.unets[2]], text_encoder_name="t5_small", image_sizes=(16, 32), timesteps=[25, 30]
    )
    wanted = expected(alone, 2, start_image=start)
    for unet in imagen.unets[:2]:
        refuse_to_run(unet)
    sample_grid(imagen, PROMPTS, tmp_path / "a.png", unet_number=3, seed=5, start_images=start, **words(), **FEW)
    assert same_picture(tmp_path / "a.png", wanted)
    assert len(imagen.unets) == 3 and imagen.image_sizes == (8, 16, 32) and len(imagen.noise_schedulers) == 3


@pytest.mark.parametrize("start_images", [False, True])
def test_the_training_does_not_notice(tmp_path, start_images):
    imagen = make_imagen(2)
    imagen.train()
    imagen.unets[0].mid_block1.eval()
    modes = [module.training for module in imagen.modules()]
    imagen(torch.rand(2, 3, 16, 16), **words(), unet_number=1).backward()
    gradients = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in imagen.parameters()]
    weights = {name: value.clone() for name, value in imagen.state_dict().items()}
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    drawn = torch.rand(2), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)

    start = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)) if start_images else None
    sample_grid(imagen, PROMPTS, tmp_path / "a.png", unet_number=2, start_images=start, **words(), **FEW)

    assert identical((torch.rand(2), np.random.rand(), random.random()), drawn)
    assert [module.training for module in imagen.modules()] == modes
    after = [None if p.grad is None else (id(p.grad), p.grad) for p in imagen.parameters()]
    assert identical(after, gradients) and any(gradients)
    assert identical(dict(imagen.state_dict()), weights)
    assert not any("_kept" in vars(unet) for unet in imagen.unets), "memory that training needs"


def test_averaged_weights_are_sampled_while_they_are_in_place(tmp_path):
    imagen = make_imagen()
    average = EMA(imagen.unets[0], 0.9)
    first = expected(imagen, 1)
    with torch.no_grad():
        for parameter in imagen.parameters():
            parameter.mul_(1.5)
    with average.swapped():
        sample_grid(imagen, PROMPTS, tmp_path / "a.png", unet_number=1, seed=5, **words(), **FEW)
    sample_grid(imagen, PROMPTS, tmp_path / "b.png", unet_number=1, seed=5, **words(), **FEW)
    assert same_picture(tmp_path / "a.png", first) and not same_picture(tmp_path / "b.png", first)


@pytest.mark.parametrize("start", [False, True])
def test_each_u_net_takes_as_many_steps_as_it_has(tmp_path, monkeypatch, start):
    imagen, taken = three_stages(), []

    def sampled(self, **options):
        taken.append(options["steps"])
        return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr(Imagen, "sample", sampled)
    given = {"start_images": torch.rand(1, 3, 16, 16)} if start else {}
    sample_grid(imagen, ["a"], tmp_path / "a.png", unet_number=3, steps=24, **given)
    assert taken == [[24, 24] if start else [20, 24, 24]]


@pytest.mark.parametrize("where", ["sampling", "writing"])
def test_an_error_leaves_the_older_picture_and_the_training(tmp_path, monkeypatch, where):
    path = tmp_path / "a.png"
    path.write_bytes(b"older")
    imagen = make_imagen().train()
    state = torch.get_rng_state()
    if where == "sampling":
        refuse_to_run(imagen.unets[0])
    else:

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("minimagen_fast.files.os.fsync", fail)
    with pytest.raises((AssertionError, OSError), match="not to run|No space left"):
        sample_grid(imagen, PROMPTS, path, unet_number=1, **words(), **FEW)
    assert path.read_bytes() == b"older" and [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert imagen.unets[0].training and torch.equal(torch.get_rng_state(), state)


def test_other_ranks_leave_replicated_unets_to_the_first(tmp_path):
    imagen = make_imagen()
    refuse_to_run(imagen.unets[0])
    path = tmp_path / "a.png"
    assert sample_grid(imagen, PROMPTS, path, unet_number=1, ranks=Ranks(1, 2), **words(), **FEW) is False
    assert list(tmp_path.iterdir()) == []


def on_two_ranks(folder):
    with open_ranks(CPU) as ranks:
        imagen = make_imagen(2)
        shard(imagen.unets[1], ranks, CPU, "fsdp")
        written = []
        for number in range(2):  # the second time the weights have been gathered before
            path = folder / f"{number}.png"
            options = {"unet_number": 2, "seed": 5, "cond_scale": 2.0, **words(), **FEW}
            written.append(sample_grid(imagen, PROMPTS, path, ranks=ranks, together=True, **options))
        loss = imagen(torch.rand(2, 3, 16, 16), **words(), unet_number=2)
        loss.backward()

        half = make_imagen()
        shard(half.unets[0], ranks, CPU, "fsdp", torch.bfloat16)
        options = {"unet_number": 1, "seed": 5, **words(), **FEW}
        with torch.autocast("cpu", torch.bfloat16):  # as it is trained
            written.append(sample_grid(half, PROMPTS, folder / "half.png", ranks=ranks, together=True, **options))
        return written, loss.isfinite().item()


def test_ranks_sample_a_sharded_unet_together(tmp_path):
    assert run_ranks(on_two_ranks, 2, tmp_path) == [([True] * 3, True), ([False] * 3, True)]
    imagen = make_imagen(2)
    # A sharded U-Net is called as a whole, and rounds accordingly.
    imagen.accelerate(condition_cache="off")
    pixels = [np.asarray(Image.open(tmp_path / f"{number}.png")).astype(int) for number in range(2)]
    assert np.array_equal(*pixels)
    assert np.abs(pixels[0] - np.asarray(expected(imagen, 2, cond_scale=2.0)).astype(int)).max() <= 1
    half = np.asarray(Image.open(tmp_path / "half.png")).astype(int)
    difference = np.abs(half - np.asarray(expected(make_imagen(), 1)).astype(int))
    assert 0 < difference.max() and difference.mean() < 2


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "prompts is empty"),
        (PROMPTS, {"start_images": torch.rand(2, 3, 8, 8)}, "start_images needs a super-resolution"),
        (
            PROMPTS,
            {"unet_number": 2, "start_images": torch.rand(1, 3, 8, 8)},
            "start_images must be as many as prompts",
        ),
    ],
)
def test_wrong_arguments_are_named(tmp_path, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        sample_grid(make_imagen(2), prompts, tmp_path / "a.png", **{"unet_number": 1, **words(), **FEW, **options})
