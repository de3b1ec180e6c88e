"""What the kernels' launches compile to, known without a card: the builds of the ahead-of-time table.

Launches are enumerated by running the operations forward and backward on meta tensors, see ``kernels.launch.record``:
what they would launch on an A100, an H200 and a B200. Those of one kernel that Triton compiles alike are one
:class:`Build`.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from minimagen_fast.kernels import launch
from minimagen_fast.Unet import ATTN_DIM_HEAD, Base, BaseTest, Super, SuperTest

from .kernel_cases import Case, attention_cases, unet_cases

TARGETS = {80: launch.A100, 90: launch.H200, 100: launch.B200}
UNETS = (Base, Super, BaseTest, SuperTest)
DTYPES = (torch.bfloat16, torch.float32)
FORMATS = (torch.channels_last, torch.contiguous_format)
# What a kernel is known by on a target: its name and the target's.
Kind = tuple[str, str]
# And one of its rows: kernel, configuration, target.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Build:
    """What Triton compiles once: a kernel, specialised as its just-in-time compiler does it for a launch.

    Attributes:
        module: Where the kernel is defined.
        kernel: Its name there.
        signature: Its parameters' names and types.
        constexprs: Values of those that are constants, by position.
        aligned: Positions of numbers and addresses that are known to be multiples of 16.
        num_warps: Warps of a program.
        num_stages: Stages of its software pipeline.
        capability: Compute capability as one number: 80, 90, 100.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[tuple[int, ...], Any], ...]
    aligned: tuple[tuple[int, ...], ...]
    num_warps: int
    num_stages: int
    capability: int

    @property
    def config(self) -> str:
        """All that sets it apart from other builds of the kernel, for people to read."""
        constants = dict(self.constexprs)
        types, names = [], []
        for position, (name, kind) in enumerate(self.signature):
            if kind != "constexpr":
                known = (position,) in self.aligned or kind in ("fp32", "u1")
                types.append(kind.removeprefix("*") + ("" if known else "?"))
            elif name.isupper():
                names.append(f"{name}={constants[(position,)]}")
            else:
                types.append(str(constants[(position,)]))
        return f"{' '.join(types)}; {' '.join(names)}; {self.num_warps} warps, {self.num_stages} stages"

    @property
    def head_width(self) -> int | None:
        """In kernels of attention, where it is a constant."""
        names = [name for name, _ in self.signature]
        return dict(self.constexprs)[(names.index("D"),)] if "D" in names else None

    @property
    def key(self) -> Key:
        """That of its row."""
        return f"{self.module.rpartition('.')[2]}.{self.kernel}", self.config, f"sm_{self.capability}"


def specialise(recorded: launch.Launch, capability: int) -> Build:
    """The build that a launch needs on a card."""
    kernel = recorded.kernel
    options = {"num_warps": recorded.num_warps, "num_stages": recorded.num_stages}
    bound, specialization, _ = _binder(kernel, capability)(*recorded.args, **recorded.constexprs, **options)
    # What the rest depends on: numbers and tensors count only for their types.
    constants = tuple((type(value), value) for value in recorded.constexprs.values())
    key = kernel, capability, constants, tuple(recorded.constexprs), *options.values(), tuple(specialization)
    build = _builds.get(key)
    if build is None:
        keywords = {**recorded.constexprs, **options}
        packed = kernel._pack_args(_backend(capability), keywords, bound, specialization, options)
        _, signature, constexprs, attributes = packed
        build = _builds[key] = Build(
            kernel.fn.__module__,
            kernel.fn.__qualname__,
            tuple(signature.items()),
            tuple(constexprs.items()),
            tuple(position for position, attribute in attributes.items() if attribute),
            recorded.num_warps,
            recorded.num_stages,
            capability,
        )
    return build


_builds: dict[tuple, Build] = {}


@functools.cache
def _backend(capability: int):
    return make_backend(GPUTarget("cuda", capability, 32))


@functools.cache
def _binder(kernel, capability: int):
    # The two steps of triton's JITFunction.run that decide what it compiles, both private: a binder from arguments to
    # (values by name, (type, attribute) of each, options), and _pack_args, which sorts these into what ASTSource takes.
    # They are the same in triton 3.6 and 3.7.
    return create_function_from_signature(kernel.signature, kernel.params, _backend(capability))


