"""The forward process and its inversions: noise images, take the noise out, posterior mean.

All three are x a[t] + y b[t], or the difference, with one pair of schedule constants per image (Ho et al., "Denoising
Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239, equations 4 and 7): two reads and one write,
one launch, whatever the memory formats and dtypes. So is their backward: one read, one write for each gradient.
"""

import torch

from . import dispatch, launch
from .images import (
    at,
    check_images,
    check_schedule,
    dense,
    empty_images,
    is_channels_last,
    orders,
    other_order,
    too_large,
)
from .launch import tl, triton

# Two 16-byte accesses of float32 for each of 128 threads.
BLOCK = 1024
# With fewer pixels in a block the lines of a channel would be short; and no images have so many channels.
MIN_PIXELS = 16

_FORMATS = {torch.contiguous_format: False, torch.channels_last: True}


def _reference(x, y, t, a, b, normalize, subtract, dtype, channels_last):
    if normalize:
        x = x * 2 - 1
    first, second = at(a, t, x) * x, at(b, t, y) * y
    out = (first - second if subtract else first + second).to(dtype)
    return out.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@triton.jit
def _packed(block, lane, channels, n, PIXELS: tl.constexpr):
    """Where the pixels of a block lie in channels_last memory, side by side with all channels; and which there are."""
    offset = block * (PIXELS * channels) + lane
    return offset, (lane < PIXELS * channels) & (offset < n)


@triton.jit
def _planes(block, lane, channels, pixels, PIXELS: tl.constexpr):
    """The same in contiguous memory, one channel after the other."""
    channel, pixel = lane // PIXELS, block * PIXELS + lane % PIXELS
    return channel * pixels + pixel, (channel < channels) & (pixel < pixels)


@triton.jit
def _load(image_ptr, offset, inside, order, SAME: tl.constexpr, PIXELS: tl.constexpr):
    """Values in the order of the result, loaded in the order in which they lie."""
    values = tl.load(image_ptr + offset, mask=inside, other=0.0)
    if PIXELS > 0 and not SAME:
        values = tl.gather(values, order, 0)
    return values.to(tl.float32)


