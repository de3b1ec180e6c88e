"""Data sets, splitting and collating."""

import argparse
import copy
import errno
import json
import os
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
from picture_server import BAD, GOOD, encoded, picture, serving
from PIL import Image
from torch.utils.data import DataLoader

from minimagen_fast import data
from minimagen_fast.data import FolderDataset, MinimagenCollator, MinimagenDataset, get_minimagen_dl_opts
from minimagen_fast.t5 import register_text_encoder


def _encode(captions, max_length, device):
    lengths = torch.tensor([min(len(caption.split()) + 1, max_length) for caption in captions])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return mask[:, :, None].float().expand(-1, -1, 5).contiguous(), mask


register_text_encoder("word_count", _encode, 5)
register_text_encoder("seven_wide", lambda *words: (torch.ones(1, words[1], 7), torch.ones(1, words[1]).bool()), 7)
OPTIONS = dict(encoder_name="word_count", max_length=8, side_length=16)


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def web(server, names, captions=None, **options):
    captions = captions or [f"picture of {name}" for name in names]
    rows = {"image_url": [server.url + name for name in names], "caption": captions}
    return MinimagenDataset({"train": rows, "validation": rows}, **{**OPTIONS, "timeout": 2.0, "retries": 0, **options})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_that_is_served_ends_a_run(server, monkeypatch, num_workers):
    # Smaller than the default, so that the server need not send so much.
    monkeypatch.setattr(data.fetch_image, "__kwdefaults__", {**data.fetch_image.__kwdefaults__, "max_bytes": 2**19})
    names = [*GOOD, *BAD]
    dataset = web(server, names)
    loader = DataLoader(dataset, batch_size=4, num_workers=num_workers, collate_fn=MinimagenCollator("cpu"))
    batches = [batch for batch in loader if batch is not None]
    assert sum(len(batch["image"]) for batch in batches) == len(GOOD)
    for batch in batches:
        assert batch["image"].shape[1:] == (3, 16, 16) and batch["image"].isfinite().all()
        assert batch["image"].min() >= 0 and batch["image"].max() <= 1
        assert batch["mask"].dtype == torch.bool and batch["encoding"].shape[:2] == batch["mask"].shape
    assert dataset.failures == dict(Counter(BAD.values()))


def test_items_are_as_documented(server):
    seen = []
    item = web(server, ["rgb"], img_transform=lambda image: seen.append(image) or image * 0.5)[torch.tensor(0)]
    assert item["image"].shape == (3, 16, 16) and item["image"].max() == 0.5
    assert seen[0].min() == 0 and seen[0].max() == 1, "values are stretched, then transformed"
    assert item["encoding"].shape == (1, 4, 5) and item["mask"].shape == (1, 4)


def test_transform_and_text_encoder_can_be_used_and_set_as_in_minimagen(server):
    dataset = web(server, ["rgb"], img_transform=lambda image: image * 0.5)
    assert torch.equal(dataset.img_transform(picture()), dataset[0]["image"]), "from the PIL image"
    dataset.img_transform = lambda image: torch.full((3, 4, 4), float(image.mode == "RGB"))
    assert torch.equal(dataset[0]["image"], torch.ones(3, 4, 4)), "in the place of all"
    other = copy.copy(dataset)
    other.max_length, other.encoder_name = 2, "seven_wide"
    assert (other.max_length, other.encoder_name) == (2, "seven_wide")
    assert other[0]["encoding"].shape == (1, 2, 7) and dataset[0]["encoding"].shape == (1, 4, 5)


def test_sizes_may_be_numbers_of_numpy(server):
    numbers = {"side_length": np.int64(12), "max_length": np.int32(2)}
    item = web(server, [next(iter(GOOD))], ["one two three"], **numbers)[0]
    assert item["image"].shape == (3, 12, 12) and item["mask"].shape == (1, 2)


def test_a_transform_may_drop_a_picture(server):
    dataset = web(server, ["rgb"], img_transform=lambda image: None)
    assert dataset[0] is None and dataset.failures == {"transform": 1}


def test_spawned_workers_count_too(server):
    dataset = web(server, ["missing", "text"])
    loader = DataLoader(dataset, num_workers=1, collate_fn=MinimagenCollator("cpu"), multiprocessing_context="spawn")
    assert list(loader) == [None, None]
    assert dataset.failures == {"http": 1, "not_an_image": 1}


