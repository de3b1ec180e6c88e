"""Training steps whose memory and messages are measured, for the tests of ``minimagen-fast plan``."""

import gc
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from minimagen_fast.ema import EMA
from minimagen_fast.Imagen import Imagen
from minimagen_fast.kernels import cpu_products
from minimagen_fast.optimizers import build_optimizer
from minimagen_fast.parallel import TrainedUnet, shard
from minimagen_fast.plan_unet import Network
from minimagen_fast.ranks import open_ranks

CPU = torch.device("cpu")
STEPS, ATTEMPTS = 2, 3
# Wide enough for its weights and its activations to outweigh what is the same in every training.
SETTINGS = {
    "dim": 32,
    "dim_mults": (1, 2),
    "num_resnet_blocks": 1,
    "layer_attns": (False, True),
    "layer_cross_attns": (True, True),
    "text_embed_dim": 512,
}
SMALL = Network("small@16", SETTINGS, 16, 8)
SMALL_SUPER = Network("small-super@32", {**SETTINGS, "dim": 16, "memory_efficient": True, "lowres_cond": True}, 32, 8)
# Of every kind of block one: messages do not depend on sizes.
TINY = Network("tiny@8", {**SETTINGS, "dim": 8, "layer_attns": (False, True), "layer_cross_attns": False}, 8, 4)


class Loop:
    """Steps of a training of the last U-Net, as :class:`.trainer.Trainer` does them."""

    def __init__(self, setup, ranks, how="ddp"):
        torch.manual_seed(0)
        network = setup.network
        self.imagen, unet = network.imagen()
        assert isinstance(self.imagen, Imagen)
        self.imagen.accelerate(precision=setup.precision, checkpoint_levels=setup.checkpoint_levels)
        number = len(self.imagen.unets)
        if ranks.size > 1 and how != "ddp":
            shard(unet, ranks, CPU, how, torch.bfloat16 if setup.gather == 2 else None)
        self.optimizer = build_optimizer(self.imagen, {number: 1e-4})
        self.trained = TrainedUnet(self.imagen, number, ranks)
        self.average = EMA(unet, 0.99) if setup.ema else None
        self.accumulate = setup.accumulate
        self.images = torch.rand(setup.batch, 3, network.side, network.side)
        self.text = {
            "text_embeds": torch.randn(setup.batch, network.tokens, 512),
            "text_masks": torch.ones(setup.batch, network.tokens, dtype=torch.bool),
        }

    def step(self):
        for batch in range(self.accumulate):
            with self.trained.exchanging(batch + 1 == self.accumulate):
                # New every time, as from a loader.
                text = {name: value.clone() for name, value in self.text.items()}
                self.trained.loss(self.images.clone(), **text).backward()
        torch.nn.utils.clip_grad_norm_(self.trained.unet.parameters(), 1.0)
        self.optimizer.step()
        self.imagen.zero_grad(set_to_none=True)
        if self.average:
            self.average.update()


def measured_peak(setup, ranks, how="ddp"):
    """Most bytes that torch's CPU allocator had given out at one time in a training, by torch's profiler."""
    gc.collect()  # what an earlier training left must not be freed in this one
    # The plan counts the library's attention; that of some processors keeps more, for speed.
    library = mock.patch.object(cpu_products, "_onednn_is_faster", return_value=False)
    with library, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loop = Loop(setup, ranks, how)
        for _ in range(STEPS):
            loop.step()
        del loop
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Messages(TorchDispatchMode):
    """Bytes of the tensors that go into collectives, or, for an all-gather, come out of one, by kind."""

    KINDS = {
        "allreduce_": "all_reduce",
        "_allgather_base_": "all_gather",
        "_reduce_scatter_base_": "reduce_scatter",
        "broadcast_": "broadcast",
    }

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace == "c10d":
            kind = self.KINDS[name.split(".")[0]]
            whole = args[1] if kind == "reduce_scatter" else args[0]
            for tensor in whole if isinstance(whole, list | tuple) else [whole]:
                self.bytes[kind, tensor.numel() > 4] += tensor.nbytes
        return func(*args, **(kwargs or {}))


def measure(cases):
    """Messages of a step and, where it is wanted, least peak memory on this rank, for each setup and strategy."""
    found = []
    with open_ranks(CPU) as ranks:
        for setup, how, with_memory in cases:
            loop = Loop(setup, ranks, how)
            for _ in range(2):  # DDP arranges its buckets anew after the first
                loop.step()
            with Messages() as messages:
                loop.step()
            del loop
            sent = {kind: size for (kind, large), size in messages.bytes.items() if large}
            # Now and then Gloo's threads still hold a copy of the gradients when the next pass is at its peak.
            peaks = [measured_peak(setup, ranks, how) for _ in range(ATTEMPTS if with_memory else 0)]
            found.append((sent, min(peaks, default=None)))
    return found


def folder_of_results() -> Path:
    """The results of the benchmark suite that are kept with the project."""
    return Path(__file__).resolve().parent.parent / "benchmarks" / "results"
