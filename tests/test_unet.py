"""The U-Net beyond the golden vectors: sizes that work, sizes that are refused, dtypes, channels, text lengths."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minimagen_fast.blocks import use_blocks
from minimagen_fast.layers import ResnetBlock
from minimagen_fast.Unet import BaseTest, Super, SuperTest, Unet

TINY = dict(dim=8, dim_mults=(1, 2), layer_attns=False, layer_cross_attns=False)


def _inputs(unet, batch=2, side=16, words=5, dtype=torch.float32):
    torch.manual_seed(0)
    inputs = dict(
        x=torch.randn(batch, unet.channels, side, side, dtype=dtype),
        time=torch.randint(0, 1000, (batch,)),
        text_embeds=torch.randn(batch, words, unet.text_embed_dim, dtype=dtype),
        text_mask=torch.ones(batch, words, dtype=torch.bool),
    )
    if unet.lowres_cond:
        inputs["lowres_cond_img"] = torch.randn(batch, unet.channels, side, side, dtype=dtype)
        inputs["lowres_noise_times"] = torch.randint(0, 1000, (batch,))
    return inputs


@contextmanager
def monitored_products():
    """Numbers of rows of the weights that torch.nn.functional.linear is called with."""
    rows, linear = [], F.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", lambda x, weight, *args: rows.append(len(weight)) or linear(x, weight, *args))
        yield rows


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(dim=9), "multiple of 8"),
        (dict(dim=4), "multiple of 8"),
        (dict(dim=0), "at least 1"),
        (dict(dim=8, dim_mults=(1, 1.3)), "whole numbers of channels"),
        (dict(dim=8, dim_mults=(1, 1.5)), "multiple of 8"),
        (dict(dim=8, dim_mults=()), "at least one entry"),
        (dict(dim=8, dim_mults=(2, 4)), "must start with 1 unless memory_efficient"),
        (dict(dim=8, dim_mults=(1, 2), layer_attns=(True,)), "layer_attns must be one value or 2"),
        (dict(dim=8, dim_mults=(1, 2), num_resnet_blocks=(1, 2, 3)), "num_resnet_blocks must be one value or 2"),
        (dict(dim=8, attn_heads=0), "attn_heads must be at least 1"),
        (dict(dim=8, channels=0), "channels must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Unet(**config)


def test_a_number_that_is_no_int_is_refused():
    with pytest.raises(TypeError, match="dim must be an int"):
        Unet(dim=8.0)


def test_numpy_numbers_are_numbers():
    given = dict(dim=8, dim_mults=[1, 2], channels=4, num_resnet_blocks=[1, 2], attn_heads=2, text_embed_dim=16)
    torch.manual_seed(3)
    expected = Unet(**given)
    torch.manual_seed(3)
    as_numpy = {name: list(np.array(x)) if isinstance(x, list) else np.int64(x) for name, x in given.items()}
    unet = Unet(**as_numpy)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, unet.state_dict()[name]), name
    assert type(unet.channels) is type(unet.channels_out) is type(unet.text_embed_dim) is int
    with pytest.raises(TypeError, match="num_resnet_blocks must be an int, got 1.0"):
        Unet(dim=8, num_resnet_blocks=1.0)


def test_memory_efficient_may_start_with_another_multiple():
    unet = Unet(**{**TINY, "dim_mults": (2, 3)}, memory_efficient=True)
    inputs = _inputs(unet)
    assert unet(**inputs).shape == inputs["x"].shape


@pytest.mark.parametrize("memory_efficient, fits, fails", [(False, 6, 7), (True, 8, 6)])
def test_image_sizes_must_fit_the_levels(memory_efficient, fits, fails):
    unet = Unet(**TINY, memory_efficient=memory_efficient)
    assert unet(**_inputs(unet, side=fits)).shape[-1] == fits
    with pytest.raises(ValueError, match="must be multiples of"):
        unet(**_inputs(unet, side=fails))


def test_images_need_not_be_square():
    unet = Unet(**TINY)
    inputs = _inputs(unet)
    inputs["x"] = torch.randn(2, 3, 8, 12)
    assert unet(**inputs).shape == (2, 3, 8, 12)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("lowres_cond", [False, True])
def test_one_to_four_channels(channels, lowres_cond):
    unet = Unet(**TINY, channels=channels, lowres_cond=lowres_cond)
    inputs = _inputs(unet)
    assert unet(**inputs).shape == inputs["x"].shape


def test_other_output_channels():
    unet = Unet(**TINY, channels=3, channels_out=6)
    assert unet(**_inputs(unet)).shape == (2, 6, 16, 16)


def test_no_further_blocks():
    unet = Unet(**TINY, num_resnet_blocks=0)
    assert unet(**_inputs(unet)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unet_class", [BaseTest, SuperTest])
def test_half_precision_weights(unet_class, dtype):
    torch.manual_seed(0)
    unet = unet_class(lowres_cond=unet_class is SuperTest, attend_at_middle=True, layer_attns=(False, True))
    inputs = _inputs(unet)
    expected = unet(**inputs)
    out = unet.to(dtype)(**inputs)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    out.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in unet.parameters() if p.grad is not None)


def test_autocast():
    torch.manual_seed(0)
    unet = BaseTest(attend_at_middle=True, layer_attns=(False, True), layer_cross_attns=True)
    inputs = _inputs(unet)
    expected = unet(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(**inputs)
        loss = out.float().square().mean()
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in unet.parameters() if p.grad is not None)


def test_large_timesteps_stay_apart_in_half_precision():
    # bfloat16 has no 999: a time that was cast before its sinusoids would be embedded as 1000.
    unet = BaseTest().to(torch.bfloat16)
    inputs = _inputs(unet)
    inputs["x"] = inputs["x"][:1].expand(2, -1, -1, -1)
    inputs["text_embeds"] = inputs["text_embeds"][:1].expand(2, -1, -1)
    inputs["time"] = torch.tensor([999, 1000])
    first, second = unet(**inputs)
    assert not torch.equal(first, second)


def test_text_is_cut_at_256_tokens():
    unet = BaseTest()
    inputs = _inputs(unet, words=300)
    cut = {**inputs, "text_embeds": inputs["text_embeds"][:, :256], "text_mask": inputs["text_mask"][:, :256]}
    torch.testing.assert_close(unet(**inputs), unet(**cut))


def test_an_integer_mask_is_a_mask():
    unet = BaseTest()
    inputs = _inputs(unet)
    inputs["text_mask"][:, 3:] = False
    torch.testing.assert_close(unet(**{**inputs, "text_mask": inputs["text_mask"].long()}), unet(**inputs))
    keep = torch.tensor([True, False])
    torch.testing.assert_close(unet(**inputs, keep_text=keep.long()), unet(**inputs, keep_text=keep))


def test_masked_tokens_have_no_influence_and_others_have():
    unet = BaseTest()
    inputs = _inputs(unet)
    inputs["text_mask"][:, 3:] = False
    expected = unet(**inputs)
    inputs["text_embeds"][:, 3:] += 1.0
    torch.testing.assert_close(unet(**inputs), expected)
    inputs["text_embeds"][:, 2] += 1.0
    assert not torch.allclose(unet(**inputs), expected)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exported_u_net_takes_any_batch(strict):
    unet = BaseTest(dim_mults=(1,), num_resnet_blocks=0, layer_cross_attns=True, attend_at_middle=True, attn_heads=1)
    inputs, batch = _inputs(unet, batch=3), {0: torch.export.Dim("batch", min=2, max=16)}
    shapes = {name: batch for name in inputs}
    with torch.no_grad():
        exported = torch.export.export(unet, (), inputs, dynamic_shapes=shapes, strict=strict).module()
        for size in (2, 16):
            inputs = _inputs(unet, batch=size)
            torch.testing.assert_close(exported(**inputs), unet(**inputs))


def test_guidance_scales():
    unet = BaseTest()
    inputs = _inputs(unet)
    conditional, null = unet(**inputs), unet(**inputs, cond_drop_prob=1.0)
    assert not torch.allclose(conditional, null)
    torch.testing.assert_close(unet.forward_with_cond_scale(**inputs, cond_scale=0.0), null)
    torch.testing.assert_close(unet.forward_with_cond_scale(**inputs), conditional)
    guided = unet.forward_with_cond_scale(**inputs, cond_scale=2.5)
    torch.testing.assert_close(guided, null + 2.5 * (conditional - null))
    # The original fails when the probability is given as well.
    assert torch.equal(unet.forward_with_cond_scale(**inputs, cond_scale=2.5, cond_drop_prob=0.0), guided)


def test_guidance_asks_for_the_prediction_with_text_first():
    unet, seen = BaseTest(), []
    inputs = _inputs(unet)
    unet.final_conv.register_forward_hook(lambda module, given, result: seen.append(result))
    unet.forward_with_cond_scale(**inputs, cond_scale=2.5)
    # As in the original, for hooks that keep what they see.
    torch.testing.assert_close(seen[:2], [unet(**inputs), unet(**inputs, cond_drop_prob=1.0)])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 16, 16)), "x must have shape"),
        (dict(time=torch.zeros(3)), "time must have shape"),
        (dict(text_embeds=torch.zeros(2, 5, 7)), "text_embeds must have shape"),
        (dict(text_mask=torch.ones(2, 6).bool()), "text_mask must have shape"),
        (dict(lowres_cond_img=torch.zeros(2, 3, 16, 16)), "takes no lowres_cond_img"),
        (dict(cond_drop_prob=1.5), "cond_drop_prob must lie in"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    unet = BaseTest()
    with pytest.raises(ValueError, match=message):
        unet(**{**_inputs(unet), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lowres_cond_img=None), "needs lowres_cond_img"),
        (dict(lowres_noise_times=None), "needs lowres_noise_times"),
        (dict(lowres_cond_img=torch.zeros(2, 3, 8, 8)), "lowres_cond_img must have the shape of x"),
        (dict(lowres_noise_times=torch.zeros(1)), "lowres_noise_times must have shape"),
    ],
)
def test_low_resolution_inputs_that_do_not_fit_are_refused(change, message):
    unet = SuperTest(lowres_cond=True)
    with pytest.raises(ValueError, match=message):
        unet(**{**_inputs(unet), **change})


def test_built_in_sizes_take_overrides():
    with torch.device("meta"):
        unet = Super(dim=64, lowres_cond=True)
    assert unet.init_conv.convs[0].weight.shape[:2] == (32, 6)


def test_lists_stand_for_tuples():
    # A training directory's JSON files have lists.
    lists = dict(dim_mults=[1, 2], num_resnet_blocks=[1, 2], layer_attns=[False, True], layer_cross_attns=[True, False])
    unet = Unet(dim=8, **lists)
    assert unet(**_inputs(unet)).shape == (2, 3, 16, 16)


def test_scales_and_shifts_of_all_blocks_are_one_product_unless_a_block_makes_its_own():
    torch.manual_seed(1)
    unet = Unet(**TINY)
    inputs, upstream = _inputs(unet), torch.randn(2, 3, 16, 16)
    called, blocks = [], unet.resnet_blocks

    def run():
        unet.zero_grad()
        out = unet(**inputs)
        out.backward(upstream)
        return [out.detach(), *(parameter.grad for parameter in unet.parameters() if parameter.grad is not None)]

    def remember(layer, args, out):
        called.append(layer)

    hook = blocks[0].time_mlp.register_forward_hook(remember)
    apart = run()
    hook.remove()
    assert called == [blocks[0].time_mlp]
    with monitored_products() as products:
        together = run()
    joined = sum(block.time_mlp[1].out_features for block in blocks)
    assert products.count(joined) == 1
    assert len(apart) == len(together)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch, monitored_products() as products:
        patch.setattr("minimagen_fast.Unet._MOST_JOINED", 100)
        torch.testing.assert_close(unet(**inputs), together[0], rtol=1e-4, atol=1e-5)
    assert joined not in products
    # A block that is none of ours takes what the original hands over.
    changed = copy.deepcopy(unet)
    changed.mid_block1.__class__ = type("Derived", (ResnetBlock,), {})
    torch.testing.assert_close(changed(**inputs), together[0], rtol=1e-4, atol=1e-5)


def test_a_block_without_a_bias_makes_its_own_scale_and_shift():
    torch.manual_seed(1)
    unet = Unet(**TINY)
    inputs, layer = _inputs(unet), unet.mid_block1.time_mlp[1]
    torch.nn.init.zeros_(layer.bias)
    expected = unet(**inputs)
    layer.bias = None
    torch.testing.assert_close(unet(**inputs), expected, rtol=1e-4, atol=1e-5)


def test_one_text_stands_for_all_images():
    torch.manual_seed(1)
    unet = Unet(**TINY)
    inputs = _inputs(unet, batch=3)
    inputs["text_mask"][:, 3:] = False
    one = {name: inputs[name][:1] for name in ("text_embeds", "text_mask")}
    expected = unet(**{**inputs, **{name: value.expand(3, *value.shape[1:]) for name, value in one.items()}})
    assert torch.equal(unet(**{**inputs, **one}), expected)
    assert torch.equal(unet(**{**inputs, "text_mask": one["text_mask"]}), unet(**inputs))
    for name, value in inputs.items():
        if name.startswith("text_"):
            with pytest.raises(ValueError, match=f"{name} must have shape"):
                unet(**{**inputs, name: value[:2]})


@pytest.fixture
def padding_is_shared(monkeypatch):
    """Padding is told apart wherever it may be, whatever processor this is; how often it was told."""
    told = []
    made = Unet._conditions_with_padding_apart
    monkeypatch.setattr("minimagen_fast.Unet.keys_are_worth_sharing", lambda context: torch.is_grad_enabled())
    monkeypatch.setattr(Unet, "_conditions_with_padding_apart", lambda *args: told.append(len(args[1])) or made(*args))
    return told


def results(unet, inputs, **more):
    """Prediction and gradients of all parameters."""
    torch.manual_seed(3)
    out = unet(**inputs, **more)
    names, parameters = zip(*unet.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
    return out.detach(), {
        name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None
    }


@pytest.mark.parametrize("words", [1, 5, 255])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [Unet, SuperTest])
def test_padding_is_told_once_for_all_images(padding_is_shared, monkeypatch, kind, words, masked):
    torch.manual_seed(1)
    unet = Unet(**{**TINY, "layer_cross_attns": True}) if kind is Unet else kind()
    # In double precision, in which gradients of biases before a norm are as good as none in both.
    unet.double()
    inputs = _inputs(unet, batch=3, words=words, dtype=torch.float64)
    inputs["text_mask"][:, (words + 1) // 2 :] = not masked
    told = results(unet, inputs, cond_drop_prob=0.5)
    assert padding_is_shared.pop() == 3
    with torch.no_grad():
        torch.manual_seed(3)
        torch.testing.assert_close(unet(**inputs, cond_drop_prob=0.5), told[0], rtol=1e-7, atol=1e-8)
    monkeypatch.setattr("minimagen_fast.Unet.keys_are_worth_sharing", lambda context: False)
    expected = results(unet, inputs, cond_drop_prob=0.5)
    assert not padding_is_shared
    torch.testing.assert_close(told, expected, rtol=1e-7, atol=1e-8)
    assert any(name.endswith("null_text_embed") and gradient.abs().sum() > 0 for name, gradient in told[1].items())


def test_padding_is_not_told_apart_where_someone_else_would_miss_it(padding_is_shared):
    torch.manual_seed(1)
    unet = Unet(**TINY)
    inputs = _inputs(unet)
    unet(**inputs)
    assert padding_is_shared.pop() == 2
    seen = []

    class Derived(Unet):
        def denoise(self, x, lowres_cond_img, conditions):
            conditions = list(conditions)
            seen.extend(condition["cond"].shape[1] for condition in conditions)
            return super().denoise(x, lowres_cond_img, conditions)

    torch.manual_seed(1)
    derived = Derived(**TINY)
    derived.load_state_dict(unet.state_dict())
    expected = derived(**inputs)
    assert set(seen) == {2 + 256} and not padding_is_shared
    for change in (
        lambda net: net.norm_cond.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1])),
        lambda net: setattr(net, "_text_tokens", lambda *args: seen.append(1) or Unet._text_tokens(net, *args)),
    ):
        changed = copy.deepcopy(unet)
        change(changed)
        seen.clear()
        torch.testing.assert_close(changed(**inputs), expected, rtol=1e-4, atol=1e-4)
        assert seen and not padding_is_shared
    # All of it is text.
    unet(**_inputs(unet, words=256))
    unet(**_inputs(unet, words=300))
    assert not padding_is_shared


def test_kept_text_without_a_mask_is_padded_with_zeros_as_in_the_original(padding_is_shared):
    torch.manual_seed(1)
    unet = Unet(**TINY)
    inputs = {**_inputs(unet, words=5), "text_mask": None, "keep_text": torch.tensor([True, False])}
    out = unet(**inputs)
    seen = []
    unet.norm_cond.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        torch.testing.assert_close(unet(**inputs), out, rtol=1e-4, atol=1e-4)
    assert not padding_is_shared
    (tokens,) = seen
    assert not tokens[0, -251:].any() and tokens[0, -256:-251].any()
    assert torch.equal(tokens[1, -256:], unet.null_text_embed[0])


def test_compiled_blocks_see_texts_of_all_lengths_in_one_shape(padding_is_shared, monkeypatch):
    shapes = []

    def run(block, *args, **kwargs):
        shapes.append({name: value.shape for name, value in kwargs.items() if name.endswith("cond")})
        return type(block).forward(block, *args, **kwargs)

    monkeypatch.setattr("minimagen_fast.blocks._compiled_forward", lambda kind: run)
    unet = Unet(**TINY)
    with use_blocks(compiled=True):
        unet(**_inputs(unet, words=3))
        first = shapes[:]
        shapes.clear()
        unet(**_inputs(unet, words=4))
    assert shapes == first and first


@pytest.mark.parametrize("shared", [False, True])
def test_null_text_may_be_one_token_for_all_places(padding_is_shared, monkeypatch, shared):
    monkeypatch.setattr("minimagen_fast.Unet.keys_are_worth_sharing", lambda context: shared)
    torch.manual_seed(1)
    unet = Unet(**TINY)
    inputs = {**_inputs(unet, words=5), "keep_text": torch.tensor([True, False])}
    inputs["text_mask"][:, 3:] = False
    one = torch.randn_like(unet.null_text_embed[:, :1])
    unet.null_text_embed.data = one.repeat(1, 256, 1)
    expected = unet(**inputs)
    unet.null_text_embed.data = one
    torch.testing.assert_close(unet(**inputs), expected, rtol=1e-5, atol=1e-5)
    assert len(padding_is_shared) == 2 * shared


@pytest.mark.parametrize("part", ["block", "attention", "norm_context", "to_kv"])
def test_a_part_of_someone_elses_attends_to_all_tokens(padding_is_shared, part):
    torch.manual_seed(1)
    unet = Unet(**TINY)
    inputs, seen = _inputs(unet), []
    expected = unet(**inputs)
    padding_is_shared.clear()
    attention = unet.mid_block1.cross_attn.fn
    module = {
        "block": unet.mid_block1,
        "attention": attention,
        "norm_context": attention.norm_context,
        "to_kv": attention.to_kv,
    }[part]

    def look(module, args, kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        seen.append({value.shape[1] for value in tensors if value.ndim == 3})

    module.register_forward_pre_hook(look, with_kwargs=True)
    torch.testing.assert_close(unet(**inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1 and 2 + 256 in seen[0]


def as_pickled_by_minimagen(unet):
    """What a pickle of the original package's holds of the same U-Net: nothing that only ours has."""
    state = dict(unet.__getstate__())
    state["_locals"] = state.pop("_config")
    del state["downsampling_factor"]
    return {**state, "init_conv_to_final_conv_residual": False}


