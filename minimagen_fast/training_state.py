"""All that a training is continued from: what goes into a checkpoint, and how it is taken up again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .ema import EMA
from .Imagen import Imagen
from .ranks import Ranks
from .snapshots import Saved

__all__ = ["Owners", "Position", "gather", "must_agree", "take_over"]


@dataclass(frozen=True)
class Position:
    """Where a restarted run goes on: the point at which all gradients computed so far had gone into the weights.

    Attributes:
        epoch: Index of the epoch.
        batch: Number of its batches that are done.
        step: Number of optimizer steps in all.
        epoch_rng: Random states before the order of the epoch was drawn, see :func:`.checkpoint.capture_rng`.
        rng: Random states at this point.
        loss_sums: Sum of the losses of each trained U-Net in this epoch, shape (number of trained U-Nets,).
        loss_count: Number of batches in these sums.
        validation_due: Whether the weights at this point are still to be validated.
    """

    epoch: int
    batch: int
    step: int
    epoch_rng: dict[str, Any]
    rng: dict[str, Any]
    loss_sums: Tensor
    loss_count: int
    validation_due: bool = False


@dataclass(frozen=True)
class Owners:
    """What has a state that a checkpoint keeps.

    Attributes:
        imagen: The Imagen.
        optimizer: Its optimizer.
        lr_scheduler: Schedule of the learning rate, or None.
        averages: Averages of the weights by number of the U-Net.
    """

    imagen: Imagen
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any = None
    averages: Mapping[int, EMA] = field(default_factory=dict)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the U-Nets, and what is trained besides, under the name it has in a checkpoint."""
        for index, unet in enumerate(self.imagen.unets):
            for name, value in unet.state_dict().items():
                if not _is_extra(name):
                    yield f"unets.{index}.{name}", value
        # What a class derived from Imagen has besides; of that, a frozen text encoder, say, is its own affair.
        optimized = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        named = self.imagen.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in named if id(parameter) not in optimized}
        for name, value in self.imagen.state_dict().items():
            if not name.startswith("unets.") and name not in frozen and not _is_extra(name):
                yield f"imagen.{name}", value

    def with_extra_state(self) -> dict[str, nn.Module]:
        """The modules, by name, that keep something beside their tensors, see ``torch.nn.Module.get_extra_state``."""
        usual = nn.Module.get_extra_state
        named = self.imagen.named_modules()
        return {name: module for name, module in named if type(module).get_extra_state is not usual}

    def averaged(self) -> Iterator[tuple[str, Tensor]]:
        """The same for the averages."""
        for number, average in self.averages.items():
            for name, value in average.averages.items():
                yield f"averages.{number}.{name}", value

    def optimized(self) -> list[tuple[str, nn.Parameter]]:
        """The optimizer's parameters in its order, by name."""
        names = {id(parameter): name for name, parameter in self.imagen.named_parameters()}
        return [
            (names.get(id(parameter), f"parameter {place}"), parameter)
            for place, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"])
        ]


def _is_extra(name: str) -> bool:
    """Whether an entry of a state dict is a module's extra state, which may be anything."""
    return name.rpartition(".")[2] == "_extra_state"


