"""From pure noise to images: which timesteps are visited, and how an image gets from one to the next.

``ddpm`` is ancestral sampling, algorithm 2 of Ho et al., "Denoising Diffusion Probabilistic Models" (2020); ``ddim``
that of Song et al., "Denoising Diffusion Implicit Models" (2021); ``dpmpp_2m`` is algorithm 2 of Lu et al.,
"DPM-Solver++" (2022), but looks less far ahead in its step to timestep 0, see :func:`_limited`. On fewer timesteps
than the model was trained with, ``ddpm`` is the DDIM step with eta = 1, which is the ancestral step of the respaced
process (Song et al., section 4.1).
"""

from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch

from .arguments import finite_number, whole_number
from .diffusion_model import GaussianDiffusion
from .kernels import ancestral_step, ddim_step, dpm_solver_pp_2m_step
from .kernels.threshold import quantile
from .plain import methods_of, overridden

SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")
# What a diffusion process computes in a step of ancestral sampling.
_METHODS = methods_of(GaussianDiffusion, "predict_start_from_noise", "q_posterior")
_TIMESTEPS = methods_of(GaussianDiffusion, "_get_sampling_timesteps")


@dataclass(frozen=True)
class Sampler:
    """A way to sample.

    Attributes:
        name: One of :data:`SAMPLERS`.
        steps: Number of steps; all timesteps if not given.
        eta: Share of ancestral sampling's noise that ``ddim`` adds, in [0, 1]; the others take none but 0.

    Raises:
        TypeError, ValueError: if a value is of the wrong type or out of range.
    """

    name: str = "ddpm"
    steps: int | None = None
    eta: float = 0.0

    def __post_init__(self):
        if self.name not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {self.name!r}")
        if self.steps is not None:
            object.__setattr__(self, "steps", whole_number("steps", self.steps, least=1, else_=" or None"))
        object.__setattr__(self, "eta", finite_number("eta", self.eta))
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")
        if self.eta and self.name != "ddim":
            raise ValueError(f"eta is for the sampler 'ddim', got eta={self.eta} with sampler={self.name!r}")

    def timesteps(self, total: int) -> list[int]:
        """The timesteps that are visited, of 0 to ``total`` - 1: evenly spaced, the last and the first among them.

        Raises:
            ValueError: if there are to be more steps than timesteps.
        """
        number = total if self.steps is None else self.steps
        if number > total:
            raise ValueError(
                f"steps is {number}, but the U-Net was made with {total} timesteps: choose no more than these"
            )
        if number == 1:
            return [total - 1]
        # Half up, in whole numbers: floats would round some of the halves down.
        return [(2 * i * (total - 1) + number - 1) // (2 * (number - 1)) for i in range(number - 1, -1, -1)]

    def visited(self, scheduler: GaussianDiffusion) -> list[int]:
        """The timesteps that are visited with a diffusion process: those that it says, if it has a way of its own.

        Raises:
            ValueError: if it says none, or such as there are not.
        """
        if not overridden(scheduler, _TIMESTEPS):
            return self.timesteps(scheduler.num_timesteps)
        device = cast(torch.Tensor, scheduler.betas).device
        visited = [int(step) for step in scheduler._get_sampling_timesteps(1, device=device)]
        total = scheduler.num_timesteps
        if not visited or not all(0 <= step < total for step in visited):
            raise ValueError(
                f"_get_sampling_timesteps of this {type(scheduler).__name__} must give timesteps of 0 to {total - 1},"
                f" at least one; got {visited}"
            )
        return visited

    def is_ancestral(self, scheduler: GaussianDiffusion) -> bool:
        """Whether a step is the one that the diffusion process itself describes."""
        return self.name == "ddpm" and self.steps in (None, scheduler.num_timesteps)

    def check(self, scheduler: GaussianDiffusion) -> None:
        """Whether it can sample with a diffusion process.

        Raises:
            ValueError: if there are to be more steps than timesteps, methods of the process are overridden that only
                ancestral sampling calls, or its timesteps are such as there are not.
        """
        number = len(self.timesteps(scheduler.num_timesteps))
        others = overridden(scheduler, {**_METHODS, **_TIMESTEPS})
        if others and not self.is_ancestral(scheduler):
            raise ValueError(
                f"sampler={self.name!r} with {number} of {scheduler.num_timesteps} steps takes nothing but the noise"
                f" schedule from a diffusion process, and {' and '.join(others)} of this {type(scheduler).__name__}"
                " was overridden: choose sampler='ddpm' with all steps"
            )
        self.visited(scheduler)


def _limited(
    alphas: torch.Tensor, sigmas: torch.Tensor, before: int, now: int, to: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both noise schedules with one timestep more: what the step from ``now`` to ``to`` takes for ``before``.

    A step of DPM-Solver++(2M) follows the line through the last two x_0 to the middle of its way, measured in lambda =
    log(alpha / sigma). On evenly spaced timesteps the way to timestep 0 is several times as long as the one before it:
    in 20 steps of 1000 it would follow the line more than twice as far as it has come, to where x_0 hardly changes any
    more. Where the step before was shorter, the added timestep lies so far back as if it had been as long, and the line
    is followed half as far as it has come. Made of first order, this step is worse in few steps: see
    tests/test_samplers.py.
    """
    ratios = alphas.double() / sigmas.double()
    # Its lambda is that of the timestep before, or 2 lambda(now) - lambda(to).
    ratio = torch.minimum(ratios[before], ratios[now] ** 2 / ratios[to]).reshape(1).to(alphas.dtype)
    return torch.cat((alphas, ratio)), torch.cat((sigmas, torch.ones_like(ratio)))


class Update:
    """From the noise that a model predicts to the next image, for one schedule of timesteps.

    Args:
        sampler: The sampler.
        scheduler: The diffusion process, on the device of the images.
        percentile: Quantile of |x_0| at which dynamic thresholding sets in.
        cond_scale: Guidance weight.

    Attributes:
        times: Timesteps in the order in which they are visited, int64, shape (s,), on the device.
        draws: Whether a step adds fresh noise.
        is_plain: Whether kernels do what the diffusion process's methods say, which they do not if these are others.
    """

    def __init__(self, sampler: Sampler, scheduler: GaussianDiffusion, *, percentile: float, cond_scale: float):
        visited = sampler.visited(scheduler)
        self._scheduler: Any = scheduler
        device = cast(torch.Tensor, scheduler.betas).device
        self.times = torch.tensor(visited, device=device)
        self._following = torch.tensor([*visited[1:], -1], device=device)
        # The timestep of the step before, which the first step has not.
        self._last = torch.tensor([visited[0], *visited[:-1]], device=device)
        self._visited = tuple(visited)
        # On fewer timesteps ddpm is ddim with all noise.
        respaced = "ddim" if sampler.name == "ddpm" else sampler.name
        self._kind = "ancestral" if sampler.is_ancestral(scheduler) else respaced
        eta = 1.0 if sampler.name == "ddpm" else sampler.eta
        self.draws = self._kind == "ancestral" or (self._kind == "ddim" and eta > 0)
        self.is_plain = not overridden(scheduler, _METHODS)
        assert self.is_plain or self._kind == "ancestral", "the sampler was not checked"
        schedules = scheduler.sqrt_alphas_cumprod, scheduler.sqrt_one_minus_alphas_cumprod
        self._schedules = cast("tuple[torch.Tensor, torch.Tensor]", schedules)
        if self.multistep and len(visited) > 2:
            # `load` writes to them, which tensors made in inference mode do not allow outside of it.
            with torch.inference_mode(False):
                self._schedules = _limited(*self._schedules, *visited[-3:])
            self._last[-2] = scheduler.num_timesteps
        settings = {"percentile": percentile}
        # With a scale of 0 or 1 there is one prediction, and nothing to combine it with.
        if cond_scale not in (0, 1):
            settings["cond_scale"] = cond_scale
        if self._kind == "ddim" and self.draws:
            settings["eta"] = eta
        # In memory, so that a captured step can be replayed with others.
        with torch.inference_mode(False):
            self._settings: dict[str, Any] = {
                name: torch.full((1,), value, dtype=torch.float32, device=device) for name, value in settings.items()
            }

    def unguided(self) -> "Update":
        """The same for predictions that are guided already."""
        other = copy(self)
        other._settings = {name: value for name, value in self._settings.items() if name != "cond_scale"}
        return other

    @property
    def signature(self) -> tuple:
        """Equal for two that do the same with the same tensors."""
        tensors = (value.data_ptr() for value in self._scheduler.buffers())
        return self._kind, tuple(self._settings), self._visited, *tensors

    def load(self, other: "Update") -> None:
        """Take over the values of another of the same signature, in place: its settings, and what it has worked out of
        its scheduler's."""
        for own, new in zip(self._tensors, other._tensors, strict=True):
            if own.data_ptr() != new.data_ptr():
                own.copy_(new)

    @property
    def _tensors(self) -> list[torch.Tensor]:
        """What :meth:`load` writes to, in an order that the signature settles."""
        return [*self._schedules, *self._settings.values()]

    @property
    def multistep(self) -> bool:
        """Whether a step needs the x_0 of the step before: there the first one differs from the others."""
        return self._kind == "dpmpp_2m"

    def __call__(
        self,
        x: torch.Tensor,
        step: torch.Tensor,
        pred: torch.Tensor,
        noise: torch.Tensor,
        last_x_start: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next images and, if :attr:`multistep`, the x_0 on which they rest.

        Args:
            x: Images at the timestep of this step, float32, shape (b, c, h, w).
            step: Number of the step, int64, shape (1,), on the device: nothing waits for its value.
            pred: Predicted noise, shape (b, c, h, w); or (2 b, c, h, w), the half with text first.
            noise: Fresh noise; what is in it does not matter unless :attr:`draws`.
            last_x_start: The x_0 of the step before, if :attr:`multistep` and this is not the first step.
        """
        scheduler, settings = self._scheduler, self._settings
        t = self.times.index_select(0, step).expand(len(x))
        if not self.is_plain:
            return self._by_methods(x, t, pred, noise), None
        if self._kind == "ancestral":
            out = ancestral_step(
                x,
                t,
                pred,
                noise,
                scheduler.sqrt_recip_alphas_cumprod,
                scheduler.sqrt_recipm1_alphas_cumprod,
                scheduler.posterior_mean_coef1,
                scheduler.posterior_mean_coef2,
                scheduler.posterior_log_variance_clipped,
                **settings,
            )
            return out, None
        following = self._following.index_select(0, step).expand(len(x))
        if self._kind != "dpmpp_2m":
            return ddim_step(x, t, following, pred, *self._schedules, noise=noise, **settings), None
        t_last = None if last_x_start is None else self._last.index_select(0, step).expand(len(x))
        return dpm_solver_pp_2m_step(
            x, t, following, pred, *self._schedules, last_x_start=last_x_start, t_last=t_last, **settings
        )

    def _by_methods(self, x: torch.Tensor, t: torch.Tensor, pred: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The ancestral step, for a diffusion process that has methods of its own."""
        pred = pred.to(x.dtype)
        if "cond_scale" in self._settings:
            conditional, null = pred.chunk(2)
            pred = null + (conditional - null) * self._settings["cond_scale"]
        x_start = self._scheduler.predict_start_from_noise(x, t=t, noise=pred)
        s = quantile(x_start.flatten(1).abs(), self._settings["percentile"]).clamp(min=1.0)[:, None, None, None]
        mean, _, log_variance = self._scheduler.q_posterior(x_start=x_start.clamp(-s, s) / s, x_t=x, t=t)
        not_last = (t > 0).to(x.dtype)[:, None, None, None]
        return mean + not_last * (0.5 * log_variance).exp() * noise
