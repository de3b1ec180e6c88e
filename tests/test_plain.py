"""Parts of a U-Net that were replaced or given hooks are called, although code that stands in for them is faster."""

import copy
from contextlib import contextmanager

import pytest
import torch
from fast_path import distance, make_imagen, make_super, make_unet, make_words, sample
from torch import nn

from minimagen_fast.layers import (
    Attention,
    Block,
    ChanFeedForward,
    ChanLayerNorm,
    CrossAttention,
    LayerNorm,
    Residual,
    ResnetBlock,
    TransformerBlock,
)
from minimagen_fast.plain import is_plain, is_plain_sequence, is_untouched

WORDS = make_words()


class Adapter(nn.Module):
    """A layer and another that was trained beside it, as in LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, copy.deepcopy(base)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in self.more.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        return self.base(x) + self.more(x)

    @torch.no_grad()
    def merge(self):
        for own, other in zip(self.base.parameters(), self.more.parameters(), strict=True):
            own.add_(other)
        return self.base


def replace(module, kinds, new):
    """Put ``new(part)`` in the place of every part of these classes."""
    for name, part in module.named_children():
        if type(part) in kinds:
            setattr(module, name, new(part))
        else:
            replace(part, kinds, new)
    return module


def with_adapters(module):
    return replace(module, (nn.Linear, nn.Conv2d), Adapter)


def merged(module):
    return replace(copy.deepcopy(module), (Adapter,), Adapter.merge)


def forward(unet, **changed):
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    given = {"text_embeds": WORDS["text_embeds"], "text_mask": WORDS["text_masks"], "cond_drop_prob": 0.0}
    if unet.lowres_cond:
        given |= {"lowres_cond_img": images.flip(0), "lowres_noise_times": torch.tensor([2, 2])}
    return unet(images, torch.tensor([3, 7]), **given, **changed)


@pytest.mark.parametrize("make", [make_unet, make_super])
def test_adapters_are_the_merged_weights_in_a_u_net(make):
    unet = make()
    before = forward(unet)
    with_adapters(unet)
    expected = forward(merged(unet))
    assert distance(forward(unet), expected) < 1e-4 < 1e-2 < distance(before, expected)


def test_adapters_are_trained():
    unet = with_adapters(make_unet())
    forward(unet).square().mean().backward()
    without = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["null_text_hidden"]


@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
def test_adapters_are_the_merged_weights_in_sampling(cond_scale):
    unets = [with_adapters(make_unet()), with_adapters(make_super())]
    arguments = {"cond_scale": cond_scale, "sampler": "ddim", "steps": 4}
    expected = sample(make_imagen(unets=[merged(unet) for unet in unets]), **arguments)
    assert distance(sample(make_imagen(unets=unets), **arguments), expected) < 1e-3


@pytest.mark.parametrize("make", [make_unet, make_super])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_every_part_runs_its_hooks_and_sees_what_it_makes_itself(make, kind):
    unet = make()
    expected = forward(unet)
    called = set()
    parts = {name: part for name, part in unet.named_modules() if not isinstance(part, nn.ModuleList)}
    for name, part in parts.items():
        getattr(part, f"register_{kind}_hook")(lambda *_, name=name: called.add(name))
    result = forward(unet)
    result.square().mean().backward()
    assert distance(result, expected) < 1e-5
    # No gradient depends on the first part of the time embedding.
    assert set(parts) - called == {name for name in parts if name.endswith("hiddens.0") and "back" in kind}


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 0.5 * self.inner(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_of_the_time_may_be_replaced(dtype):
    unet = make_super().to(dtype)
    before = forward(unet)
    for name in ("to_time_hiddens", "to_lowres_time_hiddens"):
        setattr(unet, name, Scaled(getattr(unet, name)))
    replaced = forward(unet)
    for name in ("to_time_hiddens", "to_lowres_time_hiddens"):
        setattr(unet, name, getattr(unet, name).inner)
        getattr(unet, name).register_forward_hook(lambda module, args, result: 0.5 * result)
    assert torch.equal(replaced, forward(unet)) and distance(before, replaced) > 1e-3


FOREIGN = {
    "Attention": (lambda: Attention(16, heads=2, dim_head=8), (2, 5, 16)),
    "TransformerBlock": (lambda: TransformerBlock(16, heads=2, dim_head=8), (2, 16, 4, 4)),
    "Residual": (lambda: Residual(Attention(16, heads=2, dim_head=8)), (2, 5, 16)),
    "ChanFeedForward": (lambda: ChanFeedForward(16), (2, 16, 4, 4)),
}


class PlainNorm(nn.Module):
    """A norm of someone else's, which takes its input and nothing else."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x)


class PlainAttention(PlainNorm):
    def forward(self, x, context=None):
        return self.norm(x, context)


@pytest.mark.parametrize("name", FOREIGN)
def test_parts_of_others_need_not_know_of_our_arguments(name):
    make, shape = FOREIGN[name]
    module, x = make(), torch.randn(shape)
    expected = module(x)
    replace(module, (LayerNorm, ChanLayerNorm), PlainNorm)
    assert distance(module(x), expected) < 1e-5
    replace(module, (Attention,), PlainAttention)
    assert distance(module(x), expected) < 1e-5


