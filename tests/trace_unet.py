"""Trace U-Nets with the Triton choice forced, on meta tensors; run as a program without Triton's interpreter.

Prints one line of JSON. Of whole U-Nets: how often they were compiled, and the operators in the graphs. Of the blocks
of one that is sampled: how many graphs there were after each step, the operators in them and their inputs, and whether
one was given more conditions than images.
"""

import json

import torch
from fast_path import make_imagen, make_words

from minimagen_fast import blocks
from minimagen_fast.kernels import use_implementation
from minimagen_fast.Unet import Base, Super

# As deep as the real ones, but narrow: what is traced depends on the structure. One block of a level is like another.
NARROW = {"dim": 16, "cond_dim": 32, "num_resnet_blocks": (1, 1, 1, 2)}
UNETS = {
    "Base": (Base, {**NARROW, "attend_at_middle": True}, 32),
    "Super": (Super, {**NARROW, "lowres_cond": True}, 64),
}


def sampled() -> dict:
    graphs, inputs, after_step, repeats = [], set(), [], []

    def keep(graph, example_inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method")})
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        inputs.update(names)
        given = {name: x for name, x in zip(names, example_inputs, strict=True) if "parameters" not in name}
        conditions = [x for name, x in given.items() if "scale_shift" in name]
        repeats.append(any(len(rows) > len(x) for rows in conditions for x in given.values() if x.ndim == 4))
        return graph.forward

    function = torch.compile(blocks._forward, dynamic=False, fullgraph=True, backend=keep)
    blocks._compiled_forward = lambda kind: function
    imagen = make_imagen().to(torch.bfloat16).to("meta").accelerate(compile="blocks")
    with use_implementation("triton"):
        imagen.sample(
            **make_words(device="meta"),
            cond_scale=3.0,
            sampler="dpmpp_2m",
            steps=3,
            progress=False,
            callback=lambda *step: after_step.append(len(graphs)),
        )
    operators = sorted(set().union(*graphs))
    return {"graphs": after_step, "operators": operators, "inputs": sorted(inputs), "repeats": any(repeats)}


def whole(name: str) -> dict:
    make, arguments, side = UNETS[name]
    unet = make(**arguments).to("meta").to(memory_format=torch.channels_last)
    graphs = []

    def keep(graph, example_inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return aot_eager(graph, example_inputs)

    aot_eager = torch._dynamo.backends.registry.lookup_backend("aot_eager")
    compiled = torch.compile(unet, fullgraph=True, backend=keep)
    meta = {"device": "meta"}
    with use_implementation("triton"):
        for step in range(3):
            # Timesteps are values in a tensor and, when a caller has them as numbers, new tensors every time.
            condition = {
                "text_embeds": torch.randn(2, 7, 512, **meta),
                "text_mask": torch.ones(2, 7, dtype=torch.bool, **meta),
            }
            if unet.lowres_cond:
                condition["lowres_cond_img"] = torch.randn(2, 3, side, side, **meta)
                condition["lowres_noise_times"] = torch.full((2,), step, **meta)
            x = torch.randn(2, 3, side, side, **meta).to(memory_format=torch.channels_last)
            x.requires_grad_()
            out = compiled(x, torch.full((2,), 900 - 100 * step, **meta), **condition)
            assert out.shape == x.shape
            (out * torch.randn(out.shape, **meta)).sum().backward()
            assert x.grad.shape == x.shape
            missing = [n for n, p in unet.named_parameters() if p.grad is None]
            assert not missing, missing
    return {"graphs": len(graphs), "operators": sorted(set().union(*graphs))}


if __name__ == "__main__":
    results = {name: whole(name) for name in UNETS}
    torch._dynamo.reset()
    print(json.dumps({**results, "sampled": sampled()}))
