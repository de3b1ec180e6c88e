"""The format of pre-encoded captions, reading it, and data sets that do."""

import json
import pickle
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from picture_server import encoded, picture
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from minimagen_fast import caption_store
from minimagen_fast.caption_encoding import encode_captions
from minimagen_fast.caption_format import DTYPES, EncoderIdentity, encoder_name
from minimagen_fast.caption_store import CaptionStore
from minimagen_fast.data import FolderDataset, MinimagenCollator, MinimagenDataset
from minimagen_fast.shapes import ShapesDataset, all_captions
from minimagen_fast.t5 import register_text_encoder, t5_encode_text

CAPTIONS = [
    "",
    "a",
    "a red circle on black",
    "  a red circle on black ",
    "größer als ein Haus — 夕焼け 🌅",
    "e\u0301",
    "\u00e9",
    "line one\nline two\u2028three\0four",
    "broken \ud83d",
    "a word too many " * 50,
]
MAX_LENGTH = 24
# Half a unit in the last place of the stored type, relative and for numbers near 0.
ROUNDING = {"float16": (2**-11, 2**-25), "bfloat16": (2**-8, 1e-30)}


def encode(directory, captions=CAPTIONS, **options):
    return encode_captions(
        captions,
        directory,
        **{
            "encoder": "t5_tiny",
            "max_length": MAX_LENGTH,
            "shard_size": 4,
            "batch_size": 3,
            "device": "cpu",
            **options,
        },
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    encode(directory)
    return directory


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copied")


def on_the_fly(caption):
    return t5_encode_text([caption], "t5_tiny", MAX_LENGTH, device="cpu")


def assert_close(stored, exact, dtype="float16"):
    relative, absolute = ROUNDING[dtype]
    # The first term is the rounding; the second, that a batch is summed up in another order than a caption alone.
    torch.testing.assert_close(stored, exact, rtol=relative * 1.01, atol=absolute + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_is_what_the_encoder_gives(tmp_path, dtype):
    report = encode(tmp_path, [*CAPTIONS, *CAPTIONS[::-1]], dtype=dtype)
    store = CaptionStore(tmp_path)
    assert report.encoded == report.captions == len(store) == len(CAPTIONS), "duplicates are stored once"
    for caption in CAPTIONS:
        assert caption in store
        encoding, mask = store.get(caption)
        exact, exact_mask = on_the_fly(caption)
        assert encoding.dtype == torch.float32 and torch.equal(mask, exact_mask) and mask.all()
        assert_close(encoding, exact, dtype)
    assert store.get("")[0].shape == (1, 1, 64) and store.get(CAPTIONS[-1])[0].shape == (1, MAX_LENGTH, 64)
    assert "not among them" not in store and store.get("not among them") is None and 5 not in store
    store.verify()


def test_nothing_is_padded(made):
    tokens = sum(on_the_fly(caption)[1].sum().item() for caption in CAPTIONS)
    shards = sorted(made.glob("*.safetensors"))
    content = [load_file(shard) for shard in shards]
    assert [len(each["offset"]) for each in content] == [4, 4, 2]
    assert sum(len(each["rows"]) for each in content) == tokens
    for shard, tensors in zip(shards, content, strict=True):
        header = int.from_bytes(shard.read_bytes()[:8], "little")
        # Per token its encoding; per caption a key of 16 bytes, an offset of 8, a length of 4, a checksum of 8.
        assert shard.stat().st_size == 8 + header + len(tensors["rows"]) * 64 * 2 + len(tensors["offset"]) * 36
        assert torch.equal(tensors["offset"][1:], (tensors["offset"] + tensors["length"])[:-1]) and header < 600


def test_the_manifest_says_what_is_there(made):
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["format"] == "minimagen_fast captions" and manifest["version"] == 1
    assert manifest["encoder"].items() >= {"name": "t5_tiny", "max_length": 24, "width": 64, "dtype": "float16"}.items()
    assert manifest["captions"] == len(CAPTIONS) and [shard["captions"] for shard in manifest["shards"]] == [4, 4, 2]
    assert manifest["bytes"] == sum(path.stat().st_size for path in made.glob("*.safetensors"))
    assert not list(made.glob(".*")), "no unfinished file is left"


def test_keys_tell_encoders_apart():
    one = EncoderIdentity("t5_tiny", 24, 64, "float16", "x")
    others = [("t5_base", 24, 64, "float16", "x"), ("t5_tiny", 25, 64, "float16", "x")]
    others += [("t5_tiny", 24, 64, "bfloat16", "x"), ("t5_tiny", 24, 64, "float16", "y")]
    keys = {EncoderIdentity(*other).key("a") for other in others} | {one.key("a"), one.key("b")}
    assert len(keys) == 6 and one.key("a") == EncoderIdentity("t5_tiny", 24, 64, "float16", "x").key("a")


def test_names_of_encoders(tmp_path, monkeypatch):
    assert encoder_name("t5-base") == encoder_name("t5_base") == "t5_base"
    assert encoder_name("google/t5-v1_1-xl") == "xl1.1"
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert encoder_name(".") == encoder_name(str(tmp_path / "mine")) == encoder_name("elsewhere/mine/") == "mine"


def test_another_encoder_is_refused(made):
    store = CaptionStore(made)
    for name, length in (("t5_base", MAX_LENGTH), ("t5_tiny", 64)):
        with pytest.raises(
            ValueError, match=f"t5_tiny, at most 24 tokens, but {name}, at most {length} tokens"
        ) as error:
            FolderDataset(made, side_length=4, encoder_name=name, max_length=length, captions=store)
        assert str(made) in str(error.value)
    with pytest.raises(ValueError, match="at most 24 tokens, but t5_tiny, at most 64"):
        ShapesDataset(4, side_length=8, captions=store)


# Damage


def damaged(directory, change, name="captions-00001.safetensors"):
    path = directory / name
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content) or content)
    return path


