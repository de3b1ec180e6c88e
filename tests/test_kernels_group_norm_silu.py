"""The GroupNorm-SiLU kernels, of one image and two, in both memory formats, against the reference path in float64."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parity import DEVICE, DTYPES, assert_near, check_parity, check_slopes, randn
from torch.utils._python_dispatch import TorchDispatchMode

from minimagen_fast.kernels import group_norm_looped, group_norm_resident, group_norm_split, launch
from minimagen_fast.kernels.group_norm_silu import group_norm_silu

pytestmark = pytest.mark.usefixtures("poisoned")

NCHW, NHWC = torch.contiguous_format, torch.channels_last
FORMATS = pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["nchw", "nhwc"])
PLANS = ["resident", "looped", "split"]
SKIP_SCALE = 2**-0.5


def force(plan, patch):
    """Have all sizes computed by the same kernels."""
    patch.setattr(group_norm_resident, "LARGEST_TILE", 32768 if plan == "resident" else 0)
    patch.setattr(sys.modules[group_norm_silu.__module__], "LITTLE", 2**30)
    limit = 2**30 if plan == "looped" else -1
    patch.setattr(group_norm_looped, "ALWAYS", limit)
    patch.setattr(group_norm_looped, "IF_MANY", limit)


@pytest.fixture(params=PLANS)
def plan(request, monkeypatch):
    force(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=["looped", "split"])
def tiled_plan(request, monkeypatch, small_tiles):
    force(request.param, monkeypatch)
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles to a program, and chunks to an image."""
    monkeypatch.setattr(group_norm_looped, "TILE", 256)
    monkeypatch.setattr(group_norm_split, "TILE", 256)
    monkeypatch.setattr(group_norm_split, "SMALLEST_CHUNK", 32)
    monkeypatch.setattr(launch, "target", lambda device: launch.Target((9, 0), 1, 1 << 17))


def ours(**inputs):
    return group_norm_silu(**inputs, implementation="triton")


def reference(**inputs):
    return group_norm_silu(**inputs, implementation="reference")


def check(inputs, groups, silu=True, **kw):
    options = {"groups": groups, "silu": silu, "skip_scale": SKIP_SCALE if inputs.get("skip") is not None else 1.0}
    return check_parity(lambda **i: ours(**i, **options), lambda **i: reference(**i, **options), inputs, **kw)


def case(b, c, h, w, *, skip=0, memory_format=NCHW, dtype=torch.float32, scale=True, x=None):
    """Images of ``dtype``, parameters in float32, scale and shift as halves of one tensor."""
    channels = c + skip
    inputs = {
        "x": (randn("x", b, c, h, w) if x is None else x).to(dtype).contiguous(memory_format=memory_format),
        "weight": randn("weight", channels, shift=0.5),
        "bias": randn("bias", channels),
        "skip": randn("skip", b, skip, h, w, dtype=dtype).contiguous(memory_format=memory_format) if skip else None,
    }
    if scale:
        inputs["scale"], inputs["shift"] = randn("time", b, 2 * channels, dtype=dtype).chunk(2, dim=1)
    return inputs


def gradients(inputs, cotangent=None, **options):
    """The output and the gradients of all inputs."""
    given_inputs = {k: v if v is None else v.detach().requires_grad_() for k, v in inputs.items()}
    out = ours(**given_inputs, **options)
    out.backward(randn("cotangent", *out.shape).to(out) if cotangent is None else cotangent)
    return out.detach(), {k: v.grad for k, v in given_inputs.items() if v is not None}