def test_a_u_net_that_the_original_has_pickled():
    torch.manual_seed(1)
    unet = SuperTest(lowres_cond=True)
    unet.final_conv.bias.requires_grad_(False)
    unet.mid_block1.eval()
    unet.note = "mine"
    inputs, expected = _inputs(unet), unet(**_inputs(unet))
    state = as_pickled_by_minimagen(copy.deepcopy(unet))
    # A part that is made otherwise there, without weights.
    state["_modules"]["to_time_tokens"][1] = nn.Identity()
    loaded, random = SuperTest.__new__(SuperTest), torch.get_rng_state()
    loaded.__setstate__(state)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(loaded(**inputs), expected)
    assert not loaded.final_conv.bias.requires_grad and loaded.final_conv.weight.requires_grad
    assert not loaded.mid_block1.training and loaded.training and loaded.note == "mine"
    assert loaded.final_conv.weight is state["_modules"]["final_conv"].weight
    assert loaded._cast_model_parameters(lowres_cond=True, text_embed_dim=512, channels=1, channels_out=1).channels == 1


@pytest.mark.parametrize("change", ["hook", "part", "residual"])
def test_a_changed_u_net_that_the_original_has_pickled_is_refused(change):
    state = as_pickled_by_minimagen(BaseTest())
    if change == "hook":
        state["_modules"]["final_conv"].register_forward_hook(print)
    elif change == "part":
        state["_modules"]["final_conv"] = nn.Sequential(state["_modules"]["final_conv"])
    else:
        state["init_conv_to_final_conv_residual"] = True
    with pytest.raises(ValueError, match="parts were replaced or given hooks"):
        BaseTest.__new__(BaseTest).__setstate__(state)


def test_no_residual_from_the_first_convolution():
    unet = BaseTest()
    unet.init_conv_to_final_conv_residual = False
    assert unet.init_conv_to_final_conv_residual is False
    with pytest.raises(ValueError, match="init_conv_to_final_conv_residual must be False, got True"):
        unet.init_conv_to_final_conv_residual = True
