"""What the benchmarks time of a cascade is what a user runs, and what is wrong in it would be found."""

import time
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    cascades,
    sampling_steps,
    test_ablation,
    test_denoiser,
    test_few_steps,
    test_sampling,
    test_sampling_step,
    test_startup,
    test_training,
    training_steps,
)
from benchmarks.denoisers import NETWORKS
from benchmarks.imagens import (
    ORIGINAL_GRAPHS,
    OURS,
    OURS_BF16,
    OURS_COMPILED,
    REFERENCE,
    SWITCHES,
    ImagenVariant,
    ablation,
    stage,
)
from benchmarks.measure import peak_bytes, saved_bytes
from benchmarks.prepared import Context, Prepared
from benchmarks.profiles import PROFILES
from benchmarks.results import SECTIONS, Identity
from minimagen_fast.acceleration import CHOICES
from minimagen_fast.Imagen import Imagen
from minimagen_fast.predictions import Task
from minimagen_fast.samplers import Sampler, Update
from minimagen_fast.sampling import repeated_step, sample_images
from minimagen_fast.Unet import Unet

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes_per_second": 1e10, "flops_per_second": {"float32": 1e11, "bfloat16": 2e11}}
MODULES = (test_sampling_step, test_denoiser, test_sampling, test_few_steps, test_training, test_ablation, test_startup)
BASE, SUPER = NETWORKS["tiny-base@16"], NETWORKS["tiny-super@32"]


@pytest.fixture
def context(tmp_path):
    return Context(CPU, PROFILES["smoke"], CEILINGS, cache_bytes=0, scratch=tmp_path)


@pytest.mark.parametrize(
    ("profile", "device"), [("smoke", "cpu"), ("cpu", "cpu"), ("full", "cpu"), ("gpu", "cuda"), ("full", "cuda")]
)
def test_every_profile_has_cases_of_every_section(profile, device):
    plans = [plan for module in MODULES for plan in module.plans(profile, torch.device(device))]
    assert {plan.identity.section for plan in plans} | {"kernels"} == {*SECTIONS}
    assert max(Counter(plan.identity.id for plan in plans).values()) == 1
    assert all(plan.seconds <= PROFILES[profile].seconds for plan in plans)
    if profile == "smoke":
        assert not any(plan.seconds for plan in plans), "nothing is compiled in CI"


def test_the_targets_on_a_cpu_are_measured():
    ids = {plan.identity.id for module in MODULES for plan in module.plans("cpu", CPU)}
    for batch in (1, 4):
        question = f"sampling-step/cpu-base@64/b{batch}-3x64x64/float32/"
        assert {question + variant for variant in ("original", "ours", "ours-bf16", "ours-compiled")} <= ids
    question = "training/quickstart-base@16/both/b32-3x16x16/float32/"
    assert {question + variant for variant in ("original", "ours", "ours-bf16")} <= ids


def test_an_ablation_goes_from_the_reference_path_to_the_whole_of_the_fast_one():
    first, *others = ablation(*SWITCHES)
    assert first is REFERENCE
    assert [variant.name for variant in others] == [f"+{name}" for name in SWITCHES]
    assert all(variant.preset == "reference" for variant in others)
    assert others[-1].settings.keys() == CHOICES.keys(), "every setting is switched"
    accelerations = [variant.imagen([BASE], CPU, timesteps=20).acceleration for variant in ablation(*SWITCHES)[:7]]
    assert accelerations[5] == OURS.imagen([BASE], CPU, timesteps=20).acceleration
    assert accelerations[6] == OURS_BF16.imagen([BASE], CPU, timesteps=20).acceleration
    for before, after in zip(accelerations, accelerations[1:], strict=False):
        assert before != after


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_ablation_asks_for_nothing_that_its_device_has_not(device):
    """A variant that does is not measured, and with it those after that switch nothing off again."""
    wrong = {"cpu": {("cuda_graphs", "on")}, "cuda": {("recorded_steps", "on"), ("freed_memory", "kept")}}[device]
    plans = list(test_ablation.plans("full", torch.device(device)))
    assert "+bfloat16" in {plan.identity.variant for plan in plans}
    for plan in plans:
        variant = next(each for each in plan.prepare.args if isinstance(each, ImagenVariant))
        assert not wrong & variant.settings.items(), plan.identity.id


