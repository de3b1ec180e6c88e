"""Loading a trained Imagen, and sampling into files."""

import warnings
from argparse import Namespace
from pathlib import Path

import PIL.Image
import pytest
import torch

from minimagen_fast import checkpoint
from minimagen_fast.generate import load_minimagen, load_params, sample_and_save
from minimagen_fast.Imagen import Imagen
from minimagen_fast.training import create_directory, get_default_args, save_training_info
from minimagen_fast.Unet import BaseTest, SuperTest, Unet

SETTINGS = {"text_encoder_name": "t5_small", "image_sizes": (8, 16), "timesteps": 25}


def make_imagen(seed, **settings):
    torch.manual_seed(seed)
    channels = settings.get("channels", 3)
    unets = [unet(channels=channels, channels_out=channels) for unet in (BaseTest, SuperTest)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Imagen(unets, **{**SETTINGS, **settings})


def write_directory(path, **settings):
    """A training directory with parameters as a training script saves them, and no weights."""
    unets_params = [{**get_default_args(Unet), **get_default_args(unet)} for unet in (BaseTest, SuperTest)]
    imagen_params = {**get_default_args(Imagen), **SETTINGS, **settings}
    save_training_info(Namespace(RESTART_DIRECTORY=None), "1", unets_params, imagen_params, 1.0, create_directory(path))
    return Path(path)


def write_weights(directory, imagen, *names):
    for index, name in enumerate(names):
        if name is not None:
            checkpoint.save(imagen.unets[index].state_dict(), directory / name)


def same_weights(unet, other):
    one, two = unet.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name].cpu(), two[name].cpu()) for name in one)


@pytest.fixture
def trained(tmp_path):
    """A training directory and the Imagen whose weights are in it."""
    directory, imagen = write_directory(tmp_path / "training"), make_imagen(1)
    write_weights(directory, imagen, "state_dicts/unet_0_state_1.pth", "state_dicts/unet_1_state_1.pth")
    return directory, imagen


# Loading


def test_parameters_are_read_in_the_order_of_the_unets(tmp_path):
    unets_params, imagen_params = load_params(str(write_directory(tmp_path)))
    assert [params["memory_efficient"] for params in unets_params] == [False, True]
    assert unets_params[0]["dim_mults"] == [1, 2] and imagen_params["image_sizes"] == [8, 16]
    with pytest.raises(FileNotFoundError, match="no folder .*parameters"):
        load_params(tmp_path / "nowhere")


def test_the_best_weights_are_loaded_ready_for_inference(trained, recwarn):
    directory, imagen = trained
    write_weights(directory, make_imagen(2), "tmp/unet_0_tmp.pth", "tmp/unet_1_tmp.pth")
    loaded = load_minimagen(str(directory), device="cpu")
    assert all(map(same_weights, loaded.unets, imagen.unets))
    assert not loaded.training and not loaded.unets[0].training
    assert loaded.image_sizes == (8, 16) and loaded.device == torch.device("cpu")
    assert not recwarn.list, "every U-Net fits its place, none is missing"


def test_a_seed_before_loading_gives_what_it_gives_in_the_original(trained):
    directory, _ = trained
    unets_params, _ = load_params(directory)
    torch.manual_seed(3)
    # The original makes all U-Nets, then those anew that do not fit their place: here the second.
    for params in (*unets_params, {**unets_params[1], "lowres_cond": True}):
        Unet(**params)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_minimagen(directory)
    assert torch.equal(torch.rand(3), expected)


def test_the_default_device_is_cuda_where_there_is_one(trained):
    loaded = load_minimagen(trained[0])
    assert loaded.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert {parameter.device for parameter in loaded.parameters()} == {loaded.device}


def test_a_device_that_is_not_there_is_refused(trained):
    with pytest.raises(ValueError, match="device 'moon' cannot be used here"):
        load_minimagen(trained[0], device="moon")
    with pytest.raises(ValueError, match="device 'meta' cannot be used here"):
        load_minimagen(trained[0], device="meta")


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}"])
def test_files_that_hold_no_parameters_are_named(tmp_path, content):
    folder = write_directory(tmp_path) / "parameters"
    (folder / "imagen_params_1.json").write_text(content)
    with pytest.raises(ValueError, match="the Imagen in .*parameters must be an object with image_sizes and text_enc"):
        load_params(tmp_path)
    write_directory(tmp_path)
    (folder / "unet_1_params_1.json").write_text(content)
    with pytest.raises(ValueError, match="U-Net 2 in .*parameters must be an object with dim"):
        load_params(tmp_path)