# C/G of 1, 3, 10, 30, 64 and 256, of which some groups straddle the two images.
SHAPES = [
    (2, 8, 0, 5, 7, 8),
    (1, 24, 0, 9, 3, 8),
    (2, 12, 12, 3, 4, 8),
    (2, 16, 8, 4, 6, 8),
    (1, 31, 9, 3, 3, 4),
    (2, 60, 0, 1, 1, 2),
    (1, 64, 64, 4, 4, 2),
    (1, 200, 312, 2, 3, 2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@FORMATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, memory_format, dtype, plan):
    b, c, skip, h, w, groups = shape
    inputs = case(b, c, h, w, skip=skip, memory_format=memory_format, dtype=dtype, scale=b == 2)
    out = check(inputs, groups, dtype=dtype)
    assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("transposed", [False, True])
@FORMATS
def test_the_result_is_laid_out_like_the_images(memory_format, transposed, implementation):
    for b, device, choice in ((1, DEVICE, implementation), (2, DEVICE, implementation), (2, "meta", None)):
        inputs = {k: v for k, v in case(b, 8, 3, 5, memory_format=memory_format).items() if v is not None}
        if transposed:
            inputs["shift"] = inputs["shift"].t().contiguous().t()
        for trained in (False, True):
            leaves = {k: v.detach().to(device).requires_grad_(trained) for k, v in inputs.items()}
            out = group_norm_silu(**leaves, groups=2, implementation=choice)
            assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "names, silu", [("", True), ("weight", False), ("bias", True), ("weight bias", False), ("bias scale shift", True)]
)
def test_options(names, silu, plan):
    inputs = {k: v for k, v in case(2, 8, 3, 3).items() if k in ("x", *names.split())}
    check(inputs, 4, silu, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@FORMATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_of_the_images(shape, memory_format, dtype, plan):
    b, c, skip, h, w, groups = shape
    inputs = case(b, c + skip, h, w, memory_format=memory_format, dtype=dtype, scale=b == 2)
    inputs["x_bias"] = randn("x_bias", c + skip, shift=0.5)
    # Without gradients the kernels add it, and nothing is rounded in between.
    check(inputs, groups, dtype=dtype, gradients_of=())


@pytest.mark.parametrize("shift", [0.0, 10000.0], ids=["small", "large"])
@FORMATS
def test_bias_of_the_images_in_many_tiles(memory_format, shift, tiled_plan):
    x = randn("x", 1, 48, 13, 13, scale=0.1 if shift else 1.0, shift=shift)
    inputs = case(1, 48, 13, 13, memory_format=memory_format, x=x)
    inputs["x_bias"] = randn("x_bias", 48, scale=0.1 if shift else 1.0)
    check(inputs, 3, dtype=torch.float32, gradients_of=())


def test_bias_of_large_and_of_constant_images(plan):
    for x in (randn("x", 2, 16, 5, 5, scale=0.1, shift=10000.0), torch.full((2, 16, 5, 5), 3.0, device=DEVICE)):
        inputs = case(2, 16, 5, 5, x=x) | {"x_bias": randn("x_bias", 16, scale=0.1)}
        check(inputs, 4, dtype=torch.float32, gradients_of=())


@pytest.mark.parametrize(
    "names", [("x_bias",), ("x",), ("weight",), ("x", "weight", "bias", "scale", "shift", "x_bias")]
)
def test_gradients_beside_a_bias_of_the_images(names, plan):
    inputs = case(2, 16, 5, 4) | {"x_bias": randn("x_bias", 16)}
    check(inputs, 4, dtype=torch.float32, gradients_of=names)


def test_a_bias_of_the_images_beside_a_skip_connection(plan):
    inputs = case(2, 8, 3, 5, skip=8) | {"x_bias": randn("x_bias", 8)}
    check(inputs, 4, dtype=torch.float32, gradients_of=())
    check(inputs, 4, dtype=torch.float32)


def test_a_bias_of_the_images_is_added_in_no_launch_of_its_own():
    x, bias = torch.empty(2, 64, 8, 8, device="meta"), torch.empty(64, device="meta")

    def operators(**given_inputs):
        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(func.name())
                return func(*args, **(kwargs or {}))

        names = []
        with launch.record(launch.H200), torch.no_grad(), Operators():
            ours(x=x, groups=8, **given_inputs)
        return names

    assert operators(x_bias=bias) == operators() == ["minimagen_fast::group_norm_silu"]


def test_parameters_in_half_precision(plan):
    inputs = case(1, 16, 4, 4, dtype=torch.float16)
    inputs |= {name: inputs[name].half() for name in ("weight", "bias")}
    check(inputs, 8, dtype=torch.float16)


@pytest.mark.parametrize("pixels", [31, 32, 33])
@FORMATS
def test_tiles_of_pixels(pixels, memory_format, tiled_plan):
    check(case(2, 6, pixels, 1, skip=2, memory_format=memory_format), 2, dtype=torch.float32)


@pytest.mark.parametrize("channels", [16, 17, 65])
@FORMATS
def test_tiles_of_channels(channels, memory_format, tiled_plan):
    check(case(1, channels, 5, 4, memory_format=memory_format), 1, dtype=torch.float32)


@pytest.mark.parametrize("skip", [0, 8])
@FORMATS
def test_inputs_and_small_statistics_are_all_that_is_saved(skip, memory_format):
    b, groups = 2, 4
    inputs = {k: v for k, v in case(b, 16, 16, 16, skip=skip, memory_format=memory_format).items() if v is not None}
    inputs = {k: v.to("meta").requires_grad_() for k, v in inputs.items()}
    known = {x.untyped_storage()._cdata for x in inputs.values()}

    def bytes_beyond_the_inputs(operation):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            operation(**inputs, groups=groups)
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in saved}
        return sum(size for storage, size in storages.items() if storage not in known)

    assert 0 < bytes_beyond_the_inputs(ours) <= 3 * 4 * b * groups
    # What torch saves is seen: whole images.
    assert bytes_beyond_the_inputs(reference) > inputs["x"].untyped_storage().nbytes()


