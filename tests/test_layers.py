"""Building blocks on their own."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minimagen_fast import layers


def test_cross_embed_splits_its_channels():
    layer = layers.CrossEmbedLayer(3, kernel_sizes=(7, 3, 15), dim_out=10, stride=1)
    assert [conv.out_channels for conv in layer.convs] == [5, 2, 3]
    assert [conv.kernel_size[0] for conv in layer.convs] == [3, 7, 15]
    assert layer(torch.zeros(1, 3, 8, 8)).shape == (1, 10, 8, 8)


def test_cross_embed_kernels_must_line_up():
    with pytest.raises(ValueError, match="must all be even like the stride 2"):
        layers.CrossEmbedLayer(3, kernel_sizes=(3, 4))


@pytest.mark.parametrize("stride, kernel_sizes", [(1, (3, 7, 15)), (2, (2, 4))])
def test_cross_embed_keeps_its_images_once_under_autocast(stride, kernel_sizes):
    layer, kept = layers.CrossEmbedLayer(3, kernel_sizes=kernel_sizes, dim_out=8, stride=stride), {}
    x = torch.randn(2, 3, 8, 8)

    def keep(tensor):
        if tensor.shape == x.shape:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([conv(x) for conv in layer.convs], dim=1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = layer(x)
    assert torch.equal(out, expected)
    assert [tensor.dtype for tensor in kept.values()] == [torch.bfloat16]


def test_sinusoids():
    embedding = layers.SinusoidalPosEmb(6)(torch.tensor([0, 7]))
    frequencies = torch.tensor([1.0, 0.01, 0.0001])
    torch.testing.assert_close(embedding[1], torch.cat(((7 * frequencies).sin(), (7 * frequencies).cos())))
    for dim in (2, 5):
        with pytest.raises(ValueError, match="even and at least 4"):
            layers.SinusoidalPosEmb(dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sinusoids_are_float32_whatever_the_default(dtype):
    embedding, times = layers.SinusoidalPosEmb(16), torch.tensor([3, 998, 999])
    expected = embedding(times)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(embedding(times), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_channel_layer_norm_is_a_layer_norm_over_channels():
    norm = layers.ChanLayerNorm(6)
    torch.nn.init.normal_(norm.g)
    x = torch.randn(2, 6, 4, 5) * 3 + 2
    expected = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (6,), norm.g.flatten())
    torch.testing.assert_close(norm(x), expected.permute(0, 3, 1, 2))


def test_channel_layer_norm_keeps_its_precision_in_half():
    x = 100 + torch.randn(1, 64, 4, 4)
    norm = layers.ChanLayerNorm(64)
    expected = norm(x.half().float())
    torch.testing.assert_close(norm.half()(x.half()).float(), expected, rtol=0.01, atol=0.01)


def test_block_without_norm():
    block = layers.Block(5, 7, norm=False)
    assert block(torch.zeros(1, 5, 4, 4)).shape == (1, 7, 4, 4)


def test_resnet_block_needs_the_tokens_it_attends_to():
    block = layers.ResnetBlock(8, 8, cond_dim=6, time_cond_dim=4)
    assert block(torch.zeros(1, 8, 4, 4), torch.zeros(1, 4), torch.zeros(1, 3, 6)).shape == (1, 8, 4, 4)
    with pytest.raises(ValueError, match="cond must be given"):
        block(torch.zeros(1, 8, 4, 4), torch.zeros(1, 4))


def test_self_attention_with_context_and_mask():
    attention = layers.Attention(8, dim_head=4, heads=2, context_dim=6)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    mask = torch.ones(2, 3 + 5, dtype=torch.bool)
    everything = attention(x, context)
    torch.testing.assert_close(attention(x, context, mask=mask), everything)
    mask[:, :3] = False
    torch.testing.assert_close(attention(x, context, mask=mask), attention(x))
    assert not torch.allclose(everything, attention(x))
    with pytest.raises(ValueError, match="without context_dim"):
        layers.Attention(8)(x, context)


def test_cross_attention_mask():
    attention = layers.CrossAttention(8, context_dim=6, norm_context=True)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    mask = torch.tensor([[True, True, False]] * 2)
    torch.testing.assert_close(attention(x, context, mask=mask), attention(x, context[:, :2]))


def test_transformer_block_with_context():
    block = layers.TransformerBlock(8, context_dim=6)
    assert block(torch.randn(1, 8, 4, 4), torch.randn(1, 3, 6)).shape == (1, 8, 4, 4)


def test_sums():
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(layers.Residual(layers.Identity())(x), 2 * x)
    torch.testing.assert_close(layers.Parallel(layers.Identity(), layers.Identity())(x), 2 * x)


def test_up_and_downsampling():
    x = torch.randn(1, 4, 8, 6)
    assert layers.Downsample(4, 6)(x).shape == (1, 6, 4, 3)
    assert layers.Upsample(4)(x).shape == (1, 4, 16, 12)


UPSAMPLE_CHANGES = {
    "as it was made": lambda upsample: None,
    "another mode": lambda upsample: setattr(upsample[0], "mode", "bilinear"),
    "another factor": lambda upsample: setattr(upsample[0], "scale_factor", 3),
    "a size": lambda upsample: (setattr(upsample[0], "size", (9, 7)), setattr(upsample[0], "scale_factor", None)),
    "another convolution": lambda upsample: upsample.__setitem__(1, nn.Conv2d(4, 4, 5, padding=2)),
    "dilation": lambda upsample: upsample.__setitem__(1, nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
    "groups": lambda upsample: upsample.__setitem__(1, nn.Conv2d(4, 4, 3, padding=1, groups=2)),
    "stride": lambda upsample: upsample.__setitem__(1, nn.Conv2d(4, 4, 3, padding=1, stride=2)),
    "no padding": lambda upsample: upsample.__setitem__(1, nn.Conv2d(4, 4, 3)),
    "mirrored edges": lambda upsample: upsample.__setitem__(1, nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    "one more": lambda upsample: upsample.append(nn.SiLU()),
    "one less": lambda upsample: upsample.__delitem__(0),
}


@pytest.mark.parametrize("change", UPSAMPLE_CHANGES.values(), ids=UPSAMPLE_CHANGES)
def test_a_changed_upsampling_does_what_its_parts_do(change):
    x, upsample = torch.randn(1, 4, 8, 6), layers.Upsample(4)
    change(upsample)
    with torch.no_grad():
        torch.testing.assert_close(upsample(x), nn.Sequential(*upsample)(x))


def test_a_hook_on_a_part_of_an_upsampling_is_called():
    upsample, called = layers.Upsample(4), []
    upsample[1].register_forward_hook(lambda module, args, out: called.append(args[0].shape) or 2 * out)
    x = torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(upsample(x), 2 * upsample[1].forward(upsample[0](x)))
    assert called == [(1, 4, 6, 6)]


# The bias that one block leaves to the next


class Biases(TorchDispatchMode):
    """Whether each convolution with a 3x3 kernel adds a bias, in their order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name() and args[1].shape[2:] == (3, 3):
            self.seen.append(args[2] is not None)
        return func(*args, **(kwargs or {}))


