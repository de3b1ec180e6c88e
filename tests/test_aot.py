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

from benchmarks import aot, aot_builds, aot_code, aot_table, fingerprints, traffic
from benchmarks.kernel_cases import attention_cases, unet_cases
from minimagen_fast.kernels import launch, null_key_flash
from minimagen_fast.Unet import ATTN_DIM_HEAD

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

ROW = aot_code.Row("layer_norm_rows._forward_kernel", "fp32 None", "sm_90", 100, 0, 2048, 8, "25%", 16, 16, "-")


def run(*words: str, timeout: int) -> subprocess.CompletedProcess:
    # What is compiled are the functions of triton.jit, not those of its interpreter.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def kept_lines() -> dict[aot_builds.Kind, dict[str, str]]:
    return aot_table.parse_overview(aot.TABLE.read_text())


def changed(**values) -> aot_code.Row:
    return dataclasses.replace(ROW, **values)


def test_a_sound_row_has_no_complaints():
    assert aot_code.complaints(ROW) == []
    assert aot_code.regressions(ROW, {ROW.key: ROW}) == []


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
    (said,) = aot_code.complaints(row)
    assert complaint in said


def test_narrow_accesses_are_fine_where_no_wide_ones_are_due():
    assert aot_code.complaints(changed(load=2, store=2), wide=False) == []
    # Partial sums are a small part of what the operation moves.
    assert aot_code.complaints(changed(kernel="layer_norm_tiles._sum_kernel", store=4)) == []


def test_the_a100_has_less_shared_memory():
    assert aot_code.complaints(changed(shared=200_000)) == []
    assert aot_code.complaints(changed(shared=200_000, target="sm_80"))


@pytest.mark.parametrize(
    "row, regression",
    [
        (changed(registers=111), "needs 111 registers, 100 in the table"),
        (changed(spill=4), "spill 4 bytes, 0 in the table"),
        (changed(shared=2049), "shared 2049 bytes, 2048 in the table"),
        (changed(occupancy="19%"), "occupancy 19%, 25% in the table"),
        (changed(load=8), "widest load is of 8 bytes, 16 in the table"),
        (changed(store=4), "widest store is of 4 bytes, 16 in the table"),
        (changed(config="fp32 fp32"), "not in the table"),
    ],
)
def test_a_step_back_is_said(row, regression):
    (said,) = aot_code.regressions(row, {ROW.key: ROW})
    assert regression in said
    assert aot_code.regressions(changed(registers=110), {ROW.key: ROW}) == []


def test_slower_tensor_core_instructions_are_a_step_back():
    def said(before: str, after: str) -> list[str]:
        return aot_code.regressions(changed(products=after), {ROW.key: changed(products=before)})

    assert said("UTCMMA", "HMMA") == ["multiplies with HMMA, UTCMMA in the table"]
    assert said("HMMA", "-") == ["multiplies with -, HMMA in the table"]
    assert not any(said(*same) for same in (("HMMA", "HGMMA"), ("HGMMA", "HGMMA HMMA"), ("-", "-")))


def test_a_better_row_is_no_step_back():
    better = changed(registers=64, shared=1024, occupancy="100%")
    assert aot_code.regressions(better, {ROW.key: ROW}) == []


def test_the_table_is_read_back():
    rows = [ROW, changed(target="sm_80", products="HMMA")]
    launched = {(row.kernel, row.target): f"digest of {row.target}" for row in rows}
    text = f"{aot_table.overview(aot_table.worst(rows), launched)}\n{aot_table.table(rows)}"
    assert list(aot_table.parse(text).values()) == rows
    lines = aot_table.parse_overview(text)
    assert {kind: line["launches"] for kind, line in lines.items()} == launched
    assert {line["fingerprint"] for line in lines.values()} == {fingerprints.fingerprint(ROW.kernel)}
    assert {kind: aot_table.worst(rows)[kind] | line for kind, line in lines.items()} == lines


def test_the_worst_of_a_kernel_is_kept():
    rows = [ROW, changed(registers=90, spill=4, shared=4096, occupancy="12%", load=8, products="HMMA")]
    assert aot_table.worst(rows) == {
        (ROW.kernel, ROW.target): {
            "configurations": "2",
            "registers": "100",
            "spill": "4",
            "shared memory": "4096",
            "occupancy": "12%",
            "widest load": "8",
            "widest store": "16",
            "products": "-, HMMA",
        }
    }


