"""Attention with a null key from a library's kernel that knows nothing of it, and one small kernel that merges it in.

The library gives the attended values and lse = log sum exp(s) over all other keys. With s_0 = q k_0 / sqrt(d):
lse' = log(exp(lse) + exp(s_0)), out' = out exp(lse - lse') + v_0 exp(s_0 - lse'), as blocks of keys are combined in Dao
et al., "FlashAttention" (2022), section 3.1.
The library's backward makes p = exp(s - lse) and delta = sum(grad * out) itself. Given out' and lse' these are what the
whole softmax has, so that its gradients of k and v are right as they are, and that of q lacks the null key's term:
p_0 = exp(s_0 - lse'), ds_0 = p_0 (grad v_0 - delta), dq += ds_0 k_0 / sqrt(d).

Floor beside the library's kernels: q read, out read and written; backward q, grad and out read, dq read and written.

The library is torch: its flash attention on CUDA (half precision only; its backward adds up dq in any order unless
``torch.use_deterministic_algorithms(True)`` is set, so that ``auto`` does not train by it) and that for CPUs.
"""

import torch

from . import launch
from .launch import ceil_div, tl, triton

__all__ = ["dtype_reasons", "null_key_merge", "reasons"]

WIDTHS = (32, 64, 128)
ROWS = 64


def _merge_reference(q, out, lse, null_key, null_value):
    """All (b, heads, n, d) and (b, heads, n), in plain torch."""
    null_scores = torch.einsum("b h n d, d -> b h n", q.float(), null_key.float()) * q.shape[-1] ** -0.5
    # As the kernel has it, and unlike logaddexp: NaN, as softmax is, where the null key's score is infinite.
    highest = torch.maximum(lse, null_scores)
    merged = highest + torch.log(torch.exp(lse - highest) + torch.exp(null_scores - highest))
    kept, null_weights = (torch.exp(x - merged)[..., None] for x in (lse, null_scores))
    return (out * kept + null_weights * null_value.float()).to(out.dtype), merged


def _null_gradients_reference(grad, q, out, lse, null_key, null_value):
    """The null key's term of dq, and the gradients of null key and null value, in float32."""
    root = q.shape[-1] ** -0.5
    q, grad = q.float(), grad.float()
    null_weights = torch.exp(torch.einsum("b h n d, d -> b h n", q, null_key.float()) * root - lse)
    ds = null_weights * torch.einsum("b h n d, b h n d -> b h n", grad, null_value.float() - out.float()) * root
    d_null_key = torch.einsum("b h n, b h n d -> d", ds, q)
    d_null_value = torch.einsum("b h n, b h n d -> d", null_weights, grad)
    return ds[..., None] * null_key.float(), d_null_key, d_null_value


