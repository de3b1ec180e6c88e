"""Which timesteps are visited, and that every sampler goes where an exact model of the noise leads."""

import itertools
import math

import numpy as np
import pytest
import torch
from fast_path import T, distance, make_imagen, make_words, sample

from minimagen_fast.diffusion_model import GaussianDiffusion
from minimagen_fast.kernels import dpm_solver_pp_2m_step
from minimagen_fast.samplers import SAMPLERS, Sampler, Update

TOTALS = (20, 33, 100)


# Timesteps


@pytest.mark.parametrize("total", TOTALS)
def test_timesteps_for_every_number_of_steps(total):
    for steps in range(2, total + 1):
        visited = Sampler("ddim", steps).timesteps(total)
        assert len(visited) == steps and visited[0] == total - 1 and visited[-1] == 0
        assert all(a > b for a, b in itertools.pairwise(visited)), (total, steps)
        gaps = {a - b for a, b in itertools.pairwise(visited)}
        assert max(gaps) - min(gaps) <= 1, "not evenly spaced"


@pytest.mark.parametrize("total", [20, 1000])
def test_one_step_and_all_steps(total):
    assert Sampler(steps=1).timesteps(total) == [total - 1]
    everything = list(range(total - 1, -1, -1))
    assert Sampler(steps=total).timesteps(total) == Sampler().timesteps(total) == everything


def test_halves_are_rounded_up():
    assert Sampler(steps=3).timesteps(20) == [19, 10, 0]
    assert Sampler(steps=5).timesteps(1000) == [999, 749, 500, 250, 0]


def test_more_steps_than_timesteps():
    with pytest.raises(ValueError, match="steps is 21, but the U-Net was made with 20 timesteps"):
        Sampler(steps=21).timesteps(20)
    with pytest.raises(ValueError, match="steps is 21"):
        sample(make_imagen(), steps=21)


# Arguments


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"sampler": "euler"}, ValueError, "sampler must be one of ddpm, ddim, dpmpp_2m; got 'euler'"),
        ({"sampler": None}, ValueError, "sampler must be one of"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": -3}, ValueError, "steps must be at least 1, got -3"),
        ({"steps": 5.0}, TypeError, "steps must be an int or None, got 5.0"),
        ({"steps": True}, TypeError, "steps must be an int or None, got True"),
        ({"sampler": "ddim", "eta": 1.1}, ValueError, r"eta must lie in \[0, 1\], got 1.1"),
        ({"sampler": "ddim", "eta": -0.1}, ValueError, r"eta must lie in \[0, 1\]"),
        ({"sampler": "ddim", "eta": math.nan}, ValueError, "eta must be finite, got nan"),
        ({"sampler": "ddim", "eta": None}, TypeError, "eta must be a number, got None"),
        ({"sampler": "ddim", "eta": "0.5"}, TypeError, "eta must be a number, got '0.5'"),
        ({"cond_scale": None}, TypeError, "cond_scale must be a number, got None"),
        ({"cond_scale": [1.0, "3"]}, TypeError, "cond_scale must be a number, got '3'"),
        ({"cond_scale": math.inf}, ValueError, "cond_scale must be finite, got inf"),
        ({"cond_scale": -1e39}, ValueError, "cond_scale must be finite as float32, got -1e\\+39"),
        ({"lowres_sample_noise_level": "0.1"}, TypeError, "lowres_sample_noise_level must be a number, got '0.1'"),
        ({"eta": 0.5}, ValueError, "eta is for the sampler 'ddim', got eta=0.5 with sampler='ddpm'"),
        ({"sampler": "dpmpp_2m", "eta": 0.5}, ValueError, "eta is for the sampler 'ddim'"),
        ({"sampler": ["ddpm"] * 3}, ValueError, "sampler must be one value or 2"),
        ({"steps": [5]}, ValueError, "steps must be one value or 2"),
        ({"eta": (0.0, 0.0, 0.0)}, ValueError, "eta must be one value or 2"),
        ({"steps": [5, 21]}, ValueError, "steps is 21"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an int or None, got 1.5"),
        ({"batch_size": True}, TypeError, "batch_size must be an int or None, got True"),
    ],
)
def test_arguments_that_cannot_be(arguments, error, message):
    called = []
    with pytest.raises(error, match=message):
        sample(make_imagen(stages=2), callback=lambda *_: called.append(1), **arguments)
    assert not called, "the first U-Net ran before the mistake was seen"


