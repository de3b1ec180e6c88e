"""What tests/test_aot.py asks of the ahead-of-time table; run as a program without Triton's interpreter.

It prints as JSON what is wrong with some kernels made for it, by kernel and target, and which builds each U-Net needs
that the enumeration does not have.
"""

import functools
import json
from contextlib import contextmanager, nullcontext, suppress

import torch

from benchmarks import aot_builds, aot_code, aot_table
from minimagen_fast.Imagen import Imagen
from minimagen_fast.kernels import launch
from minimagen_fast.kernels.launch import tl, triton
from minimagen_fast.plan_autocast import autocast_as_on_cuda
from minimagen_fast.Unet import Base, BaseTest, Super, SuperTest, Unet

LAYOUTS = ("channels_last", "contiguous")
SAMPLERS = [
    {"sampler": "ddpm", "cond_scale": 3.0},
    {"sampler": "ddim", "steps": 5},
    {"sampler": "ddim", "steps": 5, "eta": 0.5},
    {"sampler": "dpmpp_2m", "steps": 5, "cond_scale": 3.0},
]


@triton.jit
def good(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def spilling(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < n).to(tl.float32)
    # Needed twice, so that all of the tile must stay somewhere.
    tl.store(out + at, values - tl.sum(values, 0), mask=at < n)


@triton.jit
def strided(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + 3 * at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def product(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tile = tl.load(x + at)
    tl.store(out + at, tl.dot(tile, tile).to(tl.bfloat16))


def of_kernels() -> dict[str, dict]:
    x = torch.empty(1 << 20, dtype=torch.bfloat16, device="meta")
    unaligned = x[1:]
    with launch.record() as recorded:
        launch.run(good, (1,), x, x, x.numel(), BLOCK=4096)
        launch.run(spilling, (1,), x, x, x.numel(), BLOCK=65536)
        launch.run(strided, (1,), x, x, x.numel(), BLOCK=4096)
        launch.run(product, (1,), x, x, x.numel(), BLOCK=128)
        launch.run(good, (1,), unaligned, unaligned, x.numel(), BLOCK=4096)
    builds = [aot_builds.specialise(one, capability) for one in recorded for capability in aot_builds.TARGETS]
    rows = list(aot_code.compile_builds(builds))
    return {
        f"{row.kernel} {row.target}" + (" unaligned" if "?" in row.config else ""): {
            "complaints": aot_code.complaints(row),
            "products": row.products,
            "widths": [row.load, row.store],
            "table": row == aot_table.parse(aot_table.table([row]))[row.key],
        }
        for row in rows
    }


class _EnoughSteps(Exception):
    """Ends a sampling."""


def two_steps(imagen: Imagen, **arguments) -> None:
    """Of a sampling: the first differs from the others, which are alike."""

    def end(unet_number: int, step: int, images: torch.Tensor) -> None:
        if step == 1:
            raise _EnoughSteps

    with suppress(_EnoughSteps):
        imagen.sample(**arguments, callback=end, progress=False, device="meta")


UNETS = {Base: (16, {}), Super: (32, {"lowres_cond": True}), BaseTest: (16, {}), SuperTest: (16, {"lowres_cond": True})}


@functools.cache
def enumerated(side: int) -> dict[aot_builds.Build, bool]:
    # Guidance makes twice as many images.
    return aot_builds.enumerate_builds([(side, batch) for batch in (2, 4)], targets=[90])


def of_unet(unet: type[Unet]) -> dict:
    """What training steps need, loss and noising included, and sampling: float32, autocast, bfloat16."""
    side, arguments = UNETS[unet]
    with torch.device("meta"):
        model = unet(**arguments)
        before = [BaseTest()] if model.lowres_cond else []
        sizes = (side // 2, side)[-1 - len(before) :]
        imagen = Imagen([*before, model], text_encoder_name="t5_small", image_sizes=sizes)
        words = {"text_embeds": torch.empty(2, 9, 512), "text_masks": torch.ones(2, 9, dtype=torch.bool)}
        images = torch.empty(2, 3, side, side)
    start = {"start_image": torch.empty(2, 3, side // 2, side // 2, device="meta")} if before else {}
    needed: set[aot_builds.Build] = set()

    @contextmanager
    def recorded():
        with launch.record(aot_builds.TARGETS[90]) as launches:
            yield
        # Now, while weights have the dtype that they were launched with.
        needed.update(aot_builds.specialise(one, 90) for one in launches)

    how = {"kernels": "triton", "attention": "triton", "condition_cache": "on"}
    for layout in LAYOUTS:
        imagen.accelerate("reference", **how, memory_format=layout)
        for context in (nullcontext(), autocast_as_on_cuda(model, torch.bfloat16)):
            with recorded(), context:
                imagen(images, **words, unet_number=len(sizes)).backward()
        imagen.accelerate("reference", **how, memory_format=layout, precision="bfloat16")
        for sampler in SAMPLERS:
            with recorded():
                two_steps(imagen, **words, **start, **sampler)
    # Weights that a user has converted: gains and biases, too.
    imagen.to(torch.bfloat16)
    for layout in LAYOUTS:
        imagen.accelerate("reference", **how, memory_format=layout)
        with recorded():
            two_steps(imagen, **words, **start)
            imagen(images, **words, unet_number=len(sizes)).backward()
    return {
        "needed": len(needed),
        "kernels": sorted({one.kernel for one in needed}),
        "missing": sorted(f"{one.kernel} {one.config}" for one in needed - enumerated(side).keys()),
    }


if __name__ == "__main__":
    print(json.dumps({"kernels": of_kernels(), "unets": {unet.__name__: of_unet(unet) for unet in UNETS}}))