@triton.jit
def _block(heads, n, blocks, ROWS: tl.constexpr):
    """A program's batch entry, head, rows, which of them exist, and where their statistics stand."""
    program = tl.program_id(0)
    rows = program % blocks * ROWS + tl.arange(0, ROWS)
    head = program // blocks % heads
    batch = (program // blocks // heads).to(tl.int64)
    return batch, head, rows.to(tl.int64), rows < n, (batch * heads + head) * n + rows


@triton.jit(do_not_specialize=["blocks"])
def _merge(
    q, null_key, null_value, out, lse, q_batch, q_head, q_row, heads, n, blocks,
    ROOT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch, head, rows, exist, statistics = _block(heads, n, blocks, ROWS)
    columns = tl.arange(0, D)
    at = q + batch * q_batch + head * q_head + (rows[:, None] * q_row + columns[None, :])
    queries = tl.load(at, mask=exist[:, None], other=0.0).to(tl.float32)
    at = out + (batch * n + rows[:, None]) * heads * D + (head * D + columns[None, :])
    attended = tl.load(at, mask=exist[:, None], other=0.0).to(tl.float32)
    before = tl.load(lse + statistics, mask=exist, other=0.0)
    key_0 = tl.load(null_key + columns).to(tl.float32)
    value_0 = tl.load(null_value + columns).to(tl.float32)

    score = tl.sum(queries * key_0[None, :], 1) * ROOT
    highest = tl.maximum(before, score)
    merged = highest + tl.log(tl.exp(before - highest) + tl.exp(score - highest))
    attended = attended * tl.exp(before - merged)[:, None] + value_0[None, :] * tl.exp(score - merged)[:, None]
    tl.store(at, attended.to(out.dtype.element_ty), mask=exist[:, None])
    tl.store(lse + statistics, merged, mask=exist)


@triton.jit(do_not_specialize=["blocks"])
def _null_gradients(
    grad, q, null_key, null_value, out, lse, dq, partials,
    grad_batch, grad_head, grad_row, q_batch, q_head, q_row, heads, n, blocks,
    ROOT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch, head, rows, exist, statistics = _block(heads, n, blocks, ROWS)
    columns = tl.arange(0, D)
    at = grad + batch * grad_batch + head * grad_head + (rows[:, None] * grad_row + columns[None, :])
    gradient = tl.load(at, mask=exist[:, None], other=0.0).to(tl.float32)
    at = q + batch * q_batch + head * q_head + (rows[:, None] * q_row + columns[None, :])
    queries = tl.load(at, mask=exist[:, None], other=0.0).to(tl.float32)
    at = (batch * n + rows[:, None]) * heads * D + (head * D + columns[None, :])
    attended = tl.load(out + at, mask=exist[:, None], other=0.0).to(tl.float32)
    merged = tl.load(lse + statistics, mask=exist, other=0.0)
    key_0 = tl.load(null_key + columns).to(tl.float32)
    value_0 = tl.load(null_value + columns).to(tl.float32)

    weight = tl.exp(tl.sum(queries * key_0[None, :], 1) * ROOT - merged)
    ds = weight * tl.sum(gradient * (value_0[None, :] - attended), 1) * ROOT
    from_library = tl.load(dq + at, mask=exist[:, None], other=0.0).to(tl.float32)
    tl.store(dq + at, (from_library + ds[:, None] * key_0[None, :]).to(dq.dtype.element_ty), mask=exist[:, None])
    slot = partials + tl.program_id(0).to(tl.int64) * D + columns
    tl.store(slot, tl.sum(queries * ds[:, None], 0))
    tl.store(slot + tl.num_programs(0).to(tl.int64) * D, tl.sum(gradient * weight[:, None], 0))


def _by_kernel(x: torch.Tensor) -> bool:
    return launch.AVAILABLE and (x.device.type != "cpu" or launch.INTERPRETED)


def _per_head(x: torch.Tensor, heads: int, d: int) -> torch.Tensor:
    """(b, n, any * d) to (b, heads, any * n / heads, d), a view where it can be one."""
    x = x if x.stride(2) == 1 else x.contiguous()
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2] // (heads * d), heads, d).transpose(1, 2)


def _attention(q, k, v):
    if 0 in (q.numel(), k.numel()):
        # The library takes no empty tensors. Of no keys the sum of exponentials is 0.
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
    return torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v)[:2]


def _attention_backward(grad, q, k, v, out, lse):
    if 0 in (q.numel(), k.numel()):
        return tuple(map(torch.zeros_like, (q, k, v)))
    tensors = grad, q, k, v, out, lse
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(*tensors, 0.0, False)
    # The state of the random numbers for a dropout that there is none of: never read.
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward.default(
        *tensors, None, None, q.shape[2], k.shape[2], 0.0, False, state, state.new_empty(())
    )


def _forward_fake(q, k, v, null_key, null_value, heads):
    seen_heads = heads if k.shape[2] == q.shape[2] else 1
    n = q.shape[1] * (heads // seen_heads)
    return q.new_empty(q.shape), q.new_empty((q.shape[0], seen_heads, n), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    needs = ctx.needs_input_grad[:5]
    gradients = null_key_merge_backward(grad, *ctx.saved_tensors, ctx.heads)
    return *(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), None


@launch.define(
    "null_key_merge(Tensor q, Tensor k, Tensor v, Tensor null_key, Tensor null_value, int heads) -> (Tensor, Tensor)",
    _forward_fake,
    backward=_backward,
    setup_context=_setup_context,
)
def null_key_merge(q, k, v, null_key, null_value, heads):
    """Output (b, n, heads * d) and, for the backward, log of the sum of the softmax's exponentials."""
    shape, d = q.shape, q.shape[2] // heads
    heads = k.shape[2] // d
    q, k, v = (_per_head(x, heads, d) for x in (q, k, v))
    null_key, null_value = null_key.contiguous(), null_value.contiguous()
    out, lse = _attention(q, k, v)
    # (b, n, heads, d): how the library has it in memory too.
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()
    if _by_kernel(q):
        b, n = out.shape[:2]
        blocks = ceil_div(n, ROWS)
        launch.run(
            _merge, (b * heads * blocks,), q, null_key, null_value, out, lse, *q.stride()[:3], heads, n, blocks,
            ROOT=d**-0.5, D=d, ROWS=ROWS,
        )  # fmt: skip
    else:
        merged, lse = _merge_reference(q, out.transpose(1, 2), lse, null_key, null_value)
        out = merged.transpose(1, 2).contiguous()
    return out.view(shape), lse


def _backward_fake(grad, q, k, v, null_key, null_value, out, lse, heads):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, null_key, null_value))


@launch.define(
    "null_key_merge_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor null_key, Tensor null_value,"
    " Tensor out, Tensor lse, int heads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def null_key_merge_backward(grad, q, k, v, null_key, null_value, out, lse, heads):
    """Gradients of q, k, v, null key and null value: the library makes the first three in one go, needed or not."""
    shapes, d = (q.shape, k.shape, v.shape), q.shape[2] // heads
    heads = k.shape[2] // d
    grad, q, k, v, out = (_per_head(x, heads, d) for x in (grad, q, k, v, out))
    null_key, null_value = null_key.contiguous(), null_value.contiguous()
    gradients = _attention_backward(grad, q, k, v, out, lse)
    dq, dk, dv = (dx.transpose(1, 2).contiguous() for dx in gradients)
    if _by_kernel(q):
        b, n = dq.shape[:2]
        blocks = ceil_div(n, ROWS)
        partials = lse.new_empty((2, b * heads * blocks, d))
        launch.run(
            _null_gradients, (b * heads * blocks,),
            grad, q, null_key, null_value, out, lse, dq, partials,
            *grad.stride()[:3], *q.stride()[:3], heads, n, blocks,
            ROOT=d**-0.5, D=d, ROWS=ROWS,
        )  # fmt: skip
        d_null_key, d_null_value = partials[0].sum(0), partials[1].sum(0)
    else:
        term, d_null_key, d_null_value = _null_gradients_reference(grad, q, out, lse, null_key, null_value)
        dq = (dq.float() + term.transpose(1, 2)).to(dq.dtype)
    dq, dk, dv = (dx.reshape(shape) for dx, shape in zip((dq, dk, dv), shapes, strict=True))
    return dq, dk, dv, d_null_key.to(null_key.dtype), d_null_value.to(null_value.dtype)


def dtype_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why this cannot be used on a device, or for queries of this dtype there."""
    found = []
    if device.type == "cpu":
        dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    else:
        dtypes = (torch.float16, torch.bfloat16)
        if device.type == "cuda" and launch.capability(device) < (8, 0):
            found.append("the library's flash attention needs compute capability (8, 0)")
    if dtype not in dtypes:
        found.append(f"it takes {', '.join(map(str, dtypes))}, not {dtype}")
    return found


def reasons(q: torch.Tensor, heads: int, mask: torch.Tensor | None) -> list[str]:
    """Why this cannot be used."""
    found = dtype_reasons(q.device, q.dtype)
    if q.shape[2] // heads not in WIDTHS:
        found.append(f"it takes head widths {', '.join(map(str, WIDTHS))}, not {q.shape[2] // heads}")
    if mask is not None:
        found.append("it takes no mask")
    return found
