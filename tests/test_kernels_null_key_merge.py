"""A library's attention with the null key merged in, against the formula in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parity import DEVICE, assert_near, check_parity, check_slopes, randn

from minimagen_fast.kernels import launch, null_key_attention, null_key_merge

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # The interpreter computes in numpy, which warns of NaNs and overflows.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

NAMES = ("q", "k", "v", "null_key", "null_value")
# On CUDA the library takes half precision only.
DTYPES = [torch.float16, torch.bfloat16] + ([] if DEVICE.type == "cuda" else [torch.float32])


@pytest.fixture(params=["kernel", "plain torch"])
def merged_by(request, monkeypatch):
    if request.param == "plain torch":
        monkeypatch.setattr(null_key_merge, "_by_kernel", lambda x: False)
    return request.param


def implementation(name, heads):
    return lambda **inputs: null_key_attention(**inputs, heads=heads, implementation=name)


def case(b, heads, n, m, d, *, shared=False, dtype=DTYPES[-1], null_dtype=torch.float32):
    width = d if shared else heads * d
    inputs = {"q": randn("q", b, n, heads * d), "k": randn("k", b, m, width), "v": randn("v", b, m, width)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    return inputs | {name: randn(name, d, dtype=null_dtype) for name in ("null_key", "null_value")}


def check(inputs, heads, **options):
    ours, reference = (implementation(name, heads) for name in ("sdpa_merge", "reference"))
    if inputs["q"].dtype == torch.bfloat16:
        options["wider"] = "a rounded delta"
    return check_parity(ours, reference, inputs, dtype=inputs["q"].dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "b, heads, n, m, d",
    [
        (2, 2, 64, 64, 64),
        (1, 2, 5, 261, 64),
        (2, 3, 70, 33, 32),
        (1, 1, 66, 2, 128),
        (2, 2, 1, 1, 64),
        (1, 2, 300, 9, 32),
    ],
)
def test_parity(b, heads, n, m, d, shared, dtype, merged_by):
    out = check(case(b, heads, n, m, d, shared=shared, dtype=dtype), heads)
    assert out.dtype == dtype and out.is_contiguous()


@pytest.mark.parametrize("shared", [False, True])
def test_any_strides(shared, merged_by):
    inputs = case(2, 2, 17, 9, 32, shared=shared)
    inputs["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["null_key"], inputs["null_value"] = randn("null", 32, 2).unbind(1)
    inputs["k"], inputs["v"] = torch.cat((inputs["k"], inputs["v"]), dim=-1).chunk(2, dim=-1)
    check(inputs, 2)
    inputs["k"] = inputs["k"][:1].expand(2, -1, -1)
    inputs["q"] = randn("wide", 2, 34, 70, dtype=inputs["q"].dtype)[:, ::2, 3:67]
    check(inputs, 2, cotangent=lambda out: randn("gradient", 1, 1, 64).expand(out.shape).to(out.dtype))
    check(inputs, 2, cotangent=lambda out: randn("gradient", 2, 64, 17).transpose(1, 2).to(out.dtype))


@pytest.mark.parametrize("wanted", [subset for size in range(6) for subset in itertools.combinations(NAMES, size)])
def test_gradients_only_of_what_wants_one(wanted):
    check(case(2, 2, 17, 9, 32), 2, gradients_of=wanted)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the library takes no float32 there")
@pytest.mark.parametrize("shared", [False, True])
def test_finite_differences(shared, merged_by):
    check_slopes(implementation("sdpa_merge", 2), case(1, 2, 6, 9, 32, shared=shared))


def _exact_with(m):
    """Inputs whose gradients can be compared for so many keys.

    Of two keys or one, the null key, those of the scores nearly cancel or are zero: what is left of them in half
    precision is the rounding of the output that delta is made of.
    """
    return NAMES if m > 1 or DTYPES[-1] == torch.float32 else ("v", "null_value")


@settings(derandomize=True, deadline=None, max_examples=8)
@given(b=st.integers(1, 2), heads=st.integers(1, 3), n=st.integers(1, 70), m=st.integers(1, 40), shared=st.booleans())
def test_any_shape(b, heads, n, m, shared):
    check(case(b, heads, n, m, 32, shared=shared), heads, gradients_of=_exact_with(m))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("b, n, m", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_empty(b, n, m, shared, merged_by):
    out = check(case(b, 2, n, m, 32, shared=shared), 2, gradients_of=_exact_with(m))
    assert out.shape == (b, n, 64)


def test_parameters_of_another_dtype(merged_by):
    check(case(2, 2, 9, 9, 32, dtype=torch.bfloat16, null_dtype=torch.bfloat16), 2)


@pytest.mark.parametrize("scale", [0.0, 30.0, -30.0])
def test_a_null_key_that_counts_for_nothing_or_for_all(scale, merged_by):
    inputs = case(1, 1, 20, 30, 32)
    inputs["q"] = inputs["q"].abs()
    inputs["null_key"] = torch.full((32,), scale, device=DEVICE)
    check(inputs, 1, gradients_of=("v", "null_value"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_go_where_they_do_in_torch(name, value, merged_by):
    inputs = case(2, 2, 9, 9, 32)
    inputs[name].view(-1, 32)[1 if inputs[name].ndim == 3 else 0, 3] = value
    check(inputs, 2)


@pytest.mark.parametrize("shared", [False, True])
def test_a_nan_in_the_gradient_goes_where_it_does_in_torch(shared, merged_by):
    def cotangent(out):
        gradient = randn("cotangent", *out.shape, dtype=out.dtype)
        gradient[1, 3, 5] = torch.nan
        return gradient

    check(case(2, 2, 9, 9, 32, shared=shared), 2, cotangent=cotangent)


@pytest.mark.parametrize("n", [63, 64, 65])
def test_tails(n):
    """A program takes 64 queries."""
    check(case(1, 1, n, 5, 32), 1)


def test_large_values_with_small_differences(merged_by):
    inputs = case(2, 2, 9, 9, 32)
    for name in ("v", "null_value"):
        inputs[name] = (randn(name, *inputs[name].shape, scale=0.1, shift=10000.0)).to(inputs[name].dtype)
    # The others' gradients are differences of products with 10000, of which float32 has two digits.
    check(inputs, 2, gradients_of=("v", "null_value"))


def test_the_largest_values_of_float16(merged_by):
    inputs = case(1, 2, 9, 9, 32, dtype=torch.float16)
    inputs["v"] = 60000 + 5504 * randn("v", 1, 9, 64).sigmoid().half()
    inputs["null_value"] = torch.full((32,), 65504.0, device=DEVICE)
    out = check(inputs, 2, gradients_of=("v", "null_value"))
    assert out.isfinite().all()
    # Scores that float16 could not hold.
    inputs = case(1, 2, 9, 9, 32, dtype=torch.float16)
    inputs["q"], inputs["k"] = 200 * inputs["q"], 200 * inputs["k"]
    check(inputs, 2, gradients_of=())


def test_kernels_and_plain_torch_are_one_formula():
    b, heads, n, d = 2, 3, 70, 32
    q, out, grad = (randn(name, b, heads, n, d) for name in ("q", "out", "grad"))
    lse, key, value = randn("lse", b, heads, n), randn("key", d), randn("value", d)
    merged, total = null_key_merge._merge_reference(q, out, lse, key, value)
    in_place, statistics = out.transpose(1, 2).contiguous(), lse.clone()
    blocks = launch.ceil_div(n, null_key_merge.ROWS)
    launch.run(
        null_key_merge._merge, (b * heads * blocks,), q, key, value, in_place, statistics, *q.stride()[:3],
        heads, n, blocks, ROOT=d**-0.5, D=d, ROWS=null_key_merge.ROWS,
    )  # fmt: skip
    assert_near(in_place.transpose(1, 2), merged.double(), dtype=torch.float32)
    assert_near(statistics, total.double(), dtype=torch.float32)

    dq, d_key, d_value = null_key_merge._null_gradients_reference(grad, q, merged, total, key, value)
    added = torch.ones(b, n, heads, d, device=DEVICE)
    partials = torch.empty(2, b * heads * blocks, d, device=DEVICE)
    launch.run(
        null_key_merge._null_gradients, (b * heads * blocks,), grad, q, key, value, in_place, statistics, added,
        partials, *grad.stride()[:3], *q.stride()[:3], heads, n, blocks, ROOT=d**-0.5, D=d, ROWS=null_key_merge.ROWS,
    )  # fmt: skip
    assert_near(added.transpose(1, 2), (dq + 1).double(), dtype=torch.float32)
    assert_near(partials.sum(1), torch.stack((d_key, d_value)).double(), dtype=torch.float32)


def test_two_runs_are_bit_identical():
    results = []
    for _ in range(2):
        inputs = {name: x.requires_grad_() for name, x in case(2, 2, 70, 40, 32).items()}
        out = implementation("sdpa_merge", 2)(**inputs)
        wanted = [x for name, x in inputs.items() if DEVICE.type == "cpu" or name != "q"]
        results.append((out, *torch.autograd.grad(out, wanted, randn("grad", *out.shape).to(out.dtype))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_registration():
    inputs = case(2, 2, 5, 9, 32)
    tensors = tuple(inputs[name].requires_grad_() for name in NAMES)
    torch.library.opcheck(torch.ops.minimagen_fast.null_key_merge.default, (*tensors, 2))
    out, lse = null_key_merge.null_key_merge(*tensors, 2)
    saved = tuple(x.detach() for x in (*tensors, out, lse))
    torch.library.opcheck(
        torch.ops.minimagen_fast.null_key_merge_backward.default,
        (torch.ones_like(out), *saved, 2),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_cuda_library_s_shapes_fit():
    # On meta tensors the operators for CUDA answer, and the merge's launches are recorded.
    inputs = case(2, 4, 17, 9, 32, dtype=torch.bfloat16, shared=True)
    inputs = {name: x.to("meta").requires_grad_() for name, x in inputs.items()}
    with launch.record() as launches:
        out = implementation("sdpa_merge", 4)(**inputs)
        out.backward(torch.empty_like(out))
    assert [taken.kernel.fn.__name__ for taken in launches] == ["_merge", "_null_gradients"]
    assert out.shape == inputs["q"].shape
    assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in inputs.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({name: torch.zeros(2, 9, 64).double() for name in "qkv"}, "not torch.float64"),
        (dict(mask=torch.ones(2, 9).bool()), "takes no mask"),
        (dict(bias=torch.zeros(2, 2, 5, 10)), "takes no bias"),
        (dict(heads=1, null_key=torch.zeros(64), null_value=torch.zeros(64)), None),
        (dict(heads=4, null_key=torch.zeros(16), null_value=torch.zeros(16)), "head widths 32, 64, 128, not 16"),
    ],
)
def test_what_it_cannot_do_is_said(change, message):
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    arguments = {**case(2, 2, 5, 9, 32), "heads": 2, **change}
    if message is None:
        assert null_key_attention(**arguments, implementation="sdpa_merge").shape == (2, 5, 64)
        return
    with pytest.raises(ValueError, match=message):
        null_key_attention(**arguments, implementation="sdpa_merge")
