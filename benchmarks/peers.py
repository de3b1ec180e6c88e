"""What we are compared with: the original package, and other implementations of our operations."""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .kernel_cases import Case
from .prepared import Unavailable

# What must be importable of a package that is more than one module.
MODULE = {"minimagen": "minimagen.Imagen"}
INSTALL = {
    "minimagen": "the reference path of minimagen_fast stands for it; it pins torch 1.12, so: pip install torchvision"
    " and pip install --no-deps minimagen einops-exts resize-right",
    "xformers": "pip install 'minimagen_fast[xformers]'",
    "liger_kernel": "pip install liger-kernel",
}


@functools.cache
def why_not(package: str) -> str | None:
    """Why a package cannot be imported; None if it can."""
    try:
        importlib.import_module(MODULE.get(package, package))
    except Exception as error:  # a broken installation raises anything, and must not end the run
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        return f"not installed: {INSTALL[package]}" if missing else f"its import fails: {type(error).__name__}: {error}"
    return None


def missing_peers() -> list[tuple[str, str]]:
    """The packages that we would be compared with and that are not here, each with the reason."""
    return [(f"peer {package}", reason) for package in INSTALL if (reason := why_not(package))]


def peer_versions() -> dict[str, str | None]:
    """The version of each of them, None if it cannot be used."""
    return {package: _usable_version(package) for package in INSTALL}


def original_package() -> str | None:
    """The version of the original package, None if it cannot be used."""
    return _usable_version("minimagen")


def _usable_version(package: str) -> str | None:
    if why_not(package):
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


Run = Callable[[dict[str, Any]], Any]


def kernel_variants(case: Case, device: torch.device) -> dict[str, Callable[[Case], Run]]:
    """The ways to run an operation, by name; each makes a function of the inputs or raises :class:`Unavailable`."""
    variants: dict[str, Callable[[Case], Run]] = {"ours": _choice("auto"), "reference": _choice("reference")}
    if case.operation == "null_key_attention":
        variants |= _attention(device)
    if case.operation == "group_norm_silu" and device.type == "cuda" and "skip" not in case.shape:
        variants["liger"] = _liger
    variants["inductor"] = _inductor
    return variants


def _choice(implementation: str) -> Callable[[Case], Run]:
    def make(case: Case) -> Run:
        return lambda inputs: case.run(inputs, implementation=implementation)

    return make


def _attention(device: torch.device) -> dict[str, Callable[[Case], Run]]:
    if device.type != "cuda":
        return {"sdpa": _choice("sdpa")}
    from torch.nn.attention import SDPBackend

    backends = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    return {
        **{f"sdpa:{name}": _sdpa(getattr(SDPBackend, member)) for name, member in backends.items()},
        "sdpa_merge": _refusable("sdpa_merge"),
        "triton": _refusable("triton"),
        "xformers": _refusable("xformers"),
    }


def _refusable(implementation: str) -> Callable[[Case], Run]:
    """A choice of attention that cannot do every job: it says so with a ValueError."""
    plain = _choice(implementation)

    def make(case: Case) -> Run:
        run = plain(case)

        def checked(inputs: dict[str, Any]) -> Any:
            try:
                return run(inputs)
            except ValueError as error:
                raise Unavailable(str(error)) from error

        return checked

    return make


def refused_by_sdpa(error: BaseException) -> bool:
    """Whether it says that a backend of SDPA does not take its inputs.

    Torch says so itself, or cuDNN does, which torch asks only when it runs.
    """
    return any(words in str(error) for words in ("No available kernel", "cuDNN Frontend error"))


def _sdpa(backend) -> Callable[[Case], Run]:
    from torch.nn.attention import sdpa_kernel

    plain = _choice("sdpa")

    def make(case: Case) -> Run:
        run = plain(case)

        def within(inputs: dict[str, Any]) -> Any:
            with sdpa_kernel(backend):
                try:
                    return run(inputs)
                except RuntimeError as error:
                    if not refused_by_sdpa(error):
                        raise
                    raise Unavailable(f"this SDPA backend does not take these inputs: {error}") from error

        return within

    return make


def _inductor(case: Case) -> Run:
    # Otherwise earlier cases count towards the number of recompilations after which Dynamo gives up, silently.
    torch._dynamo.reset()
    return torch.compile(lambda inputs: case.run(inputs, implementation="reference"))


def _liger(case: Case) -> Run:
    if reason := why_not("liger_kernel"):
        raise Unavailable(f"liger_kernel: {reason}")
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    groups = case.options["groups"]

    def run(inputs: dict[str, Any]) -> torch.Tensor:
        x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
        b, c, h, w = x.shape
        # It wants (batch, channels, pixels) and parameters of the images' dtype, and normalises only.
        out = LigerGroupNormFunction.apply(
            x.contiguous().reshape(b, c, h * w), weight.to(x.dtype), bias.to(x.dtype), c, groups, 1e-5
        ).reshape(b, c, h, w)
        if inputs.get("scale") is not None:
            out = out * (inputs["scale"][:, :, None, None] + 1) + inputs["shift"][:, :, None, None]
        return F.silu(out)

    return run
