"""Exported cascades: to the bit what was trained, wherever it was trained; whole or not there; and what loads them."""

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks
from safetensors.torch import load_file
from test_distributed_training import train as train_ranks
from training_runs import Pictures, Run, identical, make_imagen, state_of

from minimagen_fast import checkpoint, cli, weights_files
from minimagen_fast.checkpoint_index import read_index
from minimagen_fast.export_command import export_cascade
from minimagen_fast.generate import load_minimagen
from minimagen_fast.Imagen import Imagen
from minimagen_fast.model_card import model_card, training_facts
from minimagen_fast.settings import TrainingSettings
from minimagen_fast.training import create_directory, get_default_args, get_minimagen_parser, save_training_info
from minimagen_fast.Unet import BaseTest, SuperTest, Unet

SMALLEST = {"dim_mults": (1,), "num_resnet_blocks": 0}
SETTINGS = {"text_encoder_name": "t5_small", "image_sizes": (8, 16), "timesteps": 25}
# What minimagen 0.0.9's Imagen takes, besides the U-Nets.
DOCUMENTED = (
    "text_encoder_name image_sizes text_embed_dim channels timesteps cond_drop_prob loss_type lowres_sample_noise_level"
    " auto_normalize_img dynamic_thresholding_percentile only_train_unet_number"
).split()


def describe(directory, stages=2, unets=({}, {}), **settings):
    """Writes parameters/ as a training script does."""
    kinds = zip((BaseTest, SuperTest), unets, strict=True)
    unets_params = [{**get_default_args(Unet), **get_default_args(k), **SMALLEST, **o} for k, o in kinds][:stages]
    imagen_params = {**get_default_args(Imagen), **SETTINGS, **settings}
    imagen_params["image_sizes"] = imagen_params["image_sizes"][:stages]
    args = get_minimagen_parser().parse_args(["-b", "2", "-mw", "7", "-rd", "/home/me/before"])
    save_training_info(args, "1", unets_params, imagen_params, 1.0, create_directory(directory))
    return Path(directory)


def trained(directory, *numbers, seed=0, config=None):
    """A training directory with random weights, the best those of U-Nets `numbers`; and all best and latest weights."""
    describe(directory)
    best, latest = ([shaken(unet.state_dict(), seed + n) for unet in make_imagen(2).unets] for n in (1, 2))
    for index in (0, 1):
        checkpoint.save(latest[index], directory / "tmp" / f"unet_{index}_tmp.pth")
        if index + 1 in numbers:
            checkpoint.save(best[index], directory / "state_dicts" / f"unet_{index}_state_1.pth")
    if config is not None:
        TrainingSettings(unet_numbers=config).save(directory / "config.json")
    return best, latest


def shaken(state, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: value + torch.randn(value.shape, generator=generator) for name, value in state.items()}


def unets_of(directory):
    return [dict(unet.state_dict()) for unet in load_minimagen(directory, device="cpu").unets]


