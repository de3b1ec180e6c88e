"""What only a CUDA device can show of the fast path: graphs, synchronisation, memory, and how far bfloat16 is away."""

import gc
import itertools
import threading
import warnings

import pytest
import torch
from fast_path import BANDS, T, apart, denoise_by, distance, make_imagen, make_unet, make_words, sample, trained

from minimagen_fast import sampled_steps
from minimagen_fast.cuda_capture import capturing
from minimagen_fast.kept import kept_with
from minimagen_fast.Unet import Unet

pytestmark = pytest.mark.gpu

# Dynamo takes a minute for all blocks of two U-Nets: most tests do without.
EAGER = {"compile": "off"}
EXACT = {"precision": "float32", **EAGER}
FEW = {"sampler": "dpmpp_2m", "steps": 6, "cond_scale": 3.0}
SAMPLERS = [{}, {"steps": 6}, {"sampler": "ddim", "steps": 6}, {"sampler": "ddim", "steps": 6, "eta": 0.5}, FEW]


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def replays(monkeypatch):
    """One entry for each replay of a CUDA graph."""
    seen, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: seen.append(graph) or replay(graph))
    return seen


@pytest.fixture(autouse=True)
def every_capture_succeeds():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a step of .* could not be captured")
        yield


def on_card(stages=1, device="cuda", **settings):
    return make_imagen(stages).to(device).accelerate(**settings)


def reference(imagen, words=None, **arguments):
    """The images of plain torch, with the weights as they are now."""
    other = make_imagen(len(imagen.unets)).to(imagen.device).accelerate("reference")
    other.load_state_dict(imagen.state_dict())
    return sample(other, words, **arguments)


def graphs_of(imagen, stage=1):
    return [steps.graph for steps in kept_with(imagen.unets[stage - 1]).graphs.values()]


# The same images


@pytest.mark.parametrize("arguments", SAMPLERS, ids=str)
@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
def test_float32_within_rounding(replays, arguments, cond_scale):
    arguments = {**arguments, "cond_scale": cond_scale}
    imagen = on_card(stages=2, **EXACT)
    expected = reference(imagen, **arguments)
    for _ in range(2):
        assert distance(sample(imagen, **arguments), expected) < 2e-3
    assert replays


@pytest.mark.parametrize("arguments", SAMPLERS, ids=str)
def test_bfloat16_is_near(arguments):
    imagen = on_card(stages=2, **EAGER)
    assert imagen.acceleration.precision == "bfloat16"
    arguments = {"cond_scale": 3.0, **arguments}
    assert (sample(imagen, **arguments) - reference(imagen, **arguments)).abs().mean() < 0.02


@pytest.mark.slow
def test_the_default_is_near(replays):
    imagen = on_card(stages=2)
    assert imagen.acceleration.compile == "blocks" and imagen.acceleration.cuda_graphs == "on"
    expected = reference(imagen, **FEW)
    for _ in range(2):
        assert (sample(imagen, **FEW) - expected).abs().mean() < 0.02
    assert replays
    # What was compiled and captured follows the weights.
    with torch.no_grad():
        for parameter in imagen.parameters():
            parameter.mul_(1.1)
    assert (sample(imagen, **FEW) - reference(imagen, **FEW)).abs().mean() < 0.02


# Graphs


def test_all_steps_but_the_first_are_replayed_and_the_next_call_captures_nothing(replays):
    imagen, other = on_card(**EXACT), make_words(seed=3, device="cuda")
    sample(imagen, cond_scale=3.0)
    (graph,) = graphs_of(imagen)
    assert replays == [graph] * (T - 1)
    words, seed = other, 5
    assert (
        distance(sample(imagen, words, seed=seed, cond_scale=3.0), reference(imagen, words, seed=seed, cond_scale=3.0))
        < 2e-3
    )
    assert graphs_of(imagen) == [graph] and replays == [graph] * (2 * T - 1)


