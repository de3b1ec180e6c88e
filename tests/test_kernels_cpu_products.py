"""Products and attention in float32 by oneDNN on a CPU, against the same in float64."""

import platform
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from minimagen_fast.kernels import (
    conv1x1_concat,
    cpu_products,
    cross_attention,
    dispatch,
    grouped_attention,
    linear,
    null_key_attention,
    null_key_cross_attention,
    use_implementation,
)

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """As on a processor where oneDNN is the faster, and however little there is to do; what it was asked to do."""
    monkeypatch.setattr(cpu_products, "_onednn_is_faster", lambda: True)
    monkeypatch.setattr(cpu_products, "_LEAST_MULTIPLICATIONS", 0)
    monkeypatch.setattr(cpu_products, "_LEAST_WITH_GRADIENTS", 0)
    monkeypatch.setattr(cpu_products, "_LEAST_SUMMED", 0)
    monkeypatch.setattr(grouped_attention, "_LEAST_QUERIES", 0)
    monkeypatch.setattr(grouped_attention, "_LEAST_SCORES", 0)
    done = []
    used = [(cpu_products, "_product"), (cpu_products, "summed_products")]
    for module, name in [*used, (grouped_attention, "grouped_products"), (grouped_attention, "summed_products")]:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, **k: done.append(f.__name__) or f(*a, **k))
    return done


def close(got, expected):
    torch.testing.assert_close(
        got.double(), expected, rtol=1e-4, atol=2e-6 * max([1.0, *expected.abs().flatten().tolist()])
    )


def with_gradients(function, tensors, upstream):
    """Result and gradients."""
    out = function(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))


def compare(function, expected, tensors, upstream):
    """A function in float32 against one in float64, forward, backward and without gradients."""
    singles = [x.float().requires_grad_() for x in tensors]
    doubles = [x.double().requires_grad_() for x in tensors]
    got, wanted = with_gradients(function, singles, upstream), with_gradients(expected, doubles, upstream)
    for one, other in zip(got, wanted, strict=True):
        close(one, other)
    with torch.no_grad():
        close(function(*singles), wanted[0])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 5), (0, 5), (1, 5)])
def test_linear(shape, biased, faster):
    torch.manual_seed(0)
    tensors = [torch.randn(shape), torch.randn(7, 5), *([torch.randn(7)] if biased else [])]
    compare(linear, F.linear, tensors, torch.randn(*shape[:-1], 7))
    assert {"_product", "summed_products"} <= set(faster)


@pytest.mark.parametrize("layout", ["rows", "columns", "sliced", "every second"])
@pytest.mark.parametrize("which", ["x", "weight"])
def test_linear_of_any_layout(which, layout):
    torch.manual_seed(0)
    views = {
        "rows": lambda x: x,
        "columns": lambda x: x.t().contiguous().t(),
        "sliced": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
        "every second": lambda x: x.repeat_interleave(2, 0)[::2],
    }
    x, weight = torch.randn(6, 5), torch.randn(7, 5)
    if which == "x":
        x = views[layout](x)
    else:
        weight = views[layout](weight)
    compare(linear, F.linear, [x, weight], torch.randn(6, 7))


