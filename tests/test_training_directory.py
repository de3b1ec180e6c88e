"""Training arguments, the training directory, and the documented way to use both."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from training_runs import Interruption, Pictures, identical

from minimagen_fast import training
from minimagen_fast.Imagen import Imagen
from minimagen_fast.training import (
    MinimagenTrain,
    create_directory,
    get_default_args,
    get_minimagen_parser,
    get_model_params,
    get_model_size,
    load_restart_training_parameters,
    load_testing_parameters,
    save_training_info,
)
from minimagen_fast.Unet import Base, BaseTest, SuperTest, Unet

# Arguments


def test_parser_has_the_documented_flags_and_defaults():
    expected = {
        "PARAMETERS": ("-p", str, None),
        "NUM_WORKERS": ("-n", int, 0),
        "BATCH_SIZE": ("-b", int, 2),
        "MAX_NUM_WORDS": ("-mw", int, 64),
        "IMG_SIDE_LEN": ("-s", int, 128),
        "EPOCHS": ("-e", int, 5),
        "T5_NAME": ("-t5", str, "t5_base"),
        "TRAIN_VALID_FRAC": ("-f", float, 0.9),
        "TIMESTEPS": ("-t", int, 1000),
        "OPTIM_LR": ("-lr", float, 0.0001),
        "ACCUM_ITER": ("-ai", int, 1),
        "CHCKPT_NUM": ("-cn", int, 500),
        "VALID_NUM": ("-vn", int, None),
        "RESTART_DIRECTORY": ("-rd", str, None),
        "TESTING": ("-test", None, False),
    }
    parser = get_minimagen_parser()
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert list(actions) == list(expected)
    for name, (flag, kind, default) in expected.items():
        assert actions[name].option_strings == [flag, f"--{name}"]
        assert (actions[name].type, actions[name].default) == (kind, default)
    args = parser.parse_args("-t 25 -t5 t5_small -test -e 1 -f 0.5 --RESTART_DIRECTORY there".split())
    assert (args.TIMESTEPS, args.T5_NAME, args.TESTING, args.EPOCHS) == (25, "t5_small", True, 1)
    assert (args.TRAIN_VALID_FRAC, args.RESTART_DIRECTORY) == (0.5, "there")


@pytest.mark.parametrize("kind", [Namespace, dict])
def test_testing_parameters(kind):
    args = kind(vars(get_minimagen_parser().parse_args(["-ai", "3"]))) if kind is dict else Namespace(ACCUM_ITER=3)
    assert load_testing_parameters(args) is args
    values = args if kind is dict else vars(args)
    expected = {
        "BATCH_SIZE": 2,
        "MAX_NUM_WORDS": 32,
        "IMG_SIDE_LEN": 128,
        "EPOCHS": 2,
        "T5_NAME": "t5_small",
        "TRAIN_VALID_FRAC": 0.5,
        "TIMESTEPS": 25,
        "OPTIM_LR": 0.0001,
    }
    assert {name: values[name] for name in expected} == expected
    assert values["ACCUM_ITER"] == 3


@pytest.mark.parametrize("justparams", [False, True])
def test_restart_takes_over_four_arguments_and_no_others(tmp_path, justparams):
    earlier = get_minimagen_parser().parse_args("-mw 10 -s 32 -t5 folder=with=signs -t 50 -lr 0.5 -e 9".split())
    save_training_info(earlier, "20240101", [], {}, 1.0, create_directory(tmp_path))
    earlier.TIMESTEPS = 60
    save_training_info(earlier, "20240102", [], {}, 1.0, create_directory(tmp_path))

    source = {"PARAMETERS": str(tmp_path / "parameters")} if justparams else {"RESTART_DIRECTORY": str(tmp_path)}
    args = Namespace(**{**vars(get_minimagen_parser().parse_args([])), **source})
    assert load_restart_training_parameters(args, justparams=justparams) is args
    assert (args.MAX_NUM_WORDS, args.IMG_SIDE_LEN, args.T5_NAME) == (10, 32, "folder=with=signs")
    assert args.TIMESTEPS == 60, "the newest of several files counts"
    assert (args.OPTIM_LR, args.EPOCHS, args.VALID_NUM) == (0.0001, 5, None)


def test_restart_parameters_that_are_missing_or_wrong_are_named(tmp_path):
    with pytest.raises(ValueError, match="args.RESTART_DIRECTORY must name"):
        load_restart_training_parameters(Namespace(RESTART_DIRECTORY=None))
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load_restart_training_parameters(Namespace(PARAMETERS=str(tmp_path / "nowhere")), justparams=True)
    with pytest.raises(FileNotFoundError, match="no training_parameters_TIMESTAMP.txt: check PARAMETERS"):
        load_restart_training_parameters(Namespace(PARAMETERS=str(tmp_path)), justparams=True)
    (tmp_path / "training_parameters_1.txt").write_text("--T5_NAME=None\n--TIMESTEPS=2.5")
    with pytest.raises(ValueError, match="TIMESTEPS must be of type int, got '2.5'"):
        load_restart_training_parameters(Namespace(PARAMETERS=str(tmp_path)), justparams=True)
    (tmp_path / "training_parameters_1.txt").write_bytes(b"--TIMESTEPS=\xff")
    with pytest.raises(ValueError, match="training_parameters_1.txt is not UTF-8"):
        load_restart_training_parameters(Namespace(PARAMETERS=str(tmp_path)), justparams=True)


def test_default_args_of_classes_and_functions():
    assert get_default_args(Unet)["dim_mults"] == (1, 2, 4) and "self" not in get_default_args(Unet)
    base = get_default_args(Base)
    assert base.keys() == get_default_args(Unet).keys()
    assert (base["dim"], base["num_resnet_blocks"], base["attn_heads"]) == (512, 3, 8)

    class Wide(Unet):
        defaults = {"dim": 64}

    assert get_default_args(Wide) == {**get_default_args(Unet), "dim": 64}
    assert get_default_args(Imagen)["timesteps"] == 1000 and "unets" not in get_default_args(Imagen)
    assert get_default_args(create_directory) == {}
    assert get_default_args(load_restart_training_parameters) == {"justparams": False}


# Training directory


def test_directory_is_found_from_anywhere_and_left_on_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "tmp").mkdir(parents=True)  # there already, but without its other folders
    training_dir = create_directory("run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"parameters", "state_dicts", "tmp"}

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with training_dir():
        assert Path.cwd() == tmp_path / "run"
        with training_dir("tmp") as path:
            assert Path.cwd() == tmp_path / "run" / "tmp" == path
        assert Path.cwd() == tmp_path / "run"
    with pytest.raises(Interruption), training_dir("parameters"):
        raise Interruption
    assert Path.cwd() == elsewhere


def test_training_info_is_written_and_read_back(tmp_path, capsys):
    training_dir = create_directory(tmp_path)
    unets = [{"dim": number, "dim_mults": (1, 2), "cond_dim": None} for number in range(12)]
    args = Namespace(EPOCHS=5, T5_NAME="t5_base", RESTART_DIRECTORY="earlier", VALID_NUM=None)
    save_training_info(args, "20240101_000000", unets, {"image_sizes": (8, 16)}, 1.5, training_dir)

    folder = tmp_path / "parameters"
    assert (folder / "training_parameters_20240101_000000.txt").read_text() == (
        "--EPOCHS=5\n--T5_NAME=t5_base\n--RESTART_DIRECTORY=earlier\n--VALID_NUM=None\n"
    )
    assert "1.500 MB" in (tmp_path / "training_progess.txt").read_text()
    assert "earlier" in (tmp_path / "training_progess.txt").read_text()

    for foreign in ("unet_notes.json", "imagen.txt", ".DS_Store", "unet_3_params_20240101_000000.json~"):
        (folder / foreign).write_text("not JSON")
    unets_params, imagen_params = get_model_params(folder)
    assert [params["dim"] for params in unets_params] == list(range(12))
    assert unets_params[0] == {"dim": 0, "dim_mults": [1, 2], "cond_dim": None}
    assert imagen_params == {"image_sizes": [8, 16]}
    assert capsys.readouterr().out == ""

    save_training_info(vars(args), "20240102_000000", [{"dim": 99}], {"image_sizes": [4]}, 1.5, training_dir)
    unets_params, imagen_params = get_model_params(folder)
    assert unets_params[0] == {"dim": 99} and len(unets_params) == 12
    assert imagen_params == {"image_sizes": [4]}


def test_training_info_can_be_read_by_the_original(tmp_path):
    training_dir = create_directory(tmp_path)
    documented = {"timesteps": 1000, "image_sizes": [8], "loss_type": "l2"}
    save_training_info({}, "1", [{"dim": 8}], {**documented, "lowres_max_noise_level": 1.0}, 1.0, training_dir)
    assert get_model_params(tmp_path / "parameters")[1] == documented
    save_training_info({}, "2", [{"dim": 8}], {**documented, "lowres_max_noise_level": 0.1}, 1.0, training_dir)
    assert get_model_params(tmp_path / "parameters")[1] == {**documented, "lowres_max_noise_level": 0.1}


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    unet = {"dim": np.int64(8), "dim_mults": (np.int32(1), np.float32(1.5)), "attend_at_middle": np.bool_(True)}
    save_training_info(Namespace(), "1", [unet], {"timesteps": np.int64(25)}, 1.0, create_directory(tmp_path))
    (read,), imagen_params = get_model_params(tmp_path / "parameters")
    assert read == {"dim": 8, "dim_mults": [1, 1.5], "attend_at_middle": True} and imagen_params == {"timesteps": 25}
    assert type(read["dim"]) is int


def test_other_names_of_parameters_count_where_there_is_one_file_of_each(tmp_path):
    for index in range(11):
        (tmp_path / f"unet_{index}_config.json").write_text(json.dumps({"dim": index}))
    (tmp_path / "imagen_config_x.json").write_text('{"channels": 1}')
    unets_params, imagen_params = get_model_params(tmp_path)
    assert [params["dim"] for params in unets_params] == list(range(11)) and imagen_params == {"channels": 1}
    (tmp_path / "imagen_config_y.json").write_text('{"channels": 2}')
    with pytest.raises(FileNotFoundError, match="no imagen_params_TIMESTAMP.json"):
        get_model_params(tmp_path)
    (tmp_path / "imagen_params.json").write_text('{"channels": 3}')
    assert get_model_params(tmp_path)[1] == {"channels": 3}


def test_parameters_that_json_does_not_have_leave_no_half_written_file(tmp_path):
    with pytest.raises(TypeError, match=r"unets_params\[1\] must hold only values that JSON has"):
        save_training_info(Namespace(), "1", [{}, {"device": torch.device("cpu")}], {}, 1.0, create_directory(tmp_path))
    assert list((tmp_path / "parameters").iterdir()) == []


def test_missing_parameters_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        get_model_params(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no imagen_params_TIMESTAMP.json"):
        get_model_params(tmp_path)
    (tmp_path / "imagen_params_1.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no unet_0_params_TIMESTAMP.json"):
        get_model_params(tmp_path)
    (tmp_path / "unet_1_params_1.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has no unet_0_params_TIMESTAMP.json, but has unet_1_params_1.json"):
        get_model_params(tmp_path)
    (tmp_path / "unet_0_params_1.json").write_text('{"dim": ')
    with pytest.raises(ValueError, match=r"unet_0_params_1\.json is not valid JSON"):
        get_model_params(tmp_path)


def test_model_size_counts_parameters_and_buffers():
    module = nn.BatchNorm1d(1024)  # 2 parameters and 2 buffers of 1024 float32, and one int64
    assert get_model_size(module) == (4 * 1024 * 4 + 8) / 2**20


# The documented way to use it all


def test_a_training_script_as_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, valid_data = Pictures(4, size=128), Pictures(2, size=128, seed=2)
    device = torch.device("cpu")
    args = load_testing_parameters(get_minimagen_parser().parse_args([]))
    args.EPOCHS = 1
    training_dir = create_directory("./training_1")

    options = {**training.get_minimagen_dl_opts(device), "batch_size": args.BATCH_SIZE, "num_workers": args.NUM_WORKERS}
    train_dataloader, valid_dataloader = DataLoader(data, **options), DataLoader(valid_data, **options)

    unets_params = [get_default_args(BaseTest), get_default_args(SuperTest)]
    unets = [Unet(**params).to(device) for params in unets_params]
    imagen_params = {
        "image_sizes": (args.IMG_SIDE_LEN // 2, args.IMG_SIDE_LEN),
        "timesteps": args.TIMESTEPS,
        "cond_drop_prob": 0.15,
        "text_encoder_name": args.T5_NAME,
    }
    with pytest.warns(UserWarning, match="U-Net 2 was replaced"):
        imagen = Imagen(unets=unets, **imagen_params).to(device)
    unets_params = [{**get_default_args(Unet), **params} for params in unets_params]
    imagen_params = {**get_default_args(Imagen), **imagen_params}
    save_training_info(args, "1", unets_params, imagen_params, get_model_size(imagen), training_dir)
    optimizer = torch.optim.Adam(imagen.parameters(), lr=args.OPTIM_LR)
    before = {name: value.clone() for name, value in imagen.state_dict().items()}
    MinimagenTrain("1", args, unets, imagen, train_dataloader, valid_dataloader, training_dir, optimizer, timeout=30)
    assert not identical(before, imagen.state_dict())
    assert Path.cwd() == tmp_path
    assert {path.name for folder in ("tmp", "state_dicts") for path in Path("training_1", folder).iterdir()} == {
        "unet_0_tmp.pth",
        "unet_1_tmp.pth",
        "unet_0_state_1.pth",
        "unet_1_state_1.pth",
    }
    assert json.loads(Path("training_1/parameters/imagen_params_1.json").read_text())["image_sizes"] == [64, 128]


def test_data_names_are_members_of_the_module():
    for name in ("ConceptualCaptions", "MinimagenDataset", "MinimagenCollator", "get_minimagen_dl_opts"):
        assert name in training.__all__ and hasattr(training, name)
