"""The job script for Slurm, run dry: with programs in place of Slurm's that note what they were called with."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "slurm" / "train.sbatch"


@pytest.fixture
def slurm(tmp_path):
    """Starts the script as Slurm would; `training` is what the shell runs in place of srun."""
    programs = tmp_path / "programs"
    programs.mkdir()

    def program(name, text):
        (programs / name).write_text("#!/bin/bash\n" + text)
        (programs / name).chmod(0o755)

    def start(*words, training="exit 0", restarts="0"):
        program("srun", f'printf "%s\\n" "$@" > {tmp_path}/srun\n{training}\n')
        program(
            "scontrol",
            f'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; else echo "$@" > {tmp_path}/scontrol; fi\n',
        )
        environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_JOB_ID": "17",
            "SLURM_RESTART_COUNT": restarts,
        }
        # Slurm runs a copy of it, which is elsewhere.
        copy = tmp_path / "slurm_script"
        copy.write_bytes(SCRIPT.read_bytes())
        with open(tmp_path / "stderr", "w") as file:
            return subprocess.Popen(["bash", str(copy), *words], env=environment, stderr=file)

    return start


def lines(tmp_path, name):
    return (tmp_path / name).read_text().splitlines()


def test_it_starts_torchrun_on_every_node_with_the_words_of_the_train_command(slurm, tmp_path):
    process = slurm("--OUT", str(tmp_path / "a run"), "--DATA", "some pictures", "--PARALLEL", "hybrid")
    assert process.wait() == 0, lines(tmp_path, "stderr")
    assert lines(tmp_path, "srun") == [
        "torchrun",
        "--nnodes=2",
        "--nproc-per-node=8",
        "--rdzv-backend=c10d",
        "--rdzv-id=17",
        "--rdzv-endpoint=node1:29400",
        "-m",
        "minimagen_fast",
        "train",
        "--OUT",
        str(tmp_path / "a run"),
        "--DATA",
        "some pictures",
        "--PARALLEL",
        "hybrid",
    ]
    assert not (tmp_path / "scontrol").exists(), "what is done is not put back into the queue"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_stops_the_training_and_the_job_goes_back_into_the_queue(slurm, tmp_path, number):
    out = tmp_path / "run"
    waiting = f"touch {tmp_path}/begun; while [[ ! -e {out}/stop ]]; do sleep 0.02; done; exit 75"
    process = slurm("--OUT", str(out), training=waiting)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == 0
    assert lines(tmp_path, "scontrol") == ["requeue 17"]


@pytest.mark.parametrize("restarts, requeued, status", [("0", True, 0), ("5", False, 76)])
def test_after_a_lost_process_it_goes_on_a_few_times(slurm, tmp_path, restarts, requeued, status):
    process = slurm("--OUT", str(tmp_path / "run"), training="exit 76", restarts=restarts)
    assert process.wait() == status
    assert (tmp_path / "scontrol").exists() == requeued


def test_a_stop_of_the_run_before_is_no_stop_of_this_one(slurm, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "stop").touch()
    assert slurm(f"--OUT={out}", training="exit 2", restarts="5").wait() == 2
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("words", [("--DATA", "pictures"), ("--OUT",), ("--OUT=",)])
def test_without_a_directory_it_says_so(slurm, tmp_path, words):
    process = slurm(*words)
    assert process.wait() == 2 and "give --OUT" in lines(tmp_path, "stderr")[0]