def test_a_captured_step_takes_over_guidance_weight_percentile_and_eta():
    imagen, plain = on_card(**EXACT), on_card().accelerate("reference")
    seen = []
    for cond_scale, percentile, eta in ((3.0, 0.95, 0.5), (1.5, 0.95, 0.5), (1.5, 0.6, 0.5), (1.5, 0.6, 0.9)):
        imagen.dynamic_thresholding_percentile = plain.dynamic_thresholding_percentile = percentile
        arguments = {"sampler": "ddim", "steps": 6, "cond_scale": cond_scale, "eta": eta}
        seen.append(sample(imagen, **arguments))
        assert distance(seen[-1], sample(plain, **arguments)) < 2e-3
    assert len(graphs_of(imagen)) == 1
    assert all(distance(before, after) > 1e-2 for before, after in itertools.pairwise(seen))


def test_other_shapes_are_captured_anew_and_few_are_kept():
    imagen, seen = on_card(**EXACT), set()
    for batch in (1, 2, 3, 4, 5, 6):
        words = make_words(batch, device="cuda")
        assert distance(sample(imagen, words, **FEW), reference(imagen, words, **FEW)) < 2e-3
        seen.update(map(id, graphs_of(imagen)))
        assert len(graphs_of(imagen)) <= sampled_steps._MOST_GRAPHS
    assert len(graphs_of(imagen)) == sampled_steps._MOST_GRAPHS


@pytest.mark.parametrize("settings", [EXACT, EAGER], ids=["float32", "bfloat16"])
def test_changed_weights_are_followed(settings):
    imagen = on_card(**settings)
    most = 2e-3 if settings is EXACT else 0.1
    before = sample(imagen, **FEW)
    (graph,) = graphs_of(imagen)
    with torch.no_grad():
        for parameter in imagen.parameters():
            parameter.mul_(1.2)
    after = sample(imagen, **FEW)
    assert distance(after, before) > 1e-2 and distance(after, reference(imagen, **FEW)) < most
    assert graphs_of(imagen) == [graph], "an edit in place moves nothing"
    for parameter in imagen.parameters():
        parameter.data = parameter.data * 0.9
    assert distance(sample(imagen, **FEW), reference(imagen, **FEW)) < most
    assert graphs_of(imagen) != [graph]


def test_a_model_that_went_away_and_came_back():
    imagen = on_card(**EXACT)
    expected = sample(imagen, **FEW)
    imagen.to("cpu")
    fill = torch.full((64, 2**20), torch.nan, device="cuda")
    imagen.to("cuda")
    assert distance(sample(imagen, **FEW), expected) < 2e-3 and fill.isnan().all()
    assert distance(sample(imagen.to("cpu").accelerate(), **FEW, device="cuda"), expected) < 0.1


def room_for_two(monkeypatch):
    """Memory for two images at a time."""
    denoise = Unet.denoise

    def out_of_memory(self, x, *args):
        if len(x) > 2:
            raise torch.OutOfMemoryError("no more")
        return denoise(self, x, *args)

    denoise_by(monkeypatch, out_of_memory)


def test_a_captured_step_when_memory_is_short(monkeypatch):
    imagen, words = on_card(**EXACT), make_words(5, device="cuda")
    expected = reference(imagen, words, **FEW)

    room_for_two(monkeypatch)
    with pytest.warns(UserWarning, match="does not suffice"):
        assert distance(sample(imagen, words, **FEW), expected) < 2e-3
    assert distance(sample(imagen, words, **FEW), expected) < 2e-3, "the next call tries what failed"
    assert None not in graphs_of(imagen)


def test_memory_is_short_after_a_capture_with_other_words(monkeypatch):
    imagen, words = on_card(**EXACT), make_words(4, seed=3, device="cuda")
    sample(imagen, make_words(4, device="cuda"), **FEW)
    (graph,) = graphs_of(imagen)
    expected = reference(imagen, words, **FEW)

    # The first step of a multistep sampler is not replayed: it finds the memory short, with a graph captured already.
    room_for_two(monkeypatch)
    with pytest.warns(UserWarning, match="does not suffice"):
        assert distance(sample(imagen, words, **FEW), expected) < 2e-3
    assert graphs_of(imagen) != [graph]


