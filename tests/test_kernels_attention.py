"""Attention with a null key: every implementation against the formula, written out with loops."""

import importlib.util

import pytest
import torch
from kernel_parity import assert_near

from minimagen_fast.kernels import (
    attention,
    attention_table,
    dispatch,
    implementation,
    launch,
    null_key_attention,
    use_implementation,
)


def _by_hand(q, k, v, null_key, null_value, heads, mask=None, bias=None):
    b, n, width = q.shape
    d = width // heads
    out = torch.zeros_like(q)
    for i in range(b):
        for h in range(heads):
            shared = k.shape[-1] == d
            head = slice(0, d) if shared else slice(h * d, (h + 1) * d)
            keys = torch.cat((null_key[None], k[i, :, head]))
            values = torch.cat((null_value[None], v[i, :, head]))
            scores = q[i, :, h * d : (h + 1) * d] @ keys.T / d**0.5
            if bias is not None:
                scores = scores + bias[i, h]
            if mask is not None:
                visible = torch.cat((torch.ones(1, dtype=torch.bool), mask[i]))
                scores = scores.masked_fill(~visible, -torch.inf)
            out[i, :, h * d : (h + 1) * d] = scores.softmax(-1) @ values
    return out


def _case(shared, heads=3, d=8, b=2, n=5, m=7):
    torch.manual_seed(0)
    width = d if shared else heads * d
    shapes = [(b, n, heads * d), (b, m, width), (b, m, width), (d,), (d,)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("choice", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_formula(choice, shared, masked):
    tensors = _case(shared)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) < 0.5 if masked else None
    out = null_key_attention(*tensors, heads=3, mask=mask, implementation=choice)
    expected = _by_hand(*tensors, heads=3, mask=mask)
    assert_near(out, expected, dtype=torch.float64)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), tensors)
    for gradient, by_hand in zip(gradients, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        assert_near(gradient, by_hand, dtype=torch.float64)


@pytest.mark.parametrize("choice", ["auto", "reference", "sdpa", "sdpa_merge", "triton"])
@pytest.mark.parametrize("shared", [False, True])
def test_every_implementation_is_the_same_formula(choice, shared):
    if choice == "triton" and not launch.INTERPRETED:
        pytest.skip("on a card: see the kernels' own tests")
    tensors = [x.detach().float().requires_grad_() for x in _case(shared, heads=2, d=32)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out = null_key_attention(*tensors, heads=2, implementation=choice)
    expected = _by_hand(*exact, heads=2)
    assert_near(out, expected, dtype=torch.float32)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), tensors)
    for gradient, by_hand in zip(gradients, torch.autograd.grad((expected * weight).sum(), exact), strict=True):
        assert_near(gradient, by_hand, dtype=torch.float32)


@pytest.mark.parametrize("shared", [False, True])
def test_xformers_gets_the_null_key_in_front(shared, monkeypatch):
    shapes = []

    def as_xformers(q, k, v):
        shapes.append((q.shape, k.shape, v.shape))
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setattr(attention, "_xformers_attention", lambda: as_xformers)
    monkeypatch.setattr(attention, "xformers_reasons", lambda q, mask: [])
    tensors = _case(shared)
    out = null_key_attention(*tensors, heads=3, implementation="xformers")
    torch.testing.assert_close(out, _by_hand(*tensors, heads=3))
    assert shapes == [((2, 15, 1, 8), *2 * ((2, 8, 1, 8),)) if shared else ((2, 5, 3, 8), *2 * ((2, 8, 3, 8),))]


