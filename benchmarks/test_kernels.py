"""Every operation of ``minimagen_fast.kernels``, forward and backward, against what one would use instead."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from minimagen_fast.Unet import Base, Super

from .floors import count_flops, family_of, floor_of_operation, rate_name
from .harness import CLOCK, Plan
from .kernel_cases import CASES, Case, unet_cases
from .library_cases import LIBRARY_CASES
from .measure import copies_needed
from .parity import KERNEL_TOLERANCE, difference
from .peers import Run, kernel_variants
from .prepared import Context, Prepared, reference_fits
from .results import Identity

pytestmark = pytest.mark.benchmark(timer=CLOCK)

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
# Dtype and layout of images in which a network runs; on a GPU the first is what one would choose.
CPU_LAYOUTS = ((torch.float32, CONTIGUOUS),)
GPU_LAYOUTS = ((torch.bfloat16, CHANNELS_LAST), (torch.float32, CONTIGUOUS))
ALL_LAYOUTS = (*GPU_LAYOUTS, (torch.bfloat16, CONTIGUOUS), (torch.float32, CHANNELS_LAST))


def _cases(profile: str, device: torch.device) -> list[Case]:
    """What is measured. A GPU is hardly busy with what is small enough for a CPU."""
    every = CASES | LIBRARY_CASES
    cases = {case.name: case for case in every.values() if case.small == (device.type == "cpu")}
    if profile == "smoke":
        return [*_first_of_each_operation(cases.values()).values()]
    if profile == "full" and device.type == "cuda":
        cases = dict(every)
        for batch in (1, 8, 32):
            for unet, side in ((Base, 64), (Super, 256)):
                cases |= {case.name: case for case in unet_cases(unet, side, batch)}
    return [*cases.values()]


def _first_of_each_operation(cases: Iterable[Case]) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for case in cases:
        found.setdefault(case.operation, case)
    return found


@dataclass(frozen=True)
class _Way:
    """How an operation is run: dtype and memory format of its inputs, by whom, and whether as a CUDA graph."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    variant: str
    graph: bool


def _priority(case: Case, way: _Way, first: bool, profile: str, device: torch.device) -> int | None:
    """When a way to run a case has its turn; None if it is left to the profile ``full``, or out."""
    if case.name in LIBRARY_CASES:
        # Last: what they are worth is in the times of networks, too.
        usual = way.variant != "inductor" and (device.type == "cpu" or way.graph and way.dtype == torch.bfloat16)
        return 7 if usual or profile == "full" else None
    if device.type == "cpu":
        if way.variant == "inductor":
            return 3 if first and profile == "cpu" or profile == "full" else None
        return 1
    # What one would choose: replayed, in bfloat16. Compiling takes longest.
    chosen = way.graph and way.dtype == torch.bfloat16
    if way.variant == "inductor":
        priority = 3 if first and chosen else 6
    elif chosen:
        priority = 1
    else:
        priority = 4 if first and way.variant in ("ours", "reference") else 6
    if priority < 6:
        return priority
    return priority if profile == "full" and case.name in CASES else None


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    cases = _cases(profile, device)
    first_ones = _first_of_each_operation(cases)
    for case in cases:
        for dtype, memory_format in _layouts(profile, device, case.images):
            for variant, make in kernel_variants(case, device).items():
                for graph in (True, False) if device.type == "cuda" else (False,):
                    way = _Way(dtype, memory_format, variant, graph)
                    priority = _priority(case, way, case is first_ones[case.operation], profile, device)
                    for direction in ("forward", "backward") if case.backward else ("forward",):
                        if priority is not None:
                            identity = _identity(case, way, direction)
                            yield Plan(identity, _preparer(case, make, dtype, memory_format, direction), priority)


def _layouts(profile: str, device: torch.device, has_images: bool) -> list[tuple[torch.dtype, torch.memory_format]]:
    if device.type == "cpu":
        return [*CPU_LAYOUTS]
    # Without images both formats are the same.
    return [*ALL_LAYOUTS] if profile == "full" and has_images else [*GPU_LAYOUTS]


def _identity(case: Case, way: _Way, direction: str) -> Identity:
    layout = "-channels_last" if case.images and way.memory_format == CHANNELS_LAST else ""
    dtype = str(way.dtype).removeprefix("torch.")
    return Identity("kernels", case.operation, direction, case.shape + layout, dtype, way.variant, way.graph)


