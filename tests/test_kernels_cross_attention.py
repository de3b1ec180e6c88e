"""Cross attention with its projections: the way that multiplies their weights first against the one that does not."""

import pytest
import torch

from minimagen_fast.kernels import cross_attention, null_key_cross_attention, use_implementation

HEADS, D, DIM, DIM_OUT, M = 3, 8, 12, 10, 20


def tensors(n, c, dtype=torch.float64):
    """Tokens, context, the weights to queries, to keys and values, and to results, null key and null value."""
    torch.manual_seed(0)
    width = HEADS * D
    shapes = [(2, n, DIM), (2, M, c), (width, DIM), (2 * width, c), (DIM_OUT, width), (D,), (D,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("c", [4, 100])
def test_both_ways_give_the_same(n, masked, c, dtype):
    given = tensors(n, c, dtype)
    mask = torch.rand(2, M) < 0.5 if masked else None
    upstream = torch.randn(2, n, DIM_OUT, dtype=dtype)
    results = []
    for way in (cross_attention._with_products, None):
        if way:
            out = way(*given, HEADS, mask)
        else:
            out = null_key_cross_attention(*given, heads=HEADS, mask=mask, implementation="reference")
        results.append((out, *torch.autograd.grad((out * upstream).sum(), given)))
    for got, expected in zip(*results, strict=True):
        # The weights of the softmax are float32 in both.
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))


def test_the_order_is_that_of_queries_keys_values_results():
    """By hand, for one image and one head: nothing but the formula."""
    x, context, to_q, to_kv, to_out, null_key, null_value = (t.detach() for t in tensors(5, 4))
    to_q, to_out, to_kv = to_q[:D], to_out[:, :D], torch.cat((to_kv[:D], to_kv[HEADS * D : HEADS * D + D]))
    to_key, to_value = to_kv.split(D)
    keys, values = (torch.cat((n[None], context[0] @ w.T)) for n, w in ((null_key, to_key), (null_value, to_value)))
    expected = ((x[0] @ to_q.T) @ keys.T / D**0.5).softmax(-1) @ values @ to_out.T
    for way in ("auto", "reference"):
        weights = to_q, to_kv, to_out
        out = null_key_cross_attention(x, context, *weights, null_key, null_value, heads=1, implementation=way)
        torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


EVERY = pytest.mark.parametrize("implementation", ["auto", "reference", "sdpa", "sdpa_merge", "triton"])
NAMES = ("x", "context", "to_q", "to_kv", "to_out", "null_key", "null_value")


def named(n=40, c=4, dtype=torch.float32):
    """So few channels of the context that ``auto`` multiplies the weights first."""
    given = dict(zip(NAMES, (x.detach() for x in tensors(n, c, dtype)), strict=True))
    assert cross_attention._fewer_with_products(given["x"], given["context"], given["to_q"], HEADS)
    return given


SHAPES = {
    "x": ((2, DIM), r"x must have shape \(b, n, dim\); got \(2, 12\)"),
    "to_q": ((HEADS * D, DIM + 1), r"to_q must have shape \(heads \* d, 12\) with heads = 3, .* got \(24, 13\)"),
    "rows of to_q": ((HEADS * D + 1, DIM), r"to_q must have shape .* got \(25, 12\)"),
    "to_kv": ((2 * D, 4), r"to_kv must have shape \(48, c\), twice the rows of to_q .* got \(16, 4\)"),
    "width of context": ((2, M, 5), r"context must have shape \(2, m, 4\), .* got \(2, 20, 5\)"),
    "batch of context": ((1, M, 4), r"context must have shape \(2, m, 4\), .* got \(1, 20, 4\)"),
    "to_out": ((DIM_OUT, D), r"to_out must have shape \(dim_out, 24\), .* got \(10, 8\)"),
    "null_key": ((HEADS * D,), r"null_key must have shape \(8,\), the width of a head; got \(24,\)"),
    "null_value": ((1, D), r"null_value must have shape \(8,\), the width of a head; got \(1, 8\)"),
    "mask": ((2, M + 1), r"mask must have shape \(2, 20\), \(b, m\); got \(2, 21\)"),
    "batch of mask": ((3, M), r"mask must have shape \(2, 20\), \(b, m\); got \(3, 20\)"),
}


