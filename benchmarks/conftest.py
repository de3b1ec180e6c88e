"""pytest for the benchmarks: options, one item for each case, the result file, a line for each result.

A test module here has ``plans(profile, device)``, which gives its cases, and one test that takes a ``plan`` and runs
it.
"""

import importlib.util
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from .profiles import PROFILES, default_profile

_STATE = pytest.StashKey()


class _State:
    """What lasts from the beginning of the run to its end."""

    def __init__(self, device, profile, folder):
        self.device, self.profile, self.folder = device, profile, folder
        self.started, self.date = time.monotonic(), datetime.now(timezone.utc)
        self.harness = None
        self.planned: set[str] = set()
        self.whole = True


def pytest_addoption(parser):
    group = parser.getgroup("minimagen_fast benchmarks")
    group.addoption("--profile", choices=[*PROFILES], help="how much to measure (gpu with a CUDA device, else cpu)")
    group.addoption("--results", type=Path, help="folder for the result file (benchmarks/results/DEVICE)")


def pytest_configure(config):
    import torch

    from minimagen_fast import acceleration
    from minimagen_fast.kernels import launch

    if importlib.util.find_spec("pytest_benchmark") is None:
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install -e '.[bench]'")
    if launch.INTERPRETED:
        raise pytest.UsageError("TRITON_INTERPRET is set, so kernels would run in an interpreter: unset it to measure")
    if acceleration.environment_request():
        raise pytest.UsageError(
            f"{acceleration.ENVIRONMENT_VARIABLE} is set, so ours would not run as by default: unset it"
        )
    if config.option.benchmark_disable or getattr(config.option, "dist", "no") != "no":
        raise pytest.UsageError("benchmarks cannot be timed with --benchmark-disable or -n: leave it out")
    cuda = torch.cuda.is_available()
    name = config.option.profile or default_profile(cuda)
    if name == "gpu" and not cuda:
        raise pytest.UsageError("--profile gpu needs a CUDA device, and there is none: use --profile cpu")
    on_cuda = cuda and name in ("gpu", "full")
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    config.stash[_STATE] = _State(device, PROFILES[name], config.option.results)


def pytest_report_header(config):
    state = config.stash[_STATE]
    return f"benchmarks: profile {state.profile.name}, up to {state.profile.seconds:.0f} s, on {state.device}"


def pytest_generate_tests(metafunc):
    if "plan" in metafunc.fixturenames:
        state = metafunc.config.stash[_STATE]
        plans = list(metafunc.module.plans(state.profile.name, state.device))
        metafunc.parametrize("plan", plans, ids=[plan.identity.id for plan in plans])


def pytest_collection_modifyitems(config, items):
    from .results import SECTIONS

    with_parameters = [item for item in items if hasattr(item, "callspec")]
    plans = {item: item.callspec.params["plan"] for item in with_parameters if "plan" in item.callspec.params}
    places = {item: (plan.priority, SECTIONS.index(plan.identity.section)) for item, plan in plans.items()}
    items.sort(key=lambda item: places.get(item, (-1, 0)))
    state = config.stash[_STATE]
    state.planned = {plan.identity.id for plan in plans.values()}
    state.whole = {plan.identity.section for plan in plans.values()} == set(SECTIONS)


def pytest_deselected(items):
    for item in items:
        item.config.stash[_STATE].whole = False


@pytest.fixture(scope="session")
def harness(request, tmp_path_factory):
    """The harness of this run; its result file is there from now on."""
    from .harness import Harness
    from .machine import device_slug, machine_info, software_info
    from .peers import missing_peers, peer_versions
    from .prepared import Context
    from .results import FOLDER, ResultFile, file_name

    state = request.config.stash[_STATE]
    machine, software = machine_info(state.device), {**software_info(), "peers": peer_versions()}
    context = Context.of(state.device, state.profile, tmp_path_factory.mktemp("scratch"))
    folder = state.folder or FOLDER / device_slug(machine)
    file = folder / file_name(state.profile.name, state.date, software)
    header = {"profile": state.profile.name, "started": state.date.isoformat(timespec="seconds")}
    results = ResultFile(file, header | {"machine": machine, "software": software, "ceilings": context.ceilings})
    for what, why in missing_peers():
        results.add_missing(what, why)
    state.harness = Harness(context, results, state.started)
    return state.harness


def pytest_report_teststatus(report):
    if report.when == "call" and not report.failed and "benchmarks/" in report.nodeid:
        return report.outcome, "", report.outcome.upper()  # no dot: it has a line of its own
    return None


def pytest_runtest_logreport(report):
    for name, line in report.user_properties:
        if name == "result" and report.when == "teardown":
            print(f"\n{line}", end="", flush=True)


@pytest.fixture(autouse=True)
def _show_result(request, harness):
    """Leave the line on this item's record where the report finds it."""
    yield
    request.node.user_properties.append(("result", harness.last_summary))


def pytest_sessionfinish(session, exitstatus):
    state = session.config.stash.get(_STATE, None)
    if state is None or state.harness is None:
        return
    ended_by_itself = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    results = state.harness.results
    complete = state.whole and ended_by_itself and state.planned <= results.recorded
    results.finish(complete, state.harness.seconds)


def pytest_terminal_summary(terminalreporter):
    state = terminalreporter.config.stash.get(_STATE, None)
    if state is not None and state.harness is not None:
        terminalreporter.write_line(f"Results: {state.harness.results.path}")
