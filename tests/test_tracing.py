"""torch.compile takes U-Nets and their blocks on the Triton kernels, each as one graph, without a CUDA device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def traced():
    # Dynamo knows the functions of triton.jit and not those of its interpreter, hence a process without it.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HERE / "trace_unet.py"], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_on_our_kernels(operators):
    ours = {operator for operator in operators if operator.startswith("minimagen_fast.")}
    assert any("group_norm_silu" in operator for operator in ours), operators
    assert any("flash" in operator or "attention" in operator for operator in ours), operators


@pytest.mark.parametrize("name", ["Base", "Super"])
def test_a_whole_unet_is_one_graph(traced, name):
    result = traced[name]
    assert result["graphs"] == 1, "recompiled for another timestep"
    assert_on_our_kernels(result["operators"])


def test_blocks_that_are_sampled_are_one_graph_each_from_the_first_step_on(traced):
    result = traced["sampled"]
    assert_on_our_kernels(result["operators"])
    after_step = result["graphs"]
    assert len(after_step) == 3 and after_step[0] > 0 and len(set(after_step)) == 1, f"compiled again: {after_step}"
    for given in ("scale_shift", "keys_values", "skip"):
        assert any(given in name for name in result["inputs"]), result["inputs"]
    assert result["repeats"], "no block was given more conditions than images"
