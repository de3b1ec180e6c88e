"""The diffusion process: noise schedule, forward process q, and its posterior.

Ho et al., "Denoising Diffusion Probabilistic Models" (2020), https://arxiv.org/abs/2006.11239.
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import kernels
from .arguments import whole_number
from .helpers import default, extract, log

MIN_TIMESTEPS = 20
# The linear schedule reaches beta = 1 at 20 steps, where the signal would vanish and its inverse be infinite.
MAX_BETA = 0.999


def _schedule(timesteps: int) -> dict[str, torch.Tensor]:
    """Every per-timestep constant, in float64, shape (timesteps,) each."""
    scale = 1000 / timesteps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64, device="cpu").clamp(max=MAX_BETA)
    alphas = 1.0 - betas
    alphas_cumprod = torch.cumprod(alphas, dim=0)
    alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
    return {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1.0 - alphas_cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1.0 - alphas_cumprod).log(),
        "sqrt_recip_alphas_cumprod": (1.0 / alphas_cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1.0 / alphas_cumprod - 1.0).sqrt(),
        "posterior_variance": posterior_variance,
        # The variance is 0 at t = 0, so its logarithm is cut there (eq. 7 and the paragraph after it).
        "posterior_log_variance_clipped": log(posterior_variance, eps=1e-20),
        "posterior_mean_coef1": betas * alphas_cumprod_prev.sqrt() / (1.0 - alphas_cumprod),
        "posterior_mean_coef2": (1.0 - alphas_cumprod_prev) * alphas.sqrt() / (1.0 - alphas_cumprod),
    }


def _for_each_image(t: torch.Tensor, *images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Images of one shape, and a timestep for each: one stands for all. What does not fit together stays as it is."""
    if t.dtype in (torch.int32, torch.int16):
        t = t.long()
    if t.shape == images[0].shape[:1] and all(x.shape == images[0].shape for x in images):
        return t, *images
    try:
        shape = torch.broadcast_shapes((*t.shape, *(1,) * (images[0].ndim - 1)), *(x.shape for x in images))
    except RuntimeError:
        return t, *images
    # No image gets more axes.
    if t.ndim != 1 or any(x.ndim != len(shape) for x in images):
        return t, *images
    return t.expand(shape[0]), *(x.expand(shape) for x in images)


