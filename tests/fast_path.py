"""Small models, words and counts that the tests of the fast path share."""

import dataclasses
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimagen_fast import acceleration, captured_training, cuda_capture, sampled_steps, sampling
from minimagen_fast.ema import EMA
from minimagen_fast.Imagen import Imagen
from minimagen_fast.kept import kept_with
from minimagen_fast.Unet import BaseTest, SuperTest, Unet

T = 20
# Rounding, which the steps carry on; images are in [0, 1].
FLOAT32 = 2e-4
SAMPLERS = [
    {},
    {"steps": 5},
    {"sampler": "ddim", "steps": 5},
    {"sampler": "ddim", "steps": 5, "eta": 0.7},
    {"sampler": "dpmpp_2m", "steps": 5},
]
FEW = {"sampler": "dpmpp_2m", "steps": 4, "cond_scale": 3.0}
ATTENDING = {"layer_attns": (False, True), "layer_cross_attns": (True, False), "attend_at_middle": True}
LOWRES = {"lowres_cond": True, "layer_cross_attns": (False, True)}


@torch.no_grad()
def randomise(module):
    """Gains and biases are made as ones and zeros, behind which an error can hide."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 or name.endswith(".g"):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def make_unet(**arguments):
    torch.manual_seed(0)
    return randomise(BaseTest(**{**ATTENDING, **arguments}))


def make_super(**arguments):
    torch.manual_seed(1)
    return randomise(SuperTest(**{**LOWRES, **arguments}))


def make_imagen(stages=1, unets=None, **arguments):
    """One U-Net for 8x8, or two for 8x8 and 16x16."""
    unets = unets or [make_unet(), make_super()][:stages]
    sizes = tuple(8 * 2**stage for stage in range(len(unets)))
    return Imagen(unets, **{"text_encoder_name": "t5_small", "image_sizes": sizes, "timesteps": T, **arguments})


def make_words(batch=2, tokens=5, seed=1, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.ones(batch, tokens, dtype=torch.bool)
    masks[-1, tokens // 2 :] = False
    embeds = torch.randn(batch, tokens, 512, generator=generator)
    return {"text_embeds": embeds.to(device), "text_masks": masks.to(device)}


def sample(imagen, words=None, *, seed=0, **arguments):
    words = words or make_words(device=imagen.device)
    return imagen.sample(**words, seed=seed, progress=False, **arguments)


def denoise_by(monkeypatch, denoise):
    """Have U-Nets denoise in this way as though they were made so, and nobody had taken a hand."""
    monkeypatch.setattr(Unet, "denoise", denoise)
    monkeypatch.setitem(sampling._OF_COPIES, "denoise", denoise)


def distance(one, other):
    """The largest difference."""
    return (one.float() - other.float()).abs().max().item()


# How far the losses of a training may lie from the reference path's, see docs/training.md.
BANDS = {"float32": 0.02, "bfloat16": 0.05}


def trained(*, steps=200, device="cpu", **request):
    """Losses of a training, and the model, its optimizer and its average at its end."""
    torch.manual_seed(0)
    unet = randomise(BaseTest(dim_mults=(1,)))
    imagen = Imagen(unet, text_encoder_name="t5_small", image_sizes=8, timesteps=T).to(device).accelerate(**request)
    optimizer = torch.optim.AdamW(imagen.parameters(), lr=2e-3)
    averages = EMA(imagen, 0.95)
    torch.manual_seed(1)
    images = torch.rand(4, 3, 1, 1).expand(-1, -1, 8, 8).contiguous().to(device)
    words = make_words(4, device=device)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = imagen(images, **words)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(imagen.parameters(), 1.0)
        optimizer.step()
        averages.update()
        losses.append(loss.detach())
    return torch.stack(losses), imagen, optimizer, averages


def apart(losses, reference):
    """The largest share by which the mean losses of 20 steps differ: of single steps rounding changes more."""
    means, expected = (each.reshape(-1, 20).mean(1) for each in (losses, reference))
    return (means / expected - 1).abs().max().item()


class Counts(TorchDispatchMode):
    """How often which operator runs, on how many rows products and convolutions, and what goes between devices."""

    WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.products, self.between_devices = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        self.names[name] += 1
        if name.partition(".")[0] in ("addmm", "mm", "bmm", "convolution"):
            self.products.append((name, *(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor))))
        out = func(*args, **(kwargs or {}))
        # A single number of the host's is handed over with a launch.
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.ndim]
        if len({x.device for x in tensors}) > 1:
            self.between_devices.append(name)
        return out

    def waits(self):
        """What would wait for a device to know a value of its."""
        return [name for name in self.names if name.partition(".")[0] in self.WAITING]


class FakeGraph:
    """Takes the place of a CUDA graph: what was captured is run when it is replayed.

    Like a true one it knows addresses, and not what lies there: if a tensor has moved, the replay fails.
    """

    made: list["FakeGraph"] = []
    capturing: "FakeGraph | None" = None
    streams: list[str] = []

    def __init__(self):
        self.calls, self.replays, self.memory = [], 0, self
        FakeGraph.made.append(self)

    def pool(self):
        if not self.calls:
            raise RuntimeError("nothing was captured")  # as torch does
        return self.memory

    def replay(self):
        assert self.calls, "nothing was captured"
        self.replays += 1
        for steps, call, addresses in self.calls:
            assert read_by(steps()) == addresses, "a tensor is no longer where it was captured"
            call()

    def reset(self):
        self.calls = []


def tensors_of(conditions):
    """All that conditions hold, by themselves and with others."""
    return [value for one in (conditions, conditions._shared) for value in vars(one).values() if torch.is_tensor(value)]


def read_by(steps):
    """The addresses of all that a step reads."""
    predict, update = steps._predict, steps._update
    tensors = [steps.x, steps.noise, steps.number, steps._x_start, predict._lowres, update.times, update._following]
    tensors += update._schedules
    tensors += [value for conditions in predict._conditions for value in tensors_of(conditions)]
    tensors += [*predict._unet.parameters(), *predict._unet.buffers(), *update._scheduler.buffers()]
    return [tensor.data_ptr() for tensor in tensors if tensor is not None]


def stand_in_for_cuda_graphs(monkeypatch, kind, capture, *, reason):
    """Have a CPU take graphs of a class for CUDA's: ``capture`` stands for ``torch.cuda.graph``."""
    resolve = acceleration.resolve

    def with_graphs(*args, **kwargs):
        resolved = resolve(*args, **kwargs)
        if resolved.condition_cache == "off":
            return resolved
        reasons = {**resolved.reasons, "cuda_graphs": reason}
        return dataclasses.replace(resolved, cuda_graphs="on", reasons=reasons)

    @contextmanager
    def checked(graph, *, stream, capture_error_mode, pool=None):
        assert capture_error_mode == "thread_local", "other threads may disturb the capture"
        graph.memory = pool or graph
        with capture(graph):
            yield

    kind.made = []
    monkeypatch.setattr("minimagen_fast.Imagen.resolve", with_graphs)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", kind)
    monkeypatch.setattr(torch.cuda, "graph", checked)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_capture, "_spoiled", set())
    monkeypatch.setattr(cuda_capture, "_stream", lambda device: f"capture on {device}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"before on {device}")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    return kind.made


def fake_cuda_graphs(monkeypatch, *, reason="always, in this test"):
    """Every sampling on a CPU captures and replays; gives the list of the graphs that are made."""

    @contextmanager
    def capture(graph):
        FakeGraph.capturing = graph
        try:
            yield
        finally:
            FakeGraph.capturing = None

    advance = sampled_steps.Steps.advance

    def run_or_capture(steps, first):
        graph = FakeGraph.capturing
        if graph is None:
            advance(steps, first)
        else:
            # Steps hold their graph, which knows addresses only.
            found = weakref.ref(steps)
            graph.calls.append((found, lambda: advance(found(), first), read_by(steps)))

    FakeGraph.streams = []
    made = stand_in_for_cuda_graphs(monkeypatch, FakeGraph, capture, reason=reason)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: FakeGraph.streams.append(stream))
    monkeypatch.setattr(sampled_steps.Steps, "advance", run_or_capture)
    # Training has a stand-in of its own.
    monkeypatch.setattr(captured_training, "_may_be_replayed", lambda inputs: False)
    return made


def watched_recordings(monkeypatch):
    """Every sampling on a CPU records a step as soon as it may; gives the list of the recordings that are made."""
    made, record = [], sampled_steps.record_in_place

    def counted(step, written):
        replay = record(step, written)
        # Who records a step makes it.
        recording = SimpleNamespace(replays=1)
        made.append(recording)

        def run():
            recording.replays += 1
            replay()

        return run

    monkeypatch.setattr(sampled_steps, "record_in_place", counted)
    monkeypatch.setattr(sampled_steps, "_PAID_BACK_BY", 0)
    return made


def run(imagen, preset="auto", *, arguments=FEW, words=None, **settings):
    return sample(imagen.accelerate(preset, **settings), words, **arguments)


def kept_graphs(imagen):
    """The steps that are kept with the first U-Net."""
    return list(kept_with(imagen.unets[0]).graphs.values())


class Refused(RuntimeError):
    pass


@contextmanager
def refuse(graph, **_):
    """In the place of ``torch.cuda.graph``: a capture that fails."""
    raise Refused("operation not permitted when stream is capturing")
    yield