def test_a_picture_of_one_colour_is_no_nan(server):
    assert torch.allclose(web(server, ["constant"])[0]["image"], torch.tensor(7 / 255))


def test_bad_captions_are_counted(server):
    dataset = web(server, ["rgb"] * 3, [None, 5, ""])
    assert dataset[0] is None and dataset[1] is None and dataset[2]["mask"].shape == (1, 1)
    assert dataset.failures == {"caption": 2}


def test_copies_count_for_themselves(server):
    dataset = web(server, ["missing"])
    assert dataset[0] is None
    other = copy.deepcopy(dataset)
    assert other[0] is None
    assert dataset.failures == {"http": 1} and other.failures == {"http": 2}


def test_the_columns_can_be_had(server):
    dataset = web(server, ["rgb", "grey"], captions=["one", "two"])
    assert dataset.urls == [server.url + "rgb", server.url + "grey"] and dataset.captions == ["one", "two"]


def test_columns_may_be_those_of_a_table(server):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(
        {"caption": ["none", "a picture"], "image_url": [server.url + "missing", server.url + "rgb"]}
    )
    dataset = MinimagenDataset({"train": table[1:]}, **OPTIONS, retries=0)
    assert len(dataset) == 1 and list(dataset.all_captions()) == ["a picture"]
    assert dataset[0]["mask"].shape == (1, 3) and dataset[0]["image"].shape == (3, 16, 16)


def test_the_columns_can_be_set(server):
    dataset = web(server, ["missing", "rgb", "text"])
    dataset.urls, dataset.captions = dataset.urls[1:2], ["a picture"]
    assert len(dataset) == 1 and list(dataset.all_captions()) == ["a picture"]
    assert dataset[0]["mask"].shape == (1, 3) and dataset[0]["image"].shape == (3, 16, 16)


def test_a_hugging_face_split_is_read_by_row():
    class Rows:
        def __len__(self):
            return 3_000_000

        def __getitem__(self, index):
            assert isinstance(index, int), "a whole column must not be read"
            return {"image_url": "ftp://nowhere", "caption": "x"}

    dataset = MinimagenDataset({"train": Rows()}, **OPTIONS)
    assert len(dataset) == 3_000_000 and dataset[2_999_999] is None
    with pytest.raises(ValueError, match="no split 'validation'"):
        MinimagenDataset({"train": Rows()}, **OPTIONS, train=False)


# Folders


