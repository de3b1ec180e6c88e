"""One policy for how a model is run: what it comes to on a device, and that nothing but speed depends on it."""

import copy
import dataclasses
import functools
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from fast_path import make_imagen, make_words, sample

from minimagen_fast import acceleration as policy
from minimagen_fast import host_memory
from minimagen_fast.acceleration import ASKED_FOR, CHOICES, ENVIRONMENT_VARIABLE, checked_request, resolve
from minimagen_fast.Imagen import Imagen
from minimagen_fast.kernels import dispatch, implementation, launch
from minimagen_fast.training import create_directory, get_default_args, get_minimagen_parser, get_model_size
from minimagen_fast.training import save_training_info as save
from minimagen_fast.Unet import BaseTest

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
FLOAT, HALF = torch.float32, torch.bfloat16
OFF = {
    "memory_format": "contiguous",
    "kernels": "reference",
    "attention": "reference",
    "compile": "off",
    "cuda_graphs": "off",
    "recorded_steps": "off",
    "condition_cache": "off",
    "freed_memory": "returned",
}


@pytest.fixture(autouse=True)
def no_request(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    clear = policy._no_compiler.cache_clear
    clear()
    yield
    clear()


@pytest.fixture
def card(monkeypatch):
    """A CUDA device of some compute capability, for all that is asked of it here."""

    def have(capability=(9, 0), triton=True, build=None):
        monkeypatch.setattr(launch, "capability", lambda device: capability)
        monkeypatch.setattr(launch, "AVAILABLE", triton)
        monkeypatch.setattr(launch, "_missing_to_build", build or functools.cache(lambda: None))
        return CUDA

    return have


def values(resolved):
    return {name: getattr(resolved, name) for name in CHOICES}


# What automatic settings come to


@pytest.mark.parametrize("device, memory_format", [(CPU, "channels_last"), (META, "contiguous")])
def test_without_a_card(device, memory_format):
    assert values(resolve({}, device, FLOAT)) == {
        "precision": "float32",
        "memory_format": memory_format,
        "kernels": "auto",
        "attention": "auto",
        "compile": "off",
        "cuda_graphs": "off",
        "recorded_steps": "on" if device == CPU else "off",
        "condition_cache": "on",
        "freed_memory": "kept" if device == CPU and not host_memory.obstacle() else "returned",
    }


def test_on_a_card(card):
    assert values(resolve({}, card(), FLOAT)) == {
        "precision": "bfloat16",
        "memory_format": "channels_last",
        "kernels": "auto",
        "attention": "auto",
        "compile": "blocks",
        "cuda_graphs": "on",
        "recorded_steps": "off",
        "condition_cache": "on",
        "freed_memory": "returned",
    }


def test_on_a_card_without_tensor_cores_for_bfloat16(card):
    resolved = resolve({}, card((7, 5)), FLOAT)
    assert resolved.precision == "float32" and "no tensor cores" in resolved.reasons["precision"]
    assert resolved.cuda_graphs == "on"


def test_on_a_card_without_triton(card):
    resolved = resolve({}, card(triton=False), FLOAT)
    assert resolved.compile == "off" and "triton" in resolved.reasons["compile"]


@pytest.mark.parametrize("device", [CPU, META, CUDA], ids=str)
@pytest.mark.parametrize("weights", [HALF, torch.float16, torch.float64])
def test_weights_that_are_not_float32_say_the_precision(card, device, weights):
    card()
    resolved = resolve({}, device, weights)
    assert resolved.dtype == weights and resolved.reasons["precision"] == "the dtype of the weights"


@pytest.mark.parametrize("device", [CPU, META, CUDA], ids=str)
@pytest.mark.parametrize("request_", [{}, {"precision": "float32", "condition_cache": "off"}])
def test_every_setting_has_a_reason_that_can_be_read(card, device, request_):
    card()
    resolved = resolve(request_, device, FLOAT)
    names = [*CHOICES, "checkpoint_levels"]
    assert list(resolved.reasons) == names and all(resolved.reasons.values())
    assert {name for name, reason in resolved.reasons.items() if reason == ASKED_FOR} == set(request_)
    lines = str(resolved).splitlines()
    assert [line.split()[0] for line in lines] == names
    for name, line in zip(names, lines, strict=True):
        assert str(getattr(resolved, name)) in line and line.endswith(resolved.reasons[name])


def test_it_says_what_torch_calls_it():
    resolved = resolve({"precision": "bfloat16"}, CPU, FLOAT)
    assert resolved.dtype is torch.bfloat16 and resolved.layout is torch.channels_last
    assert resolve({}, META, FLOAT).layout is torch.contiguous_format


def test_it_is_frozen_and_equal_to_what_does_the_same():
    asked, automatic = resolve({"precision": "float32"}, CPU, FLOAT), resolve({}, CPU, FLOAT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        automatic.precision = "bfloat16"
    assert asked == automatic and hash(asked) == hash(automatic) and asked.reasons != automatic.reasons
    assert resolve({"precision": "bfloat16"}, CPU, FLOAT) != automatic


# What is asked for


@pytest.mark.parametrize("device", [CPU, META, CUDA], ids=str)
@pytest.mark.parametrize("weights", [FLOAT, HALF])
def test_reference_switches_everything_off(card, device, weights):
    card()
    resolved = resolve(checked_request("reference"), device, weights)
    assert values(resolved) == {"precision": str(weights).removeprefix("torch."), **OFF}
    assert set(checked_request("reference")) == {*CHOICES, "checkpoint_levels"}, "a setting that the preset forgets"


def test_settings_change_a_preset():
    request = checked_request("reference", condition_cache="on", kernels="auto")
    assert request["condition_cache"] == "on" and request["attention"] == "reference"
    resolved = resolve(request, CPU, FLOAT)
    assert resolved.kernels == "auto" and resolved.reasons["kernels"] != ASKED_FOR
    assert checked_request(checkpoint_levels=[0, 1]) == {"checkpoint_levels": (0, 1)}
    assert checked_request("reference", checkpoint_levels="auto")["checkpoint_levels"] == "auto"


@pytest.mark.parametrize(
    "preset, settings, error, message",
    [
        ("fast", {}, ValueError, "preset must be 'auto' or 'reference', got 'fast'"),
        ("auto", {"speed": "high"}, TypeError, "no setting 'speed'; there are precision, "),
        ("auto", {"precision": "float16"}, ValueError, "precision must be auto or one of .*got 'float16'"),
        ("auto", {"compile": True}, ValueError, "compile must be auto or one of off, blocks; got True"),
        ("auto", {"checkpoint_levels": 1}, TypeError, "checkpoint_levels must be auto or a list.*got 1"),
        ("auto", {"checkpoint_levels": (-1,)}, TypeError, "checkpoint_levels must be auto or a list"),
        ("auto", {"checkpoint_levels": (True,)}, TypeError, "checkpoint_levels must be auto or a list"),
    ],
)
def test_requests_that_cannot_be_read(preset, settings, error, message):
    with pytest.raises(error, match=message):
        checked_request(preset, **settings)


@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_graphs_that_cannot_be_had(device):
    with pytest.raises(ValueError, match=f"cuda_graphs='on' cannot be had: the model is on {device}.*'auto'"):
        resolve({"cuda_graphs": "on"}, device, FLOAT)


def test_graphs_need_the_condition_cache(card):
    with pytest.raises(ValueError, match="cuda_graphs='on' cannot be had: it needs condition_cache='on'"):
        resolve({"cuda_graphs": "on", "condition_cache": "off"}, card(), FLOAT)
    resolved = resolve({"condition_cache": "off"}, card(), FLOAT)
    assert resolved.cuda_graphs == "off" and resolved.reasons["cuda_graphs"] == "it needs the condition cache"


@pytest.mark.parametrize("device", [META, CUDA])
def test_recorded_steps_are_for_cpus(card, device):
    card()
    with pytest.raises(ValueError, match=f"recorded_steps='on' cannot be had: the model is on {device}.*'auto'"):
        resolve({"recorded_steps": "on"}, device, FLOAT)


@pytest.mark.parametrize("other", [{"compile": "blocks"}, {"checkpoint_levels": [0]}], ids=str)
def test_recorded_steps_go_with_blocks_as_they_are(monkeypatch, other):
    monkeypatch.setattr(policy, "_no_compiler", lambda device: None)
    with pytest.raises(ValueError, match="recorded_steps='on' cannot be had: it needs compile='off' and no checkpoint"):
        resolve({"recorded_steps": "on", **other}, CPU, FLOAT)
    resolved = resolve(other, CPU, FLOAT)
    assert resolved.recorded_steps == "off" and resolved.reasons["recorded_steps"].startswith("it needs compile='off'")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precisions_that_weights_do_not_have(precision):
    with pytest.raises(ValueError, match=f"precision='{precision}' cannot be had: the weights are torch.float16"):
        resolve({"precision": precision}, CPU, torch.float16)
    assert resolve({"precision": "bfloat16"}, CPU, HALF).precision == "bfloat16"


@pytest.mark.parametrize("name", ["kernels", "attention"])
def test_triton_where_it_cannot_run(monkeypatch, name):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=f"{name}='triton' cannot be had: the tensors are on cpu, not on a CUDA"):
        resolve({name: "triton"}, CPU, FLOAT)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert getattr(resolve({name: "triton"}, CPU, FLOAT), name) == "triton"
    monkeypatch.setattr(launch, "AVAILABLE", False)
    with pytest.raises(ValueError, match=f"{name}='triton' cannot be had: triton is not installed"):
        resolve({name: "triton"}, CPU, FLOAT)


def test_compilation_that_cannot_be_had(card, monkeypatch):
    with pytest.raises(ValueError, match="compile='blocks' cannot be had: torch.compile needs triton"):
        resolve({"compile": "blocks"}, card(triton=False), FLOAT)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(policy.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="compile='blocks' cannot be had: torch.compile needs a C"):
        resolve({"compile": "blocks"}, CPU, FLOAT)


def test_a_card_too_old_for_compilation(card):
    resolved = resolve({}, card((6, 1)), FLOAT)
    assert resolved.compile == "off" and "needs compute capability (7, 0)" in resolved.reasons["compile"]
    with pytest.raises(ValueError, match=r"compile='blocks' cannot be had: .*\(7, 0\) .*cuda:0 has \(6, 1\)"):
        resolve({"compile": "blocks"}, CUDA, FLOAT)


def test_attention_that_the_precision_or_the_card_does_not_allow(card, monkeypatch):
    request = {"attention": "sdpa_merge"}
    assert resolve(request, card(), FLOAT).attention == "sdpa_merge", "auto comes to bfloat16"
    for precision in ("float32", "weights"):
        with pytest.raises(ValueError, match="attention='sdpa_merge' cannot be had: it takes .*, not torch.float32"):
            resolve({**request, "precision": precision}, CUDA, FLOAT)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "attention=sdpa_merge")
    with pytest.raises(ValueError, match=rf"{ENVIRONMENT_VARIABLE}: attention=.* needs compute capability \(8, 0\)"):
        resolve({}, card((7, 5)), torch.float16)
    assert resolve(request, CPU, FLOAT).attention == "sdpa_merge"