def test_variants_of_ours_say_what_they_come_to():
    imagen = OURS_BF16.imagen([BASE], CPU, timesteps=20)
    about = OURS_BF16.about(imagen, CPU)
    assert about["computes_in"] == "bfloat16" and OURS_BF16.dtype(imagen) == torch.bfloat16
    assert "precision" in about["switched_on"] and "compile" not in about["switched_on"]
    assert REFERENCE.about(REFERENCE.imagen([BASE], CPU, timesteps=20), CPU)["switched_on"] == "nothing"
    assert OURS_COMPILED.seconds(CPU) > 0 == OURS.seconds(CPU) < OURS.seconds(torch.device("cuda"))


def test_the_smallest_cascade_of_a_network_keeps_its_weights():
    assert stage(BASE) == (BASE,)
    imagen = REFERENCE.imagen(stage(SUPER), CPU, timesteps=20)
    assert isinstance(imagen, Imagen) and imagen.image_sizes == (16, 32)
    expected = SUPER.build(CPU).state_dict()
    for name, value in imagen.unets[-1].state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("variant", [OURS, REFERENCE], ids=lambda variant: variant.name)
@pytest.mark.parametrize("sampler", [Sampler(), Sampler("dpmpp_2m", 5)], ids=lambda sampler: sampler.name)
def test_the_step_that_is_timed_is_one_of_a_sampling(variant, sampler):
    imagen = variant.imagen([BASE], CPU, timesteps=20).eval()
    inputs = BASE.inputs(2, CPU)
    task = Task(
        imagen.unets[0],
        Update(sampler, imagen.noise_schedulers[0], percentile=0.9, cond_scale=3.0),
        3.0,
        inputs["text_embeds"],
        inputs["text_mask"],
        None,
        None,
        None,
    )
    seen = []
    torch.manual_seed(0)
    sample_images(task, inputs["x"], imagen.acceleration, after_step=lambda number, images: seen.append(images))
    if sampler.name == "ddpm":
        with repeated_step(task, inputs["x"], imagen.acceleration) as step:
            torch.manual_seed(0)
            torch.testing.assert_close(step(), seen[0])
    with repeated_step(task, inputs["x"], imagen.acceleration, 1) as step:
        first = step().clone()
        assert not torch.equal(step(), first), "it goes on from its last images"


@pytest.mark.parametrize("network", [BASE, SUPER], ids=lambda network: network.name)
def test_a_wrong_step_is_found(network, context, monkeypatch):
    prepared = sampling_steps.prepare(network, OURS, 1, context)
    assert prepared.wrong(prepared.subject(0)) is None
    assert prepared.flops > 0 and prepared.floor.seconds > 0
    prepared.close()
    denoise = Unet.denoise
    # Two per cent of what is predicted: no more than a kernel that does something slightly else.
    monkeypatch.setattr(Unet, "denoise", lambda *args: 1.02 * denoise(*args))
    prepared = sampling_steps.prepare(network, OURS, 1, context)
    with torch.no_grad():
        images = prepared.subject(0)
    monkeypatch.undo()
    assert "away from the reference's" in prepared.wrong(images)


def test_a_sampling_in_few_steps_is_compared_with_the_same_one(context):
    cascade = cascades.Cascade.of("tiny", ("tiny-base@16",), 20, sampler="dpmpp_2m", steps=3)
    assert cascade.shape(2) == "b2-16-20steps"
    prepared = cascades.prepare(cascade, OURS, 2, context)
    images = prepared.subject(0)
    assert prepared.wrong(images) is None and "away" in prepared.wrong(images.roll(1, dims=-1))
    assert prepared.more([2.0, 4.0, 2.0])["images_per_second"] == 1


def test_short_steps_of_training_are_timed_more_often(context, monkeypatch):
    prepared, profile = training_steps.prepare(SUPER, OURS, 2, context), context.profile
    prepared.first()
    least = 2 * profile.min_rounds
    for patience, rounds in ((0, least), (10**6, max(least, profile.max_rounds))):
        monkeypatch.setattr(training_steps, "PATIENCE", patience)
        assert prepared.rounds() == rounds
    # There are pictures for all of them.
    assert all(prepared.sample() > 0 for _ in range(rounds))


