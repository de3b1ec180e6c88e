"""The Triton kernels of attention with a null key against the formula in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parity import DEVICE, DTYPES, assert_near, check_parity, check_slopes, randn

from minimagen_fast.kernels import launch, null_key_attention, null_key_flash, null_key_tiles

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # The interpreter computes in numpy, which warns of NaNs and overflows.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

NAMES = ("q", "k", "v", "null_key", "null_value")
SUBSETS = [subset for size in range(6) for subset in itertools.combinations(NAMES, size)]


def ours(heads, mask=None):
    return lambda **inputs: null_key_attention(**inputs, heads=heads, mask=mask, implementation="triton")


def reference(heads, mask=None):
    return lambda **inputs: null_key_attention(**inputs, heads=heads, mask=mask, implementation="reference")


def case(b, heads, n, m, d, *, shared=False, dtype=torch.float32, null_dtype=torch.float32):
    width = d if shared else heads * d
    inputs = {"q": randn("q", b, n, heads * d), "k": randn("k", b, m, width), "v": randn("v", b, m, width)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    return inputs | {name: randn(name, d, dtype=null_dtype) for name in ("null_key", "null_value")}


def seen(b, m):
    return randn("mask", b, m) > 0


def check(inputs, heads, mask=None, wider=(), **options):
    dtype = options.pop("dtype", inputs["q"].dtype)
    return check_parity(
        ours(heads, mask), reference(heads, mask), inputs, dtype=dtype, wider=reasons(dtype, *wider), **options
    )


def reasons(dtype, *more):
    """Why the kernels' results may be further away, on this device and in this dtype."""
    if dtype == torch.bfloat16:
        return "a rounded delta", *more
    return ("three TF32 products", *more) if DEVICE.type == "cuda" and dtype == torch.float32 else more


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "b, heads, n, m, d",
    [
        (1, 2, 64, 64, 64),
        (1, 2, 5, 261, 64),
        (2, 3, 35, 33, 32),
        (1, 1, 66, 2, 32),
        (2, 2, 1, 1, 64),
        (1, 1, 130, 7, 64),
        (1, 8, 20, 320, 64),
    ],
)
def test_parity(b, heads, n, m, d, shared, dtype):
    out = check(case(b, heads, n, m, d, shared=shared, dtype=dtype), heads)
    assert out.dtype == dtype and out.is_contiguous()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads(dtype, shared):
    check(case(1, 2, 40, 37, 128, shared=shared, dtype=dtype), 2)


