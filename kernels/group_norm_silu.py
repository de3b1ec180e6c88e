"""GroupNorm, scale and shift, SiLU: y = silu(norm(x) * (scale + 1) + shift), and the same of two images side by side.

Wu and He, "Group Normalization" (2018), equations 1 to 6; scale and shift by time as in Dhariwal and Nichol, "Diffusion
Models Beat GANs" (2021), section 3. Per (sample, channel) all of it is u = gain * (x - mean) / deviation + offset with
gain = weight * (1 + scale) and offset = bias * (1 + scale) + shift, and y = silu(u). With du = dy * silu'(u), n = (x -
mean) / deviation, P = sum of du and Q = sum of du * n over the pixels,

    dx = (gain * du - mean(gain * P) - n * mean(gain * Q)) / deviation, the means over the group,
    dscale = weight * Q + bias * P, dshift = P, dweight = sum of (1 + scale) * Q, dbias = sum of (1 + scale) * P.

Floors: where a group fits into registers (:mod:`.group_norm_resident`) one read and one write, and two reads and one
write backward; else (:mod:`.group_norm_looped`, :mod:`.group_norm_split`) two reads and one write, and four reads and
one write backward.
"""

import torch
import torch.nn.functional as F

from . import (
    dispatch,
    group_norm_looped,
    group_norm_resident,
    group_norm_resident_backward,
    group_norm_split,
    group_norm_split_backward,
    launch,
)
from .group_norm_tiles import Operands, empty_like
from .images import in_format_of
from .modulated_silu import modulated_silu

# In channels_last memory groups of other widths than multiples of this are not read one by one, but in blocks of
# channels that can be: they would come element by element, and each would fetch its neighbours. Up to so many elements
# of a group that costs less than more launches.
ALIGNED, LITTLE = 16, 1024
# Offsets within a tile are 32-bit.
LARGEST_PIXELS, LARGEST_CHANNELS = 2**27, 2**20


def _reference(x, skip, weight, bias, groups, eps, scale, shift, skip_scale, silu):
    if skip is not None:
        x = in_format_of(x, torch.cat((x, skip * skip_scale), dim=1))
    if launch.in_forward_mode():
        # The only layout of which torch's own has tangents.
        x = x.contiguous()
    dtype = x.dtype
    wide = dtype
    for vector in (weight, bias):
        wide = wide if vector is None else torch.promote_types(wide, vector.dtype)
    if x.device.type == "cpu" and wide in (torch.bfloat16, torch.float16):
        # Slower there than float32, and less exact.
        wide = torch.float32
    # On CUDA torch takes vectors of the images' dtype only.
    x, weight, bias = (tensor if tensor is None else tensor.to(wide) for tensor in (x, weight, bias))
    if weight is None and bias is not None:
        # On a CPU torch has no gradients for a bias alone.
        weight = torch.ones_like(bias)
    trained = any(vector is not None and vector.requires_grad for vector in (weight, bias))
    if x.device.type == "cpu" and trained and torch.is_grad_enabled() and _may_be_channels_last(x):
        x = _trained_on_cpu(x, groups, weight, bias, eps)
    else:
        # Unlike torch.nn.functional's, this takes a single value per group.
        x = torch.group_norm(x, groups, weight, bias, eps)
    if scale is not None and silu:
        return modulated_silu(x, scale, shift).to(dtype)
    if scale is not None:
        x = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None] + 1)
    if silu:
        # In place unless the backward pass needs what was there.
        x = F.silu(x, inplace=not torch.is_grad_enabled())
    return x.to(dtype)


def _may_be_channels_last(x: torch.Tensor) -> bool:
    """Whether torch may take an image for one in channels_last memory; of one channel or pixel it takes some so."""
    return not x.is_contiguous() or x.stride(1) == 1


def _trained_on_cpu(x, groups, weight, bias, eps):
    """torch.group_norm, whose backward on a CPU ends the process in channels_last memory unless it is asked for x's.

    Vectors are gradients of it, and x may need none, or not in this pass: torch.autograd.grad(out, [weight]).
    """
    if not x.requires_grad:
        # Images of one axis it takes for contiguous ones, which are copied.
        y = torch.group_norm(x.flatten(2), groups, weight, bias, eps)
        return in_format_of(x, y.view(x.shape))
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # All gradients are asked for, or by formulas that have gradients of their own.
        return torch.group_norm(x, groups, weight, bias, eps)
    if x.is_leaf:
        # Of a leaf it cannot be told whether its gradient is asked for.
        x = x.view_as(x)
    y = torch.group_norm(x, groups, weight, bias, eps)
    y.grad_fn.register_prehook(_by_formulas_unless_followed_by(x.grad_fn))
    return y