@pytest.mark.parametrize("shared", [False, True])
def test_heads_that_share_keys_are_more_queries_of_one_head(shared, monkeypatch):
    shapes, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **options):
        shapes.append((q.shape, k.shape, v.shape))
        return attend(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    null_key_attention(*_case(shared), heads=3, implementation="sdpa")
    assert shapes == [((2, 1, 15, 8), *2 * ((2, 1, 8, 8),)) if shared else ((2, 3, 5, 8), *2 * ((2, 3, 8, 8),))]


@pytest.mark.parametrize("installed", [False, True])
def test_xformers_is_refused_with_every_reason(installed, monkeypatch):
    monkeypatch.setattr(attention, "XFORMERS_INSTALLED", installed)
    reasons = ["it takes no bias", "the tensors are on cpu, not on a CUDA device"]
    reasons += [] if installed else ["xformers is not installed"]
    reasons += ["it is used without a mask", "it does not take float64"]
    options = {"mask": torch.ones(2, 7).bool(), "bias": torch.ones(8).double()}
    with pytest.raises(ValueError, match=f"cannot be used here: {'; '.join(reasons)}\\."):
        null_key_attention(*_case(False), heads=3, **options, implementation="xformers")


@pytest.mark.parametrize("choice", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("b, n, m", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_empty(choice, shared, b, n, m, dtype):
    tensors = [x.detach().to(dtype).requires_grad_() for x in _case(shared, b=b, n=n, m=m)]
    out = null_key_attention(*tensors, heads=3, implementation=choice)
    assert out.shape == (b, n, 24)
    torch.autograd.grad(out.sum(), tensors)
    if m == 0 and out.numel():
        torch.testing.assert_close(out, tensors[4].repeat(3).expand_as(out))


def test_the_table_knows_every_shape():
    keys = set()
    for shared in (False, True):
        for n in (1, 64, 65, 256, 4096, 10**6):
            for m in (0, 1, 64, 261, 320, 321, 10**6):
                key = attention_table.key_of(shared, 64, n, m)
                assert key.queries in attention_table.QUERIES and key.keys in attention_table.KEYS
                assert n <= key.queries or key.queries == attention_table.QUERIES[-1]
                assert m <= key.keys or key.keys == attention_table.KEYS[-1]
                keys.add(key)
                order = attention_table.order(key, torch.bfloat16, masked=False, training=False)
                assert set(order) <= set(dispatch.CHOICES) - {"auto"}
    assert len(keys) == 2 * 4 * 4


def first_on_cuda(monkeypatch, *, dtype=torch.bfloat16, d=64, n=5, masked=False, trained=False):
    """What ``auto`` tries first on a card, of which there are no tensors here but the kind of device."""
    q, k, v = (torch.zeros(1, n, d, dtype=dtype, requires_grad=trained) for _ in range(3))
    null_key, null_value = torch.zeros(2, d).unbind()
    mask = torch.ones(1, n, dtype=torch.bool) if masked else None
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "device", property(lambda self: torch.device("cuda")))
        patch.setattr(dispatch, "triton_reasons", lambda *tensors: [])
        patch.setattr(attention.null_key_merge.launch, "capability", lambda device: (9, 0))
        candidates = attention._candidates(q, k, v, null_key, null_value, 1, mask, None, None)
        return next(name for name, reasons in candidates.items() if not dispatch._found(reasons))


def test_what_was_measured_counts_for_that_alone(monkeypatch):
    library_first = {attention_table.key_of(False, 64, n, n): ("sdpa", "triton") for n in (5, 1000)}
    monkeypatch.setattr(attention_table, "MEASURED", library_first)
    assert first_on_cuda(monkeypatch) == "sdpa"
    assert first_on_cuda(monkeypatch, n=600) == "sdpa"
    assert first_on_cuda(monkeypatch, n=100) == "triton"
    assert first_on_cuda(monkeypatch, d=32) == "triton"
    assert first_on_cuda(monkeypatch, dtype=torch.float16) == "triton"
    assert first_on_cuda(monkeypatch, dtype=torch.float32) == "triton"
    assert first_on_cuda(monkeypatch, masked=True) == "triton"


@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_trained_is_deterministic(d, dtype, monkeypatch):
    """Of the libraries' backward passes none is, unless torch is told to."""
    order = ("sdpa", "sdpa_merge", "triton")
    monkeypatch.setattr(attention_table, "MEASURED", {attention_table.key_of(False, d, 5, 5): order})
    assert first_on_cuda(monkeypatch, d=d, dtype=dtype, trained=True) == "triton"
    with torch.no_grad():
        assert first_on_cuda(monkeypatch, d=d, dtype=dtype, trained=True) == (
            "sdpa" if dtype == torch.bfloat16 else "triton"
        )


def test_what_the_table_leaves_out_is_tried_last_and_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(attention_table, "order", lambda *key, **call: ("xformers", "sdpa"))
    q, k, v, null_key, null_value = (x.float() for x in _case(True, heads=2, d=64))
    # Of a card there are no tensors here, but of its kind of device an order.
    monkeypatch.setattr(torch.Tensor, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(dispatch, "triton_reasons", lambda *tensors: [])
    for module in (attention.null_key_flash, attention.null_key_merge):
        monkeypatch.setattr(module, "reasons", lambda *arguments: [])
    candidates = attention._candidates(q, k, v, null_key, null_value, 2, None, None, "triton")
    assert list(candidates) == ["xformers", "sdpa", "triton", "sdpa_merge", "reference"]


def test_tensors_on_several_devices_are_refused():
    q, k, v, null_key, null_value = _case(True)
    with pytest.raises(ValueError, match="must be on one device; got q on cpu, k on cpu, v on cpu, null_key on meta"):
        null_key_attention(q, k, v, null_key.to("meta"), null_value, heads=3)


def test_no_heads_are_refused():
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        null_key_attention(*_case(True), heads=0)


def test_on_a_cpu_nothing_but_sdpa_is_chosen():
    for shared in (False, True):
        q, k, v, null_key, null_value = (x.float() for x in _case(shared, heads=1, d=64))
        candidates = attention._candidates(q, k, v, null_key, null_value, 1, None, None, None)
        assert dispatch.select("attention", candidates, q.device) == "sdpa"


def test_bias():
    tensors = _case(shared=True)
    bias = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    out = null_key_attention(*tensors, heads=3, bias=bias)
    assert_near(out, _by_hand(*tensors, heads=3, bias=bias), dtype=torch.float64)
    # As under autocast, which leaves a bias as it is.
    lower = [x.detach().bfloat16() for x in tensors]
    assert null_key_attention(*lower, heads=3, bias=bias.float()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="'sdpa' of null_key_attention cannot be used here: it takes no bias"):
        null_key_attention(*tensors, heads=3, bias=bias, implementation="sdpa")


def test_with_every_key_masked_the_null_key_is_left():
    q, k, v, null_key, null_value = _case(shared=False)
    for choice in ("reference", "sdpa"):
        out = null_key_attention(
            q, k, v, null_key, null_value, heads=3, mask=torch.zeros(2, 7).bool(), implementation=choice
        )
        torch.testing.assert_close(out, null_value.repeat(3).expand_as(out))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(heads=5), "q must have shape"),
        (dict(q=torch.zeros(2, 5, 0)), "q must have shape .* d at least 1; got"),
        (dict(k=torch.zeros(2, 7, 12)), "k and v must have one shape"),
        (dict(v=torch.zeros(2, 6, 24)), "k and v must have one shape"),
        (dict(null_key=torch.zeros(24)), r"null_key must have shape \(8,\), .* got \(24,\)"),
        (dict(null_value=torch.zeros(1, 8)), "null_value must have shape"),
        (dict(mask=torch.ones(2, 8).bool()), r"mask must have shape \(2, 7\)"),
        (dict(mask=torch.ones(3, 7).bool()), r"mask must have shape \(2, 7\)"),
        (dict(bias=torch.ones(3, 5, 7)), r"bias must be broadcastable to .* \(2, 3, 5, 8\); got \(3, 5, 7\)"),
        (dict(bias=torch.ones(1, 2, 3, 5, 8)), "bias must be broadcastable"),
        (dict(implementation="fastest"), "implementation must be one of auto, triton, reference, sdpa"),
    ],
)
def test_refusals(change, message):
    q, k, v, null_key, null_value = _case(shared=False)
    arguments = dict(q=q, k=k, v=v, null_key=null_key, null_value=null_value, heads=3)
    with pytest.raises(ValueError, match=message):
        null_key_attention(**{**arguments, **change})