def launches(
    case: Case,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    card: launch.Target,
    *,
    converted: bool = False,
):
    """What a case launches on a card, backward included; ``converted`` with its parameters in ``dtype``.

    A U-Net is sampled from a converted copy, and may be trained as one; under autocast its parameters stay float32.
    """
    parameters = dtype if converted else torch.float32
    inputs = _meta_inputs(case, dtype, memory_format, parameters)
    wanted = [inputs[name] for name in case.gradients]
    with launch.record(card) as recorded:
        for implementation in ("triton", *(case.libraries if dtype != torch.float32 else ())):
            out = case.run(inputs, implementation)
            if wanted:
                # Any tensor of its shape and strides; making one costs more.
                torch.autograd.grad(out, wanted, out.detach())
    return recorded


# The same for all cards.
@functools.lru_cache(maxsize=1)
def _meta_inputs(case: Case, dtype: torch.dtype, memory_format: torch.memory_format, parameters: torch.dtype):
    return case.inputs("meta", dtype, memory_format, parameters=parameters, gradients=True)


def _cases(sizes: Iterable[tuple[int, int]]) -> Iterator[tuple[Case, bool]]:
    """Every case once, with whether 16-byte accesses are due."""
    cases: dict[str, tuple[Case, bool]] = {}
    for side, batch in sizes:
        found = [(case, unet in (Base, Super)) for unet in UNETS for case in unet_cases(unet, side, batch)]
        for case, wide in [*found, *((case, True) for case in attention_cases(side, batch))]:
            cases[case.name] = case, wide or cases.get(case.name, (case, False))[1]
    yield from cases.values()


def enumerate_builds(
    sizes: Iterable[tuple[int, int]],
    *,
    dtypes: Iterable[torch.dtype] = DTYPES,
    targets: Iterable[int] = TARGETS,
) -> dict[Build, bool]:
    """All builds for square images of these sides, in batches of these sizes, each once, in a fixed order.

    Each with whether 16-byte accesses are due: not if only the Test U-Nets need it, whose images have 8 channels, nor
    for images of less than 8x8 pixels, nor in NCHW memory for a number of pixels that is no multiple of 16.
    """
    builds: dict[Build, bool] = {}
    for case, wide in _cases(sizes):
        first, *_ = case.inputs("meta", torch.float32).values()
        pixels = first.shape[2:].numel() if case.images else None
        formats = FORMATS if case.images else FORMATS[:1]
        ways = itertools.product(dtypes, (False, True), formats, targets)
        for dtype, converted, memory_format, capability in ways:
            if dtype == torch.float32 and (case.half_only or converted) or converted and not case.converted:
                continue
            aligned = memory_format == torch.channels_last or pixels % 16 == 0
            due = wide and (not case.images or (pixels >= 64 and aligned))
            for recorded in launches(case, dtype, memory_format, TARGETS[capability], converted=converted):
                build = specialise(recorded, capability)
                builds[build] = builds.get(build, False) or due
    return builds


def representatives(builds: dict[Build, bool], each: int = 2) -> list[Build]:
    """Of every kernel, dtype, target and head width, those of the smallest tiles and of the largest, ``each`` in all.

    Only the largest of builds in float32, of those where 16-byte accesses are not due, and of head widths that no
    built-in U-Net has.
    """
    kinds: dict[tuple, list[Build]] = {}
    for build, wide in builds.items():
        kind = (build.module, build.kernel, build.capability, build.signature[0][1], build.head_width, wide)
        kinds.setdefault(kind, []).append(build)
    chosen = []
    for kind in kinds.values():
        kind.sort(key=lambda build: (_volume(build), build.num_warps, build.config))
        last = len(kind) - 1
        usual = (
            builds[kind[0]] and kind[0].head_width in (None, ATTN_DIM_HEAD) and "fp32" not in kind[0].signature[0][1]
        )
        number = min(each, len(kind)) if usual else 1
        chosen += [kind[last - round(i * last / max(number - 1, 1))] for i in reversed(range(number))]
    return chosen


def _volume(build: Build) -> int:
    """Elements of a tile per thread, up to a factor that is the same for all builds of a kernel."""
    volume = 1
    for position, value in build.constexprs:
        if build.signature[position[0]][0].isupper() and type(value) is int and value > 0:
            volume *= value
    return volume // build.num_warps
