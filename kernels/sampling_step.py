"""One step of sampling from the noise that a model predicts: ancestral (DDPM), DDIM, DPM-Solver++(2M).

All of them: guidance null + (conditional - null) scale -> x_0 = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) noise ->
dynamic threshold s = max(1, quantile of |x_0|), x_0 clamped to [-s, s] and divided by s -> the next image, linear in
x_0, x_t and one more: fresh noise, or the x_0 of the step before. They differ in these three weights, which depend on
the timestep. In plain torch that is some 25 launches; the kernels are in :mod:`.sampling_kernels`.
"""

import torch

from . import dispatch, sampling_kernels, threshold
from .images import at, check_images, check_schedule, too_large
from .sampling_kernels import ANCESTRAL, DDIM, DPM_SOLVER


def _reference(kind, x_t, t, t_previous, t_last, pred, null_pred, extra, schedules, percentile, cond_scale, eta):
    # All in the dtype of the images, which the result has, too.
    schedules = [schedule.to(x_t.dtype) for schedule in schedules]
    pred, extra = pred.to(x_t.dtype), None if extra is None else extra.to(x_t.dtype)
    if null_pred is not None:
        null_pred = null_pred.to(x_t.dtype)
        pred = null_pred + (pred - null_pred) * cond_scale
    if kind == ANCESTRAL:
        recip, recipm1, coef1, coef2, log_variance = (at(schedule, t, x_t) for schedule in schedules)
    else:
        alpha, sigma = (at(schedule, t, x_t) for schedule in schedules)
        done = (t_previous < 0).reshape(alpha.shape)
        alpha_to, sigma_to = (at(schedule, t_previous.clamp(min=0), x_t) for schedule in schedules)
        alpha_to, sigma_to = alpha_to.masked_fill(done, 1.0), sigma_to.masked_fill(done, 0.0)
        recip, recipm1 = 1 / alpha, sigma / alpha
    x_start = recip * x_t - recipm1 * pred
    s = threshold.quantile(x_start.abs().flatten(1), percentile).clamp(min=1.0).reshape(recip.shape)
    x_start = x_start.clamp(-s, s) / s
    if kind == ANCESTRAL:
        not_last = (t > 0).to(x_t.dtype).reshape(recip.shape)
        return coef1 * x_start + coef2 * x_t + not_last * (0.5 * log_variance).exp() * extra, None
    if kind == DDIM:
        # alpha_to^2 - alpha^2 = sigma^2 - sigma_to^2: rounding spoils the one whose squares are near 1.
        by_sigma, by_alpha = (sigma - sigma_to) * (sigma + sigma_to), (alpha_to - alpha) * (alpha_to + alpha)
        gap = torch.where(sigma < alpha, by_sigma, by_alpha).clamp(min=0)
        added = eta * (sigma_to / sigma) * gap.sqrt() / alpha_to
        weight_x = (sigma_to * sigma_to - added * added).clamp(min=0).sqrt() / sigma
        out = (alpha_to - weight_x * alpha) * x_start + weight_x * x_t
        return (out if extra is None else out + added * extra), None
    weight_x = sigma_to / sigma
    weight = alpha_to - weight_x * alpha
    if extra is None:
        return weight * x_start + weight_x * x_t, x_start
    alpha_last, sigma_last = (at(schedule, t_last, x_t) for schedule in schedules)
    now, last, to = (alpha / sigma).log(), (alpha_last / sigma_last).log(), (alpha_to / sigma_to).log()
    ahead = torch.where(done, 0.0, 0.5 * (to - now) / (now - last))
    return weight * (1 + ahead) * x_start + weight_x * x_t - weight * ahead * extra, x_start


