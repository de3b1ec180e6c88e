"""Which implementation of an operation runs: one policy for all of them.

Choices: ``auto`` (the fastest that can do the job), ``triton`` (kernels of this package), ``reference`` (plain torch:
the yardstick of every other one) and, for attention alone, ``sdpa``, ``sdpa_merge`` and ``xformers`` (see
:mod:`.attention`). The environment variable ``MINIMAGEN_FAST_KERNELS`` sets the choice at start,
:func:`use_implementation` (for attention :func:`use_attention`) for a block of code, an operation's ``implementation``
argument for one call. A choice for the process leaves operations that do not have it as under ``auto``; for a call it
is an error.

``reference`` has derivatives of every order and in both modes, kernels have first ones in reverse mode and refuse all
others. torch's own attention, which has none in forward mode, is then not chosen unless it is asked for.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from . import launch
from .setting import Setting

CHOICES = ("auto", "triton", "reference", "sdpa", "sdpa_merge", "xformers")
ENVIRONMENT_VARIABLE = "MINIMAGEN_FAST_KERNELS"
# Tensor cores for bfloat16 and asynchronous copies came with it; what is older was never compiled for.
OLDEST_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Why a job cannot be done, or a function that finds it out when it is asked for.
Reasons = Sequence[str] | Callable[[], Sequence[str]]


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}; got {name!r}")
    return name


_implementation = Setting(
    _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", f"the environment variable {ENVIRONMENT_VARIABLE}")
)
_attention: Setting[str | None] = Setting(None)
_warned: set[str] = set()


def implementation(override: str | None = None) -> str:
    """The choice in force: ``override`` if given, else that of the process.

    Raises:
        ValueError: if ``override`` is no known choice.
    """
    return _implementation.value if override is None else _checked(override, "implementation")


def use_implementation(name: str) -> AbstractContextManager[None]:
    """Set the choice for a block of code, for all threads of the process.

    Raises:
        ValueError: if ``name`` is no known choice.
    """
    return _implementation.use(_checked(name, "implementation"))


def use_attention(name: str) -> AbstractContextManager[None]:
    """Set the choice for attention alone, over that of :func:`use_implementation`, for a block of code.

    Raises:
        ValueError: if ``name`` is no known choice.
    """
    return _attention.use(_checked(name, "attention"))


@contextmanager
def _use(name: str, attention: str | None) -> Iterator[None]:
    with _implementation.use(name), _attention.use(attention):
        yield


class as_now(AbstractContextManager[None]):
    """A block of code that, whenever it runs, and however often, has the choices that are in force now."""

    def __init__(self) -> None:
        self._choices = _implementation.value, _attention.value
        self._running: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._running.append(_use(*self._choices))
        self._running[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._running.pop().__exit__(*error)


def is_eager_float32_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether torch runs float32 on a CPU, one operator after the other, and each may be left to what is faster there.

    Not so under autocast, nor where torch transforms or traces what is run, counts it, or computes derivatives in
    forward mode, nor for tensors of other classes than torch's own, such as quantised weights, or sparse ones: they
    know its operators.
    """
    return (
        all(x.device.type == "cpu" and x.dtype == torch.float32 and x.layout == torch.strided for x in tensors)
        and launch.nothing_looks(tensors)
        and not launch.in_forward_mode()
        and implementation() == "auto"
        and not torch.is_autocast_enabled("cpu")
    )


def attention_override(override: str | None) -> str | None:
    """A call's ``implementation`` of attention: what is given, else what :func:`use_attention` says."""
    return _attention.value if override is None else override


def select(operation: str, candidates: Mapping[str, Reasons], device: torch.device, override: str | None = None) -> str:
    """Choose one of an operation's implementations.

    Args:
        operation: Its name, for messages.
        candidates: For every implementation, best first, the reasons why it cannot do the job; none if it can. The last
            can do every job.
        device: Where the operation's inputs are.
        override: Choice of this call, instead of that of the process.

    Returns:
        A key of ``candidates``.

    Raises:
        ValueError: if the choice names a candidate that cannot do the job, the message gives every reason; or if
            ``override`` names an implementation that the operation does not have, the message says which it has.
    """
    choice = implementation(override)
    if override is not None and choice != "auto" and choice not in candidates:
        has = [name for name in CHOICES if name == "auto" or name in candidates]
        raise ValueError(f"implementation of {operation} must be one of {', '.join(has)}; got {choice!r}")
    if choice in candidates:
        if reasons := _found(candidates[choice]):
            raise ValueError(
                f"implementation {choice!r} of {operation} cannot be used here: {'; '.join(reasons)}."
                " Choose 'auto', or change what is said"
            )
        return choice
    on_cuda = device.type == "cuda"
    # Triton's interpreter is for those who ask for it: it takes thousands of times as long.
    possible = (name for name in candidates if name != "triton" or on_cuda)
    chosen = next(name for name in possible if not _found(candidates[name]))
    if on_cuda and chosen != "triton" and (reasons := _found(candidates.get("triton", ()))):
        _warn_once(f"{operation} runs as {chosen!r}, not as a Triton kernel: {'; '.join(reasons)}")
    return chosen


def _found(reasons: Reasons) -> Sequence[str]:
    return reasons() if callable(reasons) else reasons


# torch.compile cannot trace a warning: marked so, it is given while the caller is traced.
@launch.untraced
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def triton_reasons(*tensors: torch.Tensor | None) -> list[str]:
    """Why Triton kernels cannot take these tensors (None among them is ignored): devices, dtypes, what is installed."""
    # In every call of every operation: one loop, without generators.
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    on_several, wrong = False, set()
    for tensor in given:
        if tensor.device != device:
            on_several = True
        if tensor.dtype not in KERNEL_DTYPES and tensor.is_floating_point():
            wrong.add(str(tensor.dtype))
    reasons = []
    if missing := launch.missing(device):
        reasons.append(missing)
    if on_several:
        reasons.append(f"the tensors are on several devices, {', '.join(sorted({str(t.device) for t in given}))}")
    elif device.type == "cuda":
        capability = launch.capability(device)
        if capability < OLDEST_CAPABILITY:
            reasons.append(f"{device} has compute capability {capability}, less than {OLDEST_CAPABILITY}")
    elif device.type != "meta" and not (device.type == "cpu" and launch.INTERPRETED):
        reasons.append(f"the tensors are on {device}, not on a CUDA device")
    if wrong:
        reasons.append(f"it computes in float32 from float32, float16 or bfloat16, not from {', '.join(sorted(wrong))}")
    return reasons
