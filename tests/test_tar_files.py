"""Tar files of captioned pictures: what is read, what is refused, and that nothing is lost in silence."""

import argparse
import json
import os
import pickle
import tarfile
import warnings

import pytest
import torch
from captioned_files import OPTIONS, number_of, pairs, shade, tar_bytes, write_tars
from picture_server import GOOD

from minimagen_fast import tar_files
from minimagen_fast.data import MinimagenCollator
from minimagen_fast.sources import open_captions
from minimagen_fast.tar_files import TarDataset
from minimagen_fast.tar_members import tar_examples


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMAGEN_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar(tmp_path, members, name="x.tar", **options):
    (tmp_path / name).write_bytes(tar_bytes(members, **options))
    return str(tmp_path / name)


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def contents(dataset):
    return [(number_of(dataset[index]["image"]), caption) for index, caption in enumerate(dataset.all_captions())]


def test_items_are_those_of_all_files_in_order(tmp_path):
    dataset = TarDataset(write_tars(tmp_path, 3, 4, first=10), **OPTIONS)
    assert len(dataset) == 12
    assert contents(dataset) == [(number, f"picture {number}") for number in range(10, 22)]
    item = dataset[torch.tensor(11)]
    assert item["image"].shape == (3, 4, 4) and item["encoding"].shape == (1, 3, 5) and item["mask"].shape == (1, 3)
    with pytest.raises(IndexError, match="has 12 items"):
        dataset[12]
    with pytest.raises(IndexError):
        dataset[-1]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_read_as_webdataset_reads_them(tmp_path, form):
    deep = "/".join(["folder"] * 12)
    members = [
        ("./a.PNG", shade(1)),
        ("._a.png", b"what a system leaves"),
        (".hidden.txt", b"x"),
        ("./a.seg.png", shade(2)),
        ("./a.txt", " größer ".encode("utf-8-sig")),
        (f"{deep}/a.jpeg", GOOD["jpeg"]),
        ("notes.md", b"x"),
        ("v1.0/b.txt", b"another"),
        (f"{deep}/a.json", b'{"text": "deep", "key": 5}'),
        ("v1.0/b.jpg", GOOD["jpeg"]),
    ]
    members.insert(3, special("folder", tarfile.DIRTYPE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is alone
        dataset = TarDataset([tar(tmp_path, members, format=form)], **OPTIONS)
    assert list(dataset.all_captions()) == ["größer", "deep", "another"]
    assert number_of(dataset[0]["image"]) == 1 and dataset[1] is not None and dataset[2] is not None


def test_text_is_taken_before_json_and_fields_can_be_named(tmp_path):
    both = {"caption": "from caption", "text": "from text", "alt": "from alt"}
    members = [("a.json", json.dumps(both).encode()), ("a.png", shade(1)), ("a.txt", b"from the text file")]
    assert list(TarDataset([tar(tmp_path, members)], **OPTIONS).all_captions()) == ["from the text file"]
    assert list(TarDataset([tar(tmp_path, members[::-1])], **OPTIONS).all_captions()) == ["from the text file"]
    only_json = [tar(tmp_path, members[:2])]
    assert list(TarDataset(only_json, **OPTIONS).all_captions()) == ["from caption"]
    assert list(TarDataset(only_json, **OPTIONS, caption_field="alt").all_captions()) == ["from alt"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_field_that_is_named_is_taken_before_text(tmp_path, order):
    members = [("a.json", b'{"alt": "from alt"}'), ("a.png", shade(1)), ("a.txt", b"text"), ("b.png", shade(2))]
    path = tar(tmp_path, [*members[:3][::order], members[3], ("b.txt", b"text alone")])
    # In either order: what is kept of where members lie is of the one or the other.
    for field, expected in ((None, "text"), ("alt", "from alt"), (None, "text")):
        assert list(TarDataset([path], **OPTIONS, caption_field=field).all_captions()) == [expected, "text alone"]
    args = argparse.Namespace(DATA=str(path), STREAMING=True, IMAGE_COLUMN=None, CAPTION_COLUMN="alt")
    assert list(open_captions(args)) == ["from alt", "text alone"]


def test_bad_samples_are_counted(tmp_path):
    members = [
        *[("a.png", b"no picture"), ("a.txt", b"x")],
        *[("b.png", shade(1)), ("b.txt", b"caf\xe9")],
        *[("c.png", shade(1)), ("c.json", b"{")],
        *[("d.png", shade(1)), ("d.json", b'{"title": "x"}')],
        *[("e.png", shade(1)), ("e.json", b'{"caption": 5}')],
        *[("f.png", shade(1)), ("f.json", b'["caption"]')],
        *[("g.jpg", GOOD["jpeg"][:300]), ("g.txt", b"x")],
        *pairs([7]),
    ]
    dataset = TarDataset([tar(tmp_path, members)], **OPTIONS)
    items = [dataset[index] for index in range(len(dataset))]
    assert [item is None for item in items] == [True] * 7 + [False]
    assert dataset.failures == {"not_an_image": 1, "caption": 5, "truncated": 1}
    assert list(dataset.all_captions()) == ["x", "x", "picture 7"]


def test_what_is_alone_is_left_out_and_said(tmp_path):
    files = [tar(tmp_path, [*pairs([1]), ("b.png", shade(2)), ("c.txt", b"x")])]
    with pytest.warns(UserWarning, match="2 pictures or captions in 1 tar files are alone"):
        dataset = TarDataset(files, **OPTIONS)
    assert contents(dataset) == [(1, "picture 1")]
    with pytest.warns(UserWarning, match="2 pictures or captions"):  # also when it is known from before
        TarDataset(files, **OPTIONS)
    with pytest.warns(UserWarning, match="2 pictures or captions in .*x.tar are alone"):
        assert len(list(tar_examples(files))) == 1


def test_what_has_another_dot_in_its_name_is_left_out_and_said(tmp_path):
    dotted = [("b_0.5x.png", shade(2)), ("b_0.5x.txt", b"x"), ("IMG_2023.01.05.JPG", GOOD["jpeg"])]
    files = [tar(tmp_path, [*dotted, *pairs([1]), ("0001.seg.png", shade(3)), ("notes.en.md", b"x")])]
    with pytest.warns(UserWarning, match="^3 pictures or captions in 1 tar files are left out since .* dot in their n"):
        assert contents(TarDataset(files, **OPTIONS)) == [(1, "picture 1")]
    with pytest.warns(UserWarning, match="^3 pictures or captions in 1 tar files"):  # also when it is known from before
        TarDataset(files, **OPTIONS)
    with pytest.warns(UserWarning, match="^3 pictures or captions in .*x.tar are left out since"):
        assert len(list(tar_examples(files))) == 1
    files = [tar(tmp_path, [*dotted, ("c.png", shade(3))])]
    with pytest.raises(ValueError, match="no captioned picture in .* 1 pictures or captions .* alone.*; 3 pictures or"):
        TarDataset(files, **OPTIONS)


@pytest.mark.parametrize(
    "member, message",
    [
        (("/etc/a.png", b"x"), "'/etc/a.png' is outside the folder"),
        (("../a.png", b"x"), "'../a.png' is outside"),
        (("a/../../b.txt", b"x"), "is outside"),
        ((r"C:\a.png", b"x"), "is outside"),
        ((r"..\a.png", b"x"), "is outside"),
        (special("a.png", tarfile.SYMTYPE, "/etc/passwd"), "'a.png' is a link, to '/etc/passwd'"),
        (special("a.png", tarfile.LNKTYPE, "0001.png"), "is a link"),
        (special("notes", tarfile.SYMTYPE, "x"), "is a link"),
        (special("a.png", tarfile.CHRTYPE), "is no file but a device"),
        (special("a.png", tarfile.FIFOTYPE), "is no file but a device"),
        (special("../folder", tarfile.DIRTYPE), "is outside"),
        (("0001.jpg", b"x"), "'0001.jpg' is the second picture"),
        (("0001.txt", b"x"), "'0001.txt' is the second caption"),
    ],
)
def test_what_is_refused(tmp_path, member, message):
    files = [tar(tmp_path, [*pairs([1]), member])]
    with pytest.raises(ValueError, match=f"(?s)x.tar cannot be used.*{message.replace(chr(92), chr(92) * 2)}"):
        TarDataset(files, **OPTIONS)
    with pytest.raises(ValueError, match="cannot be used"):
        list(tar_examples(files))
    assert not (tmp_path / "cache").exists(), "nothing of it is kept"


def test_the_first_few_are_listed(tmp_path):
    files = [tar(tmp_path, [(f"/{number}.png", b"x") for number in range(9)])]
    with pytest.raises(ValueError, match="(?s)'/0.png'.*'/4.png'.*and 4 more"):
        TarDataset(files, **OPTIONS)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: b"no tar file" * 100,
        lambda data: data[:700],
        lambda data: data[:512],
        lambda data: data[: 512 * 9],
        lambda data: data[: 512 * 8],
        lambda data: data[: data.rindex(b"picture 5") + 512],
        lambda data: data.replace(b"0003.txt", b"0003.txu"),
        lambda data: data + data,
    ],
    ids=["empty", "other", "in content", "header", "boundary 9", "boundary 8", "no end", "bad header", "appended"],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_damage_is_named(tmp_path, change, streamed):
    path = tmp_path / "damaged.tar"
    path.write_bytes(change(tar_bytes(pairs(range(6)))))
    with pytest.raises(ValueError, match="damaged.tar is (no tar file|cut short|damaged)"):
        list(tar_examples([str(path)])) if streamed else TarDataset([path], **OPTIONS)


def test_no_file_and_no_pictures(tmp_path):
    with pytest.raises(FileNotFoundError):
        TarDataset([tmp_path / "none.tar"], **OPTIONS)
    with pytest.raises(ValueError, match="no captioned picture in 1 tar files"):
        TarDataset([tar(tmp_path, [("notes.md", b"x")])], **OPTIONS)
    with pytest.raises(ValueError, match="no captioned picture"):
        TarDataset([], **OPTIONS)


def test_an_index_is_kept_until_the_file_changes(tmp_path, monkeypatch, cache):
    files = write_tars(tmp_path, 2, 3)
    expected = contents(TarDataset(files, **OPTIONS))
    read = []
    original = tar_files.captioned_members

    def noted(file, name, **options):
        read.append(name)
        return original(file, name, **options)

    monkeypatch.setattr(tar_files, "captioned_members", noted)
    assert contents(TarDataset(files, **OPTIONS)) == expected and not read
    (tmp_path / "001.tar").write_bytes(tar_bytes(pairs([50, 51])))
    assert contents(TarDataset(files, **OPTIONS))[3:] == [(50, "picture 50"), (51, "picture 51")]
    assert read == files[1:]
    os.utime(files[0], ns=(0, 0))
    TarDataset(files, **OPTIONS)
    assert read == [files[1], files[0]]
    for index in (cache / "tar_index").iterdir():
        index.write_bytes(index.read_bytes()[:100])
    assert len(TarDataset(files, **OPTIONS)) == 5 and len(read) == 4, "a damaged index is made anew"


def test_an_index_that_cannot_be_kept_ends_nothing(tmp_path, cache):
    cache.write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert len(TarDataset(write_tars(tmp_path, 1, 3), **OPTIONS)) == 3


def test_copies_for_other_processes(tmp_path):
    dataset = TarDataset(write_tars(tmp_path, 2, 2), **OPTIONS)
    there = pickle.loads(pickle.dumps(dataset))
    assert contents(there) == contents(dataset)
    batch = MinimagenCollator("cpu")([there[index] for index in range(4)])
    assert batch["image"].shape == (4, 3, 4, 4)


def test_a_file_that_goes_away_is_counted(tmp_path):
    files = write_tars(tmp_path, 1, 2)
    dataset = TarDataset(files, **OPTIONS)
    os.unlink(files[0])
    assert dataset[0] is None and dataset.failures == {"unreadable": 1}


def test_streamed_examples_are_the_same(tmp_path):
    files = write_tars(tmp_path, 2, 3)
    examples = list(tar_examples(files))
    assert examples == [{"image": shade(number), "caption": f"picture {number}"} for number in range(6)]
    without = list(tar_examples(files, pictures=False))
    assert without == [{**example, "image": b""} for example in examples]
    bad = [tar(tmp_path, [("a.png", b"x"), ("a.json", b"{")])]
    assert list(tar_examples(bad)) == [{"image": b"x", "caption": None}]