def _preparer(
    case: Case, make: Callable[[Case], Run], dtype: torch.dtype, memory_format: torch.memory_format, direction: str
) -> Callable[[Context], Prepared]:
    def prepare(context: Context) -> Prepared:
        run, backward = make(case), direction == "backward"

        def inputs() -> dict[str, Any]:
            return case.inputs(context.device, dtype, memory_format, gradients=backward)

        first = inputs()
        copies = copies_needed(sum(t.nbytes for t in first.values() if t is not None), context.cache_bytes)
        sets = [first, *(inputs() for _ in range(copies - 1))]
        on_meta = case.inputs("meta", dtype, memory_format, gradients=backward)
        out = case.run(on_meta, "reference")
        size = (case.backward if backward else case.forward).bytes(on_meta, out)
        plain = count_flops(_gradients(case, on_meta, out) if backward else lambda: case.run(on_meta, "reference"))
        flops = round(case.share * plain)
        rate = rate_name(dtype, family_of(case.operation), context.ceilings["flops_per_second"])
        # TF32, in which convolutions may be, has the digits of float16.
        tolerance = KERNEL_TOLERANCE[torch.float16 if rate == "tf32" else dtype]

        @reference_fits()
        def wrong(result: Any) -> str | None:
            return difference(result, _expected(case, first, backward), tolerance)

        subject = _backward_subject(case, run, sets) if backward else _forward_subject(run, sets)
        return Prepared(
            subject,
            wrong,
            copies=copies,
            bytes=size,
            flops=flops or None,
            floor=floor_of_operation(size, flops, dtype, family_of(case.operation), context.ceilings),
            extra={"copies_of_inputs": copies, "computes_in": rate},
        )

    return prepare


def _forward_subject(run: Run, sets: list[dict[str, Any]]) -> Callable[[int], Any]:
    def forward(index: int) -> Any:
        with torch.no_grad():
            return run(sets[index])

    return forward


def _backward_subject(case: Case, run: Run, sets: list[dict[str, Any]]) -> Callable[[int], Any]:
    """The forward runs now, and what it keeps stays; every call goes back from there."""
    # A compiled backward would otherwise write into what the forward kept, and could be called once.
    with torch._functorch.config.patch(donated_buffer=False):
        calls = [_gradients(case, inputs, run(inputs)) for inputs in sets]
        calls[0]()
    return lambda index: calls[index]()


def _gradients(case: Case, inputs: dict[str, Any], out: torch.Tensor) -> Callable[[], Any]:
    wanted = [inputs[name] for name in case.gradients if inputs[name] is not None]
    # Copied into the output's layout.
    cotangent = torch.empty_like(out) if out.device.type == "meta" else torch.empty_like(out).copy_(_cotangent(out))
    return lambda: torch.autograd.grad(out, wanted, cotangent, retain_graph=True)


def _cotangent(out: torch.Tensor) -> torch.Tensor:
    """The same for all that have this shape: values that every dtype has."""
    generator = torch.Generator(out.device).manual_seed(2)
    return torch.randn(out.shape, device=out.device, generator=generator).to(torch.bfloat16)


def _expected(case: Case, inputs: dict[str, Any], backward: bool) -> Any:
    """What the reference answers from the same values, in float64 or, for less than float32, in float32."""
    low = any(t is not None and t.dtype in (torch.bfloat16, torch.float16) for t in inputs.values())
    dtype = torch.float32 if low else torch.float64
    exact = {
        name: t if t is None or not t.is_floating_point() else t.detach().to(dtype).requires_grad_(t.requires_grad)
        for name, t in inputs.items()
    }
    if case.by_sample:
        return _expected_by_sample(case, exact, backward)
    out = case.run(exact, implementation="reference")
    return _gradients(case, exact, out)() if backward else out


def _expected_by_sample(case: Case, inputs: dict[str, Any], backward: bool) -> Any:
    """The same with the memory for one sample: plain torch has every query's weight for every key several times."""

    def run(index: int) -> torch.Tensor:
        sample = {name: inputs[name][index : index + 1] for name in case.by_sample}
        return case.run({**inputs, **sample}, implementation="reference")

    samples = range(len(inputs[case.by_sample[0]]))
    with torch.no_grad():
        out = torch.cat([run(index) for index in samples])
    if not backward:
        return out
    wanted, cotangent = [inputs[name] for name in case.gradients], _cotangent(out).to(out.dtype)
    found = [torch.zeros_like(tensor) for tensor in wanted]
    for index in samples:
        gradients = torch.autograd.grad(run(index), wanted, cotangent[index : index + 1])
        for total, gradient in zip(found, gradients, strict=True):
            total += gradient
    return found


def test_kernels(plan, harness, benchmark):
    harness.run(plan, benchmark)
