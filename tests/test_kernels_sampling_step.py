"""The sampling steps: kernels against plain torch, the threshold to the bit; plain torch against theory."""

import math

import pytest
import torch
from fast_path import distance
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_parity import DEVICE, DTYPES, assert_near, randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from minimagen_fast.diffusion_model import GaussianDiffusion
from minimagen_fast.kernels import launch, sampling_kernels, sampling_step, threshold

pytestmark = pytest.mark.usefixtures("poisoned")

PROCESS = GaussianDiffusion(timesteps=100).to(DEVICE)
ANCESTRAL = (
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_log_variance_clipped",
)
OTHERS = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
SETTINGS = ("percentile", "cond_scale", "eta")
STEPS = pytest.mark.parametrize("step", ["ancestral", "ddim", "ddim without noise", "dpm_solver", "first dpm_solver"])


def schedules(names, like):
    return {name: getattr(PROCESS, name).to(like.device).to(like.dtype) for name in names}


def take(step, x_t, t, pred, third, *, percentile=0.9, **options):
    """One step of the named kind; the results as a tuple. ``third`` is the noise, or the x_0 of the step before."""
    options = {"percentile": percentile, **options}
    if step == "ancestral":
        return (sampling_step.ancestral_step(x_t, t, pred, third, **schedules(ANCESTRAL, x_t), **options),)
    # The last image goes to the clean one.
    t_previous = torch.where(torch.arange(len(t), device=t.device) == len(t) - 1, -1, t // 2)
    options |= schedules(OTHERS, x_t)
    if step.startswith("ddim"):
        noise = {} if step.endswith("without noise") else {"noise": third, "eta": 0.7}
        return (sampling_step.ddim_step(x_t, t, t_previous, pred, **(noise | options)),)
    before = {} if step.startswith("first") else {"last_x_start": third, "t_last": (t + 5).clamp(max=99)}
    return sampling_step.dpm_solver_pp_2m_step(x_t, t, t_previous, pred, **before, **options)


def images(shape, dtype=torch.float32):
    x_t, pred, third = randn("x_t", *shape), randn("pred", *shape, dtype=dtype), randn("third", *shape).tanh()
    return x_t, torch.tensor([3, 50, 90, 20], device=DEVICE)[: shape[0]], pred, third


def stored(value):
    return torch.tensor([value], device=DEVICE)


@pytest.fixture
def split(monkeypatch):
    """The way of large images for small ones, many parts and tiles each."""
    monkeypatch.setattr(sampling_kernels, "WHOLE", 0)
    monkeypatch.setattr(threshold, "TILE", 128)


@pytest.fixture(params=["whole", "split"])
def way(request):
    if request.param == "split":
        request.getfixturevalue("split")
    return request.param


def check(step, x_t, t, pred, third, **options):
    """The kernels' results, after comparing them with plain torch in float32 and float64."""
    outs, expected = (
        take(step, x_t, t, pred, third, **options, implementation=name) for name in ("triton", "reference")
    )
    wide = {key: x.double() if key in SETTINGS and isinstance(x, torch.Tensor) else x for key, x in options.items()}
    exact = take(step, x_t.double(), t, pred, third, **wide, implementation="reference")
    for out, same, far in zip(outs, expected, exact, strict=True):
        assert out.dtype == torch.float32 and out.shape == x_t.shape
        assert out.is_contiguous(memory_format=FORMATS[1]) or not x_t.is_contiguous(memory_format=FORMATS[1])
        assert_near(out, same, dtype="a sampling step")
        assert_near(out, far, dtype=torch.float32)
    return outs


@STEPS
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 3, 7, 5), (2, 1, 4, 4), (1, 3, 1, 1), (2, 5, 1, 9)])
def test_parity(way, step, shape):
    check(step, *images(shape))


@STEPS
def test_beyond_what_one_program_holds(step):
    shape = (1, 1, 127, 130)
    assert math.prod(shape) > sampling_kernels.WHOLE
    check(step, *images(shape))


@pytest.mark.parametrize("n", [sampling_kernels.WHOLE - 1, sampling_kernels.WHOLE, sampling_kernels.WHOLE + 1])
def test_the_largest_image_of_one_program(n):
    check("ancestral", *images((1, n)))


FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", [(a, b, c) for a in FORMATS for b in FORMATS for c in FORMATS])
@pytest.mark.parametrize("guided", [False, True])
def test_formats_and_dtypes(dtype, formats, guided):
    check_formats_and_dtypes(dtype, formats, guided)


@pytest.mark.parametrize("formats", [FORMATS + FORMATS[:1], FORMATS[::-1] + FORMATS[1:]])
def test_formats_and_dtypes_of_large_images(split, formats):
    check_formats_and_dtypes(DTYPES[-1], formats, True)


def check_formats_and_dtypes(dtype, formats, guided):
    x_t, t, pred, third = images((3, 3, 6, 4), dtype)
    x_t, pred, third = (x.to(memory_format=f) for x, f in zip((x_t, pred, third), formats, strict=True))
    options = {"null_pred": randn("null", 3, 3, 6, 4, dtype=dtype), "cond_scale": 3.5} if guided else {}
    for step in ("ancestral", "dpm_solver"):
        for out in check(step, x_t, t, pred, third, **options):
            assert out.stride() == x_t.stride()


@STEPS
def test_inputs_wider_than_the_images_leave_these_as_they_are(step):
    x_t, t, pred, third = images((3, 3, 6, 4))
    wide = take(step, x_t, t, pred.double(), third.double(), implementation="reference")
    for out, same in zip(wide, take(step, x_t, t, pred, third, implementation="reference"), strict=True):
        assert out.dtype == torch.float32 and torch.equal(out, same)