def test_samplings_in_two_streams_wait_for_one_another():
    imagen = on_card(**EXACT)
    tasks = [{"words": make_words(seed=seed, device="cuda"), "seed": seed, **FEW} for seed in range(2)]
    expected = [reference(imagen, **task) for task in tasks]
    streams = [torch.cuda.Stream() for _ in tasks]
    torch.cuda.synchronize()
    for _ in range(4):
        results = []
        for stream, task in zip(streams, tasks, strict=True):
            with torch.cuda.stream(stream):
                # So that the second sampling could overtake the first.
                torch.cuda._sleep(10_000_000)
                results.append(sample(imagen, **task))
        torch.cuda.synchronize()
        assert [distance(*pair) < 2e-3 for pair in zip(results, expected, strict=True)] == [True, True]


def test_a_capture_beside_a_loader_that_pins_memory(replays):
    data = torch.utils.data.TensorDataset(torch.rand(64, 3, 64, 64))
    loader = torch.utils.data.DataLoader(data, batch_size=1, num_workers=1, pin_memory=True)
    imagen = on_card(**EXACT)
    expected = reference(imagen, **FEW)
    stop = threading.Event()

    def load():
        while not stop.is_set():
            for (batch,) in loader:
                batch.to("cuda", non_blocking=True)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for steps in range(4, 12):
            sample(imagen, **{**FEW, "steps": steps})
        assert distance(sample(imagen, **FEW), expected) < 2e-3
    finally:
        stop.set()
        thread.join()
    assert replays


def test_random_numbers_are_drawn_after_a_capture_that_cannot_be_ended(monkeypatch):
    imagen, words, denoise = on_card(**EXACT), make_words(device="cuda"), Unet.denoise

    def waiting(self, x, *args):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return denoise(self, x, *args)

    denoise_by(monkeypatch, waiting)
    with pytest.warns(UserWarning, match="could not be captured"):
        images = imagen.sample(**words, progress=False, **FEW)
    assert images.isfinite().all() and torch.rand(1, device="cuda").isfinite()


def test_a_capture_that_cannot_be_ended_costs_no_memory_and_none_of_the_later_ones():
    device, keep = torch.device("cuda", torch.cuda.current_device()), torch.cuda.CUDAGraph()

    def reserved():
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def capture(graph, beside, waits=False):
        with capturing(graph, device, beside):
            torch.zeros(2**26, device=device)
            if waits:
                torch.cuda.synchronize()

    capture(keep, None)
    before = reserved()
    for beside in (None, keep, None, keep):
        with pytest.raises(RuntimeError):
            capture(torch.cuda.CUDAGraph(), beside, waits=True)
        assert reserved() < before + 2**26
    # torch took the first one's memory for being captured in.
    capture(torch.cuda.CUDAGraph(), keep)
    keep.replay()


def test_graphs_of_a_u_net_share_their_memory():
    imagen = on_card(**EXACT)
    expected = reference(imagen, **FEW)
    for steps in (4, 5, 6, 7):
        sample(imagen, **{**FEW, "steps": steps})
    first, *others = (graph.pool() for graph in graphs_of(imagen))
    assert others == [first] * 3
    assert distance(sample(imagen, **FEW), expected) < 2e-3


def test_a_graph_outlives_those_of_another_u_net():
    """In the libraries' workspaces, too, which captures would share."""
    imagen = on_card(stages=2, **EXACT)
    expected = reference(imagen, **FEW)
    for _ in range(2):
        assert distance(sample(imagen, **FEW), expected) < 2e-3
    kept_with(imagen.unets[0]).forget_graphs()
    torch.cuda.empty_cache()
    taken = torch.full((2**26,), float("nan"), device=imagen.device)
    assert distance(sample(imagen, **FEW), expected) < 2e-3
    kept_with(imagen.unets[1]).forget_graphs()
    torch.cuda.empty_cache()
    assert distance(sample(imagen, **FEW), expected) < 2e-3 and taken.isnan().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one(replays):
    imagen = on_card(device="cuda:1", **EXACT)
    expected = reference(imagen, **FEW)
    for _ in range(2):
        assert distance(sample(imagen, **FEW), expected) < 2e-3
    assert replays and torch.cuda.current_device() == 0


