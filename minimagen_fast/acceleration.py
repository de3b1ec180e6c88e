"""How a model is run: one small configuration, taken from its device, that changes speed and never a saved file.

Every setting is ``auto`` until someone says otherwise: in a call of :meth:`.Imagen.accelerate`, or for all models in
the environment variable ``MINIMAGEN_FAST_ACCELERATION`` (``reference``, or settings like ``precision=float32`` and
``checkpoint_levels=0+1``, with commas between them), which counts less. What ``auto`` comes to, and why, is settled
anew for every use, since a model can be moved. What was asked for by name and cannot be had is an error.
"""

import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from . import host_memory
from .blocks import use_blocks
from .kernels import dispatch, launch, null_key_merge
from .kernels.arguments import has_autocast
from .kernels.attention import xformers_reasons

ENVIRONMENT_VARIABLE = "MINIMAGEN_FAST_ACCELERATION"

CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("weights", "float32", "bfloat16"),
    "memory_format": ("contiguous", "channels_last"),
    "kernels": ("auto", "triton", "reference"),
    "attention": ("auto", "triton", "sdpa", "sdpa_merge", "xformers", "reference"),
    "compile": ("off", "blocks"),
    "cuda_graphs": ("off", "on"),
    "recorded_steps": ("off", "on"),
    "condition_cache": ("off", "on"),
    "freed_memory": ("returned", "kept"),
}
# Of CUDA devices for which torch.compile writes code.
_OLDEST_COMPILED = (7, 0)
# The reasons of a setting that someone has chosen, in a call or for all models.
ASKED_FOR = "asked for"
ASKED_FOR_IN_ENVIRONMENT = f"asked for in {ENVIRONMENT_VARIABLE}"
REFERENCE: dict[str, Any] = {
    "precision": "weights",
    "memory_format": "contiguous",
    "kernels": "reference",
    "attention": "reference",
    "compile": "off",
    "cuda_graphs": "off",
    "recorded_steps": "off",
    "condition_cache": "off",
    "freed_memory": "returned",
    "checkpoint_levels": (),
}


