"""The benchmark suite: that its smoke profile runs, and that what it says can be trusted."""

import contextlib
import functools
import importlib
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases_apart import process_number

from benchmarks import kernel_cases, library_cases, machine, peers, test_kernels
from benchmarks.floors import count_flops, floor_of
from benchmarks.harness import CLOCK, Harness, Plan
from benchmarks.measure import MAX_COPIES, Timer, copies_needed, launches, peak_bytes
from benchmarks.parity import difference, relative_distance
from benchmarks.places import Here
from benchmarks.prepared import Context, Prepared, Unavailable
from benchmarks.profiles import PROFILES
from benchmarks.results import SECTIONS, STATUSES, Identity, Record, ResultFile, file_name, spread
from minimagen_fast import kernels
from minimagen_fast.kernels.group_norm_silu import group_norm_silu

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
# Round numbers: a byte takes a second, and so do ten FLOPs.
CEILINGS = {"copy_bytes_per_second": 1.0, "flops_per_second": {"float32": 10.0, "bfloat16": 100.0}}
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


class Benchmark:
    """Stands for pytest-benchmark's fixture."""

    def __init__(self):
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target, rounds):
        for _ in range(rounds):
            before = CLOCK()
            target()
            self.stats.stats.data.append(CLOCK() - before)


@pytest.fixture
def harness(tmp_path):
    context = Context(CPU, PROFILES["smoke"], CEILINGS, cache_bytes=1024, scratch=tmp_path)
    return Harness(context, ResultFile(tmp_path / "result.json", {"profile": "smoke"}), time.monotonic())


def test_a_right_case_is_timed_and_recorded(harness):
    prepared = Prepared(lambda index: torch.ones(256), lambda result: None, bytes=8, extra={"note": 1})
    record = harness.run(Plan(IDENTITY, lambda context: prepared), Benchmark())
    (case,) = json.loads(harness.results.path.read_text())["cases"]
    assert case["id"] == record.identity.id == "kernels/op/forward/b1/float32/ours"
    assert (case["status"], case["bytes"], case["peak_bytes"], case["launches"]) == ("ok", 8, 1024, None)
    assert case["seconds"]["median"] > 0 and case["extra"]["note"] == 1


@pytest.fixture
def peers_here(monkeypatch):
    """Peers in this process, where tests can look at them."""
    monkeypatch.setattr("benchmarks.harness.Apart", Here)


def test_a_peer_is_timed_in_turn(harness, peers_here):
    calls = []

    def prepared(name: str, **more) -> Prepared:
        def sample() -> float:
            calls.append(f"{name} timed")
            return 2.0 if name == "peer" else 1.0

        return Prepared(
            lambda _: calls.append(name), lambda result: None, sample=sample, rounds=2, memory=False, **more
        )

    closed = []
    beside = "peer", lambda context: prepared("peer", close=lambda: closed.append("peer"))
    record = harness.run(Plan(IDENTITY, lambda context: prepared("own"), beside=beside), Benchmark())
    assert calls == ["peer", "peer timed", "own", "own timed"] * 2 and closed == ["peer"]
    assert list(record.samples) == pytest.approx([1.0, 1.0]) and record.beside == ("peer", [2.0, 2.0])
    (case,) = json.loads(harness.results.path.read_text())["cases"]
    assert case["beside"]["variant"] == "peer" and case["beside"]["seconds"]["samples"] == [2.0, 2.0]


def broken(*_):
    raise RuntimeError("broken")


@pytest.mark.parametrize("peer", ["wrong", "unavailable", "broken", "broken later"])
def test_without_a_sound_peer_a_case_is_timed_alone(harness, peers_here, peer):
    kind = peer

    def peer(context) -> Prepared:
        if kind == "unavailable":
            raise Unavailable("not installed")
        if kind == "broken":
            broken()
        return Prepared(broken if kind == "broken later" else lambda _: None, lambda result: "0.3 away")

    own = Prepared(lambda index: torch.ones(256), lambda result: None)
    said = pytest.warns(UserWarning, match="is timed alone, without peer: RuntimeError: broken")
    with said if kind.startswith("broken") else contextlib.nullcontext():
        record = harness.run(Plan(IDENTITY, lambda context: own, beside=("peer", peer)), Benchmark())
    assert record.status == "ok" and record.samples and record.beside is None


