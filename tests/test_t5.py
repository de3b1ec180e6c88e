"""Text encoding: names, files, caching, threads, errors. No network; small checkpoints stand in for the big ones."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from minimagen_fast import t5
from minimagen_fast.shapes import ShapesDataset, all_captions
from minimagen_fast.t5 import (
    T5_VERSIONS,
    encoder_files,
    get_encoded_dim,
    register_text_encoder,
    t5_encode_text,
    token_counts,
)
from minimagen_fast.tiny_t5 import embedded_t5_directory

ROOT = Path(__file__).resolve().parent.parent

DOCUMENTED = {
    "t5_small": ("t5-small", 512, 0.24),
    "t5_base": ("t5-base", 768, 0.89),
    "t5_large": ("t5-large", 1024, 2.75),
    "t5_3b": ("t5-3b", 1024, 10.6),
    "t5_11b": ("t5-11b", 1024, 42.1),
    "small1.1": ("google/t5-v1_1-small", 512, 0.3),
    "base1.1": ("google/t5-v1_1-base", 768, 0.99),
    "large1.1": ("google/t5-v1_1-large", 1024, 3.13),
    "xl1.1": ("google/t5-v1_1-xl", 2048, 11.4),
    "xxl1.1": ("google/t5-v1_1-xxl", 4096, 44.5),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def fresh(cache, monkeypatch):
    """Every test starts with nothing loaded and nothing registered."""
    monkeypatch.setenv("MINIMAGEN_FAST_CACHE", str(cache))
    monkeypatch.setattr(t5, "_OTHER_T5", {})
    monkeypatch.setattr(t5, "_REGISTERED", {})
    for version in T5_VERSIONS.values():
        monkeypatch.setitem(version, "tokenizer", None)
        monkeypatch.setitem(version, "model", None)


def save_full_t5(directory, dim=512, **config):
    """Saves a T5 with its decoder, as the public checkpoints are, but with one thin layer. Returns the model."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": dim, "num_layers": 1, "num_heads": 1, "d_kv": 8, "d_ff": 8, "vocab_size": 400, **config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_t5_directory() / name, directory)
    return model


@pytest.fixture
def counted_loads(monkeypatch):
    from transformers import T5EncoderModel

    load, calls = T5EncoderModel.from_pretrained, []

    def counted(*args, **kwargs):
        calls.append(args[0])
        time.sleep(0.05)  # long enough for every thread to come and find nothing loaded
        return load(*args, **kwargs)

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", counted)
    return calls


# Names and dimensions


def test_documented_table():
    assert (t5.MAX_LENGTH, t5.DEFAULT_T5_NAME) == (256, "t5_small")
    assert {name: (v["handle"], v["dim"], v["size"]) for name, v in T5_VERSIONS.items()} == DOCUMENTED
    assert all(set(v) == {"tokenizer", "model", "handle", "dim", "size"} for v in T5_VERSIONS.values())


def test_dimensions_of_the_built_in_names_need_no_files(monkeypatch):
    monkeypatch.setattr(t5, "_from_files", lambda *_: pytest.fail("looked for files"))
    monkeypatch.setattr(t5, "embedded_t5_directory", lambda: pytest.fail("built the embedded encoder"))
    assert {name: get_encoded_dim(name) for name in DOCUMENTED} == {name: v[1] for name, v in DOCUMENTED.items()}
    assert get_encoded_dim("t5_tiny") == 64
    assert get_encoded_dim("google/t5-v1_1-xl") == 2048


@pytest.mark.parametrize("use", [get_encoded_dim, lambda name: t5_encode_text(["a"], name)])
@pytest.mark.parametrize("name", ["t5_smal", "./no/such/folder", "", "no spaces/please"])
def test_an_unknown_name_is_an_error_that_lists_the_valid_ones(use, name):
    with pytest.raises(ValueError, match="'t5_small', .*'xxl1.1', 't5_tiny'.*folder"):
        use(name)


@pytest.mark.parametrize("use", [get_encoded_dim, lambda name: t5_encode_text(["a"], name)])
def test_a_name_that_is_no_string_is_an_error(use):
    with pytest.raises(TypeError, match="name"):
        use(None)


def test_importing_is_light():
    program = "import sys, minimagen_fast.t5; print([m for m in ('transformers', 'tokenizers') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# Encoding


