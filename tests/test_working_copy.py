"""Whatever is done to a model, the next sampling follows: nothing stale is left of what an earlier one kept."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from fast_path import FakeGraph, distance, fake_cuda_graphs, make_imagen, make_super, make_unet, make_words, sample
from recorded_graph import record_cuda_graphs
from torch import nn

from minimagen_fast.ema import EMA
from minimagen_fast.kept import kept_with
from minimagen_fast.kernels.upsample_conv import summed_kernel
from minimagen_fast.layers import ChanLayerNorm, LayerNorm, UpsampleConv
from minimagen_fast.working_copy import WorkingCopy

HALF, LAST = torch.bfloat16, torch.channels_last
WAYS = {"default": {}, "half": {"precision": "bfloat16"}, "graphs": {"precision": "bfloat16"}}
RUN = {"steps": 3, "sampler": "dpmpp_2m", "cond_scale": 3.0}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Settings under which something is kept between two samplings."""
    if request.param == "graphs":
        fake_cuda_graphs(monkeypatch)
    return WAYS[request.param]


def made(way, stages=1):
    """A model that has been sampled, and so has kept what it keeps."""
    imagen = make_imagen(stages).accelerate(**way)
    sample(imagen, **RUN)
    return imagen


def fresh(imagen, way):
    """A model that was never sampled, with the weights of another."""
    other = make_imagen(len(imagen.unets)).to(imagen.unets[0].dtype)
    other.load_state_dict(imagen.state_dict())
    return other.accelerate(**way)


def assert_followed(imagen, way, before=None):
    """The next images are those of the weights as they are now, bit for bit."""
    after = sample(imagen, **RUN)
    assert torch.equal(after, sample(fresh(imagen, way), **RUN))
    if before is not None:
        assert distance(after, before) > 1e-4, "the change changes nothing"


# Changes of the weights


def _other_weights(imagen):
    torch.manual_seed(9)
    return {name: value + 0.2 * torch.randn_like(value) for name, value in imagen.state_dict().items()}


def load(imagen):
    imagen.load_state_dict(_other_weights(imagen))


def assign(imagen):
    imagen.load_state_dict(_other_weights(imagen), assign=True)


@torch.no_grad()
def in_place(imagen):
    for parameter in imagen.parameters():
        parameter.mul_(1.1)


def training_step(imagen):
    optimizer = torch.optim.AdamW(imagen.parameters(), lr=1e-2)
    torch.manual_seed(3)
    imagen(torch.rand(2, 3, 8, 8), **make_words()).backward()
    optimizer.step()


def data(imagen):
    for parameter in imagen.parameters():
        parameter.data = parameter.data * 1.1


def data_then_in_place(imagen):
    data(imagen)
    sample(imagen, **RUN)
    in_place(imagen)


def new_parameters(imagen):
    for module in imagen.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 1.1))


def new_submodule(imagen):
    torch.manual_seed(4)
    unet = imagen.unets[0]
    unet.final_conv = nn.Conv2d(unet.final_conv.in_channels, 3, 3, padding=1)


def rounded(imagen):
    imagen.to(HALF).float()


CHANGES = [load, assign, in_place, training_step, data, data_then_in_place, new_parameters, new_submodule, rounded]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights(way, change):
    imagen = made(way)
    before = sample(imagen, **RUN)
    change(imagen)
    assert_followed(imagen, way, before)


PARTS = [
    "init_conv.convs.0.weight",
    "final_conv.bias",
    "norm_cond.weight",
    "text_to_cond.weight",
    "null_text_embed",
    "null_text_hidden",
    "to_time_tokens.0.weight",
    "to_time_cond.0.bias",
    "mid_block1.time_mlp.1.weight",
    "mid_block1.block1.groupnorm.weight",
    "mid_block1.cross_attn.fn.null_kv",
    "mid_block1.cross_attn.fn.to_kv.weight",
    "mid_block1.cross_attn.fn.norm.gamma",
    "downs.1.3.ff.0.g",
]