@EVERY
@pytest.mark.parametrize("what", SHAPES)
def test_wrong_shapes_are_refused(what, implementation):
    shape, message = SHAPES[what]
    name = what.split()[-1]
    wrong = torch.ones(shape, dtype=torch.bool if name == "mask" else torch.float32)
    with pytest.raises(ValueError, match=message):
        null_key_cross_attention(**{**named(), name: wrong}, heads=HEADS, implementation=implementation)


@EVERY
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("c", [4, 100])
def test_tokens_for_all_images_are_like_those_of_each(c, masked, implementation):
    if implementation in ("sdpa_merge", "triton"):
        pytest.skip("not on a CPU")
    given = dict(zip(NAMES, (x.detach() for x in tensors(40, c, torch.float32)), strict=True))
    shared = torch.randn(6, c)
    mask = torch.rand(2, M + 6) < 0.5 if masked else None
    options = {"heads": HEADS, "mask": mask, "implementation": implementation}
    together = torch.cat((given["context"], shared.expand(2, -1, -1)), dim=1)
    expected = null_key_cross_attention(**{**given, "context": together}, **options)
    out = null_key_cross_attention(**given, **options, shared_context=shared)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    nothing = null_key_cross_attention(**given, heads=HEADS, implementation=implementation, shared_context=shared[:0])
    expected = null_key_cross_attention(**given, heads=HEADS, implementation=implementation)
    torch.testing.assert_close(nothing, expected, rtol=1e-4, atol=1e-4)


@EVERY
def test_wrong_shared_tokens_are_refused(implementation):
    def refused(error, message, shared, **more):
        options = {"heads": HEADS, "implementation": implementation, **more}
        with pytest.raises(error, match=message):
            null_key_cross_attention(**named(), **options, shared_context=shared)

    refused(ValueError, r"shared_context must have shape \(s, 4\), as wide .* got \(6, 5\)", torch.randn(6, 5))
    refused(ValueError, r"shared_context must have shape \(s, 4\), .* got \(2, 6, 4\)", torch.randn(2, 6, 4))
    refused(TypeError, "shared_context must have the dtype of x, torch.float32", torch.randn(6, 4).double())
    refused(ValueError, "shared_context must be on the device of x", torch.randn(6, 4, device="meta"))
    mask = torch.ones(2, M).bool()
    refused(ValueError, r"mask must have shape \(2, 26\), \(b, m\); got \(2, 20\)", torch.randn(6, 4), mask=mask)


@EVERY
@pytest.mark.parametrize("name", NAMES)
def test_wrong_dtypes_and_devices_are_refused(name, implementation):
    given = named()

    def refused(error, message, changed):
        with pytest.raises(error, match=message):
            null_key_cross_attention(**{**given, name: changed}, heads=HEADS, implementation=implementation)

    refused(TypeError, f"{name} must be of a floating-point type; got torch.int64", given[name].long())
    if name in NAMES[1:]:
        refused(ValueError, f"{name} must be on the device of x, cpu; got meta", given[name].to("meta"))
    if name in NAMES[1:5]:
        message = f"{name} must have the dtype of x, torch.float32; got torch.float64"
        refused(TypeError, message, given[name].double())
        with torch.autocast("cpu", torch.bfloat16):
            refused(TypeError, message, given[name].double())


@EVERY
def test_other_wrong_arguments(implementation):
    def refused(error, message, **changed):
        with pytest.raises(error, match=message):
            null_key_cross_attention(**{**named(), "heads": HEADS, "implementation": implementation, **changed})

    refused(ValueError, "heads must be at least 1, got 0", heads=0)
    refused(ValueError, r"to_q must have shape \(heads \* d, 12\) with heads = 5", heads=5)
    refused(TypeError, "mask must be bool, .* got torch.float32", mask=torch.ones(2, M))
    refused(ValueError, "mask must be on the device of x, cpu; got meta", mask=torch.ones(2, M, device="meta").bool())