def test_numbers_must_be_floating_point():
    q, k, v, null_key, null_value = _case(shared=False)
    with pytest.raises(TypeError, match="k must be of a floating-point type; got torch.int64"):
        null_key_attention(q, k.long(), v, null_key, null_value, heads=3)
    with pytest.raises(TypeError, match="bias must be of a floating-point type; got torch.bool"):
        null_key_attention(q, k, v, null_key, null_value, heads=3, bias=torch.ones(5, 8).bool())


def test_a_mask_to_be_added_to_scores_is_refused():
    with pytest.raises(TypeError, match="mask must be bool, .* got torch.float32: compare it with 0"):
        null_key_attention(*_case(shared=False), heads=3, mask=torch.zeros(2, 7))


EVERY = ["auto", "reference", "sdpa", "sdpa_merge", "triton"]


@pytest.mark.parametrize("choice", EVERY)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_queries_keys_and_values_of_several_dtypes_are_refused(choice, name, dtype):
    tensors = dict(zip(("q", "k", "v"), (x.detach().float() for x in _case(False, d=32)), strict=False))
    tensors[name] = tensors[name].to(dtype)
    one, other = (torch.float32, dtype) if name != "q" else (dtype, torch.float32)
    message = f"{'k' if name == 'q' else name} must have the dtype of q, {one}; got {other}: convert one of the two"
    null = torch.zeros(32)
    with pytest.raises(TypeError, match=message):
        null_key_attention(**tensors, null_key=null, null_value=null, heads=3, implementation=choice)