def test_a_case_that_fails_after_it_was_timed_leaves_a_file_that_can_be_read(harness, peers_here):
    own = Prepared(lambda index: torch.ones(256), lambda result: None, more=broken)
    peer = Prepared(lambda index: torch.ones(256), lambda result: None)
    with pytest.raises(RuntimeError, match="broken"):
        harness.run(Plan(IDENTITY, lambda context: own, beside=("peer", lambda context: peer)), Benchmark())
    (case,) = json.loads(harness.results.path.read_text())["cases"]
    assert case["status"] == "error" and case["reason"] == "RuntimeError: broken"
    assert case["seconds"] is None and case["beside"] is None


def test_a_case_in_a_process_of_its_own(harness, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    plan = Plan(IDENTITY, process_number, apart=True, beside=("peer", process_number))
    record = harness.run(plan, Benchmark())
    own, peer = set(map(round, record.samples)), set(record.beside[1])
    assert len(own) == len(peer) == 1 and len(own | peer | {os.getpid()}) == 3
    assert record.bytes == 8
    assert record.extra == {"threads": 3, "most": max(record.samples)}


def test_in_a_process_of_its_own_a_case_is_timed_before_it_is_checked(harness, peers_here):
    calls = []

    def prepare(context) -> Prepared:
        def sample() -> float:
            calls.append("timed")
            return 1.0

        def wrong(result: str) -> str:
            calls.append("checked")
            return f"{result}: 0.3 away"

        return Prepared(None, wrong, sample=sample, first=lambda: calls.append("first") or "first", memory=False)

    with pytest.raises(pytest.fail.Exception, match="no time is given: first: 0.3 away"):
        harness.run(Plan(IDENTITY, prepare, apart=True), Benchmark())
    (case,) = json.loads(harness.results.path.read_text())["cases"]
    assert calls == ["first", "timed", "checked"]
    assert case["status"] == "parity_failed" and case["seconds"] is None


def test_a_process_of_its_own_without_the_same_peers_measures_nothing(harness, monkeypatch):
    # Such as a package that only this process has been told where to find.
    monkeypatch.setattr("benchmarks.places.peer_versions", lambda: {"minimagen": "0.1"})
    with pytest.raises(pytest.skip.Exception, match="a new process has the peers .* and not {'minimagen': '0.1'}"):
        harness.run(Plan(IDENTITY, process_number, apart=True), Benchmark())


ENDS_AT_ONCE = """
import os
from types import SimpleNamespace
import torch
from benchmarks.places import Apart
from cases_apart import process_number
if __name__ == "__main__":
    case = Apart(process_number, SimpleNamespace(device=torch.device("cpu")))
    case.start()
    print(round(case.rounds() and case.sample()), flush=True)
    os._exit(1)
"""


def test_a_process_of_its_own_ends_with_the_one_that_made_it():
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    # Its output is over when both have ended.
    done = subprocess.run(
        [sys.executable, "-c", ENDS_AT_ONCE],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip().isdecimal() and done.returncode, done.stderr


def wrong_in_one_value(x, weight, bias, **options):
    """What a wrong kernel does: all is right but one value."""
    if options["implementation"] == "reference":
        return group_norm_silu(x, weight, bias, **options)
    out = group_norm_silu(x, weight, bias, **{**options, "implementation": "reference"}).clone()
    out[0, 0, 0, 0] += 10
    return out


def test_a_wrong_kernel_is_reported_and_never_timed(harness):
    case = replace(kernel_cases.group_norm(1, 16, 4, 4), function=wrong_in_one_value)
    prepare = test_kernels._preparer(
        case,
        lambda case: lambda inputs: case.run(inputs, implementation="auto"),
        torch.float32,
        torch.contiguous_format,
        "forward",
    )
    benchmark = Benchmark()
    with pytest.raises(pytest.fail.Exception, match="no time is given: .* away from the reference"):
        harness.run(Plan(IDENTITY, prepare), benchmark)
    (recorded,) = json.loads(harness.results.path.read_text())["cases"]
    assert recorded["status"] == "parity_failed" and "away from the reference" in recorded["reason"]
    assert recorded["seconds"] is None and not benchmark.stats.stats.data


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_right_kernel_passes_the_check(harness, direction):
    case = kernel_cases.group_norm(1, 16, 4, 4, scale=True)
    run = lambda inputs: case.run(inputs, implementation="reference")  # noqa: E731
    prepare = test_kernels._preparer(case, lambda case: run, torch.float32, torch.contiguous_format, direction)
    record = harness.run(Plan(IDENTITY, prepare), Benchmark())
    assert record.status == "ok" and record.floor_seconds == record.bytes > 0


@pytest.mark.parametrize("of_reference", [True, False])
def test_it_is_said_whose_memory_did_not_suffice(harness, of_reference):
    def function(x, implementation, **options):
        if (implementation == "reference") == of_reference and x.device.type != "meta":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return x

    case = replace(kernel_cases.group_norm(1, 16, 4, 4), function=lambda weight, bias, **more: function(**more))
    run = functools.partial(case.run, implementation="auto")
    prepare = test_kernels._preparer(case, lambda case: run, torch.float32, torch.contiguous_format, "forward")
    with pytest.raises(pytest.skip.Exception):
        harness.run(Plan(IDENTITY, prepare), Benchmark())
    (recorded,) = json.loads(harness.results.path.read_text())["cases"]
    said = "the reference, with which it is compared, is out of memory" if of_reference else "out of memory"
    assert (recorded["status"], recorded["reason"]) == ("unavailable", f"{said}: CUDA out of memory.")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("make", [kernel_cases.attention, library_cases.cross_attention])
def test_the_reference_needs_the_memory_of_one_sample(make, backward):
    sizes = dict(shared=True) if make is kernel_cases.attention else dict(dim=16, context=8)
    case = make(3, 5, 7, d=8, **sizes)
    inputs = case.inputs(CPU, torch.float32, gradients=backward)
    batches = []

    def function(**arguments):
        batches.append(len(arguments[case.by_sample[0]]))
        return case.function(**arguments)

    sliced = test_kernels._expected(replace(case, function=function), inputs, backward)
    whole = test_kernels._expected(replace(case, by_sample=()), inputs, backward)
    torch.testing.assert_close(sliced, list(whole) if backward else whole)
    assert {*batches} == {1}


def test_memory_of_what_replays_a_graph_is_that_of_the_same_call_without(harness):
    """A replay, here a call that does nothing, allocates nothing."""
    calls = []

    def launched(_):
        calls.append("launched")
        return torch.ones(512)

    def peak(memory_of) -> int | None:
        calls.clear()
        replayed = Prepared(lambda _: calls.append("replayed"), lambda result: None, memory_of=memory_of, images=2)
        record = harness.run(Plan(IDENTITY, lambda context: replayed), Benchmark())
        assert calls == sorted(calls, reverse=True), "what was timed is not called again"
        assert ("peak_bytes_per_image" in record.extra) == (record.peak_bytes is not None)
        return record.peak_bytes

    assert [peak(None), peak(lambda: launched), peak(lambda: None)] == [0, 2048, None]


def test_every_operation_is_measured_forward_and_backward():
    operations = {*kernels.__all__} - {"implementation", "use_implementation"}
    cases = kernel_cases.CASES | library_cases.LIBRARY_CASES
    assert len(cases) == len(kernel_cases.CASES) + len(library_cases.LIBRARY_CASES)
    for profile, device in (("smoke", "cpu"), ("cpu", "cpu"), ("gpu", "cuda")):
        plans = list(test_kernels.plans(profile, torch.device(device)))
        found = {(p.identity.name, p.identity.direction) for p in plans if p.identity.variant == "ours"}
        assert found == {(p.identity.name, p.identity.direction) for p in plans if p.identity.variant == "reference"}
        assert {name for name, _ in found} == operations, profile
        # A step of a sampler has none.
        assert {name for name, direction in found if direction == "backward"} == {
            name for name in operations if not name.endswith("_step")
        }


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "case",
    [
        library_cases.concatenated(2, 8, 4, 4, skip=4, out=6),
        library_cases.projection(2, 5, 8, out=6),
        library_cases.cross_attention(2, 5, 7, dim=16, context=8, d=8),
        library_cases.enlargement(2, 8, 4, 4, out=6),
        library_cases.wide_convolution(2, 3, 8, 8, side=9, out=4),
    ],
    ids=lambda case: case.operation,
)
def test_what_libraries_do_passes_the_check(harness, case, direction):
    run = functools.partial(case.run, implementation="auto")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        prepare = test_kernels._preparer(case, lambda case: run, torch.float32, memory_format, direction)
        record = harness.run(Plan(replace(IDENTITY, variant=str(memory_format)), prepare), Benchmark())
        assert record.status == "ok" and record.flops > 0 and record.floor_seconds > 0
        assert {*record.floor_by_family} <= {"convolution", "linear", "attention"}


def test_what_cannot_be_measured_is_listed_with_its_reason(harness):
    def prepare(context):
        raise Unavailable("there is no such card")

    with pytest.raises(pytest.skip.Exception):
        harness.run(Plan(IDENTITY, prepare), Benchmark())
    result = json.loads(harness.results.path.read_text())
    assert [(c["status"], c["reason"], c["seconds"]) for c in result["cases"]] == [
        ("unavailable", "there is no such card", None)
    ]
    assert result["missing"] == [{"what": IDENTITY.id, "why": "there is no such card"}]


def test_an_error_is_recorded_and_raised(harness):
    def prepare(context):
        raise RuntimeError("broken\nwith details")

    with pytest.raises(RuntimeError):
        harness.run(Plan(IDENTITY, prepare), Benchmark())
    (case,) = json.loads(harness.results.path.read_text())["cases"]
    assert (case["status"], case["reason"]) == ("error", "RuntimeError: broken")


def test_no_case_is_begun_when_the_time_is_used_up(tmp_path):
    context = Context(CPU, PROFILES["smoke"], CEILINGS, cache_bytes=1024, scratch=tmp_path)
    started = time.monotonic() - PROFILES["smoke"].seconds - 1
    late = Harness(context, ResultFile(tmp_path / "result.json", {}), started)
    with pytest.raises(pytest.skip.Exception, match="were used up"):
        late.run(Plan(IDENTITY, lambda context: pytest.fail("it was begun")), Benchmark())


def test_a_long_case_is_not_begun_shortly_before_the_end(harness):
    plan = Plan(IDENTITY, lambda context: pytest.fail("it was begun"), seconds=PROFILES["smoke"].seconds)
    with pytest.raises(pytest.skip.Exception, match="were used up, but for less than"):
        harness.run(plan, Benchmark())


def test_an_interrupted_case_leaves_those_before_it(harness):
    harness.run(Plan(IDENTITY, lambda context: Prepared(lambda index: None, lambda result: None)), Benchmark())

    def prepare(context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.run(Plan(replace(IDENTITY, variant="reference"), prepare), Benchmark())
    result = json.loads(harness.results.path.read_text())
    assert [case["variant"] for case in result["cases"]] == ["ours"] and result["complete"] is False


# Results


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


def test_the_sections_and_statuses_are_those_of_the_format():
    steps = {"sampling-step", "few-steps"}
    assert {*SECTIONS} == {"kernels", "denoiser", "sampling", "training", "startup", "ablation"} | steps
    assert {*STATUSES} == {"ok", "parity_failed", "unavailable", "error"}


# Floors


def test_floor_of_a_matrix_product_is_the_larger_of_work_and_traffic():
    a, b = torch.empty(8, 16), torch.empty(16, 4)
    floor = floor_of(lambda: a @ b, CEILINGS)
    size, flops = 4 * (8 * 16 + 16 * 4 + 8 * 4), 2 * 8 * 16 * 4
    assert (floor.bytes, floor.flops) == (size, flops)
    assert floor.seconds == size == floor.by_family["linear"]
    slow = {**CEILINGS, "flops_per_second": {"float32": 0.5}}
    assert floor_of(lambda: a @ b, slow).seconds == flops / 0.5
    assert count_flops(lambda: a @ b) == flops


def test_floor_charges_each_family_and_no_view_or_copy():
    x, weight = torch.empty(2, 3, 4, 4), torch.empty(5, 3, 1, 1)

    def network():
        h = torch.conv2d(x, weight)
        h = h.permute(0, 2, 3, 1).reshape(2, 16, 5).contiguous().transpose(1, 2)
        return torch.relu(h.to(torch.bfloat16))

    floor = floor_of(network, CEILINGS)
    assert floor.by_family == {
        "convolution": 4 * (2 * 3 * 16 + 15 + 2 * 5 * 16),
        "elementwise": 2 * (2 * 2 * 5 * 16),
    }


def test_floor_reads_an_input_once_and_an_expanded_one_as_it_lies():
    x = torch.empty(10)
    assert floor_of(lambda: x * x, CEILINGS).bytes == 4 * (10 + 10)
    assert floor_of(lambda: x + torch.empty(1).expand(10), CEILINGS).bytes == 4 * (10 + 1 + 10)


def test_floor_of_our_own_operation_is_that_of_one_pass():
    x = torch.empty(1, 64, 8, 8, device="meta")
    ours = floor_of(lambda: group_norm_silu(x, groups=8, implementation="triton"), CEILINGS)
    plain = floor_of(lambda: group_norm_silu(x, groups=8, implementation="reference"), CEILINGS)
    assert 2 <= ours.seconds / x.nbytes < 2.1
    assert {*ours.by_family} == {"group norm"}
    assert plain.seconds / x.nbytes >= 3, "normalised and activated in turn"


def test_floor_of_attention_is_what_plain_torch_multiplies():
    inputs = kernel_cases.attention(2, 64, 63, shared=False).inputs("meta", torch.float32, gradients=True)
    run = functools.partial(kernel_cases.null_key_attention, **inputs, heads=kernel_cases.HEADS)
    # It multiplies with the null key, too.
    keys, plain = 63 / 64, count_flops(lambda: run(implementation="reference"))
    assert floor_of(lambda: run(implementation="triton"), CEILINGS).flops == keys * plain
    both = keys * count_flops(lambda: run(implementation="reference").sum().backward())
    assert floor_of(lambda: run(implementation="triton").sum().backward(), CEILINGS).flops == both == 3 * keys * plain


def test_floor_counts_the_backward():
    x = torch.empty(4, 8, requires_grad=True)
    w = torch.empty(8, 2, requires_grad=True)
    floor = floor_of(lambda: (x @ w).sum().backward(), CEILINGS)
    assert floor.flops == 3 * (2 * 4 * 8 * 2)


# Parity


def test_difference_finds_what_is_wrong():
    good = torch.linspace(1, 2, 10_000)
    limits = 1e-3, 1e-2
    assert difference((good, good), (good, good.double()), limits) is None
    assert "worst value" in difference(good.clone().index_fill_(0, torch.tensor([3]), 1.05), good, limits)
    assert "away" in difference(good * 1.002, good, limits)
    assert "shape" in difference(good[1:], good, limits)
    assert "tensors" in difference((good,), (good, good), limits)
    assert "finite" in difference(good.clone().fill_(math.nan), good, limits)
    assert relative_distance([good * math.nan], [good]) == math.inf


# Measuring


def test_a_sample_is_the_time_of_one_call_and_inputs_are_rotated():
    seen = []

    def subject(index):
        seen.append(index)
        time.sleep(0.004)

    timer = Timer(subject, CPU, copies=3)
    assert 0.004 <= timer.sample() < 0.4
    assert seen == [index % 3 for index in range(len(seen))]


def test_fewer_rounds_of_slow_calls():
    timer = Timer(lambda index: None, CPU, call_seconds=0.1)
    assert timer.rounds(seconds=100, least=5, most=30) == 30
    assert timer.rounds(seconds=1, least=5, most=30) == 10
    assert timer.rounds(seconds=0.2, least=5, most=30) == 5
    assert timer.rounds(seconds=0.045, least=5, most=30) == 4
    assert timer.rounds(seconds=0.001, least=5, most=30) == 3


def test_short_calls_are_timed_in_groups():
    calls = []
    timer = Timer(calls.append, CPU)
    before = len(calls)
    assert 0 < timer.sample() < 1e-3
    assert len(calls) - before > 10


def test_copies_of_inputs_are_more_than_the_cache_holds():
    assert copies_needed(1000, 5000) * 1000 > 2 * 5000
    assert copies_needed(10**9, 5000) == 2
    assert copies_needed(1, 10**9) == MAX_COPIES
    assert copies_needed(1000, 0) == 1


def test_a_graph_on_the_default_stream_is_the_callers_mistake(monkeypatch):
    # And not NotCapturable, after which a subject is timed otherwise.
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: "the default stream")
    with pytest.raises(RuntimeError, match="the current stream is the default one, which cannot be captured"):
        Timer(lambda index: None, torch.device("cuda"), graph=True)


def test_peak_memory_of_a_call():
    x = torch.ones(1 << 16)  # 256 KiB

    def subject(index):
        a = x + 1
        b = a + 1
        del a
        return b.sum()

    assert 2 * x.nbytes <= peak_bytes(subject, CPU) < 2.1 * x.nbytes
    assert launches(subject, CPU) is None


@pytest.mark.gpu
def test_timing_and_counting_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    inputs = [torch.randn(1 << 22, device=device) for _ in range(3)]
    seen = []

    def subject(index):
        seen.append(index)
        return inputs[index] * 2 + 1

    with torch.cuda.stream(torch.cuda.Stream(device)):
        subject(0)
        eager, graphed = Timer(subject, device, copies=3), Timer(subject, device, copies=3, graph=True)
        calls = len(seen)
        assert 1e-6 < graphed.sample() < 1e-2
        assert len(seen) == calls, "a replay calls nothing"
        assert 1e-6 < eager.sample() < 1e-1 and len(seen) > calls
        assert launches(subject, device) == 2
        assert 2 * inputs[0].nbytes <= peak_bytes(subject, device) < 2.1 * inputs[0].nbytes


def test_a_processor_is_known_by_its_generation(monkeypatch):
    said = {
        "model name\t: AMD EPYC \ncpu family\t: 25\nmodel\t\t: 17\n": "AMD EPYC (family 25, model 17)",
        "model name : Neoverse\n": "Neoverse",
        "": machine.platform.processor() or machine.platform.machine(),
    }
    for text, name in said.items():
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert machine._processor() == name