@pytest.mark.parametrize("implementation", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("mask", [None, torch.ones(1, M).bool()])
def test_empty_batch(implementation, mask):
    given = named()
    given = {name: x.requires_grad_() for name, x in (given | {n: given[n][:0] for n in NAMES[:2]}).items()}
    out = null_key_cross_attention(**given, heads=HEADS, mask=mask, implementation=implementation)
    assert out.shape == (0, 40, DIM_OUT)
    out.sum().backward()
    assert all(not x.grad.any() for x in given.values() if x.grad is not None)


@pytest.mark.parametrize("n", [3, 40])
def test_a_mask_for_all_images_or_of_integers(n):
    given = dict(zip(NAMES, (x.detach() for x in tensors(n, 4)), strict=True))
    mask = torch.arange(M)[None] % 3 > 0
    expected = null_key_cross_attention(**given, heads=HEADS, mask=mask.expand(2, M))
    for same in (mask, mask.long()):
        assert torch.equal(null_key_cross_attention(**given, heads=HEADS, mask=same), expected)


def test_the_cheaper_way_is_taken(monkeypatch):
    taken = []
    monkeypatch.setattr(cross_attention, "_with_products", lambda *_: taken.append("products"))
    by_key = torch.zeros(1, 1, 512)
    monkeypatch.setattr(cross_attention, "null_key_attention", lambda *_, **__: taken.append("keys") or by_key)
    null = torch.zeros(64)
    for n, c in ((16, 32), (64, 32), (256, 512), (4096, 32)):
        weights = torch.zeros(512, 64), torch.zeros(1024, c), torch.zeros(64, 512)
        given = torch.zeros(1, n, 64), torch.zeros(1, 258, c), *weights, null, null
        null_key_cross_attention(*given, heads=8)
        null_key_cross_attention(*given, heads=8, implementation="sdpa")
    assert taken == ["products", "keys"] * 2 + ["keys", "keys"] + ["products", "keys"]


def test_autocast_computes_in_bfloat16_and_stays_near():
    given = [t.detach().float() / 2 for t in tensors(40, 4)]
    exact = null_key_cross_attention(*given, heads=HEADS, implementation="reference")
    with torch.autocast("cpu", torch.bfloat16):
        out = null_key_cross_attention(*given, heads=HEADS)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.03 * exact.norm()


def test_keys_are_kept_unless_the_context_is_narrower_than_a_head():
    narrow, wide = torch.zeros(1, 5, D - 1), torch.zeros(1, 5, D)
    assert not cross_attention.keys_are_worth_keeping(narrow, dim_head=D)
    assert cross_attention.keys_are_worth_keeping(wide, dim_head=D)
    with use_implementation("reference"):
        assert cross_attention.keys_are_worth_keeping(narrow, dim_head=D)


@pytest.mark.parametrize("dynamic, way", [(False, 1.0), (True, 2.0)])
def test_sizes_that_are_not_known_are_not_asked(dynamic, way, monkeypatch):
    """A graph for any batch is one, and multiplies no weights first; one for these very sizes does what saves most."""
    monkeypatch.setattr(cross_attention, "_with_products", lambda x, *_: x * 0 + 1)
    monkeypatch.setattr(cross_attention, "null_key_attention", lambda q, *_, **__: q * 0)
    monkeypatch.setattr(cross_attention, "linear", lambda x, weight: x @ weight.t() * 0 + 2)
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(
        null_key_cross_attention, backend=lambda graph, _: graphs.append(graph) or graph.forward, dynamic=dynamic
    )
    given = named()
    for batch in (2, 3, 50):
        given["x"], given["context"] = torch.randn(batch, 40, DIM), torch.randn(batch, M, 4)
        assert (compiled(**given, heads=HEADS) == way).all()
    torch._dynamo.reset()
    assert len(graphs) == (1 if dynamic else 3)
