"""Which implementation runs, and how launches are recorded."""

import contextlib
import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from fast_path import Counts
from torch._subclasses.fake_tensor import FakeTensorMode

from minimagen_fast.kernels import (
    channel_layer_norm,
    ddim_step,
    dispatch,
    group_norm_silu,
    implementation,
    launch,
    layer_norm,
    null_key_attention,
    q_sample,
    use_implementation,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Where there is a CUDA device the kernels take tensors of that alone.
ON_THE_CPU = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels on tensors of the CPU")


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())


def test_auto_takes_the_first_that_can_do_the_job():
    assert dispatch.select("op", {"triton": [], "reference": []}, CUDA) == "triton"
    with pytest.warns(UserWarning, match="op runs as 'sdpa', not as a Triton kernel: too wide; too long"):
        chosen = dispatch.select("op", {"triton": ["too wide", "too long"], "sdpa": [], "reference": []}, CUDA)
    assert chosen == "sdpa"


def test_auto_warns_once_for_a_reason_and_never_without_a_cuda_device():
    candidates = {"triton": ["too wide"], "reference": []}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for device in (CUDA, CUDA, CPU, torch.device("meta")):
            assert dispatch.select("op", candidates, device) == "reference"
        dispatch.select("op", {**candidates, "triton": ["too long"]}, CUDA)
    assert [str(warning.message).partition(": ")[2] for warning in said] == ["too wide", "too long"]


def test_auto_leaves_the_interpreter_to_those_who_ask_for_it():
    candidates = {"triton": [], "reference": []}
    assert dispatch.select("op", candidates, CPU) == "reference"
    assert dispatch.select("op", candidates, CPU, "triton") == "triton"


def test_a_choice_that_cannot_be_honoured_is_refused_with_every_reason():
    with pytest.raises(ValueError, match="'triton' of op cannot be used here: too wide; too long"):
        dispatch.select("op", {"triton": ["too wide", "too long"], "reference": []}, CUDA, "triton")


def test_reasons_are_looked_for_when_they_are_asked_for():
    asked = []

    def reasons(*found):
        return lambda: asked.append(found) or found

    candidates = {"triton": reasons("too wide"), "sdpa": reasons(), "sdpa_merge": reasons("too long"), "reference": []}
    assert dispatch.select("op", candidates, CPU) == "sdpa"
    assert asked == [()]
    with pytest.raises(ValueError, match="'sdpa_merge' of op cannot be used here: too long"):
        dispatch.select("op", candidates, CPU, "sdpa_merge")
    with pytest.warns(UserWarning, match="op runs as 'sdpa', not as a Triton kernel: too wide"):
        assert dispatch.select("op", candidates, CUDA) == "sdpa"


def test_a_choice_for_attention_leaves_other_operations_alone():
    with use_implementation("xformers"):
        assert dispatch.select("op", {"triton": [], "reference": []}, CUDA) == "triton"


@pytest.mark.parametrize("choice", ["sdpa", "sdpa_merge", "xformers"])
def test_a_call_is_refused_a_choice_that_its_operation_does_not_have(choice):
    x, gain = torch.ones(1, 4, 2, 2), torch.ones(4)
    calls = {
        "layer_norm": lambda **options: layer_norm(x.flatten(2).mT, gain, **options),
        "channel_layer_norm": lambda **options: channel_layer_norm(x, gain, **options),
        "group_norm_silu": lambda **options: group_norm_silu(x, groups=2, **options),
    }
    for operation, call in calls.items():
        message = f"implementation of {operation} must be one of auto, triton, reference; got '{choice}'"
        with pytest.raises(ValueError, match=message):
            call(implementation=choice)
        # For the whole process it is a choice for attention.
        with use_implementation(choice):
            call()
            call(implementation="auto")


def test_the_block_sets_the_choice_and_the_call_overrides_it():
    before = implementation()
    with use_implementation("reference"):
        assert implementation() == "reference" and implementation("triton") == "triton"
        with pytest.raises(RuntimeError), use_implementation("sdpa"):
            raise RuntimeError
        assert implementation() == "reference"
    assert implementation() == before
    with pytest.raises(ValueError, match="implementation must be one of auto, triton"):
        implementation("fastest")


