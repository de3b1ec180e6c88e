"""The LayerNorm kernels against the reference path in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parity import DEVICE, DTYPES, assert_near, check_parity, check_slopes, randn

from minimagen_fast.kernels import channel_layer_norm, launch, layer_norm_rows, layer_norm_tiles, programs
from minimagen_fast.kernels.row_norm import layer_norm

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-5


def ours(**inputs):
    return layer_norm(**inputs, implementation="triton")


def reference(**inputs):
    return layer_norm(**inputs, implementation="reference")


def case(*shape, dtype=torch.float32, gain_dtype=None, residual=False, **values):
    c = shape[-1]
    inputs = {"x": randn("x", *shape, dtype=dtype, **values), "gain": randn("gain", c, dtype=gain_dtype or dtype)}
    return inputs | {"residual": randn("residual", *shape, dtype=dtype) if residual else None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 8),
        (5, 8),
        (513, 8),
        (2, 7, 24),
        (33, 100),
        (3, 4, 128),
        (2, 5, 320),
        (9, 512),
        (3, 1536),
        (2, 4096),
        (3, 5000),
    ],
    ids=str,
)
def test_parity(shape, residual, dtype):
    out = check_parity(ours, reference, case(*shape, dtype=dtype, residual=residual), dtype=dtype)
    assert out.dtype == dtype and out.is_contiguous()


@pytest.mark.parametrize("c", [3, 8191, 8192])
def test_the_narrowest_and_the_widest_rows(c):
    check_parity(ours, reference, case(3, c), dtype=torch.float32)


def test_rows_of_one_value():
    """Nothing is left of them, nor of their gradients but, on a card, how it rounds a product within a difference."""
    slack = 0.0 if DEVICE.type == "cpu" else 1e-4
    inputs = {name: value.requires_grad_() for name, value in case(3, 1, residual=True).items()}
    out = ours(**inputs)
    out.backward(randn("dy", 3, 1))
    assert torch.equal(out, inputs["residual"])
    assert inputs["x"].grad.abs().max() <= slack and not inputs["gain"].grad.any()


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 63, 65])
def test_tiles_need_not_be_full(rows):
    """Tiles are 32 rows of 128."""
    check_parity(ours, reference, case(rows, 128, residual=True), dtype=torch.float32)


def test_programs_take_several_tiles(monkeypatch):
    monkeypatch.setattr(launch, "target", lambda device: launch.Target((9, 0), 1, 1 << 17))
    check_parity(ours, reference, case(700, 100), dtype=torch.float32)
    assert programs.resident(torch.device("cpu"), 4) == 4


def test_many_partial_sums():
    """More programs than the kernel that adds them up takes at once."""
    partial = randn("partial", 150, 70)
    out = torch.empty(70, device=DEVICE)
    layer_norm_tiles.sum_partials(partial, out)
    assert_near(out, partial.double().sum(0), dtype=torch.float32)


VIEWS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.cat((x, x), dim=-1)[..., : x.shape[-1]],
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "offset": lambda x: torch.cat((x[:1], x))[1:],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    inputs = case(3, 4, 24, residual=True)
    strided = {name: value if name == "gain" else view(value) for name, value in inputs.items()}
    out = check_parity(ours, reference, strided, dtype=torch.float32, cotangent=lambda y: view(randn("dy", *y.shape)))
    assert out.is_contiguous()
    check_parity(ours, reference, inputs | {"gain": randn("gain", 48)[::2]}, dtype=torch.float32)


def test_gradient_of_a_sum():
    """sum().backward() hands over one number, expanded."""
    inputs = case(6, 40)
    check_parity(
        ours, reference, inputs, dtype=torch.float32, cotangent=lambda y: torch.ones((), device=DEVICE).expand_as(y)
    )


@pytest.mark.parametrize(
    "needed", [n for k in range(4) for n in itertools.combinations(["x", "gain", "residual"], k)], ids=str
)
def test_requires_grad_subsets(needed):
    check_parity(ours, reference, case(5, 40, residual=True), dtype=torch.float32, gradients_of=needed)


def test_nothing_is_computed_that_nobody_needs(monkeypatch):
    launches = []
    monkeypatch.setattr(launch, "run", lambda kernel, *args, **kw: launches.append((kernel, kw)))
    x, gain, residual = (torch.ones(shape, device=DEVICE, requires_grad=True) for shape in ((2000, 8), (8,), (2000, 8)))
    ours(x=x, gain=gain.detach()).sum().backward()
    assert [k for k, _ in launches] == [layer_norm_rows._forward_kernel, layer_norm_rows._backward_kernel]
    assert launches[1][1]["NEED_X"] and not launches[1][1]["NEED_GAIN"]
    launches.clear()
    ours(x=x.detach(), gain=gain).sum().backward()
    assert [k for k, _ in launches] == [
        layer_norm_rows._forward_kernel,
        layer_norm_rows._backward_kernel,
        layer_norm_tiles._sum_kernel,
    ]
    assert launches[1][1]["NEED_GAIN"] and not launches[1][1]["NEED_X"]
    launches.clear()
    # A single program's sums are the gradient.
    ours(x=x[:2].detach(), gain=gain).sum().backward()
    assert [k for k, _ in launches] == [layer_norm_rows._forward_kernel, layer_norm_rows._backward_kernel]
    launches.clear()
    ours(x=x.detach(), gain=gain.detach(), residual=residual).sum().backward()
    assert [k for k, _ in launches] == [layer_norm_rows._forward_kernel]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32])
def test_float32_parameters_and_residuals(dtype, residual_dtype):
    """As under autocast."""
    inputs = case(5, 40, dtype=dtype, gain_dtype=torch.float32)
    if residual_dtype:
        inputs["residual"] = randn("residual", 5, 40, dtype=residual_dtype)
    for run in (ours, reference):
        out = check_parity(run, reference, inputs, dtype=dtype)
        assert out.dtype == (residual_dtype or dtype)


def test_half_precision_parameters():
    for run in (ours, reference):
        out = check_parity(run, reference, case(5, 40, gain_dtype=torch.float16), dtype=torch.float16)
        assert out.dtype == torch.float32


@pytest.mark.parametrize("c", [40, 512])
def test_large_mean_and_small_spread(c):
    check_parity(ours, reference, case(6, c, scale=0.1, shift=10000.0), dtype=torch.float32)


@pytest.mark.parametrize("value", [0.0, 1.0, 3.3, -65504.0, 1e6])
@pytest.mark.parametrize("c", [40, 512])
def test_constant_rows(value, c):
    """Nothing is left of them; float64 itself leaves rounding, and a card's division does."""
    slack = 0.0 if DEVICE.type == "cpu" else 1e-6
    inputs = {name: tensor.requires_grad_() for name, tensor in case(4, c, residual=True).items()}
    inputs["x"] = torch.full((4, c), value, device=DEVICE, requires_grad=True)
    out, grad = ours(**inputs), randn("dy", 4, c)
    out.backward(grad)
    assert (out - inputs["residual"]).abs().max() <= slack and torch.equal(inputs["residual"].grad, grad)
    assert inputs["gain"].grad.abs().max() <= slack
    g = grad.double() * inputs["gain"].detach().double()
    assert_near(inputs["x"].grad, (g - g.mean(1, keepdim=True)) * EPS**-0.5, dtype=torch.float32)


