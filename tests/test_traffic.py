"""What the kernels load and store, against what their operations must move."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernel_cases import Case, Floor
from minimagen_fast.kernels import launch
from minimagen_fast.kernels.launch import tl, triton

if not launch.INTERPRETED:
    pytest.skip("loads and stores are counted in Triton's interpreter", allow_module_level=True)

from benchmarks import traffic


@triton.jit
def _scale(x, gain, out, n, BLOCK: tl.constexpr, GAIN_EACH: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(gain + at * 0, mask=at < n) if GAIN_EACH else tl.load(gain)
    tl.store(out + at, tl.load(x + at, mask=at < n) * factor, mask=at < n)


def scale(x, gain, *, gain_each=False, times=1, implementation=None):
    out = torch.empty_like(x)
    for _ in range(times):
        launch.run(
            _scale, (launch.ceil_div(x.numel(), 1024),), x, gain, out, x.numel(), BLOCK=1024, GAIN_EACH=gain_each
        )
    return out


def make_case(**options) -> Case:
    def make_inputs(make):
        return {"x": make.tokens(3, 1000), "gain": make.tokens(1)}

    return Case("scale", "3x1000", scale, make_inputs, Floor({"x": 1, "gain": 1}, ("output",)), options=options)


def test_every_access_is_counted_and_nothing_else():
    # Three thousand values in three tiles: what the last mask leaves out is not touched.
    (row,) = traffic.measure(make_case())
    assert row.floor == 2 * 3000 * 2 + 2
    assert row.moved == 2 * 3000 * 2 + 3 * 2
    assert row.distinct == row.floor
    assert (row.launches, row.complaints) == (1, [])


def test_a_parameter_read_for_every_element_is_found_out():
    (row,) = traffic.measure(make_case(gain_each=True))
    assert row.moved == 3 * 3000 * 2
    assert row.distinct == row.floor
    (complaint,) = row.complaints
    assert "moved 1.500 times its floor (reads x, gain; writes output)" in complaint


def test_all_launches_of_an_operation_count():
    (row,) = traffic.measure(make_case(times=2))
    assert row.launches == 2 and row.moved == 2 * (2 * 3000 * 2 + 3 * 2)
    assert [complaint.split()[0] for complaint in row.complaints] == ["moved", "distinct"]


def test_an_operation_without_kernels_is_found_out():
    (row,) = traffic.measure(make_case(times=0))
    assert row.complaints == ["moves nothing: it launches no kernel"]


def test_atomic_operations_are_loads_and_stores():
    @triton.jit
    def add(x, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.atomic_add(x + at // 2, 1, mask=at < n)

    with traffic.count() as counted:
        launch.run(add, (3,), torch.zeros(8, dtype=torch.int32), 10, BLOCK=16)
    (one,) = counted
    assert one.loaded == one.stored == 3 * 10 * 4
    assert one.distinct == 2 * 5 * 4


def test_atomic_operations_of_other_kinds_are_refused():
    @triton.jit
    def swap(x):
        tl.atomic_cas(x, 0, 1)

    with traffic.count(), pytest.raises(Exception, match="compare-and-swap is not counted"):
        launch.run(swap, (1,), torch.zeros(1, dtype=torch.int32))


def test_counting_ends_with_its_block():
    x, gain = torch.ones(8), torch.ones(1)
    with traffic.count() as counted:
        scale(x, gain)
    scale(x, gain)
    assert len(counted) == 1


@pytest.mark.parametrize(
    "case, memory_format",
    [pytest.param(case, f, id=f"{case.name}-{traffic.FORMATS[f]}") for case, f in traffic.runs(traffic.SMALL)],
)
def test_no_operation_moves_more_than_its_limit_or_than_before(case, memory_format):
    kept = traffic.TABLE.read_text()
    rows = traffic.measure(case, memory_format)
    assert not [f"{row.name} {said}" for row in rows for said in (*row.complaints, *traffic.regressions(row, kept))]


def test_moving_more_than_the_table_says_is_found_out():
    (row,) = traffic.measure(make_case())
    kept = traffic.table([row])
    assert traffic.regressions(row, kept) == []
    # Within its limit all the same, and in multiples of a floor that someone has raised no more than before.
    worse = dataclasses.replace(row, moved=row.moved + 24, floor=2 * row.floor)
    assert worse.complaints == []
    assert traffic.regressions(worse, kept) == ["moved 12,030 bytes, at most 12,008 in the table"]
    assert traffic.regressions(dataclasses.replace(row, launches=2), kept) == ["makes 2 launches, 1 in the table"]
    (said,) = traffic.regressions(dataclasses.replace(row, distinct=2 * row.distinct), kept)
    assert said.startswith("distinct 24,004 bytes")
    assert traffic.regressions(dataclasses.replace(row, shape="3x2000"), kept) == ["is not in the table"]


def test_no_table_is_written_of_what_is_above_its_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(traffic, "TABLE", tmp_path / "traffic.md")
    monkeypatch.setattr(traffic, "SMALL", [make_case(times=2)])
    assert traffic.main(["--write"]) == 1
    assert not traffic.TABLE.exists() and "traffic.md is left as it was" in capsys.readouterr().err
    monkeypatch.setattr(traffic, "SMALL", [make_case()])
    assert traffic.main(["--write"]) == 0
    assert traffic.TABLE.exists()


def test_the_kept_table_is_of_the_cases_that_are_measured():
    columns = "operation", "", "shape", "format"
    kept = {tuple(row[column] for column in columns) for row in traffic.parse(traffic.TABLE.read_text())}
    expected = {
        (case.operation, direction, case.shape, traffic.format_name(case, f))
        for case, f in traffic.runs(traffic.SMALL)
        for direction in ("forward", "backward")[: 1 if case.backward is None else 2]
    }
    assert expected == kept


def test_what_a_kernel_moves_is_the_most_that_its_operations_move():
    rows = [*traffic.measure(make_case()), *traffic.measure(make_case(gain_each=True))]
    assert traffic.moved(traffic.table(rows)) == {"test_traffic._scale": "1.500"}
