"""Whether a module is still the one of which something was captured."""

from itertools import chain
from operator import is_

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .plain import is_untouched

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Classes of which it is known that a call does nothing but compute on the device.
_KNOWN = ("torch.nn.", "minimagen_fast.")


class ModuleWatch:
    """What a module and its parts are now: their attributes, and where their tensors lie, but not the values there.

    It is looked at before every step of a training: so it is in a hurry, and compares objects by identity.

    Args:
        module: The module.
        besides: Names of attributes of the module itself that do not count.
    """

    def __init__(self, module: nn.Module, besides: tuple[str, ...] = ()):
        self._besides = besides
        # Not the module: it may keep this watch, and would not go at once when it is let go. The dictionaries inside of
        # these are among their values: another one in the place of one is noticed.
        attributes = [vars(part) for part in module.modules()]
        inside = [each[name] for each in attributes for name in ("_modules", "_parameters", "_buffers")]
        self._dictionaries = [*attributes[1:], *inside]
        self._objects = self._objects_of(module)
        self._hooks = [each[name] for each in attributes for name in _HOOKS]
        self._tensors = [*module.parameters(), *module.buffers()]
        self._places = _places(self._tensors)

    def _objects_of(self, module: nn.Module) -> list[object]:
        own = [value for name, value in vars(module).items() if name not in self._besides]
        return [*own, *chain.from_iterable(map(dict.values, self._dictionaries))]

    def unchanged(self, module: nn.Module) -> bool:
        """Whether the module is as it was, and no part of it has hooks."""
        if any(self._hooks):
            return False
        now, before = self._objects_of(module), self._objects
        return len(now) == len(before) and all(map(is_, now, before)) and _places(self._tensors) == self._places


def is_known(part: nn.Module) -> bool:
    """Whether all that a call of a module, without its parts, reads are its parameters, buffers and settings."""
    return f"{type(part).__module__}.".startswith(_KNOWN) and not has_tensors_in_attributes(part)


def has_tensors_in_attributes(part: nn.Module) -> bool:
    """Whether a module holds tensors that are neither parameters nor buffers of its."""
    return any(isinstance(value, torch.Tensor) for value in vars(part).values())


def only_computes(module: nn.Module) -> bool:
    """Whether nothing in a module but known classes computes, on tensors of torch's own with strides, without hooks."""
    return has_plain_tensors(module) and all(is_known(part) and is_untouched(part) for part in module.modules())


def has_plain_tensors(module: nn.Module) -> bool:
    """Whether all parameters and buffers of a module are tensors of torch's own with strides, none parametrised."""
    # A parametrised weight may be one that was computed before, and kept.
    if any(map(is_parametrized, module.modules())):
        return False
    tensors = (*module.parameters(), *module.buffers())
    return all(type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided for value in tensors)


def _places(tensors: list[torch.Tensor]) -> list[tuple]:
    # Sparse ones lie in no one place; of what has any, nothing is captured.
    strided = (x for x in tensors if x.layout == torch.strided)
    return [(x.data_ptr(), x.stride(), x.dtype, x.requires_grad) for x in strided]