# Not shrunk, which would take hours here.
@settings(derandomize=True, max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    step=st.sampled_from(["ancestral", "ddim", "ddim without noise", "dpm_solver", "first dpm_solver"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    formats=st.tuples(*[st.sampled_from(FORMATS)] * 3),
    guided=st.booleans(),
    percentile=st.floats(0.5, 1),
    whole=st.booleans(),
)
def test_any_step(step, shape, dtype, formats, guided, percentile, whole):
    x_t, t, pred, third = images(shape, dtype)
    x_t, pred, third = (x.to(memory_format=f) for x, f in zip((x_t, pred, third), formats, strict=True))
    options = {"null_pred": randn("null", *shape, dtype=dtype), "cond_scale": 3.5} if guided else {}
    with pytest.MonkeyPatch.context() as patch:
        if not whole:
            patch.setattr(sampling_kernels, "WHOLE", 0)
            patch.setattr(threshold, "TILE", 64)
        check(step, x_t, t, pred, third, percentile=percentile, **options)


@pytest.mark.parametrize("step", ["ancestral", "dpm_solver"])
def test_views(way, step):
    x_t, t, pred, third = images((2, 3, 5, 4))
    sliced = randn("sliced", 2, 5, 5, 8)[:, 1:-1, :, ::2]
    for view in (sliced, pred.transpose(2, 3).contiguous().transpose(2, 3), pred[:1, :, :1, :1].expand(2, 3, 5, 4)):
        check(step, x_t, t, view, third)
        check(step, view, t, pred, third)
        check(step, x_t, t, pred, view)


@STEPS
def test_strided_timesteps_and_schedules(way, step, monkeypatch):
    def strided(x):
        return torch.stack((x, torch.zeros_like(x)), dim=1)[:, 0]

    dense = schedules
    monkeypatch.setitem(globals(), "schedules", lambda *of: {name: strided(x) for name, x in dense(*of).items()})
    x_t, t, pred, third = images((3, 3, 6, 4))
    check(step, x_t, strided(t), pred, third)


@STEPS
@pytest.mark.parametrize("memory_format", FORMATS)
def test_guidance_from_one_doubled_tensor(way, step, memory_format):
    x_t, t, pred, third = images((3, 3, 6, 4))
    doubled = torch.cat((pred, randn("null", 3, 3, 6, 4))).to(memory_format=memory_format)
    outs = check(step, x_t, t, doubled, third, cond_scale=3.0)
    for out, same in zip(check(step, x_t, t, doubled, third, cond_scale=stored(3.0)), outs, strict=True):
        assert torch.equal(out, same)
    guided = doubled[3:] + (doubled[:3] - doubled[3:]) * 3.0
    for out, same in zip(outs, take(step, x_t, t, guided, third, implementation="reference"), strict=True):
        assert_near(out, same, dtype="a sampling step")


@STEPS
def test_settings_in_memory(way, step):
    x_t, t, pred, third = images((3, 3, 6, 4))
    settings = {"percentile": 0.83, "cond_scale": 3.0} | ({"eta": 0.3} if step == "ddim" else {})
    outs = check(step, x_t, t, pred, third, null_pred=third * 0.1, **settings)
    # Each alone, and all together.
    for names in (*([name] for name in settings), list(settings)):
        some = settings | {name: stored(settings[name]) for name in names}
        for out, same in zip(check(step, x_t, t, pred, third, null_pred=third * 0.1, **some), outs, strict=True):
            assert torch.equal(out, same), names


def test_a_percentile_in_memory_that_is_none(way):
    x = torch.stack([VALUES["normal"], VALUES["large"]])
    for value, nearest in ((-0.5, 0.0), (1.5, 1.0), (math.inf, 1.0), (-math.inf, 0.0), (math.nan, 0.0)):
        for implementation in ("triton", "reference"):
            found = thresholded(x, stored(value), implementation)
            assert torch.equal(found, thresholded(x, nearest, implementation))


def thresholded(x, percentile, implementation):
    """x clamped to its s and divided by it, by way of a step in a process without noise."""
    one, zero = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    t = torch.zeros(len(x), dtype=torch.int64, device=DEVICE)
    return sampling_step.dpm_solver_pp_2m_step(
        x, t, t - 1, torch.zeros_like(x), one, zero, percentile=percentile, implementation=implementation
    )[1]


def check_threshold(x, percentile):
    s = torch.quantile(x.abs(), percentile, dim=-1, keepdim=True).clamp(min=1.0)
    expected = x.clamp(-s, s) / s
    assert torch.equal(torch.nan_to_num(expected, 7.0), torch.nan_to_num(thresholded(x, percentile, "reference"), 7.0))
    actual = thresholded(x, percentile, "triton")
    assert torch.equal(actual.isnan(), expected.isnan())
    in_memory = thresholded(x, stored(percentile), "triton")
    assert torch.equal(torch.nan_to_num(actual, 7.0), torch.nan_to_num(in_memory, 7.0))
    # Torch rounds the interpolation's product and sum once on some processors, and twice on others.
    exact = threshold.rank_of(percentile, x.shape[-1])[1] == 0
    torch.testing.assert_close(actual, expected, rtol=0.0 if exact else 2.5e-7, atol=0.0, equal_nan=True)


def spread(n, *values):
    """Normal values of which the first are replaced, in an order of no meaning."""
    x = randn("spread", n, scale=1.5)
    x[: len(values)] = torch.tensor(values, device=DEVICE)
    return x[torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(DEVICE)]


TINY = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max
VALUES = {
    "normal": spread(300),
    "few above 1": spread(300) * 0.45,
    "all below 1": spread(300).tanh() * 0.9,
    "large": spread(300) * 1e5,
    "wide": spread(300).exp() ** 8,
    "ties": (spread(300) * 2).round(),
    "two values": torch.where(spread(300) > 0, 1.25, -0.5),
    "constant": torch.full((300,), -2.75, device=DEVICE),
    "ones": torch.ones(300, device=DEVICE),
    "zero": torch.zeros(300, device=DEVICE),
    "zeros of both signs": torch.where(spread(300) > 0, 0.0, -0.0),
    "on both sides of 1": torch.where(torch.arange(300, device=DEVICE) < 270, 0.25, 1000.0),
    "subnormal": spread(300) * TINY / 16,
    "subnormal and large": torch.where(spread(300) > 1, 3.0, TINY / 16),
    "hardly different": 10_000 + spread(300) * 0.1,
    "next to 1": 1 + spread(300) * 2e-7,
    "half precision's largest": torch.where(spread(300) > 0.5, 65504.0, 65472.0),
    "largest": spread(300, *[LARGEST] * 40),
    "one infinity": spread(300, math.inf),
    "infinities": spread(300, *[math.inf, -math.inf] * 30),
    "NaN": spread(300, math.nan),
    "NaN and infinity": spread(300, math.nan, math.inf, -math.nan),
    "64": spread(64),
    "65": spread(65),
    "one": torch.tensor([-3.0], device=DEVICE),
    "one below 1": torch.tensor([0.3], device=DEVICE),
    "two": torch.tensor([3.0, -0.5], device=DEVICE),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", VALUES)
def test_threshold_is_that_of_torch(way, name):
    for percentile in (0.0, 0.5, 0.9, 0.903, 0.999, 1.0) if way == "whole" else (0.5, 0.903, 1.0):
        check_threshold(VALUES[name][None], percentile)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_every_image_has_its_own_threshold(way):
    x = torch.stack([VALUES[name] for name in ("normal", "NaN", "all below 1", "large", "on both sides of 1")])
    check_threshold(x, 0.9)


@pytest.mark.parametrize("n", [20_000, 40_007])
def test_threshold_of_large_images(n):
    check_threshold(torch.stack([spread(n), spread(n) * 0.3]), 0.95)


@pytest.mark.parametrize("limit", [20_000, pytest.param(threshold._TORCH_LIMIT, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_threshold_on_both_sides_of_the_limit_of_torch_quantile(limit, beyond, implementation, monkeypatch):
    monkeypatch.setattr(threshold, "_TORCH_LIMIT", limit)
    n, percentile = limit + beyond, 0.95
    x = spread(n)
    below, step, weight = threshold.rank_of(percentile, n)
    # Ranks are float32 up to the limit.
    assert below + weight == pytest.approx(percentile * (n - 1), rel=1e-7)
    ordered = x.abs().double().sort().values
    s = torch.lerp(ordered[below], ordered[below + step], weight)
    assert s > 1
    actual = thresholded(x[None], percentile, implementation)[0]
    torch.testing.assert_close(actual.double(), x.double().clamp(-s, s) / s, rtol=5e-7, atol=0.0)


# Not shrunk, which would take hours here.
@settings(derandomize=True, max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=200),
    percentile=st.floats(0, 1),
    whole=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_threshold_of_anything(values, percentile, whole):
    with pytest.MonkeyPatch.context() as patch:
        if not whole:
            patch.setattr(sampling_kernels, "WHOLE", 0)
            patch.setattr(threshold, "TILE", 64)
        check_threshold(torch.tensor(values, dtype=torch.float32, device=DEVICE)[None], percentile)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(n=st.integers(1, 5000), q=st.floats(0, 1))
def test_rank_is_that_of_torch_quantile(n, q):
    below, step, weight = threshold.rank_of(q, n)
    values = torch.arange(n, dtype=torch.float32)
    assert below + step < n
    assert torch.equal(torch.quantile(values, q), torch.lerp(values[below], values[below + step], weight))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantile_beyond_the_limit_of_torch(dtype, deterministic, monkeypatch):
    # On CUDA torch refuses one of the two then.
    other = "kthvalue" if deterministic else "sort"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    x = torch.stack((spread(1000), spread(1000, math.nan))).to(dtype)
    places = 0.0, 0.9, 1.0
    expected = [threshold.quantile(x, q) for q in places]
    monkeypatch.setattr(torch, other, lambda *args, **kwargs: pytest.fail(other))
    monkeypatch.setattr(torch.Tensor, other, lambda *args, **kwargs: pytest.fail(other))
    # Fewer than a row has, and than all rows have.
    for limit in (10, 1000):
        monkeypatch.setattr(threshold, "_TORCH_LIMIT", limit)
        for q, value in zip(places, expected, strict=True):
            torch.testing.assert_close(threshold.quantile(x, q), value, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 48, 769, 12_288])
def test_a_quantile_in_memory_is_that_of_torch_to_the_bit(dtype, n):
    x = torch.stack((spread(n), spread(n) * 0.1, spread(n), spread(n))).to(dtype).abs()
    x[2, 0], x[3, 0] = torch.nan, torch.inf
    for q in (0.0, 0.3, 0.5, 0.903, 0.95, 0.999, 1.0):
        expected = torch.quantile(x, stored(q)[0].to(dtype), dim=-1)
        torch.testing.assert_close(threshold.quantile(x, stored(q)), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [10, 1000])
def test_a_quantile_in_memory_beyond_the_limit_of_torch(dtype, limit, monkeypatch):
    monkeypatch.setattr(threshold, "_TORCH_LIMIT", limit)
    x = torch.stack((spread(300), spread(300) * 0.5)).to(dtype)
    for q in (0.0, 0.25, 0.9, 0.903, 1.0):
        # In a trace a tensor has no value.
        for quantile in (threshold.quantile, torch.compile(threshold.quantile, backend="eager", fullgraph=True)):
            torch.testing.assert_close(quantile(x, stored(q)), torch.quantile(x, stored(q).item(), dim=-1))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@STEPS
def test_a_nan_spoils_its_image_alone(way, step):
    x_t, t, pred, third = images((3, 3, 4, 4))
    pred[1, 2, 3, 0] = torch.nan
    for out in check(step, x_t, t, pred, third):
        assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["x_t", "pred", "null_pred", "third"])
@pytest.mark.parametrize("step", ["ancestral", "ddim", "dpm_solver"])
def test_what_is_not_finite_goes_where_it_does_in_torch(way, step, name):
    x_t, t, pred, third = images((3, 3, 4, 4))
    inputs = {"x_t": x_t, "pred": pred, "third": third, "null_pred": randn("null", 3, 3, 4, 4)}
    # Each image has its own.
    inputs[name][:, 2, 3, 0] = torch.tensor([math.nan, math.inf, -math.inf])
    outs = check(step, t=t, **inputs, cond_scale=3.0)
    assert not outs[0].isfinite().all()


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_the_last_step_adds_no_noise(way, implementation):
    x_t, t, pred, third = images((2, 3, 4, 4))
    t[0] = 0
    # The deviation of its clipped variance is 1e-10: of ordinary noise nothing would be seen.
    outs = [take("ancestral", x_t, t, pred, noise, implementation=implementation)[0] for noise in (third, third * 1e12)]
    assert torch.equal(outs[0][0], outs[1][0]) and distance(outs[0][1], outs[1][1]) > 1


@STEPS
def test_empty_batch(way, step):
    x_t, t, pred, third = images((2, 3, 4, 4))
    nothing = x_t[:0], t[:0], pred[:0], third[:0]
    for implementation in ("triton", "reference"):
        for cond_scale in (1.0, 3.0):
            for out in take(step, *nothing, cond_scale=cond_scale, implementation=implementation):
                assert out.shape == (0, 3, 4, 4)


@STEPS
def test_two_runs_are_bit_identical(way, step):
    inputs = images((2, 3, 9, 9))
    for outs in zip(*(take(step, *inputs, implementation="triton") for _ in range(2)), strict=True):
        assert torch.equal(*outs)


def on_meta(step, shape, **options):
    x = torch.empty(shape, device="meta")
    t = torch.empty(shape[0], dtype=torch.int64, device="meta")
    with launch.record() as launches:
        take(step, x, t, torch.empty(2 * shape[0], *shape[1:], device="meta"), x, implementation="triton", **options)
    return launches


@STEPS
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_launches(step, batch):
    assert len(on_meta(step, (batch, 3, 64, 64))) == 1
    for size in (128, 256, 1024):
        launches = on_meta(step, (batch, 3, size, size))
        assert [each.kernel.__name__ for each in launches] == [
            "_start_kernel",
            "_narrow_kernel",
            "_narrow_kernel",
            "_update_kernel",
        ]


@STEPS
def test_a_setting_that_is_a_number_takes_no_operator_more(step):
    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    x, t, pred = (torch.empty(shape, device="meta") for shape in ((2, 3, 128, 128), (2,), (4, 3, 128, 128)))
    seen = []
    for value in (0.5, torch.empty(1, device="meta")):
        names, settings = [], {name: value for name in SETTINGS if name != "eta" or step == "ddim"}
        with launch.record(), Operators():
            take(step, x, t.long(), pred, x, **settings, implementation="triton")
        seen.append(names)
    assert seen[0] == seen[1] and seen[0].count("minimagen_fast::sampling_step") == 1


@pytest.mark.parametrize("n", [16385, 3 * 256**2, 3 * 1024**2, 16_777_216, 30_000_001])
@pytest.mark.parametrize("batch", [1, 3, 16, 1000])
def test_parts_cover_an_image(batch, n):
    parts, size = threshold.split(batch, n, launch.H200)
    assert parts * size >= n > (parts - 1) * size and size % threshold.TILE == 0
    assert parts * batch >= launch.H200.multiprocessors or parts > 64 or size == 2 * threshold.TILE


@STEPS
def test_opcheck(way, step):
    x_t, t, pred, third = images((2, 3, 4, 4))
    recorded = []
    original = torch.ops.minimagen_fast.sampling_step.default

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_kernels, "step", lambda *args: recorded.append(args) or original(*args))
        take(step, x_t, t, pred, third, implementation="triton")
    torch.library.opcheck(original, recorded[0])


@STEPS
def test_one_graph_for_all_timesteps(step):
    compiled_graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=compiled_graphs, dynamic=False)
    def compiled(*inputs):
        return take(step, *inputs, implementation="triton")

    x_t, t, pred, third = images((2, 3, 4, 4))
    for times in (t, t + 1, t * 0):
        outs = zip(compiled(x_t, times, pred, third), check(step, x_t, times, pred, third), strict=True)
        assert all(torch.equal(*each) for each in outs)
    assert compiled_graphs.frame_count == 1


def test_wrong_arguments():
    x_t, t, pred, noise = images((2, 3, 4, 4))

    def refused(error, message, step="ancestral", **changed):
        for implementation in ("auto", "triton", "reference"):
            arguments = {"x_t": x_t, "t": t, "pred": pred, "third": noise, **changed}
            with pytest.raises(error, match=message):
                take(step, **arguments, implementation=implementation)

    refused(TypeError, "x_t must be float32", x_t=x_t.half())
    refused(TypeError, "pred must be floating point, got torch.int64", pred=pred.long())
    refused(ValueError, r"pred must have the shape of x_t, \(2, 3, 4, 4\); got \(3, 3, 4, 4\)", pred=pred[[0, 1, 0]])
    refused(ValueError, "noise must have the shape", third=noise[:1])
    refused(ValueError, "null_pred must have the shape", null_pred=noise[:1])
    refused(ValueError, "last_x_start must have the shape", step="dpm_solver", third=noise[:1])
    refused(TypeError, "t must be int64", t=t.float())
    refused(ValueError, "t must hold one timestep for each image", t=t[:1])
    refused(ValueError, r"percentile must lie in \[0, 1\], got 1.5", percentile=1.5)
    refused(ValueError, "percentile", percentile=math.nan)
    refused(ValueError, "cond_scale is 3.0, which needs a prediction without text", cond_scale=3.0)
    refused(ValueError, "cond_scale is a tensor, which needs a prediction without text", cond_scale=stored(1.0))
    refused(TypeError, "cond_scale must be a number or float32, got torch.float64", cond_scale=stored(1.0).double())
    refused(ValueError, r"cond_scale must be .* of shape \(1,\).*got \(3,\)", cond_scale=torch.ones(3))
    refused(ValueError, "cond_scale must be on .* it is on meta", cond_scale=stored(1.0).to("meta"))
    refused(ValueError, "pred must be on .* it is on meta", pred=pred.to("meta"))
    refused(ValueError, "is not differentiable", pred=pred.clone().requires_grad_())
    refused(ValueError, "is not differentiable", null_pred=pred, cond_scale=stored(3.0).requires_grad_())
    refused(ValueError, "is not differentiable", percentile=stored(0.9).requires_grad_())
    refused(TypeError, "percentile must be a number or float32, got torch.int64", percentile=stored(1))
    refused(ValueError, r"eta must be .* of shape \(1,\).*got \(\)", step="ddim", eta=stored(0.9)[0])
    refused(ValueError, "eta must be on .* it is on meta", step="ddim", eta=stored(0.9).to("meta"))
    refused(ValueError, "must have values in each image", x_t=x_t[:, :0], pred=pred[:, :0], third=noise[:, :0])
    other = dict(schedules(OTHERS, x_t), percentile=0.9)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got 2"):
        sampling_step.ddim_step(x_t, t, t - 1, pred, eta=2, noise=noise, **other)
    with pytest.raises(ValueError, match="noise must be given for eta = 0.5"):
        sampling_step.ddim_step(x_t, t, t - 1, pred, eta=0.5, **other)
    with pytest.raises(ValueError, match="noise must be given for an eta that is a tensor"):
        sampling_step.ddim_step(x_t, t, t - 1, pred, eta=stored(0.0), **other)
    with pytest.raises(ValueError, match="given together"):
        sampling_step.dpm_solver_pp_2m_step(x_t, t, t - 1, pred, t_last=t, **other)
    with pytest.raises(ValueError, match="t_previous must hold one timestep"):
        sampling_step.ddim_step(x_t, t, t[:1], pred, **other)
    other["sqrt_one_minus_alphas_cumprod"] = other["sqrt_one_minus_alphas_cumprod"][:10]
    for name in ("auto", "triton", "reference"):
        message = "sqrt_one_minus_alphas_cumprod must have .*, 100 of them like sqrt_alphas_cumprod; got 10"
        with pytest.raises(ValueError, match=message):
            sampling_step.ddim_step(x_t, t, t // 2, pred, **other, implementation=name)


def test_gradients_may_be_required_where_none_are_taken():
    x_t, t, pred, noise = images((2, 3, 4, 4))
    with torch.no_grad():
        assert not take("ancestral", x_t, t, pred.requires_grad_(), noise, implementation="triton")[0].requires_grad


# Plain torch


def test_reference_is_the_arithmetic_of_the_model():
    x, t, pred, noise = images((3, 3, 8, 8))
    t[0] = 0
    x_start = PROCESS.predict_start_from_noise(x, t=t, noise=pred)
    s = torch.quantile(x_start.abs().flatten(1), 0.9, dim=-1).clamp(min=1.0)[:, None, None, None]
    mean, _, log_variance = PROCESS.q_posterior(x_start=x_start.clamp(-s, s) / s, x_t=x, t=t)
    expected = mean + (t > 0).float()[:, None, None, None] * (0.5 * log_variance).exp() * noise
    assert torch.equal(take("ancestral", x, t, pred, noise, implementation="reference")[0], expected)


def test_ddim_with_all_its_noise_is_ancestral_sampling():
    x, t, pred, noise = images((3, 3, 8, 8))
    x, pred = x.double() / 3, pred.double() / 3
    ancestral = take("ancestral", x, t, pred, noise, implementation="reference", percentile=1.0)[0]
    ddim = sampling_step.ddim_step(
        x, t, t - 1, pred, **schedules(OTHERS, x), eta=1.0, noise=noise, percentile=1.0, implementation="reference"
    )
    # The schedules are rounded to float32, each on its own.
    torch.testing.assert_close(ddim, ancestral, rtol=0.0, atol=2e-6)


def test_first_order_dpm_solver_is_ddim():
    x_t, t, pred, third = images((3, 3, 8, 8))
    torch.testing.assert_close(
        take("first dpm_solver", x_t, t, pred, third, implementation="reference")[0],
        take("ddim without noise", x_t, t, pred, third, implementation="reference")[0],
    )


def test_the_clean_image_is_the_thresholded_start():
    x_t, t, pred, third = images((1, 3, 8, 8))
    for step in ("dpm_solver", "first dpm_solver"):
        out, x_start = take(step, x_t, t, pred, third, implementation="reference")
        torch.testing.assert_close(out, x_start)


@pytest.mark.parametrize("step", ["ddim", "dpm_solver"])
def test_order_of_convergence(step):
    """Normal data of deviation 0.2: the best prediction is linear in x_t, and where a path ends is known."""
    process = GaussianDiffusion(timesteps=1000)
    alpha, sigma = process.alphas_cumprod.double().sqrt(), (1 - process.alphas_cumprod.double()).sqrt()
    deviation = (0.04 * alpha**2 + sigma**2).sqrt()
    first, end = 900, 100
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[None] * deviation[first]

    def error(steps):
        times = [round(first + (end - first) * i / steps) for i in range(steps + 1)]
        x_t, before = x, {}
        for now, to in zip(times, times[1:], strict=False):
            t, t_to = torch.tensor([now]), torch.tensor([to])
            options = {"percentile": 1.0, "implementation": "reference"}
            pred = sigma[now] / deviation[now] ** 2 * x_t
            if step == "ddim":
                x_t = sampling_step.ddim_step(x_t, t, t_to, pred, alpha, sigma, **options)
            else:
                x_t, x_start = sampling_step.dpm_solver_pp_2m_step(
                    x_t, t, t_to, pred, alpha, sigma, **before, **options
                )
                before = {"last_x_start": x_start, "t_last": t}
        return (x_t - x / deviation[first] * deviation[end]).abs().max().item()

    ratio = error(20) / error(40)
    assert 1.7 < ratio < 2.6 if step == "ddim" else ratio > 3.2
