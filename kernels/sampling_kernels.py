"""The kernels of :mod:`.sampling_step`: predict x_0, find its dynamic threshold, update the image.

Small images, one launch: every input is read once, the output written once. Large images, four: predict x_0 and count
(inputs read, x_0 written), count twice more (x_0 read), update (x_0, x_t and the third input read, output written).
Besides, there are the counts that the launches hand on, a few percent of the bytes of the smallest of these images: see
:mod:`.threshold`.
"""

import torch

from . import launch, threshold
from .images import dense, empty_images, is_channels_last, orders, other_order
from .launch import tl, triton

ANCESTRAL, DDIM, DPM_SOLVER = range(3)
# Values of an image that one program holds in registers: 16 for each of 1024 threads.
WHOLE = 16384


@triton.jit
def _start_weights(a_ptr, b_ptr, t, KIND: tl.constexpr):
    """x_0 = first x_t - second noise."""
    first, second = tl.load(a_ptr + t), tl.load(b_ptr + t)
    if KIND != 0:
        first, second = tl.div_rn(1.0, first), tl.div_rn(second, first)
    return first, second


@triton.jit
def _update_weights(
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    e_ptr,
    t,
    t_previous_ptr,
    t_last_ptr,
    eta_ptr,
    eta,
    stored,
    KIND: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
):
    """The weights of x_0, x_t and the third input in the next image."""
    weight_extra = 0.0
    if KIND == 0:
        weight_start, weight_x = tl.load(c_ptr + t), tl.load(d_ptr + t)
        # Times zero and not left out, as plain torch has it: noise that is NaN stays visible.
        weight_extra = tl.where(t > 0, 1.0, 0.0) * tl.exp(0.5 * tl.load(e_ptr + t))
    else:
        alpha, sigma = tl.load(a_ptr + t), tl.load(b_ptr + t)
        t_previous = tl.load(t_previous_ptr)
        alpha_to = tl.load(a_ptr + t_previous, mask=t_previous >= 0, other=1.0)
        sigma_to = tl.load(b_ptr + t_previous, mask=t_previous >= 0, other=0.0)
        if KIND == 1:
            # alpha_to^2 - alpha^2 = sigma^2 - sigma_to^2: rounding spoils the one whose squares are near 1.
            by_sigma, by_alpha = (sigma - sigma_to) * (sigma + sigma_to), (alpha_to - alpha) * (alpha_to + alpha)
            eta = threshold.setting(eta_ptr, eta, stored, 4)
            gap = tl.maximum(tl.where(sigma < alpha, by_sigma, by_alpha), 0.0)
            weight_extra = tl.div_rn(eta * tl.div_rn(sigma_to, sigma) * tl.sqrt_rn(gap), alpha_to)
            direction = tl.maximum(sigma_to * sigma_to - weight_extra * weight_extra, 0.0)
            weight_x = tl.div_rn(tl.sqrt_rn(direction), sigma)
            weight_start = alpha_to - weight_x * alpha
        else:
            weight_x = tl.div_rn(sigma_to, sigma)
            weight_start = alpha_to - weight_x * alpha
            if HAS_EXTRA:
                t_last = tl.load(t_last_ptr)
                now = tl.log(tl.div_rn(alpha, sigma))
                last = tl.log(tl.div_rn(tl.load(a_ptr + t_last), tl.load(b_ptr + t_last)))
                # To sigma = 0, where the step would be infinite, it goes without what lies behind.
                to = tl.log(tl.div_rn(alpha_to, tl.where(t_previous >= 0, sigma_to, 1.0)))
                ahead = tl.where(t_previous >= 0, tl.div_rn(0.5 * (to - now), now - last), 0.0)
                weight_extra = -weight_start * ahead
                weight_start = weight_start * (1 + ahead)
    return weight_start, weight_x, weight_extra