@pytest.mark.parametrize("memory_format", [None, torch.contiguous_format, torch.channels_last])
def test_large_constants_under_a_division_that_is_a_little_off(memory_format, monkeypatch):
    """A card's is good to two units in the last place: what should be no variance may be less than none."""
    if launch.INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder

        divide = InterpreterBuilder.create_fdiv

        def roughly(self, dividend, divisor):
            quotient = divide(self, dividend, divisor)
            quotient.data = (quotient.data * (1 + 2.0**-22)).astype(quotient.data.dtype)
            return quotient

        monkeypatch.setattr(InterpreterBuilder, "create_fdiv", roughly)
    x = torch.full((2, 768) if memory_format is None else (1, 768, 3, 5), 3e9, device=DEVICE, requires_grad=True)
    gain = randn("gain", 768)
    if memory_format is None:
        out = ours(x=x, gain=gain)
    else:
        out = channel_layer_norm(x.contiguous(memory_format=memory_format), gain, implementation="triton")
    (slope,) = torch.autograd.grad(out, x, randn("dy", *out.shape))
    assert out.isfinite().all() and slope.isfinite().all()


def test_values_near_the_largest_of_half_precision():
    x = torch.tensor([65504.0, -65504.0, 60000.0, 1.0] * 10).half().repeat(3, 1).to(DEVICE)
    check_parity(ours, reference, {"x": x, "gain": randn("gain", 40, dtype=torch.float16)}, dtype=torch.float16)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row(value):
    inputs = case(4, 40)
    inputs["x"][1, 3] = value
    out = check_parity(ours, reference, inputs, dtype=torch.float32)
    assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()
    residual = randn("residual", 4, 40)
    residual[2, 5] = value
    check_parity(ours, reference, case(4, 40) | {"residual": residual}, dtype=torch.float32)


