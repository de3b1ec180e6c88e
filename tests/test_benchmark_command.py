"""``minimagen-fast bench``: two runs compared, the README's section, errors, and that the suite is found."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from made_results import CARD, MACHINE, STARTED, make_file, record, untimed, write

from benchmarks import readme
from benchmarks.compare import compare
from benchmarks.machine import ROOT
from benchmarks.reading import read
from benchmarks.summary import losses
from minimagen_fast import cli


@pytest.fixture
def cpu(tmp_path) -> Path:
    return make_file(tmp_path, "cpu")


# Comparing


def moved(file: Path, target: Path, changes: dict[str, float], **more) -> Path:
    """A copy of a result file with the times of some cases multiplied, and some fields replaced."""
    content = json.loads(file.read_text()) | more
    for case in content["cases"]:
        for words, factor in changes.items():
            if words in case["id"] and case["seconds"]:
                spread = case["seconds"]
                case["seconds"] = {key: factor * spread[key] for key in ("median", "q1", "q3", "min")}
                case["seconds"]["samples"] = [factor * sample for sample in spread["samples"]]
    target.write_text(json.dumps(content))
    return target


def test_what_moved_beyond_noise_and_threshold(cpu, tmp_path, capsys):
    same = "laptop-base@64/forward/b2-3x64x64/float32/ours"
    changes = {f"denoiser/{same}-bf": 1.5, "q_sample/forward/b1-": 1.04, "ddim_step": 0.5}
    other = moved(cpu, tmp_path / "b.json", changes)
    found = compare(read(cpu), read(other))
    assert [(change.before.variant, round(change.factor, 3)) for change in found.slower] == [
        ("ours-bf16-channels_last", 1.5)
    ]
    assert {change.before.name for change in found.faster} == {"ddim_step"} and len(found.faster) == 6
    assert not (found.heavier or found.lighter or found.broken or found.mended or found.gone or found.new)
    assert found.regressed and found.timed == len([case for case in read(cpu).cases if case.seconds])
    assert len(compare(read(cpu), read(other), 0.03).slower) == 4, "quartiles are 1% apart from the median"

    assert cli.main(["bench", "compare", str(cpu), str(other)]) == 1
    out = capsys.readouterr().out
    assert "| +50.0% |" in out and "| -50.0% |" in out and "There are regressions." in out
    assert cli.main(["bench", "compare", str(cpu), str(other), "--threshold", "60%"]) == 0
    assert "No regression." in capsys.readouterr().out
    assert cli.main(["bench", "compare", str(cpu), str(cpu)]) == 0


def test_what_is_within_the_quartiles_did_not_move(tmp_path):
    words = "kernels/q_sample/forward/b1/float32/ours"
    first = read(write(tmp_path / "a.json", [record(words, 1.0, noise=0.1)]))
    second = read(write(tmp_path / "b.json", [record(words, 1.15, noise=0.1)]))
    assert not compare(first, second).slower
    third = read(write(tmp_path / "c.json", [record(words, 1.3, noise=0.1)]))
    assert compare(first, third).slower


def test_memory_failures_and_what_is_gone(tmp_path, capsys):
    words = "kernels/q_sample/forward/{}/float32/ours"
    before = [record(words.format(f"b{n}"), 1.0, peak_bytes=1000) for n in range(5)]
    after = copy.deepcopy(before)
    after[0].peak_bytes, after[1].peak_bytes = 1100, 900
    after[2] = untimed(words.format("b2"), "parity_failed", "far away")
    after[3] = untimed(words.format("b3"), "unavailable", "no time left")
    after[4] = record(words.format("b5"), 1.0)
    first, second = write(tmp_path / "a.json", before), write(tmp_path / "b.json", after)
    found = compare(read(first), read(second))
    assert [change.factor for change in (*found.heavier, *found.lighter)] == [pytest.approx(1.1), pytest.approx(0.9)]
    assert [change.after.reason for change in found.broken] == ["far away"]
    assert [len(changes) for changes in (found.slower, found.faster, found.mended)] == [0, 0, 0]
    assert [name.split("/")[3] for name in found.gone] == ["b3", "b4"]
    assert [name.split("/")[3] for name in found.new] == ["b5"]
    back = compare(read(second), read(first))
    assert [change.before.reason for change in back.mended] == ["far away"] and not back.broken
    assert back.regressed, "more memory the other way round"
    assert cli.main(["bench", "compare", str(first), str(second)]) == 1
    out = capsys.readouterr().out
    assert "far away" in out and "Timed in A only" in out and "+10.0%" in out


@pytest.mark.parametrize(
    ("field", "value"),
    [("profile", "full"), ("machine", MACHINE | {"device": "Other"}), ("machine", MACHINE | {"threads": 1})],
)
def test_other_machines_and_profiles_are_not_compared(cpu, tmp_path, capsys, field, value):
    other = moved(cpu, tmp_path / "b.json", {}, **{field: value})
    assert cli.main(["bench", "compare", str(cpu), str(other)]) == 2
    assert "cannot be compared" in capsys.readouterr().err
    assert cli.main(["bench", "compare", str(cpu), str(other), "--force"]) == 0


def test_runs_without_a_common_case_are_not_compared(cpu, tmp_path, capsys):
    content = json.loads(cpu.read_text())
    (tmp_path / "b.json").write_text(json.dumps(content | {"cases": []}))
    assert cli.main(["bench", "compare", str(cpu), str(tmp_path / "b.json")]) == 2
    assert "no case was timed in both" in capsys.readouterr().err


def test_user_errors_end_with_a_message(cpu, tmp_path, capsys):
    for words in (
        ["report", "nowhere.json"],
        ["compare", str(cpu), str(moved(cpu, tmp_path / "b.json", {}, schema=9))],
    ):
        assert cli.main(["bench", *words]) == 2
        assert "error:" in capsys.readouterr().err
    for words in (["compare", "a", "b", "--threshold", "0.05"], ["run", "--profile", "huge"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["bench", *words])
        assert re.search("with the sign|invalid choice", capsys.readouterr().err)
    with pytest.raises(ValueError, match="threshold must be at least 0"):
        compare(read(write(tmp_path / "a.json", ())), read(tmp_path / "a.json"), -0.1)


def test_without_the_suite_the_command_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "_BENCHMARKS", tmp_path / "benchmarks" / "cli.py")
    assert cli.main(["bench", "run", "--profile", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "Clone the repository" in error and str(tmp_path) in error


def test_the_suite_is_found_from_anywhere(cpu, tmp_path):
    """Also where only the package can be imported, as after an editable install."""
    (tmp_path / "minimagen_fast").symlink_to(ROOT / "minimagen_fast")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-m", "minimagen_fast", "bench", "compare", str(cpu), str(cpu)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "No regression." in done.stdout, done.stderr


def test_a_run_goes_through_pytest(monkeypatch, tmp_path, capsys):
    """The real one is in test_benchmarks.py; here pytest has nothing to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = ["bench", "run", "--profile", "smoke", "--results", "here", "-k", "nothing_is_called_so"]
    assert cli.main(words) == pytest.ExitCode.NO_TESTS_COLLECTED
    assert not (tmp_path / "here").exists(), "no case, no file"


