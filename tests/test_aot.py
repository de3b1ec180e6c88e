"""The kernels as machine code for three generations of cards: no spills, wide accesses, tensor cores, no step back."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from benchmarks import aot
from benchmarks.kernel_cases import unet_cases
from minimagen_fast.kernels import launch

ROOT = Path(__file__).resolve().parent.parent

KERNEL = """
import triton
import triton.language as tl

@triton.jit
def double(x):
    return x * 2

@triton.jit
def kernel(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, double(tl.load(x + at, mask=at < n)), mask=at < n)
"""

ROW = aot.Row("layer_norm_rows._forward_kernel", "fp32 None", "sm_90", 100, 0, 2048, 8, "25%", 16, 16, "-")


def run(*words: str, timeout: int) -> subprocess.CompletedProcess:
    # What is compiled are the functions of triton.jit, not those of its interpreter.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def changed(**values) -> aot.Row:
    return dataclasses.replace(ROW, **values)


def test_a_sound_row_has_no_complaints():
    assert aot.complaints(ROW) == []
    assert aot.regressions(ROW, {ROW.key: ROW}) == []


@pytest.mark.parametrize(
    "row, complaint",
    [
        (changed(spill=8), "spills 8 bytes"),
        (changed(shared=232_449), "of shared memory"),
        (changed(load=8), "widest load is of 8 bytes"),
        (changed(store=4), "widest store is of 4 bytes"),
        (changed(kernel="null_key_flash._forward", config="bf16 bf16"), "no tensor-core instruction"),
        (changed(kernel="null_key_flash._forward", config="bf16 bf16", products="HMMA"), "not with HGMMA"),
    ],
)
def test_what_is_wrong_with_machine_code_is_said(row, complaint):
    (said,) = aot.complaints(row)
    assert complaint in said


def test_narrow_accesses_are_fine_where_no_wide_ones_are_due():
    assert aot.complaints(changed(load=2, store=2), wide=False) == []
    # Partial sums are a small part of what the operation moves.
    assert aot.complaints(changed(kernel="layer_norm_tiles._sum_kernel", store=4)) == []


def test_the_a100_has_less_shared_memory():
    assert aot.complaints(changed(shared=200_000)) == []
    assert aot.complaints(changed(shared=200_000, target="sm_80"))


@pytest.mark.parametrize(
    "row, regression",
    [
        (changed(registers=111), "needs 111 registers, 100 in the table"),
        (changed(spill=4), "spill 4 bytes, 0 in the table"),
        (changed(shared=2049), "shared 2049 bytes, 2048 in the table"),
        (changed(config="fp32 fp32"), "not in the table"),
    ],
)
def test_a_step_back_is_said(row, regression):
    (said,) = aot.regressions(row, {ROW.key: ROW})
    assert regression in said
    assert aot.regressions(changed(registers=110), {ROW.key: ROW}) == []


def test_the_table_is_read_back():
    rows = [ROW, changed(target="sm_80", products="HMMA")]
    text = f"{aot.summary(rows)}\n{aot.table(rows)}"
    assert list(aot.parse(text).values()) == rows
    assert aot.fingerprints(text) == {ROW.kernel: aot.fingerprint(ROW.kernel)}


def test_the_fingerprint_of_a_kernel_changes_with_its_code_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def fingerprint(text: str) -> str:
        monkeypatch.setattr(aot, "PACKAGE", f"package{len(list(tmp_path.iterdir()))}")
        (tmp_path / aot.PACKAGE).mkdir()
        (tmp_path / aot.PACKAGE / "kernels.py").write_text(text)
        return aot.fingerprint("kernels.kernel")

    before = fingerprint(KERNEL)
    body = "    at = tl.arange(0, BLOCK)\n"
    assert body in KERNEL and len(before) == 8
    other_layout = '    """What it does."""\n    # A comment.\n\n    at = tl.arange(\n        0, BLOCK\n    )\n'
    same = ["# A comment.\n\n" + KERNEL, KERNEL.replace(body, other_layout)]
    assert [fingerprint(text) for text in same] == [before] * 2
    different = [
        KERNEL.replace("x * 2", "x * 3"),
        KERNEL.replace("double(", "twice("),
        KERNEL.replace("at < n", "at <= n"),
        KERNEL.replace("@triton.jit\ndef kernel", '@triton.jit(do_not_specialize=["n"])\ndef kernel'),
    ]
    assert len({before, *map(fingerprint, different)}) == 5


def test_the_table_is_written_of_all_configurations_only(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--write"])
    assert "--write needs --all" in capsys.readouterr().err


def test_all_configurations_were_compiled_since_the_kernels_changed_last():
    recorded = aot.fingerprints(aot.TABLE.read_text())
    kernels = set(recorded)
    for unet, side in ((aot.Base, 64), (aot.Super, 256)):
        for case in {case.name: case for case in unet_cases(unet, side, 2)}.values():
            for memory_format in aot.FORMATS:
                launched = aot.launches(case, torch.bfloat16, memory_format, launch.H200)
                functions = [one.kernel.fn for one in launched]
                kernels |= {f"{function.__module__.rpartition('.')[2]}.{function.__name__}" for function in functions}
    changed = sorted(kernel for kernel in kernels if recorded.get(kernel) != aot.fingerprint(kernel))
    assert len(kernels) > 20
    assert not changed, f"{', '.join(changed)} changed: run python -m benchmarks.aot --changed --write"


def test_occupancy():
    # 128 registers for each of 256 threads: two programs. One of 512 threads with 255 each does not fit twice either.
    assert aot.occupancy(90, 128, 0, 8) == 0.25
    assert aot.occupancy(90, 255, 0, 8) == 0.125
    # 32 programs of one warp, however few registers; memory for two programs, for one on the older card.
    assert aot.occupancy(90, 16, 0, 1) == 0.5
    assert aot.occupancy(90, 32, 110_000, 4) == 0.125
    assert aot.occupancy(80, 32, 110_000, 4) == 0.0625


def test_the_kept_table_is_of_sound_kernels():
    rows = aot.parse(aot.TABLE.read_text())
    assert {row.target for row in rows.values()} == {"sm_80", "sm_90", "sm_100"}
    modules = {row.kernel.split(".")[0] for row in rows.values()}
    assert {"group_norm_split", "null_key_flash", "diffusion", "sampling_kernels", "layer_norm_rows"} <= modules
    assert not [row for row in rows.values() if aot.complaints(row, wide=False)]


def test_no_configuration_at_all_spills():
    overview = list(aot._overview_lines(aot.TABLE.read_text()))
    rows = [dict(zip(aot._OVERVIEW, line.strip("| ").split(" | "), strict=True)) for _, line in overview]
    assert len(rows) == len(aot.fingerprints(aot.TABLE.read_text())) * 3
    assert {row["spill"] for row in rows} == {"0"}


def test_what_did_not_change_is_taken_from_the_kept_table(tmp_path, monkeypatch, capsys):
    def build(kernel: str) -> aot.Build:
        constants = (((1,), 64),)
        return aot.Build(
            f"kernels.{kernel}", "_forward_kernel", (("x", "*fp32"), ("N", "constexpr")), constants, (), 4, 2, 90
        )

    compiled = []

    def compile_builds(builds):
        compiled.extend(builds)
        return [changed(kernel=build.key[0], config=build.config, registers=50) for build in builds]

    builds = {build(kernel): True for kernel in ("layer_norm_rows", "channel_norm_planes", "group_norm_looped")}
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(aot, "TABLE", tmp_path / "aot.md")
    monkeypatch.setattr(aot, "enumerate_builds", lambda *sizes: builds)
    monkeypatch.setattr(aot, "compile_builds", compile_builds)
    assert aot.main(["--all", "--write"]) == 0
    first, row = aot.TABLE.read_text(), aot.fingerprint("channel_norm_planes._forward_kernel")
    assert len(compiled) == 3 and row in first
    aot.TABLE.write_text(first.replace(row, "00000000").replace(" 50 ", " 70 "))
    del compiled[:]
    assert aot.main(["--changed", "--write"]) == 0
    assert [one.key[0] for one in compiled] == ["channel_norm_planes._forward_kernel"]
    rows = aot.parse(aot.TABLE.read_text()).values()
    assert [row.registers for row in rows] == [70, 50, 70]
    assert [line.split(" | ")[4] for _, line in aot._overview_lines(aot.TABLE.read_text())] == ["70", "50", "70"]
    # Nothing can be taken from what another compiler made.
    monkeypatch.setattr(aot, "_versions", lambda: "triton 0.0")
    with pytest.raises(SystemExit):
        aot.main(["--changed"])
    assert "use --all" in capsys.readouterr().err


@pytest.mark.slow
def test_bad_kernels_are_found_out():
    done = run("tests/aot_kernels.py", "kernels", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 15 and all(result["table"] for result in found.values())
    for target in ("sm_80", "sm_90", "sm_100"):
        assert found[f"__main__.good {target}"]["complaints"] == []
        assert found[f"__main__.good {target}"]["widths"] == [16, 16]
        assert any("spills" in said for said in found[f"__main__.spilling {target}"]["complaints"])
        assert any("widest store" in said for said in found[f"__main__.strided {target}"]["complaints"])
        # The address of the second element of a tensor is no multiple of 16.
        assert found[f"__main__.good {target} unaligned"]["widths"] == [2, 2]
    products = {target: found[f"__main__.product {target}"]["products"] for target in ("sm_80", "sm_90", "sm_100")}
    assert products == {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, side, arguments",
    [
        ("Base", 16, {}),
        ("Super", 32, {"lowres_cond": True}),
        ("BaseTest", 16, {}),
        ("SuperTest", 16, {"lowres_cond": True}),
    ],
)
def test_what_a_whole_unet_launches_is_enumerated(name, side, arguments):
    done = run("tests/aot_kernels.py", "unet", name, str(side), json.dumps(arguments), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["needed"] > 10
    assert result["missing"] == []


@pytest.mark.slow
def test_representative_configurations_compile_and_are_no_worse_than_recorded():
    done = run("-m", "benchmarks.aot", timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