def test_a_gain_that_is_nan_spoils_its_column():
    inputs = case(4, 40, residual=True)
    inputs["gain"][3] = float("nan")
    out = check_parity(ours, reference, inputs, dtype=torch.float32)
    assert out[:, 3].isnan().all() and out.isnan().sum() == 4


def test_a_gradient_that_is_nan_stays_in_its_row():
    def cotangent(out):
        gradient = randn("dy", *out.shape)
        gradient[1, 3] = float("nan")
        return gradient

    check_parity(ours, reference, case(4, 40, residual=True), dtype=torch.float32, cotangent=cotangent)


def test_two_runs_are_identical():
    def run():
        inputs = {k: v.requires_grad_() for k, v in case(300, 100, residual=True).items()}
        out = ours(**inputs)
        return out, *torch.autograd.grad(out, list(inputs.values()), randn("dy", 300, 100))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_finite_differences():
    check_slopes(ours, case(3, 12, residual=True))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70),
    c=st.integers(8, 600),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-1e3, 1e3),
    residual=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-5, 1e-3]),
)
def test_any_shape_and_scale(rows, c, scale, shift, residual, eps):
    inputs = case(rows, c, residual=residual, scale=scale, shift=shift)
    check_parity(lambda **kw: ours(**kw, eps=eps), lambda **kw: reference(**kw, eps=eps), inputs, dtype=torch.float32)


def test_reference_is_torch():
    x, gain = randn("x", 5, 40), randn("gain", 40)
    assert torch.equal(reference(x=x, gain=gain), F.layer_norm(x, (40,), gain, torch.zeros_like(gain)))
    exact = {k: None if v is None else v.double().requires_grad_() for k, v in case(3, 7, residual=True).items()}
    assert torch.autograd.gradcheck(lambda *args: layer_norm(args[0], args[1], residual=args[2]), list(exact.values()))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_registration(residual, strided):
    inputs = {k: v if v is None else v.requires_grad_() for k, v in case(4, 3, 8, residual=residual).items()}
    if strided:
        inputs["x"] = inputs["x"].detach().transpose(0, 1).requires_grad_()
        inputs["residual"] = inputs["residual"] if not residual else randn("r", 3, 4, 8).requires_grad_()
    torch.library.opcheck(torch.ops.minimagen_fast.layer_norm.default, (*inputs.values(), EPS))
    x, gain, _ = (v if v is None else v.detach() for v in inputs.values())
    backward = torch.ops.minimagen_fast.layer_norm_backward.default
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward, (randn("dy", *x.shape), x, gain, EPS, *needs))


def test_launches_are_recorded_on_meta_tensors():
    x = torch.empty(1 << 20, 512, device="meta", dtype=torch.bfloat16, requires_grad=True)
    gain = torch.empty(512, device="meta", requires_grad=True)
    with launch.record() as launches:
        ours(x=x, gain=gain).backward(torch.empty_like(x))
    kernels = [layer_norm_rows._forward_kernel, layer_norm_rows._backward_kernel, layer_norm_tiles._sum_kernel]
    assert [entry.kernel for entry in launches] == kernels
    assert [entry.grid for entry in launches] == [(132 * 4 - 1,), (132 * 2,), (16,)]


