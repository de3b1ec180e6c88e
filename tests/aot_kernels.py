"""What tests/test_aot.py asks of the ahead-of-time table; run as a program without Triton's interpreter.

``kernels`` prints as JSON what is wrong with some kernels made for it, by kernel and target, ``unet`` which builds a
U-Net needs that the enumeration does not have.
"""

import json
import sys

import torch

from benchmarks import aot_builds, aot_code, aot_table
from minimagen_fast.kernels import launch, use_implementation
from minimagen_fast.kernels.launch import tl, triton


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


def of_unet(name: str, side: int, arguments: dict) -> dict:
    (unet,) = (unet for unet in aot_builds.UNETS if unet.__name__ == name)
    with torch.device("meta"):
        model = unet(**arguments)
        condition = {"text_embeds": torch.empty(2, 9, 512), "text_mask": torch.ones(2, 9, dtype=torch.bool)}
        times, x = torch.zeros(2, dtype=torch.long), torch.empty(2, 3, side, side)
    if model.lowres_cond:
        condition |= {"lowres_cond_img": x, "lowres_noise_times": times}
    needed = set()
    for memory_format in aot_builds.FORMATS:
        images = x.to(memory_format=memory_format).requires_grad_()
        with use_implementation("triton"), launch.record(aot_builds.TARGETS[90]) as recorded:
            out = model.to(memory_format=memory_format)(images, times, **condition)
            out.backward(torch.empty_like(out))
        needed |= {aot_builds.specialise(one, 90) for one in recorded}
    known = aot_builds.enumerate_builds([(side, 2)], dtypes=[torch.float32], targets=[90])
    return {"needed": len(needed), "missing": sorted(f"{b.kernel} {b.config}" for b in needed - known.keys())}


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    result = of_kernels() if what == "kernels" else of_unet(rest[0], int(rest[1]), json.loads(rest[2]))
    print(json.dumps(result))