@pytest.mark.parametrize(
    "tensors, reason",
    [
        ([torch.zeros(1), torch.zeros(1, device="meta")], "several devices, cpu, meta"),
        ([torch.zeros(1, dtype=torch.float64)], "not from torch.float64"),
        ([torch.zeros(1), None, torch.zeros(1, dtype=torch.int64)], None),
    ],
)
def test_reasons_against_triton(monkeypatch, tensors, reason):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    reasons = dispatch.triton_reasons(*tensors)
    assert len(reasons) == (reason is not None) and all(reason in text for text in reasons)


def test_all_reasons_of_a_card_are_given(monkeypatch):
    monkeypatch.setattr(launch, "_cuda_target", lambda index: launch.Target((7, 5), 40, 1))
    monkeypatch.setattr(launch, "_missing_to_build", lambda: "there is no compiler")
    reasons = [
        "there is no compiler",
        r"cuda:0 has compute capability \(7, 5\), less than \(8, 0\)",
        "it computes in float32 from float32, float16 or bfloat16, not from torch.float64",
        "it takes rows of 1 to 8192 values, not 8193",
    ]
    with FakeTensorMode():
        x, gain = torch.empty(2, 8193, device=CUDA).double(), torch.empty(8193, device=CUDA)
        with pytest.raises(ValueError, match=f"'triton' of layer_norm cannot be used here: {'; '.join(reasons)}\\."):
            layer_norm(x, gain, implementation="triton")
        with pytest.warns(UserWarning, match=f"'reference', not as a Triton kernel: {'; '.join(reasons)}$"):
            assert layer_norm(x, gain).shape == x.shape


def test_what_is_not_installed_or_not_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert dispatch.triton_reasons(torch.zeros(1)) == ["the tensors are on cpu, not on a CUDA device"]
    monkeypatch.setattr(launch, "AVAILABLE", False)
    assert "triton is not installed" in dispatch.triton_reasons(torch.zeros(1, device="meta"))


def test_the_card_is_a_constant_to_torch_compile(monkeypatch):
    monkeypatch.setattr(launch, "_cuda_target", lambda index: launch.Target((7, 5), 10 + index, 1))

    def function(x):
        return x + launch.capability(torch.device("cuda", 3))[0]

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [7, 7]
    # Said in torch's way, but without torch's compiler.
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked) == vars(launch.untraced(lambda: None))


def test_a_fallback_compiles_without_a_graph_break_and_is_warned_of(monkeypatch):
    monkeypatch.setattr(launch, "_cuda_target", lambda index: launch.H200)
    monkeypatch.setattr(launch, "_missing_to_build", lambda: None)
    with FakeTensorMode():
        x, gain = torch.empty(2, 8193, device=CUDA), torch.empty(8193, device=CUDA)
        torch._dynamo.reset()
        compiled = torch.compile(layer_norm, fullgraph=True, backend="eager")
        message = "layer_norm runs as 'reference', not as a Triton kernel: it takes rows of 1 to 8192 values, not 8193"
        with pytest.warns(UserWarning, match=message) as said:
            assert compiled(x, gain).shape == layer_norm(x, gain).shape == x.shape
    assert len(said) == 1


def test_launches_on_meta_tensors_are_recorded_for_the_card_that_is_asked_about():
    x, gain = torch.empty(2**18, 256, device="meta"), torch.empty(256, device="meta")
    grids = []
    for card in (launch.A100, launch.B200):
        with launch.record(card) as recorded:
            layer_norm(x, gain, implementation="triton")
        (only,) = recorded
        assert only.args[0].shape == x.shape and only.constexprs["C"] == 256
        grids.append(only.grid[0])
    assert grids[0] < grids[1]
    assert layer_norm(x, gain, implementation="triton").shape == x.shape and len(recorded) == 1


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((current[-1], grid, options))

    @contextlib.contextmanager
    def device(given):
        current.append(given.index)
        yield
        current.pop()

    current, launched = [0], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        tensors = [torch.empty(2, device=f"cuda:{index}") for index in (0, 1)]
    for tensor in tensors:
        launch.run(Kernel(), (3,), 1.0, tensor, num_warps=8, BLOCK=16)
        launch.run(Kernel(), (3, 0), 1.0, tensor)
    options = {"num_warps": 8, "num_stages": 2, "BLOCK": 16}
    assert launched == [(0, (3,), options), (1, (3,), options)] and current == [0]


