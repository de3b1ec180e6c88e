"""The optimizer of a training, and its learning rate."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .Imagen import Imagen

__all__ = ["SCHEDULES", "build_optimizer", "fuse", "learning_rate_factor", "learning_rate_schedule"]

SCHEDULES = ("constant", "cosine")
# Where torch updates all parameters in one launch.
_FUSED_ON = ("cuda", "cpu")


def build_optimizer(imagen: Imagen, rates: Mapping[int, float], weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam, or with weight decay AdamW (Loshchilov and Hutter, 2019), for some U-Nets of a cascade.

    Args:
        imagen: The Imagen, on its device, and sharded if it is to be.
        rates: Learning rate by number of the U-Net, from 1. The others are not trained.
        weight_decay: Share of a weight that is taken off it in a step, times the learning rate; at least 0.

    Raises:
        ValueError: a learning rate is not positive, the weight decay is negative, or one of them is not finite.
    """
    if bad := {number: rate for number, rate in rates.items() if not 0 < rate < math.inf}:
        raise ValueError(f"learning rates must be positive and finite, got {bad}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"WEIGHT_DECAY must be at least 0 and finite, got {weight_decay}")
    groups = [{"params": list(imagen.unets[n - 1].parameters()), "lr": rate} for n, rate in rates.items()]
    fused = imagen.device.type in _FUSED_ON
    if weight_decay:
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=fused)
    return torch.optim.Adam(groups, fused=fused)


def fuse(optimizer: torch.optim.Optimizer) -> bool:
    """Have Adam or AdamW update all parameters in one launch, if nothing was said about how; results round otherwise.

    Args:
        optimizer: Any optimizer. Arguments that it was given (``fused``, ``foreach``, ``capturable``,
            ``differentiable``) are left alone, and so is one of a derived class.

    Returns:
        Whether the optimizer, changed or not, leaves a step out if its attribute ``found_inf``, a float32 scalar on the
        device, is 1: without the host's knowing, which would have to wait for the device.
    """
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        groups = optimizer.param_groups
        if all(_is_open(group) for group in groups):
            for group in groups:
                group["fused"] = True
        if all(group["fused"] for group in groups):
            for parameter, state in optimizer.state.items():
                _fit_fused(parameter, state)
            return True
    if isinstance(optimizer, torch.optim.SGD) and any(group["momentum"] for group in optimizer.param_groups):
        # If the first step is left out, torch's fused one begins with momenta that nobody has written.
        return False
    # A state that was taken over may have turned off what the optimizer was made with.
    fused = all(group.get("fused", True) for group in optimizer.param_groups)
    return fused and getattr(optimizer, "_step_supports_amp_scaling", False)


def _fit_fused(parameter: torch.Tensor, state: dict[str, Any]) -> None:
    """Makes what is there of a parameter's state, which may be from a step that was not fused, fit one that is."""
    for key, value in state.items():
        if key == "step":  # which is counted on the device
            state[key] = torch.as_tensor(value, dtype=torch.float32, device=parameter.device)
        # All is read as it lies in memory, and the weights may have been laid out in another way meanwhile.
        elif (
            isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride()
        ):
            state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _is_open(group: Mapping[str, Any]) -> bool:
    """Whether it is left to torch how a group of parameters is updated, and it may be in one launch."""
    if group["fused"] is not None or group["foreach"] is not None or group["capturable"] or group["differentiable"]:
        return False
    return all(p.device.type in _FUSED_ON and p.is_floating_point() for p in group["params"])


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, kind: str, warmup_steps: int, total_steps: int | None
) -> torch.optim.lr_scheduler.LambdaLR | None:
    """The schedule of an optimizer's learning rates by :func:`learning_rate_factor`.

    Args:
        optimizer: Whose learning rates are scheduled.
        kind: ``constant`` or ``cosine``.
        warmup_steps: Steps until the learning rate is reached, at least 0.
        total_steps: Step at which the cosine ends; needed for it alone.

    Returns:
        The schedule; None if there is nothing to schedule.

    Raises:
        ValueError: an argument is out of range or missing.
    """
    factor = learning_rate_factor(kind, warmup_steps, total_steps)
    if kind == "constant" and not warmup_steps:
        return None
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def learning_rate_factor(kind: str, warmup_steps: int, total_steps: int | None) -> Callable[[int], float]:
    """Linear warm-up, then constant or a cosine down to 0 (Loshchilov and Hutter, "SGDR", 2017, without restarts).

    Args:
        kind: ``constant`` or ``cosine``.
        warmup_steps: Steps until the learning rate is reached, at least 0.
        total_steps: Step at which the cosine ends; needed for it alone.

    Returns:
        The share of the learning rate that counts after a number of steps.

    Raises:
        ValueError: an argument is out of range or missing.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"LR_SCHEDULE must be {' or '.join(SCHEDULES)}, got {kind!r}")
    if warmup_steps < 0:
        raise ValueError(f"WARMUP_STEPS must be at least 0, got {warmup_steps}")
    if kind == "cosine" and (total_steps is None or total_steps <= warmup_steps):
        raise ValueError(
            f"a cosine schedule needs to know the number of steps, more than the {warmup_steps} of the warm-up; got"
            f" {total_steps}: give TOTAL_STEPS"
        )

    def factor(step: int) -> float:
        warm = min((step + 1) / max(warmup_steps, 1), 1.0)
        if kind == "constant":
            return warm
        assert total_steps is not None
        progress = min(max(step - warmup_steps, 0) / (total_steps - warmup_steps), 1.0)
        return warm * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
