"""Steps of training for tests of those that are captured or recorded, and what may come in their way."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from fast_path import make_words

from minimagen_fast import captured_training, recorded_training
from minimagen_fast.diffusion_model import GaussianDiffusion
from minimagen_fast.helpers import identity
from minimagen_fast.recorded import Recording, record
from minimagen_fast.Unet import Unet

BATCH = 3
BACKWARD_PASSES_FIRST = captured_training._BACKWARD_PASSES_FIRST


def loss_of(imagen, seed=0, *, batch=BATCH, tokens=5, masked=True, stage=None, **options):
    torch.manual_seed(seed)
    images, words = torch.rand(batch, 3, 20, 20), make_words(batch, tokens, seed=seed)
    if not masked:
        del words["text_masks"]
    return imagen(images, **words, unet_number=stage, **options)


def gradients_of(imagen):
    return [None if p.grad is None else p.grad.clone() for p in imagen.parameters()]


def step(imagen, seed=0, **options):
    """Loss and gradients of a step."""
    imagen.zero_grad()
    loss = loss_of(imagen, seed, **options)
    loss.backward()
    return loss.detach(), gradients_of(imagen)


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs))


def eager(monkeypatch, imagen, seed=0, **options):
    """The step as it is, of a copy."""
    with monkeypatch.context() as patched:
        patched.setattr(captured_training, "_may_be_replayed", lambda inputs: False)
        return step(copy.deepcopy(imagen), seed, **options)


def warm(imagen, **options):
    """Until the next step is captured, or recorded."""
    for seed in range(BACKWARD_PASSES_FIRST):
        step(imagen, seed, **options)


def freeze(unet):
    for parameter in unet.downs.parameters():
        parameter.requires_grad_(False)


def replace(unet):
    unet.final_conv = copy.deepcopy(unet.final_conv)


def other_eps(unet):
    unet.mid_block1.block1.groupnorm.eps = 0.1


def other_loss(imagen):
    imagen.loss_fn = torch.nn.functional.l1_loss


def not_normalised(imagen):
    imagen.normalize_img = identity


def other_schedule(imagen):
    imagen.noise_schedulers[0] = GaussianDiffusion(timesteps=30)


def weighed(imagen):
    return {"min_snr_gamma": 5.0}


def hooked(imagen, called):
    imagen.unets[0].mid_block1.register_forward_hook(lambda *_: called.append(1))


class Own(torch.nn.Conv2d):
    pass


def of_another_class(imagen, called):
    def forward(x):
        called.append(1)
        return torch.nn.Conv2d.forward(own, x)

    own = Own(imagen.unets[0].final_conv.in_channels, 3, 1)
    own.forward = forward
    imagen.unets[0].final_conv = own


def with_another_loss(imagen, called):
    @dataclasses.dataclass
    class Loss:  # which has no hash
        scale: float = 2.0

        def __call__(self, *tensors, **options):
            called.append(1)
            return self.scale * torch.nn.functional.l1_loss(*tensors, **options)

    imagen.loss_fn = Loss()


def with_other_noise(imagen, called):
    scheduler = imagen.noise_schedulers[0]
    noised = scheduler.q_sample
    scheduler.q_sample = lambda *args, **options: called.append(1) or noised(*args, **options)


def with_a_hook_of_all_modules(imagen, called):
    final = imagen.unets[0].final_conv
    return torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(1) if module is final else None
    ).remove


def with_another_forward_of_a_class(imagen, called):
    patch, final, forward = pytest.MonkeyPatch(), imagen.unets[0].final_conv, torch.nn.Conv2d.forward

    def counted(module, x):
        if module is final:
            called.append(1)
        return forward(module, x)

    patch.setattr(torch.nn.Conv2d, "forward", counted)
    return patch.undo


def counting(called, method):
    return lambda *args, **options: called.append(1) or method(*args, **options)


def with_a_method(imagen, called):
    unet = imagen.unets[0]
    unet.denoise = counting(called, unet.denoise)


def with_another_method_of_the_class(imagen, called):
    patch = pytest.MonkeyPatch()
    patch.setattr(Unet, "_text_tokens", counting(called, Unet._text_tokens))
    return patch.undo


def parametrised(imagen, called):
    class Scaled(torch.nn.Module):
        def forward(self, weight):
            called.append(1)
            return weight * 2

    torch.nn.utils.parametrize.register_parametrization(imagen.unets[0].final_conv, "weight", Scaled(), unsafe=True)
    called.clear()


INTERFERENCES = [
    hooked,
    of_another_class,
    with_another_loss,
    with_other_noise,
    with_a_hook_of_all_modules,
    with_another_forward_of_a_class,
    with_a_method,
    with_another_method_of_the_class,
    parametrised,
]


def replays(graphs):
    """How often each pair of graphs was replayed: (forward, backward)."""
    return [(forward.replays, backward.replays) for forward, backward in zip(graphs[::2], graphs[1::2], strict=True)]


def count_recordings(monkeypatch):
    """The recordings that are made, and how often each has run: forward passes, backward passes."""
    made = []

    def counted(*args):
        recording, runs = record(*args), SimpleNamespace(passes=[0, 0])
        made.append(runs)

        def run(**inputs):
            runs.passes[0] += 1
            passes = recording.run(**inputs)
            gradient = yield next(passes)
            runs.passes[1] += 1
            yield passes.send(gradient)

        return Recording(run, recording.kept)

    monkeypatch.setattr(recorded_training, "record", counted)
    return made