def test_commands_of_the_guide_are_understood():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    ours = [shlex.split(line)[1:] for line in lines if line.startswith("minimagen-fast ")]
    assert {words[1] for words in ours} == {"run", "report", "compare", "readme"}
    for words in ours:
        cli._parser("bench").parse_args(words)
    folders = re.findall(r"--results ([\w/]+)", text)
    assert len(folders) == len(set(folders)), "a second file in a folder that is compared would be one too many"
    modules = re.findall(r"^python -m (\S+)$", "\n".join(lines), re.M)
    assert len(modules) == 2 and all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in modules)
    for link in re.findall(r"\]\((\w[^)]*)\)", text):
        assert (ROOT / "benchmarks" / link).exists(), link


# The README's section


def test_the_readme_says_what_the_committed_results_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files = readme.committed_results()
    section = readme.readme_section(files)
    if readme.BEGIN not in text:
        assert section == readme.NOTHING_MEASURED, "there are results, but no markers for them"
        return
    assert readme.replace_section(text, section) == text, "rewrite it with `minimagen-fast bench readme`"
    for link in re.findall(r"\]\((benchmarks/[^)#]+)", section):
        assert (ROOT / link).is_file(), f"{link} is not there; make it with `minimagen-fast bench report`"


def test_the_newest_complete_result_of_every_device(tmp_path):
    words = "sampling/laptop/-/b1/float32/ours"
    later = STARTED + timedelta(days=1)
    for folder, name, options in (
        ("cpu", "old", {}),
        ("cpu", "new", {"started": later}),
        ("cpu", "stopped", {"started": later + timedelta(days=1), "complete": False}),
        ("cpu", "smoke", {"started": later + timedelta(days=1), "profile": "smoke"}),
        ("card", "only", {"machine": CARD, "profile": "gpu"}),
    ):
        write(tmp_path / folder / f"{name}.json", [record(words, 1.0)], **options)
    files = readme.committed_results(tmp_path, tmp_path)
    assert len(files) == 5
    section = readme.readme_section(files, tmp_path)
    assert re.findall(r"\[all numbers\]\(([^)]+)\)", section) == ["card/only.json", "cpu/new.json"]
    assert readme.readme_section([], tmp_path) == readme.NOTHING_MEASURED


def test_only_what_git_knows_is_committed(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    kept, other = (write(tmp_path / "results" / "cpu" / f"{name}.json", ()) for name in ("kept", "other"))
    subprocess.run(["git", "-C", str(tmp_path), "add", str(kept)], check=True)
    assert other.exists() and readme.committed_results(tmp_path, tmp_path / "results") == [kept]


def test_the_section_of_a_run(cpu, tmp_path):
    section = readme.readme_section([cpu], tmp_path)
    assert "[report](test-cpu/cpu-2026-11-22-abc1234/report.md)" in section
    row = next(line for line in section.splitlines() if line.startswith("| denoiser: laptop-base@64, forward"))
    assert "| 60 ms ± 1.0% | ours-bf16-channels_last | 3.3x | 1.5x | 1.5x |" in row
    row = next(line for line in section.splitlines() if line.startswith("| sampling"))
    assert "(1.03 images/s) | ours-bf16-channels_last | 3.3x | – | – |" in row
    assert re.search(r"\| q_sample \| forward \| float32 \| \S+ \| \S+ \|", section)
    assert f"Open losses: {len(losses(read(cpu)))}, " in section
    assert (
        "Cases not measured: 1, [with the reasons](test-cpu/cpu-2026-11-22-abc1234/report.md#not-measured)." in section
    )


def test_the_section_is_replaced_between_its_markers(tmp_path):
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    (tmp_path / "README.md").write_text(text)
    assert readme.update_readme(tmp_path, tmp_path / "results") == (tmp_path / "README.md", True)
    written = (tmp_path / "README.md").read_text()
    assert written == f"before\n{readme.BEGIN}\n{readme.NOTHING_MEASURED}\n{readme.END}\nafter\n"
    assert readme.update_readme(tmp_path, tmp_path / "results")[1] is False
    for broken in ("no markers", f"{readme.END}{readme.BEGIN}", f"{text}{readme.BEGIN}"):
        with pytest.raises(ValueError, match="README.md must have one"):
            readme.replace_section(broken, "")