def _folder(tmp_path, **files):
    for name in ("a.png", "sub/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(), "PNG" if name.endswith("png") else "JPEG"))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


JSON = '{"file_name": "a.png", "text": "first"}\n\n{"file_name": "sub/b.jpg", "text": "the second"}\n'


@pytest.mark.parametrize(
    "files",
    [
        {"metadata.jsonl": JSON},
        {"metadata.csv": 'file_name,text\na.png,first\nsub/b.jpg,"the second"\n'},
        {"a.txt": "first\n", "sub/b.txt": "the second"},
    ],
)
def test_folders_with_captions(tmp_path, files):
    dataset = FolderDataset(_folder(tmp_path, **files), side_length=16, encoder_name="word_count")
    assert [caption for _, caption in dataset.entries] == ["first", "the second"]
    batch = MinimagenCollator("cpu")([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 3, 16, 16) and batch["mask"].sum(dim=1).tolist() == [2, 3]


def test_folder_pictures_are_cropped_and_not_stretched(tmp_path):
    wide = Image.new("RGB", (30, 10), (0, 0, 0))
    wide.paste((128, 128, 128), (10, 0, 20, 10))
    wide.save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("grey")
    image = FolderDataset(tmp_path, side_length=5, encoder_name="word_count")[0]["image"]
    assert torch.allclose(image, torch.full((3, 5, 5), 128 / 255), atol=1e-3)


def test_a_damaged_file_ends_no_run(tmp_path):
    folder = _folder(tmp_path, **{"metadata.jsonl": JSON})
    (folder / "a.png").write_bytes(GOOD["jpeg"][:200])
    dataset = FolderDataset(folder, side_length=16, encoder_name="word_count")
    assert dataset[0] is None and dataset[1] is not None
    assert sum(dataset.failures.values()) == 1
    (folder / "a.png").unlink()
    assert dataset[0] is None and dataset.failures["unreadable"] == 1


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no caption file a.txt"),
        ({"metadata.jsonl": '{"file_name": "a.png"}'}, "line 1: needs file_name and text"),
        ({"metadata.jsonl": "not json"}, "line 1: not JSON"),
        ({"metadata.jsonl": "[1]"}, "line 1: needs file_name and text"),
        ({"metadata.jsonl": json.dumps({"file_name": "c.png", "text": "x"})}, "there is no file 'c.png'"),
        ({"metadata.jsonl": json.dumps({"file_name": "../a.png", "text": "x"})}, "outside the folder"),
        ({"metadata.jsonl": json.dumps({"file_name": "/etc/hostname", "text": "x"})}, "outside the folder"),
        ({"metadata.csv": "name,caption\na.png,x\n"}, "line 2: needs file_name and text"),
        ({"metadata.csv": "file_name,text\na.png,a cat, asleep\n"}, "line 2: has 3 fields, the header 2: a caption"),
        ({"metadata.csv": "file_name,text,text\na.png,x,y\n"}, "line 1: there are 2 columns text: keep one"),
        ({"metadata.jsonl": "[" * 100_000}, "line 1: not JSON"),
        ({"metadata.jsonl": json.dumps({"file_name": r"..\\a.png", "text": "x"})}, "outside the folder"),
        ({"metadata.jsonl": json.dumps({"file_name": "a\0.png", "text": "x"})}, "there is no file"),
        ({"metadata.jsonl": JSON.splitlines()[0]}, "sub/b.jpg is not in metadata.jsonl"),
        ({"metadata.jsonl": JSON, "metadata.csv": "file_name,text\n"}, "both metadata.jsonl and metadata.csv"),
        ({"a.txt": "x", "sub/b.txt": "x", "c.txt": "x"}, "c.txt has no picture"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        FolderDataset(_folder(tmp_path, **files), side_length=16, encoder_name="word_count")


def test_an_absolute_name_is_refused_even_where_it_leads_into_the_folder(tmp_path):
    line = json.dumps({"file_name": str(tmp_path / "a.png"), "text": "x"})
    with pytest.raises(ValueError, match="outside the folder"):
        FolderDataset(_folder(tmp_path, **{"metadata.jsonl": line}), side_length=16, encoder_name="word_count")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "a.txt"])
def test_captions_that_are_no_utf8_are_named(tmp_path, name):
    folder = _folder(tmp_path, **({"sub/b.txt": "x"} if name == "a.txt" else {}))
    (folder / name).write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=f"{name} is not UTF-8 text"):
        FolderDataset(folder, side_length=16, encoder_name="word_count")


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no captioned pictures"):
        FolderDataset(tmp_path, side_length=16, encoder_name="word_count")