@pytest.mark.parametrize("multiprocessors", [1, 5])
@FORMATS
def test_chunks(multiprocessors, memory_format, monkeypatch, small_tiles):
    force("split", monkeypatch)
    monkeypatch.setattr(launch, "target", lambda device: launch.Target((9, 0), multiprocessors, 1 << 17))
    inputs = case(1, 8, 13, 13, skip=4, memory_format=memory_format)
    check(inputs, 4, dtype=torch.float32)


def _planned(*shape, groups, memory_format=NCHW, dtype=torch.float16):
    x = torch.empty(*shape, device="meta", dtype=dtype).contiguous(memory_format=memory_format)
    with launch.record(launch.H200) as launches:
        ours(x=x.requires_grad_(), groups=groups).backward(torch.empty_like(x))
    return [launched.kernel.fn.__module__.rsplit("_", 1)[-1] for launched in launches]


@pytest.mark.parametrize(
    "shape, modules",
    [
        ((1, 8, 128, 128), ["resident", "backward"]),
        ((1, 8, 128, 129), ["looped"] * 2),
        ((1, 8, 256, 128), ["looped"] * 2),
        ((1, 8, 256, 129), ["split"] * 3 + ["backward"] * 3),
        ((17, 8, 256, 256), ["looped"] * 2),
        # Lines of 36 pixels are not aligned: as large a tile as of 64 would not stay in registers.
        ((2, 2048, 8, 8), ["resident", "backward"]),
        ((2, 2048, 6, 6), ["looped"] * 2),
        ((17, 8, 512, 512), ["split"] * 3 + ["backward"] * 3),
    ],
    ids=str,
)
def test_which_kernels_run(shape, modules):
    assert _planned(*shape, groups=8) == modules


def test_of_float32_half_as_many_values_fit_into_registers():
    assert _planned(1, 8, 128, 64, groups=8, dtype=torch.float32) == ["resident", "backward"]
    assert _planned(1, 8, 128, 65, groups=8, dtype=torch.float32) == ["looped"] * 2


def test_narrow_groups_are_read_together():
    for shape, first in (((1, 64, 32, 32), "split"), ((1, 64, 8, 8), "resident"), ((1, 128, 16, 16), "resident")):
        assert _planned(*shape, groups=8, memory_format=NHWC)[0] == first
    assert _planned(1, 64, 32, 32, groups=8)[0] == "resident"


@FORMATS
def test_gains_in_half_precision_leave_too_few_registers_for_masks_in_the_largest_tile(memory_format):
    inputs = case(1, 32, 24, 24, dtype=torch.float16, memory_format=memory_format)
    halved = inputs | {name: inputs[name].half() for name in ("weight", "bias")}
    for given_inputs, backward in ((inputs, "backward"), (halved, "looped")):
        on_meta = {name: x if x is None else x.to("meta").requires_grad_() for name, x in given_inputs.items()}
        with launch.record(launch.H200) as launches:
            ours(**on_meta, groups=2).backward(torch.empty_like(on_meta["x"]))
        first, second, *_ = (launched.kernel.fn.__module__.rsplit("_", 1)[-1] for launched in launches)
        # In NCHW memory such tiles are not held in the first place.
        assert [first, second] == (["resident", backward] if memory_format == NHWC else ["looped"] * 2)
    check(halved, 2, dtype=torch.float16)


def _backward_programs(b, c, side, memory_format=NHWC, dtype=torch.bfloat16, skip=0):
    """Of each launch of backward, programs and whether each has a single sample (None for the sums that follow)."""
    inputs = {k: v.to("meta") for k, v in case(b, c, 1, 1, skip=skip, dtype=dtype).items() if v is not None}
    for name in ("x", "skip") if skip else ("x",):
        image = torch.empty(*inputs[name].shape[:2], side, side, device="meta", dtype=dtype)
        inputs[name] = image.contiguous(memory_format=memory_format)
    with launch.record() as launches:
        inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        out = ours(**inputs, groups=8)
        out.backward(torch.empty_like(out))
    return [(one.grid[0], one.constexprs.get("SINGLE")) for one in launches[1:]]


