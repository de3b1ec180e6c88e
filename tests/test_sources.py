"""What ``--DATA`` may name: every layout gives the same pictures, to train on, to stream and to encode."""

import argparse
import json
import sys
import zipfile

import pytest
import torch
from captioned_files import number_of, pairs, rows, shade, tar_bytes, write_tars
from picture_server import encoded, picture, serving
from torch.utils.data import Subset

from minimagen_fast import cli, data, sources
from minimagen_fast.caption_store import CaptionStore
from minimagen_fast.decode import ImageError
from minimagen_fast.loading import ShardedLoader
from minimagen_fast.sources import add_data_arguments, open_captions, open_data
from minimagen_fast.streams import StreamedLoader, StreamedPictures
from minimagen_fast.tables import TableDataset, picture_from
from minimagen_fast.training import get_minimagen_parser

datasets = pytest.importorskip("datasets")
pytest.importorskip("pyarrow")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

COUNT = 20


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache" / name)
    monkeypatch.setenv("MINIMAGEN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # at the end of every epoch of Parquet
    datasets.disable_progress_bars()


def parse(where, *words):
    parser = get_minimagen_parser()
    add_data_arguments(parser)
    common = ["-t5", "word_count", "-mw", "8", "-s", "4", "-f", "0.75", "--DATA", str(where)]
    return parser.parse_args([*common, *words])


def numbers(dataset):
    return [number_of(dataset[index]["image"]) for index in range(len(dataset))]


def folder(path):
    path.mkdir()
    for number in range(COUNT):
        (path / f"{number}.png").write_bytes(shade(number))
        (path / f"{number}.txt").write_text(f"picture {number}")
    return path


def tars(path):
    write_tars(path, 4, COUNT // 4)
    return path


def parquet(path, table=rows, suffix="parquet"):
    path.mkdir()
    for file in range(4):
        part = pa.table(table(range(file * 5, file * 5 + 5)))
        if suffix == "parquet":
            pq.write_table(part, path / f"{file}.parquet")
        else:
            writer = pa.ipc.new_stream if suffix == "stream" else pa.ipc.new_file
            with writer(str(path / f"{file}.arrow"), part.schema) as sink:
                sink.write_table(part)
    return path


def structs(numbers):
    columns = rows(numbers)
    return {**columns, "image": [{"bytes": content, "path": "x.png"} for content in columns["image"]], "other": numbers}


def features(path):
    path.mkdir()
    for file in range(4):
        part = datasets.Dataset.from_dict(rows(range(file * 5, file * 5 + 5)))
        part.cast_column("image", datasets.Image()).to_parquet(path / f"{file}.parquet")
    return path


def saved(path):
    dataset = datasets.Dataset.from_dict(rows(range(COUNT))).cast_column("image", datasets.Image())
    dataset.save_to_disk(path, num_shards=2)
    return path


def saved_splits(path):
    train = datasets.Dataset.from_dict(rows(range(COUNT)))
    datasets.DatasetDict({"train": train, "test": train.select(range(2))}).save_to_disk(path)
    return path


LAYOUTS = {
    "folder": folder,
    "tar": tars,
    "parquet": parquet,
    "parquet of structs": lambda path: parquet(path, structs),
    "parquet of features": features,
    "arrow": lambda path: parquet(path, structs, "stream"),
    "arrow files": lambda path: parquet(path, suffix="file"),
    "saved": saved,
    "saved splits": saved_splits,
}
FILES = ["tar", "parquet", "parquet of structs", "parquet of features", "arrow", "arrow files"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pictures(tmp_path, layout):
    args = parse(LAYOUTS[layout](tmp_path / "data"))
    train, valid = open_data(args)
    assert len(train) == 15 and len(valid) == 5
    assert sorted(numbers(train) + numbers(valid)) == list(range(COUNT))
    again, _ = open_data(args)
    assert numbers(again) == numbers(train)
    item = train[0]
    assert item["image"].shape == (3, 4, 4) and item["image"].dtype == torch.float32 and item["mask"].shape == (1, 3)
    assert sorted(open_captions(args)) == sorted(f"picture {number}" for number in range(COUNT))


@pytest.mark.parametrize("layout", FILES)
def test_files_can_be_streamed(tmp_path, layout):
    args = parse(LAYOUTS[layout](tmp_path / "data"), "--STREAMING")
    train, valid = open_data(args)
    assert isinstance(train, StreamedPictures) and sorted(numbers(valid)) == list(range(15, 20))
    batches = list(StreamedLoader(train, 5, seed=0).epoch(0))
    assert sorted(number_of(image) for batch in batches for image in batch["image"]) == list(range(15))
    assert list(open_captions(args)) == [f"picture {number}" for number in range(COUNT)]


@pytest.mark.parametrize("layout", ["folder", "tar", "parquet", "saved"])
def test_testing_takes_a_small_part_of_any_data(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(sources, "TESTING_PICTURES", 6)
    path = LAYOUTS[layout](tmp_path / "data")
    train, valid = open_data(parse(path, "--TESTING"))
    assert len({*numbers(train), *numbers(valid)}) == 6 and len(train) == 3
    assert len(open_data(parse(path, "--TESTING", "-vn", "2"))[1]) == 2
    if layout in FILES:
        train, valid = open_data(parse(path, "--TESTING", "--STREAMING"))
        [batch] = StreamedLoader(train, 3, seed=0).epoch(0)
        assert {number_of(image) for image in batch["image"]} == {0, 1, 2} and numbers(valid) == [15, 16, 17]


@pytest.mark.parametrize("words", ["{0}", "{0}/*.tar", "{0}/000.tar,{0}/00[1-3].tar", "{0}/000.tar"])
def test_files_are_named_in_many_ways(tmp_path, words):
    train, valid = open_data(parse(words.format(tars(tmp_path / "data"))))
    assert len(train) + len(valid) == (5 if words.endswith("000.tar") else COUNT)


def test_names_may_be_long_together(tmp_path, monkeypatch):
    write_tars(tmp_path, 60, 1)
    monkeypatch.chdir(tmp_path)
    words = ",".join(f"{number:03d}.tar" for number in range(60))  # no name of a file has more than 255 characters
    assert len(list(open_captions(parse(words)))) == 60


def test_patterns_reach_folders_within_and_name_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate(("t", "t/within", "t/within/deep")):
        write_tars(tmp_path / path, 1, 4, first=4 * number)
    (tmp_path / "t" / "link.tar").symlink_to("000.tar")
    for words, expected in (
        ("t/**/*.tar", range(12)),
        ("t/*.tar,t/within/../000.tar,./t/000.tar", range(4)),
        ("t/within/*.tar,t/**/*.tar", [*range(4, 8), *range(4), *range(8, 12)]),
    ):
        assert list(open_captions(parse(words))) == [f"picture {number}" for number in expected]


@pytest.mark.parametrize("suffix", ["parquet", "file"])
def test_names_of_files_are_no_patterns(tmp_path, suffix):
    path = parquet(tmp_path / "da[t]a", suffix=suffix)
    for number, name in enumerate(["part", "part [2]", "par*", "p?rt"]):
        file = next(path.glob(f"{number}.*"))
        file.rename(file.with_stem(name))
    train, valid = open_data(parse(path))
    assert sorted(numbers(train) + numbers(valid)) == list(range(COUNT))
    assert len(list(open_captions(parse(path, "--STREAMING")))) == COUNT
    files = ",".join(map(str, path.iterdir()))
    assert len(list(open_captions(parse(files)))) == COUNT


def test_rows_that_datasets_leaves_out_are_noticed(tmp_path, monkeypatch):
    path = parquet(tmp_path / "data")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **options: load(*words, **options).select(range(19)))
    with pytest.raises(ValueError, match="datasets read 19 of the 20 rows in the parquet files"):
        open_data(parse(path))


def test_files_in_a_folder_that_are_packed_are_said_to_be_left_out(tmp_path):
    path = tars(tmp_path / "data")
    (path / "000.tar").rename(path / "000.TAR")
    assert len(open_data(parse(path))[0]) == 15
    (path / "004.tar.gz").write_bytes(b"not looked at")
    with pytest.warns(UserWarning, match=r"1 files in .* are packed and are left out, such as .*004.tar.gz: unpack"):
        open_data(parse(path))


def test_a_saved_data_set_without_rows(tmp_path):
    datasets.Dataset.from_dict({"image": [], "caption": []}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="the data set saved in .*data has no rows"):
        open_data(parse(tmp_path / "data"))


@pytest.mark.parametrize("left_out", [1, 300])
def test_a_cut_stream_of_arrow_is_named(tmp_path, left_out):
    path = parquet(tmp_path / "data", suffix="stream")
    (path / "2.arrow").write_bytes((path / "2.arrow").read_bytes()[:-left_out])
    with pytest.raises(ValueError, match="2.arrow is no arrow file, or it is damaged or cut short"):
        open_data(parse(path))


def test_a_folder_of_folders(tmp_path):
    parquet(tmp_path / "data")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.tar").write_bytes(b"not looked at")
    assert len(open_data(parse(tmp_path))[0]) == 15


def test_validation_is_without_chance(tmp_path):
    for layout in ("folder", "tar"):
        train, valid = open_data(parse(LAYOUTS[layout](tmp_path / layout), "--CROP", "random", "--FLIP"))
        assert (train.dataset.crop, train.dataset.flip) == ("random", True)
        assert isinstance(valid, Subset) and (valid.dataset.crop, valid.dataset.flip) == ("center", False)
        assert not set(train.indices) & set(valid.indices)
        valid.dataset._failures.add("http")
        assert train.dataset.failures == {"http": 1}, "counted together"
    train, valid = open_data(parse(tmp_path / "tar", "--STREAMING", "--FLIP"))
    assert train.flip and not valid.dataset.flip


def test_chance_reaches_the_pictures(tmp_path):
    wide = picture(size=(40, 10))
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(encoded(wide))
        (tmp_path / f"{number}.txt").write_text("x")

    def images(*words):
        train, _ = open_data(parse(tmp_path, *words))
        (batch,) = ShardedLoader(train, 6, seed=0).epoch(0)
        return batch["image"]

    centre, random, flipped, both = (
        images(*words) for words in ([], ["--CROP", "random"], ["--FLIP"], ["--CROP", "random", "--FLIP"])
    )
    assert torch.equal(centre, centre[:1].expand_as(centre))
    assert len(random.unique(dim=0)) == 6, "each is another part"
    mirrored = [not torch.equal(one, two) for one, two in zip(flipped, centre, strict=True)]
    assert 0 < sum(mirrored) < 6
    for one, two, is_mirrored in zip(random, both, mirrored, strict=True):
        assert torch.allclose(two, one.flip(-1) if is_mirrored else one, atol=1e-5)
    assert torch.equal(images("--CROP", "random"), random)


def test_columns_can_be_named(tmp_path):
    path = parquet(tmp_path / "data", lambda numbers: {**rows(numbers, "picture", "words"), "caption": list(numbers)})
    words = ["--IMAGE_COLUMN", "picture", "--CAPTION_COLUMN", "words"]
    for streaming in ([], ["--STREAMING"]):
        args = parse(path, *words, *streaming)
        assert next(iter(open_captions(args))) == "picture 0" and number_of(open_data(args)[1][0]["image"]) < COUNT
        with pytest.raises(
            ValueError, match="no column image or .* among picture, words, caption: name it with IMAGE_C"
        ):
            open_data(parse(path, *streaming))
        with pytest.raises(ValueError, match="no column title among"):
            open_data(parse(path, *words[:2], "--CAPTION_COLUMN", "title", *streaming))


@pytest.mark.parametrize(
    "where, words, message",
    [
        ("built-in", "--IMAGE_COLUMN x", "built-in has no image column to choose: leave out --IMAGE_COLUMN x"),
        ("built-in", "--CAPTION_COLUMN x", "built-in has no caption column to choose"),
        ("conceptual-captions", "--CAPTION_COLUMN x --STREAMING", "conceptual-captions has no caption column"),
        ("tars", "--IMAGE_COLUMN x", "tar files have no image column to choose: leave out --IMAGE_COLUMN x"),
        ("tars", "--IMAGE_COLUMN x --STREAMING", "tar files have no image column"),
        ("pictures", "--IMAGE_COLUMN x", "a folder of pictures has no image column"),
        ("pictures", "--CAPTION_COLUMN x", "pictures has neither metadata.jsonl nor metadata.csv with a field x"),
    ],
)
def test_columns_are_refused_where_there_are_none(tmp_path, monkeypatch, capsys, where, words, message):
    monkeypatch.chdir(tmp_path)
    tars(tmp_path / "tars")
    folder(tmp_path / "pictures")
    with pytest.raises(ValueError, match=message):
        open_data(parse(where, *words.split()))
    command = ["encode-captions", "--DATA", where, "--OUT", "out", "-t5", "t5_tiny", *words.split()]
    assert cli.main(command) == cli.MISUSED
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_captions_of_a_folder_can_be_named(tmp_path, name):
    row = {"file_name": "0.png", "text": "not this", "title": "a title"}
    (tmp_path / "0.png").write_bytes(shade(0))
    (tmp_path / name).write_text(
        json.dumps(row) if name.endswith("l") else f"{','.join(row)}\n{','.join(row.values())}\n"
    )
    assert list(open_captions(parse(tmp_path, "--CAPTION_COLUMN", "title"))) == ["a title"]
    with pytest.raises(ValueError, match=f"{name}, line .: needs file_name and words, both strings"):
        open_captions(parse(tmp_path, "--CAPTION_COLUMN", "words"))


@pytest.mark.parametrize("form", ["torch", "pandas", "arrow"])
@pytest.mark.parametrize("columns", [None, ["caption"]])
def test_a_format_of_datasets_loses_nothing(tmp_path, form, columns):
    made = datasets.Dataset.from_dict({**rows(range(4)), "other": list(range(4))})
    made.with_format(form, columns=columns).save_to_disk(tmp_path / "data")
    train, valid = open_data(parse(tmp_path / "data"))
    assert sorted(numbers(train) + numbers(valid)) == list(range(4))
    assert list(open_captions(parse(tmp_path / "data"))) == [f"picture {number}" for number in range(4)]
    stream = StreamedPictures(made.to_iterable_dataset().with_format(form), encoder_name="word_count", side_length=4)
    assert [number_of(item["image"]) for item in stream] == list(range(4))


def test_what_datasets_keeps_beside_saved_data_is_no_data(tmp_path):
    for part in range(2):
        made = datasets.Dataset.from_dict(rows(range(4 * part, 4 * part + 4)))
        made.save_to_disk(tmp_path / "data" / str(part))
        loaded = datasets.load_from_disk(tmp_path / "data" / str(part))
        loaded.filter(lambda row: row["caption"].endswith("1"))
        loaded.map(lambda row: {"caption": "changed"})
        assert len(list((tmp_path / "data" / str(part)).glob("cache-*.arrow"))) == 2
    for where in (tmp_path / "data", tmp_path / "data" / "*" / "*.arrow"):
        assert list(open_captions(parse(where))) == [f"picture {number}" for number in range(8)]


@pytest.mark.parametrize("suffix", ["parquet", "stream", "file"])
@pytest.mark.parametrize("words", [[], ["--STREAMING"]])
def test_files_that_lack_a_column_are_named(tmp_path, suffix, words):
    path = parquet(tmp_path / "data", suffix=suffix)
    parquet(tmp_path / "other", lambda numbers: rows(numbers, caption="text"), suffix)
    next((tmp_path / "other").glob("2.*")).replace(next(path.glob("2.*")))
    with pytest.raises(ValueError, match="2.* has no column caption, which .*0.* has, but image, text: leave it out"):
        open_data(parse(path, *words))


def test_addresses_in_a_table():
    with serving() as server:
        columns = {"image_url": [server.url + "rgb", server.url + "missing", "file:///etc/hostname"], "text": ["x"] * 3}
        dataset = TableDataset(
            datasets.Dataset.from_dict(columns), encoder_name="word_count", side_length=4, max_length=8
        )
        assert dataset[0]["image"].shape == (3, 4, 4) and dataset[1] is None and dataset[2] is None
        assert dataset.failures == {"http": 1, "scheme": 1}


def test_pictures_of_a_table_are_ours_to_decode(tmp_path):
    (tmp_path / "beside.png").write_bytes(shade(2))
    images = [{"bytes": shade(1), "path": None}, {"bytes": b"damaged", "path": None}]
    images.append({"bytes": None, "path": str(tmp_path / "beside.png")})
    made = datasets.Dataset.from_dict({"image": images, "caption": ["x"] * 3, "other": [1, 2, 3]})
    dataset = TableDataset(
        made.cast_column("image", datasets.Image()), encoder_name="word_count", side_length=4, max_length=8
    )
    assert number_of(dataset[0]["image"]) == 1 and dataset[1] is None and number_of(dataset[2]["image"]) == 2
    assert dataset.failures == {"not_an_image": 1}
    assert dataset.rows.column_names == ["image", "caption"], "others are not read with every row"


def test_pictures_that_datasets_has_left_in_an_archive(tmp_path):
    (tmp_path / "cut.zip").write_bytes(b"PK")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"{number}.png", shade(number))
        archive.writestr("metadata.csv", "file_name,text\n" + "".join(f"{n}.png,picture {n}\n" for n in range(4)))
    for streaming in (False, True):
        made = datasets.load_dataset(
            "imagefolder", data_files=str(tmp_path / "data.zip"), split="train", streaming=streaming
        )
        if streaming:
            pictures = list(StreamedPictures(made, encoder_name="word_count", side_length=4))
        else:
            pictures = list(TableDataset(made, encoder_name="word_count", side_length=4))
        assert [number_of(item["image"]) for item in pictures] == [0, 1, 2, 3]
    for path in ("data.zip", "cut.zip"):
        with pytest.raises(OSError):
            picture_from({"bytes": None, "path": f"zip://9.png::{tmp_path / path}"})
    for path in (
        f"file://{tmp_path}/data.zip",
        f"zip://1.png::simplecache::{tmp_path}/data.zip",
        "zip://1.png::/dev/zero",
    ):
        with pytest.raises(ImageError, match="neither an image file"):
            picture_from({"bytes": None, "path": path})
    with serving() as server:
        assert picture_from({"bytes": None, "path": server.url + "rgb"}).mode == "RGB"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "I;16"])
