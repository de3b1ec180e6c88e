"""Models in which someone has taken a hand are sampled as they are now, and what their parts note down stays."""

import copy
import functools
import gc
import pickle
import threading
import weakref

import pytest
import torch
from fast_path import T, distance, fake_cuda_graphs, make_imagen, make_unet, make_words, sample
from torch import nn

from minimagen_fast.diffusion_model import GaussianDiffusion
from minimagen_fast.helpers import evaluating
from minimagen_fast.Imagen import Imagen
from minimagen_fast.layers import Attention, Block, ChanLayerNorm, CrossAttention, LayerNorm, ResnetBlock
from minimagen_fast.Unet import BaseTest, Unet

RUN = {"steps": 3, "sampler": "ddim", "cond_scale": 2.0}
ROUNDING = 2e-4
WAYS = [{}, {"precision": "bfloat16"}]


def reference(imagen, **arguments):
    """What plain torch makes of the model as it is now."""
    images = sample(imagen.accelerate("reference"), **{**RUN, **arguments})
    imagen.accelerate()
    return images


def assert_followed(imagen, way=None, **arguments):
    way = way or {}
    images = sample(imagen.accelerate(**way), **{**RUN, **arguments})
    expected = reference(imagen, **arguments)
    # Of bfloat16 the mean over the pixels, as in the other tests.
    if way:
        assert (images - expected).abs().mean() < 0.03
    else:
        assert distance(images, expected) < ROUNDING
    return images


def attention_of(imagen):
    return imagen.unets[0].mid_attn.fn.fn