def test_programs_take_several_samples_of_small_images():
    # Half as many programs as samples where the sums would be too much, and no launch that adds one sum to nothing.
    for memory_format in (NHWC, NCHW):
        assert _backward_programs(1, 1024, 8, memory_format) == [(8, True)]
        assert _backward_programs(2, 1024, 8, memory_format) == [(8, False)]
        assert _backward_programs(16, 1024, 8, memory_format) == [(8 * 8, False), (32, None)]
        assert _backward_programs(16, 512, 16, memory_format) == [(8 * 16, True), (16, None)]
        assert _backward_programs(16, 512, 8, memory_format, skip=512)[0] == (8 * 8, False)
    assert _backward_programs(16, 1024, 8, dtype=torch.float32) == [(8 * 16, True), (32, None)]
    # Where registers are short, one sample all the same.
    assert _backward_programs(16, 1536, 8, NHWC)[0] == (8 * 8, False)
    assert _backward_programs(16, 1536, 8, NCHW)[0] == (8 * 16, True)


@FORMATS
@pytest.mark.parametrize("width, side, b", [(8, 4, 2), (8, 4, 5), (6, 5, 3), (6, 5, 6)])
def test_samples_that_share_a_program(width, side, b, memory_format):
    for skip in (0, width):
        inputs = case(b, 2 * width - skip, side, side, skip=skip, memory_format=memory_format, dtype=torch.float16)
        inputs = {k: v for k, v in inputs.items() if v is not None}
        for names in (set(inputs), {"weight"}, {"bias", "x"}, {"shift"}):
            check(inputs, 2, dtype=torch.float16, gradients_of=names)
        one, other = (gradients(inputs, groups=2)[1] for _ in range(2))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@FORMATS
@pytest.mark.parametrize(
    "b, c, skip, side", [(64, 2048, 0, 8), (64, 1024, 1024, 8), (64, 64, 0, 8), (1, 128, 0, 256), (1, 128, 128, 256)]
)
def test_many_small_images_and_one_large_image_fill_the_card(b, c, skip, side, memory_format, dtype):
    inputs = {k: v.to("meta") for k, v in case(b, c, 1, 1, skip=skip, dtype=dtype).items() if v is not None}
    for name in {"x", "skip"} & set(inputs):
        image = torch.empty(*inputs[name].shape[:2], side, side, device="meta", dtype=dtype)
        inputs[name] = image.contiguous(memory_format=memory_format)
    with launch.record(launch.H200) as launches:
        gradients(inputs, torch.empty(b, c + skip, side, side, device="meta", dtype=dtype), groups=8)
    image = inputs["x"].nbytes
    large = [one for one in launches if any(arg.nbytes >= image for arg in one.args if torch.is_tensor(arg))]
    for one in large:
        assert one.grid[0] >= launch.H200.multiprocessors, (one.kernel.fn.__name__, one.grid)
    assert len(large) == (2 if b == 64 else 4), "one or two forward, as many backward"
    # What the others read and write is not worth a whole card.
    for one in launches:
        small = {id(arg): arg.nbytes for arg in one.args if torch.is_tensor(arg)}
        assert one in large or sum(small.values()) < 0.1 * image * (c + skip) / c, (one.kernel.fn.__name__, small)


def _layouts():
    yield "sliced channels", lambda s: randn("x", s[0], 2 * s[1], *s[2:])[:, ::2]
    yield (
        "half of the channels_last",
        lambda s: randn("x", s[0], 2 * s[1], *s[2:]).contiguous(memory_format=NHWC).chunk(2, dim=1)[1],
    )
    yield "sliced pixels", lambda s: randn("x", *s[:2], s[2] + 2, s[3] + 1)[..., 1:-1, 1:]
    yield "transposed", lambda s: randn("x", *s[:2], s[3], s[2]).transpose(2, 3)
    yield "batch inside", lambda s: randn("x", *s[1:], s[0]).permute(3, 0, 1, 2)
    yield "expanded over the batch", lambda s: randn("x", 1, *s[1:]).expand(s)
    yield "expanded over channels", lambda s: randn("x", s[0], 1, *s[2:]).expand(s)
    yield "flipped and offset", lambda s: randn("x", 1 + s[0], *s[1:])[1:].flip(1)


@pytest.mark.parametrize("layout", [make for _, make in _layouts()], ids=[name for name, _ in _layouts()])
def test_layouts_of_images(layout):
    inputs = case(2, 6, 3, 4, skip=6)
    check(inputs | {"x": layout((2, 6, 3, 4))}, 3, dtype=torch.float32)
    check(inputs | {"skip": layout((2, 6, 3, 4)) + 1}, 3, dtype=torch.float32)
    check(inputs, 3, dtype=torch.float32, cotangent=lambda out: layout((2, 12, 3, 4)))