def test_an_activation_that_was_replaced():
    block, x = Block(16, 8), torch.randn(2, 16, 4, 4)
    block.activation = nn.ReLU()
    scale, shift = torch.randn(2, 2, 16, 1, 1)
    expected = block.project(torch.relu(block.groupnorm(x) * (scale + 1) + shift))
    assert distance(block(x, (scale, shift)), expected) < 1e-5
    both = block(x[:, :10], (scale, shift), skip=x[:, 10:] * 2, skip_scale=0.5)
    assert distance(both, expected) < 1e-5


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(approximate="tanh")], ids=str)
def test_an_activation_of_the_feed_forward_that_was_replaced(activation):
    module, x = ChanFeedForward(16), torch.randn(2, 16, 4, 4)
    module[2] = activation
    norm, widen, _, hidden_norm, narrow = module
    assert distance(module(x), narrow(hidden_norm(activation(widen(norm(x)))))) < 1e-6
    del module[2:4]
    assert distance(module(x), narrow(widen(norm(x)))) < 1e-6


def test_products_with_a_bias_that_the_original_has_not():
    module = CrossAttention(16, context_dim=12, heads=2, dim_head=8)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 12)
    expected = module(x, context)
    for owner, name in ((module, "to_q"), (module, "to_kv"), (module.to_out, "0")):
        old = getattr(owner, name)
        new = nn.Linear(old.in_features, old.out_features)
        new.weight.data = old.weight.data
        new.bias.data.zero_()
        setattr(owner, name, new)
        assert distance(module(x, context), expected) < 1e-5
        new.bias.data.normal_()
        assert distance(module(x, context), expected) > 1e-3
        new.bias.data.zero_()


def test_a_residual_convolution_with_wider_kernels():
    block, x, skip = ResnetBlock(16, 8), torch.randn(2, 10, 4, 4), torch.randn(2, 6, 4, 4)
    convolution = nn.Conv2d(16, 8, 3, padding=1)
    convolution.weight.data.zero_()
    convolution.weight.data[:, :, 1, 1] = block.res_conv.weight.data[:, :, 0, 0]
    convolution.bias.data = block.res_conv.bias.data
    expected = block(x, skip=skip, skip_scale=0.5)
    block.res_conv = convolution
    assert distance(block(x, skip=skip, skip_scale=0.5), expected) < 1e-5
    convolution.weight.data[:, :, 0, 0] = 1.0
    assert distance(block(x, skip=skip, skip_scale=0.5), expected) > 1e-2


@contextmanager
def a_hook_of_all_modules(unet, kind):
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, result: 0.9 * result if type(module) is kind else None
    )
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def another_forward_of_the_class(unet, kind):
    forward = kind.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", lambda module, x: 0.9 * forward(module, x))
        yield


@contextmanager
def another_convolution(unet, kind):
    for part in unet.modules():
        if type(part) is kind:
            part._conv_forward = lambda *args, part=part: 0.9 * kind._conv_forward(part, *args)
    yield


@pytest.mark.parametrize("make", [make_unet, make_super])
@pytest.mark.parametrize(
    "change, kind",
    [
        *((a_hook_of_all_modules, kind) for kind in (nn.GroupNorm, nn.Conv2d, nn.Linear)),
        *((another_forward_of_the_class, kind) for kind in (nn.GroupNorm, nn.Conv2d, nn.Linear, nn.SiLU)),
        (another_convolution, nn.Conv2d),
    ],
)
@torch.no_grad()
def test_what_is_done_to_all_modules_of_a_class_is_heard(make, change, kind):
    unet, hooked = make(), make()
    for part in hooked.modules():
        if type(part) is kind:
            part.register_forward_hook(lambda module, args, result: 0.9 * result)
    before, expected = forward(unet), forward(hooked)
    with change(unet, kind):
        assert distance(forward(unet), expected) < 1e-5 < 1e-3 < distance(before, expected)


@pytest.mark.parametrize("change", [a_hook_of_all_modules, another_forward_of_the_class, another_convolution])
def test_what_is_done_to_all_modules_of_a_class_is_heard_in_sampling(change):
    imagen, run = make_imagen(), {"sampler": "ddim", "steps": 2, "cond_scale": 2.0}
    before = sample(imagen, **run)
    with change(imagen.unets[0], nn.Conv2d):
        expected = sample(imagen.accelerate("reference"), **run)
        assert distance(sample(imagen.accelerate(), **run), expected) < 1e-4 < 1e-3 < distance(before, expected)


class TestIsPlain:
    def test_is_plain(self):
        linear = nn.Linear(2, 2)
        assert is_plain(linear, nn.Linear) and is_plain(linear, nn.Conv2d, nn.Linear)
        assert not is_plain(linear, nn.Conv2d)
        assert not is_plain(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear)
        linear.compile()
        assert not is_plain(linear, nn.Linear)

    def test_a_forward_of_its_own(self):
        linear = nn.Linear(2, 2)
        linear.forward = lambda x: x
        assert not is_untouched(linear)

    def test_is_plain_sequence(self):
        sequence = nn.Sequential(nn.SiLU(), nn.Linear(2, 2))
        assert is_plain_sequence(sequence, nn.SiLU, nn.Linear)
        assert not is_plain_sequence(sequence, nn.SiLU)
        assert not is_plain_sequence(sequence, nn.SiLU, nn.Conv2d)
        assert not is_plain_sequence(None, nn.SiLU)
        sequence[1].register_forward_hook(lambda *_: None)
        assert not is_plain_sequence(sequence, nn.SiLU, nn.Linear)