def test_choices_of_threads_that_end_in_any_order():
    before = implementation()
    one, other = use_implementation("reference"), use_implementation("sdpa")
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert implementation() == "sdpa"
    other.__exit__(None, None, None)
    assert implementation() == before, "a choice was left behind"


def operators_of(run):
    """The operators of this package that torch's dispatcher is asked for."""
    with torch.autograd.profiler.profile() as profile:
        run()
    return {event.name for event in profile.function_events if event.name.startswith(launch.NAMESPACE)}


@ON_THE_CPU
def test_operators_are_called_where_something_looks_at_them():
    x, gain = torch.randn(3, 8), torch.randn(8)

    def forward_and_backward():
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gain)]
        layer_norm(*leaves, implementation="triton").square().sum().backward()
        return [leaf.grad for leaf in leaves]

    names = {forward := f"{launch.NAMESPACE}::layer_norm", f"{forward}_backward"}
    assert operators_of(forward_and_backward) == set()
    direct = forward_and_backward()
    with Counts() as seen:
        assert operators_of(forward_and_backward) == names
        through_operators = forward_and_backward()
    assert {name.removesuffix(".default") for name in seen.names} >= names
    assert all(map(torch.equal, direct, through_operators))

    class Own(torch.Tensor):
        pass

    own = x.as_subclass(Own)
    assert operators_of(lambda: layer_norm(own, gain, implementation="triton")) == {forward}


def with_kernels(implementation):
    """Functions of images (2, 32, 2, 2) by name, one for every pair of operators."""
    vector, t, schedule = torch.linspace(0.5, 1.5, 32), torch.tensor([3, 7]), torch.linspace(0.9, 0.1, 10)

    def attention(x, implementation):
        tokens = x.flatten(2).mT
        return null_key_attention(tokens, tokens, tokens, vector, vector, heads=1, implementation=implementation)

    return {
        "layer_norm": lambda x: layer_norm(x.flatten(2).mT, vector, implementation=implementation),
        "channel_layer_norm": lambda x: channel_layer_norm(x, vector, implementation=implementation),
        "group_norm_silu": lambda x: group_norm_silu(x, vector, groups=4, implementation=implementation),
        "mix": lambda x: q_sample(x, t, x, schedule, schedule, implementation=implementation),
        "null_key_flash": lambda x: attention(x, implementation),
        "null_key_merge": lambda x: attention(x, "reference" if implementation == "reference" else "sdpa_merge"),
    }


OPERATORS = pytest.mark.parametrize("name", with_kernels("triton"))


def images():
    return torch.randn(2, 32, 2, 2, generator=torch.Generator().manual_seed(0))


@ON_THE_CPU
@OPERATORS
def test_gradients_of_gradients_are_refused_by_name(name):
    def gradient_of(function, x):
        return torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)[0]

    x = images().requires_grad_()
    gradient = gradient_of(with_kernels("triton")[name], x)
    expected = gradient_of(with_kernels("reference")[name], x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match=f'::{name}_backward has no gradients.*"reference"'):
        gradient.square().sum().backward()
    expected.square().sum().backward()