@triton.jit
def _predicted(pred_ptr, null_ptr, offset, swapped, inside, scale, PRED_SAME: tl.constexpr, NULL: tl.constexpr):
    """The noise, guided if there is a null prediction: NULL is 1 for one in the order of x_t, 2 in the other."""
    pred = tl.load(pred_ptr + (offset if PRED_SAME else swapped), mask=inside, other=0.0).to(tl.float32)
    if NULL > 0:
        null = tl.load(null_ptr + (offset if NULL == 1 else swapped), mask=inside, other=0.0).to(tl.float32)
        pred = null + (pred - null) * scale
    return pred


@triton.jit(do_not_specialize=["stored"])
def _whole_kernel(
    x_ptr,
    t_ptr,
    t_previous_ptr,
    t_last_ptr,
    pred_ptr,
    null_ptr,
    extra_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    e_ptr,
    out_ptr,
    start_ptr,
    n,
    inner,
    outer,
    q_ptr,
    q,
    scale_ptr,
    scale,
    eta_ptr,
    eta,
    stored,
    KIND: tl.constexpr,
    PRED_SAME: tl.constexpr,
    NULL: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    EXTRA_SAME: tl.constexpr,
    ROUNDED: tl.constexpr,
    SIZE: tl.constexpr,
    BY_FOUR: tl.constexpr,
):
    """The whole step of one image."""
    if BY_FOUR:
        # What a compiler that is told of multiples of 16 alone does not know: four values have one address.
        n = n // 4 * 4
    image = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, SIZE)
    inside = offset < n
    swapped = other_order(offset, inner, outer)
    # Or bfloat16 predictions, 8 in an access, would have all else exchanged between threads before it is stored.
    by_four = tl.max_contiguous(offset, 4)
    t = tl.load(t_ptr + image).to(tl.int32)
    first, second = _start_weights(a_ptr, b_ptr, t, KIND)
    x = tl.load(x_ptr + image * n + offset, mask=inside, other=0.0)
    if NULL > 0:
        scale = threshold.setting(scale_ptr, scale, stored, 2)
    pred = _predicted(pred_ptr + image * n, null_ptr + image * n, by_four, swapped, inside, scale, PRED_SAME, NULL)
    start = tl.where(inside, first * x - second * pred, float("inf"))
    s = threshold.threshold_of(start, q_ptr, q, stored, n, ROUNDED, SIZE)
    start = threshold.clamp_scale(start, s)
    if KIND == 2:
        tl.store(start_ptr + image * n + offset, start, mask=inside)
    weight_start, weight_x, weight_extra = _update_weights(
        a_ptr,
        b_ptr,
        c_ptr,
        d_ptr,
        e_ptr,
        t,
        t_previous_ptr + image,
        t_last_ptr + image,
        eta_ptr,
        eta,
        stored,
        KIND,
        HAS_EXTRA,
    )
    out = weight_start * start + weight_x * x
    if HAS_EXTRA:
        extra = tl.load(extra_ptr + image * n + (offset if EXTRA_SAME else swapped), mask=inside, other=0.0)
        out += weight_extra * extra.to(tl.float32)
    tl.store(out_ptr + image * n + offset, out, mask=inside)


