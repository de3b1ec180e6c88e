"""What the benchmark suite says of a call: floors, distances, times and memory."""

import contextlib
import functools
import gc
import math
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernel_cases, measure
from benchmarks.ceilings import ceilings
from benchmarks.floors import count_flops, floor_of
from benchmarks.measure import MAX_COPIES, NotCapturable, Timer, copies_needed, launches, peak_bytes
from benchmarks.parity import difference, relative_distance
from minimagen_fast.kernels.group_norm_silu import group_norm_silu

CPU = torch.device("cpu")
# Round numbers: a byte takes a second, and so do ten FLOPs.
CEILINGS = {"copy_bytes_per_second": 1.0, "flops_per_second": {"float32": 10.0, "bfloat16": 100.0}}


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


def test_on_a_card_each_set_of_inputs_has_its_result_in_a_place_of_its_own():
    """In the place of the last result the next would be written to the cache alone: in less time than its floor."""
    timer = Timer(lambda index: torch.empty(1000), torch.device("cuda"), copies=3, call_seconds=1.0)
    for _ in range(2):
        assert len({timer._call().data_ptr() for _ in range(3)}) == 3


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


def test_what_was_copied_to_measure_the_ceilings_is_not_kept():
    gc.disable()
    try:
        ceilings(CPU, copy_mib=3, matrix_side=8)
        assert not any(type(each) is torch.Tensor and each.nbytes == 3 * 2**20 for each in gc.get_objects())
    finally:
        gc.enable()


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


@pytest.mark.parametrize(
    "names, expected", [(["kernel", "Memset (Device)", "kernel"], 2), (["Memset (Device)"], 0), ([], None)]
)
def test_launches_are_those_that_were_seen_and_none_where_nothing_is_seen(names, expected, monkeypatch):
    cuda = torch.autograd.DeviceType.CUDA
    events = [SimpleNamespace(device_type=cuda, name=name, is_user_annotation=False) for name in names]
    events.append(SimpleNamespace(device_type=torch.autograd.DeviceType.CPU, name="aten::add"))
    recorded = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(measure, "profile", lambda **_: contextlib.nullcontext(recorded))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert launches(lambda index: None, torch.device("cuda")) == expected


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


@pytest.mark.gpu
def test_what_cannot_be_captured_spoils_no_later_case():
    device = torch.device("cuda", torch.cuda.current_device())

    def waiting(index):
        torch.cuda.synchronize(device)

    with torch.cuda.stream(torch.cuda.Stream(device)), pytest.raises(NotCapturable):
        Timer(waiting, device, graph=True)
    # torch refused all random numbers until the next capture.
    assert torch.rand(1, device=device).isfinite()