@pytest.mark.parametrize("one, other", [(NCHW, NHWC), (NHWC, NCHW)])
def test_images_of_two_formats(one, other):
    inputs = case(2, 6, 3, 4, skip=6, memory_format=one)
    inputs["skip"] = inputs["skip"].contiguous(memory_format=other)
    out = check(
        inputs, 3, dtype=torch.float32, cotangent=lambda out: randn("g", *out.shape).contiguous(memory_format=other)
    )
    assert out.is_contiguous(memory_format=one)


def test_images_of_two_dtypes():
    inputs = case(2, 8, 3, 3, skip=8)
    out = check(inputs | {"x": inputs["x"].half()}, 8, dtype=torch.float16)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 8, 1, 1), (1, 1, 1, 4)], ids=str)
@FORMATS
def test_formats_that_coincide(shape, memory_format, plan):
    groups = 1 if shape[1] == 1 else 2
    check(case(*shape, memory_format=memory_format), groups, dtype=torch.float32)
    check(case(*shape, skip=groups, memory_format=memory_format), groups, dtype=torch.float32)


def test_one_value_per_group(plan):
    inputs = case(1, 8, 1, 1, scale=False)
    out, grads = gradients(inputs, groups=8)
    assert_near(out, F.silu(inputs["bias"].double())[None, :, None, None], dtype=torch.float32)
    assert grads["x"].abs().max() < 1e-3


def test_strided_parameters(plan):
    inputs = case(3, 8, 2, 3)
    inputs["weight"], inputs["bias"] = randn("weight", 16)[::2], randn("bias", 1).expand(8)
    inputs["scale"], inputs["shift"] = randn("scale", 1, 8).expand(3, 8), randn("shift", 8, 3).t()
    check(inputs, 4, dtype=torch.float32)


def test_one_channel_out_of_many_beside_others(plan):
    # Dense, it lies in both memory formats at once; what stands beside it does not.
    inputs = case(2, 4, 3, 5, skip=4, memory_format=NHWC)
    inputs |= {name: inputs[name][..., :5] for name in ("weight", "bias", "scale", "shift")}
    check(inputs | {"x": inputs["x"][:, :1]}, 1, dtype=torch.float32)


@pytest.mark.parametrize("cotangent", ["one number", "no stride"])
def test_gradients_without_strides(cotangent, plan):
    inputs = case(2, 8, 3, 5, skip=4)
    make = {
        "one number": lambda out: randn("one", 1).to(out).expand(out.shape),
        "no stride": lambda out: randn("row", 1, out.shape[1], 1, 1).to(out).expand(out.shape),
    }[cotangent]
    check(inputs, 4, dtype=torch.float32, cotangent=make)


def test_every_subset_of_gradients(plan):
    inputs = case(2, 4, 1, 3, skip=2, memory_format=NHWC)
    for wanted in itertools.chain.from_iterable(itertools.combinations(inputs, size) for size in range(7)):
        check(inputs, 2, dtype=torch.float32, gradients_of=wanted)


def test_only_needed_gradients_are_computed():
    with launch.record() as launches:
        x, weight = torch.empty(1, 64, 128, 128, device="meta"), torch.empty(64, device="meta", requires_grad=True)
        ours(x=x, weight=weight, groups=8).backward(torch.empty_like(x))
    names = [launched.kernel.fn.__name__ for launched in launches[3:]]
    assert names == ["_sums_kernel", "_totals_kernel", "_parameter_gradients_kernel"]


@pytest.mark.parametrize("shift", [1e4, -3e5])
@FORMATS
def test_small_deviations_from_a_large_mean(shift, memory_format, plan):
    x = randn("x", 1, 12, 9, 11, scale=1e-5 * abs(shift), shift=shift)
    check(case(1, 12, 9, 11, x=x, memory_format=memory_format), 4, dtype=torch.float32)


def test_first_values_unlike_the_others(tiled_plan):
    # They are what distances are taken from.
    x = randn("x", 1, 8, 10, 10)
    x[:, :, 0] += 1000
    check(case(1, 8, 10, 10, x=x), 2, dtype=torch.float32)