def export(*words):
    return cli.main(["export", *map(str, words)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training of both U-Nets with averages, by the documented function."""
    folder = tmp_path_factory.mktemp("run")
    describe(folder)
    # With averages that lag behind: the best, the latest and the averages differ.
    Run(folder, stages=2, EPOCHS=2, data=Pictures(4)).train(ema_decay=0.9)
    return folder


def tensors_of(run, prefix):
    found = state_of(run)["tensors"]
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


# Round trips


@pytest.mark.parametrize("format", ["safetensors", "pth"])
def test_weights_are_the_same_to_the_bit_and_load_without_a_word(tmp_path, recwarn, format):
    best, _ = trained(tmp_path / "run", 1, 2)
    recwarn.clear()
    export_cascade([tmp_path / "run"], tmp_path / "out", format=format)
    assert identical(unets_of(tmp_path / "out"), best)
    assert not recwarn.list
    if format == "safetensors":
        assert identical([load_file(tmp_path / "out" / f"unet_{index}.safetensors") for index in (0, 1)], best)
        names = ["README.md", "export.json", "parameters", "unet_0.safetensors", "unet_1.safetensors"]
    else:
        names = ["README.md", "export.json", "parameters", "state_dicts", "tmp", "training_progess.txt"]
        saved = sorted((tmp_path / "out" / "state_dicts").iterdir())
        assert [re.sub(r"\d{8}_\d{6}", "TIMESTAMP", path.name) for path in saved] == [
            "unet_0_state_TIMESTAMP.pth",
            "unet_1_state_TIMESTAMP.pth",
        ]
        assert identical([checkpoint.load(path) for path in saved], best)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    mode = (tmp_path / "run" / "parameters").joinpath("imagen_params_1.json").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()} == {mode}


def test_other_dtypes_stay_as_they_are(tmp_path):
    best, _ = trained(tmp_path / "run", 1, 2)
    half = {name: value.bfloat16() for name, value in best[0].items()}
    checkpoint.save(half, tmp_path / "run" / "state_dicts" / "unet_0_state_2.pth")
    exported = export_cascade([tmp_path / "run"], tmp_path / "out")
    assert identical(load_file(tmp_path / "out" / "unet_0.safetensors"), half)
    assert [unet.dtypes for unet in exported] == [("bfloat16",), ("float32",)]


def test_an_export_is_exported_again_and_stays_what_it_was(run, tmp_path):
    export_cascade([run], tmp_path / "first", format="pth", weights="ema")
    export_cascade([tmp_path / "first"], tmp_path / "second")
    assert identical(unets_of(tmp_path / "first"), unets_of(tmp_path / "second"))
    assert "| the latest averages of the training |" in (tmp_path / "second" / "README.md").read_text()
    noted = [json.loads((tmp_path / name / "export.json").read_text()) for name in ("first", "second")]
    assert noted[0] == noted[1] and noted[0]["2"]["training"]["optimizer steps"] == "4"
    for name, weights in (("first", r"state_dicts/unet_0_state_\d+_\d+\.pth"), ("second", r"unet_0\.safetensors")):
        with pytest.raises(ValueError, match=rf"{name} has no latest weights of U-Net 1, .* but .*{weights}.* best"):
            export_cascade([tmp_path / name], tmp_path / "third", weights="latest")
    (tmp_path / "first" / "export.json").write_text('{"1": {"kind": "finest"}}')
    with pytest.raises(ValueError, match=r"export\.json is not as it was exported, at '1'"):
        export_cascade([tmp_path / "first"], tmp_path / "third")


def test_the_original_can_read_the_parameters(tmp_path):
    trained(tmp_path / "run", 1, 2)
    export_cascade([tmp_path / "run"], tmp_path / "out", format="pth")
    imagen_file, *_ = sorted((tmp_path / "out" / "parameters").glob("imagen_*.json"))
    assert set(json.loads(imagen_file.read_text())) <= set(DOCUMENTED)
    assert len(list((tmp_path / "out" / "parameters").glob("unet_*"))) == 2, "the original takes every such file"


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({}, None),
        ({"lowres_max_noise_level": 1.0}, None),
        ({"lowres_max_noise_level": 0.1}, "it has no `lowres_max_noise_level`"),
        ({"timesteps": (25, 20)}, "it takes one number of `timesteps` for all U-Nets"),
        ({"text_encoder_name": "t5_tiny"}, "it has no text encoder `t5_tiny`"),
        ({"text_encoder_name": "/home/me/my_t5"}, "it has no text encoder `my_t5`"),
    ],
)
def test_the_model_card_says_whether_the_original_can_load_it(tmp_path, settings, reason):
    imagen_params = {**get_default_args(Imagen), **SETTINGS, **settings}
    card = model_card("painter", make_imagen(1), [], imagen_params, pth=True)
    assert ("minimagen 0.0.9 loads this folder too: it has" in card) == (reason is None)
    assert reason is None or f"minimagen 0.0.9 cannot load this folder ({reason}), though it has" in card
    assert "minimagen 0.0.9" not in model_card("painter", make_imagen(1), [], imagen_params, pth=False)


def test_paths_of_the_machine_are_not_handed_on(tmp_path):
    trained(tmp_path / "run", 1, 2)
    for format in ("safetensors", "pth"):
        export_cascade([tmp_path / "run"], tmp_path / format, format=format)
        for path in (tmp_path / format).rglob("*"):
            if path.is_file():
                assert b"/home/me" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()
        (arguments,) = (tmp_path / format / "parameters").glob("training_*.txt")
        assert "--MAX_NUM_WORDS=7\n" in arguments.read_text()


def test_the_model_card_names_a_text_encoder_without_its_folders():
    imagen = make_imagen(1)
    for name, shown in (("/home/me/my_t5", "my_t5"), ("google/flan-t5-base", "google/flan-t5-base")):
        imagen.text_encoder_name = name
        assert f"Text encoder: `{shown}`," in model_card("painter", imagen, [], SETTINGS, pth=False)


# Which weights


def test_best_latest_and_averaged_weights(run, tmp_path):
    for kind in ("best", "latest", "ema"):
        export_cascade([run], tmp_path / kind, weights=kind)
    best = [checkpoint.load(run / "state_dicts" / f"unet_{index}_state_1.pth") for index in (0, 1)]
    latest = [checkpoint.load(run / "tmp" / f"unet_{index}_tmp.pth") for index in (0, 1)]
    averaged = [{**state, **tensors_of(run, f"averages.{index + 1}.")} for index, state in enumerate(latest)]
    assert identical(unets_of(tmp_path / "best"), best)
    assert identical(unets_of(tmp_path / "latest"), latest)
    assert identical(unets_of(tmp_path / "ema"), averaged)
    assert not identical(latest, best) and not identical(latest, averaged)


def changed_tmp(run, folder, seconds):
    """A copy whose latest weights are others, saved so many seconds after the newest checkpoint."""
    shutil.copytree(run, folder)
    manifest = max((folder / "checkpoints").glob("*/manifest.json"))
    for index in (0, 1):
        path = folder / "tmp" / f"unet_{index}_tmp.pth"
        checkpoint.save(shaken(checkpoint.load(path), 9), path)
        time = manifest.stat().st_mtime + seconds
        os.utime(path, (time, time))
    return folder


@pytest.mark.parametrize("seconds, from_checkpoint", [(-10, True), (10, False)])
def test_the_latest_are_the_newer_of_tmp_and_checkpoint(run, tmp_path, seconds, from_checkpoint):
    folder = changed_tmp(run, tmp_path / "run", seconds)
    export_cascade([folder], tmp_path / "out", weights="latest")
    saved = [tensors_of(run, f"unets.{index}.") for index in (0, 1)]
    assert identical(unets_of(tmp_path / "out"), saved) == from_checkpoint


def test_a_unet_that_was_put_beside_the_training_of_another(tmp_path):
    # As the quickstart does.
    for number in (1, 2):
        describe(tmp_path / str(number))
        Run(tmp_path / str(number), stages=2, data=Pictures(2)).train(unet_numbers=[number])
    for folder in ("state_dicts", "tmp"):
        for file in (tmp_path / "2" / folder).glob("unet_1_*.pth"):
            os.utime(file, (1, 1))
            shutil.move(file, tmp_path / "1" / folder / file.name)
    latest = checkpoint.load(tmp_path / "1" / "tmp" / "unet_1_tmp.pth")
    export_cascade([tmp_path / "1"], tmp_path / "out", weights="latest")
    assert identical(unets_of(tmp_path / "out")[1], latest)
    facts = [training_facts(weights_files.TrainedFolder(tmp_path / "1"), number, 2) for number in (1, 2)]
    assert facts[0]["optimizer steps"] == "1" and facts[1] == {}


@pytest.mark.filterwarnings("ignore:.* has no weights of U-Net")
def test_a_training_with_nothing_but_checkpoints(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for name in ("tmp", "state_dicts"):
        shutil.rmtree(tmp_path / "run" / name)
    saved = [tensors_of(run, f"unets.{index}.") for index in (0, 1)]
    with pytest.warns(UserWarning, match="no weights of U-Net 1: the latest, .*step_0") as said:
        assert identical(unets_of(tmp_path / "run"), saved)
    own = [warning for warning in said if "no weights" in str(warning.message)]
    assert [Path(warning.filename).name for warning in own] == ["test_export.py"] * 2
    with pytest.warns(UserWarning, match="no best weights of U-Net 1: the latest, .*, are exported"):
        export_cascade([tmp_path / "run"], tmp_path / "out")
    assert identical(unets_of(tmp_path / "out"), saved)
    assert "| the latest of the training |" in (tmp_path / "out" / "README.md").read_text()


def test_averages_that_are_not_there(tmp_path):
    trained(tmp_path / "run", 1, 2)
    with pytest.raises(ValueError, match="run has no checkpoint, and averages are kept there: choose best or latest"):
        export_cascade([tmp_path / "run"], tmp_path / "out", weights="ema")
    describe(tmp_path / "plain")
    Run(tmp_path / "plain", stages=2, data=Pictures(2)).train()
    with pytest.raises(ValueError, match="has no averages of U-Net 1: it was trained without --EMA_DECAY"):
        export_cascade([tmp_path / "plain"], tmp_path / "out", weights="ema")
    assert not (tmp_path / "out").exists()


# Several ranks


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A training of two ranks, sharded; and the weights with which it ended."""
    folder = tmp_path_factory.mktemp("sharded")
    describe(folder, stages=1)
    results = run_ranks(two_ranks, 2, folder)
    return folder, {name: torch.from_numpy(value) for name, value in results[0][1].items()}


def two_ranks(folder):
    return train_ranks(folder, how="fsdp", epochs=1)


@pytest.mark.parametrize("format", ["safetensors", "pth"])
def test_a_sharded_checkpoint_is_exported_by_one_process(sharded, tmp_path, format):
    folder, weights = sharded
    shutil.copytree(folder / "checkpoints", tmp_path / "run" / "checkpoints")
    shutil.copytree(folder / "parameters", tmp_path / "run" / "parameters")
    assert len(list((tmp_path / "run" / "checkpoints").glob("*/*.distcp"))) == 2
    export_cascade([tmp_path / "run"], tmp_path / "out", format=format, weights="latest")
    (unet,) = load_minimagen(tmp_path / "out", device="cpu").unets
    assert identical(dict(unet.named_parameters()), {name.removeprefix("unets.0."): v for name, v in weights.items()})
    export_cascade([tmp_path / "run"], tmp_path / "ema", format=format, weights="ema")
    (average,) = unets_of(tmp_path / "ema")
    averages = tensors_of(folder, "averages.1.")
    assert averages and identical({name: average[name] for name in averages}, averages)
    assert not identical(average, dict(unet.state_dict()))


# Several directories


@pytest.mark.parametrize("stated", [True, False])
def test_two_trainings_of_one_unet_each_become_a_cascade_that_samples(tmp_path, stated):
    base, _ = trained(tmp_path / "base", 1, config=(1,) if stated else None)
    above, _ = trained(tmp_path / "super", 2, seed=5, config=(2,) if stated else None)
    assert export(tmp_path / "super", tmp_path / "base", "--OUT", tmp_path / "out") == 0
    imagen = load_minimagen(tmp_path / "out", device="cpu")
    assert identical([dict(unet.state_dict()) for unet in imagen.unets], [base[0], above[1]])
    images = imagen.sample(text_embeds=torch.randn(2, 3, 512), progress=False)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()


def test_a_training_that_was_killed_before_its_first_best_says_in_its_config_what_it_trains(tmp_path):
    trained(tmp_path / "base", 1)
    _, latest = trained(tmp_path / "super", config=(2,), seed=5)
    with pytest.warns(UserWarning, match="no best weights of U-Net 2"):
        export_cascade([tmp_path / "base", tmp_path / "super"], tmp_path / "out")
    assert identical(unets_of(tmp_path / "out")[1], latest[1])


def test_a_checkpoint_says_what_was_trained(tmp_path):
    describe(tmp_path / "run")
    Run(tmp_path / "run", stages=2, data=Pictures(2)).train(unet_numbers=[2])
    shutil.rmtree(tmp_path / "run" / "state_dicts")
    assert weights_files.TrainedFolder(tmp_path / "run").trained(2) == [2]


def test_a_unet_that_was_trained_nowhere_or_twice(tmp_path, capsys):
    best, _ = trained(tmp_path / "one", 1, config=(1,))
    both, _ = trained(tmp_path / "both", 1, 2, seed=5)
    assert export(tmp_path / "one", "--OUT", tmp_path / "out") == 2
    assert re.search(
        r"U-Net 2 of 2 was not trained in \S*one, or never had .*: name .*--UNET 2=DIR", capsys.readouterr().err
    )
    assert export(tmp_path / "one", tmp_path / "both", "--OUT", tmp_path / "out") == 2
    assert re.search(r"U-Net 1 was trained in \S*one and in \S*both: choose with --UNET 1", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()

    assert (
        export(tmp_path / "one", tmp_path / "both", "--UNET", f"1={tmp_path / 'one'}", "--OUT", tmp_path / "out") == 0
    )
    assert identical(unets_of(tmp_path / "out"), [best[0], both[1]])
    # A directory counts once, however it is named; one that is chosen need not be named besides.
    words = [tmp_path / "both", tmp_path / "one" / ".." / "both", "--UNET", f"1={tmp_path / 'one'}"]
    assert export(*words, "--OUT", tmp_path / "again") == 0
    assert identical(unets_of(tmp_path / "again"), [best[0], both[1]])


def test_an_untrained_unet_is_taken_where_that_is_asked_for(tmp_path):
    describe(tmp_path / "run")
    run = Run(tmp_path / "run", stages=2, data=Pictures(2)).train(unet_numbers=[1])
    with pytest.warns(UserWarning, match="no best weights of U-Net 2"):
        export_cascade([tmp_path / "run"], tmp_path / "out", chosen={2: tmp_path / "run"})
    assert identical(unets_of(tmp_path / "out")[1], dict(run.imagen.unets[1].state_dict()))
    assert (
        "| optimizer steps | 1 | none: this U-Net was not trained there |" in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize(
    "other, difference",
    [
        ({"timesteps": 50}, "imagen_params: timesteps is 25 and 50"),
        ({"unets": ({}, {"attn_heads": 3})}, "unet_1_params: attn_heads is 8 and 3"),
        ({"stages": 1}, "the number of U-Nets is 2 and 1"),
    ],
)
def test_directories_that_describe_different_cascades(tmp_path, other, difference):
    trained(tmp_path / "one", 1)
    describe(tmp_path / "two", **other)
    with pytest.raises(ValueError, match=rf"one and \S*two describe different cascades .*{difference}"):
        export_cascade([tmp_path / "one", tmp_path / "two"], tmp_path / "out")


def test_descriptions_that_say_the_same_in_other_words(tmp_path):
    trained(tmp_path / "base", 1)
    trained(tmp_path / "super", 2)
    for name, number in (("base", 1), ("super", 2)):
        path = tmp_path / name / "parameters" / "imagen_params_1.json"
        values = {**json.loads(path.read_text()), "only_train_unet_number": number}
        if number == 1:
            del values["loss_type"]  # its default
            values["text_embed_dim"] = 512  # what the encoder's name says
        path.write_text(json.dumps(values))
    path = tmp_path / "super" / "parameters" / "unet_1_params_1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lowres_cond": True}))
    export_cascade([tmp_path / "base", tmp_path / "super"], tmp_path / "out")
    assert load_minimagen(tmp_path / "out", device="cpu").only_train_unet_number is None


# Whole or not there


def test_what_is_there_already_is_never_touched(tmp_path, capsys):
    trained(tmp_path / "run", 1, 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert export(tmp_path / "run", "--OUT", tmp_path / "out") == 2
    assert "out is not empty: name another folder" in capsys.readouterr().err
    assert export(tmp_path / "run", "--OUT", tmp_path / "out" / "mine") == 2
    assert "mine is a file" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert export(tmp_path / "run", "--OUT", tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink() and len(unets_of(tmp_path / "empty")) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no space left")])
def test_an_export_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch, error):
    trained(tmp_path / "run", 1, 2)
    seen = []

    def fail_at_the_second(*_, **__):
        seen.append([path.name for path in tmp_path.iterdir()])
        if len(seen) == 2:
            raise error

    monkeypatch.setattr("minimagen_fast.export_command.save_file", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
        export_cascade([tmp_path / "run"], tmp_path / "out")
    assert len(seen) == 2 and all("out" not in names for names in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_links_in_a_circle_are_an_error_for_the_user(run, tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(FileNotFoundError, match="circle/parameters"):
        export_cascade([tmp_path / "circle"], tmp_path / "out")
    with pytest.raises(OSError, match="circle"):
        export_cascade([run], tmp_path / "circle")


def test_what_a_killed_export_has_left_is_in_nobodys_way(tmp_path):
    best, _ = trained(tmp_path / "run", 1, 2)
    left = tmp_path / f".out.{os.getpid()}.part"
    left.mkdir()
    (left / "half").write_text("half")
    export_cascade([tmp_path / "run"], tmp_path / "out")
    assert identical(unets_of(tmp_path / "out"), best)
    assert not left.exists() and not (tmp_path / "out" / "half").exists()


# Damage


@pytest.mark.parametrize("length", [0, 4, 1000, -1])
def test_cut_safetensors_are_named(tmp_path, length):
    trained(tmp_path / "run", 1, 2)
    export_cascade([tmp_path / "run"], tmp_path / "out")
    path = tmp_path / "out" / "unet_1.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"unet_1\.safetensors cannot be read as safetensors .*cut short or damaged"):
        load_minimagen(tmp_path / "out")


def test_damaged_and_foreign_weights_are_named_and_nothing_is_left(tmp_path):
    best, _ = trained(tmp_path / "run", 1, 2)
    file = tmp_path / "run" / "state_dicts" / "unet_1_state_1.pth"
    checkpoint.save(best[0], file)
    with pytest.raises(ValueError, match=r"unet_1_state_1\.pth do not fit this Unet"):
        export_cascade([tmp_path / "run"], tmp_path / "out")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"unet_1_state_1\.pth cannot be read"):
        export_cascade([tmp_path / "run"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def damage(run, folder, pattern="*.distcp"):
    shutil.copytree(run, folder)
    for path in (folder / "checkpoints").glob(f"step_*/{pattern}"):
        path.write_bytes(path.read_bytes()[:-1])
    return folder


def test_damaged_checkpoints_do_no_harm_where_there_are_other_weights(run, tmp_path):
    folder = damage(run, tmp_path / "run")
    with pytest.warns(UserWarning, match="is damaged .*The model card does not say"):
        export_cascade([folder], tmp_path / "best")
    assert "optimizer steps" not in (tmp_path / "best" / "README.md").read_text()
    # The progress file is read instead.
    losses = " | ".join(f"{loss:.4f}" for loss in state_of(run)["best_losses"].values())
    assert f"| best validation loss | {losses} |" in (tmp_path / "best" / "README.md").read_text()


def test_an_untrained_unet_is_loaded_without_a_look_at_the_checkpoints(run, tmp_path):
    folder = damage(run, tmp_path / "run")
    (folder / "state_dicts" / "unet_1_state_1.pth").unlink()
    with pytest.warns(UserWarning) as said:
        loaded = unets_of(folder)
    (warning,) = said
    assert "put several trainings together with `minimagen-fast export`" in str(warning.message)
    assert identical(loaded[1], checkpoint.load(folder / "tmp" / "unet_1_tmp.pth"))


@pytest.mark.filterwarnings("ignore:.* is damaged")
def test_damaged_checkpoints_and_the_latest(run, tmp_path):
    folder = damage(run, tmp_path / "run")
    with pytest.warns(UserWarning, match=r"is damaged .*, or use .*unet_0_tmp\.pth, as is done here"):
        export_cascade([folder], tmp_path / "out", weights="latest")
    assert identical(unets_of(tmp_path / "out")[0], checkpoint.load(run / "tmp" / "unet_0_tmp.pth"))
    shutil.rmtree(folder / "tmp")
    with pytest.raises(ValueError, match="step_000000004 is damaged"):
        export_cascade([folder], tmp_path / "other", weights="latest")


class _RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:.* has no weights of U-Net")
def test_an_index_that_runs_code_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tmp")
    shutil.rmtree(tmp_path / "run" / "state_dicts")
    for path in (tmp_path / "run" / "checkpoints").glob("step_*"):
        content = pickle.dumps(_RunsCode(tmp_path / "was_run"))
        (path / ".metadata").write_bytes(content)
        manifest = json.loads((path / "manifest.json").read_text())
        for entry in manifest["files"]:
            if entry["name"] == ".metadata":
                entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"\.metadata cannot be read .*touch.*made to run code"):
        load_minimagen(tmp_path / "run", device="cpu")
    assert not (tmp_path / "was_run").exists()


def test_the_index_is_what_torch_reads(run, sharded):
    for folder in (run, sharded[0]):
        saved = weights_files.TrainedFolder(folder).saved
        assert read_index(saved.path) == saved.tensors()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"a": 1}), pickle.dumps(torch.float32)])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata cannot be read as the index of a checkpoint"):
        read_index(tmp_path)


# The model card


def test_the_facts_of_the_model_card(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    settings = {"batch_size": 24, "learning_rates": [3e-4, 7e-5], "ranks": 3}
    TrainingSettings(seed=11, ema_decay=0.9, min_snr_gamma=5.0, accumulate=2).save(
        tmp_path / "run" / "config.json", **settings
    )
    export_cascade([tmp_path / "run"], tmp_path / "painter")
    text = (tmp_path / "painter" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: minimagen_fast\npipeline_tag: text-to-image\ntags:\n- text-to-image\n")
    assert "\n# painter\n" in text and not re.search(r"^license:", text, re.M)

    rows = {cells[0]: cells[1:] for line in text.splitlines() if len(cells := line.strip("| ").split(" | ")) > 1}
    counts = [f"{sum(p.numel() for p in unet.parameters()):,}" for unet in make_imagen(2).unets]
    kind = "the best of the training"
    assert rows["1"] == ["8x8", counts[0], "float32", "25", kind, "`unet_0.safetensors`"]
    assert rows["2"] == ["16x16", counts[1], "float32", "25", kind, "`unet_1.safetensors`"]
    state = state_of(run)
    assert rows["optimizer steps"] == [str(state["position"]["step"])] * 2 == ["4", "4"]
    assert rows["whole epochs"] == ["2", "2"]
    assert rows["best validation loss"] == [f"{state['best_losses'][number]:.4f}" for number in (1, 2)]
    assert rows["learning rate"] == ["0.0003", "7e-05"]
    expected = {
        "batch size": "24",
        "batches per step": "2",
        "decay of averaged weights": "0.9",
        "min-SNR gamma": "5.0",
        "seed": "11",
        "processes": "3",
        "longest caption in tokens": "7",
    }
    assert {name: rows[name] for name in expected} == {name: [value] * 2 for name, value in expected.items()}
    assert "autocast" not in rows
    assert "Text encoder: `t5_small`, embeddings 512 wide" in text
    for index in (0, 1):
        digest = hashlib.sha256((tmp_path / "painter" / f"unet_{index}.safetensors").read_bytes()).hexdigest()
        assert f"\n{digest}  unet_{index}.safetensors\n" in text


def test_the_learning_rate_of_the_second_unet_trained_alone(tmp_path):
    trained(tmp_path / "run", 2)
    TrainingSettings(unet_numbers=(2,)).save(tmp_path / "run" / "config.json", learning_rates=[7e-5])
    assert training_facts(weights_files.TrainedFolder(tmp_path / "run"), 2, 2)["learning rate"] == "7e-05"


def test_the_model_card_tells_how_to_sample(tmp_path, monkeypatch):
    unets = [BaseTest(**SMALLEST, text_embed_dim=64)]
    describe(tmp_path / "run", stages=1, text_encoder_name="t5_tiny")
    path = tmp_path / "run" / "state_dicts" / "unet_0_state_1.pth"
    imagen = Imagen(unets, text_encoder_name="t5_tiny", image_sizes=(8,), timesteps=25)
    checkpoint.save(imagen.unets[0].state_dict(), path)
    export_cascade([tmp_path / "run"], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    monkeypatch.chdir(tmp_path / "out")
    exec(code, {})
    assert (tmp_path / "out" / "image.png").is_file()
    command = re.search(r"`minimagen-fast (sample .*)`", text)[1]
    assert cli._parser("sample").parse_args(command.replace('"a caption"', "caption").split()).CAPTIONS == "caption"


# The command


@pytest.mark.parametrize(
    "words, message",
    [
        (["--UNET", "two=there"], "--UNET must be N=DIR, such as 2=training_2, got 'two=there'"),
        (["--UNET", "2"], "--UNET must be N=DIR"),
        (["--UNET", "3=run"], "--UNET 3=... must name a U-Net from 1 to 2"),
        (["--UNET", "1=run", "--UNET", "1=run"], "--UNET names a U-Net twice"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    trained(Path("run"), 1, 2)
    assert export("run", "--OUT", "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_command_says_what_it_has_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained(Path("run"), 1, 2)
    assert export("run", "--OUT", "deep/out", "--FORMAT", "pth", "--WEIGHTS", "latest") == 0
    said = capsys.readouterr().out
    assert f"U-Net 2: {sum(p.numel() for p in make_imagen(2).unets[1].parameters()):,} parameters" in said
    assert f"from {Path('run/tmp/unet_1_tmp.pth')}" in said and f"-d {Path('deep/out')}" in said
    assert export("nowhere", "--OUT", "other") == 2
    assert "no folder nowhere" in capsys.readouterr().err
