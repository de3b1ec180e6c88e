"""Helpers beyond the golden vectors."""

import numpy as np
import pytest
import torch

from minimagen_fast import helpers, resize
from minimagen_fast.kernels.threshold import quantile
from minimagen_fast.resize import noise_for, resize_matrix


def test_cast_tuple():
    assert helpers.cast_tuple([1, 2]) == (1, 2)
    assert helpers.cast_tuple(3, 2) == (3, 3)
    assert helpers.cast_tuple(3) == (3,)
    with pytest.raises(ValueError, match="expected 3 values"):
        helpers.cast_tuple((1, 2), 3)


def test_default_maybe_and_exists():
    assert helpers.default(0, 1) == 0
    assert helpers.default(None, lambda: 2) == 2
    assert helpers.maybe(abs)(None) is None
    assert helpers.maybe(abs)(-3) == 3
    assert not helpers.exists(None) and helpers.exists(0)


def test_eval_decorator_restores_every_submodule_after_an_error():
    class Model(torch.nn.Sequential):
        @helpers.eval_decorator
        def fail(self):
            assert not self.training and not self[0].training
            raise RuntimeError("stop")

    model = Model(torch.nn.Dropout(), torch.nn.Dropout())
    model[1].eval()
    with pytest.raises(RuntimeError, match="stop"):
        model.fail()
    assert model.training and model[0].training and not model[1].training


def test_prob_mask_like_draws_only_when_it_must():
    state = torch.get_rng_state()
    assert helpers.prob_mask_like((4,), 1, torch.device("cpu")).all()
    assert not helpers.prob_mask_like((4,), 0, torch.device("cpu")).any()
    assert torch.equal(torch.get_rng_state(), state)
    mask = helpers.prob_mask_like((10_000,), 0.3, torch.device("cpu"))
    assert mask.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_right_pad_dims_to():
    assert helpers.right_pad_dims_to(torch.zeros(2, 3, 4, 4), torch.zeros(2)).shape == (2, 1, 1, 1)
    assert helpers.right_pad_dims_to(torch.zeros(2), torch.zeros(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("shape", [(1, 3, 24, 16), (1, 3, 16, 24), (2, 1, 9, 31)])
def test_each_axis_is_resized_on_its_own(shape):
    # The original scales both axes by the width's factor.
    image = torch.rand(shape)
    out = helpers.resize_image_to(image, 8)
    assert out.shape == (*shape[:2], 8, 8)
    constant = helpers.resize_image_to(torch.full(shape, 0.3), 8)
    torch.testing.assert_close(constant, torch.full_like(constant, 0.3))


def test_a_ramp_stays_a_ramp_inside():
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    out = helpers.resize_image_to(ramp, 16)[0, 0, 8]
    torch.testing.assert_close(out[3:-3].diff(), out.diff()[4:5].expand(9), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad_mode", ["constant", "edge", "reflect", "symmetric"])
@pytest.mark.parametrize("old, new", [(1, 8), (2, 16), (3, 2), (64, 4)])
def test_tiny_images_and_every_padding(old, new, pad_mode):
    out = helpers.resize_image_to(torch.full((1, 3, old, old), 0.5), new, pad_mode=pad_mode)
    assert out.shape[-2:] == (new, new)
    if pad_mode == "constant":  # darker towards the border, where zeros are mixed in
        assert out[0, 0, 0, 0] < 0.5 and torch.isfinite(out).all()
    else:
        torch.testing.assert_close(out, torch.full_like(out, 0.5))


def test_padding_modes_look_beyond_the_border_as_they_say():
    image = torch.tensor([1.0, 2.0, 4.0]).expand(1, 1, 6, 3)  # the height stays as it is
    expected = {"constant": [0, 1, 2], "edge": [1, 1, 2], "reflect": [2, 1, 2], "symmetric": [1, 1, 2]}
    # At scale 2 the first output pixel looks at source pixels -2, -1, 0, 1 around -0.25.
    weights = torch.tensor([-0.0234375, 0.2265625, 0.8671875, -0.0703125])
    beyond = {"constant": 0.0, "edge": 1.0, "reflect": 4.0, "symmetric": 2.0}
    for mode, near in expected.items():
        first = helpers.resize_image_to(image, 6, pad_mode=mode)[0, 0, 0, 0].item()
        values = torch.tensor([beyond[mode], *[float(v) for v in near]])
        assert first == pytest.approx((weights * values).sum().item(), abs=1e-5), mode


def test_resize_is_exact_under_autocast_and_keeps_the_dtype():
    image = torch.rand(1, 3, 16, 16)
    expected = helpers.resize_image_to(image, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(helpers.resize_image_to(image, 8), expected)
    assert helpers.resize_image_to(image.bfloat16(), 8).dtype == torch.bfloat16


def test_resize_matrices_are_made_once_and_can_be_trained_through():
    with torch.inference_mode():
        first = resize_matrix(10, 6, "reflect", torch.device("cpu"))
    assert resize_matrix(10, 6, "reflect", torch.device("cpu")) is first
    image = torch.rand(1, 1, 10, 10, requires_grad=True)
    helpers.resize_image_to(image, 6).sum().backward()
    assert image.grad.sum().item() == pytest.approx(36, rel=1e-4)


def test_the_resize_matrices_used_last_are_kept_and_no_more():
    step = resize_matrix(8, 64, "reflect", torch.device("cpu"))
    for old in range(40_000, 40_020):
        resize_matrix(old, 64, "reflect", torch.device("cpu"))
        assert resize_matrix(8, 64, "reflect", torch.device("cpu")) is step
    large = [key for key in resize._kept if key[0] >= 40_000]
    assert 1 < len(large) < 20 and large[-1][0] == 40_019
    assert sum(matrix.nbytes for matrix in resize._kept.values()) <= resize.KEPT_BYTES
    for old in range(1, 300):
        resize_matrix(old, 1, "reflect", torch.device("cpu"))
    assert len(resize._kept) == resize.KEPT_NUMBER


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4), TypeError, "must be floating point"),
        ((torch.zeros(1, 3, 8, 8).numpy(), 4), TypeError, "image must be a tensor, got ndarray"),
        ((torch.zeros(8, 8), 4), ValueError, r"must have shape \(b, c, h, w\) or \(c, h, w\)"),
        ((torch.zeros(1, 3, 8, 0), 4), ValueError, "with pixels in it"),
        ((torch.zeros(1, 3, 8, 8), 0), ValueError, "target_image_size"),
        ((torch.zeros(1, 3, 8, 8), 4, None, "mirror"), ValueError, "pad_mode must be one of"),
    ],
)
def test_resize_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        helpers.resize_image_to(*arguments)


