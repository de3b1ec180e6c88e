"""What ``python -m pytest -m gpu`` selects on a machine with a CUDA device."""

import re
from pathlib import Path
from types import SimpleNamespace

import kernel_parity
import pytest
import torch
from conftest import MOST_KEPT, is_of_gpu_lane, pytest_runtest_teardown


def item(*marks, **names):
    return SimpleNamespace(
        module=SimpleNamespace(**names), get_closest_marker=lambda name: next((m for m in marks if m == name), None)
    )


@pytest.mark.parametrize("on_cuda", [True, False])
def test_what_runs_on_the_device_is_selected_where_there_is_one(on_cuda):
    assert is_of_gpu_lane(item(DEVICE=kernel_parity.DEVICE), on_cuda) is on_cuda, "elsewhere it is not to be skipped"
    assert is_of_gpu_lane(item("gpu"), on_cuda)
    assert not is_of_gpu_lane(item("slow", DEVICE="cpu"), on_cuda)
    assert not is_of_gpu_lane(SimpleNamespace(get_closest_marker=lambda name: None), on_cuda)


def test_every_parity_test_says_that_it_runs_on_the_device():
    for path in Path(__file__).parent.glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        for names in re.findall(r"^from kernel_parity import (.*)$", text, re.M):
            marked = "\npytestmark = pytest.mark.gpu\n" in text
            # Tests of what is for CPUs have the tolerances alone from there.
            assert marked or names == "assert_near" or "DEVICE" in names.replace(",", " ").split(), path.name


def test_a_marker_given_at_collection_is_selected(request):
    """In pytest's order: the marker is there before ``-m`` is looked at."""
    hooks = request.config.pluginmanager.hook.pytest_collection_modifyitems.get_hookimpls()
    ours = [
        at for at, hook in enumerate(hooks) if Path(hook.function.__code__.co_filename).parent == Path(__file__).parent
    ]
    marks = [at for at, hook in enumerate(hooks) if hook.plugin_name == "mark"]
    # The last of the list is called first.
    assert len(ours) == len(marks) == 1 and ours[0] > marks[0]


@pytest.mark.parametrize("is_used, reserved, freed", [(True, MOST_KEPT + 1, 1), (True, MOST_KEPT, 0), (False, 0, 0)])
def test_a_process_keeps_little_of_the_device_s_memory(is_used, reserved, freed, monkeypatch):
    """The largest tests take half of a card each, and workers of pytest-xdist come to them at the same time."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_used)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(None))
    pytest_runtest_teardown()
    assert len(calls) == freed
