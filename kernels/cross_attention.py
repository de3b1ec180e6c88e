"""Cross attention with a null key, from normalised tokens to what is added to them: its projections are part of it."""

import torch
import torch.nn.functional as F

from . import dispatch, grouped_attention, launch
from .arguments import check_floating_point, check_one_device, check_one_dtype
from .attention import checked_mask, null_key_attention, visible_keys, weights_of_scores
from .cpu_products import linear, onednn_multiplies
from .grouped_attention import with_shared

__all__ = ["keys_are_worth_keeping", "keys_are_worth_sharing", "null_key_cross_attention"]


def null_key_cross_attention(
    x: torch.Tensor,
    context: torch.Tensor,
    to_q: torch.Tensor,
    to_kv: torch.Tensor,
    to_out: torch.Tensor,
    null_key: torch.Tensor,
    null_value: torch.Tensor,
    *,
    heads: int,
    mask: torch.Tensor | None = None,
    shared_context: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """:func:`.null_key_attention` between projections of tokens and of context tokens, followed by one of its result.

    On a CPU, where it takes fewer multiplications, the projections of queries and keys are multiplied with each other
    first, and those of values and results: (x Q) (c K)^T = (x (Q K^T)) c^T and (w (c V)) O = (w c) (V O). Then the
    context tokens themselves are keys and values.

    Args:
        x: Tokens, shape (b, n, dim), floating point. Context and weights have its dtype, but under autocast, which
            casts all of them unless one is float64.
        context: Context tokens, shape (b, m, c).
        to_q: Weight of the projection to queries, shape (heads * d, dim).
        to_kv: Weight of the projection to keys (first half) and values, shape (2 * heads * d, c).
        to_out: Weight of the projection of the attended values, shape (dim_out, heads * d).
        null_key: The key that stands before all others in every head, shape (d,).
        null_value: Its value, shape (d,).
        heads: Number of heads.
        mask: Which context tokens may be attended to, bool or integers, shape (b, m) or (1, m); of all of them, with
            the shared ones (b, m + s) or (1, m + s).
        shared_context: More context tokens, after the others, for all images the same: shape (s, c). Less work is done
            for them than if they came with each image.
        implementation: Overrides the policy of :mod:`.dispatch` for this call.

    Returns:
        Tokens, shape (b, n, dim_out).

    Raises:
        TypeError: if a tensor is not of a floating-point type or the mask is, or tokens, context and weights are of
            several dtypes that autocast does not make one.
        ValueError: if shapes or devices do not fit together, or an implementation was asked for that cannot do the job.
    """
    _check(x, context, to_q, to_kv, to_out, null_key, null_value, heads, mask, shared_context)
    shared = 0 if shared_context is None else shared_context.shape[0]
    mask = checked_mask(mask, torch.Size((context.shape[0], context.shape[1] + shared)))
    implementation = dispatch.attention_override(implementation)
    if (
        dispatch.implementation(implementation) == "auto"
        and x.device.type == "cpu"
        # Sparse weights are multiplied with tokens alone.
        and all(weight.layout == torch.strided for weight in (to_q, to_kv, to_out))
        and _fewer_with_products(x, context, to_q, heads, shared)
    ):
        return _with_products(x, context, to_q, to_kv, to_out, null_key, null_value, heads, mask, shared_context)
    q, keys_values = linear(x, to_q), linear(context, to_kv)
    if shared_context is not None:
        keys_values = with_shared(keys_values, linear(shared_context, to_kv))
    k, v = keys_values.chunk(2, dim=-1)
    out = null_key_attention(q, k, v, null_key, null_value, heads=heads, mask=mask, implementation=implementation)
    return linear(out, to_out)


def _check(x, context, to_q, to_kv, to_out, null_key, null_value, heads, mask, shared) -> None:
    products = {"x": x, "context": context, "to_q": to_q, "to_kv": to_kv, "to_out": to_out}
    if shared is not None:
        products["shared_context"] = shared
    tensors = {**products, "null_key": null_key, "null_value": null_value}
    check_floating_point(tensors)
    check_one_device({**tensors, "mask": mask})
    check_one_dtype(products)
    if x.ndim != 3:
        raise ValueError(f"x must have shape (b, n, dim); got {tuple(x.shape)}")
    b, _, dim = x.shape
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    if to_q.ndim != 2 or to_q.shape[1] != dim or to_q.shape[0] == 0 or to_q.shape[0] % heads:
        raise ValueError(
            f"to_q must have shape (heads * d, {dim}) with heads = {heads}, to go with x of shape {tuple(x.shape)};"
            f" got {tuple(to_q.shape)}"
        )
    width = to_q.shape[0]
    if to_kv.ndim != 2 or to_kv.shape[0] != 2 * width:
        raise ValueError(
            f"to_kv must have shape ({2 * width}, c), twice the rows of to_q for keys and values; got"
            f" {tuple(to_kv.shape)}"
        )
    if context.ndim != 3 or context.shape[0] != b or context.shape[2] != to_kv.shape[1]:
        raise ValueError(
            f"context must have shape ({b}, m, {to_kv.shape[1]}), as many as x and as wide as to_kv's rows; got"
            f" {tuple(context.shape)}"
        )
    if shared is not None and (shared.ndim != 2 or shared.shape[1] != to_kv.shape[1]):
        raise ValueError(
            f"shared_context must have shape (s, {to_kv.shape[1]}), as wide as to_kv's rows; got {tuple(shared.shape)}"
        )
    if to_out.ndim != 2 or to_out.shape[1] != width:
        raise ValueError(f"to_out must have shape (dim_out, {width}), as wide as all heads; got {tuple(to_out.shape)}")
    d = width // heads
    for name, null in (("null_key", null_key), ("null_value", null_value)):
        if null.shape != (d,):
            raise ValueError(f"{name} must have shape ({d},), the width of a head; got {tuple(null.shape)}")


def keys_are_worth_keeping(context: torch.Tensor, dim_head: int) -> bool:
    """Whether many calls of :func:`null_key_cross_attention` with one context go faster with its keys and values kept.

    They do but on a CPU with a context narrower than a head: without them the scores take fewer multiplications.
    """
    chosen = dispatch.implementation(dispatch.attention_override(None))
    return context.device.type != "cpu" or chosen != "auto" or context.shape[2] >= dim_head


def keys_are_worth_sharing(context: torch.Tensor) -> bool:
    """Whether :func:`null_key_cross_attention` does less for context tokens that are told to be shared.

    It does in training, where :mod:`.grouped_attention` sums their gradients over all images at once.
    """
    return torch.is_grad_enabled() and onednn_multiplies(context)


def _fewer_with_products(
    x: torch.Tensor, context: torch.Tensor, to_q: torch.Tensor, heads: int, shared: int = 0
) -> bool:
    (b, n, dim), (_, m, c), width = x.shape, context.shape, to_q.shape[0]
    m = m + shared
    projected = b * (n * dim * width + m * c * width + n * m * width)
    with_products = dim * width * c + b * (n * dim * heads * c + n * m * heads * c)
    fewer = with_products < projected
    if not torch.compiler.is_compiling():
        return fewer
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    # A graph for any batch must not become one for those of the same answer.
    return statically_known_true(fewer)


def _with_products(x, context, to_q, to_kv, to_out, null_key, null_value, heads, mask, shared=None):
    (b, n, dim), c = x.shape, context.shape[-1]
    to_key, to_value = to_kv.reshape(2, heads, -1, c)
    # One more channel, that of the null entry alone: it carries its score on the way in and its weight on the way out.
    to_key, to_value = (
        torch.cat((to, null.to(to.dtype).expand(heads, -1)[..., None]), dim=-1)
        for to, null in ((to_key, null_key), (to_value, null_value))
    )
    to_query = to_q.reshape(heads, -1, dim) * null_key.shape[0] ** -0.5
    to_result = to_out.reshape(-1, heads, to_value.shape[1]).transpose(0, 1)
    query_key = (to_key.transpose(1, 2) @ to_query).reshape(heads * (c + 1), dim)
    value_result = (to_result @ to_value).transpose(0, 1).reshape(-1, heads * (c + 1))
    # The heads, which share their keys, are just more queries of one head.
    q = linear(x, query_key).reshape(b, n * heads, c + 1)
    visible, context = visible_keys(mask), context.to(q.dtype)
    keys, tensors = 1 + context.shape[1], [q, context]
    if shared is not None:
        shared = shared.to(q.dtype)
        keys, tensors = keys + shared.shape[0], [*tensors, shared]
    if not grouped_attention.reasons_against(n * heads, b, keys, c, *tensors):
        context = F.pad(context, (0, 0, 1, 0))
        visible = None if visible is None else visible[:, 0, 0]
        attended = grouped_attention.grouped_attention(q.transpose(0, 1), context, context, visible, shared=shared)
        return linear(attended.transpose(0, 1).reshape(b, n, heads * (c + 1)), value_result)
    if shared is not None:
        context = with_shared(context, shared)
    context = F.pad(context, (0, 1, 1, 0))
    context[:, 0, c] = 1.0
    if q.dtype == torch.float32 and not launch.in_forward_mode():
        one_head = q[:, None], context[:, None], context[:, None]
        attended = F.scaled_dot_product_attention(*one_head, attn_mask=visible, scale=1.0)
    else:
        weights = weights_of_scores((q @ context.transpose(1, 2))[:, None], mask)
        attended = weights[:, 0] @ context
    return linear(attended.reshape(b, n, heads * (c + 1)), value_result)