@pytest.mark.parametrize("choice", EVERY)
@pytest.mark.parametrize("lower", ["q", "k", "v"])
def test_autocast_makes_them_one(choice, lower):
    if choice == "triton" and not launch.INTERPRETED:
        pytest.skip("on a card: see the kernels' own tests")
    names = ("q", "k", "v", "null_key", "null_value")
    exact = dict(zip(names, (x.detach().float() for x in _case(False, d=32)), strict=True))
    tensors = {name: x.to(torch.float16 if name == lower else torch.float32) for name, x in exact.items()}
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    with torch.autocast("cpu", torch.float16):
        out = null_key_attention(**tensors, heads=3, implementation=choice)
    assert out.dtype == torch.float16
    assert_near(out, null_key_attention(**exact, heads=3), dtype=torch.float16, wider="rounded inputs")
    out.sum().backward()
    assert all(x.grad.dtype == x.dtype for x in tensors.values())


def test_autocast_leaves_float64_alone():
    q, k, *rest = _case(False)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="v must have the dtype of q"):
        null_key_attention(q, k, rest[0].float(), *rest[1:], heads=3)


def test_the_policy_is_restored_after_an_error():
    before = implementation()
    with pytest.raises(RuntimeError), use_implementation("reference"):
        assert implementation() == "reference"
        raise RuntimeError
    assert implementation() == before
    with pytest.raises(ValueError, match="must be one of"), use_implementation("quickest"):
        pass


def as_a_new_process_imports(name):
    """A module made once more, from the environment as it is now."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("value, choice", [("reference", "reference"), ("", "auto")])
def test_the_environment_sets_the_policy(value, choice, monkeypatch):
    monkeypatch.setenv("MINIMAGEN_FAST_KERNELS", value)
    assert as_a_new_process_imports(dispatch.__name__).implementation() == choice


def test_an_unknown_policy_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("MINIMAGEN_FAST_KERNELS", "best")
    with pytest.raises(ValueError, match="the environment variable MINIMAGEN_FAST_KERNELS must be one of auto, triton"):
        as_a_new_process_imports(dispatch.__name__)