def _by_formulas_unless_followed_by(of_x):
    """A hook for a node of autograd: unless that of x is to run as well, it computes as for gradients of gradients."""

    def hook(_):
        if torch.is_grad_enabled() or torch._C._will_engine_execute_node(of_x):
            return

        def detached(gradients, _):
            handle.remove()
            return tuple(gradient if gradient is None else gradient.detach() for gradient in gradients)

        # torch sets it anew for every node.
        torch._C._set_grad_enabled(True)
        handle = torch._C._current_autograd_node().register_hook(detached)

    return hook


def _channels(x: torch.Tensor, skip: torch.Tensor | None):
    return x.shape[1] + (0 if skip is None else skip.shape[1])


def _empty_outputs(x, skip, groups):
    statistics = torch.empty((x.shape[0], 3, groups), dtype=torch.float32, device=x.device)
    return empty_like(x, _channels(x, skip)), statistics


def _empty_gradients(x, skip, vectors, needed) -> list[torch.Tensor | None]:
    images = [None if image is None else empty_like(x, image.shape[1]) for image in (x, skip)]
    rows = [None if v is None else torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in vectors]
    return [gradient if need else None for gradient, need in zip(images + rows, needed, strict=True)]


def _without_none(gradients: list[torch.Tensor | None], x: torch.Tensor) -> list[torch.Tensor]:
    """An operator must return tensors: empty ones for what nobody needs."""
    return [x.new_empty((0,)) if gradient is None else gradient for gradient in gradients]


def _fake_forward(x, skip, weight, bias, scale, shift, x_bias, groups, eps, skip_scale, silu):
    return _empty_outputs(x, skip, groups)


def _fake_backward(dy, x, skip, weight, bias, scale, shift, statistics, groups, skip_scale, silu, needed):
    return _without_none(_empty_gradients(x, skip, (weight, bias, scale, shift), needed), x)


def _plan(operands: Operands):
    """Forward and backward launcher for operands of this size."""
    scattered = operands.channels_last and operands.group_width % ALIGNED != 0
    if not scattered or operands.group_width * operands.pixels <= LITTLE:
        if group_norm_resident.fits(operands):
            held = group_norm_resident_backward.fits(operands)
            backward = group_norm_resident_backward.backward if held else group_norm_looped.backward
            return group_norm_resident.forward, backward
        if group_norm_looped.fits(operands):
            return group_norm_looped.forward, group_norm_looped.backward
    return group_norm_split.forward, group_norm_split_backward.backward


def _setup_context(ctx, inputs, output):
    *tensors, _, groups, _, skip_scale, silu = inputs
    ctx.save_for_backward(*tensors, output[1])
    # The statistics have no gradients, which would be filled with zeros for nothing.
    ctx.set_materialize_grads(False)
    ctx.options = groups, skip_scale, silu


def _backward(ctx, dy, _):
    needed = list(ctx.needs_input_grad[:6])
    gradients = _launch_backward(dy, *ctx.saved_tensors, *ctx.options, needed)
    kept = (gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
    return *kept, None, None, None, None, None


@launch.define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor? scale,"
    " Tensor? shift, Tensor statistics, int groups, float skip_scale, bool silu, bool[] needed) -> Tensor[]",
    _fake_backward,
)
def _launch_backward(dy, x, skip, weight, bias, scale, shift, statistics, groups, skip_scale, silu, needed):
    operands = Operands.of(x, skip, weight, bias, scale, shift, None, groups, skip_scale, silu)
    # Not the layout of the copy of x: dense, an image of one channel counts as contiguous.
    dy = dy.contiguous(memory_format=torch.channels_last if operands.channels_last else torch.contiguous_format)
    gradients = _empty_gradients(x, skip, (weight, bias, scale, shift), needed)
    _, run = _plan(operands)
    run(operands, dy, statistics, gradients[:2], gradients[2:])
    return _without_none(gradients, x)