def test_a_picture_that_is_decoded_already_is_as_that_of_its_file(mode):
    image = picture(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert picture_from(image).tobytes() == picture_from(encoded(image, kind)).tobytes()


def test_cells_that_hold_no_picture(tmp_path):
    for cell in (b"no picture", None, 5, {"bytes": None, "path": str(tmp_path)}, {"bytes": None, "path": None}, {}):
        with pytest.raises(ImageError) as caught:
            picture_from(cell)
        assert caught.value.reason == "not_an_image"
    with pytest.raises(ImageError) as caught:
        picture_from("/etc/hostname")
    assert caught.value.reason == "scheme", "a string is an address, never a file"


def test_the_built_in_pictures():
    train, valid = open_data(parse("built-in", "-f", "0.9", "-vn", "7"))
    assert len(train) == 9000 and len(valid) == 7
    train, valid = open_data(parse("built-in", "--TESTING"))
    assert len(train) == 48 and train[0]["image"].shape == (3, 4, 4)
    for words in (["--FLIP"], ["--CROP", "center"], ["--STREAMING"]):
        with pytest.raises(ValueError, match="built-in pictures are drawn as they are"):
            open_data(parse("built-in", *words))


# Conceptual Captions


@pytest.fixture
def conceptual(monkeypatch):
    with serving() as server:
        columns = {"image_url": [server.url + "rgb"] * 24, "caption": [f"caption {number}" for number in range(24)]}
        made = datasets.DatasetDict({name: datasets.Dataset.from_dict(columns) for name in ("train", "validation")})

        def load_dataset(name, streaming=False):
            assert name == data.CONCEPTUAL_CAPTIONS
            return {key: part.to_iterable_dataset() for key, part in made.items()} if streaming else made

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        yield


def test_conceptual_captions(conceptual):
    train, valid = open_data(parse("conceptual-captions", "-vn", "3"))
    assert (len(train), len(valid)) == (18, 3)
    small, _ = open_data(parse("conceptual-captions", "--TESTING", "--FLIP"))
    assert len(small) == 12 and small.dataset.crop is None and small.dataset.flip
    stretched = train[0]["image"]
    assert stretched.min() == 0 and stretched.max() == 1, "as in minimagen"
    streamed, valid = open_data(parse("conceptual-captions", "--STREAMING", "-vn", "2"))
    assert len(valid) == 2 and torch.equal(next(iter(streamed))["image"], stretched)
    assert torch.equal(valid[0]["image"], stretched) and list(streamed.all_captions())[23] == "caption 23"
    streamed, valid = open_data(parse("conceptual-captions", "--STREAMING", "--TESTING"))
    assert len(valid) == 16 and len(list(streamed.all_captions())) == 16


# What cannot be used


@pytest.mark.parametrize(
    "where, words, error, message",
    [
        ("nowhere", [], FileNotFoundError, "there is no folder"),
        ("~no_such_user/x", [], FileNotFoundError, "there is no folder ~no_such_user/x"),
        ("tars/*.gz", [], FileNotFoundError, "no file or pattern"),
        ("tars/000.tar,nowhere.tar", [], FileNotFoundError, "there is no folder nowhere.tar"),
        ("tars/000.tar,table/0.parquet", [], ValueError, "files of one kind"),
        ("notes.md", [], ValueError, "files of one kind out of .tar"),
        ("mixed", [], ValueError, "holds both pictures and files such as"),
        (".", [], ValueError, "holds both pictures|files of one kind"),
        ("pictures", ["--STREAMING"], ValueError, "is read by index already: leave out --STREAMING"),
        ("tars/000.tar", ["--STREAMING"], ValueError, "keeps whole files for validation, and there is only"),
        ("tars", ["--STREAMING", "-f", "2"], ValueError, "TRAIN_VALID_FRAC must lie"),
        ("tars", ["--STREAMING", "-vn", "0"], ValueError, "VALID_NUM must be"),
        ("tars", ["-vn", "0"], ValueError, "VALID_NUM must be"),
        ("https://example.invalid/x.tar", [], ValueError, "cannot be read by index: give --STREAMING"),
        ("damaged.parquet", [], ValueError, "damaged.parquet is no parquet file, or it is damaged"),
        ("damaged.arrow", [], ValueError, "damaged.arrow is no arrow file, or it is damaged"),
        ("cut.parquet,empty.parquet", ["--STREAMING"], ValueError, "cut.parquet is no parquet file, or it is damaged"),
        ("empty.parquet", [], ValueError, "no rows in the parquet files from empty.parquet on"),
    ],
)
def test_what_cannot_be_used(tmp_path, monkeypatch, where, words, error, message):
    monkeypatch.chdir(tmp_path)
    tars(tmp_path / "tars")
    folder(tmp_path / "pictures")
    parquet(tmp_path / "table")
    folder(tmp_path / "mixed")
    (tmp_path / "mixed" / "x.tar").write_bytes(b"")
    for name in ("notes.md", "damaged.parquet", "damaged.arrow"):
        (tmp_path / name).write_bytes(b"something else")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "table" / "0.parquet").read_bytes()[:-50])
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), "empty.parquet"
    )
    with pytest.raises(error, match=message):
        open_data(parse(where, *words))


