"""What one waits for before the first result: imports, and compiling; each in a process of its own."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .denoisers import BLOCKS_SECONDS
from .harness import CLOCK, Plan
from .machine import ROOT
from .prepared import Context, Prepared, Unavailable
from .results import Identity

pytestmark = pytest.mark.benchmark(timer=CLOCK)

IMPORTS = {"torch": "import torch", "ours": "from minimagen_fast.Imagen import Imagen"}
# The first step of sampling in a fresh process, the time of which it prints: with what is compiled for it.
FIRST_STEP = """
import sys, torch
from benchmarks.denoisers import NETWORKS
from benchmarks.imagens import ImagenVariant
from benchmarks.sampling_steps import first_step_seconds
variant = ImagenVariant("bfloat16", settings={"precision": "bfloat16", "compile": sys.argv[2]})
print(first_step_seconds(NETWORKS[sys.argv[1]], variant, torch.device(sys.argv[3])))
"""
# How blocks are run, and what the compilers' caches hold.
VARIANTS = ("off", "blocks-cold", "blocks-warm")
# The first in every profile but smoke, the others in full: each is compiled anew.
NAMES = {"cpu": ("tiny-base@16", "cpu-base@64", "Base@64", "Super@256"), "cuda": ("Base@64", "Super@256")}
IMPORT_ROUNDS = {"smoke": 1}
TIMEOUT = 3600


def plans(profile: str, device: torch.device) -> Iterator[Plan]:
    for variant in IMPORTS:
        identity = Identity("startup", "import", None, "process", "float32", variant)
        yield Plan(identity, functools.partial(_prepare_import, variant), 2)
    if profile == "smoke":
        return
    names = NAMES[device.type]
    for name in names if profile == "full" else names[:1]:
        for variant in VARIANTS:
            identity = Identity("startup", "first-step", None, f"{name}-b1", "float32", variant)
            seconds = BLOCKS_SECONDS[device.type] if variant == "blocks-cold" else 0.0
            yield Plan(identity, functools.partial(_prepare_first_step, name, variant), 6, seconds)


def _prepare_import(variant: str, context: Context) -> Prepared:
    code = f"import time; started = time.perf_counter(); {IMPORTS[variant]}; print(time.perf_counter() - started)"
    # Once before: the files are in the system's cache then, and their bytecode is compiled.
    _seconds(code)
    return Prepared(
        None, lambda _: None, sample=lambda: _seconds(code), rounds=IMPORT_ROUNDS.get(context.profile.name, 5)
    )


def _prepare_first_step(name: str, variant: str, context: Context) -> Prepared:
    way, _, cache = variant.partition("-")
    # What compiling leaves is what a warm start finds: one folder for both.
    folder = context.scratch / f"compiled-{name}"

    def sample() -> float:
        return _seconds(FIRST_STEP, name, way, context.device.type, cache=folder if cache else None)

    def wrong(_: None) -> str | None:
        if cache == "warm" and not folder.exists():
            raise Unavailable("nothing was compiled before: there was no cold start in this run")
        return "something was compiled before" if cache == "cold" and folder.exists() else None

    return Prepared(None, wrong, sample=sample, extra={"network": name, "compile_cache": cache or "not used"})


def _seconds(code: str, *words: str, cache: Path | None = None) -> float:
    """What a program prints last: seconds. ``cache`` is where compilers keep what they made."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if cache is not None:
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process ended with status {done.returncode}: {last}")
    return float(done.stdout.split()[-1])


def test_startup(plan, harness, benchmark):
    harness.run(plan, benchmark)