@pytest.mark.parametrize("dtype, n, d", [(torch.float32, 9, 32)] + [(dtype, 33, 64) for dtype in DTYPES[1:]])
def test_more_than_512_keys(dtype, n, d):
    """Blocks of keys are larger then, and many go before the one that is not full."""
    inputs = case(1, 2, n, 577, d, shared=True, dtype=dtype)
    if dtype != torch.float32 and DEVICE.type == "cpu":
        assert null_key_tiles.key_tile(inputs["q"], d, 577)[:2] == (64, 128)
    check(inputs, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thousands_of_keys_and_queries(dtype, shared):
    """As many keys as a level of 128x128 pixels has."""
    check(case(1, 2, 1024, 16384, 64, shared=shared, dtype=dtype), 2)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("multiprocessors", [1, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("d", [32, 128])
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the card decides")
def test_every_card_s_blocks(d, capability, multiprocessors, dtype, monkeypatch):
    monkeypatch.setattr(launch, "_stand_in", launch.Target(capability, multiprocessors, 99 * 1024))
    check(case(1, 1, 129, 67, d, dtype=dtype), 1)


@pytest.mark.parametrize("tile", [31, 32, 33, 63, 65, 128])
def test_tails(tile):
    check(case(1, 1, tile, 5, 32, dtype=torch.float16), 1)
    check(case(1, 1, 5, tile, 32, dtype=torch.float16), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_mask(shared, dtype):
    b, m = 2, 70
    mask = seen(b, m)
    mask[1, :64] = False  # a whole block of keys
    check(case(b, 2, 20, m, 32, shared=shared, dtype=dtype), 2, mask)
    check(case(b, 2, 20, m, 32, shared=shared, dtype=dtype), 2, mask[:1])
    check(case(b, 2, 20, m, 32, shared=shared, dtype=dtype), 2, mask.t().contiguous().t())


def test_with_every_key_masked_the_null_key_is_left():
    inputs = case(2, 2, 5, 7, 32)
    mask = torch.zeros(2, 7, dtype=torch.bool, device=DEVICE)
    for x in inputs.values():
        x.requires_grad_()
    out = ours(2, mask)(**inputs)
    torch.testing.assert_close(out, inputs["null_value"].repeat(2).expand_as(out))
    gradients = torch.autograd.grad(out, list(inputs.values()), randn("grad", *out.shape))
    for name, gradient in zip(NAMES[:4], gradients, strict=False):
        # What is left is the rounding of a difference that is zero.
        assert gradient.abs().max() < (1e-5 if name in ("q", "null_key") else 1e-30), name


@pytest.mark.parametrize("shared", [False, True])
def test_slices_of_one_projection(shared):
    inputs = case(2, 2, 20, 9, 32, shared=shared)
    kv = torch.cat((inputs["k"], inputs["v"]), dim=-1)
    inputs["k"], inputs["v"] = kv.chunk(2, dim=-1)
    check(inputs, 2)


def test_strided_null_key_and_value():
    inputs = case(1, 2, 9, 9, 32)
    inputs["null_key"], inputs["null_value"] = randn("null", 32, 2).unbind(1)
    check(inputs, 2)
    inputs["null_value"] = randn("null", 1).expand(32)
    check(inputs, 2)


def test_overlapping_rows():
    inputs = case(1, 1, 9, 9, 32)
    inputs["k"], inputs["v"] = randn("k", 1, 40).unfold(1, 32, 1), randn("v", 1, 40).unfold(1, 32, 1)
    check(inputs, 1)


def strided(name, b, n, width):
    return {
        "transposed": lambda: randn(name, b, width, n).transpose(1, 2),
        "batch last": lambda: randn(name, n, width, b).permute(2, 0, 1),
        "rows of wider ones": lambda: randn(name, b, n, width + 3)[..., 1 : width + 1],
        "every other row": lambda: randn(name, b, 2 * n, width)[:, ::2],
        "one row for all": lambda: randn(name, b, 1, width).expand(b, n, width),
        "one entry for all": lambda: randn(name, 1, n, width).expand(b, n, width),
        "one number for all": lambda: randn(name, 1, 1, 1).expand(b, n, width),
    }


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", strided("", 1, 1, 1).keys())
def test_any_strides(layout, shared):
    inputs = case(2, 2, 17, 9, 32, shared=shared)
    # Equal keys give gradients that are the rounding of a difference that is zero.
    for name in ("q",) if layout == "one number for all" else ("q", "k", "v"):
        inputs[name] = strided(name, *inputs[name].shape)[layout]()
    check(inputs, 2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", strided("", 1, 1, 1).keys())
def test_any_strides_of_the_gradient(layout, shared):
    check(
        case(2, 2, 17, 9, 32, shared=shared),
        2,
        cotangent=lambda out: strided("gradient", *out.shape)[layout]().double(),
    )


def test_the_gradient_of_a_sum():
    inputs = {name: x.requires_grad_() for name, x in case(2, 2, 17, 9, 32).items()}
    expected = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    ours(2)(**inputs).sum().backward()
    reference(2)(**expected).sum().backward()
    for name, x in inputs.items():
        assert_near(x.grad, expected[name].grad, dtype=torch.float32, what=name)


@pytest.mark.parametrize("wanted", SUBSETS)
def test_gradients_only_of_what_wants_one(wanted):
    for shared in (False, True):
        check(case(2, 2, 5, 9, 32, shared=shared), 2, gradients_of=wanted)


@pytest.mark.parametrize(
    "wanted, kernels",
    [
        ("q", ["_forward", "_backward_queries"]),
        ("null_key", ["_forward", "_backward_queries"]),
        ("k", ["_forward", "_backward_queries", "_backward_keys"]),
    ],
)
def test_nothing_is_launched_for_gradients_that_nobody_wants(wanted, kernels):
    inputs = {name: x.to("meta").requires_grad_(name == wanted) for name, x in case(2, 2, 17, 9, 32).items()}
    with launch.record() as launches:
        out = ours(2)(**inputs)
        out.backward(torch.empty_like(out))
    assert [taken.kernel.fn.__name__ for taken in launches] == kernels
    needs = {key: value for key, value in launches[1].constexprs.items() if key.startswith("NEED")}
    assert needs == {"NEED_Q": wanted == "q", "NEED_NULL": wanted == "null_key"}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("b, n, m", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_empty(b, n, m, shared):
    check(case(b, 2, n, m, 32, shared=shared), 2)


@pytest.mark.parametrize("null_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_another_dtype(dtype, null_dtype):
    lower = min(dtype, null_dtype, key=lambda dtype: torch.finfo(dtype).bits)
    check(case(2, 2, 9, 9, 32, dtype=dtype, null_dtype=null_dtype), 2, dtype=lower)


def test_large_values_with_small_differences():
    inputs = case(2, 2, 20, 70, 32)
    inputs["v"] = randn("v", 2, 70, 64, scale=0.1, shift=10000.0)
    inputs["null_value"] = randn("null_value", 32, scale=0.1, shift=10000.0)
    check(inputs, 2, gradients_of=("v", "null_value"))
    # The others' gradients are differences of products with 10000. The formula in float32 has no more of them right.
    cotangent = randn("cotangent", *inputs["q"].shape)
    actual, plain, exact = (
        torch.autograd.grad(run(2)(**given), list(given.values()), cotangent.to(given["q"].dtype))
        for run, dtype in ((ours, torch.float32), (reference, torch.float32), (reference, torch.float64))
        for given in [{name: x.to(dtype).requires_grad_() for name, x in inputs.items()}]
    )
    for name, one, other, expected in zip(NAMES, actual, plain, exact, strict=True):
        errors = [(x.double() - expected).norm().item() for x in (one, other)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * expected.norm().item(), (name, errors)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="torch's own is of other formulas there")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "null_key"])
def test_large_queries_or_keys_with_small_differences(name, shared):
    """Scores beyond 10000, of which float32 keeps three digits behind the point: no worse than torch's own attention.

    The formula, which keeps its weights for the backward pass, has better gradients of the queries.
    """
    inputs = case(2, 2, 20, 70, 32, shared=shared)
    inputs[name] = randn(name, *inputs[name].shape, scale=0.1, shift=10000.0)
    cotangent = randn("cotangent", *inputs["q"].shape)

    def results(implementation, dtype):
        given = {each: x.to(dtype).requires_grad_() for each, x in inputs.items()}
        out = null_key_attention(**given, heads=2, implementation=implementation)
        return out.detach(), *torch.autograd.grad(out, list(given.values()), cotangent.to(dtype))

    actual, library = (results(implementation, torch.float32) for implementation in ("triton", "sdpa"))
    exact = results("reference", torch.float64)
    for what, one, other, expected in zip(("output", *NAMES), actual, library, exact, strict=True):
        errors = [(x.double() - expected).norm().item() for x in (one, other)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * expected.norm().item(), (what, errors)


def test_the_largest_values_of_float16():
    inputs = case(1, 2, 20, 70, 32, dtype=torch.float16)
    inputs["v"] = 60000 + 5504 * torch.rand(1, 70, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE).half()
    inputs["null_value"] = torch.full((32,), 65504.0, device=DEVICE)
    out = check(inputs, 2, gradients_of=())
    assert out.isfinite().all()
    # Scores that float16 could not hold.
    inputs = case(1, 2, 20, 70, 32, dtype=torch.float16)
    inputs["q"], inputs["k"] = 200 * inputs["q"], 200 * inputs["k"]
    check(inputs, 2, gradients_of=())


def large_values_and_small_keys(dtype):
    inputs = case(1, 2, 20, 70, 32)
    for name in ("q", "k", "null_key"):
        inputs[name] *= 1e-2
    for name in ("v", "null_value"):
        inputs[name] *= 1e4
    return {name: x.to(dtype) if x.ndim == 3 else x for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_scores_up_to_the_largest_of_float16(dtype):
    inputs = large_values_and_small_keys(dtype)
    check(inputs, 2, cotangent=lambda out: 10 * randn("cotangent", *out.shape).to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_scores_beyond_float16_show(dtype):
    """A limit of float16, and not of the formula: the gradient of q would be small enough."""
    inputs = {name: x.requires_grad_() for name, x in large_values_and_small_keys(dtype).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    out = ours(2)(**inputs)
    gradient = 200 * randn("cotangent", *out.shape).to(dtype)
    out.backward(gradient)
    reference(2)(**exact).backward(gradient.double())
    assert exact["q"].grad.abs().max() < 65504
    assert inputs["q"].grad.isfinite().all() == (dtype != torch.float16)
    for name in ("v", "null_key", "null_value") if dtype == torch.float16 else NAMES:
        assert_near(inputs[name].grad, exact[name].grad, dtype=dtype, what=name, wider=reasons(dtype))


def test_one_key_that_outweighs_all():
    inputs = case(1, 1, 20, 70, 32)
    inputs["k"][:, 40] *= 100
    inputs["null_key"] *= 50
    check(inputs, 1, gradients_of=("k", "v", "null_value"), wider=["scores in the thousands"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d", [32, 128])
def test_nan_and_infinity_go_where_they_do_in_torch(d, name, shared, value):
    inputs = case(2, 2, 9, 35, d, shared=shared)
    inputs[name].view(-1, d)[1 if inputs[name].ndim == 3 else 0, 3] = value
    check(inputs, 2)


@pytest.mark.parametrize("shared", [False, True])
def test_a_nan_in_the_gradient_goes_where_it_does_in_torch(shared):
    def cotangent(out):
        gradient = randn("cotangent", *out.shape)
        gradient[1, 3, 5] = torch.nan
        return gradient

    check(case(2, 2, 9, 35, 32, shared=shared), 2, cotangent=cotangent)


@pytest.mark.parametrize(
    "name, wanted", [("k", ("k", "v", "null_value")), ("null_key", ("null_key", "null_value", "v"))]
)
def test_infinite_keys_that_nobody_attends_to_have_no_gradient(name, wanted):
    # 20 queries do not fill a block; the ones that are missing must not meet the infinite key.
    inputs = case(1, 1, 20, 40, 32)
    inputs["q"] = inputs["q"].abs()
    inputs[name].view(-1, 32)[1 if name == "k" else 0, 3] = -torch.inf
    check(inputs, 1, gradients_of=wanted)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rows_too_far_apart_for_32_bits_are_copied(name, monkeypatch):
    monkeypatch.setattr(null_key_flash, "LARGEST_ROW_STRIDE", 3 * 64)
    inputs = case(4, 2, 20, 9, 32)
    inputs[name] = inputs[name].transpose(0, 1).contiguous().transpose(0, 1)
    assert null_key_flash._rows(inputs[name], 1)[1:] == (inputs[name].shape[1] * 64, 64)
    check(inputs, 2)


def test_masked_keys_may_be_nan():
    inputs, mask = case(2, 2, 20, 40, 32), seen(2, 40)
    inputs["k"].masked_fill_(~mask[..., None], torch.nan)
    check(inputs, 2, mask)


def test_two_runs_are_bit_identical():
    results = []
    for _ in range(2):
        inputs = {name: x.requires_grad_() for name, x in case(2, 2, 70, 40, 32, dtype=torch.float16).items()}
        out = ours(2)(**inputs)
        results.append((out, *torch.autograd.grad(out, list(inputs.values()), randn("grad", *out.shape).half())))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shared", [False, True])
def test_finite_differences(shared):
    check_slopes(ours(2), case(1, 2, 6, 9, 32, shared=shared))


@settings(derandomize=True, deadline=None, max_examples=8)
@given(
    b=st.integers(1, 2),
    heads=st.integers(1, 3),
    n=st.integers(1, 20),
    m=st.integers(0, 40),
    shared=st.booleans(),
    masked=st.booleans(),
)
def test_any_shape(b, heads, n, m, shared, masked):
    check(case(b, heads, n, m, 32, shared=shared), heads, seen(b, m) if masked else None)


def bytes_of_launches(b, heads, n, m, d, shared):
    inputs = case(b, heads, 1, 1, d, shared=shared, dtype=torch.bfloat16)
    inputs = {
        name: torch.empty((b, n if name == "q" else m, x.shape[2]) if x.ndim == 3 else x.shape, dtype=x.dtype)
        for name, x in inputs.items()
    }
    inputs = {name: x.to("meta").requires_grad_() for name, x in inputs.items()}
    with launch.record() as launches:
        out = ours(heads)(**inputs)
        out.backward(torch.empty_like(out))
    tensors = {id(arg): arg for taken in launches for arg in taken.args if isinstance(arg, torch.Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


@pytest.mark.parametrize("shared", [False, True])
def test_memory_is_linear_in_the_number_of_queries(shared):
    n = 1024
    for b in (1, 16):
        once, twice = (bytes_of_launches(b, 8, size, size, 64, shared) for size in (n, 2 * n))
        assert twice <= 2.05 * once
        # q, k, v, out, their gradients, and what is in float32: statistics, and parts of the keys' gradients.
        assert once < 8 * b * n * 8 * 64 * 2 + 64 * 2**20


def arguments(**options):
    inputs = case(2, 2, 5, 9, 32, **options)
    return tuple(inputs[name] for name in NAMES)


@pytest.mark.parametrize("shared, masked", [(False, True), (True, False)])
def test_registration(shared, masked):
    tensors = tuple(x.requires_grad_() for x in arguments(shared=shared))
    mask = seen(2, 9) if masked else None
    torch.library.opcheck(torch.ops.minimagen_fast.null_key_flash.default, (*tensors, mask, 2))
    out, lse = null_key_flash.null_key_flash(*tensors, mask, 2)
    saved = (*(x.detach() for x in tensors), mask, out.detach(), lse.detach())
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            torch.ops.minimagen_fast.null_key_flash_backward.default,
            (torch.ones_like(out), *saved, 2, *needs),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(heads=1), "head widths 32, 64, 128, not 96"),
        ({name: torch.zeros(2, 9, 96).double() for name in "qkv"}, "not from torch.float64"),
        (dict(bias=torch.zeros(2, 3, 5, 10)), "takes no bias"),
    ],
)
def test_what_it_cannot_do_is_said(change, message):
    inputs = {name: x.to(DEVICE) for name, x in case(2, 3, 5, 9, 32).items()}
    if change.get("heads") == 1:
        inputs |= {name: torch.zeros(96, device=DEVICE) for name in ("null_key", "null_value")}
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        null_key_attention(**{**inputs, "heads": 3, **change}, implementation="triton")


@pytest.mark.parametrize("many", [False, True], ids=["one sequence", "many sequences"])
@pytest.mark.parametrize("elements", [2**14, pytest.param(2**31, marks=pytest.mark.gpu)])
def test_the_end_of_large_tensors(elements, many):
    """Of tensors with more elements than 32 bits can count on a card, and of small ones to try the test itself."""
    heads, d, m, last, dtype = 2, 64, 16, 20, DTYPES[-1]
    width = heads * d
    b, n = (elements // (100 * width) + 2, 100) if many else (1, elements // width + 100)
    end = case(1, heads, last, m, d, dtype=dtype)
    large = end | {
        "q": torch.zeros(b, n, width, dtype=dtype, device=DEVICE),
        "k": torch.zeros(b, m, width, dtype=dtype, device=DEVICE),
        "v": torch.zeros(b, m, width, dtype=dtype, device=DEVICE),
    }
    cotangent = torch.zeros_like(large["q"])
    assert cotangent.numel() > elements
    # Nothing but the end has a gradient: what goes into that of keys and of the null key is known.
    large["q"][-1, -last:], large["k"][-1], large["v"][-1] = end["q"][0], end["k"][0], end["v"][0]
    cotangent[-1, -last:] = randn("cotangent", last, width)

    large = {name: x.detach().requires_grad_() for name, x in large.items()}
    end = {name: x.double().requires_grad_() for name, x in end.items()}
    out, expected = ours(heads)(**large), reference(heads)(**end)
    gradients = torch.autograd.grad(out, list(large.values()), cotangent)
    exact = torch.autograd.grad(expected, list(end.values()), cotangent[-1:, -last:].double())
    options = {"dtype": dtype, "wider": reasons(dtype)}
    assert_near(out[-1:, -last:].detach(), expected.detach(), what="output", **options)
    for name, actual, wanted in zip(NAMES, gradients, exact, strict=True):
        at_end = actual[-1:, -last:] if name == "q" else actual[-1:] if name in ("k", "v") else actual
        assert_near(at_end, wanted, what=f"gradient of {name}", **options)


@pytest.mark.gpu
def test_memory_on_the_card():
    inputs = case(1, 8, 16384, 16384, 64, shared=True, dtype=torch.bfloat16)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ours(8)(**inputs)
    out.backward(torch.ones_like(out))
    # The scores of all heads would be 4 GB.
    assert torch.cuda.max_memory_allocated() - before < 2**28