class Adapter(nn.Module):
    """A layer with another beside it, which keeps its state in all the places that there are."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(3)
        self.base, self.beside = base, nn.Linear(base.in_features, base.out_features, bias=False)
        self._disabled, self.scaling, self.factor = False, {"default": 4.0}, torch.ones(1)
        self.seen, self.lock = [], threading.Lock()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.seen.append(x.shape)
        self.last, self.calls = x, self.calls + 1
        out = self.base(x)
        return out if self._disabled else out + self.beside(x) * self.scaling["default"] * self.factor


def disable(adapter):
    adapter._disabled = True


def scale(adapter):
    adapter.scaling["default"] = -8.0


def scale_tensor(adapter):
    adapter.factor.fill_(-3.0)


@torch.no_grad()
def merge(adapter):
    adapter.base.weight += adapter.beside.weight * adapter.scaling["default"]
    adapter._disabled = True


@torch.no_grad()
def train_base(adapter):
    adapter.base.weight *= 3


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("change", [disable, scale, scale_tensor, merge, train_base])
def test_the_state_of_a_layer_is_followed(change, way):
    imagen = make_imagen()
    attention = attention_of(imagen)
    attention.to_q = Adapter(attention.to_q)
    before = assert_followed(imagen, way)
    change(attention.to_q)
    after = assert_followed(imagen, way)
    assert (distance(after, before) > 1e-3) == (change is not merge) or way


def test_what_a_layer_notes_down_stays_with_it():
    imagen = make_imagen()
    attention = attention_of(imagen)
    attention.to_q = Adapter(attention.to_q)
    sample(imagen, **RUN)
    assert len(attention.to_q.seen) == attention.to_q.calls == RUN["steps"]


def test_a_layer_that_keeps_what_cannot_be_copied():
    imagen = make_imagen()
    attention = attention_of(imagen)
    attention.to_q = Adapter(attention.to_q)
    imagen(torch.rand(2, 3, 8, 8), text_embeds=torch.randn(2, 5, 512)).backward()
    assert attention.to_q.last.grad_fn is not None
    assert_followed(imagen)


def test_a_weight_that_is_no_parameter_is_followed():
    imagen = make_imagen()
    conv = imagen.unets[0].final_conv
    weight = conv.weight.detach().clone()
    del conv.weight
    conv.weight = weight
    before = assert_followed(imagen)
    weight.mul_(2)
    assert distance(assert_followed(imagen), before) > 1e-3


class Louder(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_part_that_gets_another_class_is_followed():
    imagen = make_imagen()
    before = assert_followed(imagen)
    imagen.unets[0].final_conv.__class__ = Louder
    assert distance(assert_followed(imagen), before) > 1e-3


def test_a_part_that_lies_where_another_lay_is_not_taken_for_it():
    imagen = make_imagen()
    block = imagen.unets[0].mid_block1.block2
    before = assert_followed(imagen)
    for _ in range(2):
        block.activation = nn.ReLU()
        assert distance(assert_followed(imagen), before) > 1e-3
        # One after the other, so that the last may come to lie in the place of the first.
        block.activation = nn.Mish()
        block.activation = nn.SiLU()
        assert_followed(imagen)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("name", ["block1", "block2"])
def test_a_block_in_another_module(name):
    imagen = make_imagen()
    expected = reference(imagen)
    for block in imagen.unets[0].resnet_blocks:
        assert isinstance(getattr(block, name), Block)
        setattr(block, name, Wrapped(getattr(block, name)))
    assert distance(assert_followed(imagen), expected) < ROUNDING


@pytest.mark.parametrize("settings", [{"heads": 2}, {"dim_head": 32}], ids=str)
def test_cross_attentions_of_several_sizes(settings):
    unet = make_unet(cond_dim=64)
    block = unet.mid_block1
    dim = block.cross_attn.fn.to_q.in_features
    block.cross_attn.fn = CrossAttention(dim=dim, context_dim=64, **settings)
    assert_followed(make_imagen(unets=[unet]))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_weights():
    imagen = make_imagen()
    layers = [layer for layer in imagen.unets[0].modules() if type(layer) is nn.Linear]
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach().relu(), requires_grad=False)
    expected = sample(imagen, **RUN)
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
    assert distance(sample(imagen, **RUN), expected) < ROUNDING
    # As many steps as are recorded otherwise, and steps of training.
    assert sample(imagen, **{**RUN, "steps": T}).isfinite().all()
    for _ in range(3):
        imagen(torch.rand(2, 3, 8, 8), **make_words()).backward()


def test_no_cross_attention():
    unet = make_unet()
    for block in unet.resnet_blocks:
        block.cross_attn = None
    assert_followed(make_imagen(unets=[unet]))


def test_a_convolution_in_groups_beside_a_skip_connection():
    imagen = make_imagen()
    for block in imagen.unets[0].resnet_blocks:
        conv = block.res_conv
        if isinstance(conv, nn.Conv2d):
            block.res_conv = nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=2)
    assert_followed(imagen)


def test_the_scale_of_attentions_is_followed():
    imagen = make_imagen()
    before = sample(imagen, **RUN)
    attentions = [part for part in imagen.unets[0].modules() if isinstance(part, Attention | CrossAttention)]
    for attention in attentions:
        attention.scale *= 3
    after = assert_followed(imagen)
    assert distance(after, before) > 1e-3 and len(attentions) > 3
    assert distance(sample(imagen.accelerate(condition_cache="off"), **RUN), after) < ROUNDING
    for attention in attentions:
        attention.scale /= 3
        with torch.no_grad():
            attention.to_q.weight *= 3
    assert distance(sample(imagen, **RUN), after) < ROUNDING


def test_no_last_block():
    imagen = make_imagen()
    before = sample(imagen, **RUN)
    imagen.unets[0].final_res_block = None
    assert distance(assert_followed(imagen), before) > 1e-3
    imagen(torch.rand(2, 3, 8, 8), **make_words()).backward()


class OriginalBlock(nn.Module):
    """Stands in for one of ours, and knows no more than the original does."""

    def __init__(self, block):
        super().__init__()
        self.inner = block

    def forward(self, x, scale_shift=None):
        return self.inner(x, scale_shift)


class OriginalResnetBlock(OriginalBlock):
    def forward(self, x, t, c=None):
        return self.inner(x, t, c)


class OwnResnetBlock(ResnetBlock):
    def forward(self, x, time_emb=None, cond=None):
        return super().forward(x, time_emb, cond)


def own_class(block):
    block.__class__ = OwnResnetBlock
    return block


class BlockWithNamesOfItsOwn(ResnetBlock):
    def forward(self, x, t, c=None):
        return super().forward(x, t, c)


def class_with_names_of_its_own(block):
    block.__class__ = BlockWithNamesOfItsOwn
    return block


def forward_with_names_of_its_own(block):
    block.forward = lambda x, t, *c, forward=block.forward: forward(x, t, *c)
    return block


@pytest.mark.parametrize(
    "stand_in", [OriginalResnetBlock, own_class, class_with_names_of_its_own, forward_with_names_of_its_own]
)
def test_blocks_that_know_what_those_of_the_original_know(stand_in):
    imagen = make_imagen()
    expected = reference(imagen)
    unet = imagen.unets[0]
    for level in (*unet.downs, *unet.ups):
        place = 1 if level in unet.downs else 0
        level[place] = stand_in(level[place])
        level[place + 1] = nn.ModuleList(map(stand_in, level[place + 1]))
    for name in ("mid_block1", "mid_block2", "final_res_block"):
        setattr(unet, name, stand_in(getattr(unet, name)))
    assert distance(assert_followed(imagen), expected) < ROUNDING


def test_blocks_within_blocks_that_know_what_those_of_the_original_know():
    imagen = make_imagen()
    expected = reference(imagen)
    for block in imagen.unets[0].resnet_blocks:
        block.block1, block.block2 = OriginalBlock(block.block1), OriginalBlock(block.block2)
    assert distance(assert_followed(imagen), expected) < ROUNDING


@pytest.mark.parametrize("for_all", [False, True])
def test_hooks_of_a_block_see_what_those_of_the_original_see(for_all):
    unet, seen = make_imagen().unets[0], []
    block = unet.ups[0][0]

    def before(module, given):
        if module is block:
            seen.extend(given)
            return given[0] * 0.5, *given[1:]
        return None

    register = nn.modules.module.register_module_forward_pre_hook if for_all else block.register_forward_pre_hook
    handle = register(before)
    try:
        unet(torch.rand(2, 3, 8, 8), torch.tensor([1, 5]), text_embeds=make_words()["text_embeds"])
    finally:
        handle.remove()
    x, t, c = seen
    assert x.shape[1] == block.block1.groupnorm.num_channels and t.ndim == 2 and c.ndim == 3


def test_a_subclass_that_takes_skip_connections_apart_is_handed_them():
    class Own(ResnetBlock):
        def forward(self, x, time_emb=None, cond=None, *, skip=None, **more):
            given.append(skip)
            return super().forward(x, time_emb, cond, skip=skip, **more)

    given, imagen = [], make_imagen()
    block = imagen.unets[0].ups[0][0]
    block.__class__ = Own
    assert_followed(imagen)
    assert given and all(skip is not None for skip in given)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_wrapper_is_handed_skip_connections_as_what_it_wraps(wrapped):
    given, imagen = [], make_imagen()
    block = imagen.unets[0].ups[0][0]

    def run(*args, forward=block.forward, **more):
        given.append("skip" in more)
        return forward(*args, **more)

    block.forward = functools.wraps(block.forward)(run) if wrapped else run
    assert_followed(imagen)
    # Of one that does not say what it wraps nothing is known: it is called as the original calls it.
    assert given and set(given) == {wrapped}


FORWARDS = {
    Attention: lambda self, x, context=None, mask=None, attn_bias=None: x * 0.5,
    CrossAttention: lambda self, x, context, mask=None: x * 0.5,
    LayerNorm: lambda self, x: x * 0.5,
    ChanLayerNorm: lambda self, x: x * 0.5,
    Block: lambda self, x, scale_shift=None: self.project(x) * 0.5,
    ResnetBlock: lambda self, x, time_emb=None, cond=None: self.res_conv(x) * 0.5,
}


@pytest.mark.parametrize("kind", FORWARDS, ids=lambda kind: kind.__name__)
def test_a_forward_for_the_original_in_a_class_of_ours_is_called(monkeypatch, kind):
    imagen = make_imagen()
    before = sample(imagen, **RUN)
    monkeypatch.setattr(kind, "forward", FORWARDS[kind])
    assert distance(assert_followed(imagen), before) > 1e-3
    imagen(torch.rand(2, 3, 8, 8), **make_words()).backward()


def test_a_class_in_the_place_of_one_of_ours_is_called_as_the_original_calls_it(monkeypatch):
    class Own(nn.LayerNorm):
        def forward(self, x):
            return 0.5 * super().forward(x)

    monkeypatch.setattr("minimagen_fast.layers.LayerNorm", Own)
    imagen = make_imagen()
    assert isinstance(attention_of(imagen).norm, Own)
    assert_followed(imagen)
    imagen(torch.rand(2, 3, 8, 8), **make_words()).backward()


# Methods


class HalfGuided(BaseTest):
    def forward_with_cond_scale(self, *args, **kwargs):
        return 0.5 * super().forward_with_cond_scale(*args, **kwargs)


def test_guidance_of_a_u_net_of_its_own():
    imagen = make_imagen()
    before = reference(imagen)
    unet = make_unet()
    unet.__class__ = HalfGuided
    other = make_imagen(unets=[unet])
    assert distance(assert_followed(other), before) > 1e-3
    # And nothing else is different.
    guide = unet.forward_with_cond_scale
    unet.forward_with_cond_scale = lambda *args, **kwargs: 2 * guide(*args, **kwargs)
    for arguments in (RUN, {"sampler": "ddpm", "steps": None, "cond_scale": 1.0}):
        assert distance(sample(other, **arguments), sample(imagen, **arguments)) < 1e-3


def test_embeddings_of_a_u_net_of_its_own():
    imagen = make_imagen()
    before = reference(imagen)
    unet = imagen.unets[0]
    embed = unet._generate_t_tokens

    def doubled(*args):
        embedding, tokens = embed(*args)
        return 2 * embedding, tokens

    unet._generate_t_tokens = doubled
    assert distance(assert_followed(imagen), before) > 1e-3


class Originals(BaseTest):
    """Conditions on text by the arguments of the original package, by which it is also called."""

    factor = 1.0

    def _text_condition(self, text_embeds, batch_size, cond_drop_prob, device, text_mask, t, time_tokens):
        t, c = super()._text_condition(text_embeds, batch_size, cond_drop_prob, device, text_mask, t, time_tokens)
        return self.factor * t, c


def test_text_of_a_u_net_of_its_own():
    imagen, other = make_imagen(), make_imagen()
    before = reference(other)
    other.unets[0].__class__ = Originals
    losses = []
    for one in (imagen, other):
        torch.manual_seed(0)
        losses.append(one(torch.full((2, 3, 16, 16), 0.3), **make_words(), unet_number=1))
    assert distance(*losses) < 1e-5, "the same is drawn in the same order"
    other.unets[0].factor = 2.0
    assert distance(assert_followed(other), before) > 1e-3


class Diffusion(GaussianDiffusion):
    """The same, by methods with other parameters' names than they need to have."""

    calls = 0

    def predict_start_from_noise(self, x_t, t, noise):
        Diffusion.calls += 1
        return super().predict_start_from_noise(x_t, t, noise)

    def q_posterior(self, x_start, x_t, t):
        Diffusion.calls += 1
        return super().q_posterior(x_start, x_t, t)


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
def test_methods_of_a_diffusion_process_are_called(cond_scale):
    imagen, other = make_imagen(), make_imagen()
    Diffusion.calls = 0
    other.noise_schedulers[0].__class__ = Diffusion
    run = {"cond_scale": cond_scale}
    assert distance(sample(other, **run), sample(imagen, **run)) < ROUNDING
    assert Diffusion.calls == 2 * T
    other.noise_schedulers[0].predict_start_from_noise = lambda x, t, noise: torch.zeros_like(x)
    images = sample(other, **run)
    assert distance(images, torch.full_like(images, 0.5)) < 1e-6