@pytest.mark.parametrize("name", ["kernels", "attention"])
def test_triton_does_not_compute_in_float64(monkeypatch, name):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(ValueError, match=f"{name}='triton' cannot be had: it computes in .* not from torch.float64"):
        resolve({name: "triton"}, CPU, torch.float64)


def test_what_is_asked_for_is_had(card):
    request = {"precision": "float32", "memory_format": "contiguous", "compile": "off", "cuda_graphs": "off"}
    assert {name: getattr(resolve(request, card(), FLOAT), name) for name in request} == request


# The environment variable


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {}),
        ("auto", {}),
        ("reference", checked_request("reference")),
        ("precision=bfloat16", {"precision": "bfloat16"}),
        ("precision=bfloat16,compile=off", {"precision": "bfloat16", "compile": "off"}),
        (" precision=bfloat16 , compile=off ", {"precision": "bfloat16", "compile": "off"}),
        ("reference,condition_cache=on", {**checked_request("reference"), "condition_cache": "on"}),
        ("checkpoint_levels=0", {"checkpoint_levels": (0,)}),
        ("compile=off,checkpoint_levels=0+2", {"compile": "off", "checkpoint_levels": (0, 2)}),
        ("checkpoint_levels=auto", {"checkpoint_levels": "auto"}),
    ],
)
def test_the_environment_asks(monkeypatch, text, expected):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, text)
    assert policy.environment_request() == expected
    resolved = resolve({}, CPU, FLOAT)
    asked = {name: value for name, value in expected.items() if value != "auto"}
    for name, value in asked.items():
        assert getattr(resolved, name) == ("float32" if value == "weights" else value)
    for name, reason in resolved.reasons.items():
        assert (reason == f"asked for in {ENVIRONMENT_VARIABLE}") == resolved.asks_for(name) == (name in asked)


