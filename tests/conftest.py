"""What holds for all tests: no network, no traces outside pytest's own folders, GPU tests only where there is a GPU."""

import gc
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from importlib.metadata import version

import pytest
from interpreter import count_with_arrays_of_one_value, do_nothing_twice


def pytest_configure(config):
    # What a shell starts in the background ignores Ctrl-C, and so would the programs that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Files go to workers in the order of their names. In that of the number of their tests, which says nothing of their
    # time, a long one would come last, and the other processors wait for it.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    # Workers of pytest-xdist share the processors: two of them, each with a thread for every processor, would wait for
    # one another at every operation. Subprocesses take the number from the environment.
    if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
        threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        # A test that runs pytest itself would have it take itself for a worker.
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
            os.environ.pop(name, None)
    # Without a CUDA device the Triton kernels run in Triton's interpreter, which must be known before it is imported.
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Float32 is float32 in what results are compared with: cuDNN would round to TF32.
    torch.backends.cudnn.allow_tf32 = False
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        do_nothing_twice()
        if version("triton").startswith("3.6."):
            count_with_arrays_of_one_value()
    # The text encoders look for files on the Hugging Face hub; tests that want that serve one themselves.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The embedded text encoder is built once for all tests, new every time. Workers of pytest-xdist share it.
    if "MINIMAGEN_FAST_CACHE" not in os.environ:
        os.environ["MINIMAGEN_FAST_CACHE"] = config.test_cache = tempfile.mkdtemp(prefix="minimagen_fast-tests-")


def pytest_unconfigure(config):
    if hasattr(config, "test_cache"):
        del os.environ["MINIMAGEN_FAST_CACHE"]
        shutil.rmtree(config.test_cache)


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN, so that what a kernel does not write shows."""
    import torch

    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def is_of_gpu_lane(item, on_cuda):
    """Whether ``-m gpu`` selects a test: it needs a CUDA device, or runs on it where there is one."""
    # Those run on it that take their device from kernel_parity.py.
    parity = sys.modules.get("kernel_parity")
    follows = parity is not None and getattr(getattr(item, "module", None), "DEVICE", None) is parity.DEVICE
    return bool(item.get_closest_marker("gpu")) or (on_cuda and follows)


# Before pytest looks at the expression after -m.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    import torch

    on_cuda = torch.cuda.is_available()
    for item in items:
        if is_of_gpu_lane(item, on_cuda):
            item.add_marker(pytest.mark.gpu if on_cuda else pytest.mark.skip(reason="needs a CUDA device"))


# Of a device, in bytes, that a process keeps for its next tests.
MOST_KEPT = 2**30


def pytest_runtest_teardown():
    """Where several processes test on one device, what is free in one of them is not to be missing in another."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > MOST_KEPT:
        torch.cuda.empty_cache()


def pytest_collection_finish():
    # What was imported stays until the end. To go through all of it time and again took a tenth of the tests' time.
    gc.collect()
    gc.freeze()