def flip(position):
    def change(content):
        content[position] ^= 1

    return change


def read_all(directory):
    store = CaptionStore(directory)
    return [store.get(caption) for caption in CAPTIONS]


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda content: content[:-1], "bytes instead of"),
        (lambda content: content[:4], "bytes instead of"),
        (lambda content: content + b"x", "bytes instead of"),
        (flip(-1), "is not what was written"),
        (flip(0), "damaged"),
        (flip(12), "damaged"),
    ],
)
def test_a_damaged_shard_is_named(copied, change, fault):
    path = damaged(copied, change)
    with pytest.raises(ValueError, match=fault) as error:
        read_all(copied)
    assert str(path) in str(error.value) and "encode-captions" in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value), "it can leave a worker process"


def test_a_damaged_index_is_named(copied):
    path = copied / "captions-00001.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    offset = json.loads(path.read_bytes()[8:header])["offset"]["data_offsets"][0]
    damaged(copied, flip(header + offset + 7))
    with pytest.raises(ValueError, match="captions-00001.safetensors .* leads out of it"):
        read_all(copied)


def test_checksums_find_what_nobody_reads(copied):
    path = damaged(copied, flip(-1), "captions-00002.safetensors")
    store = CaptionStore(copied)
    with pytest.raises(ValueError, match="its checksum is another one") as error:
        store.verify()
    assert str(path) in str(error.value)


def test_missing_and_unusable_files(copied, tmp_path):
    (copied / "captions-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="captions-00002.safetensors .* it is missing"):
        CaptionStore(copied)
    manifest = copied / "manifest.json"
    for content, message in (
        ('{"format": ', "is damaged"),
        ("[]", "is damaged"),
        ('{"format": "minimagen_fast captions", "version": 2}', "version 2 of the format.* reads version 1"),
        ('{"format": "minimagen_fast captions", "version": 1}', "is damaged"),
    ):
        manifest.write_text(content)
        with pytest.raises(ValueError, match=message):
            CaptionStore(copied)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match="not all encoded: run the same"):
        CaptionStore(copied)
    with pytest.raises(FileNotFoundError, match="Make them with"):
        CaptionStore(tmp_path / "nowhere")


# Processes and threads


def _sum(store, caption):
    return store.get(caption)[0].sum().item()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_it(made, method):
    store = CaptionStore(made)
    expected = [_sum(store, caption) for caption in CAPTIONS[:3]]
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        assert list(pool.map(_sum, [store] * 3, CAPTIONS[:3])) == expected


def test_threads_read_it(made):
    store, barrier = CaptionStore(made), threading.Barrier(4)

    def read(_):
        barrier.wait()
        return [_sum(store, caption) for caption in CAPTIONS]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, range(4)))
    assert all(result == results[0] for result in results)


def test_what_is_read_may_be_changed(copied):
    store = CaptionStore(copied)
    store.get("a")[0].zero_()
    assert store.get("a")[0].abs().sum() > 0
    CaptionStore(copied).verify()


# Data sets


@pytest.fixture
def folder(tmp_path):
    rows = []
    for index, caption in enumerate(CAPTIONS[:8]):
        (tmp_path / f"{index}.png").write_bytes(encoded(picture(), "PNG"))
        rows.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path


OPTIONS = dict(encoder_name="t5_tiny", max_length=MAX_LENGTH)


def no_t5(*args, **options):
    raise AssertionError("the text encoder is not needed")