def test_a_saved_data_set_without_a_split_to_train_on(tmp_path):
    dataset = datasets.Dataset.from_dict(rows(range(4)))
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="has the splits test: give the folder of one of them"):
        open_data(parse(tmp_path / "data"))
    assert len(open_data(parse(tmp_path / "data" / "test"))[0]) == 3


def test_datasets_may_be_missing(tmp_path, monkeypatch):
    parquet(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'minimagen_fast\[data\]'"):
        open_data(parse(tmp_path / "data"))
    assert len(open_data(parse(tars(tmp_path / "tars")))[0]) == 15, "tar files need nothing else"


def test_streams_of_other_places(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    addresses = []
    for file in range(3):
        addresses.append(f"memory://sources/{file}.tar")
        with fsspec.open(addresses[-1], "wb") as target:
            target.write(tar_bytes(pairs(range(file * 4, file * 4 + 4))))
    with pytest.raises(ValueError, match="say how many with --VALID_NUM"):
        open_data(parse(",".join(addresses), "--STREAMING"))
    train, valid = open_data(parse(",".join(addresses), "--STREAMING", "-vn", "3"))
    assert numbers(valid) == [8, 9, 10]
    batches = StreamedLoader(train, 4, seed=0).epoch(0)
    assert sorted(number_of(image) for batch in batches for image in batch["image"]) == list(range(8))


def test_damage_in_the_middle_of_a_table_is_an_error_for_the_user(tmp_path):
    path = parquet(tmp_path / "data")
    content = bytearray((path / "0.parquet").read_bytes())
    content[4:200] = bytes(196)
    (path / "0.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="parquet files from .*0.parquet on cannot be read"):
        open_data(parse(path))
    train, _ = open_data(parse(path, "--STREAMING"))
    with pytest.raises((ValueError, OSError)):
        list(StreamedLoader(train, 5, seed=0).epoch(0))


# Encoding captions


@pytest.mark.parametrize("layout, words", [("tar", []), ("tar", ["--STREAMING"]), ("parquet", []), ("saved", [])])
def test_captions_are_encoded_and_used(tmp_path, monkeypatch, capsys, layout, words):
    monkeypatch.setenv("MINIMAGEN_FAST_CACHE", str(tmp_path / "cache"))
    path = LAYOUTS[layout](tmp_path / "data")
    out = str(tmp_path / "store")
    command = ["encode-captions", "--DATA", str(path), "--OUT", out, "-t5", "t5_tiny", "-mw", "8", "--DEVICE", "cpu"]
    assert cli.main([*command, *words]) == 0
    assert len(CaptionStore(out)) == COUNT
    assert f"minimagen-fast train --DATA {' '.join([str(path), *words])} --CAPTIONS {out}" in capsys.readouterr().out
    args = parse(path, "--CAPTIONS", out, "-t5", "t5_tiny", *words)
    train, _ = open_data(args)
    items = list(train) if words else [train[index] for index in range(len(train))]
    assert len(items) == 15 and (train if words else train.dataset).captions_not_stored == 0
    assert cli.main([*command[:2], str(tmp_path / "none.tar"), *command[3:]]) == cli.MISUSED
    assert "there is no folder" in capsys.readouterr().err


def test_arguments_have_the_documented_names():
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    words = "--DATA x --CAPTIONS y --STREAMING --CROP random --FLIP --MAX_BAD_FRACTION 0.1 --IMAGE_COLUMN a"
    values = vars(parser.parse_args([*words.split(), "--CAPTION_COLUMN", "b"]))
    assert json.dumps(values) == json.dumps(
        {
            **{"DATA": "x", "STREAMING": True, "IMAGE_COLUMN": "a", "CAPTION_COLUMN": "b", "CAPTIONS": "y"},
            **{"CROP": "random", "FLIP": True, "MAX_BAD_FRACTION": 0.1},
        }
    )
    assert parser.parse_args([]).DATA == "conceptual-captions" and parser.parse_args([]).MAX_BAD_FRACTION is None