@dataclass(frozen=True)
class Acceleration:
    """How a model is run on a device.

    Attributes:
        precision: What most is computed in. Where it is ``bfloat16`` and the weights are float32, sampling uses a
            bfloat16 copy of them and training runs under autocast. ``weights`` asks for that of the weights. Where
            the caller has autocast in force, that counts, even if ``float32`` is asked for here: it is said closer to
            the call.
        memory_format: How images lie in memory.
        kernels: What :func:`.kernels.use_implementation` is told; with ``auto`` what is in force stays so.
        attention: The same for attention.
        compile: ``blocks`` if the U-Net's blocks run through torch.compile; but a block in which a module has hooks, or
            another ``forward`` than its class was made with, is called as it is, and so are all while torch has hooks
            for all modules. Hooks of the block itself are called around it.
        cuda_graphs: ``on`` if a step of sampling is captured and replayed, :mod:`.sampled_steps` says when it is
            captured anew; and if both passes of a step of training are, where :mod:`.captured_training` says that they
            may.
        recorded_steps: ``on`` if a step runs from a recording of its operators, without the Python that called for
            them: one of training where :mod:`.captured_training` says that it may, one of sampling where
            :mod:`.sampled_steps` does.
        condition_cache: ``on`` if what the steps of a sampling share is computed once, and guidance takes one call of
            the U-Net a step, not two.
        freed_memory: ``kept`` if main memory that is freed stays with the process, for the next tensors, from the first
            use of the model on. See :mod:`.host_memory`.
        checkpoint_levels: Levels of the U-Nets, 0 the one of the highest resolution, that in training keep less and
            compute it again.
        reasons: For each setting why it is what it is.
    """

    precision: str
    memory_format: str
    kernels: str
    attention: str
    compile: str
    cuda_graphs: str
    recorded_steps: str
    condition_cache: str
    freed_memory: str
    checkpoint_levels: tuple[int, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def asks_for(self, name: str) -> bool:
        """Whether someone has chosen this setting, in a call or in the environment."""
        return self.reasons.get(name) in (ASKED_FOR, ASKED_FOR_IN_ENVIRONMENT)

    def interprets_triton(self) -> bool:
        """Whether a step on a CPU runs in Triton's interpreter, by this or by what is in force: a recorder sees nothing
        of that.
        """
        in_force = dispatch.implementation(), dispatch.attention_override(None)
        return "triton" in (self.kernels, self.attention, *in_force)

    @property
    def dtype(self) -> torch.dtype:
        """The precision as torch has it."""
        return getattr(torch, self.precision)

    @property
    def layout(self) -> torch.memory_format:
        """The memory format as torch has it."""
        return torch.channels_last if self.memory_format == "channels_last" else torch.contiguous_format

    @contextmanager
    def active(self) -> Iterator[None]:
        """Have kernels chosen and blocks run in this way, for a block of code."""
        # Not taken back afterwards: the backward pass of a training comes outside.
        host_memory.keep_freed(self.freed_memory == "kept")
        with ExitStack() as stack:
            if self.kernels != "auto":
                stack.enter_context(dispatch.use_implementation(self.kernels))
            if self.attention != "auto":
                stack.enter_context(dispatch.use_attention(self.attention))
            stack.enter_context(use_blocks(compiled=self.compile == "blocks", checkpoint_levels=self.checkpoint_levels))
            yield

    @contextmanager
    def training(self, device: torch.device, weights: torch.dtype) -> Iterator[None]:
        """What :meth:`active` does, and autocast where the precision calls for it and none is in force already."""
        with ExitStack() as stack:
            stack.enter_context(self.active())
            if self.dtype != weights and autocast_dtype(device) is None:
                stack.enter_context(torch.autocast(device.type, self.dtype))
            yield

    def __str__(self) -> str:
        shown = [entry.name for entry in fields(self) if entry.name != "reasons"]
        return "\n".join(
            f"{name:18} {getattr(self, name)!s:14} {self.reasons.get(name, '')}".rstrip() for name in shown
        )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None where it is not in force."""
    if not has_autocast(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def checked_request(preset: str = "auto", **settings: Any) -> dict[str, Any]:
    """What is asked for.

    Args:
        preset: ``auto``, or ``reference`` for plain torch throughout, which ``settings`` then change.
        settings: See :class:`Acceleration`; ``auto`` for one that the device shall decide, whatever the preset or the
            environment variable says.

    Raises:
        TypeError, ValueError: for an unknown preset, setting or value.
    """
    if preset not in ("auto", "reference"):
        raise ValueError(f"preset must be 'auto' or 'reference', got {preset!r}")
    request: dict[str, Any] = dict(REFERENCE) if preset == "reference" else {}
    for name, value in settings.items():
        if name == "checkpoint_levels":
            request[name] = value if value == "auto" else _checked_levels(value)
        elif name not in CHOICES:
            raise TypeError(f"there is no setting {name!r}; there are {', '.join(CHOICES)}, checkpoint_levels")
        elif value not in ("auto", *CHOICES[name]):
            raise ValueError(f"{name} must be auto or one of {', '.join(CHOICES[name])}; got {value!r}")
        else:
            request[name] = value
    return request


def _checked_levels(levels: Any) -> tuple[int, ...]:
    if not isinstance(levels, list | tuple) or not all(type(level) is int and level >= 0 for level in levels):
        raise TypeError(f"checkpoint_levels must be auto or a list of levels, numbered from 0; got {levels!r}")
    return tuple(levels)


def environment_request() -> dict[str, Any]:
    """What the environment variable asks for.

    Raises:
        ValueError: if it cannot be read.
    """
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    preset, settings = "auto", dict[str, Any]()
    for word in text.replace(",", " ").split():
        name, equals, value = word.partition("=")
        if equals and name == "checkpoint_levels" and value != "auto":
            settings[name] = [int(level) if level.isdecimal() else level for level in value.split("+")]
        elif equals:
            settings[name] = value
        else:
            preset = name
    try:
        return checked_request(preset, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the environment variable {ENVIRONMENT_VARIABLE} is {text!r}: {error}") from error


def resolve(
    request: Mapping[str, Any], device: torch.device, weights: torch.dtype, *, deepest: int | None = None
) -> Acceleration:
    """What a request comes to on a device, for a model whose weights are of this dtype.

    Args:
        request: See :func:`checked_request`; what it leaves open the environment variable may say.
        device: Where the model is.
        weights: Dtype of its weights.
        deepest: The deepest level of its U-Nets, if there is a model.

    Raises:
        ValueError: if what is asked for by name cannot be had there, or the environment variable cannot be read.
    """
    environment = environment_request()
    asked = {name: value for name, value in {**environment, **request}.items() if value != "auto"}

    def source(name: str) -> str:
        return "" if name in request else f"the environment variable {ENVIRONMENT_VARIABLE}: "

    values, reasons = {}, {}
    for name in CHOICES:
        automatic, reasons[name] = _AUTOMATIC[name](device, weights)
        values[name] = asked.get(name, automatic)
    if values["precision"] == "weights":
        values["precision"] = _name(weights)
    dtype = getattr(torch, values["precision"])
    for name in CHOICES:
        if name in asked and (obstacle := _obstacle(name, asked[name], device, weights, dtype)):
            raise ValueError(
                f"{source(name)}{name}={asked[name]!r} cannot be had: {obstacle}; choose 'auto', or another value"
            )
    if values["cuda_graphs"] == "on" and values["condition_cache"] == "off":
        if "cuda_graphs" in asked:
            raise ValueError(
                f"{source('cuda_graphs')}cuda_graphs='on' cannot be had: it needs condition_cache='on'; choose 'auto'"
            )
        values["cuda_graphs"], reasons["cuda_graphs"] = "off", "it needs the condition cache"
    levels = asked.get("checkpoint_levels", ())
    if deepest is not None and (wrong := [level for level in levels if level > deepest]):
        raise ValueError(
            f"{source('checkpoint_levels')}checkpoint_levels must lie in 0 to {deepest}, the U-Nets' middle;"
            f" got {wrong}"
        )
    if values["recorded_steps"] == "on" and (values["compile"] == "blocks" or levels):
        needs = "it needs compile='off' and no checkpoint_levels"
        if "recorded_steps" in asked:
            raise ValueError(f"{source('recorded_steps')}recorded_steps='on' cannot be had: {needs}; choose 'auto'")
        values["recorded_steps"], reasons["recorded_steps"] = "off", needs
    reasons["checkpoint_levels"] = "nothing is computed twice"
    for name in asked:
        reasons[name] = ASKED_FOR if name in request else ASKED_FOR_IN_ENVIRONMENT
    return Acceleration(**values, checkpoint_levels=levels, reasons=reasons)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _precision(device: torch.device, weights: torch.dtype) -> tuple[str, str]:
    if weights != torch.float32:
        return _name(weights), "the dtype of the weights"
    if device.type != "cuda":
        return "float32", "bfloat16 is only chosen on CUDA; on request, elsewhere"
    if launch.capability(device) < dispatch.OLDEST_CAPABILITY:
        return "float32", f"{device} has no tensor cores for bfloat16"
    return "bfloat16", "the tensor cores are fastest with it"


def _memory_format(device: torch.device, weights: torch.dtype) -> tuple[str, str]:
    if device.type == "cuda":
        return "channels_last", "what the tensor cores' convolutions read"
    if device.type == "cpu":
        return "channels_last", "what the fastest convolutions read"
    return "contiguous", f"nothing is known of {device.type} devices"


def _compile(device: torch.device, weights: torch.dtype) -> tuple[str, str]:
    if device.type != "cuda":
        return "off", "it takes minutes, which only long runs pay back; on request"
    if obstacle := _no_compiler(device):
        return "off", obstacle
    return "blocks", "fewer launches for what lies between our kernels and the convolutions"


def _freed_memory(device: torch.device, weights: torch.dtype) -> tuple[str, str]:
    if device.type != "cpu":
        return "returned", "only for CPUs"
    if obstacle := host_memory.obstacle():
        return "returned", obstacle
    but = f"; but {limit}" if (limit := host_memory.limit()) else ""
    return "kept", f"the system would fill the same pages with zeros in every step{but}"


def _cuda_graphs(device: torch.device, weights: torch.dtype) -> tuple[str, str]:
    if device.type != "cuda":
        return "off", "only for CUDA"
    return "on", "a replayed step does not wait for the host"


def _recorded_steps(device: torch.device, weights: torch.dtype) -> tuple[str, str]:
    if device.type != "cpu":
        return "off", "only for CPUs"
    return "on", "a good part of a short step is Python"


_AUTOMATIC = {
    "precision": _precision,
    "memory_format": _memory_format,
    "kernels": lambda device, weights: ("auto", "the fastest that can do the job"),
    "attention": lambda device, weights: ("auto", "the fastest that can do the job"),
    "compile": _compile,
    "cuda_graphs": _cuda_graphs,
    "recorded_steps": _recorded_steps,
    "condition_cache": lambda device, weights: ("on", "text and timesteps are worked on once"),
    "freed_memory": _freed_memory,
}


def _obstacle(name: str, value: str, device: torch.device, weights: torch.dtype, dtype: torch.dtype) -> str | None:
    """Why a setting cannot have a value, where the precision comes to ``dtype``."""
    if name == "precision" and value not in ("weights", _name(weights)) and weights != torch.float32:
        return f"the weights are {weights}; convert the model with .float() for other precisions"
    if name in ("kernels", "attention") and value == "triton":
        return "; ".join(dispatch.triton_reasons(torch.empty(0, device=device, dtype=dtype)))
    if name == "attention" and value == "sdpa_merge":
        return "; ".join(null_key_merge.dtype_reasons(device, dtype))
    if name == "attention" and value == "xformers":
        return "; ".join(xformers_reasons(torch.empty(0, device=device, dtype=dtype)))
    if name == "cuda_graphs" and value == "on" and device.type != "cuda":
        return f"the model is on {device}, not on a CUDA device"
    if name == "recorded_steps" and value == "on" and device.type != "cpu":
        return f"the model is on {device}, not on a CPU"
    if name == "compile" and value == "blocks":
        return _no_compiler(device)
    if name == "freed_memory" and value == "kept":
        return host_memory.obstacle()
    return None


@functools.cache
def _no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot be used on a device."""
    if device.type == "cuda":
        if missing := launch.missing():
            return f"torch.compile needs triton there, and {missing}"
        if (capability := launch.capability(device)) < _OLDEST_COMPILED:
            return f"torch.compile needs compute capability {_OLDEST_COMPILED} there, and {device} has {capability}"
        return None
    if device.type == "cpu":
        compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "cl"))), None)
        return None if compiler else "torch.compile needs a C++ compiler there, and none was found"
    return None
