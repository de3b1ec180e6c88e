"""The benchmark suite: that its smoke profile runs, and that what it says can be trusted."""

import importlib
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import machine, peers
from benchmarks.prepared import Unavailable
from benchmarks.profiles import PROFILES
from benchmarks.results import SECTIONS, STATUSES, Identity, Record, ResultFile, file_name, spread

ROOT = Path(__file__).resolve().parent.parent
IDENTITY = Identity("kernels", "op", "forward", "b1", "float32", "ours")


def start(folder: Path, *words: str) -> subprocess.Popen:
    """The smoke profile in a process of its own, in which kernels do not run in Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "benchmarks", "--profile", "smoke", "--results", str(folder), *words]
    return subprocess.Popen(
        [*command, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def result_in(folder: Path) -> dict:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_the_smoke_profile_runs_and_leaves_a_complete_result(tmp_path):
    process = start(tmp_path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    result = result_in(tmp_path)
    assert (result["schema"], result["profile"], result["complete"]) == (1, "smoke", True), output
    assert result["machine"]["type"] == "cpu" and result["machine"]["threads"] == 1
    assert result["software"]["torch"] == torch.__version__
    assert {case["section"] for case in result["cases"]} == {*SECTIONS}
    ids = [case["id"] for case in result["cases"]]
    assert len(set(ids)) == len(ids)
    for case in result["cases"]:
        # On a machine that is busy with other things the time may run out; then that is the reason given.
        assert case["status"] == "ok" or (case["status"] == "unavailable" and "used up" in case["reason"]), case
        if case["status"] == "ok":
            seconds = case["seconds"]
            assert 0 < seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"], case
            least = 1 if case["section"] == "startup" else PROFILES["smoke"].min_rounds
            assert case["reason"] is None and len(seconds["samples"]) >= least
            assert all(case[name] is None or case[name] > 0 for name in ("bytes", "flops", "floor_seconds")), case
            assert case["id"] in output
        if case["floor_seconds"]:
            assert math.isclose(sum(case["floor_by_family"].values()), case["floor_seconds"])
    steps = [case for case in result["cases"] if case["section"] in ("sampling-step", "training")]
    assert {case["id"] for case in steps if case["variant"] == "ours" and case["status"] == "ok"} == {
        case["id"] for case in steps if case["beside"] and case["beside"]["variant"] == "original"
    }
    denoisers = [case for case in result["cases"] if case["section"] == "denoiser" and case["status"] == "ok"]
    assert denoisers and all(case["floor_seconds"] and case["flops"] and case["peak_bytes"] for case in denoisers)
    assert {entry["what"] for entry in result["missing"]} >= {f"peer {p}" for p in ("xformers", "liger_kernel")} - {
        f"peer {name}" for name, version in result["software"]["peers"].items() if version
    }
    assert all(entry["why"] for entry in result["missing"])


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_what_it_has(tmp_path):
    process = start(tmp_path, "-k", "denoiser")
    deadline = time.monotonic() + 300
    while not any(json.loads(file.read_text())["cases"] for file in tmp_path.glob("*.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    result = result_in(tmp_path)
    assert result["complete"] is False
    assert result["cases"][0]["status"] == "ok" and result["seconds"] > 0


def test_spread_of_samples():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "median": 3.0,
        "q1": 2.0,
        "q3": 4.0,
        "min": 1.0,
        "samples": [4.0, 1.0, 2.0, 3.0, 5.0],
    }
    assert spread([2.0])["q1"] == spread([2.0])["q3"] == 2.0
    assert spread([]) is None


def test_a_result_file_is_whole_or_not_there(tmp_path):
    results = ResultFile(tmp_path / "run.json", {"profile": "smoke"})
    before = results.path.read_text()
    record = Record(IDENTITY, samples=[1.0], extra={"cannot": object()})
    with pytest.raises(TypeError):
        results.add(record, 1.0)
    assert results.path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_second_run_of_the_same_name_leaves_the_first(tmp_path):
    wanted = tmp_path / "cpu-2026-11-22-abc1234.json"
    first = ResultFile(wanted, {"profile": "smoke"})
    first.add(Record(IDENTITY, samples=[1.0]), 1.0)
    before = first.path.read_text()
    others = [ResultFile(wanted, {"profile": "smoke"}) for _ in range(2)]
    for other in others:
        other.finish(True, 1.0)
    assert first.path == wanted and wanted.read_text() == before
    assert [other.path.name for other in others] == [f"{wanted.stem}-{number}.json" for number in (2, 3)]


@pytest.mark.parametrize(("dirty", "name"), [(False, "abc1234"), (True, "abc1234-dirty"), (None, "abc1234")])
def test_a_result_file_says_of_what_it_is(tmp_path, dirty, name):
    date = datetime(2026, 11, 22, tzinfo=timezone.utc)
    assert file_name("cpu", date, {"commit": "abc1234", "dirty": dirty}) == f"cpu-2026-11-22-{name}.json"
    assert file_name("cpu", date, {"commit": None, "dirty": dirty}).startswith("cpu-2026-11-22-unknown")


def test_a_peer_that_cannot_be_imported_has_no_version(monkeypatch):
    def import_module(name):
        if name == "minimagen.Imagen":
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.0.9")
    peers.why_not.cache_clear()
    try:
        assert peers.peer_versions() == {"minimagen": None, "xformers": "0.0.9", "liger_kernel": "0.0.9"}
        assert peers.original_package() is None and "peer minimagen" in dict(peers.missing_peers())
    finally:
        peers.why_not.cache_clear()


@pytest.mark.parametrize(
    "words",
    [
        "No available kernel. Aborting execution.",
        "cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph.",
    ],
)
def test_a_backend_of_sdpa_that_refuses_its_inputs_is_unavailable(words):
    def refuse(inputs, implementation):
        raise RuntimeError(words)

    run = peers._sdpa(SDPBackend.MATH)(SimpleNamespace(run=refuse))
    with pytest.raises(Unavailable, match=re.escape(words)):
        run({})


def test_the_sections_and_statuses_are_those_of_the_format():
    steps = {"sampling-step", "few-steps"}
    assert {*SECTIONS} == {"kernels", "denoiser", "sampling", "training", "startup", "ablation"} | steps
    assert {*STATUSES} == {"ok", "parity_failed", "unavailable", "error"}


# Floors


def test_a_processor_is_known_by_its_generation(monkeypatch):
    said = {
        "model name\t: AMD EPYC \ncpu family\t: 25\nmodel\t\t: 17\n": "AMD EPYC (family 25, model 17)",
        "model name : Neoverse\n": "Neoverse",
        "": machine.platform.processor() or machine.platform.machine(),
    }
    for text, name in said.items():
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert machine._processor() == name