def test_numbers_of_other_libraries():
    expected = sample(make_imagen(), sampler="ddim", steps=4, eta=0.5, cond_scale=3.0, batch_size=1)
    numbers = {"steps": np.int64(4), "eta": np.float32(0.5), "cond_scale": torch.tensor(3), "batch_size": np.uint8(1)}
    assert torch.equal(sample(make_imagen(), sampler="ddim", **numbers), expected)


def test_one_value_for_each_u_net():
    imagen, seen = make_imagen(stages=2), []
    several = {"sampler": ["ddim", "dpmpp_2m"], "steps": (3, None), "eta": (0.5, 0.0)}
    sample(imagen, callback=lambda unet, step, images: seen.append((unet, step)), **several)
    assert seen == [(1, step) for step in range(3)] + [(2, step) for step in range(T)]


def test_a_u_net_that_does_not_run_limits_no_steps():
    imagen = make_imagen(stages=2, timesteps=(T, T + 9))
    with pytest.raises(ValueError, match=f"steps is {T + 9}, but the U-Net was made with {T} timesteps"):
        sample(imagen, steps=T + 9)
    start = torch.rand(2, 3, 8, 8)
    assert torch.equal(sample(imagen, start_image=start, steps=T + 9), sample(imagen, start_image=start))
    imagen = make_imagen(stages=2, timesteps=(T + 9, T))
    assert sample(imagen, stop_at_unet_number=1, sampler="ddim", steps=T + 1).shape == (2, 3, 8, 8)


def test_values_for_each_u_net_go_to_their_own():
    imagen, words = make_imagen(stages=2), make_words()

    def run(**arguments):
        first = []
        last = sample(imagen, words, callback=lambda unet, step, x: first.append(x) if unet == 1 else None, **arguments)
        return first[-1], last

    both = run(sampler=["ddim", "dpmpp_2m"], steps=[3, 4])
    other_base = run(sampler=["dpmpp_2m", "dpmpp_2m"], steps=[3, 4])
    other_super = run(sampler=["ddim", "ddim"], steps=[3, 4])
    assert distance(both[0], other_base[0]) > 1e-3
    assert torch.equal(both[0], other_super[0]) and distance(both[1], other_super[1]) > 1e-3


# Where they go. The model of the noise is known exactly: eps(x, t) = sigma_t (x - alpha_t mean) / variance_t.


class Line:
    """A sampler's way for pixels that are normally distributed around ``mean``."""

    def __init__(self, total, mean, deviation):
        self.scheduler = GaussianDiffusion(timesteps=total)
        self.alpha = self.scheduler.sqrt_alphas_cumprod
        self.sigma = self.scheduler.sqrt_one_minus_alphas_cumprod
        self.mean, self.deviation = mean, deviation

    def noise(self, x, t):
        alpha, sigma = self.alpha[t].double(), self.sigma[t].double()
        variance = alpha**2 * self.deviation**2 + sigma**2
        return (sigma * (x.double() - alpha * self.mean) / variance).to(x.dtype)

    def exact(self, x):
        """Where the probability flow leads from the last timestep: each pixel keeps its place in the distribution."""
        alpha, sigma = self.alpha[-1].double(), self.sigma[-1].double()
        spread = (alpha**2 * self.deviation**2 + sigma**2).sqrt()
        return self.mean + self.deviation * (x.double() - alpha * self.mean) / spread

    def run(self, sampler, x, scale=1.0, seed=0):
        update = Update(sampler, self.scheduler, percentile=1.0, cond_scale=scale)
        generator, last = torch.Generator().manual_seed(seed), None
        for number, t in enumerate(sampler.timesteps(self.scheduler.num_timesteps)):
            assert update.times[number] == t
            pred = self.noise(x, t)
            # With guidance: the prediction without text is another one, and its share is taken out again.
            null = None if scale in (0, 1) else pred + 0.1
            pred = pred if null is None else torch.cat((null + (pred - null) / scale, null))
            noise = torch.empty_like(x).normal_(generator=generator) if update.draws else torch.full_like(x, torch.nan)
            x, start = update(x, torch.tensor([number]), pred, noise, last)
            assert (start is not None) == update.multistep
            last = start
        return x