def test_a_single_image_is_resized_like_one_of_a_batch():
    image = torch.rand(3, 6, 10)
    assert torch.equal(helpers.resize_image_to(image, 8), helpers.resize_image_to(image[None], 8)[0])


def test_noise_for_follows_a_generator():
    image = torch.zeros(2, 3, 8, 8)
    for resized in (False, True):
        first, second = (noise_for(image, resized, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second) and first.is_contiguous()


def test_quantile_of_more_values_than_torch_takes():
    x = torch.rand(2, 2**24 + 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x[:1], 0.9, dim=-1)
    # Of the quantile torch takes what float32 has of it; it has the rank in float32, too, which here is not exact.
    rank = float(np.float32(0.9)) * (x.shape[-1] - 1)
    # Not a sort of all: these two are where it would put them.
    ordered = torch.from_numpy(np.partition(x.numpy(), (int(rank), int(rank) + 1)))
    expected = torch.lerp(ordered[:, int(rank)], ordered[:, int(rank) + 1], rank % 1)
    assert torch.equal(quantile(x, 0.9), expected)
    assert torch.equal(quantile(x, 1.0), x.amax(dim=-1))
    x[1, 5] = torch.nan
    assert quantile(x, 0.9).isnan().tolist() == [False, True]


def test_quantile_takes_torchs_way_where_it_can():
    x = torch.rand(3, 1001)
    assert torch.equal(quantile(x, 0.83), torch.quantile(x, 0.83, dim=-1))