@pytest.mark.parametrize(
    "text", ["fast", "precision=half", "speed=high", "precision", "checkpoint_levels=x", "checkpoint_levels="]
)
def test_mistakes_in_the_environment(monkeypatch, text):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, text)
    with pytest.raises(ValueError, match=f"environment variable {ENVIRONMENT_VARIABLE} is '{text}': "):
        resolve({}, CPU, FLOAT)


def test_what_the_environment_asks_for_and_cannot_be_had_is_said_to_be_its(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda_graphs=on")
    with pytest.raises(ValueError, match=f"^the environment variable {ENVIRONMENT_VARIABLE}: cuda_graphs='on' cannot"):
        resolve({}, CPU, FLOAT)
    with pytest.raises(ValueError, match="^cuda_graphs='on' cannot"):
        resolve({"cuda_graphs": "on"}, CPU, FLOAT)


def test_graphs_in_the_environment_that_need_the_condition_cache(monkeypatch, card):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda_graphs=on,condition_cache=off")
    with pytest.raises(ValueError, match=f"^the environment variable {ENVIRONMENT_VARIABLE}: cuda_graphs='on' cannot"):
        resolve({}, card(), FLOAT)


def test_auto_in_a_call_outdoes_the_environment(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "condition_cache=off,compile=blocks")
    acceleration = make_imagen().accelerate(condition_cache="auto", compile="auto").acceleration
    assert (acceleration.condition_cache, acceleration.compile) == ("on", "off")


def test_levels_that_no_u_net_has():
    imagen = make_imagen(stages=2)
    with pytest.raises(ValueError, match=r"checkpoint_levels must lie in 0 to 2, .*middle; got \[3, 99\]"):
        imagen.accelerate(checkpoint_levels=[0, 3, 99])
    assert imagen.accelerate(checkpoint_levels=[0, 2]).acceleration.checkpoint_levels == (0, 2)


def test_levels_in_the_environment_that_no_u_net_has(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "checkpoint_levels=1+9")
    imagen = make_imagen()
    message = rf"^the environment variable {ENVIRONMENT_VARIABLE}: checkpoint_levels must lie in 0 to 2, .*got \[9\]"
    for use in (
        lambda: imagen.acceleration,
        lambda: imagen.accelerate(precision="float32"),
        lambda: imagen(torch.rand(2, 3, 8, 8), **make_words()),
        lambda: sample(imagen),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_call_outdoes_the_levels_in_the_environment(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "checkpoint_levels=0+1")
    imagen = make_imagen()
    assert imagen.acceleration.checkpoint_levels == (0, 1)
    for preset, settings, levels in (
        ("reference", {}, ()),
        ("auto", {"checkpoint_levels": "auto"}, ()),
        ("auto", {"checkpoint_levels": []}, ()),
        ("reference", {"checkpoint_levels": [1]}, (1,)),
    ):
        assert imagen.accelerate(preset, **settings).acceleration.checkpoint_levels == levels


def test_xformers_where_it_cannot_run():
    with pytest.raises(ValueError, match="attention='xformers' cannot be had: the tensors are on cpu, not on a CUDA"):
        make_imagen().accelerate(attention="xformers")


def test_a_card_without_what_triton_builds_with(card, monkeypatch):
    card(build=launch._missing_to_build)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    launch._missing_to_build.cache_clear()
    try:
        resolved = resolve({}, CUDA, FLOAT)
        assert resolved.compile == "off" and "no C compiler: install gcc" in resolved.reasons["compile"]
        assert "no C compiler" in launch.missing(CUDA) and launch.missing(META) is None
        tensor = SimpleNamespace(device=CUDA, dtype=FLOAT, is_floating_point=lambda: True)
        assert dispatch.triton_reasons(tensor) == [launch.missing(CUDA)], "other implementations are chosen"
        monkeypatch.setenv("CC", "my-compiler")
        launch._missing_to_build.cache_clear()
        assert launch.missing(CUDA) is None
        monkeypatch.setattr(launch.sysconfig, "get_paths", lambda scheme: {"include": "nowhere"})
        launch._missing_to_build.cache_clear()
        assert "Python's C headers" in launch.missing(CUDA)
    finally:
        launch._missing_to_build.cache_clear()


def test_a_call_outdoes_the_environment(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "precision=bfloat16,condition_cache=off")
    imagen = make_imagen().accelerate(precision="float32")
    assert imagen.acceleration.precision == "float32" and imagen.acceleration.condition_cache == "off"


# A model's


def test_accelerate_gives_the_model_and_can_be_taken_back():
    imagen = make_imagen()
    automatic = imagen.acceleration
    assert imagen.accelerate("reference") is imagen and values(imagen.acceleration) == {"precision": "float32", **OFF}
    assert imagen.accelerate().acceleration == automatic


def test_accelerate_raises_before_it_changes_anything():
    imagen = make_imagen().accelerate(precision="bfloat16")
    before = imagen.acceleration
    for settings in ({"cuda_graphs": "on"}, {"precision": "float16"}, {"speed": "high"}):
        with pytest.raises((ValueError, TypeError)):
            imagen.accelerate(**settings)
        assert imagen.acceleration == before


def test_it_is_settled_anew_when_the_model_moves():
    imagen = make_imagen()
    assert imagen.acceleration.memory_format == "channels_last"
    assert imagen.to(HALF).acceleration.precision == "bfloat16"
    assert imagen.to("meta").acceleration.memory_format == "contiguous"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda imagen: pickle.loads(pickle.dumps(imagen))])
