"""``minimagen-fast doctor``: what is installed, what can be used, and why not."""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    import torch

# Whatever else is needed is imported where it is: the doctor is called when something is missing.

REQUIRED = (
    "torch",
    *(("triton",) if platform.system() == "Linux" else ()),
    "transformers",
    "sentencepiece",
    "protobuf",
    "einops",
    "pillow",
    "tqdm",
    "numpy",
    "safetensors",
    "huggingface_hub",
)
OPTIONAL = {
    "datasets": "Parquet, Arrow and saved data, streams, Conceptual Captions; pip install 'minimagen_fast[data]'",
    "xformers": "its attention, on CUDA; pip install 'minimagen_fast[xformers]'",
    "matplotlib": "plots of reports; pip install 'minimagen_fast[report]'",
    "tensorboard": "train --TENSORBOARD; pip install 'minimagen_fast[tensorboard]'",
    "pytest": "the tests; pip install 'minimagen_fast[test]'",
    "pytest-benchmark": "benchmarks; pip install 'minimagen_fast[bench]'",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def diagnosis() -> str:
    """A report of several lines; each thing that cannot be used is given with the reason."""
    lines = [f"minimagen_fast {__version__}, Python {platform.python_version()}, {platform.platform()}", ""]
    lines += ["Packages"]
    for package in REQUIRED:
        lines.append(f"  {package:18} {_version(package) or 'MISSING: pip install ' + package}")
    for package, purpose in OPTIONAL.items():
        lines.append(f"  {package:18} {_version(package) or f'not installed (needed for {purpose})'}")
    for section in (_devices, _kernels, _acceleration, _text_encoders):
        lines += _or_why_not(section)
    return "\n".join(lines)


def _or_why_not(section: Callable[[], list[str]]) -> list[str]:
    try:
        return section()
    except (ImportError, ValueError) as error:  # what a variable of the environment asks for may be none of the choices
        name = section.__name__.strip("_").replace("_", " ").capitalize()
        return ["", f"{name}: cannot be looked into: {error}"]


def _devices() -> list[str]:
    import torch

    cpu = f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return ["", "Devices", cpu, *(f"  {line}" for line in _cuda())]


def _kernels() -> list[str]:
    from .kernels import dispatch, implementation

    asked, choices = os.environ.get(dispatch.ENVIRONMENT_VARIABLE), ", ".join(dispatch.CHOICES)
    return ["", f"Kernels: {implementation()} (of {choices}); {dispatch.ENVIRONMENT_VARIABLE}: {asked or 'not set'}"]


def _acceleration() -> list[str]:
    import torch

    from .acceleration import ENVIRONMENT_VARIABLE

    asked = os.environ.get(ENVIRONMENT_VARIABLE, "")
    lines = ["", f"{ENVIRONMENT_VARIABLE}: {repr(asked) if asked else 'not set, every setting is automatic'}"]
    for name in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        lines += ["", f"Acceleration of a float32 model on {name}"]
        lines += [f"  {line}" for line in _settings(torch.device(name))]
    return lines


def _settings(device: "torch.device") -> list[str]:
    """Every setting with its reason; or why no model can be run there."""
    import torch

    from .acceleration import resolve

    try:
        return str(resolve({}, device, torch.float32)).splitlines()
    except ValueError as error:
        return [f"none, models there raise an error: {error}"]


def _cuda() -> list[str]:
    import torch

    if not torch.backends.cuda.is_built():
        return ["cuda: not available, this torch was built without it"]
    if not torch.cuda.is_available():
        return ["cuda: not available, no device or driver was found"]
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory, capability = f"{device.total_memory / 2**30:.0f} GiB", f"{device.major}.{device.minor}"
        found.append(f"cuda:{index}: {device.name}, {memory}, capability {capability}")
    return found


def _text_encoders() -> list[str]:
    from .t5 import T5_VERSIONS
    from .tiny_t5 import embedded_t5_directory

    lines = ["", "Text encoders"]
    try:
        lines.append(f"  t5_tiny: {embedded_t5_directory()}")
    except (OSError, ImportError) as error:
        lines.append(f"  t5_tiny: cannot be built: {error}")
    for name, entry in T5_VERSIONS.items():
        where = "in the cache" if _is_cached(entry["handle"]) else "not in the cache, will be fetched"
        lines.append(f"  {name}: {where}")
    return lines


def _is_cached(handle: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    # Answers with the path of a cached file, or something that is no string.
    return isinstance(try_to_load_from_cache(handle, "config.json"), str)