@pytest.mark.parametrize("layout", ["every second", "one for all"])
def test_linear_with_a_bias_of_any_layout(layout):
    x, weight = torch.randn(6, 5), torch.randn(7, 5)
    bias = torch.randn(14)[::2] if layout == "every second" else torch.randn(1).expand(7)
    close(linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("weight, bias", [((7, 4), None), ((7, 5), (6,)), ((4,), None)])
def test_shapes_that_do_not_fit_are_refused_as_torch_does(weight, bias, faster):
    tensors = torch.randn(3, 5), torch.randn(weight), None if bias is None else torch.randn(bias)
    said = []
    for function in (linear, F.linear):
        with pytest.raises(RuntimeError) as refused:
            function(*tensors)
        said.append(str(refused.value))
    assert said[0] == said[1] and not faster


def test_gradients_that_nobody_wants_are_not_computed():
    x, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None
    x.requires_grad_()
    linear(x, weight.detach()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_what_no_gradient_is_made_of_may_be_changed(wanted):
    leaves = [torch.randn(shape, requires_grad=i in wanted) for i, shape in enumerate([(4, 3), (5, 3), (5,)])]
    tensors = [leaf.clone() for leaf in leaves]
    expected = torch.autograd.grad(F.linear(*tensors).sum(), [leaves[i] for i in wanted])
    out = linear(*tensors)
    with torch.no_grad():
        # Of x the weight's gradient is made, and of the weight that of x.
        for i, needed in ((0, 1), (1, 0)):
            if needed not in wanted:
                tensors[i].zero_()
    for got, right in zip(torch.autograd.grad(out.sum(), [leaves[i] for i in wanted]), expected, strict=True):
        close(got, right.double())


def test_gradients_of_gradients():
    x, weight = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    results = []
    for function in (linear, F.linear):
        (first,) = torch.autograd.grad(function(x, weight).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), (x, weight)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_batched_gradients_of_a_weight(faster):
    x, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    out, upstream = linear(x, weight), torch.randn(2, 4, 5)
    (got,) = torch.autograd.grad(out, weight, upstream, is_grads_batched=True)
    close(got, torch.einsum("bni,nj->bij", upstream, x).double())
    assert "summed_products" not in faster


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 2), (64, 8), (0, 3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_of_products(shape, threads):
    torch.manual_seed(0)
    x, y = torch.randn(*shape, 5), torch.randn(*shape, 19)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = torch.einsum("ngk,ngm->km", x.double(), y.double())
        close(cpu_products.summed_products(x, y), expected)
        apart = [torch.cat((z, z), dim=-1)[..., : z.shape[-1]] for z in (x, y)]
        close(cpu_products.summed_products(*apart), expected)
    finally:
        torch.set_num_threads(before)


def test_products_of_groups():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 3, 16), torch.randn(3, 5, 16)
    expected = torch.einsum("ngk,gmk->ngm", x.double(), weight.double())
    got = cpu_products.grouped_products(x, weight)
    assert got.is_contiguous()
    close(got, expected)
    close(cpu_products.grouped_products(x.transpose(0, 1).contiguous().transpose(0, 1), weight), expected)


@pytest.mark.parametrize("piece", [1, 40, 2**20])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scored", [False, True])
def test_attention_of_groups(piece, masked, scored, monkeypatch):
    monkeypatch.setattr(grouped_attention, "_PIECE", piece)
    torch.manual_seed(0)
    n, groups, m, d = 5, 3, 7, 16
    q, k, v = torch.randn(n, groups, d + scored), torch.randn(groups, m, d), torch.randn(groups, m, d)
    visible = torch.rand(groups, m) < 0.5 if masked else None
    if masked:
        visible[:, 0] = True
    first = torch.ones(m)
    first[0] = 0 if scored else 1

    def expected(q, k, v):
        scores = torch.einsum("ngd,gmd->ngm", q[..., :d], k * first[:, None])
        if scored:
            scores = scores + q[..., d:] * (1 - first)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1) if masked else scores.softmax(-1)
        out = torch.einsum("ngm,gmd->ngd", weights, v * first[:, None])
        return torch.cat((out, weights[..., :1]), dim=-1) if scored else out

    def ours(q, k, v):
        return grouped_attention.grouped_attention(q, k * first[:, None], v * first[:, None], visible)

    compare(ours, expected, [q, k, v], torch.randn(n, groups, d + scored))


@pytest.mark.parametrize("piece", [1, 2**20])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("own_values", [False, True])
def test_keys_that_all_groups_share(piece, masked, shared, own_values, monkeypatch, faster):
    monkeypatch.setattr(grouped_attention, "_PIECE", piece)
    torch.manual_seed(0)
    n, groups, own, d = 5, 3, 3, 16
    visible = torch.rand(groups, own + shared) < 0.6 if masked else None
    if masked:
        visible[:, 0] = True
    given = [torch.randn(s) for s in ((n, groups, d), (groups, own, d), (groups, own, d), (shared, d))]
    if own_values:
        del given[2]

    def all_of(q, k, *rest):
        *v, more = rest
        return q, k, v[0] if v else k, more

    def expected(*given):
        q, k, v, more = all_of(*given)
        k, v = (torch.cat((x, more.expand(groups, -1, -1)), dim=1) for x in (k, v))
        scores = torch.einsum("ngd,gmd->ngm", q, k)
        weights = (scores.masked_fill(~visible, -torch.inf) if masked else scores).softmax(-1)
        return torch.einsum("ngm,gmd->ngd", weights, v)

    def ours(*given):
        q, k, v, more = all_of(*given)
        return grouped_attention.grouped_attention(q, k, v, visible, shared=more)

    compare(ours, expected, given, torch.randn(n, groups, d))
    assert "summed_products" in faster


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (3,), (0, 3), (2, 3)])
def test_attention_with_some_gradients(wanted):
    torch.manual_seed(0)
    tensors = [torch.randn(5, 2, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16), torch.randn(6, 16)]
    upstream = torch.randn(5, 2, 16)

    def gradients(*chosen):
        leaves = [x.clone().requires_grad_(i in chosen) for i, x in enumerate(tensors)]
        *others, shared = leaves
        grouped_attention.grouped_attention(*others, shared=shared).backward(upstream)
        return [x.grad for x in leaves]

    every, some = gradients(0, 1, 2, 3), gradients(*wanted)
    for i, gradient in enumerate(some):
        assert gradient is None if i not in wanted else torch.equal(gradient, every[i])


