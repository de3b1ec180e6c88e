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