@ON_THE_CPU
@OPERATORS
@pytest.mark.parametrize("counted", [False, True])
def test_derivatives_in_forward_mode_are_refused_by_name(name, counted):
    function, x = with_kernels("triton")[name], images()
    refused = pytest.raises(NotImplementedError, match=f'::{name} has no derivatives in forward mode.*"reference"')
    with contextlib.ExitStack() as stack:
        if counted:
            stack.enter_context(Counts())
        with fwAD.dual_level():
            # What has no tangent is computed as ever.
            torch.testing.assert_close(function(x), with_kernels("reference")[name](x), rtol=1e-4, atol=1e-5)
            with refused:
                function(fwAD.make_dual(x, x))
            with torch.no_grad(), refused:
                function(fwAD.make_dual(x, x))
        with refused:
            torch.func.jvp(function, (x,), (x,))
    with refused:
        torch.func.jacfwd(function)(x)
    _, slope = torch.func.jvp(lambda factor: function(x) * factor, (torch.ones(()),), (torch.ones(()),))
    torch.testing.assert_close(slope, function(x))


@ON_THE_CPU
@OPERATORS
def test_derivatives_by_transforms_and_batched_ones_are_refused_by_name(name):
    function, x = with_kernels("triton")[name], images()
    refused = pytest.raises(NotImplementedError, match=f'::{name} has no derivatives by transforms.*"reference"')
    with refused:
        torch.func.grad(lambda x: function(x).sum())(x)
    with refused:
        torch.func.jacrev(function)(x)
    x.requires_grad_()
    out, expected = function(x), with_kernels("reference")[name](x)
    several = torch.stack([out.detach().sin(), out.detach()])
    with pytest.raises(NotImplementedError, match=f'::{name} has no batched gradients.*"reference"'):
        torch.autograd.grad(out, x, several, is_grads_batched=True, retain_graph=True)
    (gradients,) = torch.autograd.grad(expected, x, several, is_grads_batched=True)
    torch.testing.assert_close(torch.autograd.grad(out, x, several[1])[0], gradients[1], rtol=1e-4, atol=1e-4)
    # What needs no gradients is transformed as ever.
    torch.testing.assert_close(torch.func.grad(lambda y: (function(x.detach()) * y).sum())(several[0]), out)


@OPERATORS
def test_the_reference_has_derivatives_in_forward_mode(name):
    function, x = with_kernels("reference")[name], images()
    _, slope = torch.func.jvp(function, (x,), (x.sin(),))
    gradient = torch.func.grad(lambda x: (function(x) * slope).sum())(x)
    torch.testing.assert_close((gradient * x.sin()).sum(), slope.square().sum(), rtol=1e-4, atol=1e-4)


@ON_THE_CPU
def test_sampling_steps_refuse_derivatives_in_forward_mode():
    schedule, t = torch.linspace(0.9, 0.1, 10), torch.tensor([3, 7])

    def step(x):
        return ddim_step(x, t, t - 1, x, schedule, schedule, percentile=0.9, implementation="triton")

    with pytest.raises(NotImplementedError, match="::sampling_step has no derivatives in forward mode"):
        torch.func.jvp(step, (images(),), (images(),))


@ON_THE_CPU
@OPERATORS
def test_an_output_on_which_nothing_depends_gives_no_gradients(name):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    x = images().requires_grad_()
    (Stop.apply(with_kernels("triton")[name](x)).sum() + 2 * x.sum()).backward()
    assert (x.grad == 2).all()


@pytest.mark.parametrize("keys", [64, 128], ids=["shared", "of each head"])
def test_attention_on_a_cpu_has_derivatives_in_forward_mode(keys):
    generator = torch.Generator().manual_seed(0)
    q, k, null = (torch.randn(shape, generator=generator) for shape in ((2, 8, 128), (2, 5, keys), (64,)))

    def function(q):
        return null_key_attention(q, k, k, null, null, heads=2)

    _, slope = torch.func.jvp(function, (q,), (q.sin(),))
    gradient = torch.func.grad(lambda q: (function(q) * slope).sum())(q)
    torch.testing.assert_close((gradient * q.sin()).sum(), slope.square().sum(), rtol=1e-4, atol=1e-4)


def test_nothing_is_left_to_other_libraries_in_forward_mode():
    x = torch.ones(2)
    assert dispatch.is_eager_float32_on_cpu(x)
    with fwAD.dual_level():
        assert not dispatch.is_eager_float32_on_cpu(x)
