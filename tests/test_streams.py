"""Streams: divided without overlap or loss, resumed exactly, bad samples and damaged files."""

import io
from collections import Counter

import pytest
import torch
from captioned_files import OPTIONS, number_of, pairs, rows, shade, tar_bytes, write_tars
from PIL import Image

from minimagen_fast import streams, tables
from minimagen_fast.loading import ShardedLoader
from minimagen_fast.streams import StreamedLoader, StreamedPictures
from minimagen_fast.tar_members import tar_examples

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def tars(tmp_path, files=4, size=6):
    names = write_tars(tmp_path / "tars", files, size)
    return StreamedPictures(
        datasets.IterableDataset.from_generator(tar_examples, gen_kwargs={"files": names}), **OPTIONS
    )


def table(numbers, shards=1, **options):
    stream = datasets.Dataset.from_dict(rows(numbers)).to_iterable_dataset(num_shards=shards)
    return StreamedPictures(stream, **{**OPTIONS, **options})


def numbers(batches):
    return [[] if batch is None else [number_of(image) for image in batch["image"]] for batch in batches]


@pytest.mark.parametrize("files", [4, 3])
@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 0), (2, 2)])
def test_ranks_and_workers_have_every_sample_once(tmp_path, ranks, workers, files):
    data = tars(tmp_path, files, 5)
    options = dict(seed=1, ranks=ranks, num_workers=workers, drop_last=False, buffer_size=4)
    options["multiprocessing_context"] = "fork" if workers else None
    parts = [list(StreamedLoader(data, 4, rank=rank, **options).epoch(3)) for rank in range(ranks)]
    seen = sum((sum(numbers(part), []) for part in parts), [])
    assert sorted(seen) == list(range(5 * files))
    ids = [id_ for part in parts for batch in part for id_ in batch["id"].tolist()]
    assert len(set(ids)) == 5 * files
    assert all(len(batch["image"]) <= 4 // ranks for part in parts for batch in part)


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_in_an_epoch_is_exact(tmp_path, workers):
    data = tars(
        tmp_path, 3, 7
    )  # of which the first worker has two files and the second one, and each two pictures left
    options = dict(seed=2, num_workers=workers, buffer_size=5, multiprocessing_context="fork" if workers else None)
    data.flip = True
    whole = list(StreamedLoader(data, 3, **options).epoch(1))
    assert len(whole) == 7
    for start in (1, 3, 5, 6, 8):
        rest = list(StreamedLoader(data, 3, **options).epoch(1, start))
        assert len(rest) == max(0, len(whole) - start)
        for one, two in zip(whole[start:], rest, strict=True):
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_passed_over_is_not_decoded(monkeypatch):
    decoded = []
    original = streams.picture_from
    monkeypatch.setattr(streams, "picture_from", lambda value: decoded.append(value) or original(value))
    loader = StreamedLoader(table(range(20)), 4, seed=0)
    assert numbers(loader.epoch(0, 3)) == numbers(loader.epoch(0))[3:]
    assert len(decoded) == 8 + 20


def test_orders_follow_from_seed_and_epoch(tmp_path):
    data = tars(tmp_path)
    orders = {
        (seed, epoch): sum(numbers(StreamedLoader(data, 4, seed=seed).epoch(epoch)), [])
        for seed in range(2)
        for epoch in range(2)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    assert sum(numbers(StreamedLoader(data, 4, seed=1).epoch(1)), []) == orders[1, 1]
    assert sum(numbers(StreamedLoader(data, 4, seed=0, shuffle=False).epoch(0)), []) == list(range(24))


def test_items_are_those_of_data_read_by_index():
    streamed = table(range(6), crop="random", flip=True)
    indexed = tables.TableDataset(datasets.Dataset.from_dict(rows(range(6))), **OPTIONS, crop="random", flip=True)
    one = list(StreamedLoader(streamed, 3, seed=4, shuffle=False).epoch(2))
    two = list(ShardedLoader(indexed, 3, seed=4, shuffle=False).epoch(2))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert list(streamed.all_captions()) == list(indexed.all_captions()) == [f"picture {n}" for n in range(6)]
    assert sum(item is not None for item in streamed) == 6


def test_it_is_said_what_the_batches_follow_from():
    loader = StreamedLoader(table(range(20)), 4, seed=0, rank=1, ranks=2)
    assert loader.layout == {"batch size": 4, "ranks": 2, "workers": 0}


def test_incomplete_batches():
    loader = StreamedLoader(table(range(7)), 3, seed=0)
    assert loader.batches_in_epoch is None
    assert [len(batch) for batch in numbers(loader.epoch(0))] == [3, 3]
    loader = StreamedLoader(table(range(7)), 3, seed=0, drop_last=False)
    assert [len(batch) for batch in numbers(loader.epoch(0))] == [3, 3, 1]


def test_what_workers_have_left_is_put_together(tmp_path):
    data = tars(tmp_path, 3, 5)
    (tmp_path / "tars" / "001.tar").write_bytes(tar_bytes([*pairs(range(5, 9)), ("x.png", b""), ("x.txt", b"x")]))
    options = dict(seed=0, num_workers=2, multiprocessing_context="fork")
    loader = StreamedLoader(data, 7, **options)  # of ten samples and five
    one, two = loader.epoch(0)
    assert len(one["image"]) + len(two["image"]) + loader.failures["not_an_image"] == 14
    assert one.keys() == {"image", "encoding", "mask", "id"} and one["mask"].dtype == torch.bool
    (again,) = loader.epoch(0, 1)
    assert all(torch.equal(two[name], again[name]) for name in two)
    parts = list(StreamedLoader(data, 7, **options, drop_last=False).epoch(0))
    assert sorted(sum(numbers(parts), [])) == [*range(9), *range(10, 15)]
    with pytest.warns(UserWarning, match="15 samples, which are left out, since a batch has 16: use a smaller BATCH_S"):
        assert list(StreamedLoader(data, 16, seed=0).epoch(0)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_counted_and_bounded(workers):
    columns = rows(range(60))
    columns["image"][::3] = [b"no picture"] * 20
    columns["caption"][1] = None
    stream = datasets.Dataset.from_dict(columns).to_iterable_dataset()
    options = dict(seed=0, shuffle=False, num_workers=workers, multiprocessing_context="fork" if workers else None)
    loader = StreamedLoader(StreamedPictures(stream, **OPTIONS), 6, **options)
    assert sum(numbers(loader.epoch(0)), []) == [n for n in range(60) if n % 3 and n != 1]
    assert loader.failures == Counter(not_an_image=20, caption=1)
    loader = StreamedLoader(StreamedPictures(stream, **OPTIONS), 6, **options, max_bad_fraction=0.2)
    with pytest.raises(ValueError, match=r"^19 of 54 samples .*not_an_image: 18, caption: 1"):
        list(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [0, 50])
def test_a_damaged_tar_is_named(tmp_path, workers, start):
    data = tars(tmp_path, 2, 4)
    path = tmp_path / "tars" / "001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    options = dict(seed=0, shuffle=False, num_workers=workers, multiprocessing_context="fork" if workers else None)
    with pytest.raises(ValueError, match=r"^/.*001.tar is no tar file, or it is damaged or cut short"):
        list(StreamedLoader(data, 2, **options).epoch(0, start))


def test_a_tar_that_leads_elsewhere_is_refused(tmp_path):
    data = tars(tmp_path, 1, 2)
    (tmp_path / "tars" / "000.tar").write_bytes(tar_bytes([("../a.png", b"x")]))
    with pytest.raises(ValueError, match="outside the folder"):
        list(StreamedLoader(data, 2, seed=0).epoch(0))


def test_streams_of_other_places(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://pictures.tar", "wb") as file:
        file.write(tar_bytes(pairs(range(5))))
    examples = list(tar_examples(["memory://pictures.tar"]))
    assert [example["caption"] for example in examples] == [f"picture {number}" for number in range(5)]


def test_webdatasets_that_datasets_has_opened(tmp_path):
    files = write_tars(tmp_path, 1, 4)
    stream = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    data = StreamedPictures(stream, **OPTIONS)
    assert (data.image_column, data.caption_column) == ("png", "txt")
    first = next(iter(data.stream))["png"]
    assert isinstance(first, dict) and first["bytes"] == shade(0), "not decoded yet"
    assert sum(numbers(StreamedLoader(data, 2, seed=0, shuffle=False).epoch(0)), []) == [0, 1, 2, 3]


def test_pictures_that_are_decoded_already(tmp_path):
    images = [{"image": Image.open(io.BytesIO(shade(n))), "text": "x"} for n in range(2)]
    stream = datasets.IterableDataset.from_generator(lambda: iter(images))
    assert sum(numbers(StreamedLoader(StreamedPictures(stream, **OPTIONS), 2, seed=0).epoch(0)), []) in ([0, 1], [1, 0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 3, "ranks": 2}, "cannot be divided equally"),
        ({"buffer_size": 0}, "buffer_size must be at least 1"),
        ({"max_bad_fraction": -0.1}, "MAX_BAD_FRACTION"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        StreamedLoader(table(range(4)), **{"batch_size": 2, "seed": 0, **options})


def test_what_is_no_stream_or_has_no_columns():
    with pytest.raises(TypeError, match="ShardedLoader"):
        StreamedLoader([1, 2], 1, seed=0)
    stream = datasets.Dataset.from_dict({"picture": [b"x"], "caption": ["x"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="no column image or jpg .*among picture, caption: name it with IMAGE_COLUMN"):
        StreamedPictures(stream, **OPTIONS)
    assert StreamedPictures(stream, **OPTIONS, image_column="picture").image_column == "picture"
    with pytest.raises(ValueError, match="nothing in the stream"):
        StreamedPictures(datasets.IterableDataset.from_generator(lambda: iter(())), **OPTIONS)
    with pytest.raises(ValueError, match="start must be"):
        StreamedLoader(table(range(4)), 2, seed=0).epoch(0, -1)