def grids(rows, c, dtype=torch.bfloat16):
    """Programs and their warps, forward and backward, gains and their gradients in float32."""
    x = torch.empty(rows, c, device="meta", dtype=dtype, requires_grad=True)
    with launch.record() as launches:
        ours(x=x, gain=torch.empty(c, device="meta", requires_grad=True)).backward(torch.empty_like(x))
    return [(*entry.grid, entry.num_warps) for entry in launches if entry.kernel is not layer_norm_tiles._sum_kernel]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 50, 64, 1024, 3000, 20000])
@pytest.mark.parametrize("c", [128, 1000, 2048, 8192])
def test_gains_are_a_small_part_of_what_is_moved(rows, c, dtype):
    (forward, _), (backward, _) = grids(rows, c, dtype)
    gain, row = 4 * c, c * dtype.itemsize
    assert 1 <= forward and forward * gain + 2 * rows * row <= 1.05 * (gain + 2 * rows * row)
    vectors = 2 if backward == 1 else 3 * backward
    assert 1 <= backward and vectors * gain + 3 * rows * row <= 1.05 * (2 * gain + 3 * rows * row)


def test_few_programs_are_large_ones():
    # A tile of 16 rows each, and of 8; where the gain leaves enough programs, as many small ones as a card holds.
    assert grids(1024, 1024) == [(32, 16), (22, 16)]
    assert grids(1 << 17, 1024) == [(521, 4), (263, 8)]


def test_clear_errors():
    x, gain = randn("x", 5, 40), randn("gain", 40)
    for implementation in ("triton", "reference"):
        with pytest.raises(ValueError, match=r"gain must have shape \(c,\).*\(39,\)"):
            layer_norm(x, gain[1:], implementation=implementation)
        with pytest.raises(ValueError, match="gain must have shape"):
            layer_norm(x[0, 0], gain, implementation=implementation)
        with pytest.raises(ValueError, match="residual must have the shape of x.*expand"):
            layer_norm(x, gain, residual=x[:1], implementation=implementation)
        with pytest.raises(TypeError, match="x must be a floating-point tensor, got torch.int64"):
            layer_norm(x.long(), gain, implementation=implementation)
        with pytest.raises(ValueError, match="eps must be positive, got 0"):
            layer_norm(x, gain, eps=0.0, implementation=implementation)
        with pytest.raises(ValueError, match="gain must be on the device of x"):
            layer_norm(x, gain.to("meta"), implementation=implementation)


def test_an_implementation_that_cannot_be_used():
    with pytest.raises(ValueError, match="float64"):
        ours(x=randn("x", 2, 8).double(), gain=randn("gain", 8).double())
    with pytest.raises(ValueError, match="8192"):
        ours(x=randn("x", 2, 8193), gain=randn("gain", 8193))
    with pytest.raises(ValueError, match="implementation must be one of"):
        layer_norm(randn("x", 2, 8), randn("gain", 8), implementation="fast")
    wide = layer_norm(randn("x", 2, 8193), randn("gain", 8193))
    assert torch.equal(wide, reference(x=randn("x", 2, 8193), gain=randn("gain", 8193)))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    rows, c = (1 << 31) // 512 + 3, 512
    x = torch.zeros(rows, c, device="cuda", dtype=torch.bfloat16)
    x[-3:] = randn("x", 3, c).bfloat16()
    gain = randn("gain", c)
    x.requires_grad_()
    out = ours(x=x, gain=gain)
    grad = torch.ones_like(out) * randn("weight", c).bfloat16()
    out.backward(grad)
    few = x[-3:].detach().requires_grad_()
    expected = ours(x=few, gain=gain)
    expected.backward(grad[-3:])
    assert torch.equal(out[-3:], expected) and torch.equal(x.grad[-3:], few.grad)