def test_a_step_of_training_a_super_resolution_network(context):
    prepared = training_steps.prepare(SUPER, OURS, 2, context)
    found = prepared.first()
    loss, gradients = found
    assert prepared.wrong(found) is None
    assert "gradients" in prepared.wrong((loss, [1.1 * gradient for gradient in gradients]))
    started = time.perf_counter()
    samples = [prepared.sample() for _ in range(2)]
    assert 0 < sum(samples) <= time.perf_counter() - started
    extra = prepared.more(samples)
    assert extra["saved_bytes_per_image"] > 0 and prepared.images == 2
    plain = training_steps.prepare(SUPER, REFERENCE, 2, context)
    plain.first()
    assert plain.more([plain.sample()] * 2)["saved_bytes_per_image"] > extra["saved_bytes_per_image"]


@pytest.mark.parametrize("module", [sampling_steps, cascades, training_steps])
def test_memory_is_that_of_a_call_that_replays_nothing(module, context, monkeypatch):
    cascade = cascades.Cascade.of("tiny", ("tiny-base@16",), 20)
    network = cascade if module is cascades else BASE
    assert module.prepare(network, OURS, 1, context).memory_of is None, "on a CPU nothing is replayed"
    compiled = replace(ORIGINAL_GRAPHS, unets=replace(ORIGINAL_GRAPHS.unets, compile=False))
    assert module.prepare(network, compiled, 1, context).memory_of() is None

    monkeypatch.setattr(ImagenVariant, "without_graphs", lambda self, imagen, make: make)
    prepared = module.prepare(network, OURS, 1, context)
    before = prepared.subject(0)
    assert peak_bytes(prepared.memory_of(), CPU) > 0
    assert before is None or prepared.subject(0).shape == before.shape
    prepared.close()


def test_graphs_are_left_off_and_nothing_else():
    said = []

    class OnCuda(Imagen):
        acceleration = SimpleNamespace(cuda_graphs="on")

        def accelerate(self, preset, **settings):
            said.append((preset, settings))

    last = ablation("condition_cache", "cuda_graphs")[-1]
    call = last.without_graphs(OnCuda.__new__(OnCuda), lambda: len)
    assert not said, "only once it has been timed"
    assert call() is len and said == [("reference", {"condition_cache": "on", "cuda_graphs": "off"})]


def test_what_a_backward_needs_is_counted_by_storage_and_once():
    layer = torch.nn.Linear(64, 64, bias=False)
    x = torch.randn(128, 64)

    def forward():
        # Of x both products keep it; the views of the result are one storage; the weight is there anyway.
        y = (layer(x) + layer(x)).exp()
        return y[:64].square().sum() + y[64:].square().sum()

    assert saved_bytes(forward, layer) == x.nbytes + x.nbytes


def test_what_is_counted_for_a_backward_is_freed():
    """A training's activations would lie beside the next case, which the memory of a card might not suffice for."""
    layer, made = torch.nn.Linear(8, 8), []

    def forward():
        y = layer(torch.ones(4, 8)).exp()  # whose derivative is what it has made
        made.append(weakref.ref(y))
        return y.sum()

    assert saved_bytes(forward, layer) and made[0]() is None


def test_memory_is_told_for_each_image_and_a_case_is_closed(tmp_path):
    from benchmarks.harness import Harness, Plan
    from benchmarks.results import ResultFile

    closed = []

    class Benchmark:
        group = None

        def pedantic(self, target, rounds):
            target()

        class stats:
            class stats:
                data = (1.0, 1.0)

    context = Context(CPU, PROFILES["smoke"], CEILINGS, cache_bytes=0, scratch=tmp_path)
    harness = Harness(context, ResultFile(tmp_path / "result.json", {"profile": "smoke"}), time.monotonic())
    prepared = Prepared(lambda _: torch.ones(256), lambda _: None, images=4, close=lambda: closed.append(True))
    identity = Identity("training", "net", "both", "b4", "float32", "ours")
    record = harness.run(Plan(identity, lambda _: prepared), Benchmark())
    assert record.extra["peak_bytes_per_image"] == 256 and closed == [True]
    broken = Prepared(lambda _: 1 / 0, lambda _: None, close=lambda: closed.append(True))
    with pytest.raises(ZeroDivisionError):
        harness.run(Plan(identity, lambda _: broken), Benchmark())
    assert len(closed) == 2


def test_what_cannot_be_had_is_unavailable():
    from benchmarks.prepared import Unavailable

    with pytest.raises(Unavailable, match="cuda_graphs='on' cannot be had"):
        ImagenVariant("graphs", settings={"cuda_graphs": "on"}).imagen([BASE], CPU, timesteps=20)