def test_each_kind_of_weight_edited_in_place(monkeypatch):
    # Some are read from the copy, some from the model itself, some before the first step, some in a graph.
    fake_cuda_graphs(monkeypatch)
    way = WAYS["graphs"]
    imagen = made(way)
    before = sample(imagen, **RUN)
    for name in PARTS:
        with torch.no_grad():
            imagen.unets[0].get_parameter(name).mul_(3).add_(0.5)
        after = sample(imagen, **RUN)
        assert torch.equal(after, sample(fresh(imagen, way), **RUN)), f"{name} is followed otherwise"
        assert not torch.equal(after, before), f"{name} changes nothing"
        before = after


def test_averaged_weights_and_back(way):
    imagen = made(way)
    averages = EMA(imagen, 0.9)
    in_place(imagen)
    before = sample(imagen, **RUN)
    with averages.swapped():
        assert_followed(imagen, way, before)
    assert torch.equal(sample(imagen, **RUN), before)


def test_all_stages(way):
    imagen = made(way, stages=2)
    before = sample(imagen, **RUN)
    with torch.no_grad():
        imagen.unets[1].final_conv.weight.mul_(2)
    assert_followed(imagen, way, before)


# Changes of the model that leave its weights alone


def skip_scale(unet):
    unet.skip_connect_scale = 0.1


def epsilon(unet):
    unet.mid_block1.block1.groupnorm.eps = 1.0


def new_part(unet):
    unet.ups[0][3][0] = nn.Upsample(scale_factor=2, mode="bilinear")


@pytest.mark.parametrize("change", [skip_scale, epsilon, new_part], ids=lambda change: change.__name__)
def test_changed_parts(way, change):
    imagen = made(way)
    before = sample(imagen, **RUN)
    change(imagen.unets[0])
    other = fresh(imagen, way)
    change(other.unets[0])
    after = sample(imagen, **RUN)
    assert torch.equal(after, sample(other, **RUN)) and distance(after, before) > 1e-4


def test_graphs_of_a_u_net_that_has_no_copy(monkeypatch):
    # They read its weights themselves. What was recorded knows nothing but the tensors of its capture.
    graphs, way = record_cuda_graphs(monkeypatch), {"precision": "weights", "memory_format": "contiguous"}
    run = {"sampler": "ddim", "steps": 2, "cond_scale": 3.0}
    imagen = make_imagen().accelerate(**way)
    before = sample(imagen, **run)
    for change in (in_place, data, new_submodule, epsilon):
        for changed in (False, True):
            if changed:
                change(imagen.unets[0] if change is epsilon else imagen)
            replays = sum(graph.replays for graph in graphs)
            after = sample(imagen, **run)
            assert changed or sum(graph.replays for graph in graphs) == replays + 2
        other = fresh(imagen, {**way, "condition_cache": "off"})
        if change is epsilon:
            change(other.unets[0])
        assert distance(after, sample(other, **run)) < 1e-5, f"{change.__name__} is not followed"
        assert distance(after, before) > 1e-4, f"{change.__name__} changes nothing"
        before = after


def test_another_dtype(way):
    imagen = made(way).to(HALF)
    assert_followed(imagen, way)
    assert imagen.unets[0].dtype == HALF
    assert_followed(imagen.float(), way)


def test_another_memory_format(way):
    imagen = made(way)
    before = sample(imagen, **RUN)
    imagen.unets[0].to(memory_format=torch.channels_last)
    assert distance(sample(imagen, **RUN), before) < 1e-4


def test_train_and_eval(way):
    imagen = made(way)
    before = sample(imagen, **RUN)
    for mode in (True, False):
        imagen.train(mode)
        imagen.unets[0].mid_block1.train(not mode)
        assert torch.equal(sample(imagen, **RUN), before)
        assert imagen.training == mode and imagen.unets[0].mid_block1.training == (not mode)