@launch.define(
    "group_norm_silu(Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift,"
    " Tensor? x_bias, int groups, float eps, float skip_scale, bool silu) -> (Tensor, Tensor)",
    _fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
def _launch_forward(x, skip, weight, bias, scale, shift, x_bias, groups, eps, skip_scale, silu):
    operands = Operands.of(x, skip, weight, bias, scale, shift, x_bias, groups, skip_scale, silu)
    y, statistics = _empty_outputs(x, skip, groups)
    run, _ = _plan(operands)
    run(operands, y, statistics, eps)
    return y, statistics


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    skip_scale: float = 1.0,
    silu: bool = True,
    x_bias: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """silu(group_norm(cat(x + x_bias, skip * skip_scale)) * (scale + 1) + shift), statistics in float32.

    Wu and He, "Group Normalization" (2018). The kernels read the two images where they are.

    Args:
        x: Images, shape (b, c1, h, w): float32, float16 or bfloat16 for the kernels. NCHW and channels_last are read as
            they are, other layouts copied.
        weight: Gain of every channel, shape (c,) with c = c1 + c2, any of these dtypes.
        bias: Likewise.
        groups: Number of groups; it divides c.
        eps: Added to the variance.
        scale: Per sample, shape (b, c); only together with ``shift``.
        shift: Likewise.
        skip: More channels, shape (b, c2, h, w), none if not given.
        skip_scale: Factor of ``skip``.
        silu: Whether SiLU follows.
        x_bias: Added to every channel of ``x``, shape (c1,): that of a convolution before, to which it would be one
            more pass over its result. The kernels add it while they read, but where gradients are needed or beside
            ``skip``.
        implementation: Overrides the policy of :mod:`.dispatch` for this call.

    Returns:
        Images of shape (b, c, h, w), in the memory format and dtype of ``x`` (of the wider dtype, if that of ``skip``
        differs).

    Raises:
        ValueError: if shapes or devices do not fit together, or an implementation was asked for that cannot do the job.
        TypeError: if a tensor is not floating-point.
    """
    _check(x, weight, bias, groups, scale, shift, skip, x_bias)
    choice = dispatch.select(
        "group_norm_silu",
        {"triton": lambda: _triton_reasons(x, skip, weight, bias, scale, shift, x_bias), "reference": []},
        x.device,
        implementation,
    )
    if x_bias is not None:
        x_bias = x_bias.to(x.dtype)
        tensors = (x, weight, bias, scale, shift, x_bias)
        trained = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
        if choice == "reference" or skip is not None or trained:
            x, x_bias = x + x_bias[:, None, None], None
    if choice == "reference":
        # torch's norm may take a single image in channels_last memory for a contiguous one, and does so on meta; and
        # transposed scales and shifts lead to a third order.
        return in_format_of(x, _reference(x, skip, weight, bias, groups, eps, scale, shift, skip_scale, silu))
    if skip is not None and x.shape[1] == 0:
        # The kernels take the first image to have channels.
        x, skip = torch.cat((x, skip * skip_scale), dim=1), None
    elif skip is not None and skip.dtype != x.dtype:
        wider = torch.promote_types(x.dtype, skip.dtype)
        x, skip = x.to(wider), skip.to(wider)
    return _launch_forward(x, skip, weight, bias, scale, shift, x_bias, groups, eps, skip_scale, silu)[0]


def _triton_reasons(x, skip, *vectors) -> list[str]:
    reasons = dispatch.triton_reasons(x, skip, *vectors)
    channels, pixels = _channels(x, skip), x.shape[2] * x.shape[3]
    if channels > LARGEST_CHANNELS or pixels > LARGEST_PIXELS:
        reasons.append(
            f"it takes up to {LARGEST_CHANNELS} channels and {LARGEST_PIXELS} pixels, not {channels} and {pixels}"
        )
    if pixels == 0:
        reasons.append("there are no pixels")
    return reasons


def _check(x, weight, bias, groups, scale, shift, skip, x_bias) -> None:
    vectors = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    given = {"x": x, **vectors, "skip": skip, "x_bias": x_bias}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {tensor.dtype}: convert it with .float()")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {tensor.device}: move it there")
    if x.ndim != 4:
        raise ValueError(f"x must have shape (b, c, h, w); got {tuple(x.shape)}")
    if skip is not None and (skip.ndim != 4 or skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]):
        raise ValueError(
            f"skip must have shape (b, c2, h, w), like x of shape {tuple(x.shape)} but for c2; got {tuple(skip.shape)}"
        )
    channels = _channels(x, skip)
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(f"groups must divide the number of channels, {channels}; got {groups}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), a value per channel; got {tuple(vector.shape)}")
    if x_bias is not None and x_bias.shape != x.shape[1:2]:
        raise ValueError(f"x_bias must have shape ({x.shape[1]},), a value per channel of x; got {tuple(x_bias.shape)}")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together; got one of them: pass zeros for the other")
    for name, rows in (("scale", scale), ("shift", shift)):
        if rows is not None and rows.shape != (x.shape[0], channels):
            raise ValueError(
                f"{name} must have shape ({x.shape[0]}, {channels}), a value per sample and channel; got"
                f" {tuple(rows.shape)}"
            )
