"""Operators that are taken down and run again."""

import gc
import weakref

import pytest
import torch

from minimagen_fast.recorded import NotRecordable, record, record_in_place

T = torch.tensor
WEIGHT = torch.nn.Parameter(T([[2.0, -1.0], [0.5, 3.0]]))


def gradient_of_weight(losses, gradient):
    return torch.autograd.grad(losses, [WEIGHT], gradient)


def run(recording, gradient, **inputs):
    with torch.no_grad():
        passes = recording.run(**inputs)
        losses = next(passes)
        return losses, passes.send(gradient)


def as_it_is(compute, gradient, **inputs):
    losses = compute(**inputs)
    return losses.detach(), list(gradient_of_weight(losses, gradient))


def products(x):
    return (x @ WEIGHT).sigmoid().sum(1)


def in_place(x):
    rows = x.new_empty(x.shape[0], 2)
    rows[:, :1] = (x @ WEIGHT)[:, 1:]
    rows[:, 1] = 7
    return rows.mul_(x).sum(1).add_(1)


def several_results(x):
    low, high = (x @ WEIGHT).chunk(2, dim=1)
    values, _ = torch.cat([high, low], dim=1).max(dim=1)
    return values


def of_constants(x):
    return ((x + T([1.0, 2.0])) @ WEIGHT.t().flip(1)).square().sum(1)


def of_parts(x):
    return torch.einsum("nk,mk->n", x[:, 1:], WEIGHT.unsqueeze(0)[0, :, :1]).exp()


FROZEN = torch.nn.BatchNorm1d(2).eval()


def of_norms_that_keep_no_averages(x):
    rows = x @ WEIGHT
    return (FROZEN(rows) * torch.nn.functional.instance_norm(rows.t()[None])[0].t()).sum(1)


@pytest.mark.parametrize(
    "compute", [products, in_place, several_results, of_constants, of_parts, of_norms_that_keep_no_averages]
)
def test_other_inputs_other_weights(compute):
    recording = record(compute, {"x": torch.randn(3, 2)}, gradient_of_weight)
    kept = WEIGHT.detach().clone()
    try:
        for seed in range(3):
            torch.manual_seed(seed)
            x, gradient = torch.randn(3, 2), torch.randn(3)
            expected = as_it_is(compute, gradient, x=x)
            actual = run(recording, gradient, x=x)
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1][0], expected[1][0])
            with torch.no_grad():
                WEIGHT.add_(torch.randn(2, 2))
    finally:
        with torch.no_grad():
            WEIGHT.copy_(kept)


def test_what_is_none_and_what_the_backward_pass_reads():
    def compute(x, y, z):
        assert z is None
        return (x @ WEIGHT).sum(1) + y

    inputs = {"x": torch.randn(3, 2), "y": torch.randn(3), "z": None}
    recording = record(compute, inputs, gradient_of_weight)
    assert recording.kept == ["x"]
    x, y = torch.randn(3, 2), torch.randn(3)
    losses, _ = run(recording, torch.ones(3), x=x, y=y, z=None)
    assert torch.equal(losses, compute(x, y, None).detach())


def test_what_the_backward_pass_reads_as_a_view_that_was_made_before():
    recording = record(lambda x: (x[:, :2] * WEIGHT[0]).sum(1), {"x": torch.randn(3, 3)}, gradient_of_weight)
    assert recording.kept == ["x"]


def test_views_of_views_are_made_in_one_step_and_once():
    def compute(x):
        rows = (x @ WEIGHT).t()[1:].unsqueeze(0)
        return rows.transpose(0, 1).flatten().square() * rows.squeeze()

    recording = record(compute, {"x": torch.randn(3, 2)}, gradient_of_weight)
    with torch.profiler.profile() as profile:
        run(recording, torch.ones(3), x=torch.randn(3, 2))
    names = {event.key for event in profile.key_averages()}
    assert "aten::as_strided" in names
    assert names.isdisjoint({"aten::t", "aten::unsqueeze", "aten::squeeze", "aten::view"})


def test_what_nothing_needs_does_not_run():
    def compute(x):
        for _ in range(50):
            x.exp()
        return (x @ WEIGHT).sum(1)

    recording = record(compute, {"x": torch.randn(3, 2)}, gradient_of_weight)
    with torch.profiler.profile() as profile:
        run(recording, torch.ones(3), x=torch.randn(3, 2))
    names = [event.key for event in profile.key_averages()]
    assert "aten::mm" in names and "aten::exp" not in names


def test_nothing_is_held_longer_than_it_is_needed():
    alive = []

    def compute(x):
        return (((x + 1) * 2).tanh() @ WEIGHT).sum(1)

    recording = record(compute, {"x": torch.randn(3, 2)}, gradient_of_weight)
    gc.collect()
    with torch.no_grad():
        x = torch.randn(3, 2)
        gone = weakref.ref(x)
        passes = recording.run(x=x)
        del x
        next(passes)
        alive.append(sum(isinstance(value, torch.Tensor) for value in passes.gi_frame.f_locals.values()))
    # The losses, and the rows, which the weight's gradient needs.
    assert alive == [2] and gone() is None


