"""Scaled dot-product attention with one learned null key that every query may attend to.

One function, seven implementations: the kernels of :mod:`.null_key_flash` (``triton``), the library's kernel without
the null key and a merge (``sdpa_merge``, :mod:`.null_key_merge`), the library's kernel on keys that the null key was
put before (``sdpa``), that of xFormers on the same (``xformers``), the formula in plain torch (``reference``), and, on
CPUs where the library's kernel is slow, matrix products over some queries at a time: ``matmul`` in half precision,
``grouped`` in float32 (:mod:`.grouped_attention`).
On CUDA :mod:`.attention_table` says which is tried first.
"""

import functools
import importlib.util

import torch
import torch.nn.functional as F

from . import attention_table, dispatch, grouped_attention, launch, null_key_flash, null_key_merge
from .arguments import autocast_dtype, check_floating_point, check_one_dtype

__all__ = ["null_key_attention"]


def null_key_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    null_key: torch.Tensor,
    null_value: torch.Tensor,
    *,
    heads: int,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """softmax(q [null_key, k]^T / sqrt(d)) [null_value, v], the softmax in float32.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1; with one key/value head shared by all query heads,
    Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need" (2019).

    Args:
        q: Queries, shape (b, n, heads * d).
        k: Keys, shape (b, m, heads * d), or (b, m, d) where all heads share them.
        v: Values, shaped like ``k``.
        null_key: The key that stands before all others in every head, shape (d,).
        null_value: Its value, shape (d,).
        heads: Number of query heads.
        mask: Which keys may be attended to, bool or integers, shape (b, m) or (1, m). The null key always may.
        bias: Added to the scores, broadcast to (b, heads, n, 1 + m); column 0 belongs to the null key.
        implementation: Overrides the policy of :mod:`.dispatch` for this call.

    Returns:
        Attended values, shape (b, n, heads * d), dtype of ``q``; under autocast, unless q, k or v is float64, that of
        autocast, to which all three are cast.

    In float16 the gradients of the scores, softmax times (grad v - grad out), are float16 as well, here as in the
    libraries. Where one is beyond 65504, gradients of q and k are infinite or NaN, which loss scaling notices.
    bfloat16 and float32 have no such limit.

    On CUDA the kernels of this package, by which ``auto`` trains in head widths of 32, 64 and 128, give the same
    gradients in every run. torch's attention, by which it trains in other widths, does so only under
    ``torch.use_deterministic_algorithms(True)``, and so do ``sdpa`` and ``sdpa_merge``.

    Raises:
        TypeError: if a tensor is not of a floating-point type, or the mask is, or q, k and v are of several dtypes that
            autocast does not make one.
        ValueError: if the shapes do not fit together, or an implementation was asked for that cannot do the job.
    """
    tensors = {"q": q, "k": k, "v": v, "null_key": null_key, "null_value": null_value, "bias": bias}
    check_floating_point(tensors)
    tensors["mask"] = mask
    if any(x is not None and x.device != q.device for x in tensors.values()):
        where = ", ".join(f"{name} on {x.device}" for name, x in tensors.items() if x is not None)
        raise ValueError(f"all tensors must be on one device; got {where}")
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    if q.ndim != 3 or q.shape[-1] == 0 or q.shape[-1] % heads:
        raise ValueError(
            f"q must have shape (b, n, heads * d) with heads = {heads} and d at least 1; got {tuple(q.shape)}"
        )
    dim_head = q.shape[-1] // heads
    if k.shape != v.shape or k.ndim != 3 or k.shape[0] != q.shape[0] or k.shape[-1] not in (dim_head, q.shape[-1]):
        raise ValueError(
            f"k and v must have one shape, (b, m, {q.shape[-1]}) or (b, m, {dim_head}) to go with q of shape"
            f" {tuple(q.shape)}; got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    for name, null in (("null_key", null_key), ("null_value", null_value)):
        if null.shape != (dim_head,):
            raise ValueError(f"{name} must have shape ({dim_head},), the width of a head; got {tuple(null.shape)}")
    mask = checked_mask(mask, k.shape[:2])
    if bias is not None:
        _check_bias(bias, (q.shape[0], heads, q.shape[1], 1 + k.shape[1]))
    q, k, v = _of_one_dtype(q, k, v)
    implementation = dispatch.attention_override(implementation)
    candidates = _candidates(q, k, v, null_key, null_value, heads, mask, bias, implementation)
    choice = dispatch.select("null_key_attention", candidates, q.device, implementation)
    return _RUN[choice](q, k, v, null_key, null_value, heads, mask, bias)


def checked_mask(mask: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    """A mask as bool, shape (b, m).

    Raises:
        TypeError: if it is of a floating-point type. Masks to be added to scores are, and 0 means the opposite there.
        ValueError: if it has another shape.
    """
    if mask is None:
        return None
    if mask.is_floating_point():
        raise TypeError(f"mask must be bool, True for what may be attended to; got {mask.dtype}: compare it with 0")
    if mask.ndim != 2 or mask.shape[0] not in (1, shape[0]) or mask.shape[1] != shape[1]:
        raise ValueError(f"mask must have shape {tuple(shape)}, (b, m); got {tuple(mask.shape)}")
    return mask.bool().expand(shape)


def _of_one_dtype(q, k, v):
    dtype = autocast_dtype(q, k, v)
    if dtype is not None:
        return q.to(dtype), k.to(dtype), v.to(dtype)
    check_one_dtype({"q": q, "k": k, "v": v})
    return q, k, v


def _check_bias(bias: torch.Tensor, scores: tuple[int, ...]) -> None:
    if bias.ndim > 4 or any(size not in (1, of) for size, of in zip(bias.shape[::-1], scores[::-1], strict=False)):
        raise ValueError(f"bias must be broadcastable to (b, heads, n, 1 + m), {scores}; got {tuple(bias.shape)}")


def _candidates(q, k, v, null_key, null_value, heads, mask, bias, implementation) -> dict[str, dispatch.Reasons]:
    """Implementations, best first, and why each cannot do the job."""
    tensors = (q, k, v, null_key, null_value)
    dim_head = q.shape[2] // heads
    if q.device.type == "cuda":
        training = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        key = attention_table.key_of(k.shape[2] != q.shape[2], dim_head, q.shape[1], k.shape[1])
        order = attention_table.order(key, q.dtype, masked=mask is not None, training=training)
    else:
        order = ("grouped", "matmul", "sdpa", "sdpa_merge", "triton")
    # What the table leaves out is tried last, and an explicit choice of it is heard.
    order = (*order, *(name for name in attention_table.DEFAULT if name not in order))
    asked_for = dispatch.implementation(implementation)
    if asked_for == "xformers" and "xformers" not in order:
        order = (*order, "xformers")
    if launch.in_forward_mode():
        # The library's kernel has no tangents.
        order = tuple(name for name in order if name == asked_for or name not in ("sdpa", "sdpa_merge"))
    biased = [] if bias is None else ["it takes no bias"]
    reasons = {
        "triton": lambda: dispatch.triton_reasons(*tensors, mask) + null_key_flash.reasons(q, heads),
        "sdpa_merge": lambda: null_key_merge.reasons(q, heads, mask),
        "sdpa": lambda: [],
        "grouped": lambda: _grouped_reasons(*tensors, heads),
        "matmul": lambda: _matmul_reasons(q, k, v, heads),
        "xformers": lambda: xformers_reasons(q, mask),
    }
    # Looked for as they are asked for: most calls end with the first that can do the job.
    return {**{name: lambda name=name: biased + reasons[name]() for name in order}, "reference": []}


def visible_keys(mask: torch.Tensor | None) -> torch.Tensor | None:
    """(b, m) to (b, 1, 1, 1 + m), the null key always visible."""
    return None if mask is None else F.pad(mask.bool(), (1, 0), value=True)[:, None, None, :]


def weights_of_scores(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention weights from scores (b, h, n, 1 + m)."""
    visible = visible_keys(mask)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.finfo(scores.dtype).max)
    # Sums and exponentials are float32 inside, whatever the dtype. Under autocast on CUDA so is the result.
    return scores.softmax(dim=-1).to(scores.dtype)


def _reference(q, k, v, null_key, null_value, heads, mask, bias):
    b, n, width = q.shape
    q = q.reshape(b, n, heads, width // heads) * (width // heads) ** -0.5
    k, v = (_with_null(null, x).expand(-1, heads, -1, -1) for null, x in ((null_key, k), (null_value, v)))
    scores = torch.einsum("b n h d, b h m d -> b h n m", q, k)
    if bias is not None:
        scores = scores + bias
    weights = weights_of_scores(scores, mask).to(v.dtype)
    return torch.einsum("b h n m, b h m d -> b n h d", weights, v).reshape(b, n, width)


# Scores of a piece: they stay in the second cache.
_PIECE = 2**20
# Scores that a training step may keep for its backward pass; the library's kernel keeps none.
_MOST_KEPT_SCORES = 2**24


@launch.untraced
def _has_fast_half_attention() -> bool:
    """Whether the CPU has the matrix units for which the library's kernel in half precision is made."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def _grouped_reasons(q, k, v, null_key, null_value, heads) -> list[str]:
    b, n, width = q.shape
    # Heads that share keys are just more queries of one head.
    queries, groups = (n * heads, b) if k.shape[2] != width else (n, b * heads)
    return grouped_attention.reasons_against(
        queries, groups, 1 + k.shape[1], width // heads, q, k, v, null_key, null_value
    )


def _grouped(q, k, v, null_key, null_value, heads, mask, bias):
    assert bias is None
    b, n, width = q.shape
    d = width // heads
    k, v = _with_null(null_key, k) * d**-0.5, _with_null(null_value, v)
    visible = visible_keys(mask)
    visible = None if visible is None else visible.expand(-1, k.shape[1], -1, -1).flatten(0, 2)
    if k.shape[1] == 1:
        queries = q.reshape(b, n * heads, d).transpose(0, 1)
        out = grouped_attention.grouped_attention(queries, k.flatten(0, 1), v.flatten(0, 1), visible)
        return out.transpose(0, 1).reshape(b, n, width)
    queries = q.reshape(b, n, heads, d).transpose(0, 1).reshape(n, b * heads, d)
    out = grouped_attention.grouped_attention(queries, k.flatten(0, 1), v.flatten(0, 1), visible)
    return out.reshape(n, b, width).transpose(0, 1)


def _matmul_reasons(q, k, v, heads) -> list[str]:
    # Before anything is asked of sizes: as in cpu_products.linear.
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16) or _has_fast_half_attention():
        return ["only for half precision on a CPU without matrix units is it faster than the library's kernel"]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if trains and q.shape[0] * heads * q.shape[1] * k.shape[1] > _MOST_KEPT_SCORES:
        return ["it would keep too many scores for the backward pass"]
    return []


def _matmul(q, k, v, null_key, null_value, heads, mask, bias):
    assert bias is None
    b, n, width = q.shape
    k, v = _with_null(null_key, k), _with_null(null_value, v)
    d = width // heads
    q = q.reshape(b, n, heads, d) * d**-0.5
    # Heads that share keys are just more queries of one head: as in _sdpa.
    q = q.reshape(b, 1, n * heads, d) if k.shape[1] == 1 else q.transpose(1, 2)
    pieces = q.split(max(_PIECE // max(b * k.shape[1] * k.shape[2], 1), 1), dim=2)
    out = torch.cat([weights_of_scores(piece @ k.transpose(-1, -2), mask) @ v for piece in pieces], dim=2)
    return (out if k.shape[1] == 1 else out.transpose(1, 2)).reshape(b, n, width)


def _with_null(null: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(b, m, g * d) to (b, g, 1 + m, d), the null entry first in each of the g heads."""
    b, m, width = x.shape
    groups = width // null.shape[0]
    x = x.reshape(b, m, groups, width // groups)
    return torch.cat((null.to(x.dtype).expand(b, 1, groups, -1), x), dim=1).transpose(1, 2)


def _sdpa(q, k, v, null_key, null_value, heads, mask, bias):
    assert bias is None
    b, n, width = q.shape
    k, v = _with_null(null_key, k), _with_null(null_value, v)
    if k.shape[1] == 1:
        # Heads that share keys are just more queries of one head, and (b, n, h * d) already lies that way in memory.
        q = q.reshape(b, 1, n * heads, width // heads)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible_keys(mask)).reshape(b, n, width)
    q = q.reshape(b, n, heads, width // heads).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_keys(mask))
    return out.transpose(1, 2).reshape(b, n, width)


def _triton(q, k, v, null_key, null_value, heads, mask, bias):
    return null_key_flash.null_key_flash(q, k, v, null_key, null_value, mask, heads)[0]


def _sdpa_merge(q, k, v, null_key, null_value, heads, mask, bias):
    return null_key_merge.null_key_merge(q, k, v, null_key, null_value, heads)[0]


def _xformers(q, k, v, null_key, null_value, heads, mask, bias):
    b, n, width = q.shape
    k, v = (_with_null(null, x).transpose(1, 2) for null, x in ((null_key, k), (null_value, v)))
    # One head for all keys: as in _sdpa.
    q = q.reshape(b, n * heads // k.shape[2], k.shape[2], width // heads)
    return _xformers_attention()(q, k, v).reshape(b, n, width)


XFORMERS_INSTALLED = importlib.util.find_spec("xformers") is not None


@functools.cache
def _xformers_attention():
    """Its function; None where it was built without any for this machine."""
    from xformers.ops import fmha

    usable = any(operator.is_available() for operator in fmha.ALL_FW_OPS)
    return fmha.memory_efficient_attention if usable else None


def xformers_reasons(q: torch.Tensor, mask: torch.Tensor | None = None) -> list[str]:
    """Why xFormers cannot attend from such queries, under such a mask."""
    found = []
    on_cuda = q.device.type == "cuda"
    if not on_cuda:
        found.append(f"the tensors are on {q.device}, not on a CUDA device")
    if not XFORMERS_INSTALLED:
        found.append("xformers is not installed")
    elif on_cuda and _xformers_attention() is None:
        found.append("xformers was built without an attention operator for this machine")
    if mask is not None:
        found.append("it is used without a mask")
    if q.dtype == torch.float64:
        found.append("it does not take float64")
    return found


_RUN = {
    "grouped": _grouped,
    "matmul": _matmul,
    "triton": _triton,
    "sdpa_merge": _sdpa_merge,
    "sdpa": _sdpa,
    "xformers": _xformers,
    "reference": _reference,
}