def test_another_way_and_back(way):
    imagen = made(way)
    before = sample(imagen, **RUN)
    sample(imagen.accelerate(precision="bfloat16", memory_format="contiguous"), **RUN)
    in_place(imagen)
    sample(imagen.accelerate("reference"), **RUN)
    assert_followed(imagen.accelerate(**way), way, before)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda imagen: pickle.loads(pickle.dumps(imagen))], ids=["copy", "file"]
)
def test_a_copy_and_its_original_go_their_own_ways(way, again):
    imagen = made(way)
    before = sample(imagen, **RUN)
    other = again(imagen)
    assert "_kept" not in vars(other.unets[0])
    assert torch.equal(sample(other, **RUN), before)
    in_place(other)
    assert torch.equal(sample(imagen, **RUN), before)
    assert_followed(other, way, before)
    changed = sample(other, **RUN)
    load(imagen)
    assert torch.equal(sample(other, **RUN), changed)
    assert_followed(imagen, way, before)


def test_a_copy_leaves_the_original_what_it_keeps():
    imagen = made(WAYS["half"])
    kept = kept_with(imagen.unets[0])
    unet = kept.working_copy(imagen.unets[0], HALF, LAST)
    copy.deepcopy(imagen)
    sample(imagen, **RUN)
    assert kept_with(imagen.unets[0]) is kept and kept.working_copy(imagen.unets[0], HALF, LAST) is unet


def test_inference_mode_before_and_after(way):
    imagen, plain = make_imagen(2).accelerate(**way), make_imagen(2).accelerate(**way)
    expected = sample(plain, **RUN)
    with torch.inference_mode():
        words = make_words()
        assert torch.equal(sample(imagen, words, **RUN), expected)
    assert torch.equal(sample(imagen, **RUN), expected)
    in_place(imagen)
    with torch.inference_mode():
        again = sample(imagen, **RUN)
    assert torch.equal(again, sample(fresh(imagen, way), **RUN))
    training_step(make_imagen())


# The copy


def working_copy(unet, dtype=HALF, memory_format=LAST):
    return WorkingCopy(unet, dtype, memory_format)


@pytest.mark.parametrize("make", [make_unet, make_super])
def test_what_is_converted_and_what_stays_exact(make):
    unet = make()
    duplicate = working_copy(unet).unet
    names = dict(duplicate.named_parameters())
    assert list(names) == [name for name, _ in unet.named_parameters()]
    exact = {
        f"{place}.{name}"
        for place, module in unet.named_modules()
        if isinstance(module, nn.GroupNorm | LayerNorm | ChanLayerNorm)
        for name, _ in module.named_parameters()
    }
    assert len(exact) > 20
    for name, original in unet.named_parameters():
        value = names[name]
        if name in exact:
            assert value.dtype == torch.float32 and torch.equal(value, original), name
        else:
            assert value.dtype == HALF and torch.equal(value, original.to(HALF)), name
            assert not value.requires_grad
        if value.ndim == 4:
            assert value.is_contiguous(memory_format=LAST), name
    for name, value in duplicate.named_buffers():
        assert value.dtype == torch.float32, name


def test_group_norms_that_are_called_by_themselves_are_converted():
    # Unlike those that a kernel reads: on CUDA torch's own takes parameters of the images' dtype alone.
    unet = make_unet()
    unet.final_conv = nn.Sequential(nn.GroupNorm(8, unet.final_conv.in_channels), nn.SiLU(), unet.final_conv)
    unet.mid_block1.block1.activation = nn.GELU()
    duplicate = working_copy(unet).unet
    assert duplicate.final_conv[0].weight.dtype == duplicate.mid_block1.block1.groupnorm.bias.dtype == HALF
    assert duplicate.mid_block1.block2.groupnorm.weight.dtype == torch.float32