def held_between_the_passes(recording, **inputs):
    """Shapes of the tensors that are."""
    with torch.no_grad():
        passes = recording.run(**inputs)
        next(passes)
    return [tuple(value.shape) for value in passes.gi_frame.f_locals.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("rows, held", [(2**14, 2), (2**14 - 1, 3)])
def test_what_is_computed_in_no_time_is_not_kept(rows, held):
    def compute(x):
        return (torch.nn.functional.silu(x @ WEIGHT) @ WEIGHT).sum(1)

    recording = record(compute, {"x": torch.randn(rows, 2)}, gradient_of_weight)
    x, gradient = torch.randn(rows, 2), torch.randn(rows)
    # The images, the product, and silu of it if it is small.
    assert held_between_the_passes(recording, x=x).count((rows, 2)) == held
    losses, (found,) = run(recording, gradient, x=x)
    expected, (own,) = as_it_is(compute, gradient, x=x)
    assert torch.equal(losses, expected) and torch.equal(found, own)


def test_what_comes_of_memory_that_was_written_to_is_kept():
    def compute(x):
        doubled = x * 2
        rows = torch.nn.functional.silu(doubled)
        doubled.mul_(2)
        return (rows @ WEIGHT).sum(1) + (doubled @ WEIGHT).sum(1)

    recording = record(compute, {"x": torch.randn(2**15, 2)}, gradient_of_weight)
    x, gradient = torch.randn(2**15, 2), torch.randn(2**15)
    losses, (found,) = run(recording, gradient, x=x)
    expected, (own,) = as_it_is(compute, gradient, x=x)
    assert torch.equal(losses, expected) and torch.equal(found, own)


def with_a_value(x):
    return (x @ WEIGHT).sum(1) * x[0, 0].item()


def with_a_shape_of_values(x):
    return (x[x > 0].sum() * WEIGHT).sum(1)


def at_random(x):
    return (x @ WEIGHT).sum(1) + torch.rand(3)


def dropped_out(x):
    return torch.nn.functional.dropout(x @ WEIGHT, 0.5).sum(1)


def written_to(x):
    return (x.mul_(2) @ WEIGHT).sum(1)


def written_to_a_part(x):
    x[:, 0] = 1
    return (x @ WEIGHT).sum(1)


COUNTER = torch.zeros(1)


def counted(x):
    COUNTER.add_(1)
    return (x @ WEIGHT).sum(1)


NORM = torch.nn.BatchNorm1d(2, affine=False)
NORM.num_batches_tracked = None


def averaged(x):
    return NORM(x @ WEIGHT).sum(1)


@pytest.mark.parametrize(
    "compute, reason",
    [
        (averaged, "writes to what was there before"),
        (with_a_value, "not told by shapes alone"),
        (with_a_shape_of_values, "not told by shapes alone"),
        (at_random, "draws random numbers"),
        (dropped_out, "draws random numbers"),
        (written_to, "writes to what was there before"),
        (written_to_a_part, "writes to what was there before"),
        (counted, "writes to what was there before"),
    ],
)
def test_what_cannot_be_run_again_is_refused(compute, reason):
    with pytest.raises(NotRecordable, match=reason):
        record(compute, {"x": torch.randn(3, 2)}, gradient_of_weight)


def test_a_tensor_that_no_operator_made_of_another_is_refused():
    def compute(x):
        product = x @ WEIGHT
        other = torch.empty(0)
        other.set_(product.detach().untyped_storage(), 0, product.shape, product.stride())
        return other.sum(1) + product.sum(1)

    with pytest.raises(NotRecordable, match="gives a tensor another layout"):
        record(compute, {"x": torch.randn(3, 2)}, gradient_of_weight)


# In place


def sums_in_place(x, total, turned):
    """What is read and written to, parts of it, and what is made in between."""

    def step():
        made = (x * total[1]).sort(dim=-1).values
        total[:2] += made[:, 1]
        turned.t()[0] = total.flip(0)
        total.add_(turned.sum()).sin_()
        x.copy_(x + total[:, None])

    return step


def in_place_state():
    return torch.arange(6.0).reshape(2, 3), T([1.0, 0.5]), torch.ones(2, 4)


def test_a_step_in_place_is_made_again():
    own, expected = in_place_state(), in_place_state()
    made_again, step = record_in_place(sums_in_place(*own), own), sums_in_place(*expected)
    step()
    for number in range(3):
        assert all(map(torch.equal, own, expected)), number
        made_again()
        step()
    own[0].fill_(0.25)
    expected[0].fill_(0.25)
    made_again()
    step()
    assert all(map(torch.equal, own, expected)) and own[0].unique().numel() > 1


def test_what_may_not_be_written_to_is_refused():
    x, total, turned = in_place_state()
    with pytest.raises(NotRecordable, match="writes to what was there before"):
        record_in_place(sums_in_place(x, total, turned), [x, total])
    with pytest.raises(NotRecordable, match="gives a tensor another layout"):
        record_in_place(lambda: total.unsqueeze_(0), [total])


def test_nothing_but_the_tensors_is_held():
    own = in_place_state()
    made_again = record_in_place(sums_in_place(*own), own)
    waiting = [weakref.ref(tensor) for tensor in own]
    gc.disable()
    try:
        del own
        assert all(one() is not None for one in waiting)
        del made_again
        assert not any(one() is not None for one in waiting)
    finally:
        gc.enable()


@torch.no_grad()
def test_weights_can_be_swapped():
    """As conversions and load_state_dict do where ``torch.__future__`` says so, unless a view holds on to them."""
    weight, out = torch.nn.Parameter(torch.ones(2, 2)), torch.zeros(3, 2)
    made_again = record_in_place(lambda: out.copy_(torch.ones(3, 2) @ weight.t() + weight[0]), [out])
    made_again()
    assert torch.equal(out, torch.full((3, 2), 3.0))
    torch.utils.swap_tensors(weight, torch.nn.Parameter(torch.zeros(2, 2)))
    assert not weight.any()
