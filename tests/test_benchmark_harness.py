"""How the benchmark suite measures a case: here or in a process of its own, checked, beside a peer, recorded."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases_apart import process_number

from benchmarks import harness as benchmark_harness
from benchmarks import kernel_cases, library_cases, test_kernels
from benchmarks.floors import family_of, rate_name
from benchmarks.harness import CLOCK, Harness, Plan
from benchmarks.places import Here
from benchmarks.prepared import Context, Prepared, Unavailable
from benchmarks.profiles import PROFILES
from benchmarks.results import Identity, ResultFile
from minimagen_fast import kernels
from minimagen_fast.kernels.group_norm_silu import group_norm_silu

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
# Round numbers: a byte takes a second, and so do ten FLOPs.
CEILINGS = {"copy_bytes_per_second": 1.0, "flops_per_second": {"float32": 10.0, "bfloat16": 100.0}}
IDENTITY = Identity("kernels", "op", "forward", "b1", "float32", "ours")


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
        assert record.extra["computes_in"] == "float32"


def test_convolutions_reach_the_rate_of_tf32_on_a_card_and_attention_a_third_of_it(monkeypatch):
    """Attention in float32 took less time than its floor: there a product is three of TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    rates = {"float32": 50e12, "bfloat16": 800e12, "tf32": 420e12, "tf32x3": 140e12}
    operations = {
        case.operation for case in (library_cases.LIBRARY_CASES | kernel_cases.CASES).values() if case.backward
    }
    found = {each: rate_name(torch.float32, family_of(each), rates) for each in operations}
    convolutions = {"conv1x1_concat", "upsample_conv3x3", "wide_conv2d"}
    assert {each for each, rate in found.items() if rate == "tf32"} == convolutions
    assert {each for each, rate in found.items() if rate == "tf32x3"} == {
        "null_key_attention",
        "null_key_cross_attention",
    }
    assert rate_name(torch.float32, "attention", {**rates, "tf32x3": 20e12}) == "float32"
    assert rate_name(torch.bfloat16, "attention", rates) == "bfloat16"
    assert rate_name(torch.float32, "attention", {"float32": 1e12}) == "float32", "on a CPU"


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


def test_no_case_is_begun_when_the_time_is_used_up(tmp_path, monkeypatch):
    # Hundreds may be left, and a collection of cycles for each would take a minute more.
    monkeypatch.setattr(benchmark_harness, "settle", lambda device: pytest.fail("there is nothing to give back"))
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