def pure_noise(batch=2):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(4))


WAYS = [
    *(Sampler(name, steps) for name in SAMPLERS for steps in (None, 1, 2, 7, 20)),
    *(Sampler("ddim", steps, eta) for steps in (None, 7) for eta in (0.5, 1.0)),
]


@pytest.mark.parametrize("sampler", WAYS, ids=lambda sampler: f"{sampler.name}-{sampler.steps}-{sampler.eta}")
@pytest.mark.parametrize("scale", [0, 1, 3])
def test_the_only_image_there_is_is_found(sampler, scale):
    # With one image in the data the noise says exactly which: the last step must arrive there, at t = 0 and no later.
    image = pure_noise(1)[0].clamp(-1, 1) * 0.9
    line = Line(100, image.double(), 0.0)
    # 1 / sqrt(abar) is largest at the last timestep, and so is the rounding.
    assert distance(line.run(sampler, pure_noise(), scale), image.expand(2, -1, -1, -1)) < 2e-3


def even_line(mean, deviation):
    """Of a schedule on which lambda = log(alpha / sigma) falls evenly, from 6 to -4."""
    line = Line(1000, mean, deviation)
    twice = torch.linspace(12, -8, 1000, dtype=torch.float64)
    line.alpha, line.sigma = twice.sigmoid().sqrt(), (-twice).sigmoid().sqrt()
    line.scheduler.sqrt_alphas_cumprod, line.scheduler.sqrt_one_minus_alphas_cumprod = line.alpha, line.sigma
    return line


def errors(name, numbers):
    line = even_line(0.1, 0.25)
    x = pure_noise(1).clamp(-2, 2).double()
    exact = line.exact(x)
    assert exact.abs().max() < 0.99, "thresholding would set in"
    return [distance(line.run(Sampler(name, steps), x), exact) for steps in numbers]


def test_the_solver_of_second_order_converges_faster():
    numbers = (28, 56, 112)
    first, second = errors("ddim", numbers), errors("dpmpp_2m", numbers)
    # How fast the error falls when the steps are doubled.
    orders = [[math.log2(a / b) for a, b in itertools.pairwise(found)] for found in (first, second)]
    assert all(0.9 < order < 1.1 for order in orders[0]), orders
    assert all(1.7 < order < 2.3 for order in orders[1]), orders
    assert second[-1] < 0.1 * first[-1], (first, second)


DEVIATIONS, FEW = (0.05, 0.1, 0.25, 0.45), (5, 10, 20, 50)


def largest_errors(run):
    """Distance from where the exact way ends, in deviations of the data: rows of DEVIATIONS, columns of FEW steps."""
    x, table = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 1, 8, 8), []
    for deviation in DEVIATIONS:
        line = Line(1000, 0.0, deviation)
        table.append([distance(run(line, steps, x), line.exact(x)) / deviation for steps in FEW])
    return torch.tensor(table)


