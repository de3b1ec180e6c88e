"""What a program runs on and with, for its records."""

import os
import platform
from typing import Any

import torch

from . import __version__

__all__ = ["machine_facts", "version_facts"]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """The device and what it sits in."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def version_facts(device: torch.device) -> dict[str, str | None]:
    """Versions of what computes; None for what has no part in it."""
    return {
        "minimagen_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
