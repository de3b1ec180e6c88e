"""The embedded text encoder: its tokenizer, its weights, and how its folder comes to be."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimagen_fast import tiny_t5
from minimagen_fast.shapes import all_captions
from minimagen_fast.t5 import t5_encode_text
from minimagen_fast.tiny_t5 import TINY_T5_DIM, TINY_T5_NAME, embedded_t5_directory

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMAGEN_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield embedded_t5_directory()


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def digests(directory):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def test_special_tokens_are_those_of_t5(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_every_word_of_the_captions_is_one_token(tokenizer):
    for caption in all_captions():
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 1
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption


def test_case_and_spaces_make_no_difference(tokenizer):
    assert tokenizer("  A Red\n CIRCLE  on black ").input_ids == tokenizer("a red circle on black").input_ids


@pytest.mark.parametrize(
    "caption", ["żółw", "漢字", "🙂 a red circle", "Ω≈ç√", "\x00\x07", "x" * 1000, "ק׳", "[]{}|~`"]
)
def test_any_unicode_is_encoded_without_unknowns(tokenizer, caption):
    ids = tokenizer(caption).input_ids
    assert len(ids) > 1
    assert tokenizer.unk_token_id not in ids


def test_other_unicode_texts_stay_apart(tokenizer):
    assert tokenizer("漢").input_ids != tokenizer("字").input_ids


def test_captions_have_distinct_encodings(folder):
    encodings, mask = t5_encode_text(all_captions(), TINY_T5_NAME, device="cpu")
    assert encodings.shape == (48, 6, TINY_T5_DIM)
    assert mask.all()
    flat = encodings.flatten(1)
    distances = torch.cdist(flat, flat) + torch.eye(48) * 1e9
    # One word of five differs between neighbours; a vector of unit-scale features is about 8 long.
    assert distances.min() > 1.0


def test_outputs_have_unit_scale_times_the_final_norm_scale(folder):
    encodings, _ = t5_encode_text(all_captions(), TINY_T5_NAME)
    rms = encodings.pow(2).mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, tiny_t5.FINAL_NORM_SCALE), rtol=1e-3, atol=0)


def test_rebuilding_gives_the_same_files_and_leaves_the_random_state_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMAGEN_FAST_CACHE", str(tmp_path))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = embedded_t5_directory()
    assert torch.equal(torch.get_rng_state(), state)
    assert again.name == folder.name and again != folder
    assert digests(again) == digests(folder)
    assert os.listdir(tmp_path) == [again.name]  # nothing temporary is left


def test_a_whole_folder_is_not_built_again(folder, monkeypatch):
    monkeypatch.setattr(tiny_t5, "_build", lambda *_: pytest.fail("built again"))
    assert embedded_t5_directory() == folder


@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_folder_that_is_not_whole_is_mended(folder, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("MINIMAGEN_FAST_CACHE", str(tmp_path))
    directory = tmp_path / folder.name
    directory.mkdir()
    for file in folder.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    weights = directory / "model.safetensors"
    weights.unlink() if damage == "missing" else weights.write_bytes(b"")
    assert embedded_t5_directory() == directory
    assert digests(directory) == digests(folder)


def test_a_damaged_file_is_said_to_be_built_anew(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMAGEN_FAST_CACHE", str(tmp_path))
    directory = shutil.copytree(folder, tmp_path / folder.name)
    (directory / "config.json").write_text("{")
    with pytest.raises(OSError, match=f"{directory.name} does not hold .*\n.* built anew where the folder is deleted"):
        t5_encode_text(["a red circle"], TINY_T5_NAME)


def test_an_interrupted_build_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMAGEN_FAST_CACHE", str(tmp_path))

    def interrupted(vocab_size):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_t5, "_build_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded_t5_directory()
    assert os.listdir(tmp_path) == []


def test_another_recipe_gets_another_folder(folder, monkeypatch):
    monkeypatch.setattr(tiny_t5, "FINAL_NORM_SCALE", tiny_t5.FINAL_NORM_SCALE * 2)
    assert embedded_t5_directory() != folder
    single, _ = t5_encode_text("a red circle on black", TINY_T5_NAME)
    torch.testing.assert_close(single.pow(2).mean().sqrt().item(), tiny_t5.FINAL_NORM_SCALE, rtol=1e-3, atol=0)


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MINIMAGEN_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tiny_t5.cache_root() == tmp_path / "xdg" / "minimagen_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tiny_t5.cache_root() == Path.home() / ".cache" / "minimagen_fast"
    monkeypatch.setenv("MINIMAGEN_FAST_CACHE", str(tmp_path / "own"))
    assert tiny_t5.cache_root() == tmp_path / "own"


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MINIMAGEN_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="MINIMAGEN_FAST_CACHE"):
        embedded_t5_directory()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    monkeypatch.setenv("MINIMAGEN_FAST_CACHE", "~no_such_user/cache")
    with pytest.raises(OSError, match="nowhere to be found.*Set the environment variable MINIMAGEN_FAST_CACHE"):
        embedded_t5_directory()


def test_processes_building_at_once_get_one_whole_folder_and_print_nothing(folder, tmp_path):
    program = (
        "from minimagen_fast.t5 import t5_encode_text\n"
        "encodings, _ = t5_encode_text('a red circle on black', 't5_tiny')\n"
        "assert encodings.shape == (1, 6, 64)\n"
    )
    environment = {**os.environ, "MINIMAGEN_FAST_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output, errors) == (0, "", "")
    assert os.listdir(tmp_path) == [folder.name]
    assert digests(tmp_path / folder.name) == digests(folder)
