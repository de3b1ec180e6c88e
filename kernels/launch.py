"""How Triton kernels are started and registered: everything that is the same for all of them."""

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
    # Kernels then run on CPU tensors, one program after the other, in numpy.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:  # There are no wheels for every platform. The kernels are defined all the same, and never run.

    class _Absent:
        def jit(self, function=None, **_):
            return function or self.jit

        def __getattr__(self, name: str) -> Any:
            return None

    triton = tl = _Absent()
    AVAILABLE = INTERPRETED = False

__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "Launch",
    "Target",
    "capability",
    "ceil_div",
    "define",
    "differentiable",
    "in_forward_mode",
    "is_batched",
    "missing",
    "next_power_of_2",
    "nothing_looks",
    "record",
    "refuse_batched",
    "run",
    "target",
    "tl",
    "triton",
    "unregistered",
    "untraced",
]


@dataclass(frozen=True)
class Target:
    """What launch sizes depend on.

    Attributes:
        capability: Compute capability.
        multiprocessors: Their number.
        shared_memory: Bytes that one block may use.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


A100 = Target((8, 0), 108, 166_912)
H200 = Target((9, 0), 132, 232_448)
B200 = Target((10, 0), 148, 232_448)

_stand_in = H200


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", A100.shared_memory)
    return Target((properties.major, properties.minor), properties.multi_processor_count, shared_memory)


def target(device: torch.device) -> Target:
    """The card behind a CUDA device; for other devices the one that :func:`record` was given, else an H200."""
    if device.type != "cuda":
        return _stand_in
    return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)


def untraced(function: Callable) -> Callable:
    """Have torch.compile call a function once, and take its result for a constant."""
    # So does torch.compiler.assume_constant_result, which takes over a second to import the compiler.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@untraced
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; torch.compile asks once and does not trace the question."""
    return target(device).capability


@untraced
def missing(device: torch.device | None = None) -> str | None:
    """What Triton lacks to run kernels on a device, if anything; a CUDA device is meant if none is given."""
    if not AVAILABLE:
        return "triton is not installed"
    return _missing_to_build() if device is None or device.type == "cuda" else None


@functools.cache
def _missing_to_build() -> str | None:
    # For every kernel Triton compiles a little C, by which Python starts it.
    if triton.knobs.build.impl is not None:
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton found no C compiler: install gcc, or name one in the environment variable CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    if not header.exists():
        return f"triton needs Python's C headers, and there is no {header}: install them (python3-dev)"
    return None


