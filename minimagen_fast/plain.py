"""Whether a module may be stood in for by code that reads its parameters.

What is faster than one module after another (kernels that do the work of several, products for all blocks in one) does
not call those modules. That is right only while they are what they were made as: not for one that was replaced (by an
adapter such as LoRA, by a quantised layer), parametrised, compiled, or that has hooks, be they for all modules; nor
where another method was put into one, or into its class, torch's or ours. Such a module is called.

The same is asked of calls of torch's functions, which a step that was captured or recorded does not make again.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _has_any_global_hook,
)
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.module_tracker import ModuleTracker

from .kernels.launch import in_forward_mode, nothing_looks


def no_calls_are_seen(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether no mode, transform or class of tensors sees which functions are called with these tensors."""
    return (
        nothing_looks(tensors)
        and not in_forward_mode()
        # What `torch.set_default_device` puts there does not look either.
        and all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of a module is one of its class's ``forward``, which known classes were made with, and no more."""
    kind = type(module)
    # Some hundred times in a step: hence in few operations.
    return (
        is_as_made(module)
        and not (
            (_global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks)
            and _is_every_module_touched()
        )
        and (kind not in _FORWARDS or _FORWARDS[kind] is kind.forward)
    )


def _is_every_module_touched() -> bool:
    """Whether there are hooks for all modules other than those of torch's counters, which are to count what is run."""
    every = (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks)
    hooks = (hook for some in every for hook in some.values())
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def is_as_made(module: nn.Module) -> bool:
    """Whether nothing was put into a module itself that changes what a call of it does."""
    own = vars(module)
    # The second is where a convolution is commonly given padding that wraps around.
    return not (
        "forward" in own
        or "_conv_forward" in own
        or module._compiled_call_impl
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks see what a module is called with, its own or those for all modules.

    Those with which torch shards modules, and ours that count, do not matter: they take whatever comes.
    """
    own = vars(module)
    kinds = own["_forward_hooks"], own["_forward_pre_hooks"], own["_backward_hooks"], own["_backward_pre_hooks"]
    if any(not _takes_whatever_comes(hook) for hooks in kinds for hook in hooks.values()):
        return True
    return bool(_has_any_global_hook()) and _is_every_module_touched()


def _takes_whatever_comes(hook: Callable) -> bool:
    method = hook.func if isinstance(hook, functools.partial) else hook
    maker = type(getattr(method, "__self__", None)).__module__
    return maker.startswith(("torch.distributed.", "minimagen_fast."))


def classes_are_as_made() -> bool:
    """Whether torch has no hooks for all modules, and its classes and ours call what they were made with."""
    return not _has_any_global_hook() and all(kind.forward is made for kind, made in _FORWARDS.items())


def methods_of(kind: type[nn.Module], *names: str) -> dict[str, object]:
    """Methods of a class as it was made, by name, to find what was put in their place."""
    return {name: getattr(kind, name) for name in names}


def overridden(module: nn.Module, methods: dict[str, object]) -> list[str]:
    """Which of a class's methods are others in a module: in itself, in a class derived from it, or in the class.

    All of them are in a module of another class, such as one that has the first in it.
    """
    return [
        name for name, made in methods.items() if name in vars(module) or getattr(type(module), name, None) is not made
    ]


def takes(function: Callable, name: str) -> bool:
    """Whether a function has an argument of this name, or one for all names."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes itself, not of one derived from it, and untouched."""
    # A class of someone else's may have been put in the place of one of ours, by its name.
    return type(module) in kinds and type(module) in _FORWARDS and is_untouched(module)


def is_plain_sequence(module: object, *kinds: type[nn.Module]) -> bool:
    """Whether a module is a plain ``nn.Sequential`` of plain parts of these classes, in this order."""
    if not isinstance(module, nn.Sequential) or not is_plain(module, nn.Sequential) or len(module) != len(kinds):
        return False
    return all(is_plain(part, kind) for part, kind in zip(module, kinds, strict=True))


def keep_forwards(*kinds: type[nn.Module]) -> None:
    """Note down the ``forward`` of classes that a U-Net is made of, to find what is put in its place."""
    _FORWARDS.update((kind, kind.forward) for kind in kinds)


# Of the classes that a U-Net is made of: those of torch, and ours where these are made.
_FORWARDS: dict[Any, Any] = {
    kind: kind.forward
    for kind in (nn.Conv2d, nn.GELU, nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.Sequential, nn.SiLU, nn.Upsample)
}