def test_the_newest_weights_count_and_other_files_do_not(trained):
    directory, _ = trained
    newest = make_imagen(3)
    write_weights(directory, newest, "state_dicts/unet_0_state_2.pth", "state_dicts/unet_1_state_2.pth")
    for foreign in (".unet_0_state_9.pth.77.part", "unet_0_state_9.pth.bak", "unet_x.pth", "notes.txt"):
        (directory / "state_dicts" / foreign).write_text("not weights")
    assert all(map(same_weights, load_minimagen(directory, device="cpu").unets, newest.unets))


def test_unet_10_is_not_unet_1_and_each_unet_falls_back_on_its_own(tmp_path):
    directory, best, latest = write_directory(tmp_path), make_imagen(1), make_imagen(2)
    write_weights(directory, best, "state_dicts/unet_0_state_1.pth")
    write_weights(directory, best, None, "state_dicts/unet_10_state_1.pth")
    write_weights(directory, latest, "tmp/unet_0_tmp.pth", "tmp/unet_1_tmp.pth")
    with pytest.warns(UserWarning, match="no weights of U-Net 2: the latest, .*unet_1_tmp.pth, are used") as said:
        loaded = load_minimagen(directory, device="cpu")
    assert len(said) == 1 and Path(said[0].filename).name == "test_generate.py"
    assert same_weights(loaded.unets[0], best.unets[0]) and same_weights(loaded.unets[1], latest.unets[1])


@pytest.mark.parametrize("names", ["tmp/unet_{}_0_percent.pth", "state_dicts/unet_{}_best.pt"])
def test_weights_by_other_names_are_loaded_where_there_is_one_file_of_each(tmp_path, names):
    directory, imagen = write_directory(tmp_path), make_imagen(1)
    write_weights(directory, imagen, names.format(0), names.format(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if "best" in names else "ignore")
        assert all(map(same_weights, load_minimagen(directory, device="cpu").unets, imagen.unets))
    write_weights(directory, imagen, names.format("0_later"))
    with pytest.raises(ValueError, match="has no weights of U-Net 1"):
        load_minimagen(directory)
    write_weights(directory, imagen, "state_dicts/unet_0_state_1.pth", "state_dicts/unet_1_state_1.pth")
    assert same_weights(load_minimagen(directory, device="cpu").unets[0], imagen.unets[0])


def test_missing_damaged_and_foreign_weights_are_named(trained):
    directory, imagen = trained
    file = directory / "state_dicts" / "unet_1_state_1.pth"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"unet_1_state_1\.pth cannot be read"):
        load_minimagen(directory)
    checkpoint.save(imagen.unets[0].state_dict(), file)
    with pytest.raises(ValueError, match=r"unet_1_state_1\.pth do not fit this Unet"):
        load_minimagen(directory)
    file.unlink()
    with pytest.raises(ValueError, match="no weights of U-Net 2, neither .*train the model first"):
        load_minimagen(directory)


def test_other_channels_and_text_widths_are_rebuilt(tmp_path, recwarn):
    settings = {"channels": 1, "text_embed_dim": 32}
    directory, imagen = write_directory(tmp_path, **settings), make_imagen(1, **settings)
    write_weights(directory, imagen, "state_dicts/unet_0_state_1.pth", "state_dicts/unet_1_state_1.pth")
    recwarn.clear()
    assert all(map(same_weights, load_minimagen(directory, device="cpu").unets, imagen.unets))
    assert not recwarn.list


# Sampling

CAPTIONS = ["a dog", "two\nlines", "été"]


def sample_args(captions=CAPTIONS, **further):
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(len(captions), 2, 512, generator=generator)
    return {"text_embeds": embeds, "progress": False, "seed": 0, "stop_at_unet_number": 1, **further}