@triton.jit(do_not_specialize=["t_stride", "blocks"])
def _mix_kernel(
    x_ptr,
    y_ptr,
    t_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    t_stride,
    n,
    blocks,
    inner,
    outer,
    NORMALIZE: tl.constexpr,
    SUBTRACT: tl.constexpr,
    X_SAME: tl.constexpr,
    Y_SAME: tl.constexpr,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """PIXELS of all channels a program where the memory format changes: both sides are accessed in whole lines.

    BLOCK values of the result where it is 0.
    """
    image, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    t = tl.load(t_ptr + image * t_stride)
    a, b = tl.load(a_ptr + t), tl.load(b_ptr + t)
    lane = tl.arange(0, BLOCK)
    order = lane
    if PIXELS == 0:
        offset = block * BLOCK + lane
        inside = offset < n
        swapped, there = offset, inside
        if not (X_SAME and Y_SAME):
            swapped = other_order(offset, inner, outer)
    elif LAST:
        offset, inside = _packed(block, lane, inner, n, PIXELS)
        swapped, there = _planes(block, lane, inner, outer, PIXELS)
        order = lane % inner * PIXELS + lane // inner
    else:
        offset, inside = _planes(block, lane, outer, inner, PIXELS)
        swapped, there = _packed(block, lane, outer, n, PIXELS)
        order = lane % PIXELS * outer + lane // PIXELS
    x = _load(x_ptr + image * n, offset if X_SAME else swapped, inside if X_SAME else there, order, X_SAME, PIXELS)
    y = _load(y_ptr + image * n, offset if Y_SAME else swapped, inside if Y_SAME else there, order, Y_SAME, PIXELS)
    if NORMALIZE:
        x = x * 2 - 1
    out = a * x - b * y if SUBTRACT else a * x + b * y
    tl.store(out_ptr + image * n + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["t_stride", "blocks"])
def _mix_backward_kernel(
    grad_ptr,
    t_ptr,
    a_ptr,
    b_ptr,
    dx_ptr,
    dy_ptr,
    t_stride,
    n,
    blocks,
    inner,
    outer,
    NORMALIZE: tl.constexpr,
    SUBTRACT: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_Y: tl.constexpr,
    X_SAME: tl.constexpr,
    Y_SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.load(t_ptr + image * t_stride)
    offset = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < n
    grad = tl.load(grad_ptr + image * n + offset, mask=inside, other=0.0).to(tl.float32)
    swapped = offset
    if not (X_SAME and Y_SAME):
        swapped = other_order(offset, inner, outer)
    if NEED_X:
        dx = tl.load(a_ptr + t) * grad
        if NORMALIZE:
            dx = dx * 2
        tl.store(dx_ptr + image * n + (offset if X_SAME else swapped), dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if NEED_Y:
        dy = tl.load(b_ptr + t) * grad
        if SUBTRACT:
            dy = -dy
        tl.store(dy_ptr + image * n + (offset if Y_SAME else swapped), dy.to(dy_ptr.dtype.element_ty), mask=inside)


def _pixels(channels: int) -> int:
    """Of a block in which images change their memory format; 0 if there are too many channels."""
    pixels = BLOCK // launch.next_power_of_2(channels)
    return pixels if pixels >= MIN_PIXELS else 0


def _fake_mix(x, y, t, a, b, normalize, subtract, dtype, channels_last):
    return empty_images(x.shape, x, dtype, channels_last)


def _save_for_backward(ctx, inputs, output):
    x, y, t, a, b, ctx.normalize, ctx.subtract, _, _ = inputs
    ctx.save_for_backward(t, a, b)
    ctx.x_like, ctx.y_like = ((z.dtype, is_channels_last(z)) for z in (x, y))


def _backward(ctx, grad):
    need_x, need_y = ctx.needs_input_grad[:2]
    dx, dy = _mix_backward(
        grad,
        *ctx.saved_tensors,
        ctx.normalize,
        ctx.subtract,
        *ctx.x_like,
        *ctx.y_like,
        need_x,
        need_y,
    )
    return dx if need_x else None, dy if need_y else None, None, None, None, None, None, None, None


@launch.define(
    "mix(Tensor x, Tensor y, Tensor t, Tensor a, Tensor b, bool normalize, bool subtract, ScalarType dtype,"
    " bool channels_last) -> Tensor",
    _fake_mix,
    backward=_backward,
    setup_context=_save_for_backward,
)
def _mix(x, y, t, a, b, normalize, subtract, dtype, channels_last):
    out = empty_images(x.shape, x, dtype, channels_last)
    x, y = dense(x), dense(y)
    x_same, y_same = (is_channels_last(z) == channels_last for z in (x, y))
    n, inner, outer = orders(x.shape, channels_last)
    pixels = 0 if x_same and y_same else _pixels(x.shape[1])
    blocks = launch.ceil_div(x.shape[2:].numel(), pixels) if pixels else launch.ceil_div(n, BLOCK)
    launch.run(
        _mix_kernel,
        (x.shape[0] * blocks,),
        x,
        y,
        t,
        a.contiguous(),
        b.contiguous(),
        out,
        t.stride(0),
        n,
        blocks,
        inner,
        outer,
        NORMALIZE=normalize,
        SUBTRACT=subtract,
        X_SAME=x_same,
        Y_SAME=y_same,
        LAST=channels_last,
        PIXELS=pixels,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return out


def _fake_mix_backward(grad, t, a, b, normalize, subtract, x_dtype, x_last, y_dtype, y_last, need_x, need_y):
    dx = empty_images(grad.shape, grad, x_dtype, x_last) if need_x else grad.new_empty(0, dtype=x_dtype)
    dy = empty_images(grad.shape, grad, y_dtype, y_last) if need_y else grad.new_empty(0, dtype=y_dtype)
    return dx, dy


@launch.define(
    "mix_backward(Tensor grad, Tensor t, Tensor a, Tensor b, bool normalize, bool subtract, ScalarType x_dtype,"
    " bool x_last, ScalarType y_dtype, bool y_last, bool need_x, bool need_y) -> (Tensor, Tensor)",
    _fake_mix_backward,
)
def _mix_backward(grad, t, a, b, normalize, subtract, x_dtype, x_last, y_dtype, y_last, need_x, need_y):
    dx, dy = _fake_mix_backward(grad, t, a, b, normalize, subtract, x_dtype, x_last, y_dtype, y_last, need_x, need_y)
    grad = dense(grad)
    channels_last = is_channels_last(grad)
    n, inner, outer = orders(grad.shape, channels_last)
    blocks = launch.ceil_div(n, BLOCK)
    launch.run(
        _mix_backward_kernel,
        (grad.shape[0] * blocks if need_x or need_y else 0,),
        grad,
        t,
        a.contiguous(),
        b.contiguous(),
        dx,
        dy,
        t.stride(0),
        n,
        blocks,
        inner,
        outer,
        NORMALIZE=normalize,
        SUBTRACT=subtract,
        NEED_X=need_x,
        NEED_Y=need_y,
        X_SAME=x_last == channels_last,
        Y_SAME=y_last == channels_last,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return dx, dy


def _run(
    operation, x, y, t, schedules, implementation, *, normalize=False, subtract=False, dtype=None, memory_format=None
):
    """Check what is common to the three operations, choose an implementation and call it."""
    check_schedule(x, {"t": t}, schedules)
    a, b = schedules.values()
    if dtype is None:
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), a.dtype)
    elif not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if memory_format not in (None, *_FORMATS):
        raise ValueError(
            f"memory_format must be torch.contiguous_format, torch.channels_last or None; got {memory_format}"
        )
    if memory_format == torch.channels_last and x.ndim != 4:
        raise ValueError(f"memory_format torch.channels_last needs images of shape (b, c, h, w), got {tuple(x.shape)}")
    reasons = dispatch.triton_reasons(x, y, t, a, b) + too_large(x)
    if dtype not in dispatch.KERNEL_DTYPES:
        reasons.append(f"it does not write {dtype}")
    chosen = dispatch.select(operation, {"triton": reasons, "reference": []}, x.device, implementation)
    channels_last = is_channels_last(x) if memory_format is None else _FORMATS[memory_format]
    run = _mix if chosen == "triton" else _reference
    return run(x, y, t, a, b, normalize, subtract, dtype, channels_last)


def q_sample(
    x_start: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    sqrt_alphas_cumprod: torch.Tensor,
    sqrt_one_minus_alphas_cumprod: torch.Tensor,
    *,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Noise images: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, equation 4 of the DDPM paper.

    Args:
        x_start: Un-noised images x_0, floating point, shape (b, ...).
        t: Timestep of each image, int64, shape (b,), values in [0, T).
        noise: Standard normal noise of the images' shape, floating point.
        sqrt_alphas_cumprod: sqrt(abar_t) for each timestep, float32, shape (T,).
        sqrt_one_minus_alphas_cumprod: sqrt(1 - abar_t), likewise.
        normalize: Whether the images come in [0, 1] and are first mapped to [-1, 1].
        dtype: Of the result; float32, or float64 where an input is that, if not given.
        memory_format: Of the result, contiguous or channels_last; that of ``x_start`` if not given.
        implementation: Overrides the policy of :mod:`.dispatch` for this call.

    Returns:
        Noised images x_t, shape of ``x_start``. Differentiable in ``x_start`` and ``noise``.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or the implementation cannot do it.
    """
    check_images(x_start=x_start, noise=noise)
    schedules = {
        "sqrt_alphas_cumprod": sqrt_alphas_cumprod,
        "sqrt_one_minus_alphas_cumprod": sqrt_one_minus_alphas_cumprod,
    }
    return _run(
        "q_sample",
        x_start,
        noise,
        t,
        schedules,
        implementation,
        normalize=normalize,
        dtype=dtype,
        memory_format=memory_format,
    )


def predict_start_from_noise(
    x_t: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    sqrt_recip_alphas_cumprod: torch.Tensor,
    sqrt_recipm1_alphas_cumprod: torch.Tensor,
    *,
    implementation: str | None = None,
) -> torch.Tensor:
    """Take the noise out of noised images: x_0 = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) noise.

    Args:
        x_t: Noised images, floating point, shape (b, ...).
        t: Timestep of each image, int64, shape (b,), values in [0, T).
        noise: The noise in each image, floating point, shape of ``x_t``.
        sqrt_recip_alphas_cumprod: sqrt(1 / abar_t) for each timestep, float32, shape (T,).
        sqrt_recipm1_alphas_cumprod: sqrt(1 / abar_t - 1), likewise.
        implementation: Overrides the policy of :mod:`.dispatch` for this call.

    Returns:
        Un-noised images x_0, float32 (float64 where an input is), shape and memory format of ``x_t``. Differentiable in
        ``x_t`` and ``noise``.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or the implementation cannot do it.
    """
    check_images(x_t=x_t, noise=noise)
    schedules = {
        "sqrt_recip_alphas_cumprod": sqrt_recip_alphas_cumprod,
        "sqrt_recipm1_alphas_cumprod": sqrt_recipm1_alphas_cumprod,
    }
    return _run("predict_start_from_noise", x_t, noise, t, schedules, implementation, subtract=True)


def q_posterior_mean(
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    posterior_mean_coef1: torch.Tensor,
    posterior_mean_coef2: torch.Tensor,
    *,
    implementation: str | None = None,
) -> torch.Tensor:
    """Mean of q(x_{t-1} | x_t, x_0), equation 7 of the DDPM paper: a weighted sum of x_0 and x_t.

    Args:
        x_start: Un-noised images x_0, floating point, shape (b, ...).
        x_t: Noised images, floating point, shape of ``x_start``.
        t: Timestep of each image, int64, shape (b,), values in [0, T).
        posterior_mean_coef1: Weight of x_0, sqrt(abar_{t-1}) beta_t / (1 - abar_t), float32, shape (T,).
        posterior_mean_coef2: Weight of x_t, sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t), likewise.
        implementation: Overrides the policy of :mod:`.dispatch` for this call.

    Returns:
        The mean, float32 (float64 where an input is), shape and memory format of ``x_start``. Differentiable in
        ``x_start`` and ``x_t``.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or the implementation cannot do it.
    """
    check_images(x_start=x_start, x_t=x_t)
    schedules = {"posterior_mean_coef1": posterior_mean_coef1, "posterior_mean_coef2": posterior_mean_coef2}
    return _run("q_posterior_mean", x_start, x_t, t, schedules, implementation)