def resnet_block(**options):
    torch.manual_seed(0)
    block = layers.ResnetBlock(16, 24, time_cond_dim=8, groups=4, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def test_on_a_cpu_images_are_joined_once(monkeypatch):
    block, t = resnet_block(), torch.randn(2, 8)
    x, skip = torch.randn(2, 12, 5, 5), torch.randn(2, 4, 5, 5)
    expected = block(torch.cat((x, 0.7 * skip), dim=1), t)

    def never(*_, **__):
        raise AssertionError("they are in one tensor already")

    monkeypatch.setattr(layers, "conv1x1_concat", never)
    assert torch.equal(block(x, t, skip=skip, skip_scale=0.7), expected)


@pytest.fixture
def apart(monkeypatch):
    """As if the bias of a convolution took a pass of its own, as on a GPU."""
    monkeypatch.setattr(layers, "_adds_bias_apart", lambda device: True)


def assert_biases(block, expected, *args, **kwargs):
    with torch.no_grad(), Biases() as biases:
        actual = block(*args, **kwargs)
    assert biases.seen == expected
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(layers, "_adds_bias_apart", lambda device: False)
        torch.testing.assert_close(actual, block(*args, **kwargs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("time", [True, False])
def test_a_block_leaves_its_bias_to_the_next(apart, time):
    x, t = torch.randn(2, 16, 5, 6), torch.randn(2, 8) if time else None
    assert_biases(resnet_block(), [False, True], x, t)
    skip = torch.randn(2, 4, 5, 6)
    assert_biases(resnet_block(), [False, True], x[:, :12], t, skip=skip, skip_scale=0.7)


def test_a_block_leaves_its_bias_to_the_next_for_more_conditions_than_images(apart):
    assert_biases(resnet_block(), [False, True], torch.randn(2, 16, 5, 6), scale_shift=torch.randn(4, 48))


def test_a_convolution_adds_its_bias_where_another_operation_or_gradients_follow(apart):
    x, t = torch.randn(2, 16, 5, 6), torch.randn(2, 8)
    assert_biases(resnet_block(cond_dim=12), [True, True], x, t, torch.randn(2, 3, 12))
    with Biases() as biases:
        resnet_block()(x, t)
    assert biases.seen == [True, True]


def test_on_a_cpu_convolutions_add_their_bias():
    with torch.no_grad(), Biases() as biases:
        resnet_block()(torch.randn(2, 16, 5, 6), torch.randn(2, 8))
    assert biases.seen == [True, True]


class OtherBlock(layers.Block):
    pass


BLOCK_CHANGES = {
    "a hook": lambda block: block.block1.project.register_forward_hook(lambda module, args, out: out * 2),
    "a hook of the next": lambda block: block.block2.register_forward_hook(lambda module, args, out: out * 2),
    "another activation": lambda block: setattr(block.block2, "activation", nn.GELU()),
    "no norm": lambda block: setattr(block.block2, "groupnorm", layers.Identity()),
    "another block": lambda block: setattr(block, "block2", OtherBlock(24, 24, groups=4)),
    "mirrored edges": lambda block: setattr(block.block1.project, "padding_mode", "reflect"),
    "dilation": lambda block: setattr(
        block.block1, "project", nn.Conv2d(16, 24, 3, padding=2, dilation=2).requires_grad_(False)
    ),
}


@pytest.mark.parametrize("change", BLOCK_CHANGES.values(), ids=BLOCK_CHANGES)
def test_of_changed_blocks_every_part_is_called(apart, change):
    block = resnet_block()
    change(block)
    assert_biases(block, [True, True], torch.randn(2, 16, 5, 6), torch.randn(2, 8))


def test_a_convolution_without_bias(apart):
    block = resnet_block()
    block.block1.project = nn.Conv2d(16, 24, 3, padding=1, bias=False)
    assert_biases(block, [False, True], torch.randn(2, 16, 5, 6), torch.randn(2, 8))


def scaled_by_hand(attention, factor):
    """What the original does: it multiplies the queries."""
    with torch.no_grad():
        attention.to_q.weight *= factor
    return attention


@pytest.mark.parametrize("kind", [layers.Attention, layers.CrossAttention])
def test_the_scale_of_an_attention_counts(kind):
    # Of the second the products of weights are made first: there are few words of little width.
    x, more = torch.randn(2, 16, 8), () if kind is layers.Attention else (torch.randn(2, 2, 8),)
    attention = kind(8, dim_head=16, heads=2)
    before, plain = attention(x, *more), attention.scale
    expected = scaled_by_hand(copy.deepcopy(attention), 3.0)(x, *more)
    attention.scale = 3 * plain
    torch.testing.assert_close(attention(x, *more), expected)
    assert not torch.allclose(expected, before)
    del attention.scale
    attention.scale = nn.Parameter(torch.tensor(3 * plain))
    torch.testing.assert_close(attention(x, *more), expected)
    attention(x, *more).sum().backward()
    assert attention.scale.grad is not None
    attention.scale = nn.Parameter(torch.full((2, 1, 1), 3 * plain))
    torch.testing.assert_close(attention(x, *more), expected)


@pytest.mark.parametrize("shape", [(1, 8), (1, 8, 1, 1), (2, 1, 1, 1), (1, 1), (2, 8, 4, 5), (1, 8, 4, 1)], ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_scale_and_shift_broadcast(shape, norm):
    block, x = layers.Block(8, 8, norm=norm), torch.randn(2, 8, 4, 5)
    scale, shift = torch.randn(shape), torch.randn(2, 8)
    images = scale if scale.ndim == 4 else scale[..., None, None]
    modulated = block.groupnorm(x) * (images + 1) + shift[..., None, None]
    torch.testing.assert_close(block(x, (scale, shift)), block.project(block.activation(modulated)))


def test_one_time_stands_for_all_images():
    block, x, time = layers.ResnetBlock(8, 8, time_cond_dim=4), torch.randn(2, 8, 4, 4), torch.randn(1, 4)
    torch.testing.assert_close(block(x, time), block(x, time.expand(2, -1)))