def test_what_needs_no_conversion_is_shared():
    unet = make_unet()
    duplicate = working_copy(unet, torch.float32)
    pairs = dict(duplicate.unet.named_parameters())
    for name, value in unet.named_parameters():
        if value.ndim != 4:
            assert pairs[name] is value, f"{name} is a second copy"
    assert pairs["final_conv.weight"] is not unet.final_conv.weight


def test_weights_that_are_one_stay_one():
    unet = make_unet()
    unet.mid_block2.block1.project.weight = unet.mid_block1.block1.project.weight
    duplicate = working_copy(unet).unet
    assert duplicate.mid_block2.block1.project.weight is duplicate.mid_block1.block1.project.weight


def test_values_are_taken_over_at_the_same_addresses():
    unet = make_unet()
    duplicate = working_copy(unet)
    addresses = [value.data_ptr() for value in duplicate.unet.parameters()]
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(-2)
    assert duplicate.fits(unet, HALF, LAST)
    duplicate.refresh()
    assert [value.data_ptr() for value in duplicate.unet.parameters()] == addresses
    for value, original in zip(duplicate.unet.parameters(), unet.parameters(), strict=True):
        assert torch.equal(value, original.to(value.dtype))


def test_sums_of_weights_are_those_of_the_exact_ones():
    unet = make_unet()
    duplicate = working_copy(unet)
    originals = [upsample for *_, upsample in unet.ups if isinstance(upsample, UpsampleConv)]
    copies = [upsample for *_, upsample in duplicate.unet.ups if isinstance(upsample, UpsampleConv)]
    assert originals and [upsample.summed_kernel for upsample in originals] == [None] * len(originals)
    kernels = [upsample.summed_kernel for upsample in copies]
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(-3)
    duplicate.refresh()
    for upsample, kernel, original in zip(copies, kernels, originals, strict=True):
        assert upsample.summed_kernel is kernel and kernel.is_contiguous(memory_format=LAST)
        assert torch.equal(kernel, summed_kernel(original[1].weight).to(HALF))
        # It is what the copy computes with: of no weights the bias is left.
        images, bias = torch.ones(1, kernel.shape[0], 2, 2, dtype=HALF), upsample[1].bias[None, :, None, None]
        assert (upsample(images) != bias).any()
        kernel.zero_()
        assert (upsample(images) == bias).all()


def test_when_a_copy_no_longer_fits():
    unet = make_unet()
    duplicate = working_copy(unet)
    assert not duplicate.fits(unet, torch.float32, LAST) and not duplicate.fits(unet, HALF, torch.contiguous_format)
    assert not duplicate.fits(make_unet(), HALF, LAST)
    unet.final_conv.bias = nn.Parameter(unet.final_conv.bias.detach().clone())
    assert not duplicate.fits(unet, HALF, LAST)


def test_a_sampling_keeps_one_copy_and_the_next_takes_it():
    imagen = made(WAYS["half"])
    unet, kept = imagen.unets[0], kept_with(imagen.unets[0])
    first = kept.working_copy(unet, HALF, LAST)
    sample(imagen, **RUN)
    assert kept_with(unet) is kept and kept.working_copy(unet, HALF, LAST) is first
    assert kept.working_copy(unet, torch.float32, torch.contiguous_format) is unet


def test_what_is_kept_goes_with_the_u_net(way):
    imagen = made(way)
    copies = weakref.ref(kept_with(imagen.unets[0]))
    unet = weakref.ref(imagen.unets[0])
    del imagen
    FakeGraph.made = []
    gc.collect()
    assert unet() is None and copies() is None


def test_gradients_and_modes_are_untouched_by_the_copy():
    imagen = make_imagen().accelerate(precision="bfloat16")
    torch.manual_seed(3)
    imagen(torch.rand(2, 3, 8, 8), **make_words()).backward()
    before = [(p, p.grad.clone(), p.requires_grad) for p in imagen.parameters() if p.grad is not None]
    assert before
    sample(imagen, **RUN)
    assert all(torch.equal(p.grad, grad) and p.requires_grad == wanted for p, grad, wanted in before)