def web(names, **options):
    rows = {"image_url": list(names), "caption": list(names)}
    dataset = MinimagenDataset({"train": rows, "validation": rows}, side_length=8, **OPTIONS, **options)
    dataset._picture = lambda index: picture()
    return dataset


@pytest.mark.parametrize("kind", ["folder", "web"])
def test_batches_are_those_of_encoding_on_the_fly(made, folder, monkeypatch, kind):
    def batches(**options):
        if kind == "folder":
            dataset = FolderDataset(folder, side_length=8, **OPTIONS, **options)
        else:
            dataset = web(CAPTIONS[:8], **options)
        dataset.encode_on("cpu")  # as the store was, to whose rounding they are compared
        return list(DataLoader(dataset, batch_size=3, collate_fn=MinimagenCollator("cpu")))

    expected = batches()
    monkeypatch.setattr(caption_store, "t5_encode_text", no_t5)
    for batch, exact in zip(batches(captions=CaptionStore(made)), expected, strict=True):
        assert batch.keys() == exact.keys()
        assert torch.equal(batch["image"], exact["image"]) and torch.equal(batch["mask"], exact["mask"])
        assert_close(batch["encoding"], exact["encoding"])


def test_shapes_take_their_captions_from_it(tmp_path, monkeypatch):
    encode(tmp_path, all_captions())
    exact = ShapesDataset(6, side_length=8, **OPTIONS)
    stored = ShapesDataset(6, side_length=8, **OPTIONS, captions=CaptionStore(tmp_path))
    expected = [exact[index] for index in range(6)]
    monkeypatch.setattr(caption_store, "t5_encode_text", no_t5)
    for index, item in enumerate(expected):
        assert torch.equal(stored[index]["image"], item["image"]) and torch.equal(stored[index]["mask"], item["mask"])
        assert_close(stored[index]["encoding"], item["encoding"])


@pytest.mark.parametrize("workers", [0, 2])
def test_other_captions_are_encoded_with_one_warning(tmp_path, folder, workers, monkeypatch):
    encode(tmp_path / "store", CAPTIONS[:4])
    shown = tmp_path / "warnings"

    def warn(message, **options):
        with open(shown, "a") as file:  # forked workers warn too
            file.write(f"{message}\n")

    monkeypatch.setattr(caption_store.warnings, "warn", warn)
    dataset = FolderDataset(folder, side_length=8, **OPTIONS, captions=CaptionStore(tmp_path / "store"))
    dataset.encode_on("cpu")
    loader = DataLoader(
        dataset,
        batch_size=2,
        num_workers=workers,
        collate_fn=MinimagenCollator("cpu"),
        multiprocessing_context="fork" if workers else None,
    )
    items = [(batch["encoding"][row], batch["mask"][row]) for batch in loader for row in range(2)]
    assert shown.read_text().count("it is encoded with t5_tiny now") == 1
    assert dataset.captions_not_stored == 4 and dataset.failures == {}
    for (encoding, mask), caption in zip(items, CAPTIONS[:8], strict=True):
        assert_close(encoding[mask], on_the_fly(caption)[0][0])


def test_another_encoder_of_the_same_name_is_not_mixed_in(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["encoder"]["content"] = "0123456789ab"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    dataset = web(["a new caption"], captions=CaptionStore(copied))
    with pytest.raises(ValueError, match="encoded with another t5_tiny .files 0123456789ab. than the one here"):
        dataset[0]


def test_an_encoder_that_finds_nothing(tmp_path):
    def words(captions, max_length, device):
        lengths = torch.tensor([len(caption.split()) for caption in captions])
        mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
        return mask[:, :, None].float().expand(-1, -1, 3).contiguous(), mask

    register_text_encoder("words_of_three", words, 3)
    encode(tmp_path, ["", "one", "one two"], encoder="words_of_three")
    store = CaptionStore(tmp_path)
    for caption in ("", "one", "one two"):
        expected = t5_encode_text(caption, "words_of_three", 8, device="cpu")
        for stored, exact in zip(store.get(caption), expected, strict=True):
            assert torch.equal(stored, exact)


@pytest.mark.parametrize(
    "value, holes, message",
    [(1e6, False, "not finite as float16: use bfloat16"), (float("nan"), False, "cannot be used"), (1, True, "packed")],
)
def test_encodings_that_cannot_be_stored(tmp_path, value, holes, message):
    def encode_badly(captions, max_length, device):
        mask = torch.ones(len(captions), 3, dtype=torch.bool)
        mask[:, 1] = not holes
        return torch.full((len(captions), 3, 2), float(value)), mask

    register_text_encoder("bad", encode_badly, 2)
    with pytest.raises(ValueError, match=message):
        encode(tmp_path, ["a"], encoder="bad")
    assert not list(tmp_path.iterdir())