class GaussianDiffusion(nn.Module):
    """A discrete-time Gaussian diffusion process with a linear noise schedule.

    beta runs from 1e-4 * s to 0.02 * s with s = 1000 / timesteps, at most 0.999. The schedule's buffers are float32
    whatever dtype the module is cast to, follow it to any device, and are no part of the state dict.

    In its methods one timestep, one image or one noise stands for all of a batch.

    Args:
        timesteps: Number of diffusion steps T, at least 20.

    Raises:
        TypeError, ValueError: if ``timesteps`` is no whole number of at least 20.
    """

    def __init__(self, *, timesteps: int):
        super().__init__()
        timesteps = whole_number("timesteps", timesteps)
        if timesteps < MIN_TIMESTEPS:
            raise ValueError(
                f"timesteps must be at least {MIN_TIMESTEPS}, got {timesteps}: with fewer steps the linear schedule"
                " would need beta above 1"
            )
        self.num_timesteps = timesteps
        for name, value in _schedule(timesteps).items():
            self.register_buffer(name, value.float(), persistent=False)

    def _apply(self, fn, recurse=True):
        # Casting a model to bfloat16 must not round its noise schedule, which may be another than it was made with, and
        # a model materialised from the meta device must not keep uninitialised memory as one: the buffers follow the
        # device only.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        if self.betas.dtype != torch.float32 or before["betas"].is_meta:
            for name, value in _schedule(self.num_timesteps).items():
                kept = value if before[name].is_meta else before[name]
                setattr(self, name, kept.to(device=self.betas.device, dtype=torch.float32))
        return self

    def _get_times(self, batch_size: int, noise_level: float, *, device: torch.device) -> torch.Tensor:
        """The timestep at a share ``noise_level`` in [0, 1) of the process, for every image; int64, shape (b,)."""
        return torch.full((batch_size,), int(self.num_timesteps * noise_level), device=device, dtype=torch.long)

    def _sample_random_times(
        self, batch_size: int, *, max_noise_level: float = 1.0, device: torch.device
    ) -> torch.Tensor:
        """Timesteps drawn uniformly from the first ``max_noise_level`` of [0, T), int64, shape (b,)."""
        return torch.randint(0, self._steps_up_to(max_noise_level), (batch_size,), device=device, dtype=torch.long)

    def _steps_up_to(self, max_noise_level: float) -> int:
        """How many timesteps make the first ``max_noise_level`` of all, at least 1."""
        return max(1, round(self.num_timesteps * max_noise_level))

    def _min_snr_weights(self, times: torch.Tensor, gamma: float) -> torch.Tensor:
        """min(SNR, gamma) / SNR at timesteps (b,), float32, shape (b,)."""
        signal = self.get_buffer("alphas_cumprod")[times]
        # Without a division by an SNR that is all but 0.
        return torch.minimum(torch.ones_like(signal), gamma * (1 - signal) / signal)

    def _get_sampling_timesteps(self, batch: int, *, device: torch.device) -> list[torch.Tensor]:
        """T - 1, ..., 1, 0, each repeated for every image: int64, shape (b,)."""
        steps = torch.arange(self.num_timesteps - 1, -1, -1, device=device)
        return list(steps[:, None].expand(-1, batch).contiguous().unbind(0))

    def q_posterior(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and variance of q(x_{t-1} | x_t, x_0), equations 6 and 7 of the DDPM paper.

        mean = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t,
        variance = (1 - abar_{t-1}) / (1 - abar_t) beta_t.

        Args:
            x_start: Un-noised images x_0, shape (b, c, h, w).
            x_t: Noised images, shape (b, c, h, w).
            t: Timestep of each image, int64, shape (b,), values in [0, T).

        Returns:
            The posterior mean (b, c, h, w), its variance (b, 1, 1, 1), and the logarithm of the variance, clipped from
            below at log 1e-20 (b, 1, 1, 1).
        """
        t, x_start, x_t = _for_each_image(t, x_start, x_t)
        mean = kernels.q_posterior_mean(x_start, x_t, t, self.posterior_mean_coef1, self.posterior_mean_coef2)
        variance = extract(self.posterior_variance, t, x_t.shape)
        return mean, variance, extract(self.posterior_log_variance_clipped, t, x_t.shape)

    def q_sample(
        self,
        x_start: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None = None,
        *,
        normalize: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> torch.Tensor:
        """Noise images: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, equation 4 of the DDPM paper.

        Args:
            x_start: Un-noised images x_0, floating point, shape (b, c, h, w).
            t: Timestep of each image, int64, shape (b,), values in [0, T).
            noise: Standard normal noise of the images' shape; drawn if not given.
            normalize: Whether the images come in [0, 1] and are first mapped to [-1, 1].
            memory_format: Of the result, contiguous or channels_last; that of the images if not given.

        Returns:
            Noised images x_t, shape (b, c, h, w).
        """
        noise = default(noise, lambda: torch.randn_like(x_start))
        t, x_start, noise = _for_each_image(t, x_start, noise)
        return kernels.q_sample(
            x_start,
            t,
            noise,
            self.sqrt_alphas_cumprod,
            self.sqrt_one_minus_alphas_cumprod,
            normalize=normalize,
            memory_format=memory_format,
        )

    def predict_start_from_noise(self, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Take the noise out of noised images: x_0 = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) noise.

        Args:
            x_t: Noised images, shape (b, c, h, w).
            t: Timestep of each image, int64, shape (b,), values in [0, T).
            noise: The noise in each image, shape (b, c, h, w).

        Returns:
            Un-noised images x_0, shape (b, c, h, w).
        """
        t, x_t, noise = _for_each_image(t, x_t, noise)
        return kernels.predict_start_from_noise(
            x_t, t, noise, self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod
        )
