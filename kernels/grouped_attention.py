"""Attention in float32 on a CPU, of groups of queries that share keys, from matrix products of oneDNN.

Where :func:`.cpu_products.onednn_multiplies`, it takes less time than the library's kernel, which multiplies with MKL
and computes the scores again for the gradients, which are kept here. It takes some groups at a time and, without
gradients, some queries.
"""

import torch

from .cpu_products import grouped_products, onednn_multiplies, summed_products
from .launch import differentiable, refuse_batched

__all__ = ["grouped_attention", "reasons_against", "with_shared"]

# Scores of a piece of the groups, or of their queries: they stay in the cache.
_PIECE = 2**20
# Scores that are kept for the gradients; the library's kernel keeps none.
_MOST_KEPT = 2**24
# Less work is done before oneDNN has laid out the keys.
_LEAST_QUERIES, _LEAST_SCORES = 256, 2**18


def reasons_against(n: int, groups: int, m: int, d: int, *tensors: torch.Tensor) -> list[str]:
    """Why :func:`grouped_attention` is not to be used for queries (n, groups, d) and m keys made of these tensors."""
    # Before anything is asked of sizes: as in cpu_products.linear.
    if not onednn_multiplies(*tensors):
        return ["it is for float32 on a CPU, uncompiled, where oneDNN multiplies faster than MKL"]
    scores = n * groups * m
    found = []
    if n < _LEAST_QUERIES or scores < _LEAST_SCORES or d % 16:
        found.append("for so few queries, or heads of this width, it is no faster than the library's kernel")
    if scores > _MOST_KEPT and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        found.append("it would keep too many scores for the backward pass")
    return found


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None = None,
    *,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T) v for each group.

    With queries that are one wider than the keys, their last channel is their score of the first key, whose row in
    ``k`` and ``v`` must be zero; the last channel of the results is this key's weight.

    Args:
        q: Scaled queries, shape (n, g, d) or (n, g, d + 1), in any layout: the results have the same.
        k: Keys, shape (g, m, d); fastest for a d that is a multiple of 16.
        v: Values, shaped like ``k``.
        visible: Which keys may be attended to, bool, shape (g, all keys).
        shared: More keys, after the others, which are their own values, for all groups the same: shape (s, d). Their
            gradients are then sums over all groups at once.

    Returns:
        Attended values, shaped like ``q``.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, shared)):
        return _Attention.apply(q, k, v, shared, visible)
    k, v = _all_keys(k, v, shared)
    out = torch.empty_like(q)
    for some in _pieces(q, k):
        seen = None if visible is None else visible[some]
        queries, results = q[:, some], out[:, some]
        rows = max(_PIECE // max(queries.shape[1] * k.shape[1], 1), 1)
        for piece, result in zip(queries.split(rows), results.split(rows), strict=True):
            _attend(piece, k[some], v[some], seen, result)
    return out


def _all_keys(k, v, shared):
    if shared is None:
        return k, v
    keys = with_shared(k, shared)
    return keys, keys if v is k else with_shared(v, shared)


def with_shared(own: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Those of each, shape (b, m, c), and after them those that all share, shape (s, c): shape (b, m + s, c)."""
    return torch.cat((own, shared.expand(own.shape[0], -1, -1)), dim=1)


def _pieces(q: torch.Tensor, k: torch.Tensor) -> list[slice]:
    """Groups by the few."""
    (n, groups, _), m = q.shape, k.shape[1]
    few = max(round(_PIECE / max(n * m, 1)), 1)
    return [slice(first, first + few) for first in range(0, groups, few)]


def _attend(q, k, v, visible, out):
    """Write the results into ``out``; the weights, shape (n, g, m)."""
    d = k.shape[2]
    weights = grouped_products(q[..., :d], k)
    if q.shape[2] > d:
        weights[..., 0] = q[..., d]
    if visible is not None:
        weights.masked_fill_(~visible, -torch.finfo(weights.dtype).max)
    torch.softmax(weights, -1, out=weights)
    out[..., :d] = grouped_products(weights, v.transpose(1, 2))
    if q.shape[2] > d:
        out[..., d] = weights[..., 0]
    return weights


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, shared, visible):
        ctx.own = k.shape[1]
        k, v = _all_keys(k, v, shared)
        out = torch.empty_like(q)
        weights = [
            _attend(q[:, some], k[some], v[some], None if visible is None else visible[some], out[:, some])
            for some in _pieces(q, k)
        ]
        ctx.save_for_backward(q, k, v, *weights)
        return out

    @staticmethod
    def backward(ctx, gradient):
        refuse_batched("grouped_attention", gradient)
        return *_Gradients.apply(ctx.needs_input_grad[:4], ctx.own, gradient, *ctx.saved_tensors), None


def _gradients(wanted, own, gradient, q, k, v, *weights):
    """Those of the wanted ones of q, k, v and the shared keys; None for the others. ``own`` keys are not shared."""
    of_q = torch.empty_like(q) if wanted[0] else None
    of_k, of_v = (k.new_empty((k.shape[0], own, k.shape[2])) if of_this else None for of_this in wanted[1:3])
    of_shared = k.new_zeros((k.shape[2], k.shape[1] - own)) if wanted[3] else None
    for some, weight in zip(_pieces(q, k), weights, strict=True):
        _backward(
            gradient[:, some],
            q[:, some],
            k[some],
            v[some],
            weight,
            None if of_q is None else of_q[:, some],
            None if of_k is None else of_k[some],
            None if of_v is None else of_v[some],
            of_shared,
        )
    return of_q, of_k, of_v, None if of_shared is None else of_shared.t()


# Has no gradients of its own, and says so.
_Gradients = differentiable("grouped_attention_backward", _gradients)


def _backward(gradient, q, k, v, weights, into_q, into_k, into_v, onto_shared):
    """Write the gradients of some groups, of those that there is a tensor for; add those of the shared keys."""
    d = k.shape[2]
    of_results = gradient[..., :d].contiguous()
    if into_q is None and into_k is None and onto_shared is None:
        _write_sums(weights, of_results, into_v, None)
        return
    of_scores = grouped_products(of_results, v)
    if q.shape[2] > d:
        of_scores[..., 0] += gradient[..., d]
    torch._softmax_backward_data(of_scores, weights, -1, weights.dtype, grad_input=of_scores)
    _write_sums(weights, of_results, into_v, onto_shared)
    _write_sums(of_scores, q[..., :d], into_k, onto_shared)
    if into_q is not None:
        into_q[..., :d] = grouped_products(of_scores, k.transpose(1, 2))
        if q.shape[2] > d:
            into_q[..., d] = of_scores[..., 0]


def _write_sums(factors, rows, into_own, onto_shared):
    """Sums of the rows (n, g, d) times each key's factors (n, g, m), over n; for shared keys over g as well."""
    if into_own is not None:
        torch.bmm(factors[..., : into_own.shape[1]].permute(1, 2, 0), rows.transpose(0, 1), out=into_own)
    if onto_shared is not None:
        # Of all keys: to take the shared ones out before would cost more than what is thrown away.
        onto_shared += summed_products(rows, factors)[:, factors.shape[2] - onto_shared.shape[1] :]