def test_the_fingerprint_of_a_kernel_changes_with_its_code_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def fingerprint(text: str) -> str:
        monkeypatch.setattr(fingerprints, "PACKAGE", f"package{len(list(tmp_path.iterdir()))}")
        (tmp_path / fingerprints.PACKAGE).mkdir()
        (tmp_path / fingerprints.PACKAGE / "kernels.py").write_text(text)
        return fingerprints.fingerprint("kernels.kernel")

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
    recorded = {name: line["fingerprint"] for (name, _), line in kept_lines().items()}
    kernels = set(recorded)
    for unet, side in ((aot_builds.Base, 64), (aot_builds.Super, 256)):
        for case in {case.name: case for case in unet_cases(unet, side, 2)}.values():
            for memory_format in aot_builds.FORMATS:
                launched = aot_builds.launches(case, torch.bfloat16, memory_format, launch.H200)
                functions = [one.kernel.fn for one in launched]
                kernels |= {f"{function.__module__.rpartition('.')[2]}.{function.__name__}" for function in functions}
    changed = sorted(kernel for kernel in kernels if recorded.get(kernel) != fingerprints.fingerprint(kernel))
    assert len(kernels) > 20
    assert not changed, f"{', '.join(changed)} changed: run python -m benchmarks.aot --changed --write"


def test_occupancy():
    # 128 registers for each of 256 threads: two programs. One of 512 threads with 255 each does not fit twice either.
    assert aot_code.occupancy(90, 128, 0, 8) == 0.25
    assert aot_code.occupancy(90, 255, 0, 8) == 0.125
    # 32 programs of one warp, however few registers; memory for two programs, for one on the older card.
    assert aot_code.occupancy(90, 16, 0, 1) == 0.5
    assert aot_code.occupancy(90, 32, 110_000, 4) == 0.125
    assert aot_code.occupancy(80, 32, 110_000, 4) == 0.0625


def test_the_kept_table_is_of_sound_kernels():
    rows = aot_table.parse(aot.TABLE.read_text())
    assert {row.target for row in rows.values()} == {"sm_80", "sm_90", "sm_100"}
    modules = {row.kernel.split(".")[0] for row in rows.values()}
    assert {"group_norm_split", "null_key_flash", "diffusion", "sampling_kernels", "layer_norm_rows"} <= modules
    assert not [row for row in rows.values() if aot_code.complaints(row, wide=False)]


def test_no_configuration_at_all_spills():
    lines = kept_lines()
    assert lines.keys() == {(kernel, f"sm_{target}") for kernel, _ in lines for target in aot_builds.TARGETS}
    assert {line["spill"] for line in lines.values()} == {"0"}


def test_what_kernels_move_is_that_of_the_traffic_table():
    lines = kept_lines()
    moved = traffic.moved(traffic.TABLE.read_text())
    # Of every kernel: of none it is unknown.
    assert {kernel: line["moved / floor"] for (kernel, _), line in lines.items()} == moved


