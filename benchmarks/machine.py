"""What the run ran on and with: device, driver, clocks, versions, commit."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import minimagen_fast

ROOT = Path(__file__).resolve().parent.parent
# Where the system does not say how large the last cache is.
DEFAULT_CACHE_BYTES = 32 * 2**20


def machine_info(device: torch.device) -> dict[str, Any]:
    """The device and what it sits in, for the result file."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    common = {"type": device.type, "threads": torch.get_num_threads(), "cores": cores}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": properties.name,
            **common,
            "memory_gib": properties.total_memory / 2**30,
            **_driver_and_clocks(str(properties.uuid)),
            "capability": [properties.major, properties.minor],
        }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": _processor(),
        **common,
        "memory_gib": memory / 2**30,
        "driver": None,
        "clocks": None,
        "capability": None,
    }


def software_info() -> dict[str, Any]:
    """Versions and commit, for the result file."""
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "minimagen_fast": minimagen_fast.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def device_slug(machine: dict[str, Any]) -> str:
    """Name of the folder for a machine's results."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return slug if machine["type"] == "cuda" else f"{slug}-{machine['threads']}-threads"


def cache_bytes(device: torch.device) -> int:
    """Size of the largest cache between the device and its memory: the L2 of a GPU, the last level of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if re.fullmatch(r"\d+[KM]", text := file.read_text().strip())
    ]
    return max(sizes, default=DEFAULT_CACHE_BYTES)


def _processor() -> str:
    """Its name, and the numbers of its generation: virtual machines call processors of several generations alike."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name, family, model = (
        found[1].strip() if (found := re.search(rf"^{field}\s*:\s*(.+)$", text, re.M)) else None
        for field in ("model name", "cpu family", "model")
    )
    if name is None:
        return platform.processor() or platform.machine()
    return name if family is None or model is None else f"{name} (family {family}, model {model})"


def _driver_and_clocks(uuid: str) -> dict[str, Any]:
    fields = {
        "driver_version": "driver",
        "clocks.sm": "sm_mhz",
        "clocks.max.sm": "sm_max_mhz",
        "clocks.mem": "memory_mhz",
        "power.limit": "power_limit_w",
    }
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    values = _output("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    words = (values or "").split(", ")
    if len(words) != len(fields):
        return {"driver": None, "clocks": None}
    named = dict(zip(fields.values(), words, strict=True))
    driver = named.pop("driver")
    numbers = {name: float(word) for name, word in named.items() if re.fullmatch(r"[\d.]+", word)}
    return {"driver": driver, "clocks": numbers or None}


def _git(*words: str) -> str | None:
    return _output("git", "-C", str(ROOT), *words) if (ROOT / ".git").exists() else None


def _output(program: str, *words: str) -> str | None:
    """What a program prints, or None if it is not there or fails."""
    if not shutil.which(program):
        return None
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
