"""torch.compile takes whole U-Nets on the Triton kernels as one graph, forward and backward, without a CUDA device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["Base", "Super"])
def test_a_whole_unet_is_one_graph(name):
    # Dynamo knows the functions of triton.jit and not those of its interpreter, hence a process without it.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HERE / "trace_unet.py", name], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["graphs"] == 1, "recompiled for another timestep"
    ours = {operator for operator in result["operators"] if operator.startswith("minimagen_fast.")}
    assert any("group_norm_silu" in operator for operator in ours), result["operators"]
    assert any("flash" in operator or "attention" in operator for operator in ours), result["operators"]
