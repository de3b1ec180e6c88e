"""The noise schedule at its limits, and in other dtypes and devices."""

import numpy as np
import pytest
import torch

from minimagen_fast.diffusion_model import GaussianDiffusion


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="at least 20, got 19"):
        GaussianDiffusion(timesteps=19)


@pytest.mark.parametrize("timesteps", [100.0, "100", True, (100, 100)])
def test_steps_must_be_an_int(timesteps):
    with pytest.raises(TypeError, match="timesteps must be an int"):
        GaussianDiffusion(timesteps=timesteps)


def test_twenty_steps_are_finite():
    # Uncapped, the last beta is 1 and x_0 can no longer be recovered.
    diffusion = GaussianDiffusion(timesteps=20)
    assert all(torch.isfinite(buffer).all() for buffer in diffusion.buffers())
    torch.manual_seed(0)
    x, noise, t = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.tensor([19])
    x_t = diffusion.q_sample(x, t, noise)
    torch.testing.assert_close(diffusion.predict_start_from_noise(x_t, t, noise), x, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_schedule_stays_float32(dtype):
    expected = dict(GaussianDiffusion(timesteps=100).named_buffers())
    diffusion = GaussianDiffusion(timesteps=100).to(dtype)
    for name, buffer in diffusion.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert torch.equal(torch.nn.Sequential(diffusion).half()[0].betas, expected["betas"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_edited_schedule_stays_what_it_is(dtype):
    class Other(GaussianDiffusion):
        def __init__(self, *, timesteps):
            super().__init__(timesteps=timesteps)
            self.alphas_cumprod.mul_(0.7)

    for diffusion in (Other(timesteps=100), GaussianDiffusion(timesteps=100)):
        diffusion.betas = diffusion.betas**1.1
        expected = {name: buffer.clone() for name, buffer in diffusion.named_buffers()}
        for name, buffer in diffusion.to(dtype).named_buffers():
            assert buffer.dtype == torch.float32 and torch.equal(buffer, expected[name]), name


def test_the_schedule_survives_the_meta_device():
    with torch.device("meta"):
        diffusion = GaussianDiffusion(timesteps=100).to("meta")
    assert diffusion.betas.is_meta
    materialised = diffusion.to_empty(device="cpu")
    assert torch.equal(materialised.betas, GaussianDiffusion(timesteps=100).betas)


def test_the_schedule_is_no_part_of_the_state_dict():
    assert not GaussianDiffusion(timesteps=100).state_dict()


def test_q_sample_draws_noise():
    diffusion = GaussianDiffusion(timesteps=100)
    x, t = torch.zeros(4, 3, 16, 16), torch.full((4,), 99)
    torch.manual_seed(0)
    noised = diffusion.q_sample(x, t)
    torch.manual_seed(0)
    assert torch.equal(noised, diffusion.q_sample(x, t, torch.randn_like(x)))


def test_sampling_timesteps_count_down():
    diffusion = GaussianDiffusion(timesteps=20)
    steps = diffusion._get_sampling_timesteps(3, device=torch.device("cpu"))
    assert [step.tolist() for step in steps] == [[i] * 3 for i in reversed(range(20))]


def test_timesteps_may_be_a_numpy_integer():
    steps = GaussianDiffusion(timesteps=np.int64(25)).num_timesteps
    assert steps == 25 and type(steps) is int


ONE, ALL = torch.rand(1, 3, 4, 4), torch.rand(2, 3, 4, 4)
TIMES = torch.tensor([3, 70])


@pytest.mark.parametrize(
    "first, second, t",
    [(ALL, ALL, TIMES[1:]), (ALL, ONE, TIMES), (ONE, ALL, TIMES), (ONE, ONE, TIMES), (ALL, ALL, TIMES.int())],
    ids=["one time", "one noise", "one image", "one of both", "int32"],
)
def test_one_stands_for_all(first, second, t):
    diffusion = GaussianDiffusion(timesteps=100)
    whole = first.expand(2, 3, 4, 4), second.expand(2, 3, 4, 4), t.long().expand(2)
    for method in (diffusion.q_sample, diffusion.predict_start_from_noise):
        assert torch.equal(method(first, t, second), method(whole[0], whole[2], whole[1]))
    for result, expected in zip(diffusion.q_posterior(first, second, t), diffusion.q_posterior(*whole), strict=True):
        assert torch.equal(result, expected)


def test_what_does_not_fit_together_is_refused_by_name():
    with pytest.raises(ValueError, match="t must hold one timestep for each image"):
        GaussianDiffusion(timesteps=100).q_sample(torch.rand(3, 3, 4, 4), TIMES)
    with pytest.raises(ValueError, match="noise must have the shape of x_start"):
        GaussianDiffusion(timesteps=100).q_sample(ALL, TIMES, torch.rand(2, 3, 5, 4))
