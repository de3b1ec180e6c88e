"""The registry of kernel cases: operations of ``minimagen_fast.kernels`` at the shapes that the U-Nets give them.

Its readers are the ahead-of-time table (:mod:`.aot`), the traffic table (:mod:`.traffic`) and the timing suite. One
function an operation makes a :class:`Case` from sizes; :data:`CASES` lists what is measured, :func:`unet_cases` what a
built-in U-Net does with images of some size. A new operation needs a function here, and entries in those two places;
one that has no kernels of ours, but arranges what libraries do, is in :mod:`.library_cases`.

    case = CASES["group_norm_silu/b1-128x32x32+scale"]
    inputs = case.inputs("cuda", torch.bfloat16, torch.channels_last, gradients=True)
    out = case.run(inputs)                                     # what implementation="auto" chooses
    expected = case.run(inputs, implementation="reference")
    out.backward(torch.randn_like(out))
    case.forward.bytes(inputs, out), case.backward.bytes(inputs, out)      # floors
"""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minimagen_fast.diffusion_model import GaussianDiffusion
from minimagen_fast.kernels import (
    ancestral_step,
    channel_layer_norm,
    ddim_step,
    dpm_solver_pp_2m_step,
    group_norm_silu,
    layer_norm,
    null_key_attention,
    predict_start_from_noise,
    q_posterior_mean,
    q_sample,
)
from minimagen_fast.t5 import MAX_LENGTH
from minimagen_fast.Unet import ATTN_DIM_HEAD, NUM_TIME_TOKENS, RESNET_GROUPS, SKIP_CONNECT_SCALE, Unet

HEADS = 8
TIMESTEPS = 1000
# What a kernel may move in all, in multiples of its floor.
LIMIT = 1.05