def gather(owners: Owners) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state: tensors by name, for all ranks to save, and plain values.

    Raises:
        ValueError: A checkpoint cannot hold what the optimizer, the schedule or a module keeps.
    """
    kept = owners.optimizer.state_dict()
    if lacks := [name for name in ("state", "param_groups") if name not in kept]:
        raise ValueError(
            f"optimizer.state_dict() of this {type(owners.optimizer).__name__} has no {' and '.join(lacks)} as that"
            f" of a torch.optim.Optimizer has, but {', '.join(map(str, kept))}: give the optimizer that it is made of"
        )
    tensors = {name: value.detach() for name, value in (*owners.weights(), *owners.averaged())}
    # What an optimizer keeps beside tensors of its parameters, such as a step count that is a plain number.
    plain: dict[str, dict[str, Any]] = {}
    for name, parameter in owners.optimized():
        for key, value in owners.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = value.detach()
            else:
                plain.setdefault(name, {})[key] = value
    scheduler = owners.lr_scheduler
    return tensors, {
        "optimizer": {
            "kind": type(owners.optimizer).__name__,
            "groups": checkpoint.plain(kept["param_groups"], "optimizer.param_groups"),
            "names": [name for name, _ in owners.optimized()],
            "plain": checkpoint.plain(plain, "optimizer.state"),
        },
        "lr_scheduler": None
        if scheduler is None
        else {
            "kind": type(scheduler).__name__,
            "state": checkpoint.plain(scheduler.state_dict(), "lr_scheduler.state_dict()"),
        },
        "averages": {number: average.updates for number, average in owners.averages.items()},
        "extra_states": {
            name: checkpoint.plain(module.get_extra_state(), f"{name}.get_extra_state()")
            for name, module in owners.with_extra_state().items()
        },
    }


def must_agree(what: str, saved: Any, here: Any) -> None:
    """Refuses to go on with other settings.

    Raises:
        ValueError: They differ.
    """
    if saved != here:
        raise ValueError(f"{what}: {saved} in that training, {here} in this one")


def take_over(owners: Owners, saved: Saved, ranks: Ranks) -> None:
    """Puts every owner into the state that was saved; on all ranks, of whatever number.

    Raises:
        ValueError: What was saved belongs to other owners. Nothing has been changed then.
    """
    values = saved.values
    must_agree("averages kept (ema_decay)", bool(values["averages"]), bool(owners.averages))
    found = saved.tensors()
    wanted = dict((*owners.weights(), *owners.averaged()))
    kept = {name for name in found if not name.startswith("optimizer.")}
    if different := sorted(set(wanted) ^ kept):
        raise ValueError(f"{len(different)} tensors are in one of the two trainings only, such as {different[0]}")
    for name, value in wanted.items():
        must_agree(f"shape of {name}", tuple(found[name][0]), tuple(value.shape))
    optimizer, scheduler = values["optimizer"], values["lr_scheduler"]
    must_agree("optimizer", optimizer["kind"], type(owners.optimizer).__name__)
    here = None if owners.lr_scheduler is None else type(owners.lr_scheduler).__name__
    must_agree("lr_scheduler", None if scheduler is None else scheduler["kind"], here)
    must_agree("parameters of the optimizer", len(optimizer["names"]), len(owners.optimized()))

    states = _empty_states(owners, found)

    owners.imagen.zero_grad(set_to_none=True)
    with torch.no_grad():
        saved.read_into(
            {**wanted, **{f"optimizer.{key}.{name}": value for (key, name), value in states.items()}}, ranks
        )
    by_name: dict[str, dict[str, Any]] = {name: dict(plain) for name, plain in optimizer["plain"].items()}
    for (key, name), value in states.items():
        by_name.setdefault(name, {})[key] = value
    # Through its own way of loading, which knows where each kind of state belongs.
    places = {place: by_name[name] for place, (name, _) in enumerate(owners.optimized()) if name in by_name}
    owners.optimizer.load_state_dict({"state": places, "param_groups": optimizer["groups"]})
    if owners.lr_scheduler is not None:
        owners.lr_scheduler.load_state_dict(scheduler["state"])
    for number, average in owners.averages.items():
        average.updates = values["averages"][number]
    kept_by = values.get("extra_states", {})  # which earlier versions did not save
    for name, module in owners.with_extra_state().items():
        if name in kept_by:
            module.set_extra_state(kept_by[name])


def _empty_states(owners: Owners, found: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict:
    """Room for the optimizer's tensors, by kind and name of the parameter; sharded like the parameter."""
    states: dict[tuple[str, str], Tensor] = {}
    parameters = dict(owners.optimized())
    for entry, (shape, dtype) in found.items():
        if not entry.startswith("optimizer."):
            continue
        _, key, name = entry.split(".", 2)
        if name not in parameters:
            raise ValueError(f"the optimizer of that training had {name}, this one does not")
        parameter = parameters[name]
        like_parameter = shape == tuple(parameter.shape) and len(shape) > 0
        states[key, name] = (
            torch.empty_like(parameter, dtype=dtype) if like_parameter else torch.empty(shape, dtype=dtype)
        )
    return states
