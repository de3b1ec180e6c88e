"""How the blocks of a U-Net are run: as they are, compiled, or so that the backward pass computes them again."""

import functools
import itertools
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .kernels import dispatch
from .kernels.setting import Setting
from .plain import is_untouched

# Shapes of blocks that a process may compile; Dynamo's own limit of 8 is less than one U-Net has.
_MOST_SHAPES = 512
_NOT_RANDOM = (
    nn.Conv2d,
    nn.GELU,
    nn.GroupNorm,
    nn.Identity,
    nn.Linear,
    nn.ModuleList,
    nn.Sequential,
    nn.SiLU,
    nn.Unflatten,
    nn.Upsample,
)


@dataclass(frozen=True)
class _Way:
    compiled: bool = False
    checkpoint_levels: Collection[int] = ()


_way = Setting(_Way())


def use_blocks(*, compiled: bool, checkpoint_levels: Collection[int] = ()) -> AbstractContextManager[None]:
    """Set for a block of code, for all threads of the process, how :func:`run_block` runs.

    Args:
        compiled: Whether through torch.compile: blocks of the same kind and shape are compiled once, together. Not a
            block in which a module has hooks, or another ``forward`` than its class was made with; hooks of the block
            itself, such as gather the weights of one that is sharded, are called before and after.
        checkpoint_levels: Levels of the U-Net, 0 the one of the highest resolution, whose blocks keep nothing but their
            inputs for the backward pass; Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
    """
    return _way.use(_Way(compiled, tuple(checkpoint_levels)))


def blocks_are_compiled() -> bool:
    """Whether :func:`run_block` runs blocks through torch.compile, which compiles once for each shape of its inputs."""
    return _way.value.compiled


def run_block(level: int, block: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The result of a block of this level, in the way in force."""
    # What has no parts does nothing that is worth compiling, or computing again.
    if not block._modules:
        return block(*args, **kwargs)
    call: Callable[..., torch.Tensor] = block
    way = _way.value
    if way.compiled and not torch.compiler.is_compiling() and _is_untouched_within(block):
        call = functools.partial(_run_compiled, block)
    if level in way.checkpoint_levels and torch.is_grad_enabled():
        # To save the state of the random numbers would wait for the device.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": _may_be_random(block)}
        # In a graph the choice of kernels is a constant, and Dynamo takes no contexts.
        if not torch.compiler.is_compiling():
            options["context_fn"] = _then_and_again
        return checkpoint(call, *args, **options, **kwargs)
    return call(*args, **kwargs)


def _is_untouched_within(block: nn.Module) -> bool:
    """Whether no module in a block was given hooks, which what is compiled would not notice."""
    if "forward" in vars(block) or block._compiled_call_impl is not None:
        return False
    # In every call, so quicker than `modules` is.
    parts = [block]
    for part in parts:
        for inner in part._modules.values():
            if inner is not None:
                if not is_untouched(inner):
                    return False
                parts.append(inner)
    return True


def _may_be_random(block: nn.Module) -> bool:
    """Whether something in a block may draw random numbers, which nothing does that it is made of."""
    return not all(
        is_untouched(part) and (type(part) in _NOT_RANDOM or f"{type(part).__module__}.".startswith("minimagen_fast."))
        for part in block.modules()
    )


def _then_and_again() -> tuple[AbstractContextManager, AbstractContextManager]:
    # The backward pass may come when other kernels are chosen, and these would save other tensors.
    return nullcontext(), dispatch.as_now()


# Without guards one sharded block would be taken for another of its kind.
_DYNAMO = {"recompile_limit": _MOST_SHAPES, "accumulated_recompile_limit": _MOST_SHAPES, "skip_fsdp_guards": False}


def _run_compiled(block: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    forward = _compiled_forward(_kind(block))
    with torch._dynamo.config.patch(_DYNAMO):
        if is_untouched(block):
            return forward(block, *args, **kwargs)
        # The call, with the block's hooks, stays as it is, and finds what is compiled in it.
        vars(block)["forward"] = functools.partial(forward, block)
        try:
            return block(*args, **kwargs)
        finally:
            # Another thread may have run this block meanwhile.
            vars(block).pop("forward", None)


# Of each block that was compiled.
_kinds: "WeakKeyDictionary[nn.Module, tuple]" = WeakKeyDictionary()
_numbers = itertools.count()


def _kind(block: nn.Module) -> tuple:
    """Equal for blocks that are compiled together: their type, and the shapes and dtypes that they began with."""
    kind = _kinds.get(block)
    if kind is None:
        parameters = tuple((name, x.shape, x.dtype) for name, x in block.named_parameters())
        kind = _kinds[block] = type(block), parameters
    return kind


@functools.cache
def _compiled_forward(kind: tuple) -> Callable[..., torch.Tensor]:
    # One function for all blocks of a kind, so that what is compiled for one serves all that are alike. And one for
    # each kind, of code of its own: Dynamo goes through all that it has compiled of one code until something fits.
    code = _forward.__code__.replace(co_name=f"{kind[0].__name__}_{next(_numbers)}")
    return torch.compile(FunctionType(code, globals()), dynamic=False)


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    return type(block).forward(block, *args, **kwargs)
