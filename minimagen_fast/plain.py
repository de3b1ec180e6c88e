"""Whether a module may be stood in for by code that reads its parameters.

What is faster than one module after another (kernels that do the work of several, products for all blocks in one) does
not call those modules. That is right only while they are what they were made as: not for one that was replaced (by an
adapter such as LoRA, by a quantised layer), parametrised, compiled, or that has hooks. Such a module is called.
"""

from torch import nn


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of a module is one of its class's ``forward`` and nothing else."""
    return (
        "forward" not in vars(module)
        and module._compiled_call_impl is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def methods_of(kind: type[nn.Module], *names: str) -> dict[str, object]:
    """Methods of a class as it was made, by name, to find what was put in their place."""
    return {name: getattr(kind, name) for name in names}


def overridden(module: nn.Module, methods: dict[str, object]) -> list[str]:
    """Which of a class's methods are others in a module: in itself, in a class derived from it, or in the class."""
    return [name for name, made in methods.items() if name in vars(module) or getattr(type(module), name) is not made]


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes itself, not of one derived from it, and untouched."""
    return type(module) in kinds and is_untouched(module)


def is_plain_sequence(module: object, *kinds: type[nn.Module]) -> bool:
    """Whether a module is a plain ``nn.Sequential`` of plain parts of these classes, in this order."""
    if not isinstance(module, nn.Sequential) or not is_plain(module, nn.Sequential) or len(module) != len(kinds):
        return False
    return all(is_plain(part, kind) for part, kind in zip(module, kinds, strict=True))