def test_a_first_pixel_unlike_the_others(tiled_plan):
    x = randn("x", 1, 8, 48, 48)
    x[:, :, 0, 0] = 1000
    check(case(1, 8, 48, 48, x=x), 2, dtype=torch.float32)


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_constant_groups(dtype, memory_format, plan):
    """Nothing is left of them but the bias; float64 itself leaves rounding of some, and a card's division does."""
    slack = 0.0 if DEVICE.type == "cpu" else 1e-5
    values = torch.tensor([0.0, 3.14159, 65504.0, -1e-6], device=DEVICE).repeat_interleave(2)
    x = values[:, None, None].expand(2, 8, 5, 3)
    inputs = case(2, 8, 5, 3, x=x, dtype=dtype, scale=False, memory_format=memory_format)
    cotangent = randn("cotangent", 2, 8, 5, 3, dtype=dtype).contiguous(memory_format=memory_format)
    out, grads = gradients(inputs, cotangent, groups=4)
    bias = inputs["bias"].double().requires_grad_()
    expected = F.silu(bias)[:, None, None].expand(out.shape)
    assert_near(out, expected.detach(), dtype=dtype)
    (through_silu,) = torch.autograd.grad(expected, bias, cotangent.double())
    assert_near(grads["bias"], through_silu, dtype=dtype)
    assert grads["weight"].abs().max() <= slack
    slope = torch.autograd.functional.jacobian(lambda bias: F.silu(bias).sum(), bias.detach())
    g = (cotangent.double() * (slope * inputs["weight"].double())[:, None, None]).reshape(2, 4, -1)
    # Their deviation is the root of eps.
    assert_near(grads["x"], ((g - g.mean(-1, keepdim=True)) * 1e-5**-0.5).reshape(x.shape), dtype=dtype)


def test_values_near_the_largest_float16(plan):
    x = (randn("x", 2, 8, 4, 5) * 65504).clamp(-65504, 65504)
    check(case(2, 8, 4, 5, x=x, dtype=torch.float16), 4, dtype=torch.float16)


def test_results_beyond_the_largest_float16_are_infinite():
    inputs = case(1, 4, 2, 2, dtype=torch.float16, scale=False)
    out = ours(**inputs | {"bias": torch.full((4,), 1e5, device=DEVICE)}, groups=2)
    assert out.isposinf().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@FORMATS
def test_what_is_not_finite_spoils_its_group(value, memory_format, plan):
    inputs = case(2, 6, 4, 4, skip=6, memory_format=memory_format)
    inputs["x"][0, 5, 3, 3] = value
    # All gradients are not a number where those of plain torch are not: of images, vectors, and rows.
    out = check(inputs, 3, dtype=torch.float32)
    assert out[0, 4:8].isnan().all() and out.isnan().sum() == 64
    _, grads = gradients(inputs, groups=3)
    assert grads["x"][0, 4:].isnan().all() and grads["skip"][0, :2].isnan().all()
    assert not grads["x"][1].isnan().any() and not grads["x"][0, :4].isnan().any()


def test_gradients_that_are_not_finite(plan):
    cotangent = randn("g", 2, 8, 3, 3)
    cotangent[1, 2, 0, 1] = float("nan")
    _, grads = gradients(case(2, 8, 3, 3), cotangent, groups=4)
    assert grads["x"][1, 2:4].isnan().all() and grads["x"].isnan().sum() == 18
    assert grads["weight"].isnan().nonzero().flatten().tolist() == [2]
    assert grads["shift"].isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_parameters_that_are_not_finite(name, plan):
    for value in (float("nan"), float("inf"), float("-inf")):
        inputs = case(2, 8, 3, 3, skip=4)
        inputs[name] = inputs[name].clone()
        inputs[name].view(-1)[-7] = value
        if value != value or name in ("bias", "shift"):
            check(inputs, 4, dtype=torch.float32)
        else:
            # An infinite gain goes with the mean into one product: what torch has infinite may be not a number.
            out = ours(**inputs, groups=4, skip_scale=SKIP_SCALE)
            expected = reference(**inputs, groups=4, skip_scale=SKIP_SCALE)
            assert torch.equal(out.isfinite(), expected.isfinite()) and not out.isfinite().all()


def test_empty_batch(plan):
    out, grads = gradients(case(0, 8, 3, 3, skip=8), groups=8)
    assert out.shape == (0, 16, 3, 3) and grads["x"].shape == (0, 8, 3, 3) and grads["scale"].shape == (0, 16)
    assert (grads["weight"] == 0).all() and (grads["bias"] == 0).all()