def test_shapes_types_and_mask():
    encodings, mask = t5_encode_text(["a red circle on black", "red"], "t5_tiny")
    assert (encodings.shape, encodings.dtype, mask.shape, mask.dtype) == ((2, 6, 64), torch.float32, (2, 6), torch.bool)
    assert mask.tolist() == [[True] * 6, [True, True, False, False, False, False]]
    assert (encodings[~mask] == 0).all()
    assert (encodings[mask].abs().sum(-1) > 0).all()
    assert not encodings.requires_grad and not encodings.is_inference()


def test_a_string_is_one_caption_and_a_tuple_is_a_list():
    single, _ = t5_encode_text("a blue cross on gray", "t5_tiny", device="cpu")
    assert torch.equal(single, t5_encode_text(["a blue cross on gray"], "t5_tiny", device="cpu")[0])
    assert torch.equal(single, t5_encode_text(("a blue cross on gray",), "t5_tiny", device="cpu")[0])


def test_an_encoding_does_not_depend_on_its_batch_mates():
    alone, _ = t5_encode_text("a red circle on black", "t5_tiny")
    among, _ = t5_encode_text(["", "a red circle on black", "something much longer, by far: " * 4], "t5_tiny")
    torch.testing.assert_close(among[1:2, : alone.shape[1]], alone, rtol=0, atol=1e-5)


def test_long_lists_are_run_in_batches_with_the_same_result(monkeypatch):
    captions = (all_captions() * 2)[:70] + ["the longest caption of them all stands in the last batch"]
    widths = []
    t5_encode_text("a", "t5_tiny")
    (entry,) = t5._OTHER_T5.values()
    hook = entry["model"].register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    batched, batched_mask = t5_encode_text(captions, "t5_tiny")
    longest = batched.shape[1]
    assert widths == [(32, 6), (32, 6), (7, longest)]
    monkeypatch.setattr(t5, "BATCH_SIZE", len(captions))
    at_once, at_once_mask = t5_encode_text(captions, "t5_tiny")
    assert widths[3:] == [(71, longest)]
    hook.remove()
    assert torch.equal(batched_mask, at_once_mask)
    torch.testing.assert_close(batched, at_once, rtol=0, atol=1e-5)


def test_empty_unicode_and_overlong_captions():
    captions = ["", "   ", "漢字 🙂 żółw", "broken \ud83d escape", "a red circle on black " * 100]
    encodings, mask = t5_encode_text(captions, "t5_tiny", max_length=20)
    assert encodings.shape == (5, 20, 64)
    assert mask.sum(1).tolist()[:2] == [1, 1]  # the end mark
    assert mask[4].all()
    assert encodings.isfinite().all()
    assert t5_encode_text(captions, "t5_tiny")[0].shape == (5, 256, 64)
    assert t5_encode_text(captions, "t5_tiny", max_length=1)[0].shape == (5, 1, 64)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (3, TypeError),
        (None, TypeError),
        ([None], TypeError),
        (["a", 3], TypeError),
        ({"a"}, TypeError),
        ([], ValueError),
    ],
)
def test_anything_but_captions_is_an_error(text, error):
    with pytest.raises(error, match="text"):
        t5_encode_text(text, "t5_tiny")


def test_whole_numbers_of_numpy_are_taken():
    encodings, mask = t5_encode_text(["a", "two"], "t5_tiny", np.int64(2), batch_size=np.int64(1))
    assert torch.equal(encodings, t5_encode_text(["a", "two"], "t5_tiny", 2, batch_size=1)[0])
    register_text_encoder("mine", lengths_encoder, np.int32(3))
    assert get_encoded_dim("mine") == 3


@pytest.mark.parametrize("name", ["t5_tiny", "registered"])
@pytest.mark.parametrize("device", ["cuda:77", "nonsense"])
def test_a_device_that_there_is_not_is_refused_by_name(monkeypatch, name, device):
    monkeypatch.setattr(t5, "_REGISTERED", {"registered": (lambda *_: None, 8)})
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
        t5_encode_text(["a"], name, device=device)


def test_the_meta_device_is_refused_and_the_encoder_stays():
    before = t5_encode_text(["a"], "t5_tiny")[0]
    with pytest.raises(ValueError, match="device 'meta' cannot be used here"):
        t5_encode_text(["a"], "t5_tiny", device="meta")
    assert torch.equal(t5_encode_text(["a"], "t5_tiny")[0], before)