def build(kernel: str, num_warps: int = 4) -> aot_builds.Build:
    signature = (("x", "*fp32"), ("N", "constexpr"))
    return aot_builds.Build(f"kernels.{kernel}", "_forward_kernel", signature, (((1,), 64),), (), num_warps, 2, 90)


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A kept table of made-up builds: the builds, for a test to change, and what was compiled since."""
    builds = {build(kernel): True for kernel in ("layer_norm_rows", "channel_norm_planes", "group_norm_looped")}
    compiled = []

    def compile_builds(wanted):
        compiled.extend(wanted)
        return [changed(kernel=one.key[0], config=one.config, registers=50) for one in wanted]

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(aot, "TABLE", tmp_path / "aot.md")
    monkeypatch.setattr(aot, "enumerate_builds", lambda sizes: builds)
    monkeypatch.setattr(aot, "compile_builds", compile_builds)
    assert aot.main(["--all", "--write"]) == 0
    assert len(compiled) == 3
    del compiled[:]
    return builds, compiled


def test_what_did_not_change_is_taken_from_the_kept_table(made_up, monkeypatch, capsys):
    _, compiled = made_up
    first, code = aot.TABLE.read_text(), fingerprints.fingerprint("channel_norm_planes._forward_kernel")
    assert code in first
    aot.TABLE.write_text(first.replace(code, "00000000").replace(" 50 ", " 70 "))
    assert aot.main(["--changed", "--write"]) == 0
    assert [one.key[0] for one in compiled] == ["channel_norm_planes._forward_kernel"]
    text = aot.TABLE.read_text()
    assert [row.registers for row in aot_table.parse(text).values()] == [70, 50, 70]
    assert [line["registers"] for line in aot_table.parse_overview(text).values()] == ["70", "50", "70"]
    # Nothing can be taken from what another compiler made.
    monkeypatch.setattr(aot, "_versions", lambda: "triton 0.0")
    with pytest.raises(SystemExit):
        aot.main(["--changed"])
    assert "use --all" in capsys.readouterr().err


@pytest.mark.parametrize("whole", ["--all", "--changed"])
@pytest.mark.parametrize(
    "values, said, taken",
    [
        ({"spill": 8}, "spills 8 bytes", False),
        ({"load": 4}, "widest load is of 4 bytes, not of 16", False),
        ({"registers": 90}, "needs 90 registers, 50 in the table", True),
    ],
)
def test_no_table_is_written_of_what_is_wrong(made_up, monkeypatch, capsys, whole, values, said, taken):
    _, compiled = made_up
    text = aot.TABLE.read_text()
    # As if its code had changed.
    text = text.replace(fingerprints.fingerprint("channel_norm_planes._forward_kernel"), "00000000")
    aot.TABLE.write_text(text)
    compile_builds = aot.compile_builds
    monkeypatch.setattr(aot, "compile_builds", lambda wanted: [replaced(row, values) for row in compile_builds(wanted)])
    assert aot.main([whole, "--write"]) == 1
    assert compiled and aot.TABLE.read_text() == text
    told = capsys.readouterr().err
    assert said in told and "aot.md is left as it was" in told
    # On purpose a row may be worse than it was, but meets what every one has to.
    assert aot.main([whole, "--write", "--worse"]) == int(not taken)
    assert (aot.TABLE.read_text() != text) is taken


def replaced(row: aot_code.Row, values: dict) -> aot_code.Row:
    return dataclasses.replace(row, **values) if row.kernel.startswith("channel_norm_planes") else row


@pytest.mark.parametrize("change", ["other warps", "one more", "one less"])
def test_launches_that_are_not_those_of_the_table_are_found_out(made_up, capsys, change):
    builds, compiled = made_up
    assert aot.main([]) == 0
    if change != "one more":
        del builds[build("layer_norm_rows")]
    if change != "one less":
        builds[build("layer_norm_rows", num_warps=8)] = True
    capsys.readouterr()
    assert aot.main([]) == 1
    said = capsys.readouterr().err
    assert "layer_norm_rows._forward_kernel on sm_90: code or launches are not those of the table" in said
    assert "channel_norm_planes" not in said
    del compiled[:]
    assert aot.main(["--changed", "--write"]) == 0
    assert {one.key[0] for one in compiled} <= {"layer_norm_rows._forward_kernel"}
    assert aot.main([]) == 0


def test_a_search_finds_sizes_of_images_that_launch_something_else(made_up, monkeypatch, capsys):
    builds, compiled = made_up
    assert aot.main(["--search", "0.001"]) == 0
    other = {build("layer_norm_rows", num_warps=8): True}
    monkeypatch.setattr(aot, "enumerate_builds", lambda sizes: builds if sizes is aot.ALL_SIZES else other)
    assert aot.main(["--search", "0.001"]) == 1
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert line.endswith(": 1 more, of layer_norm_rows._forward_kernel") and not compiled


def test_the_digest_of_launches_is_of_the_set_of_configurations():
    one, other = build("layer_norm_rows"), build("layer_norm_rows", num_warps=8)
    kind = one.key[0], one.key[2]
    assert fingerprints.digests([one, other]) == fingerprints.digests([other, one])
    assert len({fingerprints.digests(builds)[kind] for builds in ([one], [other], [one, other])}) == 3


def test_cases_are_those_that_networks_can_be_given():
    assert list(unet_cases(aot_builds.Base, 200, 3))
    # It halves images three times.
    assert not list(unet_cases(aot_builds.Base, 100, 3))
    widths = {case.inputs("meta", torch.bfloat16)["null_key"].numel() for case in attention_cases(8, 3)}
    assert widths | {ATTN_DIM_HEAD} == set(null_key_flash.WIDTHS)


@pytest.fixture(scope="module")
def compiled():
    done = run("tests/aot_kernels.py", timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_bad_kernels_are_found_out(compiled):
    found = compiled["kernels"]
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
@pytest.mark.parametrize("name", ["Base", "Super", "BaseTest", "SuperTest"])
def test_what_a_whole_unet_launches_is_enumerated(compiled, name):
    result = compiled["unets"][name]
    assert result["needed"] > 30
    assert {"_mix_kernel", "_whole_kernel"} <= set(result["kernels"])
    assert result["missing"] == []


@pytest.mark.slow
def test_launches_are_those_of_the_table_and_representatives_compile_and_are_no_worse():
    if f"with {aot._versions()}," not in aot.TABLE.read_text():
        pytest.skip("the table is of another version of Triton, whose compiler may spill where this one does not")
    done = run("-m", "benchmarks.aot", timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