@FORMATS
def test_two_runs_are_bit_identical(memory_format, tiled_plan):
    inputs = case(2, 12, 9, 9, skip=4, memory_format=memory_format)
    (one, first), (other, second) = (gradients(inputs, groups=4) for _ in range(2))
    assert torch.equal(one, other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_finite_differences(plan):
    inputs = case(2, 6, 3, 3, skip=3)
    check_slopes(lambda **given: ours(**given, groups=3, skip_scale=SKIP_SCALE), inputs)


def test_reference_gradients_are_those_of_its_values():
    inputs = [randn(n, *s).double().requires_grad_() for n, s in (("x", (1, 2, 2, 2)), ("w", (4,)), ("b", (4,)))]
    more = [randn(n, *s).double().requires_grad_() for n, s in (("s", (1, 4)), ("t", (1, 4)), ("k", (1, 2, 2, 2)))]
    assert torch.autograd.gradcheck(
        lambda x, w, b, s, t, k: reference(x=x, weight=w, bias=b, groups=2, scale=s, shift=t, skip=k, skip_scale=0.7),
        (*inputs, *more),
    )


# What goes wrong here ends the process.
PARTIAL_GRADIENTS = """
import itertools, sys, torch
import torch.nn.functional as F
from minimagen_fast.kernels import group_norm_silu

many = torch.randn(2, 16, 5, 3).contiguous(memory_format=torch.channels_last)
images = {
    "channels_last": many,
    "a slice": many[:, :8],
    "every second channel": many[:, ::2],
    "one channel": torch.empty(2, 1, 5, 3, memory_format=torch.channels_last).normal_(),
    "one pixel": torch.empty(2, 8, 1, 1, memory_format=torch.channels_last).normal_(),
    "contiguous": many.contiguous(),
    "transposed": many.contiguous().transpose(2, 3),
}


def check(image, form):
    x = image.detach().requires_grad_(form != "needs none")
    tensors = {"w": torch.randn(x.shape[1], requires_grad=True), "b": torch.randn(x.shape[1], requires_grad=True)}
    if x.requires_grad:
        tensors["x"] = x
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    y = group_norm_silu(x * 1 if form == "node" else x, tensors["w"], tensors["b"], groups=1)
    # Of images of one axis, which are not in channels_last memory.
    normalised = torch.group_norm(exact.get("x", x.double()).flatten(2), 1, exact["w"], exact["b"])
    expected = F.silu(normalised.view(x.shape))
    gradient = torch.randn(x.shape)
    for size in range(1, 4):
        for names in itertools.combinations(tensors, size):
            wanted = torch.autograd.grad(
                expected, [exact[name] for name in names], gradient.double(), retain_graph=True
            )
            with torch.no_grad():
                got = torch.autograd.grad(y, [tensors[name] for name in names], gradient, retain_graph=True)
                assert not torch.is_grad_enabled()
            for one, other in zip(got, wanted):
                torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
                assert not one.requires_grad
    y.backward(gradient, inputs=[tensors["b"]])
    assert not tensors["b"].grad.requires_grad and tensors["w"].grad is None


for name, image in images.items():
    for form in ("leaf", "node", "needs none"):
        print(name, form, flush=True)
        check(image, form)
"""


def test_reference_has_the_gradients_of_vectors_alone():
    done = subprocess.run(
        [sys.executable, "-c", PARTIAL_GRADIENTS],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@FORMATS
def test_the_result_is_laid_out_like_the_first_image(memory_format, implementation):
    inputs = case(2, 8, 3, 5, skip=4, memory_format=memory_format)
    inputs["skip"] = inputs["skip"].contiguous(memory_format=NCHW if memory_format == NHWC else NHWC)
    if implementation == "reference":
        # torch's own on CUDA knows one layout.
        inputs = {name: tensor.cpu() for name, tensor in inputs.items()}
    out = group_norm_silu(**inputs, groups=4, implementation=implementation)
    assert out.is_contiguous(memory_format=memory_format)


@FORMATS
def test_no_channels_beside_others(memory_format, plan):
    inputs = case(2, 0, 3, 5, skip=8, memory_format=memory_format)
    check(inputs, 4, dtype=torch.float32)
    check(case(2, 8, 3, 5, memory_format=memory_format) | {"skip": inputs["skip"][:, :0]}, 4, dtype=torch.float32)


def test_reference_is_the_concatenation_normalised_scaled_and_activated():
    inputs = case(2, 6, 3, 4, skip=6)
    joint = torch.cat((inputs["x"], inputs["skip"] * SKIP_SCALE), dim=1)
    expected = F.group_norm(joint, 3, inputs["weight"], inputs["bias"], 1e-5)
    expected = F.silu(expected * (inputs["scale"][..., None, None] + 1) + inputs["shift"][..., None, None])
    # Not to the bit: the two are free to take torch's operators in another memory format or number of threads.
    actual = reference(**inputs, groups=3, skip_scale=SKIP_SCALE)
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@settings(derandomize=True, max_examples=8, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(0, 9), st.integers(1, 6), st.integers(1, 9),
    st.booleans(), st.booleans(), st.sampled_from(PLANS),
)  # fmt: skip
def test_any_shape(b, groups, width, skip, h, w, channels_last, scale, plan):
    skip = min(skip, groups * width - 1)
    memory_format = NHWC if channels_last else NCHW
    inputs = case(b, groups * width - skip, h, w, skip=skip, memory_format=memory_format, scale=scale)
    wanted = None if width * h * w > 1 else ["bias"]
    with pytest.MonkeyPatch.context() as patch:
        force(plan, patch)
        few = "few values" if width * h * w <= 4 else ()
        check(inputs, groups, dtype=torch.float32, gradients_of=wanted, wider=few)


OPCHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


def test_opcheck(plan):
    inputs = case(2, 8, 3, 5, skip=8, memory_format=NHWC)
    tensors = [inputs[name].requires_grad_() for name in ("x", "skip", "weight", "bias", "scale", "shift")]
    ops = torch.ops.minimagen_fast
    torch.library.opcheck(ops.group_norm_silu.default, (*tensors, None, 4, 1e-5, 0.7, True), test_utils=OPCHECKS)
    x, *nothing = tensors[0], None, None, None, None, None, None
    torch.library.opcheck(ops.group_norm_silu.default, (x, *nothing, 4, 1e-5, 1.0, False), test_utils=OPCHECKS)
    detached = [tensor.detach() for tensor in tensors]
    without_skip = detached[0], None, *(tensor[..., :8] for tensor in detached[2:]), randn("x_bias", 8)
    torch.library.opcheck(ops.group_norm_silu.default, (*without_skip, 4, 1e-5, 1.0, True), test_utils=OPCHECKS)
    statistics = randn("statistics", 2, 3, 4).abs()
    for needed in ([True] * 6, [False, True, False, True, False, False]):
        torch.library.opcheck(
            ops.group_norm_silu_backward.default,
            (randn("dy", 2, 16, 3, 5), *detached, statistics, 4, 0.7, True, needed),
            test_utils=["test_schema", "test_faketensor"],
        )


def test_explicit_choices_that_cannot_be_honoured():
    x = randn("x", 1, 8, 2, 2).double()
    with pytest.raises(ValueError, match="'triton' of group_norm_silu .*torch.float64"):
        ours(x=x, groups=4)
    assert group_norm_silu(x, groups=4).dtype == torch.float64
    with pytest.raises(ValueError, match="no pixels"):
        ours(x=torch.empty(1, 8, 0, 2, device=DEVICE), groups=4)
    with pytest.raises(ValueError, match="up to .* channels and .* pixels"):
        ours(x=torch.empty(1, 1, 2**14, 2**14, device="meta"), groups=1)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"x": torch.ones(2, 8, 3)}, ValueError, r"x must have shape \(b, c, h, w\); got \(2, 8, 3\)"),
        ({"x": torch.ones(2, 8, 3, 3, dtype=torch.int64)}, TypeError, "x must be a floating-point tensor"),
        ({"groups": 3}, ValueError, "groups must divide the number of channels, 8; got 3"),
        ({"groups": 0}, ValueError, "groups must divide"),
        ({"weight": torch.ones(9)}, ValueError, r"weight must have shape \(8,\).*got \(9,\)"),
        ({"bias": torch.ones(8, 1)}, ValueError, r"bias must have shape \(8,\)"),
        ({"bias": torch.ones(8, dtype=torch.bool)}, TypeError, "bias must be a floating-point"),
        ({"skip": torch.ones(2, 8, 3, 4)}, ValueError, "skip must have shape"),
        ({"skip": torch.ones(1, 8, 3, 3)}, ValueError, "skip must have shape"),
        ({"shift": None}, ValueError, "scale and shift must be given together"),
        ({"scale": torch.ones(2, 8, 1, 1)}, ValueError, r"scale must have shape \(2, 8\)"),
        ({"shift": torch.ones(1, 8)}, ValueError, r"shift must have shape \(2, 8\)"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight must be on the device of x"),
    ],
)
def test_clear_errors(changes, error, words, implementation):
    inputs = case(2, 8, 3, 3) | {"groups": 4} | changes
    inputs = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v for k, v in inputs.items()
    }
    with pytest.raises(error, match=words):
        group_norm_silu(**inputs, implementation=implementation)


@pytest.mark.gpu
@FORMATS
def test_offsets_beyond_32_bits(memory_format):
    x = torch.randn(9, 16, 4096, 4096, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    expected = reference(x=x[-1:].float(), groups=8)
    assert_near(ours(x=x, groups=8)[-1:], expected.double(), dtype=torch.bfloat16)
