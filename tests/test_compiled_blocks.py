"""Whatever is done to a model whose blocks are compiled, they follow: in training and in sampling."""

import copy
import pickle

import pytest
import torch
from fast_path import make_words, randomise, sample

from minimagen_fast import blocks
from minimagen_fast.Imagen import Imagen
from minimagen_fast.Unet import BaseTest

RUN = {"steps": 2, "sampler": "ddim"}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Dynamo itself, with its guards, and a backend that runs what it is given as it is; counts what it is given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(blocks._forward, dynamic=False, backend=backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_compiled_forward", lambda kind: function)
        yield graphs
    torch._dynamo.reset()


def make_imagen():
    """With few kinds of blocks: tracing takes its time."""
    torch.manual_seed(0)
    unet = randomise(BaseTest(dim_mults=(1,), num_resnet_blocks=0))
    return Imagen(unet, text_encoder_name="t5_small", image_sizes=8, timesteps=20).accelerate(compile="blocks")


def train(imagen):
    """The loss and all gradients of a training step."""
    torch.manual_seed(3)
    imagen.zero_grad()
    loss = imagen(torch.rand(2, 3, 8, 8), **make_words())
    loss.backward()
    return torch.cat([loss.detach().float()[None], *(p.grad.float().flatten() for p in imagen.parameters())])


def results(imagen):
    """Of a training step and of a sampling."""
    return train(imagen), sample(imagen, **RUN)


def not_compiled(imagen):
    """The same model, made anew."""
    other = make_imagen().to(imagen.unets[0].dtype)
    other.load_state_dict(imagen.state_dict())
    return other.accelerate()


def assert_near(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_hooks_are_called_until_they_are_removed(compiled):
    imagen, called = make_imagen(), []
    before = results(imagen)
    assert compiled, "nothing was compiled"

    def double(module, args, out):
        called.append(module)
        return 2 * out

    inner = imagen.unets[0].mid_block1.block1.project
    hook = inner.register_forward_hook(double)
    after = results(imagen)
    # Once in training, once in each step of sampling.
    assert called == 3 * [inner]
    other = not_compiled(imagen)
    other.unets[0].mid_block1.block1.project.register_forward_hook(double)
    assert_near(after, results(other))
    hook.remove()
    assert_near(results(imagen), before)


def load(imagen):
    torch.manual_seed(9)
    imagen.load_state_dict({name: value + 0.2 * torch.randn_like(value) for name, value in imagen.state_dict().items()})
    return imagen


@torch.no_grad()
def in_place(imagen):
    for parameter in imagen.parameters():
        parameter.mul_(1.1)
    return imagen


def copied(imagen):
    return in_place(copy.deepcopy(imagen))


def from_a_file(imagen):
    return in_place(pickle.loads(pickle.dumps(imagen)))


@pytest.mark.parametrize("change", [load, in_place, copied, from_a_file], ids=lambda change: change.__name__)
def test_changes(change):
    imagen = make_imagen()
    before = results(imagen)
    changed = change(imagen)
    after = results(changed)
    assert_near(after, results(not_compiled(changed)))
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(after, before, strict=True))
    if changed is not imagen:
        assert_near(results(imagen), before)


def test_modes_and_back():
    imagen = make_imagen()
    before = results(imagen)
    for mode in (False, True):
        imagen.train(mode)
        imagen.unets[0].mid_block1.train(not mode)
        assert_near(results(imagen), before)


def test_another_dtype_and_back():
    imagen = make_imagen()
    before = train(imagen)
    half = train(imagen.to(torch.bfloat16))
    assert_near([half], [train(not_compiled(imagen))])
    assert imagen.unets[0].final_conv.weight.grad.dtype == torch.bfloat16 and not torch.equal(half, before)
    assert_near([train(imagen.float())], [train(not_compiled(imagen))])
