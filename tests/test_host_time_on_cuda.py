"""What an operation costs the host beyond the launch of its kernel: checks, registration, sizes of the launch."""

import time

import pytest
import torch
from kernel_parity import DEVICE, randn

from minimagen_fast.kernels import group_norm_silu, launch, layer_norm, null_key_attention, q_sample

pytestmark = pytest.mark.gpu

# Microseconds of a forward call: what it costs that an operator is registered, and again, where gradients are wanted,
# that autograd notes it down; and all that comes on top of the bare launch without gradients, checks of arguments and
# the choice of an implementation included.
REGISTRATION, EVERYTHING = 15, 40
# Small inputs, so that the card is done before the host: so many launches are under way at once at most.
CALLS, BLOCKS = 50, 200


def _layer_norm():
    return layer_norm, {"x": randn("x", 8, 64), "gain": randn("gain", 64)}


def _group_norm_silu():
    x = randn("x", 2, 128, 8, 8).to(memory_format=torch.channels_last)
    vectors = {"weight": randn("weight", 128), "bias": randn("bias", 128)}
    return (lambda **inputs: group_norm_silu(**inputs, groups=8)), {"x": x, **vectors}


def _null_key_attention():
    q, k, v = (randn(name, 1, 64, 128, dtype=torch.float16) for name in "qkv")
    nulls = {name: randn(name, 64) for name in ("null_key", "null_value")}
    return (lambda **inputs: null_key_attention(**inputs, heads=2)), {"q": q, "k": k, "v": v, **nulls}


def _q_sample():
    schedules = {name: randn(name, 10) for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")}
    images = {name: randn(name, 2, 3, 8, 8) for name in ("x_start", "noise")}
    return q_sample, {**images, "t": torch.tensor([1, 7], device=DEVICE), **schedules}


OPERATIONS = {
    "layer_norm": _layer_norm,
    "group_norm_silu": _group_norm_silu,
    "null_key_attention": _null_key_attention,
    "q_sample": _q_sample,
}


def microseconds(call, calls=CALLS, blocks=BLOCKS):
    """Of one of some calls in a row, at the best of many times; the device is waited for in between."""
    best = float("inf")
    for _ in range(blocks):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best


def with_gradients(function, inputs):
    """A call that keeps what its backward pass needs, of all inputs but timesteps and noise schedules."""
    wanted = {
        name: value.clone().requires_grad_(value.is_floating_point() and not name.startswith("sqrt_"))
        for name, value in inputs.items()
    }

    @torch.enable_grad()
    def call():
        out = function(**wanted, implementation="triton")
        assert out.requires_grad

    return call


def calls_of(name):
    """The calls of the public function, of its operator, of the operator's unregistered function, of its kernel."""
    function, inputs = OPERATIONS[name]()
    with torch.no_grad(), launch.record() as launches:
        function(**{each: value.to("meta") for each, value in inputs.items()}, implementation="triton")
    (bare,) = launches
    # Zeros, since timesteps are among them.
    args = [torch.zeros_like(arg, device=DEVICE) if isinstance(arg, torch.Tensor) else arg for arg in bare.args]
    options = {"num_warps": bare.num_warps, "num_stages": bare.num_stages, **bare.constexprs}

    with torch.no_grad(), Operators() as seen:
        function(**inputs, implementation="triton")
    ((operator, operands),) = (each for each in seen.calls if each[0].namespace == launch.NAMESPACE)
    unregistered = launch.unregistered[operator.name().partition("::")[2]]
    return {
        "function with gradients": with_gradients(function, inputs),
        "function": lambda: function(**inputs, implementation="triton"),
        "operator": lambda: operator(*operands),
        "unregistered": lambda: unregistered(*operands),
        "bare launch": lambda: bare.kernel[bare.grid](*args, **options),
    }


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Which operators are called, and with what."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def times():
    """Microseconds of each operation's calls."""
    with torch.no_grad():
        return {name: {what: microseconds(call) for what, call in calls_of(name).items()} for name in OPERATIONS}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_costs_little_more_than_a_bare_launch(name, times):
    lines = (
        f"{each}: {', '.join(f'{what} {microseconds:.1f} us' for what, microseconds in calls.items())}"
        for each, calls in times.items()
    )
    table = "\n".join(lines)
    print(table)
    spent = times[name]
    assert spent["operator"] - spent["unregistered"] < REGISTRATION, table
    assert spent["function with gradients"] - spent["function"] < REGISTRATION, table
    assert spent["function"] - spent["bare launch"] < EVERYTHING, table