# What the loop costs


class Watched:
    """Runs a check between two steps of the loop, without the loop's knowing."""

    def __init__(self, monkeypatch, check):
        advance = sampled_steps.ReplayedSteps.advance

        def watched(steps, first):
            with check():
                advance(steps, first)

        monkeypatch.setattr(sampled_steps.ReplayedSteps, "advance", watched)


@pytest.mark.parametrize("arguments", SAMPLERS, ids=str)
def test_nothing_in_a_step_waits_for_the_device(monkeypatch, arguments):
    imagen = on_card(**EAGER)
    sample(imagen, **arguments)

    class Check:
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    Watched(monkeypatch, Check)
    sample(imagen, **arguments)
    # Also where nothing is captured.
    monkeypatch.setattr(sampled_steps.ReplayedSteps, "advance", sampled_steps.Steps.advance)
    Watched(monkeypatch, Check)
    sample(imagen, **arguments)


@pytest.mark.parametrize("arguments", SAMPLERS, ids=str)
def test_nothing_is_allocated_from_step_to_step(monkeypatch, arguments):
    imagen, allocations = on_card(**EAGER), []
    sample(imagen, **arguments)

    class Check:
        def __enter__(self):
            self.before = torch.cuda.memory_stats()["allocation.all.allocated"]

        def __exit__(self, *_):
            allocations.append(torch.cuda.memory_stats()["allocation.all.allocated"] - self.before)

    Watched(monkeypatch, Check)
    sample(imagen, **arguments)
    # The first step of a multistep sampler differs from the others and is not replayed.
    late = allocations[1:] if arguments.get("sampler") == "dpmpp_2m" else allocations
    assert late and set(late) == {0}, allocations


def test_memory_does_not_grow_from_call_to_call():
    imagen, sizes = on_card(stages=2, **EAGER), []
    for seed in range(4):
        sample(imagen, seed=seed, **FEW)
        gc.collect()
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[1] == sizes[2] == sizes[3], sizes


def test_what_is_kept_is_freed_with_the_model():
    # The libraries' own memory, which they keep.
    sample(on_card(**EAGER), **FEW)
    gc.collect()
    before = torch.cuda.memory_allocated()
    imagen = on_card(**EAGER)
    sample(imagen, **FEW)
    # At once, without a collection of cycles.
    del imagen
    assert torch.cuda.memory_allocated() - before < 2**20


def test_an_offloaded_u_net_leaves_nothing_behind():
    imagen = on_card(stages=2, **EAGER)
    first, second = sample(imagen, **FEW), sample(imagen, **FEW, offload_idle_unets=True)
    assert distance(first, second) < 0.1
    assert "_kept" not in vars(imagen.unets[0])


# Training


def loss_and_gradients(imagen, seed=3, *, unet_number=1):
    torch.manual_seed(seed)
    images = torch.rand(4, 3, 20, 20, device=imagen.device)
    imagen.zero_grad()
    loss = imagen(images, **make_words(4, device=imagen.device), unet_number=unet_number)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in imagen.parameters() if p.grad is not None])


@pytest.mark.parametrize("settings, most", [(EXACT, 1e-3), (EAGER, 0.1), ({**EAGER, "checkpoint_levels": [0, 1]}, 0.1)])
def test_a_training_step_is_that_of_plain_torch(settings, most):
    expected = loss_and_gradients(on_card(preset="reference"))
    actual = loss_and_gradients(on_card(**settings))
    assert distance(actual[0], expected[0]) < 0.2 * most and actual[0].dtype == torch.float32
    assert (actual[1] - expected[1]).norm() < most * expected[1].norm()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [EXACT, EAGER, {}], ids=["float32", "bfloat16", "compiled"])
def test_200_steps_follow_the_reference(settings):
    reference, *_ = trained(preset="reference", device="cuda")
    assert reference[-20:].mean() < 0.5 * reference[:20].mean(), "nothing was learnt"
    losses, imagen, *_ = trained(**settings, device="cuda")
    assert apart(losses, reference) < BANDS[imagen.acceleration.precision]