def test_images_and_captions_are_saved(trained, tmp_path, monkeypatch):
    directory, imagen = trained
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    arguments = sample_args(stop_at_unet_number=None)
    kept = dict(arguments)
    result = sample_and_save(
        CAPTIONS,
        training_directory="../training",
        sample_args=arguments,
        save_directory="here",
        device="cpu",
    )
    assert result is None and arguments == kept

    root = tmp_path / "work" / "here"
    assert sorted(path.name for path in root.iterdir()) == [
        "captions.txt",
        "generated_images",
        "imagen_training_directory.txt",
    ]
    assert (root / "captions.txt").read_text(encoding="utf-8") == "a dog\ntwo lines\nété\n"
    assert (root / "imagen_training_directory.txt").read_text() == "../training"
    files = sorted((root / "generated_images").iterdir())
    assert [path.name for path in files] == ["image_0.png", "image_1.png", "image_2.png"]
    expected = imagen.sample(texts=CAPTIONS, return_pil_images=True, **arguments)
    for file, image in zip(files, expected, strict=True):
        with PIL.Image.open(file) as saved:
            assert saved.size == (16, 16) and saved.tobytes() == image.tobytes()


def test_a_change_of_the_working_directory_while_sampling_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def wander(*_):
        monkeypatch.chdir(tmp_path / "elsewhere")

    sample_and_save(
        ["a"], minimagen=make_imagen(1), sample_args=sample_args("a", callback=wander), save_directory="out"
    )
    assert (tmp_path / "out" / "generated_images" / "image_0.png").exists()
    assert not (tmp_path / "out" / "imagen_training_directory.txt").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert Path.cwd() == tmp_path / "elsewhere", "the working directory is the caller's own"


def test_the_default_directory_has_the_time_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample_and_save(["a"], minimagen=make_imagen(1), sample_args=sample_args("a"), filetype="jpg")
    [folder] = tmp_path.glob("generated_images_*_*")
    with PIL.Image.open(folder / "generated_images" / "image_0.jpg") as image:
        assert image.format == "JPEG"


@pytest.mark.parametrize(
    "captions, options, error, message",
    [
        ("a dog", {}, TypeError, "put a single one in a list"),
        ([], {}, ValueError, "at least one caption"),
        (["a", 3], {}, TypeError, "it holds 3"),
        (["a"], {"filetype": "hdr"}, ValueError, "filetype must be an extension that PIL can write"),
        (["a"], {"filetype": 3}, TypeError, "filetype must be a string"),
        (["a"], {"channels": 4, "filetype": "jpg"}, ValueError, "'jpg' cannot hold images of mode RGBA"),
        (["a"], {"training_directory": "there"}, ValueError, "exactly one of minimagen and training_directory"),
        (["a"], {"minimagen": None}, ValueError, "exactly one of minimagen and training_directory"),
        (["a"], {"minimagen": None, "training_directory": "nowhere"}, FileNotFoundError, "no folder"),
        (["a"], {"device": "cpu"}, ValueError, "device goes with training_directory"),
        (["a"], {"sample_args": {"texts": ["b"]}}, ValueError, "sample_args must not have texts"),
        (["a"], {"sample_args": {"text_embeds": torch.zeros(2, 3, 512)}}, ValueError, "each of the 1 captions"),
        (["a"], {"sample_args": {"text_embeds": [[0.0]]}}, TypeError, "text_embeds must be a tensor"),
        (["a"], {"sample_args": {"text_masks": torch.ones(1, 3).bool()}}, ValueError, "text_masks, which say"),
        (["a"], {"sample_args": {"return_pil_images": False}}, ValueError, "must not have return_pil_images"),
        (["a"], {"sample_args": ["cond_scale"]}, TypeError, "sample_args must be a dictionary"),
        (["a"], {"sample_args": {"cond_scala": 3}}, TypeError, "cond_scala"),
    ],
)
def test_mistakes_are_found_before_anything_is_sampled_or_written(
    tmp_path, monkeypatch, captions, options, error, message
):
    monkeypatch.chdir(tmp_path)
    options = dict(options)
    imagen = make_imagen(1, channels=options.pop("channels", 3))
    monkeypatch.setattr("minimagen_fast.Imagen.sample_images", lambda *args, **kwargs: pytest.fail("sampled"))
    with pytest.raises(error, match=message):
        sample_and_save(captions, **{"minimagen": imagen, "save_directory": "out", **options})
    assert not (tmp_path / "out").exists()