@dataclass(frozen=True)
class Launch:
    """A kernel launch that was recorded instead of run.

    Attributes:
        kernel: The ``triton.jit`` function.
        grid: Number of programs along each axis.
        args: What the kernel's first parameters get, in their order: tensors and numbers.
        constexprs: What its ``tl.constexpr`` parameters get, by name.
        num_warps: Warps of a program.
        num_stages: Stages of its software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None


@contextmanager
def record(stand_in: Target = H200) -> Iterator[list[Launch]]:
    """Collect the launches that operations on meta tensors would make on such a card, in the list this gives."""
    global _recorded, _stand_in
    before = _recorded, _stand_in
    _recorded, _stand_in = [], stand_in
    try:
        yield _recorded
    finally:
        _recorded, _stand_in = before


def run(kernel, grid: tuple[int, ...], *args, num_warps: int = 4, num_stages: int = 2, **constexprs) -> None:
    """Launch a kernel on the device and the current stream of its tensors; nothing to do for an empty grid."""
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    if device.type == "meta":
        assert _recorded is not None, "kernels run on meta tensors only to be recorded"
        _recorded.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)
    else:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)


NAMESPACE = "minimagen_fast"
_library = torch.library.Library(NAMESPACE, "DEF")
# What each operator runs on a device, by its name: called like this it costs what it does without being registered.
unregistered: dict[str, Callable] = {}


def define(
    schema: str,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Callable[[Callable], Callable]:
    """Register a function that launches kernels as an operator: opaque to torch.compile, with fake and autograd.

    Derivatives that there is no formula for raise a NotImplementedError, those in forward mode among them, those by the
    transforms of torch.func and those of several results at once.

    Registered by hand and not through ``torch.library.custom_op``, whose checks cost every call more host time than the
    launch itself. Where nothing looks at operators, what is given back does not go through torch's dispatcher either,
    and the operator goes through it once, not for autograd and then again.

    Args:
        schema: Name and signature, as in ``"norm(Tensor x, float eps) -> Tensor"``.
        fake: Takes the same arguments and returns empty outputs: same shapes, dtypes and strides.
        backward: ``backward(ctx, *grads)`` as in ``torch.autograd.Function``; none if not differentiable. It is not
            called where nothing depends on the first output.
        setup_context: ``setup_context(ctx, inputs, output)`` likewise.

    Returns:
        A decorator that replaces the function by one that calls it, directly or as the operator.
    """

    def register(function: Callable) -> Callable:
        name = schema.split("(", 1)[0]
        qualified = f"{NAMESPACE}::{name}"
        # The strides that a compiled graph was traced with are those that the fake's answer holds for.
        _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
        unregistered[name] = function
        for key in ("CUDA", "CPU"):
            _library.impl(name, function, key)

        def fake_or_recorded(*args, **kwargs):
            # FakeTensors, too, say that they are on another device than meta.
            return (fake if _recorded is None else function)(*args, **kwargs)

        torch.library.register_fake(qualified, fake_or_recorded, lib=_library)
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        apply = differentiable(name, function, backward, setup_context).apply
        _library.impl(name, _autograd_of(name, operator, function, backward, setup_context), "Autograd")

        @functools.wraps(function)
        def call(*args):
            if not nothing_looks(args):
                return operator(*args)
            # As in_forward_mode(), without the time of a call.
            if forward_ad._current_level >= 0:
                _refuse_tangents(name, args)
            return (apply if _needs_gradients(args) else function)(*args)

        return call

    return register


def _autograd_of(
    name: str, operator: Any, function: Callable, backward: Callable | None, setup_context: Callable | None
) -> Callable:
    """What torch's dispatcher calls for autograd: compiled code calls operators, and needs no gradients of them."""

    def below(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    apply = differentiable(name, below, backward, setup_context).apply

    def autograd(*args):
        if in_forward_mode():
            _refuse_tangents(name, args)
        if _needs_gradients(args):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(_no_derivative(name, "derivatives by transforms of torch.func"))
            return apply(*args)
        return (function if nothing_looks(args) else below)(*args)

    return autograd


def differentiable(
    name: str, function: Callable, backward: Callable | None = None, setup_context: Callable | None = None
) -> type[torch.autograd.Function]:
    """What is to autograd what the operator of this name is, but calls this function; see :func:`define`."""

    def forward(ctx, *args):
        output = function(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        # A list autograd would take for something else than tensors.
        return tuple(output) if isinstance(output, list) else output

    def backward_or_refuse(ctx, *grads):
        if backward is None:
            raise NotImplementedError(_no_derivative(name, "gradients"))
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_batched(name, grads[0])
        return backward(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_or_refuse)}
    return type(name, (torch.autograd.Function,), members)


def in_forward_mode() -> bool:
    """Whether something computes derivatives in forward mode, in this thread or another."""
    return forward_ad._current_level >= 0


def _refuse_tangents(name: str, args: tuple) -> None:
    for arg in args:
        if isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(_no_derivative(name, "derivatives in forward mode"))


is_batched = torch._C._functorch.is_legacy_batchedtensor


def refuse_batched(name: str, gradient: torch.Tensor) -> None:
    """See that a backward pass is one of one result; those of several at once are of no kernel's shapes.

    Raises:
        NotImplementedError: if it is not.
    """
    if is_batched(gradient):
        raise NotImplementedError(_no_derivative(name, "batched gradients, of several results at once"))


def _no_derivative(name: str, which: str) -> str:
    return (
        f"{NAMESPACE}::{name} has no {which}: the kernels have first derivatives in reverse mode alone. For others take"
        ' plain torch, as with minimagen_fast.kernels.use_implementation("reference")'
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def nothing_looks(args: tuple) -> bool:
    """Whether nothing traces, transforms or counts operators, and all tensors are torch's own, with values.

    A mode that says of itself that it ``only_records`` what runs anyway does not count.
    """
    if (
        torch.compiler.is_compiling()
        or (torch._C._len_torch_dispatch_stack() and not _all_only_record())
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    ):
        return False
    return all(not isinstance(arg, torch.Tensor) or (type(arg) in _PLAIN and not arg.is_meta) for arg in args)


def _all_only_record() -> bool:
    return all(getattr(mode, "only_records", False) for mode in _get_current_dispatch_mode_stack())


def _needs_gradients(args: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, itself at least 1."""
    return 1 << max(n - 1, 0).bit_length()