@triton.jit(do_not_specialize=["parts", "stored"])
def _start_kernel(
    x_ptr,
    t_ptr,
    pred_ptr,
    null_ptr,
    a_ptr,
    b_ptr,
    start_ptr,
    counts_ptr,
    extremes_ptr,
    shared_ptr,
    n,
    inner,
    outer,
    parts,
    part_size,
    scale_ptr,
    scale,
    stored,
    KIND: tl.constexpr,
    PRED_SAME: tl.constexpr,
    NULL: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """x_0 of one part of an image, and how often the first digit of its keys is what."""
    image, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    threshold.zero_shared(shared_ptr, image, part, parts, SHARED)
    first, second = _start_weights(a_ptr, b_ptr, tl.load(t_ptr + image), KIND)
    if NULL > 0:
        scale = threshold.setting(scale_ptr, scale, stored, 2)
    counts = tl.zeros((ROWS * COLUMNS,), tl.int32)
    largest, largest_up_to_1 = 0, 0
    begin = part * part_size
    for tile in range(begin, tl.minimum(begin + part_size, n), TILE):
        offset = tile + tl.arange(0, TILE)
        inside = offset < n
        swapped = other_order(offset, inner, outer)
        x = tl.load(x_ptr + image * n + offset, mask=inside, other=0.0)
        pred = _predicted(pred_ptr + image * n, null_ptr + image * n, offset, swapped, inside, scale, PRED_SAME, NULL)
        start = first * x - second * pred
        tl.store(start_ptr + image * n + offset, start, mask=inside)
        keys = tl.where(inside, threshold.keys_of(start), 0)
        largest = tl.maximum(largest, tl.max(keys, 0))
        excess = threshold.excess_of(keys)
        largest_up_to_1 = tl.maximum(largest_up_to_1, tl.max(tl.where(excess < 0, keys, 0), 0))
        counts = threshold.count(excess >> 21, excess >> 30 == 0, counts, ROWS * COLUMNS)
    threshold.store_counts(counts_ptr + (image * parts + part) * (ROWS + ROWS * COLUMNS), counts, ROWS, COLUMNS)
    tl.store(extremes_ptr + (image * parts + part) * 2, largest)
    tl.store(extremes_ptr + (image * parts + part) * 2 + 1, largest_up_to_1)


@triton.jit(do_not_specialize=["parts", "stored"])
def _update_kernel(
    x_ptr,
    t_ptr,
    t_previous_ptr,
    t_last_ptr,
    extra_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    e_ptr,
    out_ptr,
    start_ptr,
    shared_ptr,
    state_ptr,
    n,
    inner,
    outer,
    parts,
    part_size,
    q_ptr,
    q,
    eta_ptr,
    eta,
    stored,
    KIND: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    EXTRA_SAME: tl.constexpr,
    TILE: tl.constexpr,
    ROUNDED: tl.constexpr,
    SECOND: tl.constexpr,
    SHARED: tl.constexpr,
):
    """One part of the next image, from x_0 before its threshold; for the solver that keeps x_0, also after it."""
    image, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    s = threshold.threshold_of_counts(shared_ptr, state_ptr, image, q_ptr, q, stored, n, ROUNDED, SECOND, SHARED)
    weight_start, weight_x, weight_extra = _update_weights(
        a_ptr,
        b_ptr,
        c_ptr,
        d_ptr,
        e_ptr,
        tl.load(t_ptr + image),
        t_previous_ptr + image,
        t_last_ptr + image,
        eta_ptr,
        eta,
        stored,
        KIND,
        HAS_EXTRA,
    )
    begin = part * part_size
    for tile in range(begin, tl.minimum(begin + part_size, n), TILE):
        offset = tile + tl.arange(0, TILE)
        inside = offset < n
        swapped = other_order(offset, inner, outer)
        x = tl.load(x_ptr + image * n + offset, mask=inside, other=0.0)
        start = threshold.clamp_scale(tl.load(start_ptr + image * n + offset, mask=inside, other=0.0), s)
        if KIND == 2:
            tl.store(start_ptr + image * n + offset, start, mask=inside)
        out = weight_start * start + weight_x * x
        if HAS_EXTRA:
            extra = tl.load(extra_ptr + image * n + (offset if EXTRA_SAME else swapped), mask=inside, other=0.0)
            out += weight_extra * extra.to(tl.float32)
        tl.store(out_ptr + image * n + offset, out, mask=inside)


def _fake_step(kind, x_t, t, t_previous, t_last, pred, null_pred, extra, schedules, *settings):
    out = empty_images(x_t.shape, x_t, x_t.dtype, is_channels_last(x_t))
    return out, torch.empty_like(out) if kind == DPM_SOLVER else x_t.new_empty(0)


@launch.define(
    "sampling_step(int kind, Tensor x_t, Tensor t, Tensor t_previous, Tensor t_last, Tensor pred, Tensor? null_pred,"
    " Tensor? extra, Tensor[] schedules, float q, float scale, float eta, Tensor? stored_q, Tensor? stored_scale,"
    " Tensor? stored_eta) -> (Tensor, Tensor)",
    _fake_step,
)
def step(
    kind,
    x_t,
    t,
    t_previous,
    t_last,
    pred,
    null_pred,
    extra,
    schedules,
    q,
    scale,
    eta,
    stored_q,
    stored_scale,
    stored_eta,
):
    x_t, pred = dense(x_t), dense(pred)
    last = is_channels_last(x_t)
    out = empty_images(x_t.shape, x_t, x_t.dtype, last)
    n, inner, outer = orders(x_t.shape, last)
    whole = n <= WHOLE
    start = torch.empty_like(out) if kind == DPM_SOLVER or not whole else x_t.new_empty(0)
    # Where there is none a kernel gets another tensor, and does not look at it.
    null = pred if null_pred is None else dense(null_pred)
    third = x_t if extra is None else dense(extra)
    settings = stored_q, stored_scale, stored_eta
    # Bits 1, 2 and 4.
    stored = sum(1 << place for place, tensor in enumerate(settings) if tensor is not None)
    stored_q, stored_scale, stored_eta = (x_t if tensor is None else tensor for tensor in settings)
    has_null = 0 if null_pred is None else 1 if is_channels_last(null) == last else 2
    pred_same = is_channels_last(pred) == last
    t, t_previous, t_last = (times.contiguous() for times in (t, t_previous, t_last))
    # Five, as the ancestral step needs.
    schedules = [schedule.contiguous() for schedule in schedules]
    schedules += schedules[:1] * (5 - len(schedules))
    if whole:
        size = max(launch.next_power_of_2(n), 512)
        launch.run(
            _whole_kernel,
            (x_t.shape[0],),
            x_t,
            t,
            t_previous,
            t_last,
            pred,
            null,
            third,
            *schedules,
            out,
            start,
            n,
            inner,
            outer,
            stored_q,
            q,
            stored_scale,
            scale,
            stored_eta,
            eta,
            stored,
            KIND=kind,
            PRED_SAME=pred_same,
            NULL=has_null,
            HAS_EXTRA=extra is not None,
            EXTRA_SAME=is_channels_last(third) == last,
            ROUNDED=threshold.is_rounded(n),
            SIZE=size,
            BY_FOUR=n % 16 != 0 and n % 4 == 0,
            # With other numbers, such as 16, or 4 for values that are not aligned, the compiler spills for one kind of
            # step or another.
            num_warps=32 if size >= 8192 else 8 if size == 4096 or (n % 16 and size > 512) else 4,
        )
    else:
        selection = threshold.Selection(start, (stored_q, q, stored))
        grid = (x_t.shape[0] * selection.parts,)
        launch.run(
            _start_kernel,
            grid,
            x_t,
            t,
            pred,
            null,
            *schedules[:2],
            start,
            selection.first,
            selection.extremes,
            selection.shared,
            n,
            inner,
            outer,
            selection.parts,
            selection.part_size,
            stored_scale,
            scale,
            stored,
            KIND=kind,
            PRED_SAME=pred_same,
            NULL=has_null,
            TILE=threshold.TILE,
            ROWS=threshold.FIRST_ROWS,
            COLUMNS=threshold.FIRST_COLUMNS,
            SHARED=selection.constants["SHARED"],
            num_warps=8,
        )
        selection.narrow()
        launch.run(
            _update_kernel,
            grid,
            x_t,
            t,
            t_previous,
            t_last,
            third,
            *schedules,
            out,
            start,
            selection.shared,
            selection.state,
            n,
            inner,
            outer,
            selection.parts,
            selection.part_size,
            stored_q,
            q,
            stored_eta,
            eta,
            stored,
            KIND=kind,
            HAS_EXTRA=extra is not None,
            EXTRA_SAME=is_channels_last(third) == last,
            TILE=threshold.TILE,
            **selection.constants,
            num_warps=16,
        )
    return out, start if kind == DPM_SOLVER else x_t.new_empty(0)