def test_gradients_of_results_that_are_one_number_everywhere():
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((5, 2, 16), (2, 7, 16), (2, 7, 16))]
    out = grouped_attention.grouped_attention(*tensors)
    expanded, dense = torch.ones(()).expand_as(out), torch.ones_like(out)
    several = (torch.autograd.grad(out, tensors, upstream, retain_graph=True) for upstream in (expanded, dense))
    for got, expected in zip(*several, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_of_gradients_and_batched_ones_are_refused_by_name(which):
    tensors = [torch.randn(shape) for shape in ((5, 2, 16), (2, 7, 16), (2, 7, 16))]
    tensors[which].requires_grad_()
    out = grouped_attention.grouped_attention(*tensors)
    with pytest.raises(NotImplementedError, match='attention has no batched gradients.*"reference"'):
        torch.autograd.grad(out, tensors[which], torch.stack([out, out]), is_grads_batched=True, retain_graph=True)
    # That nothing has come in that needs gradients does not mean that nothing depends on what goes out.
    (gradient,) = torch.autograd.grad(out.sum(), tensors[which], create_graph=True)
    with pytest.raises(NotImplementedError, match='attention_backward has no gradients.*"reference"'):
        gradient.square().sum().backward()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_a_null_key(shared, masked, faster):
    torch.manual_seed(0)
    b, n, m, heads, d = 2, 5, 7, 3, 16
    width = d if shared else heads * d
    tensors = [torch.randn(s) for s in ((b, n, heads * d), (b, m, width), (b, m, width), (d,), (d,))]
    mask = torch.rand(b, m) < 0.5 if masked else None

    def by(implementation):
        return lambda *given: null_key_attention(*given, heads=heads, mask=mask, implementation=implementation)

    compare(by("auto"), by("reference"), tensors, torch.randn(b, n, heads * d))
    assert "grouped_products" in faster


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention(masked, faster):
    torch.manual_seed(0)
    b, n, m, c, heads, d, dim = 2, 9, 7, 16, 3, 64, 24
    width = heads * d
    shapes = (b, n, dim), (b, m, c), (width, dim), (2 * width, c), (dim, width), (d,), (d,)
    tensors = [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
    mask = torch.rand(b, m) < 0.5 if masked else None

    def products(*given):
        return cross_attention._with_products(*given, heads, mask)

    def keys(*given):
        return null_key_cross_attention(*given, heads=heads, mask=mask, implementation="reference")

    compare(products, keys, tensors, torch.randn(b, n, dim))
    assert {"grouped_products", "_product"} <= set(faster)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("c", [16, 100])
def test_cross_attention_to_shared_tokens(masked, c, faster):
    torch.manual_seed(0)
    b, n, m, s, heads, d, dim = 2, 40, 3, 5, 3, 64, 24
    width = heads * d
    shapes = (b, n, dim), (b, m, c), (width, dim), (2 * width, c), (dim, width), (d,), (d,), (s, c)
    tensors = [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
    mask = torch.rand(b, m + s) < 0.5 if masked else None

    def apart(*given):
        *others, shared = given
        return null_key_cross_attention(*others, heads=heads, mask=mask, shared_context=shared)

    def together(x, context, *given):
        *others, shared = given
        context = torch.cat((context, shared.expand(b, -1, -1)), dim=1)
        return null_key_cross_attention(x, context, *others, heads=heads, mask=mask, implementation="reference")

    compare(apart, together, tensors, torch.randn(b, n, dim))
    # Where the tokens themselves are the keys.
    assert ("summed_products" in faster) or c == 100


def test_no_batch_at_all():
    q, kv, null = torch.zeros(0, 4, 32), torch.zeros(0, 3, 16), torch.zeros(16)
    assert null_key_attention(q, kv, kv, null, null, heads=2).shape == q.shape


def test_where_oneDNN_is_not_asked(faster, monkeypatch):
    x = torch.randn(4, 16)
    with use_implementation("reference"):
        linear(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, x).dtype == torch.bfloat16
    with monkeypatch.context() as context:
        context.setattr(torch.backends.mkldnn, "enabled", False)
        linear(x, x)
    linear(x.double(), x.double())
    with FakeTensorMode(allow_non_fake_inputs=True):
        linear(x, x)
    torch.func.grad(lambda x: linear(x, x).sum())(x)

    class Quantised(torch.Tensor):
        pass

    linear(x, x.as_subclass(Quantised))
    null = torch.randn(16)
    null_key_attention(x[None], x[None].as_subclass(Quantised), x[None], null, null, heads=1)
    with monkeypatch.context() as context:
        context.setattr(torch.jit, "is_tracing", lambda: True)
        linear(x, x)
    torch.compile(linear, backend="eager", fullgraph=True)(x, x)
    monkeypatch.setattr(cpu_products, "_onednn_is_faster", lambda: False)
    linear(x, x)
    assert not faster


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_two_images_is_one_product(faster, memory_format, monkeypatch):
    convolutions, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: convolutions.append(args) or conv2d(*args))
    shapes = ((2, 16, 3, 5), (2, 8, 3, 5), (32, 24, 1, 1), (32,))
    x, skip, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    compare(
        lambda x, skip, *more: conv1x1_concat(x.contiguous(memory_format=memory_format), skip, *more, skip_scale=0.7),
        lambda x, skip, weight, bias: F.conv2d(torch.cat((x, skip * 0.7), dim=1), weight, bias),
        [x, skip, weight, bias],
        torch.randn(2, 32, 3, 5).contiguous(memory_format=memory_format),
    )
    # With gradients, and the same in float64; without gradients. Then the product that is the gradient of both images.
    singles = [args for args in convolutions if args[0].dtype == torch.float32]
    if memory_format == torch.channels_last:
        assert faster.count("_product") == 3 and faster.count("summed_products") == 1 and not singles
    else:
        assert len(singles) == 2 and not faster


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_weights():
    x, context, null = torch.randn(2, 40, 16), torch.randn(2, 3, 16), torch.randn(16)
    weights = [torch.randn(rows, 16).relu() for rows in (16, 32, 16)]
    sparse = [weight.to_sparse_csr() for weight in weights]
    close(linear(x, sparse[0]), linear(x.double(), weights[0].double()))
    out, expected = (null_key_cross_attention(x, context, *w, null, null, heads=1) for w in (sparse, weights))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_more_scores_than_may_be_kept_are_left_to_the_library(faster, monkeypatch):
    q, kv, null = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 7, 16), torch.randn(16)
    monkeypatch.setattr(grouped_attention, "_MOST_KEPT", 2 * 5 * 2 * 8 - 1)
    null_key_attention(q, kv, kv, null, null, heads=2)
    assert not faster
    null_key_attention(q.detach(), kv, kv, null, null, heads=2)
    assert "grouped_products" in faster


def test_another_choice_is_heard(faster):
    q, kv, null = torch.randn(2, 5, 32), torch.randn(2, 7, 16), torch.randn(16)
    with dispatch.use_attention("sdpa"):
        null_key_attention(q, kv, kv, null, null, heads=2)
    assert not faster


def test_the_processor_decides(monkeypatch):
    # The function itself, which the other tests replace.
    monkeypatch.undo()
    found = []
    for family, capabilities in (
        (26, {"avx512_f": True, "cpu_name": "AMD EPYC"}),
        (25, {"avx512_f": True, "cpu_name": "AMD EPYC"}),
        (26, {"avx512_f": False, "cpu_name": "AMD EPYC"}),
        (26, {"avx512_f": True, "cpu_name": "Intel(R) Xeon(R)"}),
        (26, {}),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        monkeypatch.setattr(cpu_products, "_family", lambda found=family: found)
        found.append(cpu_products._onednn_is_faster.__wrapped__())
    assert found == [torch.backends.mkl.is_available(), False, False, False, False]


def test_the_family_is_what_the_system_says(monkeypatch):
    said = {
        "processor : 0\ncpu family\t: 26\nmodel\t\t: 17\nprocessor : 1\ncpu family\t: 25\n": 26,
        "processor : 0\nBogoMIPS : 50\n": 0,
    }
    for text, family in said.items():
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert cpu_products._family() == family
    monkeypatch.setattr(Path, "read_text", Path.readlink)
    for text, family in {"AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD": 25, "": 0}.items():
        monkeypatch.setattr(platform, "processor", lambda text=text: text)
        assert cpu_products._family() == family
