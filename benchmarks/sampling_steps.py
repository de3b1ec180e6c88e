"""One step of a sampling, with guidance, as a case: what is done once for a whole sampling is done before."""

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median

import torch

from minimagen_fast import host_memory
from minimagen_fast.Imagen import Imagen
from minimagen_fast.predictions import Task
from minimagen_fast.samplers import Sampler, Update
from minimagen_fast.sampling import repeated_step

from .denoiser_calls import demands
from .denoisers import Network
from .floors import convolution_rate, share_of_matrix_rate
from .imagens import REFERENCE, ImagenVariant, stage
from .measure import Subject
from .parity import relative_distance
from .prepared import Context, Prepared, reference_fits

GUIDANCE = 3.0
SEED = 5
# A step takes as long whatever the schedule. With few timesteps, at the middle one, what the network predicts moves the
# images about as far as the noise does.
TIMESTEPS = 25
NUMBER = TIMESTEPS // 2
# Distance of the new images from the reference's, with the same noise, as a share of how far these are from what they
# would be if the network predicted nothing.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 7e-2}


def prepare(network: Network, variant: ImagenVariant, batch: int, context: Context) -> Prepared:
    """A step, ready to be checked and timed; used for the ablation, too."""
    device = context.device
    imagen = variant.imagen(stage(network), device, timesteps=TIMESTEPS).eval()
    stack, started = ExitStack(), time.perf_counter()

    def begin() -> Callable[[], torch.Tensor]:
        with variant.active(device):
            return _step_of(imagen, network, batch, device, stack)

    step = begin()
    once_before = time.perf_counter() - started
    dtype = variant.dtype(imagen)
    rate = convolution_rate(dtype, device.type == "cuda")
    flops, floor = demands(network, 2 * batch, "forward", dtype, context)

    def subject(_: int) -> torch.Tensor:
        with variant.active(device):
            if isinstance(imagen, Imagen):
                # As a sampling begins; the reference, with which it is compared, has set it otherwise.
                host_memory.keep_freed(imagen.acceleration.freed_memory == "kept")
            return step()

    def begin_again() -> Subject:
        nonlocal step
        stack.close()
        step = begin()
        return subject

    def wrong(images: torch.Tensor) -> str | None:
        expected, without = _expected(network, batch, device)
        distance = relative_distance([images - without], [expected - without])
        allowed = TOLERANCE[dtype]
        if not distance <= allowed:
            return f"images {distance:.2g} away from the reference's, {allowed:.2g} is allowed"
        return None

    # For the first call, which is compared.
    torch.manual_seed(SEED)
    return Prepared(
        subject,
        wrong,
        steady=not variant.compiles(device),
        count_launches=True,
        memory_of=variant.without_graphs(imagen, begin_again),
        bytes=floor.bytes,
        flops=flops,
        floor=floor,
        extra={**variant.about(imagen, device), "guidance": GUIDANCE, "once_before_seconds": once_before},
        more=lambda samples: {"mfu": share_of_matrix_rate(flops, median(samples), rate, context.ceilings)},
        close=stack.close,
    )


def first_step_seconds(network: Network, variant: ImagenVariant, device: torch.device) -> float:
    """How long it takes to the end of the first step, from the network on."""
    imagen = variant.imagen(stage(network), device, timesteps=TIMESTEPS).eval()
    started = time.perf_counter()
    with ExitStack() as stack, variant.active(device):
        _step_of(imagen, network, 1, device, stack)().sum().item()
    return time.perf_counter() - started


@functools.lru_cache(maxsize=1)
@reference_fits()
def _expected(network: Network, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's new images, and those of a network that predicts nothing."""
    imagen = REFERENCE.imagen(stage(network), device, timesteps=TIMESTEPS).eval()
    found = []
    for forward in (imagen.unets[-1].forward, lambda x, *_, **__: torch.zeros_like(x)):
        imagen.unets[-1].forward = forward
        with ExitStack() as stack:
            step = _step_of(imagen, network, batch, device, stack)
            torch.manual_seed(SEED)
            found.append(step().clone())
    return found[0], found[1]


def _step_of(
    imagen: torch.nn.Module, network: Network, batch: int, device: torch.device, stack: ExitStack
) -> Callable[[], torch.Tensor]:
    """A function that makes a step with a cascade's last U-Net. What it needs until the end goes on the stack."""
    inputs = network.inputs(batch, device)
    x = inputs.pop("x")
    del inputs["time"]
    unet, scheduler = imagen.unets[-1], imagen.noise_schedulers[-1]
    if "lowres_noise_times" in inputs:
        # The same for all images of a sampling.
        inputs["lowres_noise_times"] = inputs["lowres_noise_times"][:1].repeat(batch)
    if not isinstance(imagen, Imagen):
        times = torch.full((batch,), TIMESTEPS - 1 - NUMBER, device=device)
        return functools.partial(
            imagen._p_sample, unet, x, times, noise_scheduler=scheduler, cond_scale=GUIDANCE, **inputs
        )
    task = Task(
        unet=unet,
        update=Update(Sampler(), scheduler, percentile=imagen.dynamic_thresholding_percentile, cond_scale=GUIDANCE),
        cond_scale=GUIDANCE,
        text_embeds=inputs["text_embeds"],
        text_mask=inputs["text_mask"],
        lowres_cond_img=inputs.get("lowres_cond_img"),
        lowres_noise_times=inputs.get("lowres_noise_times"),
        batch_size=None,
    )
    return stack.enter_context(repeated_step(task, x, imagen.acceleration, NUMBER))
