"""How blocks are run: compiled together, or computed again in the backward pass."""

import pytest
import torch
from fast_path import (
    BANDS,
    LOWRES,
    T,
    apart,
    distance,
    make_imagen,
    make_super,
    make_unet,
    make_words,
    randomise,
    trained,
)

from minimagen_fast import blocks
from minimagen_fast.Imagen import Imagen
from minimagen_fast.kernels import use_implementation
from minimagen_fast.layers import ResnetBlock, TransformerBlock, _OverPixels
from minimagen_fast.Unet import BaseTest, Unet


@pytest.fixture
def compiled_calls(monkeypatch):
    """The calls that reach what stands for torch.compile."""
    made, called = [], []

    def compile(function, **options):
        made.append(options)
        return lambda block, *args, **kwargs: called.append(block) or function(block, *args, **kwargs)

    blocks._compiled_forward.cache_clear()
    monkeypatch.setattr(torch, "compile", compile)
    yield made, called
    blocks._compiled_forward.cache_clear()


def loss_and_gradients(imagen, unet_number=1):
    torch.manual_seed(3)
    imagen.zero_grad()
    side = imagen.image_sizes[unet_number - 1]
    loss = imagen(torch.rand(2, 3, side, side), **make_words(), unet_number=unet_number)
    loss.backward()
    unet = imagen.unets[unet_number - 1]
    return loss.detach(), {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def largest(one, other):
    """The largest difference of gradients, relative to the largest gradient of each tensor."""
    assert one.keys() == other.keys() and len(one) > 50
    # Some are zero but for rounding: what is added before a norm takes away.
    least = 0.01 * max(gradient.abs().max().item() for gradient in one.values())
    return max(distance(one[name], other[name]) / max(one[name].abs().max().item(), least) for name in one)


# Compiled


def kinds_of(modules):
    return len({(type(module), *(x.shape for x in module.parameters())) for module in modules})


def test_all_blocks_of_a_kind_go_through_one_compiled_function(compiled_calls, monkeypatch):
    made, called = compiled_calls
    # Padding that is told apart, as it is to no compiled blocks, gives other roundings.
    monkeypatch.setattr("minimagen_fast.Unet.keys_are_worth_sharing", lambda context: False)
    imagen = make_imagen(stages=2)
    expected = loss_and_gradients(imagen, 2)
    assert not called
    actual = loss_and_gradients(imagen.accelerate(compile="blocks"), 2)
    assert made == [{"dynamic": False}] * kinds_of(called) and 3 < len(made) < len(called)
    parts = {kind: {m for m in imagen.unets[1].modules() if isinstance(m, kind)} for kind in (ResnetBlock,)}
    assert parts[ResnetBlock] <= set(called) and len(called) == len(set(called))
    assert torch.equal(actual[0], expected[0]) and largest(actual[1], expected[1]) == 0
    imagen.sample(**make_words(), steps=2, sampler="ddim", seed=0, progress=False)
    assert len(made) == kinds_of(called), "compiled again for sampling"


def test_what_is_compiled_of_a_u_net(compiled_calls):
    _, called = compiled_calls
    unet = make_unet()
    with blocks.use_blocks(compiled=True):
        unet(torch.randn(1, 3, 8, 8), torch.zeros(1, dtype=torch.long), text_embeds=torch.randn(1, 3, 512))
    kinds = [type(block) for block in called]
    assert kinds.count(ResnetBlock) == len(unet.resnet_blocks) and kinds.count(TransformerBlock) == 2
    assert kinds.count(_OverPixels) == 1 and len(kinds) == len(unet.resnet_blocks) + 3, kinds


def test_hooks_of_a_block_are_called_around_what_is_compiled(compiled_calls):
    _, called = compiled_calls
    imagen, seen = make_imagen(), []
    expected = loss_and_gradients(imagen)
    imagen.accelerate(compile="blocks")
    block = imagen.unets[0].mid_block1
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    hook = block.register_forward_hook(lambda *_: seen.append("after"))
    block.register_full_backward_hook(lambda *_: seen.append("backward"))
    loss, gradients = loss_and_gradients(imagen)
    assert seen == ["before", "after", "backward"] and called.count(block) == 1
    # The backward hook changes the order in which gradients are summed.
    assert torch.equal(loss, expected[0]) and largest(gradients, expected[1]) < 1e-5
    assert "forward" not in vars(block)
    hook.remove()
    block.register_forward_hook(lambda module, args, out: 2 * out)
    assert distance(loss_and_gradients(imagen)[0], loss) > 1e-4
    # Of what is compiled itself no hook would be called.
    called.clear()
    block.block1.register_forward_hook(lambda *_: seen.append("within"))
    loss_and_gradients(imagen)
    assert seen[-2:] == ["within", "backward"] and block not in called


def test_not_compiled_within_a_compilation(compiled_calls, monkeypatch):
    _, called = compiled_calls
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with blocks.use_blocks(compiled=True):
        make_unet()(torch.randn(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))
    assert not called


def test_blocks_that_are_alike_are_compiled_once(monkeypatch):
    # Dynamo itself, with a backend that counts and compiles nothing.
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    functions, compile = [], torch.compile

    def compile_for_counting(function, **options):
        functions.append(function)
        return compile(function, backend=backend, fullgraph=True, **options)

    blocks._compiled_forward.cache_clear()
    monkeypatch.setattr(torch, "compile", compile_for_counting)
    torch._dynamo.reset()
    first, second, wider = (ResnetBlock(dim, dim, time_cond_dim=32).requires_grad_(False) for dim in (8, 8, 16))
    time = torch.randn(2, 32)
    with blocks.use_blocks(compiled=True), torch.no_grad():
        for block, dim in ((first, 8), (second, 8), (first, 8), (second, 8)):
            x = torch.randn(2, dim, 8, 8)
            assert distance(blocks.run_block(0, block, x, time_emb=time), block(x, time_emb=time)) < 1e-6
        assert len(graphs) == 1, "each module has a compiled function of its own"
        blocks.run_block(0, wider, torch.randn(2, 16, 8, 8), time_emb=time)
        assert len(graphs) == 2
        # In place, and by another tensor: what is compiled reads the weights anew.
        first.block1.project.weight.mul_(3)
        second.block1.project.weight = torch.nn.Parameter(torch.randn(8, 8, 3, 3), requires_grad=False)
        for block in (first, second):
            x = torch.randn(2, 8, 8, 8)
            assert distance(blocks.run_block(0, block, x, time_emb=time), block(x, time_emb=time)) < 1e-6
    assert len(graphs) == 2
    # Dynamo would go through the one's before it came to the other's.
    assert len({function.__code__ for function in functions}) == len(functions) == 2
    torch._dynamo.reset()
    blocks._compiled_forward.cache_clear()


@pytest.mark.slow
def test_a_compiled_u_net_samples_and_trains_as_one_that_is_not():
    torch.manual_seed(0)
    unet = randomise(BaseTest(dim_mults=(1,), layer_cross_attns=False))
    imagen = Imagen(unet, text_encoder_name="t5_small", image_sizes=8, timesteps=T)
    arguments = {**make_words(), "steps": 2, "sampler": "ddim", "seed": 0, "progress": False}
    before, (loss, gradients) = imagen.sample(**arguments), loss_and_gradients(imagen)
    imagen.accelerate(compile="blocks")
    assert distance(imagen.sample(**arguments), before) < 1e-4
    with torch.no_grad():
        unet.final_conv.weight.mul_(1.5)
        unet.mid_block1.block1.project.weight.mul_(1.5)
    assert distance(imagen.sample(**arguments), before) > 1e-4
    assert distance(imagen.sample(**arguments), imagen.accelerate().sample(**arguments)) < 1e-4
    with torch.no_grad():
        unet.final_conv.weight.div_(1.5)
        unet.mid_block1.block1.project.weight.div_(1.5)
    compiled_loss, compiled_gradients = loss_and_gradients(imagen.accelerate(compile="blocks"))
    assert distance(compiled_loss, loss) < 1e-5 and largest(compiled_gradients, gradients) < 1e-3


# Computed again


def kept_bytes(imagen, unet_number=1):
    """Bytes that a forward pass keeps for the backward pass, besides parameters."""
    parameters = {p.data_ptr() for p in imagen.parameters()}
    storages = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    side = imagen.image_sizes[unet_number - 1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = imagen(torch.rand(2, 3, side, side), **make_words(), unet_number=unet_number)
    total = sum(storages.values())
    loss.backward()
    return total


@pytest.mark.parametrize("unet_number", [1, 2])
def test_levels_that_are_computed_again_keep_less_and_give_the_same(unet_number):
    imagen = make_imagen(stages=2)
    expected, whole = loss_and_gradients(imagen, unet_number), kept_bytes(imagen, unet_number)
    sizes = []
    for levels in ((0,), (1,), (0, 1), (0, 1, 2)):
        imagen.accelerate(checkpoint_levels=levels)
        loss, gradients = loss_and_gradients(imagen, unet_number)
        assert torch.equal(loss, expected[0]) and largest(gradients, expected[1]) < 1e-5, levels
        sizes.append(kept_bytes(imagen, unet_number))
    assert all(size < 0.95 * whole for size in sizes), (sizes, whole)
    assert sizes[2] < min(sizes[:2]) and sizes[3] < sizes[2] and sizes[3] < 0.6 * whole, (sizes, whole)


def test_each_block_is_computed_twice_and_no_more(monkeypatch):
    calls, forward = [], ResnetBlock.forward
    monkeypatch.setattr(ResnetBlock, "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k))
    imagen = make_imagen().accelerate(checkpoint_levels=[1])
    loss_and_gradients(imagen)
    numbers = {calls.count(block) for block in calls}
    assert numbers == {1, 2} and calls.count(imagen.unets[0].mid_block1) == 1
    calls.clear()
    imagen.sample(**make_words(), steps=1, seed=0, progress=False)
    assert {calls.count(block) for block in calls} == {1}, "nothing is to be computed again in sampling"


def test_a_block_with_dropout_drops_the_same_when_it_is_computed_again():
    imagen = make_imagen()
    for block in imagen.unets[0].resnet_blocks:
        block.block2.project = torch.nn.Sequential(block.block2.project, torch.nn.Dropout(0.5))
    expected = loss_and_gradients(imagen)
    loss, gradients = loss_and_gradients(imagen.accelerate(checkpoint_levels=[0, 1]))
    assert torch.equal(loss, expected[0]) and largest(gradients, expected[1]) < 1e-5


def test_levels_that_are_computed_again_have_several_backward_passes():
    imagen = make_imagen()
    _, expected = loss_and_gradients(imagen)
    imagen.accelerate(checkpoint_levels=[0, 1])
    imagen.zero_grad()
    torch.manual_seed(3)
    loss = imagen(torch.rand(2, 3, 8, 8), **make_words())
    for _ in range(2):
        loss.backward(retain_graph=True)
    gradients = {name: p.grad / 2 for name, p in imagen.unets[0].named_parameters() if p.grad is not None}
    assert largest(gradients, expected) < 1e-5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_kernels_at_the_time_of_the_backward_pass(precision):
    imagen = make_imagen().accelerate(checkpoint_levels=[0, 1, 2], precision=precision)
    with use_implementation("reference"):
        expected = loss_and_gradients(imagen)
    torch.manual_seed(3)
    imagen.zero_grad()
    with use_implementation("reference"):
        loss = imagen(torch.rand(2, 3, 8, 8), **make_words())
    with use_implementation("sdpa"):
        loss.backward()
    gradients = {name: p.grad for name, p in imagen.unets[0].named_parameters() if p.grad is not None}
    assert torch.equal(loss, expected[0]) and largest(gradients, expected[1]) < 1e-5


def test_checkpointed_blocks_under_autocast_and_compiled(compiled_calls):
    imagen = make_imagen().accelerate(precision="bfloat16")
    expected = loss_and_gradients(imagen)
    imagen.accelerate(precision="bfloat16", compile="blocks", checkpoint_levels=[0, 1, 2])
    loss, gradients = loss_and_gradients(imagen)
    assert torch.equal(loss, expected[0]) and largest(gradients, expected[1]) < 1e-5


def test_what_is_compiled_around_a_block_computes_it_again():
    def run(x):
        return blocks.run_block(0, block, x.square()).square().sum()

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    graphs, block, x = [], TransformerBlock(8), torch.randn(1, 8, 2, 2, requires_grad=True)
    expected = torch.autograd.grad(run(x), (x, *block.parameters()))
    torch._dynamo.reset()
    with blocks.use_blocks(compiled=False, checkpoint_levels=[0]):
        actual = torch.autograd.grad(torch.compile(run, backend=backend, fullgraph=True)(x), (x, *block.parameters()))
    torch._dynamo.reset()
    assert len(graphs) == 1 and "tag_activation_checkpoint" in graphs[0]
    torch.testing.assert_close(actual, expected)


# Training


@pytest.mark.parametrize("loss_type", ["l1", "l2", "huber"])
@pytest.mark.parametrize("unet_number", [1, 2])
def test_the_same_loss_and_gradients_with_and_without_the_fast_path(loss_type, unet_number):
    imagen = make_imagen(stages=2, loss_type=loss_type)
    fast, reference = (loss_and_gradients(imagen.accelerate(preset), unet_number) for preset in ("auto", "reference"))
    assert distance(fast[0], reference[0]) < 1e-5 and fast[0].dtype == torch.float32
    assert largest(fast[1], reference[1]) < 2e-3
    half = loss_and_gradients(imagen.accelerate(precision="bfloat16"), unet_number)
    assert 0 < distance(half[0], reference[0]) < 0.02 and half[0].dtype == torch.float32


@pytest.mark.slow
def test_200_steps_follow_the_reference():
    reference, *_ = trained(preset="reference")
    assert reference[-20:].mean() < 0.5 * reference[:20].mean(), "nothing was learnt"
    for precision, band in BANDS.items():
        losses, imagen, optimizer, averages = trained(precision=precision)
        assert apart(losses, reference) < band, precision
        assert distance(losses[:5], reference[:5]) < 0.01
        assert {p.dtype for p in imagen.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in imagen.parameters() if p.grad is not None} == {torch.float32}
        moments = [v for state in optimizer.state.values() for k, v in state.items() if k.startswith("exp_avg")]
        assert moments and {v.dtype for v in moments} == {torch.float32}
        assert {v.dtype for v in averages.averages.values()} == {torch.float32}


def test_a_users_autocast_is_respected_in_training(monkeypatch):
    seen, denoise = [], Unet.denoise

    def watched(self, *args):
        out = denoise(self, *args)
        seen.append(out.dtype)
        return out

    monkeypatch.setattr(Unet, "denoise", watched)
    imagen = make_imagen()
    with torch.autocast("cpu", torch.bfloat16):
        imagen(torch.rand(2, 3, 8, 8), **make_words())
    imagen(torch.rand(2, 3, 8, 8), **make_words())
    imagen.accelerate(precision="bfloat16")(torch.rand(2, 3, 8, 8), **make_words())
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_super_resolution_alone_can_be_checkpointed():
    unet = make_super(**LOWRES)
    level = torch.full((1,), 3)
    x = torch.randn(1, 3, 8, 8)
    with blocks.use_blocks(compiled=False, checkpoint_levels=(0, 1)):
        unet(x, level, lowres_cond_img=x, lowres_noise_times=level).square().mean().backward()
    assert unet.downs[0][1].block1.project.weight.grad.abs().max() > 0
