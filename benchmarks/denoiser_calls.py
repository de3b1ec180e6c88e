"""A call of a network as a case: how it is prepared, checked, and what it must do at least."""

import functools
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from minimagen_fast.kernels import launch

from .denoisers import REFERENCE, TOLERANCE, Network, Variant
from .floors import Floor, convolution_rate, count_flops, floor_of, share_of_matrix_rate
from .parity import relative_distance
from .prepared import Context, Prepared, reference_fits

# What the floor is that of, on any machine.
FUSED = Variant("fused", "triton" if launch.AVAILABLE else "auto")


def prepare(network: Network, variant: Variant, batch: int, direction: str, context: Context) -> Prepared:
    """A call of a network, ready to be checked and timed; used for the ablation, too."""
    device, backward = context.device, direction == "both"
    module = variant.module(network, device)
    inputs = network.inputs(batch, device)
    laid_out = {k: v.contiguous(memory_format=variant.memory_format) if v.ndim == 4 else v for k, v in inputs.items()}
    subject = call_of(variant.compiled(module), laid_out, variant, device, backward)
    flops, floor = demands(network, batch, direction, variant.dtype, context)
    rate = convolution_rate(variant.dtype, device.type == "cuda")
    return Prepared(
        subject,
        lambda result: _wrong(result, network, batch, variant, device, backward),
        steady=not variant.compile,
        count_launches=True,
        bytes=floor.bytes,
        flops=flops,
        floor=floor,
        extra=variant.about(device),
        more=lambda samples: {"mfu": share_of_matrix_rate(flops, median(samples), rate, context.ceilings)},
    )


def call_of(
    module: torch.nn.Module, inputs: dict[str, Any], variant: Variant, device: torch.device, backward: bool
) -> Callable[[int], list[torch.Tensor]]:
    """A function that calls the network and gives its output and, with ``backward``, its parameters' gradients."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def call(_: int) -> list[torch.Tensor]:
        with torch.set_grad_enabled(backward):
            with variant.active(device):
                out = module(**inputs)
            if not backward:
                return [out]
            gradients = torch.autograd.grad(out, parameters, _cotangent(out), allow_unused=True)
        return [out.detach(), *(g for g in gradients if g is not None)]

    return call


def _cotangent(out: torch.Tensor) -> torch.Tensor:
    # Of no particular direction, and the same for all: its values repeat the numbers from -1 to 1.
    return torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)


def _wrong(
    actual: list[torch.Tensor], network: Network, batch: int, variant: Variant, device: torch.device, backward: bool
) -> str | None:
    expected = _expected(network, batch, device, backward)
    if len(actual) != len(expected):
        return f"{len(actual) - 1} gradients instead of {len(expected) - 1}"
    parts = {"output": slice(1), "gradients": slice(1, None)}
    for (what, part), allowed in zip(parts.items(), TOLERANCE[variant.dtype], strict=True):
        distance = relative_distance(actual[part], expected[part])
        if distance > allowed:
            return f"{what} {distance:.2g} away from the reference, {allowed:.2g} is allowed"
    return None


@functools.lru_cache(maxsize=1)
@reference_fits()
def _expected(network: Network, batch: int, device: torch.device, backward: bool) -> list[torch.Tensor]:
    """The reference's results, in main memory: the next variants are compared with the same."""
    call = call_of(REFERENCE.module(network, device), network.inputs(batch, device), REFERENCE, device, backward)
    return [result.cpu() for result in call(0)]


@functools.lru_cache(maxsize=16)
def demands(network: Network, batch: int, direction: str, dtype: torch.dtype, context: Context) -> tuple[int, Floor]:
    """FLOPs by torch's counter over the reference path, and the floor of our path with weights of a dtype."""
    backward = direction == "both"
    meta = torch.device("meta")

    def on_meta(variant: Variant) -> Callable[[], Any]:
        module = variant.module(network, meta).to(dtype)
        inputs = network.inputs(batch, meta, dtype)
        return lambda: call_of(module, inputs, variant, meta, backward)(0)

    return count_flops(on_meta(REFERENCE)), floor_of(on_meta(FUSED), context.ceilings)
