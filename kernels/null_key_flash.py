"""Attention with a null key as Triton kernels, forward and backward, without any tensor of size queries x keys.

Forward: the online softmax of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), over blocks
of keys, as in Dao, "FlashAttention-2" (2023), algorithm 1. The null key is its initial state (maximum q k0, sum 1,
accumulator v0), so that nothing is concatenated and the number of keys stays what it is.
Backward: algorithm 2 of the same paper in two kernels, one over blocks of queries and one over blocks of keys. With
p = exp(s - lse) and delta = sum(grad * out): ds = p (grad v - delta); dq, dk, dv follow. The null key's
share is one more column of p, whose sums over queries go through one row of partial sums per program. For the products
p and ds are rounded to the dtype of the inputs, but for the null key's column, which stays in float32. A ds that
float16 cannot hold, beyond 65504, makes dq and dk infinite or NaN.

Queries and output stay in (b, n, heads * d), keys and values in (b, m, heads * d) or, one head for all, (b, m, d). With
one head for all keys the heads of a query are nothing but more queries: row n * heads + head of one head.

Floor: matrix products of 4 b heads n m d operations forward and 8 backward (the two kernels here take 14, since both
make s and grad v, which nobody keeps). Memory: q and out once; keys and values once per block of queries, from L2.
"""

import torch

from . import launch
from .launch import ceil_div, tl, triton
from .null_key_tiles import Tile, key_tile, query_part, query_tile, split_queries

__all__ = ["null_key_flash", "reasons"]

# Head widths that the kernels are laid out for.
WIDTHS = (32, 64, 128)
# Of a block of rows, at most 128, the last must be within reach of a 32-bit offset.
LARGEST_ROW_STRIDE = 2**23
LOG2_E = 1.4426950408889634
# Three TF32 products in place of one float32 product: on tensor cores, and as exact as float32 to about one digit in
# seven. A single one keeps three digits, where plain torch by default computes in full float32.
PRECISION = "tf32x3"


@triton.jit
def _load_rows(
    pointer, row_stride, start, end,
    ROWS: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr, AGAIN: tl.constexpr = False,
):  # fmt: skip
    """Rows start to start + ROWS of a matrix of width D, zeros from row ``end`` on; WHOLE promises that none is.

    AGAIN: read where it stands, not once before a loop.
    """
    rows = tl.arange(0, ROWS)
    # The first row's offset may need 64 bits, those within the block do not.
    at = pointer + start * row_stride.to(tl.int64) + (rows[:, None] * row_stride + tl.arange(0, D)[None, :])
    if WHOLE:
        return tl.load(at, volatile=AGAIN)
    return tl.load(at, mask=(start + rows < end)[:, None], other=0.0, volatile=AGAIN)