def test_hidden_files_and_links_and_odd_separators(tmp_path):
    folder = _folder(tmp_path)
    (folder / "._a.png").write_bytes(b"not a picture")
    (folder / "link.png").symlink_to(folder / "a.png")
    rows = [{"file_name": name, "text": "one\u2028line"} for name in ("a.png", "sub/b.jpg", "link.png")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    dataset = FolderDataset(folder, side_length=16, encoder_name="word_count")
    assert [caption for _, caption in dataset.entries] == ["one\u2028line"] * 3
    assert all(dataset[i] is not None for i in range(3))


def test_linked_folders_are_searched_once_and_loops_end(tmp_path):
    folder, store = tmp_path / "folder", tmp_path / "store"
    for path in (folder / "own", store / "deep"):
        path.mkdir(parents=True)
        (path / "x.gif").write_bytes(encoded(picture(), "GIF"))
        (path / "x.txt").write_text(path.name)
    (folder / "first").symlink_to(folder / "own")
    (folder / "linked").symlink_to(store)
    (store / "back").symlink_to(folder)
    (store / "again").symlink_to(store)
    dataset = FolderDataset(folder, side_length=16, encoder_name="word_count")
    assert dataset.entries == [("linked/deep/x.gif", "deep"), ("own/x.gif", "own")]
    assert dataset[0] is not None
    names = ["first/x.gif", "linked/again/deep/x.gif"]
    rows = [json.dumps({"file_name": name, "text": name}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    named = FolderDataset(folder, side_length=16, encoder_name="word_count")
    assert [name for name, _ in named.entries] == names and named[1] is not None
    (folder / "metadata.jsonl").write_text(rows[0])
    with pytest.raises(ValueError, match="linked/deep/x.gif is not in metadata.jsonl"):
        FolderDataset(folder, side_length=16, encoder_name="word_count")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = _folder(tmp_path, **{"a.txt": "first", "sub/b.txt": "second"})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith(("sub", "lost+found")):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="sub"):
        FolderDataset(folder, side_length=16, encoder_name="word_count")
    (folder / "sub").rename(folder / "lost+found")
    assert len(FolderDataset(folder, side_length=16, encoder_name="word_count")) == 1


def test_a_training_may_be_kept_beside_its_data(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("a caption")
    (tmp_path / "run" / "parameters").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "run" / "grid.png")
    for name in ("training_progess.txt", "parameters/training_parameters.txt"):
        (tmp_path / "run" / name).write_text("--BATCH_SIZE=2")
    assert len(FolderDataset(tmp_path, side_length=16, encoder_name="word_count")) == 1
    with pytest.raises(ValueError, match="grid.png has no caption file"):
        FolderDataset(tmp_path / "run", side_length=16, encoder_name="word_count")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("caption")
    dataset = FolderDataset(tmp_path, side_length=16, encoder_name="word_count")
    assert dataset[0] is None and dataset.failures == {"unreadable": 1}
    (tmp_path / "x.txt").unlink()
    os.mkfifo(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="x.txt is no file"):
        FolderDataset(tmp_path, side_length=16, encoder_name="word_count")


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        FolderDataset(tmp_path / "x", side_length=16, encoder_name="word_count")


@pytest.mark.parametrize("option", ["side_length", "max_length"])
def test_numbers_are_checked(server, option):
    with pytest.raises(ValueError, match=f"{option} must be a whole number"):
        web(server, ["rgb"], **{option: 0})


# Cropping and mirroring


def _wide(tmp_path, **options):
    """A folder of one picture of three squares, red, green and blue."""
    wide = Image.new("RGB", (30, 10), (255, 0, 0))
    wide.paste((0, 255, 0), (10, 0, 20, 10))
    wide.paste((0, 0, 255), (20, 0, 30, 10))
    wide.save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("three colours")
    return FolderDataset(tmp_path, side_length=10, encoder_name="word_count", **options)


@pytest.mark.parametrize("share, color", [(0.0, 0), (0.5, 1), (0.999, 2)])
def test_a_random_crop_may_be_anywhere(tmp_path, share, color):
    image = _wide(tmp_path, crop="random").item(0, (share, 0.3, 0.0))["image"]
    assert torch.allclose(image, torch.eye(3)[color][:, None, None].expand(3, 10, 10), atol=0.2)
    upright = Image.open(tmp_path / "x.png").rotate(-90, expand=True)
    upright.save(tmp_path / "x.png")
    dataset = FolderDataset(tmp_path, side_length=10, encoder_name="word_count", crop="random")
    assert torch.equal(dataset.item(0, (0.3, share, 0.0))["image"], image), "the same from top to bottom"


def test_mirroring(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(picture()))
    (tmp_path / "x.txt").write_text("x")
    plain, mirrored = (
        FolderDataset(tmp_path, side_length=12, encoder_name="word_count", flip=flip) for flip in (False, True)
    )
    image = plain[0]["image"]
    assert torch.equal(plain.item(0, (0, 0, 0))["image"], image)
    assert torch.equal(mirrored.item(0, (0, 0, 0.5))["image"], image)
    assert torch.allclose(mirrored.item(0, (0, 0, 0.49))["image"], image.flip(-1), atol=1e-6)
    assert not torch.allclose(image, image.flip(-1), atol=0.1)


def test_chance_is_drawn_only_where_it_is_needed(tmp_path):
    dataset = _wide(tmp_path)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = dataset[0]["image"]
    assert torch.equal(torch.get_rng_state(), before)
    dataset.crop = "random"
    images = torch.stack([dataset[0]["image"] for _ in range(10)])
    assert len(images.unique(dim=0)) > 1 and torch.equal(dataset.unaugmented()[0]["image"], first)


def test_pictures_from_the_web_can_be_cropped_too(server):
    squeezed, cropped = (web(server, ["rgb"], crop=crop)[0]["image"] for crop in (None, "center"))
    assert not torch.equal(squeezed, cropped) and cropped.min() == 0 and cropped.max() == 1
    with pytest.raises(ValueError, match="crop must be one of center, random, or None, got 'left'"):
        web(server, ["rgb"], crop="left")


# Splitting


def test_splits_are_the_same_every_time():
    numbers = list(range(100))
    first, second = data.split_train_valid(numbers, 0.8), data.split_train_valid(numbers, 0.8)
    torch.rand(3)
    for a, b in zip(first, second, strict=True):
        assert list(a.indices) == list(b.indices)
    train, valid = first
    assert len(train) == 80 and sorted([*train.indices, *valid.indices]) == numbers


def test_valid_num_means_that_number():
    _, valid = data.split_train_valid(list(range(100)), 0.5, 7)
    assert len(valid) == 7
    with pytest.warns(UserWarning, match="only 50 pictures are left"):
        _, valid = data.split_train_valid(list(range(100)), 0.5, 70)
    assert len(valid) == 50


@pytest.mark.parametrize(
    "number, fraction, valid_num, message",
    [
        (10, 0.0, None, "between 0 and 1"),
        (10, 1.0, None, "between 0 and 1"),
        (1, 0.9, None, "empty"),
        (9, 0.5, 0, "VALID_NUM"),
    ],
)
def test_splits_that_cannot_be(number, fraction, valid_num, message):
    with pytest.raises(ValueError, match=message):
        data.split_train_valid(list(range(number)), fraction, valid_num)


# Conceptual Captions


@pytest.fixture
def conceptual(server, monkeypatch):
    asked = []

    def load_dataset(name):
        asked.append(name)
        rows = {"image_url": [server.url + "rgb"] * 40, "caption": [f"caption {i}" for i in range(40)]}
        return {"train": rows, "validation": rows}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def _args(**changes):
    values = dict(T5_NAME="word_count", MAX_NUM_WORDS=8, IMG_SIDE_LEN=16, TRAIN_VALID_FRAC=0.75, VALID_NUM=None)
    return argparse.Namespace(**{**values, **changes})


def test_conceptual_captions(conceptual):
    train, valid = data.ConceptualCaptions(_args())
    assert (len(train), len(valid)) == (30, 10) and train[0]["image"].shape == (3, 16, 16)
    assert conceptual == ["google-research-datasets/conceptual_captions"]
    again, _ = data.ConceptualCaptions(vars(_args()))
    by_attribute, _ = data.ConceptualCaptions(type("Args", (), vars(_args()))())
    assert list(again.indices) == list(by_attribute.indices) == list(train.indices)
    small, rest = data.ConceptualCaptions(_args(VALID_NUM=3), smalldata=True)
    assert (len(small), len(rest)) == (12, 3)
    assert len(data.ConceptualCaptions(_args(), testset=True)) == 40


def test_the_small_conceptual_captions_select_rows(monkeypatch):
    class Rows(list):
        def select(self, indices):
            return Rows(self[i] for i in indices)

    rows = Rows({"image_url": "ftp://nowhere", "caption": str(i)} for i in range(100))
    splits = {"train": rows, "validation": rows}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name: splits))
    train, valid = data.ConceptualCaptions(_args(), smalldata=True)
    assert (len(train), len(valid)) == (12, 4) and len(train.dataset) == 16


def test_conceptual_captions_need_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"minimagen_fast\[data\]"):
        data.ConceptualCaptions(_args())


# Collating


def test_items_are_padded_and_left_alone():
    items = [
        {"image": torch.zeros(3, 4, 4), "encoding": torch.ones(1, n, 5), "mask": torch.ones(1, n).bool()}
        for n in (1, 3)
    ]
    items.append({"image": torch.zeros(3, 4, 4), "encoding": torch.ones(2, 5), "mask": torch.ones(2, dtype=torch.long)})
    batch = MinimagenCollator("cpu")([None, *items])
    assert batch["encoding"].shape == (3, 3, 5) and batch["mask"].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert batch["encoding"].sum(dim=(1, 2)).tolist() == [5, 15, 10]
    assert items[0]["mask"].shape == (1, 1), "items may be shared and are not changed"


def test_nothing_left_is_none():
    collate = MinimagenCollator("cpu")
    assert collate([None, {"image": None}]) is None and collate([]) is None


def test_loader_options():
    options = get_minimagen_dl_opts("cpu")
    assert isinstance(options.pop("collate_fn"), MinimagenCollator)
    assert options == {"batch_size": 4, "shuffle": True, "num_workers": 0, "drop_last": True}