def test_sampling_that_fails_leaves_no_folder_of_its_own(tmp_path):
    options = {"minimagen": make_imagen(1), "sample_args": sample_args("a", steps=0)}
    with pytest.raises(ValueError, match="steps"):
        sample_and_save(["a"], **options, save_directory=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="steps"):
        sample_and_save(["a"], **options, save_directory=tmp_path / "old")
    assert (tmp_path / "old").is_dir(), "what was there before stays"


def test_images_that_are_there_already_are_not_mixed_with_others(tmp_path):
    imagen = make_imagen(1)
    (tmp_path / "generated_images").mkdir()
    sample_and_save(["a"], minimagen=imagen, sample_args=sample_args("a"), save_directory=tmp_path)
    with pytest.raises(FileExistsError, match="generated_images is there already and not empty"):
        sample_and_save(["b"], minimagen=imagen, sample_args=sample_args("b"), save_directory=tmp_path)
    assert (tmp_path / "captions.txt").read_text() == "a\n"


def test_files_of_others_are_not_written_over(tmp_path, monkeypatch):
    options = {"minimagen": make_imagen(1), "sample_args": sample_args("a"), "save_directory": tmp_path}
    (tmp_path / "captions.txt").write_text("mine\n")
    with monkeypatch.context() as patch:
        patch.setattr("minimagen_fast.Imagen.sample_images", lambda *args, **kwargs: pytest.fail("sampled"))
        with pytest.raises(FileExistsError, match="captions.txt is there already and holds something else: choose"):
            sample_and_save(["a"], **options)
    assert (tmp_path / "captions.txt").read_text() == "mine\n" and not (tmp_path / "generated_images").exists()
    (tmp_path / "captions.txt").write_text("a\n")
    sample_and_save(["a"], **options)
    assert (tmp_path / "generated_images" / "image_0.png").is_file()


def test_a_directory_in_the_place_of_a_file_is_found_before_sampling(tmp_path, monkeypatch):
    monkeypatch.setattr("minimagen_fast.Imagen.sample_images", lambda *args, **kwargs: pytest.fail("sampled"))
    (tmp_path / "captions.txt").mkdir()
    with pytest.raises(IsADirectoryError, match="captions.txt is a directory.*choose another save_directory"):
        sample_and_save(["a"], minimagen=make_imagen(1), sample_args=sample_args("a"), save_directory=tmp_path)


def test_captions_that_are_no_utf_8_lose_no_images(tmp_path):
    arguments = sample_args("ab", steps=1, sampler="ddim")
    sample_and_save(["caf\udce9", "\ud83d"], minimagen=make_imagen(1), sample_args=arguments, save_directory=tmp_path)
    assert (tmp_path / "captions.txt").read_text(encoding="utf-8") == "caf\\udce9\n\\ud83d\n"
    assert len(list((tmp_path / "generated_images").iterdir())) == 2


def test_images_are_saved_first(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    arguments = sample_args("a", steps=1, sampler="ddim")
    with pytest.raises(OSError, match="no space"):
        sample_and_save(["a"], minimagen=make_imagen(1), sample_args=arguments, save_directory=tmp_path)
    assert (tmp_path / "generated_images" / "image_0.png").exists()


def test_what_stands_for_an_imagen_need_only_sample(tmp_path):
    class Pipeline:
        def sample(self, texts, return_pil_images, shade=0):
            return [PIL.Image.new("RGB", (4, 4), (shade, 0, 0)) for _ in texts]

    sample_and_save(["a", "b"], minimagen=Pipeline(), save_directory=tmp_path / "out", sample_args={"shade": 9})
    with PIL.Image.open(tmp_path / "out" / "generated_images" / "image_1.png") as image:
        assert image.getpixel((0, 0)) == (9, 0, 0)


def test_the_default_of_sample_args_is_never_changed():
    assert sample_and_save.__kwdefaults__["sample_args"] == {}