def test_a_copy_is_run_as_its_original(again):
    imagen = make_imagen().accelerate(precision="bfloat16", checkpoint_levels=[1])
    other = again(imagen)
    assert other.acceleration == imagen.acceleration and other.acceleration.reasons["precision"] == ASKED_FOR
    other.accelerate("reference")
    assert imagen.acceleration.precision == "bfloat16", "they share one request"


# What is in force, and for how long


def test_what_is_active_is_taken_back_after_errors(monkeypatch):
    from minimagen_fast import blocks

    before = implementation(), dispatch.attention_override(None), blocks._way.value
    request = {"kernels": "reference", "attention": "sdpa", "checkpoint_levels": (0,)}
    with pytest.raises(KeyError), resolve(request, CPU, FLOAT).active():
        assert implementation() == "reference" and dispatch.attention_override(None) == "sdpa"
        assert blocks._way.value.checkpoint_levels == (0,)
        raise KeyError
    assert (implementation(), dispatch.attention_override(None), blocks._way.value) == before


def test_automatic_kernels_leave_the_choice_of_the_process():
    with dispatch.use_implementation("reference"), resolve({}, CPU, FLOAT).active():
        assert implementation() == "reference"


def test_training_computes_in_the_precision_but_for_an_autocast_of_the_users():
    half = resolve({"precision": "bfloat16"}, CPU, FLOAT)
    with half.training(CPU, FLOAT):
        assert policy.autocast_dtype(CPU) == torch.bfloat16
    with torch.autocast("cpu", torch.float16), half.training(CPU, FLOAT):
        assert policy.autocast_dtype(CPU) == torch.float16
    for resolved, weights in ((half, HALF), (resolve({}, CPU, FLOAT), FLOAT)):
        with resolved.training(CPU, weights):
            assert policy.autocast_dtype(CPU) is None
    assert policy.autocast_dtype(CPU) is None and policy.autocast_dtype(META) is None