def _run(operation, kind, x_t, pred, null_pred, times, schedules, extras, percentile, cond_scale, eta, implementation):
    """Check what is common to the three steps, choose an implementation and call it.

    ``times`` starts with t, then come t_previous and t_last where they are given; ``extras`` holds one tensor or None.
    """
    if x_t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x_t must be float32 (or float64), got {x_t.dtype}; sampling in less spoils the images")
    # Of no images the predictions of both kinds are none, too.
    if null_pred is None and x_t.ndim and pred.ndim == x_t.ndim and pred.shape[0] == 2 * x_t.shape[0]:
        pred, null_pred = pred.chunk(2)
    settings = {"percentile": percentile, "cond_scale": cond_scale, "eta": eta}
    stored = {key: value for key, value in settings.items() if isinstance(value, torch.Tensor)}
    for key, value in stored.items():
        _check_stored(key, value, x_t)
    weighted = "cond_scale" in stored
    if null_pred is None and (weighted or cond_scale != 1):
        raise ValueError(
            f"cond_scale is {'a tensor' if weighted else cond_scale}, which needs a prediction without text: give"
            " null_pred, or pred with the conditional predictions of all images and then the others, shape (2 b, ...)"
        )
    (name, extra), *_ = extras.items()
    given = {"x_t": x_t, "pred": pred, "null_pred": null_pred, name: extra}
    given = {key: x for key, x in given.items() if x is not None}
    check_images(**given)
    check_schedule(x_t, times, schedules)
    if not x_t.shape[1:].numel():
        raise ValueError(f"x_t must have values in each image, its shape is {tuple(x_t.shape)}")
    if "percentile" not in stored and not 0 <= percentile <= 1:
        raise ValueError(f"percentile must lie in [0, 1], got {percentile}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*given.values(), *stored.values())):
        raise ValueError(f"{operation} is not differentiable: call it under torch.no_grad(), or detach its inputs")
    reasons = dispatch.triton_reasons(*given.values(), *schedules.values()) + too_large(x_t)
    chosen = dispatch.select(operation, {"triton": reasons, "reference": []}, x_t.device, implementation)
    t, t_previous, t_last = (*times.values(), *(times["t"],) * (3 - len(times)))
    schedule = list(schedules.values())
    common = kind, x_t, t, t_previous, t_last, pred, null_pred, extra, schedule
    if chosen == "reference":
        return _reference(*common, *settings.values())
    numbers = (0.0 if key in stored else float(value) for key, value in settings.items())
    return sampling_kernels.step(*common, *numbers, *(stored.get(key) for key in settings))


def _check_stored(name: str, value: torch.Tensor, x_t: torch.Tensor) -> None:
    if value.dtype not in (torch.float32, x_t.dtype):
        raise TypeError(f"{name} must be a number or float32, got {value.dtype}; convert it with .float()")
    if value.shape != (1,):
        raise ValueError(
            f"{name} must be a number, or a tensor of shape (1,), one value for all images; got {tuple(value.shape)}"
        )
    if value.device != x_t.device:
        raise ValueError(
            f"{name} must be on {x_t.device} like x_t, it is on {value.device}; move it there, or give a number"
        )


def ancestral_step(
    x_t: torch.Tensor,
    t: torch.Tensor,
    pred: torch.Tensor,
    noise: torch.Tensor,
    sqrt_recip_alphas_cumprod: torch.Tensor,
    sqrt_recipm1_alphas_cumprod: torch.Tensor,
    posterior_mean_coef1: torch.Tensor,
    posterior_mean_coef2: torch.Tensor,
    posterior_log_variance_clipped: torch.Tensor,
    *,
    percentile: float | torch.Tensor,
    null_pred: torch.Tensor | None = None,
    cond_scale: float | torch.Tensor = 1.0,
    implementation: str | None = None,
) -> torch.Tensor:
    """From x_t to x_{t-1}: algorithm 2 of the DDPM paper, with guidance and dynamic thresholding.

    The posterior mean of the thresholded x_0 and x_t, plus exp(log variance / 2) times the noise; none at t = 0.

    Not differentiable. Waits for nothing on the host, so that it can be captured in a CUDA graph.

    Args:
        x_t: Noised images, float32 (float64 for the reference), shape (b, ...).
        t: Timestep of each image, int64, shape (b,), values in [0, T).
        pred: The predicted noise, floating point, shape of ``x_t``; or (2 b, ...), for guidance: the conditional
            predictions of all images first, then those without text.
        noise: Fresh standard normal noise, floating point, shape of ``x_t``.
        sqrt_recip_alphas_cumprod: sqrt(1 / abar_t) for each timestep, float32, shape (T,).
        sqrt_recipm1_alphas_cumprod: sqrt(1 / abar_t - 1), likewise.
        posterior_mean_coef1: Weight of x_0 in the posterior mean, likewise.
        posterior_mean_coef2: Weight of x_t in it, likewise.
        posterior_log_variance_clipped: Logarithm of the posterior variance, likewise.
        percentile: Quantile of |x_0| at which dynamic thresholding sets in, in [0, 1]: a number; or float32 (float64 if
            ``x_t`` is), shape (1,), on the device of ``x_t``, which a CUDA graph reads anew at every replay. Of what
            such a tensor holds the nearest in the range is taken.
        null_pred: The prediction without text, if it is not the second half of ``pred``.
        cond_scale: Guidance weight w in null + (conditional - null) w: a number or such a tensor.
        implementation: Overrides the policy of :mod:`.dispatch` for this call.

    Returns:
        x_{t-1}, dtype, shape and memory format of ``x_t``. An image with a NaN in x_0 is NaN throughout.

    Raises:
        TypeError, ValueError: if an argument is out of range, shapes, dtypes or devices do not fit together, a gradient
            is required, or the implementation cannot do the job.
    """
    schedules = {
        "sqrt_recip_alphas_cumprod": sqrt_recip_alphas_cumprod,
        "sqrt_recipm1_alphas_cumprod": sqrt_recipm1_alphas_cumprod,
        "posterior_mean_coef1": posterior_mean_coef1,
        "posterior_mean_coef2": posterior_mean_coef2,
        "posterior_log_variance_clipped": posterior_log_variance_clipped,
    }
    return _run(
        "ancestral_step",
        ANCESTRAL,
        x_t,
        pred,
        null_pred,
        {"t": t},
        schedules,
        {"noise": noise},
        percentile,
        cond_scale,
        0.0,
        implementation,
    )[0]


def ddim_step(
    x_t: torch.Tensor,
    t: torch.Tensor,
    t_previous: torch.Tensor,
    pred: torch.Tensor,
    sqrt_alphas_cumprod: torch.Tensor,
    sqrt_one_minus_alphas_cumprod: torch.Tensor,
    *,
    percentile: float | torch.Tensor,
    eta: float | torch.Tensor = 0.0,
    noise: torch.Tensor | None = None,
    null_pred: torch.Tensor | None = None,
    cond_scale: float | torch.Tensor = 1.0,
    implementation: str | None = None,
) -> torch.Tensor:
    """From any timestep to any earlier one, with dynamic thresholding.

    Song et al., "Denoising Diffusion Implicit Models" (2021), equations 12 and 16, https://arxiv.org/abs/2010.02502.
    The noise that points to x_t is the one that leads there from the thresholded x_0, not the predicted one.

    Not differentiable. Waits for nothing on the host, so that it can be captured in a CUDA graph.

    Args:
        x_t: Noised images, float32 (float64 for the reference), shape (b, ...).
        t: Timestep of each image, int64, shape (b,), values in [0, T).
        t_previous: The timestep to go to, likewise, at most t; -1 for the clean image, where abar = 1.
        pred: The predicted noise, see :func:`ancestral_step`.
        sqrt_alphas_cumprod: sqrt(abar_t) for each timestep, float32, shape (T,).
        sqrt_one_minus_alphas_cumprod: sqrt(1 - abar_t), likewise.
        percentile: Quantile of |x_0| at which dynamic thresholding sets in, see :func:`ancestral_step`.
        eta: Share of the noise of ancestral sampling that is added anew, in [0, 1]; 0 makes the step deterministic. A
            number, or such a tensor as ``percentile`` may be, but which must hold a value in the range.
        noise: Fresh standard normal noise, floating point, shape of ``x_t``; needed unless ``eta`` is the number 0.
        null_pred: The prediction without text, if it is not the second half of ``pred``.
        cond_scale: Guidance weight, see :func:`ancestral_step`.
        implementation: Overrides the policy of :mod:`.dispatch` for this call.

    Returns:
        The images at ``t_previous``, dtype, shape and memory format of ``x_t``.

    Raises:
        TypeError, ValueError: as :func:`ancestral_step`.
    """
    is_stored = isinstance(eta, torch.Tensor)
    if not is_stored and not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    adds_noise = is_stored or eta != 0
    if adds_noise and noise is None:
        given = "an eta that is a tensor" if is_stored else f"eta = {eta}"
        raise ValueError(f"noise must be given for {given}; only with eta = 0 is none added")
    return _run(
        "ddim_step",
        DDIM,
        x_t,
        pred,
        null_pred,
        {"t": t, "t_previous": t_previous},
        {
            "sqrt_alphas_cumprod": sqrt_alphas_cumprod,
            "sqrt_one_minus_alphas_cumprod": sqrt_one_minus_alphas_cumprod,
        },
        {"noise": noise if adds_noise else None},
        percentile,
        cond_scale,
        eta,
        implementation,
    )[0]


def dpm_solver_pp_2m_step(
    x_t: torch.Tensor,
    t: torch.Tensor,
    t_previous: torch.Tensor,
    pred: torch.Tensor,
    sqrt_alphas_cumprod: torch.Tensor,
    sqrt_one_minus_alphas_cumprod: torch.Tensor,
    *,
    percentile: float | torch.Tensor,
    last_x_start: torch.Tensor | None = None,
    t_last: torch.Tensor | None = None,
    null_pred: torch.Tensor | None = None,
    cond_scale: float | torch.Tensor = 1.0,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """From any timestep to any earlier one by DPM-Solver++(2M) with dynamic thresholding.

    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models" (2022), algorithm 2,
    https://arxiv.org/abs/2211.01095. Without an x_0 from the step before, and to the clean image, it is of first order.

    Not differentiable. Waits for nothing on the host, so that it can be captured in a CUDA graph.

    Args:
        x_t: Noised images, float32 (float64 for the reference), shape (b, ...).
        t: Timestep of each image, int64, shape (b,), values in [0, T).
        t_previous: The timestep to go to, likewise, less than t; -1 for the clean image, where abar = 1.
        pred: The predicted noise, see :func:`ancestral_step`.
        sqrt_alphas_cumprod: sqrt(abar_t) for each timestep, float32, shape (T,).
        sqrt_one_minus_alphas_cumprod: sqrt(1 - abar_t), likewise.
        percentile: Quantile of |x_0| at which dynamic thresholding sets in, see :func:`ancestral_step`.
        last_x_start: The x_0 that the step before returned, shape of ``x_t``; none in the first step.
        t_last: The ``t`` of that step, greater than ``t``; given together with ``last_x_start``.
        null_pred: The prediction without text, if it is not the second half of ``pred``.
        cond_scale: Guidance weight, see :func:`ancestral_step`.
        implementation: Overrides the policy of :mod:`.dispatch` for this call.

    Returns:
        The images at ``t_previous`` and the thresholded x_0, dtype, shape and memory format of ``x_t`` both.

    Raises:
        TypeError, ValueError: as :func:`ancestral_step`.
    """
    if (last_x_start is None) != (t_last is None):
        raise ValueError("last_x_start and t_last must be given together, or neither")
    times = {"t": t, "t_previous": t_previous}
    if t_last is not None:
        times["t_last"] = t_last
    return _run(
        "dpm_solver_pp_2m_step",
        DPM_SOLVER,
        x_t,
        pred,
        null_pred,
        times,
        {
            "sqrt_alphas_cumprod": sqrt_alphas_cumprod,
            "sqrt_one_minus_alphas_cumprod": sqrt_one_minus_alphas_cumprod,
        },
        {"last_x_start": last_x_start},
        percentile,
        cond_scale,
        0.0,
        implementation,
    )
