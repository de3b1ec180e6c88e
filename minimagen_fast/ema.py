"""Exponential moving average of a module's parameters, for evaluation and sampling."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .interrupts import uninterrupted

__all__ = ["EMA"]


class EMA:
    """Keeps ``average = d * average + (1 - d) * parameter`` in float32 beside a module that goes on training.

    The decay warms up as ``d = min(decay, (1 + n) / (10 + n))`` after n updates (the rule of TensorFlow's
    ``ExponentialMovingAverage`` with ``num_updates``), so that the random initial weights do not linger. float32
    matters for bfloat16 weights, where changes below 2^-8 of a value are rounded away. No update waits for the device.

    Args:
        module: Module to average. Its floating-point parameters are followed, its buffers are not.
        decay: Upper limit of d, in [0, 1). 0.999 averages over about 1000 updates.

    Raises:
        ValueError: `decay` lies outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), for example 0.999, got {decay!r}")
        self.decay = decay
        self.updates = 0
        self._parameters: dict[str, Tensor] = {
            name: parameter for name, parameter in module.named_parameters() if parameter.is_floating_point()
        }
        self._sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
        #: The averages by name of the parameter, sharded like it.
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Takes the module's present parameters into the average: once after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        # Of sharded parameters every rank averages its own part.
        current = [local(parameter) for parameter in self._parameters.values()]
        averages = [local(average) for average in self.averages.values()]
        if any(parameter.dtype != torch.float32 for parameter in current):
            wide = [torch.empty_like(average) for average in averages]
            torch._foreach_copy_(wide, current)
            current = wide
        torch._foreach_lerp_(averages, current, 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the module has the averaged parameters; then, also on an error, exactly its own again."""
        own = {name: local(parameter).detach().clone() for name, parameter in self._parameters.items()}
        # Two levels, because Ctrl-C may still come on the way into the inner one's end.
        try:
            try:
                self._assign(self.averages)
                yield
            finally:
                with uninterrupted():
                    self._assign(own)
        finally:
            with uninterrupted():
                self._assign(own)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        # In place: the optimizer, and whatever was compiled or captured, hold on to these very tensors.
        for name, parameter in self._parameters.items():
            local(parameter).copy_(local(values[name]))
        # A sharded module may still have gathered the weights that it had before.
        for sharded in self._sharded:
            sharded.reshard()

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, and the number of updates, for a checkpoint."""
        return {"updates": self.updates, "averages": dict(self.averages)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave.

        Raises:
            ValueError: It is no such state, or the averages belong to other parameters.
        """
        if missing := [name for name in ("averages", "updates") if name not in state]:
            raise ValueError(f"the state of an EMA has averages and updates; this one lacks {' and '.join(missing)}")
        averages = state["averages"]
        shapes = {name: tuple(value.shape) for name, value in self.averages.items()}
        if {name: tuple(value.shape) for name, value in averages.items()} != shapes:
            raise ValueError("the saved averages belong to a module with other parameter names or shapes")
        self.updates = state["updates"]
        for name, value in averages.items():
            self.averages[name].copy_(value)


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory: all of it, unless it is sharded."""
    return value.to_local() if isinstance(value, DTensor) else value