def published(order):
    """Algorithm 2 of DPM-Solver++ as it is published, its step to timestep 0 of this order."""

    def run(line, steps, x):
        before = {}
        for t, to in itertools.pairwise([*Sampler("dpmpp_2m", steps).timesteps(1000), -1]):
            before = {} if to == 0 and order == 1 else before
            times, schedules = (torch.tensor([t]), torch.tensor([to])), (line.alpha, line.sigma)
            x, start = dpm_solver_pp_2m_step(x, *times, line.noise(x, t), *schedules, percentile=1.0, **before)
            before = {"last_x_start": start, "t_last": torch.tensor([t])}
        return x

    return run


def test_few_steps_are_nowhere_worse_than_with_ddim():
    ddim, ours = (
        largest_errors(lambda line, steps, x, name=name: line.run(Sampler(name, steps), x))
        for name in ("ddim", "dpmpp_2m")
    )
    assert (ours < 0.98 * ddim).all(), ours / ddim
    # Where the data are no single point and the steps are not too few, by far.
    assert (ours[1:, 2:] < 0.8 * ddim[1:, 2:]).all() and (ours[2:, 2:] < 0.35 * ddim[2:, 2:]).all(), ours / ddim
    # Why the step to timestep 0 is not the published one, which goes too far, nor of first order, which gains little.
    second, first = largest_errors(published(2)), largest_errors(published(1))
    assert (second > 1.2 * ddim).any() and (second[2:, 2:] > 2 * ours[2:, 2:]).all(), second / ddim
    assert (ours[:, :3] < first[:, :3]).all() and (ours < 0.96 * first).sum() >= 14, ours / first


def test_an_ordinary_step_to_timestep_0_stays_as_published():
    # 999 in steps of 333, or of 27: the one to timestep 0 is as long as the one before.
    line, x = even_line(0.0, 0.3), torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    for steps in (4, 38):
        assert distance(line.run(Sampler("dpmpp_2m", steps), x), published(2)(line, steps, x)) < 1e-9


@pytest.mark.parametrize("sampler", [Sampler(), Sampler("ddpm", 200), Sampler("ddim", None, 0.5)], ids=str)
def test_fresh_noise_makes_the_spread_of_the_data(sampler):
    # The variance of a step is that for one image in the data, the lower limit: hence a little less, with few steps.
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    made = Line(400, 0.1, 0.2).run(sampler, x)
    assert abs(made.mean() - 0.1) < 0.01 and 0.18 < made.std() < 0.205, (made.mean(), made.std())


# In a model


def test_all_steps_of_ddpm_are_the_documented_ones_bit_for_bit():
    imagen = make_imagen()
    for cond_scale in (1.0, 3.0):
        one = sample(imagen, cond_scale=cond_scale)
        assert torch.equal(one, sample(imagen, cond_scale=cond_scale, sampler="ddpm", steps=T))


def test_respaced_ddpm_is_ddim_with_all_noise():
    imagen = make_imagen()
    for steps in (1, 2, 7, T - 1):
        respaced = sample(imagen, sampler="ddpm", steps=steps, cond_scale=3.0)
        assert torch.equal(respaced, sample(imagen, sampler="ddim", steps=steps, eta=1.0, cond_scale=3.0))
    assert distance(respaced, sample(imagen, sampler="ddim", steps=steps, cond_scale=3.0)) > 1e-3


def test_ancestral_sampling_is_ddim_with_all_noise_on_all_steps():
    # The same distribution, but for the clipped variance of the last step: the same images within it.
    imagen = make_imagen()
    assert distance(sample(imagen), sample(imagen, sampler="ddim", eta=1.0)) < 5e-3


@pytest.mark.parametrize("sampler, eta, draws", [("ddim", 0.0, False), ("dpmpp_2m", 0.0, False), ("ddim", 0.1, True)])
def test_what_is_deterministic_draws_nothing_after_the_first_noise(sampler, eta, draws):
    imagen, generator = make_imagen(), torch.Generator().manual_seed(0)
    sample(imagen, seed=None, generator=generator, sampler=sampler, eta=eta, steps=3)
    expected = torch.Generator().manual_seed(0)
    for _ in range(4 if draws else 1):
        torch.randn(2, 3, 8, 8, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())