@pytest.mark.parametrize("settings", [EXACT, EAGER])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_step_waits_for_nothing(replays, settings, stage):
    imagen = on_card(stages=2, **settings)
    images, words = torch.rand(4, 3, 20, 20, device="cuda"), make_words(4, device="cuda")
    parameters = list(imagen.unets[stage - 1].parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step():
        imagen(images, **words, unet_number=stage).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def steps_without_waiting():
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step()
    imagen.accelerate(**settings, cuda_graphs="off")
    steps_without_waiting()
    assert not replays
    imagen.accelerate(**settings)
    for _ in range(3):
        step()
    replays.clear()
    steps_without_waiting()
    assert len(replays) == 4, "forward and backward passes"


@pytest.mark.parametrize(
    "settings",
    [
        EXACT,
        EAGER,
        {**EAGER, "checkpoint_levels": [0, 1]},
        pytest.param({}, marks=pytest.mark.slow, id="compiled"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", [1, 2])
def test_replayed_training_steps_are_those_that_are_launched(replays, settings, stage):
    imagen, launched = on_card(stages=2, **settings), on_card(stages=2, **settings, cuda_graphs="off")
    most = 1e-4 if settings is EXACT else 0.02
    for seed in range(6):
        expected = loss_and_gradients(launched, seed, unet_number=stage)
        actual = loss_and_gradients(imagen, seed, unet_number=stage)
        assert distance(actual[0], expected[0]) < most
        assert (actual[1] - expected[1]).norm() <= most * expected[1].norm()
        with torch.no_grad():
            for parameter in (*imagen.parameters(), *launched.parameters()):
                parameter.mul_(1.01)
    assert len(replays) == 2 * 4


def test_training_in_two_streams(replays):
    imagen, launched = on_card(**EXACT), on_card(**EXACT, cuda_graphs="off")
    expected = [loss_and_gradients(launched, seed) for seed in range(8)]
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for seed in range(8):
        with torch.cuda.stream(streams[seed % 2]):
            # So that the next step could overtake this one.
            torch.cuda._sleep(10_000_000)
            results.append(loss_and_gradients(imagen, seed))
    torch.cuda.synchronize()
    for actual, (loss, gradients) in zip(results, expected, strict=True):
        assert distance(actual[0], loss) < 1e-4 and (actual[1] - gradients).norm() < 1e-3 * gradients.norm()
    assert replays


def test_what_training_keeps_does_not_grow_and_goes_with_the_model(replays):
    # What libraries keep for the streams in which they are captured, too.
    imagen = on_card(**EAGER)
    for seed in range(4):
        loss_and_gradients(imagen, seed)
    del imagen
    gc.collect()
    before, sizes = torch.cuda.memory_allocated(), []
    imagen = on_card(**EAGER)
    for seed in range(8):
        loss_and_gradients(imagen, seed)
        sizes.append(torch.cuda.memory_allocated())
    assert replays and len(set(sizes[4:])) == 1, sizes
    del imagen
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_training_on_a_device_that_is_not_the_current_one(replays):
    imagen, launched = on_card(device="cuda:1", **EXACT), on_card(device="cuda:1", **EXACT, cuda_graphs="off")
    for seed in range(5):
        actual, expected = loss_and_gradients(imagen, seed), loss_and_gradients(launched, seed)
        assert (actual[1] - expected[1]).norm() < 1e-4 * expected[1].norm()
    assert replays and torch.cuda.current_device() == 0


def test_sampling_between_training_steps_follows():
    imagen = on_card(**EAGER)
    optimizer = torch.optim.AdamW(imagen.parameters(), lr=1e-2)
    for _ in range(3):
        loss_and_gradients(imagen)
        optimizer.step()
        assert distance(sample(imagen, **FEW), reference(imagen, **FEW)) < 0.2


def test_working_copies_on_the_card_are_of_half_the_size():
    unet = make_unet().cuda()
    duplicate = kept_with(unet).working_copy(unet, torch.bfloat16, torch.channels_last)
    sizes = [sum(p.nbytes for p in one.parameters()) for one in (unet, duplicate)]
    assert sizes[1] < 0.55 * sizes[0]