# Files


def used(**request):
    """A model that has trained a step, without a change of its weights, and sampled."""
    imagen = make_imagen(stages=2).accelerate(**request)
    torch.manual_seed(2)
    imagen(torch.rand(2, 3, 16, 16), **make_words(), unet_number=2).backward()
    imagen.zero_grad()
    sample(imagen, steps=2, sampler="ddim")
    return imagen


def written(imagen, folder):
    """All bytes that are written about a model, by the names of their files."""
    args = get_minimagen_parser().parse_args([])
    parameters = [get_default_args(type(unet)) for unet in imagen.unets], get_default_args(Imagen)
    save(args, "now", *parameters, get_model_size(imagen), create_directory(folder))
    file = io.BytesIO()
    torch.save(imagen.state_dict(), file)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {**files, "state": file.getvalue()}


def test_saved_files_do_not_depend_on_it(tmp_path):
    everything = {"precision": "bfloat16", "memory_format": "channels_last", "checkpoint_levels": (0, 1)}
    fresh = written(make_imagen(stages=2), tmp_path / "fresh")
    assert len(fresh) > 4
    for number, request in enumerate(({}, everything, {"preset": "reference"})):
        imagen = used(**request)
        assert list(imagen.state_dict()) == list(make_imagen(stages=2).state_dict())
        assert written(imagen, tmp_path / str(number)) == fresh


def test_a_u_net_alone_is_no_larger_for_having_been_sampled():
    imagen = used(precision="bfloat16")
    sizes = [len(pickle.dumps(unet)) for unet in (imagen.unets[0], make_imagen().unets[0])]
    assert abs(sizes[0] - sizes[1]) < 2000, sizes
    assert list(imagen.unets[0].state_dict()) == list(BaseTest(**imagen.unets[0]._config).state_dict())