@triton.jit
def _store_rows(pointer, row_stride, start, end, values, ROWS: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    rows = tl.arange(0, ROWS)
    at = pointer + start * row_stride.to(tl.int64) + (rows[:, None] * row_stride + tl.arange(0, D)[None, :])
    if WHOLE:
        tl.store(at, values.to(pointer.dtype.element_ty))
    else:
        tl.store(at, values.to(pointer.dtype.element_ty), mask=(start + rows < end)[:, None])


@triton.jit
def _hide(scores, mask, start, m, KEYS: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr):
    """Scores of keys that do not exist or may not be seen become -inf."""
    keys = start + tl.arange(0, KEYS)
    if MASKED:
        seen = tl.load(mask + keys, mask=keys < m, other=0)
        scores = tl.where((seen != 0)[None, :], scores, float("-inf"))
    elif not WHOLE:
        scores = tl.where((keys < m)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _products_by_parts(
    a, a_row, a_start, a_end, b, b_row, b_start, b_end,
    A: tl.constexpr, A_WHOLE: tl.constexpr, B: tl.constexpr, B_WHOLE: tl.constexpr,
    D: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of all rows of a and all rows of b, as sums over parts of their width D.

    As an operand of a float32 product, which is three of TF32, wide rows of a would fill the registers for as long as a
    loop over b lasts.
    """
    total = tl.zeros((A, B), tl.float32)
    for part in tl.static_range(0, D, PART):
        some = _load_rows(a + part, a_row, a_start, a_end, A, PART, A_WHOLE, AGAIN=True)
        others = _load_rows(b + part, b_row, b_start, b_end, B, PART, B_WHOLE)
        total = tl.dot(some, tl.trans(others), total, input_precision=PRECISION)
    return total


@triton.jit
def _attend(
    queries, q, q_row, first, n, highest, total, acc, k, v, mask, k_row, v_row, start, m,
    SCALE: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, QUERIES: tl.constexpr, WHOLE_QUERIES: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys joins the online softmax, whose scores are in base 2: times SCALE, log2(e) / sqrt(D)."""
    if PART == D:
        keys = _load_rows(k, k_row, start, m, KEYS, D, WHOLE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    else:
        scores = _products_by_parts(
            q, q_row, first, n, k, k_row, start, m, QUERIES, WHOLE_QUERIES, KEYS, WHOLE, D, PART, PRECISION
        )
    scores = _hide(scores, mask, start, m, KEYS, MASKED, WHOLE)
    now = tl.maximum(highest, tl.max(scores, 1) * SCALE)
    p = tl.exp2(scores * SCALE - now[:, None])
    fading = tl.exp2(highest - now)
    values = _load_rows(v, v_row, start, m, KEYS, D, WHOLE)
    acc = tl.dot(p.to(values.dtype), values, acc * fading[:, None], input_precision=PRECISION)
    return now, total * fading + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["m", "blocks"])
def _forward(
    q, k, v, null_key, null_value, mask, out, lse,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, out_row, heads, n, m, blocks,
    SCALE: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    start = program % blocks * QUERIES
    head = program // blocks % heads
    batch = (program // blocks // heads).to(tl.int64)
    q += batch * q_batch + head * D
    k += batch * k_batch + head * D
    v += batch * v_batch + head * D
    mask += batch * m

    queries = _load_rows(q, q_row, start, n, QUERIES, D, WHOLE)
    key_0 = tl.load(null_key + tl.arange(0, D)).to(tl.float32)
    value_0 = tl.load(null_value + tl.arange(0, D)).to(tl.float32)
    highest = tl.sum(queries.to(tl.float32) * key_0[None, :], 1) * SCALE
    # 1, but NaN where softmax gives NaN, and 0 where the null key's score is -inf.
    total = tl.where(highest == float("-inf"), 0.0, tl.exp2(highest - highest))
    acc = total[:, None] * value_0[None, :]

    whole_keys = m // KEYS * KEYS
    for key in range(0, whole_keys, KEYS):
        highest, total, acc = _attend(
            queries, q, q_row, start, n, highest, total, acc, k, v, mask, k_row, v_row, key, m,
            SCALE, D, PART, QUERIES, WHOLE, KEYS, MASKED, True, PRECISION,
        )  # fmt: skip
    if whole_keys < m:
        highest, total, acc = _attend(
            queries, q, q_row, start, n, highest, total, acc, k, v, mask, k_row, v_row, whole_keys, m,
            SCALE, D, PART, QUERIES, WHOLE, KEYS, MASKED, False, PRECISION,
        )  # fmt: skip

    out += batch * n * out_row + head * D
    _store_rows(out, out_row, start, n, acc / total[:, None], QUERIES, D, WHOLE)
    rows = start + tl.arange(0, QUERIES)
    tl.store(lse + (batch * heads + head) * n + rows, highest + tl.log2(total), mask=rows < n)


@triton.jit
def _query_gradient(
    dq, queries, q, q_row, gradient, grad, grad_row, first, n, highest, delta, k, v, mask, k_row, v_row, start, m,
    SCALE: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, QUERIES: tl.constexpr, WHOLE_QUERIES: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if PART == D:
        keys = _load_rows(k, k_row, start, m, KEYS, D, WHOLE)
        values = _load_rows(v, v_row, start, m, KEYS, D, WHOLE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    else:
        scores = _products_by_parts(
            q, q_row, first, n, k, k_row, start, m, QUERIES, WHOLE_QUERIES, KEYS, WHOLE, D, PART, PRECISION
        )
    scores = _hide(scores, mask, start, m, KEYS, MASKED, WHOLE)
    p = tl.exp2(scores * SCALE - highest[:, None])
    if PART == D:
        dp = tl.dot(gradient, tl.trans(values), input_precision=PRECISION)
    else:
        dp = _products_by_parts(
            grad, grad_row, first, n, v, v_row, start, m, QUERIES, WHOLE_QUERIES, KEYS, WHOLE, D, PART, PRECISION
        )
        keys = _load_rows(k, k_row, start, m, KEYS, D, WHOLE)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["m", "blocks"])
def _backward_queries(
    grad, q, k, v, null_key, null_value, mask, out, lse, delta, dq, partials,
    grad_batch, grad_row, q_batch, q_row, k_batch, k_row, v_batch, v_row, out_row, heads, n, m, blocks,
    SCALE: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, ROOT: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_NULL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    start = program % blocks * QUERIES
    head = program // blocks % heads
    batch = (program // blocks // heads).to(tl.int64)
    grad += batch * grad_batch + head * D
    q += batch * q_batch + head * D
    k += batch * k_batch + head * D
    v += batch * v_batch + head * D
    mask += batch * m
    statistics = (batch * heads + head) * n
    rows = start + tl.arange(0, QUERIES)

    gradient = _load_rows(grad, grad_row, start, n, QUERIES, D, WHOLE)
    attended = _load_rows(out + batch * n * out_row + head * D, out_row, start, n, QUERIES, D, WHOLE)
    products = tl.sum(gradient.to(tl.float32) * attended.to(tl.float32), 1)
    tl.store(delta + statistics + rows, products, mask=rows < n)

    if NEED_Q or NEED_NULL:
        queries = _load_rows(q, q_row, start, n, QUERIES, D, WHOLE)
        highest = tl.load(lse + statistics + rows, mask=rows < n, other=0.0)
        key_0 = tl.load(null_key + tl.arange(0, D)).to(tl.float32)
        value_0 = tl.load(null_value + tl.arange(0, D)).to(tl.float32)
        p_0 = tl.exp2(tl.sum(queries.to(tl.float32) * key_0[None, :], 1) * SCALE - highest)
        ds_0 = p_0 * (tl.sum(gradient.to(tl.float32) * value_0[None, :], 1) - products)
        if NEED_NULL and not WHOLE:
            # Queries that do not exist are zeros, which times an infinite key are NaN.
            p_0, ds_0 = tl.where(rows < n, p_0, 0.0), tl.where(rows < n, ds_0, 0.0)
        if NEED_NULL:
            at = partials + program.to(tl.int64) * D + tl.arange(0, D)
            tl.store(at, tl.sum(queries.to(tl.float32) * ds_0[:, None], 0) * ROOT)
            tl.store(at + tl.num_programs(0).to(tl.int64) * D, tl.sum(gradient.to(tl.float32) * p_0[:, None], 0))
        if NEED_Q:
            acc = ds_0[:, None] * key_0[None, :]
            whole_keys = m // KEYS * KEYS
            for key in range(0, whole_keys, KEYS):
                acc = _query_gradient(
                    acc, queries, q, q_row, gradient, grad, grad_row, start, n, highest, products,
                    k, v, mask, k_row, v_row, key, m,
                    SCALE, D, PART, QUERIES, WHOLE, KEYS, MASKED, True, PRECISION,
                )  # fmt: skip
            if whole_keys < m:
                acc = _query_gradient(
                    acc, queries, q, q_row, gradient, grad, grad_row, start, n, highest, products,
                    k, v, mask, k_row, v_row, whole_keys, m,
                    SCALE, D, PART, QUERIES, WHOLE, KEYS, MASKED, False, PRECISION,
                )  # fmt: skip
            dq += batch * n * out_row + head * D
            _store_rows(dq, out_row, start, n, acc * ROOT, QUERIES, D, WHOLE)


@triton.jit(do_not_specialize=["m", "blocks", "batches"])
def _backward_keys(
    grad, q, k, v, mask, lse, delta, dk, dv,
    grad_batch, grad_row, q_batch, q_row, k_batch, k_row, v_batch, v_row, out_row, heads, n, m, blocks, batches, share,
    SCALE: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    start = program % blocks * KEYS
    head = program // blocks % heads
    # Part after part, each with a share of the queries and a slot of its own: (parts, b, m, heads * D).
    slot = (program // blocks // heads).to(tl.int64)
    batch = slot % batches
    part = slot // batches
    q += batch * q_batch + head * D
    grad += batch * grad_batch + head * D
    statistics = (batch * heads + head) * n

    keys = _load_rows(k + batch * k_batch + head * D, k_row, start, m, KEYS, D, False)
    values = _load_rows(v + batch * v_batch + head * D, v_row, start, m, KEYS, D, False)
    key_gradient = tl.zeros((KEYS, D), tl.float32)
    value_gradient = tl.zeros((KEYS, D), tl.float32)
    first = (part * share).to(tl.int32)
    for query in range(first, tl.minimum(first + share, n), QUERIES):
        rows = query + tl.arange(0, QUERIES)
        queries = _load_rows(q, q_row, query, n, QUERIES, D, WHOLE)
        gradient = _load_rows(grad, grad_row, query, n, QUERIES, D, WHOLE)
        highest = tl.load(lse + statistics + rows, mask=rows < n, other=0.0)
        products = tl.load(delta + statistics + rows, mask=rows < n, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        p = tl.exp2(scores * SCALE - highest[None, :])
        dp = tl.dot(values, tl.trans(gradient), input_precision=PRECISION)
        ds = p * (dp - products[None, :])
        if not WHOLE:
            # As for the null key: zeros times an infinite key are NaN.
            exists = (rows < n)[None, :]
            p, ds = tl.where(exists, p, 0.0), tl.where(exists, ds, 0.0)
        value_gradient = tl.dot(p.to(gradient.dtype), gradient, value_gradient, input_precision=PRECISION)
        key_gradient = tl.dot(ds.to(queries.dtype), queries, key_gradient, input_precision=PRECISION)

    if MASKED:
        rows = start + tl.arange(0, KEYS)
        seen = (tl.load(mask + batch * m + rows, mask=rows < m, other=0) != 0)[:, None]
        key_gradient = tl.where(seen, key_gradient, 0.0)
        value_gradient = tl.where(seen, value_gradient, 0.0)
    at = slot * m * out_row + head * D
    _store_rows(dk + at, out_row, start, m, key_gradient * ROOT, KEYS, D, False)
    _store_rows(dv + at, out_row, start, m, value_gradient, KEYS, D, False)


def _rows(x: torch.Tensor, heads: int) -> tuple[torch.Tensor, int, int]:
    """A tensor (b, n, heads * d) as rows of one head or of all heads that the kernels can read, copied if it must be.

    Returns:
        The tensor, the stride from one batch entry to the next and from one row to the next, where a row is a query
        or, if ``heads`` is more than 1, one head of a query.
    """
    b, n, width = x.shape
    # A dimension of size 1 may have any stride. A row stride of 1, of overlapping rows, would reach the kernels as a
    # constant and not as a 32-bit number; one so large that offsets within a block need more is not for them either.
    unfit = x.stride(1) == 1 or x.stride(1) > LARGEST_ROW_STRIDE or (heads > 1 and x.stride(1) != width)
    if x.stride(2) != 1 or (n > 1 and unfit):
        x = x.contiguous()
    row = width // heads if heads > 1 else x.stride(1) if n > 1 else 0
    return x, x.stride(0) if b > 1 else 0, row


def _geometry(q: torch.Tensor, k: torch.Tensor, heads: int) -> tuple[int, int, int, int]:
    """Heads, queries and head width as the kernels see them, and how many heads are rows of their own."""
    (_, n, width), d = q.shape, q.shape[2] // heads
    if k.shape[2] == width:
        return heads, n, d, 1
    return 1, n * heads, d, heads


def _mask_bytes(mask: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """What stands for the mask in a launch: ``other``, never read, where there is none."""
    return other if mask is None else mask.contiguous().view(torch.uint8)


def _constants(q: torch.Tensor, d: int, n: int, tile: Tile, mask: torch.Tensor | None) -> dict:
    return {
        "SCALE": d**-0.5 * LOG2_E,
        "D": d,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "MASKED": mask is not None,
        "WHOLE": n % tile.queries == 0,
        "PRECISION": PRECISION,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _forward_fake(q, k, v, null_key, null_value, mask, heads):
    seen_heads, n, _, _ = _geometry(q, k, heads)
    return q.new_empty(q.shape), q.new_empty((q.shape[0], seen_heads, n), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    *tensors, mask, out, lse = ctx.saved_tensors
    q, k, v, null_key, null_value = ctx.needs_input_grad[:5]
    gradients = null_key_flash_backward(grad, *tensors, mask, out, lse, ctx.heads, q, k or v, null_key or null_value)
    wanted = (q, k, v, null_key, null_value)
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), None, None


@launch.define(
    "null_key_flash(Tensor q, Tensor k, Tensor v, Tensor null_key, Tensor null_value, Tensor? mask, int heads)"
    " -> (Tensor, Tensor)",
    _forward_fake,
    backward=_backward,
    setup_context=_setup_context,
)
def null_key_flash(q, k, v, null_key, null_value, mask, heads):
    """Output (b, n, heads * d) and, for the backward, log2 of the sum of the softmax's exponentials."""
    out, lse = _forward_fake(q, k, v, null_key, null_value, mask, heads)
    b, m = k.shape[:2]
    heads, n, d, merged = _geometry(q, k, heads)
    q, q_batch, q_row = _rows(q, merged)
    k, k_batch, k_row = _rows(k, 1)
    v, v_batch, v_row = _rows(v, 1)
    tile = query_tile(q, d, heads, n, m, backward=False)
    blocks = ceil_div(n, tile.queries)
    launch.run(
        _forward, (b * heads * blocks,),
        q, k, v, null_key.contiguous(), null_value.contiguous(), _mask_bytes(mask, q), out, lse,
        q_batch, q_row, k_batch, k_row, v_batch, v_row, heads * d, heads, n, m, blocks,
        **_constants(q, d, n, tile, mask), PART=query_part(q, d),
    )  # fmt: skip
    return out, lse


def _backward_fake(grad, q, k, v, null_key, null_value, mask, out, lse, heads, need_q, need_kv, need_null):
    needs = ((q, need_q), (k, need_kv), (v, need_kv), (null_key, need_null), (null_value, need_null))
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in needs)


@launch.define(
    "null_key_flash_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor null_key, Tensor null_value,"
    " Tensor? mask, Tensor out, Tensor lse, int heads, bool need_q, bool need_kv, bool need_null)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def null_key_flash_backward(grad, q, k, v, null_key, null_value, mask, out, lse, heads, need_q, need_kv, need_null):
    """Gradients of q, k, v, null key and null value; tensors without elements for those not needed."""
    b, m = k.shape[:2]
    heads, n, d, merged = _geometry(q, k, heads)
    dq = q.new_empty(q.shape if need_q else 0)
    dk, dv = k.new_empty(0), v.new_empty(0)
    d_null_key, d_null_value = null_key.new_empty(0), null_value.new_empty(0)
    grad, grad_batch, grad_row = _rows(grad, merged)
    q, q_batch, q_row = _rows(q, merged)
    k, k_batch, k_row = _rows(k, 1)
    v, v_batch, v_row = _rows(v, 1)
    strides = grad_batch, grad_row, q_batch, q_row, k_batch, k_row, v_batch, v_row, heads * d
    seen = _mask_bytes(mask, q)
    null_key, null_value = null_key.contiguous(), null_value.contiguous()
    delta = torch.empty_like(lse)

    tile = query_tile(q, d, heads, n, m, backward=True)
    blocks = ceil_div(n, tile.queries)
    programs = b * heads * blocks
    partials = lse.new_empty((2, programs if need_null else 0, d))
    launch.run(
        _backward_queries, (programs,),
        grad, q, k, v, null_key, null_value, seen, out, lse, delta, dq, partials, *strides, heads, n, m, blocks,
        **_constants(q, d, n, tile, mask), PART=query_part(q, d), ROOT=d**-0.5, NEED_Q=need_q, NEED_NULL=need_null,
    )  # fmt: skip
    if need_null:
        d_null_key, d_null_value = (
            partial.sum(0).to(null.dtype) for partial, null in zip(partials, (null_key, null_value), strict=True)
        )

    if need_kv:
        tile = key_tile(q, d, m)
        blocks = ceil_div(m, tile.keys)
        programs = b * heads * blocks
        parts, share = split_queries(q, programs, n, tile.queries)
        dk, dv = (x.new_empty((parts, *x.shape), dtype=x.dtype if parts == 1 else torch.float32) for x in (k, v))
        launch.run(
            _backward_keys, (parts * programs,),
            grad, q, k, v, seen, lse, delta, dk, dv, *strides, heads, n, m, blocks, b, share,
            **_constants(q, d, n, tile, mask), ROOT=d**-0.5,
        )  # fmt: skip
        dk, dv = (dx[0] if parts == 1 else dx.sum(0).to(x.dtype) for dx, x in ((dk, k), (dv, v)))
    return dq, dk, dv, d_null_key, d_null_value


def reasons(q: torch.Tensor, heads: int) -> list[str]:
    """Why the kernels cannot do this attention, besides what :func:`.dispatch.triton_reasons` says."""
    found = []
    d = q.shape[2] // heads
    if d not in WIDTHS:
        found.append(f"it takes head widths {', '.join(map(str, WIDTHS))}, not {d}")
    return found