@dataclass(frozen=True)
class Make:
    """Makes a case's tensors: normal values, the same for the same case and device.

    Attributes:
        device: Where they are; on ``meta`` they have no values.
        dtype: Of images and tokens.
        parameters: Dtype of parameters: float32 under autocast, that of images and tokens in a converted network.
        memory_format: Of images.
        generator: Of the values, on the device; none on ``meta``.
    """

    device: torch.device
    dtype: torch.dtype
    parameters: torch.dtype
    memory_format: torch.memory_format
    generator: torch.Generator | None

    def parameter(self, *shape: int) -> torch.Tensor:
        return self.picture(*shape).to(self.parameters)

    def tokens(self, *shape: int) -> torch.Tensor:
        return self.picture(*shape).to(self.dtype)

    def image(self, *shape: int) -> torch.Tensor:
        return self.tokens(*shape).contiguous(memory_format=self.memory_format)

    def picture(self, *shape: int) -> torch.Tensor:
        """Float32 and NCHW whatever the network computes in: samplers keep their images so, files have them so."""
        if self.generator is None:
            return torch.empty(shape, device=self.device)
        return torch.randn(shape, device=self.device, generator=self.generator)

    def times(self, batch: int) -> torch.Tensor:
        # With a step before and a step after each.
        return torch.arange(TIMESTEPS - 2, 0, -max(1, TIMESTEPS // (batch + 1)), device=self.device)[:batch]

    def schedules(self, *names: str) -> dict[str, torch.Tensor]:
        """Those of the linear noise schedule: buffers of ``GaussianDiffusion`` of these names."""
        diffusion = _diffusion()
        return {name: getattr(diffusion, name).to(self.device) for name in names}


@functools.cache
def _diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(timesteps=TIMESTEPS)


@dataclass(frozen=True)
class Floor:
    """The least that an operation must move, as whole tensors.

    Attributes:
        reads: How often each tensor is read: an input by its name, ``grad`` for the output's gradient,
            ``NAME=INPUT`` for an intermediate of an input's size.
        writes: What is written: ``output``, ``grad_`` and the name of an input, or ``NAME=INPUT``.
        limit: How many times the floor its kernels may move, all together; none if it is only for orientation.
        distinct: How many times the floor they may move if what a launch reads twice counts once.
        why: What is not plain about it.
    """

    reads: dict[str, int]
    writes: tuple[str, ...]
    limit: float | None = LIMIT
    distinct: float = LIMIT
    why: str = ""

    def bytes(self, inputs: dict[str, Any], output: torch.Tensor | tuple[torch.Tensor, ...]) -> int:
        """Bytes of these reads and writes, each tensor element counted once a time."""
        outputs = output if isinstance(output, tuple) else (output,)

        def size(name: str) -> int:
            if name in ("output", "grad"):
                return sum(tensor.nbytes for tensor in outputs)
            tensor = inputs[name.removeprefix("grad_").rpartition("=")[2]]
            return 0 if tensor is None else tensor.numel() * tensor.element_size()

        return sum(n * size(name) for name, n in self.reads.items()) + sum(map(size, self.writes))

    def __str__(self) -> str:
        reads = ", ".join(f"{n} x {name}" if n > 1 else name for name, n in self.reads.items())
        words = re.sub(r"=\w+", "", f"reads {reads}; writes {', '.join(self.writes)}")
        return f"{words} ({self.why})" if self.why else words


@dataclass(frozen=True, eq=False)
class Case:
    """An operation on inputs of given shapes.

    Attributes:
        operation: Name of the public function.
        shape: The inputs' shapes and which of them there are, in a word.
        function: The public function.
        make_inputs: Makes its tensor arguments, by name.
        options: Its other arguments.
        gradients: Which inputs get a gradient in training; none if the operation is not differentiable.
        forward: Floor of the operation.
        backward: Floor of its backward, all of ``gradients`` wanted.
        forward_planes: Floor of the operation in NCHW memory, where it differs.
        backward_planes: The same of its backward.
        small: Whether the interpreter and a CPU do it in a few seconds.
        images: Whether the memory format matters.
        converted: Whether there are parameters among its inputs, which a U-Net may have in bfloat16.
        libraries: Further implementations that have kernels of ours besides a library's, in half precision.
        half_only: Whether kernels take it in half precision only.
        by_sample: Inputs that have a batch, if results for a sample depend on that sample alone, and plain torch may
            not have the memory for all of them at once.
        share: What part of plain torch's FLOPs it takes at least.
    """

    operation: str
    shape: str
    function: Callable[..., Any]
    make_inputs: Callable[[Make], dict[str, Any]]
    forward: Floor
    backward: Floor | None = None
    forward_planes: Floor | None = None
    backward_planes: Floor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()
    small: bool = False
    images: bool = True
    converted: bool = False
    libraries: tuple[str, ...] = ()
    half_only: bool = False
    by_sample: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.operation}/{self.shape}"

    def floor(self, direction: str, memory_format: torch.memory_format = torch.channels_last) -> Floor | None:
        """The floor ``forward`` or ``backward``; none where there is no backward."""
        planes = memory_format == torch.contiguous_format and self.images
        if direction == "forward":
            return self.forward_planes if planes and self.forward_planes is not None else self.forward
        return self.backward_planes if planes and self.backward_planes is not None else self.backward

    def inputs(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
        *,
        parameters: torch.dtype = torch.float32,
        gradients: bool = False,
    ) -> dict[str, torch.Tensor | None]:
        """The tensor arguments, see :class:`Make`; with ``gradients`` those in ``gradients`` require theirs."""
        device = torch.device(device)
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        tensors = self.make_inputs(Make(device, dtype, parameters, memory_format, generator))
        wanted = self.gradients if gradients else ()
        return {k: v if v is None else v.detach().requires_grad_(k in wanted) for k, v in tensors.items()}

    def run(self, inputs: dict[str, Any], implementation: str | None = None) -> Any:
        """Call the operation; ``implementation="reference"`` is plain torch."""
        return self.function(**inputs, **self.options, implementation=implementation)


def image_shape(b: int, c: int, h: int, w: int) -> str:
    return f"b{b}-{c}x{h}x{w}"


def group_norm(
    b: int,
    c: int,
    h: int,
    w: int,
    *,
    skip: int = 0,
    scale: bool = False,
    x_bias: bool = False,
    resident: bool = False,
) -> Case:
    """GroupNorm of images, of ``skip`` further channels beside them, with scale and shift by time, and SiLU.

    With ``x_bias`` that of a convolution before is added, which is done without gradients. ``resident`` states the
    lower floor, of a group that is read once because it fits on chip.
    """
    channels = c + skip
    images = ("x", "skip") if skip else ("x",)
    vectors = ("weight", "bias", *(("scale", "shift") if scale else ()))

    def make_inputs(make: Make) -> dict[str, Any]:
        inputs = {"x": make.image(b, c, h, w), "weight": make.parameter(channels), "bias": make.parameter(channels)}
        if skip:
            inputs["skip"] = make.image(b, skip, h, w)
        if scale:
            # Both come from one projection.
            inputs["scale"], inputs["shift"] = make.tokens(b, 2 * channels).chunk(2, dim=1)
        if x_bias:
            # The kernels are given it in the dtype of the images.
            inputs["x_bias"] = make.tokens(c)
        return inputs

    once = dict.fromkeys(vectors, 1)
    forward, backward = (1, 1) if resident else (2, 2)
    case = Case(
        "group_norm_silu",
        image_shape(b, c, h, w) + (f"+skip{skip}" if skip else "") + ("+scale" if scale else ""),
        group_norm_silu,
        make_inputs,
        Floor({**dict.fromkeys(images, forward), **once}, ("output",)),
        Floor(
            {**dict.fromkeys(images, backward), "grad": backward, **once},
            tuple(f"grad_{name}" for name in (*images, *vectors)),
        ),
        options={"groups": RESNET_GROUPS, "skip_scale": SKIP_CONNECT_SCALE if skip else 1.0},
        gradients=(*images, *vectors),
        converted=True,
    )
    if not x_bias:
        return case
    read = {**case.forward.reads, "x_bias": 1}
    shape = f"{case.shape}+bias"
    return replace(case, shape=shape, forward=replace(case.forward, reads=read), backward=None, gradients=())


def attention(b: int, n: int, m: int, *, shared: bool, heads: int = HEADS, d: int = ATTN_DIM_HEAD) -> Case:
    """Attention with a null key from ``n`` queries to ``m`` keys, of their own for every head or shared by all."""
    width = d if shared else heads * d

    def make_inputs(make: Make) -> dict[str, Any]:
        # Keys and values are halves of one projection, the null key and value of one parameter.
        k, v = make.tokens(b, m, 2 * width).chunk(2, dim=-1)
        null_key, null_value = make.parameter(2, d)
        return {"q": make.tokens(b, n, heads * d), "k": k, "v": v, "null_key": null_key, "null_value": null_value}

    names = ("q", "k", "v", "null_key", "null_value")
    return Case(
        "null_key_attention",
        f"b{b}-{n}x{m}-{heads}x{d}" + ("-shared" if shared else ""),
        null_key_attention,
        make_inputs,
        Floor(dict.fromkeys(names, 1), ("output",), None, why="every block of queries reads all keys and values"),
        Floor(
            {**dict.fromkeys(names, 2), "grad": 2, "output": 1},
            tuple(f"grad_{name}" for name in names),
            None,
            # A shared key has many queries, whose parts are summed separately.
            1.65 if shared else LIMIT,
            "once for the gradient of q, once for those of k and v",
        ),
        options={"heads": heads},
        gradients=names,
        images=False,
        converted=True,
        libraries=("sdpa_merge",),
        half_only=d > 64,
        by_sample=("q", "k", "v"),
    )


def merged_attention(b: int, n: int, m: int, *, heads: int = HEADS, d: int = ATTN_DIM_HEAD) -> Case:
    """The null key merged into what a library's kernel has made of the other keys; floors are those of the merge."""

    def merged(*, implementation: str | None, **arguments: Any) -> torch.Tensor:
        chosen = "sdpa_merge" if implementation == "triton" else implementation
        return null_key_attention(**arguments, implementation=chosen)

    case = attention(b, n, m, shared=False, heads=heads, d=d)
    nulls = {"null_key": 1, "null_value": 1}
    return replace(
        case,
        shape=f"{case.shape}+merge",
        function=merged,
        forward=Floor({"q": 1, "attended=q": 1, **nulls}, ("output",), why="beside the library's kernel"),
        backward=Floor(
            {"q": 1, "grad": 1, "output": 1, "grad_q=q": 1, **nulls},
            ("grad_q", "grad_null_key", "grad_null_value"),
            why="beside the library's kernels",
        ),
        libraries=(),
    )


def row_norm(b: int, n: int, c: int, *, residual: bool = False) -> Case:
    """LayerNorm of tokens, and a residual added to them."""

    def make_inputs(make: Make) -> dict[str, Any]:
        inputs = {"x": make.tokens(b, n, c), "gain": make.parameter(c)}
        return {**inputs, "residual": make.tokens(b, n, c)} if residual else inputs

    images = ("x", "residual") if residual else ("x",)
    return Case(
        "layer_norm",
        f"b{b}-{n}x{c}" + ("+residual" if residual else ""),
        layer_norm,
        make_inputs,
        Floor({**dict.fromkeys(images, 1), "gain": 1}, ("output",)),
        Floor({"x": 1, "grad": 1, "gain": 1}, ("grad_x", "grad_gain"), why=_residual_gradient(residual)),
        gradients=(*images, "gain"),
        images=False,
        converted=True,
    )


def channel_norm(b: int, c: int, h: int, w: int, *, gelu: bool = False, residual: bool = False) -> Case:
    """LayerNorm over the channels of every pixel, after GELU or not, and a residual added."""

    def make_inputs(make: Make) -> dict[str, Any]:
        inputs = {"x": make.image(b, c, h, w), "gain": make.parameter(1, c, 1, 1)}
        return {**inputs, "residual": make.image(b, c, h, w)} if residual else inputs

    images = ("x", "residual") if residual else ("x",)
    widest = 1024 if residual else 2048
    return Case(
        "channel_layer_norm",
        image_shape(b, c, h, w) + ("+gelu" if gelu else "") + ("+residual" if residual else ""),
        channel_layer_norm,
        make_inputs,
        Floor({**dict.fromkeys(images, 1), "gain": 1}, ("output",)),
        Floor({"x": 1, "grad": 1, "gain": 1}, ("grad_x", "grad_gain"), why=_residual_gradient(residual)),
        # Beyond this, registers do not hold all channels of 8 pixels of one image, or of both.
        Floor({**dict.fromkeys(images, 1), "x": 2, "gain": 1}, ("output",)) if c > widest else None,
        Floor({"x": 2, "grad": 2, "gain": 1}, ("grad_x", "grad_gain")) if c > 1024 else None,
        options={"gelu": gelu},
        gradients=(*images, "gain"),
        converted=True,
    )


def _residual_gradient(residual: bool) -> str:
    return "the residual's gradient is the output's" if residual else ""


def noising(b: int, c: int, h: int, w: int) -> Case:
    """Images of [0, 1] to noised ones of [-1, 1], in the network's dtype and memory format."""
    schedules = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")

    def make_inputs(make: Make) -> dict[str, Any]:
        return {
            "x_start": make.image(b, c, h, w),
            "t": make.times(b),
            "noise": make.image(b, c, h, w),
        } | make.schedules(*schedules)

    return Case(
        "q_sample",
        image_shape(b, c, h, w),
        q_sample,
        make_inputs,
        Floor({"x_start": 1, "noise": 1, "t": 1}, ("output",)),
        Floor({"grad": 1, "t": 1}, ("grad_x_start", "grad_noise")),
        options={"normalize": True},
        gradients=("x_start", "noise"),
    )


def training_noising(
    b: int, c: int, h: int, w: int, memory_format: torch.memory_format, dtype: torch.dtype | None = None
) -> Case:
    """What a training step does with the images that it is given: from NCHW to the network's memory format.

    ``dtype`` is that of the result where it is not float32.
    """
    case = noising(b, c, h, w)

    def make_inputs(make: Make) -> dict[str, Any]:
        return case.make_inputs(replace(make, dtype=torch.float32, memory_format=torch.contiguous_format))

    names = {torch.channels_last: "NHWC", torch.contiguous_format: "NCHW"}
    return replace(
        case,
        shape=f"{case.shape}+pictures-to-{names[memory_format]}" + (f"-{dtype}".replace("torch.", "") if dtype else ""),
        make_inputs=make_inputs,
        backward=None,
        options={**case.options, "memory_format": memory_format, "dtype": dtype},
        gradients=(),
        images=False,
    )


def start_from_noise(b: int, c: int, h: int, w: int) -> Case:
    """The images in noised images, given the noise."""
    schedules = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")

    def make_inputs(make: Make) -> dict[str, Any]:
        return {"x_t": make.picture(b, c, h, w), "t": make.times(b), "noise": make.image(b, c, h, w)} | make.schedules(
            *schedules
        )

    return Case(
        "predict_start_from_noise",
        image_shape(b, c, h, w),
        predict_start_from_noise,
        make_inputs,
        Floor({"x_t": 1, "noise": 1, "t": 1}, ("output",)),
        Floor({"grad": 1, "t": 1}, ("grad_x_t", "grad_noise")),
        gradients=("x_t", "noise"),
    )


def posterior_mean(b: int, c: int, h: int, w: int) -> Case:
    """The mean of the less noised images, given the images and the noised ones."""
    schedules = ("posterior_mean_coef1", "posterior_mean_coef2")

    def make_inputs(make: Make) -> dict[str, Any]:
        return {
            "x_start": make.picture(b, c, h, w),
            "x_t": make.picture(b, c, h, w),
            "t": make.times(b),
        } | make.schedules(*schedules)

    return Case(
        "q_posterior_mean",
        image_shape(b, c, h, w),
        q_posterior_mean,
        make_inputs,
        Floor({"x_start": 1, "x_t": 1, "t": 1}, ("output",)),
        Floor({"grad": 1, "t": 1}, ("grad_x_start", "grad_x_t")),
        gradients=("x_start", "x_t"),
    )


def sampling_step(kind: str, b: int, c: int, h: int, w: int, *, guided: bool = True, third: bool = True) -> Case:
    """A step of a sampler: ``ancestral``, ``ddim`` or ``dpm_solver_pp_2m``, with guidance or without.

    The ``third`` input is fresh noise, or the x_0 of the step before: DDIM with eta = 0 has none, and the first step of
    DPM-Solver++.
    """
    function = {"ancestral": ancestral_step, "ddim": ddim_step, "dpm_solver_pp_2m": dpm_solver_pp_2m_step}[kind]
    schedules = {
        "ancestral": (
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "posterior_log_variance_clipped",
        )
    }.get(kind, ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"))
    name = {"ancestral": "noise", "ddim": "noise", "dpm_solver_pp_2m": "last_x_start"}[kind]

    def make_inputs(make: Make) -> dict[str, Any]:
        t = make.times(b)
        times = {"t": t} if kind == "ancestral" else {"t": t, "t_previous": t - 1}
        if kind == "dpm_solver_pp_2m" and third:
            times["t_last"] = t + 1
        # One call of the network makes both predictions.
        pred = make.image(2 * b if guided else b, c, h, w)
        inputs = {"x_t": make.picture(b, c, h, w), "pred": pred, **times}
        if third:
            inputs[name] = make.picture(b, c, h, w)
        # As a sampling has them, so that a captured step can be replayed with others.
        settings = {"percentile": 0.9} | ({"cond_scale": 3.0} if guided else {})
        if kind == "ddim" and third:
            settings["eta"] = 1.0
        inputs |= {key: torch.full((1,), value, device=make.device) for key, value in settings.items()}
        return inputs | make.schedules(*schedules)

    inputs = ("pred", name) if third else ("pred",)
    if c * h * w <= 3 * 64 * 64:
        floor = Floor({"x_t": 1, **dict.fromkeys(inputs, 1)}, ("output",), why="an image is held on chip")
    else:
        reads = {"x_t": 2, **dict.fromkeys(inputs, 1), "x_0=x_t": 3}
        floor = Floor(reads, ("x_0=x_t", "output"), why="x_0 is counted three times and then updated")
    return Case(
        f"{kind}_step",
        image_shape(b, c, h, w)
        + ("+guidance" if guided else "")
        + ("" if third else "+eta0" if kind == "ddim" else "+first"),
        function,
        make_inputs,
        floor,
    )


def unet_cases(unet: type[Unet], side: int, batch: int, *, text: bool = True) -> Iterator[Case]:
    """What one of the built-in U-Nets, with its default settings, does with square images of ``side`` pixels.

    Operations of the sampler and of the loss on its images included. Some come more than once. None for images that it
    cannot halve as often as it has to.
    """
    settings = {"attend_at_middle": False, **unet.defaults}
    dim, mults, early = settings["dim"], settings["dim_mults"], settings["memory_efficient"]
    levels = len(mults)
    if side % 2 ** (levels - 1 + early):
        return
    per_level = {
        name: value if isinstance(value, tuple) else (value,) * levels
        for name, value in settings.items()
        if name in ("layer_attns", "layer_cross_attns")
    }
    context = NUM_TIME_TOKENS * (2 if early else 1) + (MAX_LENGTH if text else 0)

    def block(c: int, side: int, skip: int = 0, out: int = 0, cross: bool = False) -> Iterator[Case]:
        out = out or c
        yield group_norm(batch, c, side, side, skip=skip)
        if cross:
            yield row_norm(batch, side * side, out)
            yield attention(batch, side * side, context, shared=False)
            yield row_norm(batch, side * side, out, residual=True)
        for x_bias in (False, True):
            yield group_norm(batch, out, side, side, scale=True, x_bias=x_bias)

    def transformer(c: int, side: int) -> Iterator[Case]:
        yield row_norm(batch, side * side, c)
        yield attention(batch, side * side, side * side, shared=True)
        yield row_norm(batch, side * side, c, residual=True)
        yield channel_norm(batch, c, side, side)
        yield channel_norm(batch, 2 * c, side, side, gelu=True)

    dims = [dim, *(dim * mult for mult in mults)]
    for level in range(levels):
        at = side >> (level + early)
        inner, outer = dims[level + 1] if early else dims[level], dims[level + 1]
        attend, cross = per_level["layer_attns"][level], per_level["layer_cross_attns"][level]
        yield from block(inner, at, cross=cross)
        yield from block(outer, at, skip=inner, cross=cross)
        if attend:
            yield from transformer(inner, at)
            yield from transformer(outer, at)
    yield from block(dims[-1], side >> (levels - 1 + early), cross=True)
    if settings["attend_at_middle"]:
        yield from transformer(dims[-1], side >> (levels - 1 + early))
    yield from block(dim, side)
    for make in (noising, start_from_noise, posterior_mean):
        yield make(batch, 3, side, side)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        for dtype in (None, torch.bfloat16):
            yield training_noising(batch, 3, side, side, memory_format, dtype)
    for guided in (True, False):
        yield sampling_step("ancestral", batch, 3, side, side, guided=guided)
        for kind in ("ddim", "dpm_solver_pp_2m"):
            for third in (True, False):
                yield sampling_step(kind, batch, 3, side, side, guided=guided, third=third)


def attention_cases(side: int, batch: int) -> Iterator[Case]:
    """Attention to text and to the image itself with the head widths that kernels take and no built-in U-Net has."""
    for d in (32, 128):
        for early in (False, True):
            yield attention(batch, side * side, NUM_TIME_TOKENS * (1 + early) + MAX_LENGTH, shared=False, d=d)
        yield attention(batch, side * side, side * side, shared=True, d=d)


def named(cases: list[Case], *, small: bool) -> dict[str, Case]:
    return {case.name: replace(case, small=small) for case in cases}


# Of Base at 64 pixels and Super at 256, where that is quick enough.
_SMALL = [
    group_norm(2, 2048, 8, 8, scale=True, resident=True),
    group_norm(1, 1024, 16, 16, skip=512),
    group_norm(1, 128, 64, 64, scale=True),
    group_norm(1, 128, 64, 64, scale=True, x_bias=True),
    attention(1, 256, 258, shared=False),
    attention(1, 256, 256, shared=True),
    row_norm(1, 1024, 1024, residual=True),
    channel_norm(1, 1024, 32, 32, gelu=True),
    noising(4, 3, 64, 64),
    start_from_noise(4, 3, 64, 64),
    posterior_mean(4, 3, 64, 64),
    sampling_step("ancestral", 4, 3, 64, 64),
    sampling_step("ddim", 2, 3, 64, 64),
    sampling_step("dpm_solver_pp_2m", 2, 3, 64, 64),
    sampling_step("dpm_solver_pp_2m", 1, 3, 128, 128, guided=False),
    replace(sampling_step("ancestral", 1, 3, 256, 256), images=False),
]

# Levels of Base at 64 pixels and of Super at 256, for batches of 2 (one image with guidance) and 16.
_LARGE = [
    group_norm(b, *sizes, skip=skip, scale=not skip)
    for b in (2, 16)
    for sizes, skip in (
        ((512, 64, 64), 0),
        ((512, 64, 64), 512),
        ((1024, 32, 32), 512),
        ((2048, 8, 8), 1536),
        ((128, 128, 128), 0),
        ((128, 256, 256), 0),
        ((256, 64, 64), 256),
    )
] + [
    case
    for b in (2, 16)
    for case in (
        group_norm(b, 512, 64, 64, scale=True, x_bias=True),
        group_norm(b, 2048, 8, 8, scale=True, x_bias=True),
        group_norm(b, 128, 128, 128, scale=True, x_bias=True),
        attention(b, 1024, 258, shared=False),
        attention(b, 64, 258, shared=False),
        attention(b, 1024, 1024, shared=True),
        attention(b, 4096, 4096, shared=True),
        row_norm(b, 1024, 1024),
        row_norm(b, 1024, 1024, residual=True),
        channel_norm(b, 1024, 32, 32),
        channel_norm(b, 2048, 32, 32, gelu=True),
        noising(b, 3, 64, 64),
        noising(b, 3, 256, 256),
        start_from_noise(b, 3, 256, 256),
        posterior_mean(b, 3, 256, 256),
        sampling_step("ancestral", b, 3, 64, 64),
        sampling_step("ancestral", b, 3, 256, 256),
        sampling_step("ancestral", b, 3, 1024, 1024),
        sampling_step("ddim", b, 3, 256, 256),
        sampling_step("dpm_solver_pp_2m", b, 3, 256, 256),
    )
]

CASES: dict[str, Case] = {**named(_SMALL, small=True), **named(_LARGE, small=False)}
assert len(CASES) == len(_SMALL) + len(_LARGE), "two cases of one name"