@pytest.mark.parametrize(
    ("max_length", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_a_wrong_max_length_is_an_error(max_length, error):
    with pytest.raises(error, match="max_length"):
        t5_encode_text("a", "t5_tiny", max_length)


def test_autocast_and_gradients_around_the_call_change_nothing():
    plain, _ = t5_encode_text(all_captions(), "t5_tiny")
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        surrounded, _ = t5_encode_text(all_captions(), "t5_tiny")
    assert torch.equal(plain, surrounded) and not surrounded.requires_grad


def test_loading_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    t5_encode_text("a", "t5_tiny")
    assert torch.equal(torch.get_rng_state(), state)


def test_default_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert t5._default_device().type == "cuda"
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: object())
    assert t5._default_device().type == "cpu"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert t5._default_device().type == "cpu"


def test_nothing_follows_from_the_callers_default_device():
    caption = "a red circle on black"
    plain, _ = t5_encode_text(caption, "t5_tiny", device="cpu")
    t5._OTHER_T5.clear()
    with torch.device("meta"):
        assert t5.token_counts([caption], "t5_tiny", 20) == [plain.shape[1]]
        encodings, mask = t5_encode_text(caption, "t5_tiny", device="cpu")
    assert torch.equal(encodings, plain) and mask.all()


# Files


@pytest.mark.parametrize(
    ("name", "handle", "config"),
    [
        ("t5_small", "t5-small", {}),
        ("small1.1", "google/t5-v1_1-small", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ],
)
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_a_documented_name_end_to_end(tmp_path, monkeypatch, capfd, name, handle, config, weights):
    model = save_full_t5(tmp_path / handle, **config)
    if weights == "bin":
        (tmp_path / handle / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / handle / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    captions = ["a red circle on black", "a cross"]
    encodings, mask = t5_encode_text(captions, name, device="cpu")
    assert "".join(capfd.readouterr()) == ""  # no bars, no notes on the decoder's unused weights

    assert encodings.shape == (2, 6, get_encoded_dim(name))
    tokenizer = T5_VERSIONS[name]["tokenizer"]
    tokens = tokenizer(captions, padding="longest", return_tensors="pt")
    with torch.no_grad():
        encoder = model.get_encoder()
        expected = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    torch.testing.assert_close(encodings[mask], expected[tokens.attention_mask.bool()], rtol=1e-5, atol=1e-5)
    assert not T5_VERSIONS[name]["model"].training
    assert not any(parameter.requires_grad for parameter in T5_VERSIONS[name]["model"].parameters())


def test_a_tokenizer_that_is_only_a_sentencepiece_model(tmp_path):
    import sentencepiece

    save_full_t5(tmp_path, dim=16)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    with (tmp_path / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(all_captions()), model_writer=file, vocab_size=40, hard_vocab_limit=False,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    trained = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    t5_encode_text("a red circle on black", str(tmp_path))
    (entry,) = t5._OTHER_T5.values()
    for caption in all_captions():
        assert entry["tokenizer"](caption).input_ids == [*trained.encode(caption), trained.eos_id()]


def test_half_precision_weights_give_float32(tmp_path):
    model = save_full_t5(tmp_path, dim=16)
    model.bfloat16().save_pretrained(tmp_path)
    assert t5_encode_text("a", str(tmp_path))[0].dtype == torch.float32


def test_a_folder_as_name(tmp_path, monkeypatch, counted_loads):
    save_full_t5(tmp_path / "mine", dim=24)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["mine", "./mine", str(tmp_path / "mine"), "~/mine"]
    first, *others = [t5_encode_text("a red cross", name)[0] for name in names]
    assert [get_encoded_dim(name) for name in names] == [24] * 4
    assert first.shape[2] == 24 and all(torch.equal(first, other) for other in others)
    assert len(counted_loads) == 1


def test_an_entry_added_to_the_table_works(tmp_path, monkeypatch):
    save_full_t5(tmp_path, dim=24)
    entry = {"tokenizer": None, "model": None, "handle": str(tmp_path), "dim": 24, "size": 0.0}
    monkeypatch.setitem(T5_VERSIONS, "added", entry)
    assert get_encoded_dim("added") == 24
    assert t5_encode_text("a", "added")[0].shape[2] == 24
    assert T5_VERSIONS["added"]["model"] is not None


class OwnModel(torch.nn.Module):
    """All that the original package asks of a model."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop = torch.nn.Embedding(32128, 8), torch.nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=self.drop(self.embed(input_ids)))


def test_a_model_of_ones_own_in_the_table_is_evaluated(monkeypatch):
    t5_encode_text("load it", "t5_tiny")
    [tiny] = [entry for entry in t5._OTHER_T5.values() if entry["handle"] == str(embedded_t5_directory())]
    model = OwnModel().train()
    monkeypatch.setitem(T5_VERSIONS, "own", {**tiny, "model": model, "dim": 8})
    encodings, mask = t5_encode_text(["a red circle", "a"], "own", batch_size=1)
    assert encodings.shape == (*mask.shape, 8) and not encodings[~mask].any() and not model.training
    assert torch.equal(t5_encode_text(["a red circle", "a"], "own")[0], encodings)
    # Those that the entry names are of another model.
    assert encoder_files("own") == []


class OwnTokenizer:
    """All that the original package asks of a tokenizer."""

    def batch_encode_plus(self, text, padding, max_length, truncation, return_tensors):
        ids = torch.tensor([[len(caption), 1] for caption in text])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


class OwnCallable:
    """The same of a model that is no module of torch, on a CPU."""

    def __init__(self):
        self.model = OwnModel()

    def eval(self):
        self.model.eval()

    def __call__(self, **inputs):
        return self.model(**inputs)


class OwnPaddingOnTheLeft:
    def batch_encode_plus(self, text, padding, max_length, truncation, return_tensors):
        longest = max(map(len, text))
        mask = torch.tensor([[place >= longest - len(caption) for place in range(longest)] for caption in text])
        return SimpleNamespace(input_ids=mask * torch.arange(1, longest + 1), attention_mask=mask.long())


def test_what_a_tokenizer_of_ones_own_pads_on_the_left_is_encoded_in_every_batch(monkeypatch):
    monkeypatch.setitem(T5_VERSIONS, "own", {"tokenizer": OwnPaddingOnTheLeft(), "model": OwnModel(), "dim": 8})
    captions = ["a", "a circle", "", "red"]
    encodings, mask = t5_encode_text(captions, "own", batch_size=1)
    whole = t5_encode_text(captions, "own")
    assert torch.equal(encodings, whole[0]) and torch.equal(mask, whole[1])
    assert torch.equal(mask.sum(1), torch.tensor([1, 8, 0, 3])) and encodings[0, -1].any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.parametrize("model", [OwnModel, OwnCallable])
def test_no_more_is_asked_of_what_is_put_into_the_table_than_the_original_asks(monkeypatch, capfd, model):
    monkeypatch.setitem(T5_VERSIONS, "own", {"tokenizer": OwnTokenizer(), "model": model(), "dim": 8})
    encodings, mask = t5_encode_text(["a circle", "a"], "own", device="cpu")
    assert encodings.shape == (2, 2, 8) and mask.all()
    assert token_counts(["a circle", "a"], "own", 8) == [2, 2] and encoder_files("own") == []
    with pytest.raises(ValueError, match="'unknown' is no text encoder"):
        t5_encode_text("a", "unknown")
    child = os.fork()
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and not capfd.readouterr().err


def test_a_stray_folder_of_other_dimensions_is_an_error(tmp_path, monkeypatch):
    save_full_t5(tmp_path / "t5-small", dim=16)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="'t5-small' has 16 dimensions, not 512.*working directory"):
        t5_encode_text("a", "t5_small")
    assert T5_VERSIONS["t5_small"]["model"] is None


def spoil_config(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def spoil_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def spoil_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_config, "'bert'"),
        (spoil_tokenizer, "spiece.model"),
        (spoil_weights, r"SelfAttention\.q"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"), "model.safetensors"),
    ],
    ids=["another model", "no tokenizer", "weights missing", "no config", "no weights", "broken weights"],
)
def test_a_folder_without_a_whole_t5_is_an_error_not_a_random_model(tmp_path, spoil, reason):
    save_full_t5(tmp_path / "mine", dim=16)
    spoil(tmp_path / "mine")
    with pytest.raises(OSError, match=reason) as caught:
        t5_encode_text("a", str(tmp_path / "mine"))
    assert str(tmp_path / "mine") in str(caught.value)


def test_a_tokenizer_that_gives_what_the_model_does_not_know_is_an_error(tmp_path):
    save_full_t5(tmp_path / "mine", dim=16, vocab_size=300)
    with pytest.raises(OSError, match=r"its tokenizer gives ids up to 3\d\d, its model knows those below 300"):
        t5_encode_text("a", str(tmp_path / "mine"))


def test_one_load_per_process(counted_loads):
    for caption in ("a", "b"):
        t5_encode_text(caption, "t5_tiny")
    assert len(counted_loads) == 1


def test_threads_share_one_model_and_get_their_own_answers(counted_loads):
    captions = all_captions()
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda c: t5_encode_text([c, "a longer caption here"], "t5_tiny", 6 + len(c) % 4), captions)
        )
    assert len(counted_loads) == 1
    for caption, (encodings, mask) in zip(captions, answers, strict=True):
        expected, expected_mask = t5_encode_text([caption, "a longer caption here"], "t5_tiny", 6 + len(caption) % 4)
        assert torch.equal(mask, expected_mask)
        torch.testing.assert_close(encodings, expected, rtol=0, atol=1e-6)


class Captions(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return t5_encode_text(all_captions()[index], "t5_tiny")[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_worker_does_not_inherit_a_held_lock():
    # It encodes there whatever the machine has: CUDA does not survive a fork.
    expected = t5_encode_text(all_captions()[:2], "t5_tiny", device="cpu")[0]
    held, release = threading.Event(), threading.Event()

    def hold():
        with t5._lock:
            held.set()
            release.wait(120)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(120)
    try:
        loader = DataLoader(Captions(), num_workers=1, multiprocessing_context="fork", timeout=60)
        encodings = torch.cat([batch[0] for batch in loader])
    finally:
        release.set()
        holder.join()
    torch.testing.assert_close(encodings, expected, rtol=0, atol=1e-5)


# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as it takes to serve `server.repos`, which lie below `server.folder` as id/file."""

    def respond(self, body):
        self.server.requests.append(self.path)
        repo, _, file = self.path.lstrip("/").partition("/resolve/main/")
        path = self.server.folder / repo / file
        if not file or not path.is_file():
            known = any(f"/{known}/" in f"{self.path}/" for known in self.server.repos)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{path.name}-{len(content)}"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self):
        self.respond(body=False)

    def do_GET(self):
        self.respond(body=True)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.repos, server.requests = tmp_path / "hub", {"t5-small": 512, "someone/a-t5": 16}, []
        for repo, dim in server.repos.items():
            save_full_t5(server.folder / repo, dim)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


HUB_PROGRAM = """
import json, sys, time
from minimagen_fast.t5 import get_encoded_dim, t5_encode_text
answers = []
import transformers  # not part of the time
for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        answer = [get_encoded_dim(name), list(t5_encode_text("a red cross", name)[0].shape)]
    except (OSError, ValueError) as error:
        answer = [type(error).__name__, str(error)]
    answers.append([*answer, time.monotonic() - start])
print(json.dumps(answers))
"""


def ask_in_new_process(names, folder, **environment):
    base = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    base.update(HF_HOME=str(folder / "hf"), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", NO_PROXY="127.0.0.1")
    done = subprocess.run(
        [sys.executable, "-c", HUB_PROGRAM, *names],
        env={**base, **environment}, cwd=folder, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Seconds in which nothing is tried again: that would take minutes. Importing transformers takes some on a busy machine.
QUICK = 20


def test_from_the_hub_then_from_its_cache_then_not_at_all(tmp_path, hub):
    work = tmp_path / "work"
    work.mkdir()
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"

    small, other, absent = ask_in_new_process(["t5_small", "someone/a-t5", "t5_base"], work, HF_ENDPOINT=endpoint)
    assert small[:2] == [512, [1, 4, 512]]
    assert other[:2] == [16, [1, 4, 16]]
    assert absent[0] == "OSError" and endpoint in absent[1]
    assert any("/t5-small/resolve/main/model.safetensors" in request for request in hub.requests)

    # A port that refuses connections: what is cached is used without asking, what is not fails at once.
    small, other, plain, absent = ask_in_new_process(
        ["t5_small", "someone/a-t5", "t5-small", "t5_base"], work, HF_ENDPOINT="http://127.0.0.1:1"
    )
    assert small[:2] == plain[:2] == [512, [1, 4, 512]]
    assert other[:2] == [16, [1, 4, 16]]
    kind, message, seconds = absent
    assert kind == "OSError"
    assert seconds < QUICK
    for part in (
        "'t5_base'",
        "'t5-base'",
        str(work / "hf" / "hub"),
        "http://127.0.0.1:1",
        "0.89 GB",
        "folder",
        "'t5_tiny'",
    ):
        assert part in message


def test_offline_mode_without_files_is_one_quick_clear_error(tmp_path):
    answers = ask_in_new_process(["xxl1.1", "someone/a-t5", "t5_smal"], tmp_path, HF_HUB_OFFLINE="1")
    assert [answer[0] for answer in answers] == ["OSError", "OSError", "ValueError"]
    for (_, message, seconds), handle in zip(answers[:2], ["google/t5-v1_1-xxl", "someone/a-t5"], strict=True):
        assert seconds < QUICK
        for part in (handle, str(tmp_path / "hf" / "hub"), "HF_HUB_OFFLINE", "'t5_tiny'"):
            assert part in message


# Encoders of one's own


def lengths_encoder(captions, max_length, device):
    """Encodes a caption as one vector per character, holding its position; NaN where masked."""
    lengths = torch.tensor([min(max(len(caption), 1), max_length) for caption in captions])
    positions = torch.arange(int(lengths.max())).expand(len(captions), -1)
    mask = positions < lengths[:, None]
    encodings = positions.double().masked_fill(~mask, float("nan"))[..., None].expand(-1, -1, 3)
    return encodings, mask.int()


def test_a_registered_encoder():
    register_text_encoder("lengths", lengths_encoder, 3)
    assert get_encoded_dim("lengths") == 3
    encodings, mask = t5_encode_text(["abc", "a" * 50], "lengths", max_length=5)
    assert (encodings.shape, encodings.dtype, mask.dtype) == ((2, 5, 3), torch.float32, torch.bool)
    assert encodings[..., 0].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert mask.sum(1).tolist() == [3, 5]


def test_a_registered_encoder_gets_what_was_asked_and_no_gradients():
    seen = []

    def encode(captions, max_length, device):
        seen.append((captions, max_length, device, torch.is_grad_enabled()))
        return torch.ones(len(captions), 1, 2), torch.ones(len(captions), 1, dtype=torch.bool)

    register_text_encoder("mine", encode, 2)
    t5_encode_text(("a", "b"), "mine", 7, device="cpu")
    assert seen == [(["a", "b"], 7, torch.device("cpu"), False)]


def test_registering_again_replaces_what_built_in_pictures_have_kept():
    for width in (3, 4):
        register_text_encoder("mine", lambda captions, *_, d=width: (torch.ones(48, 1, d), torch.ones(48, 1)), width)
        assert ShapesDataset(2, side_length=8, encoder_name="mine")[0]["encoding"].shape == (1, 1, width)


def test_registering_again_replaces_and_the_name_is_listed():
    register_text_encoder("mine", lengths_encoder, 3)
    register_text_encoder("mine", lengths_encoder, 4)
    assert get_encoded_dim("mine") == 4
    with pytest.raises(ValueError, match="'mine'"):
        get_encoded_dim("unknown")


@pytest.mark.parametrize("name", [*DOCUMENTED, "t5_tiny"])
def test_built_in_names_cannot_be_registered(name):
    with pytest.raises(ValueError, match="built in"):
        register_text_encoder(name, lengths_encoder, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("", lengths_encoder, 3), ValueError, "name"),
        ((3, lengths_encoder, 3), TypeError, "name"),
        (("mine", "encode", 3), TypeError, "encode"),
        (("mine", lengths_encoder, 0), ValueError, "dim"),
        (("mine", lengths_encoder, 3.0), TypeError, "dim"),
    ],
)
def test_wrong_registrations_are_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        register_text_encoder(*arguments)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (torch.ones(2, 4, 3), "tuple of two tensors"),
        ((torch.ones(2, 4, 3), None), "tuple of two tensors"),
        ((torch.ones(2, 4, 5), torch.ones(2, 4)), r"\(2, n, 3\).*\(2, 4, 5\)"),
        ((torch.ones(1, 4, 3), torch.ones(1, 4)), r"\(2, n, 3\).*\(1, 4, 3\)"),
        ((torch.ones(2, 3), torch.ones(2, 3)), r"\(2, n, 3\).*\(2, 3\)"),
        ((torch.ones(2, 9, 3), torch.ones(2, 9)), r"n <= 8.*\(2, 9, 3\)"),
        ((torch.ones(2, 0, 3), torch.ones(2, 0)), r"1 <= n.*\(2, 0, 3\)"),
        ((torch.ones(2, 4, 3, dtype=torch.long), torch.ones(2, 4)), "floating point.*int64"),
        ((torch.ones(2, 4, 3), torch.ones(2, 5)), r"mask of shape \(2, 4\).*\(2, 5\)"),
    ],
)
def test_wrong_answers_of_a_registered_encoder_are_errors(answer, match):
    register_text_encoder("mine", lambda captions, max_length, device: answer, 3)
    with pytest.raises(ValueError, match=f"'mine'.*{match}"):
        t5_encode_text(["a", "b"], "mine", max_length=8)