def test_timesteps_of_a_diffusion_process_of_its_own():
    imagen, calls = make_imagen(), []
    process = imagen.noise_schedulers[0]
    every, before = process._get_sampling_timesteps, sample(imagen)
    process._get_sampling_timesteps = lambda batch, device: every(batch, device=device)[::5]
    after = assert_followed(imagen, sampler="ddpm", steps=None, callback=lambda *args: calls.append(args[1]))
    assert calls == [*range(T // 5)] * 2 and distance(after, before) > 1e-3
    for wrong in ([], [torch.tensor([T])]):
        process._get_sampling_timesteps = lambda batch, device, wrong=wrong: wrong
        with pytest.raises(ValueError, match=f"must give timesteps of 0 to {T - 1}, at least one"):
            sample(imagen)
    with pytest.raises(ValueError, match="_get_sampling_timesteps of this GaussianDiffusion was overridden: choose"):
        sample(imagen, sampler="ddim")


def test_a_time_of_its_own_for_each_low_resolution_image():
    imagen, run = make_imagen(stages=2), {**RUN, "steps": 1}
    before = sample(imagen, **run)
    imagen.lowres_noise_schedule._get_times = lambda batch, level, device: torch.arange(batch, device=device) * 5 + 4
    assert distance(assert_followed(imagen, steps=1)[1], before[1]) > 1e-3
    with pytest.raises(ValueError, match="condition_cache='on' cannot be had: _get_times of the schedule"):
        sample(imagen.accelerate(condition_cache="on"), **run)


@pytest.mark.parametrize("arguments", [{"sampler": "ddim"}, {"sampler": "dpmpp_2m", "steps": 5}, {"steps": 5}], ids=str)
def test_samplers_that_would_not_call_them_are_refused(arguments):
    imagen = make_imagen()
    imagen.noise_schedulers[0].__class__ = Diffusion
    with pytest.raises(ValueError, match="of this Diffusion was overridden: choose sampler='ddpm' with all steps"):
        sample(imagen, **arguments)


def test_float64_under_autocast():
    imagen = make_imagen().to(torch.float64)
    expected = sample(imagen, **RUN)
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(sample(imagen, **RUN), expected) < ROUNDING


class Dimmed(BaseTest):
    """Keeps what its own method does in the places where a copy would not see a change."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self._dimming, self.seen = 0.5, []

    def denoise(self, *args):
        self.seen.append(1)
        return self._dimming * super().denoise(*args)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_state_of_a_u_net_with_a_method_of_its_own_is_followed(monkeypatch, way):
    graphs = fake_cuda_graphs(monkeypatch)
    imagen = make_imagen(unets=[Dimmed()])
    before = assert_followed(imagen, way)
    imagen.unets[0]._dimming = 0.1
    after = assert_followed(imagen, way)
    assert distance(after, before) > 1e-3 and len(imagen.unets[0].seen) >= 2 * RUN["steps"] and not graphs


def test_a_tensor_in_an_attribute_of_a_u_net_is_followed(monkeypatch):
    graphs = fake_cuda_graphs(monkeypatch)
    imagen = make_imagen()
    imagen.unets[0].skip_connect_scale = scale = torch.ones(())
    before = assert_followed(imagen)
    scale.fill_(0.1)
    assert distance(assert_followed(imagen), before) > 1e-3 and not graphs


class Around(nn.Module):
    """All that the original package asks of what is in the place of a U-Net."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.lowres_cond = unet, unet.lowres_cond

    def forward(self, *args, **kwargs):
        return self.unet(*args, **kwargs)

    def forward_with_cond_scale(self, *args, **kwargs):
        return self.unet.forward_with_cond_scale(*args, **kwargs)


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
@pytest.mark.parametrize("wrap", [Around, torch.compile])
@torch.compiler.set_stance("force_eager")
def test_another_module_in_the_place_of_a_u_net(wrap, cond_scale):
    imagen, other, run = make_imagen(stages=2), make_imagen(stages=2), {**RUN, "cond_scale": cond_scale}
    for number in range(2):
        other.unets[number] = wrap(other.unets[number])
    assert distance(sample(other, **run), sample(imagen, **run)) < ROUNDING
    assert (sample(other.accelerate(precision="bfloat16"), **run) - sample(imagen, **run)).abs().mean() < 0.03
    losses = []
    for one in (imagen, copy.deepcopy(other.accelerate())):
        torch.manual_seed(0)
        losses.append(one(torch.full((2, 3, 16, 16), 0.3), **make_words(), unet_number=2))
    assert distance(*losses) < 1e-5


class OwnNetwork(Unet):
    """A network that is a U-Net for Imagen alone, which asks for one, and has nothing else of the class."""

    def __init__(self, lowres_cond):
        nn.Module.__init__(self)
        self.lowres_cond, self.channels, self.channels_out, self.text_embed_dim = lowres_cond, 3, 3, 512
        self.image, self.text = nn.Conv2d(6 if lowres_cond else 3, 3, 3, padding=1), nn.Linear(512, 3)

    def forward(
        self, x, time, *, text_embeds, text_mask, lowres_cond_img=None, lowres_noise_times=None, cond_drop_prob=0
    ):
        text = self.text(text_embeds.mean(1))[..., None, None] * (1 - cond_drop_prob)
        return self.image(torch.cat((x, lowres_cond_img), 1) if self.lowres_cond else x) + text


def test_a_network_that_is_a_u_net_for_imagen_alone():
    networks = [OwnNetwork(lowres_cond) for lowres_cond in (False, True)]
    imagen = Imagen(networks, text_encoder_name="t5_small", image_sizes=(7, 14), timesteps=20).to("cpu")
    assert list(imagen.unets) == networks
    for number in (1, 2):
        imagen(torch.rand(2, 3, 16, 16), **make_words(), unet_number=number).backward()
    assert all(parameter.grad is not None for parameter in imagen.parameters())
    other = pickle.loads(pickle.dumps(copy.deepcopy(imagen)))
    images = [sample(each, **{**RUN, "cond_scale": 2.0}) for each in (imagen, other)]
    assert torch.equal(*images) and images[0].shape == (2, 3, 14, 14)
    assert imagen.double().unets[0].image.weight.dtype == torch.float64


class AroundOwnNetwork(OwnNetwork):
    """Hands whatever it is told on to a network that knows minimagen's arguments alone."""

    def __init__(self):
        super().__init__(lowres_cond=False)
        self.inner = OwnNetwork(lowres_cond=False)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_network_within_another_is_told_what_minimagen_tells_it():
    network = AroundOwnNetwork()
    losses = []
    for unet in (network, network.inner):
        imagen = Imagen(unet, text_encoder_name="t5_small", image_sizes=7, timesteps=20)
        torch.manual_seed(0)
        losses.append(imagen(torch.rand(2, 3, 7, 7), **make_words()))
    assert torch.equal(*losses)


# Modes


class Merging(nn.Linear):
    """Adds its other weight in eval mode, and takes it off again for training."""

    def __init__(self, width):
        super().__init__(width, width)
        self.beside = nn.Parameter(torch.ones(width, width))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.beside.data
            self.merged = not mode
        return self


def test_layers_that_merge_their_weights_for_evaluation_take_them_apart_again():
    model = nn.Sequential(Merging(2), nn.Dropout())
    model[1].eval()
    weight = model[0].weight.detach().clone()
    with evaluating(model):
        assert model[0].merged and distance(model[0].weight, weight) == 1
    assert not model[0].merged and distance(model[0].weight, weight) < 1e-6
    assert [part.training for part in model.modules()] == [True, True, False]


def test_modes_come_back_with_the_last_of_several_evaluations():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(part.training for part in model.modules())
    second.__exit__(None, None, None)
    assert [part.training for part in model.modules()] == [True, True, False]


def test_modes_of_a_part_of_two_models_come_back_with_the_last_evaluation():
    part = nn.Dropout()
    first, second = nn.Sequential(part), nn.Sequential(part, Merging(2))
    one, other = evaluating(first), evaluating(second)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert first.training and not part.training and not second.training
    other.__exit__(None, None, None)
    assert all(each.training for each in (first, second, *second))


def test_threads_that_sample_in_several_precisions_do_not_disturb_one_another():
    unet = make_unet()
    imagens = [make_imagen(unets=[unet]).accelerate(precision=name) for name in ("float32", "bfloat16")]
    run = {**RUN, "steps": 1}
    expected, wrong = [sample(imagen, **run) for imagen in imagens], []

    def work(index):
        try:
            for _ in range(8):
                if not torch.equal(sample(imagens[index], **run), expected[index]):
                    wrong.append("other images")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_part_that_cannot_be_evaluated_leaves_nothing_behind():
    class Stubborn(nn.Linear):
        def train(self, mode=True):
            if not mode:
                raise RuntimeError("not now")
            return super().train(mode)

    model = nn.Sequential(nn.Dropout(), Stubborn(2, 2))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not now"), evaluating(model):
            pass
        assert all(part.training for part in model.modules())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_subclass_with_other_defaults_is_sampled_as_fast(monkeypatch):
    class Own(BaseTest):
        def __init__(self, **arguments):
            super().__init__(**{"dim_mults": (1,), **arguments})

        def __getstate__(self):
            return super().__getstate__()

    graphs = fake_cuda_graphs(monkeypatch)
    imagen = make_imagen(unets=[Own()])
    for _ in range(2):
        sample(imagen, **RUN)
    assert len(graphs) == 1


def test_methods_that_are_replaced_in_the_class_are_called(monkeypatch):
    imagen = make_imagen()
    before = sample(imagen, cond_scale=2.0)
    posterior = GaussianDiffusion.q_posterior
    monkeypatch.setattr(GaussianDiffusion, "q_posterior", lambda *args, **kwargs: posterior(*args, **kwargs))
    assert distance(sample(imagen, cond_scale=2.0), before) < ROUNDING
    monkeypatch.setattr(GaussianDiffusion, "q_posterior", lambda self, x_start, x_t, t: (x_start, t, x_t * 0 - 99))
    assert distance(sample(imagen, cond_scale=2.0), before) > 1e-2
    monkeypatch.undo()
    forward = Unet.forward
    monkeypatch.setattr(Unet, "forward", lambda *args, **kwargs: 0.5 * forward(*args, **kwargs))
    assert distance(assert_followed(imagen), before) > 1e-2


def test_all_samplers_are_checked_before_the_first_step():
    imagen = make_imagen(stages=2)
    imagen.noise_schedulers[1].__class__ = Diffusion
    steps = []
    with pytest.raises(ValueError, match="choose sampler='ddpm'"):
        sample(imagen, sampler=("ddpm", "ddim"), callback=lambda *args: steps.append(args))
    assert not steps
