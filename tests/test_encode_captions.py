"""``minimagen-fast encode-captions``: interrupted, damaged, by several processes, and a training that uses it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from picture_server import encoded, picture
from safetensors.torch import load_file, save_file

from minimagen_fast import caption_format, caption_store, cli, train_command
from minimagen_fast.caption_encoding import encode_captions
from minimagen_fast.caption_store import CaptionStore
from minimagen_fast.shapes import all_captions
from minimagen_fast.t5 import encoder_files, t5_encode_text, token_counts
from minimagen_fast.tiny_t5 import embedded_t5_directory

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ["encode-captions", "--DATA", "built-in", "--T5_NAME", "t5_tiny", "--DEVICE", "cpu", "--SHARD_SIZE", "5"]


def encode(directory, captions=None, **options):
    return encode_captions(
        all_captions() if captions is None else captions,
        directory,
        **{"encoder": "t5_tiny", "max_length": 64, "shard_size": 5, "device": "cpu", **options},
    )


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # With several the last bits of a product depend on their number; the programs started here have one, too.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a store that was made without any trouble."""
    directory = tmp_path_factory.mktemp("whole")
    assert encode(directory).shards_left == 0
    return contents(directory)


def environment(**values):
    names = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **values}
    return {**os.environ, **{name: str(value) for name, value in names.items()}}


# Runs itself in a forked process, kills that after a while, and again, until one gets to the end.
KILLED = """
import json, os, random, signal, sys, time
from minimagen_fast.caption_encoding import encode_captions
from minimagen_fast.caption_format import encoder_content
from minimagen_fast.shapes import all_captions
from minimagen_fast.t5 import t5_encode_text

t5_encode_text("warm", "t5_tiny", 64, device="cpu")
random.seed(0)
longest, kills = 0.01, 0
while True:
    child = os.fork()
    if child == 0:
        encode_captions(all_captions(), sys.argv[1], encoder="t5_tiny", max_length=64, shard_size=1, device="cpu")
        os._exit(0)
    time.sleep(random.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    kills += 1
    longest *= 1.1
    # Whatever has a record is whole, and stays the same file.
    there = os.listdir(sys.argv[1]) if os.path.isdir(sys.argv[1]) else []
    finished = sorted(name for name in there if name.endswith(".json"))
    print(json.dumps({name: os.stat(os.path.join(sys.argv[1], name)).st_mtime_ns for name in finished}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment_it_goes_on(tmp_path):
    encode(tmp_path / "whole", shard_size=1)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) >= 8, "it was killed several times"
    seen = {}
    for finished in kills:
        for name, written in finished.items():
            if name != "manifest.json":
                assert seen.setdefault(name, written) == written, "finished shards are never written again"
    assert len(seen) > 8
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole"), "the same to the bit, and nothing else"


@pytest.mark.parametrize("stop_at", range(6))
def test_stopped_between_any_two_steps_of_a_shard(tmp_path, whole, monkeypatch, stop_at):
    steps = []

    def stopping(original):
        def call(*args):
            steps.append(original)
            if len(steps) == 5 + stop_at:
                raise KeyboardInterrupt
            return original(*args)

        return call

    with monkeypatch.context() as patched:
        for name in ("fsync", "replace"):
            patched.setattr(caption_format.os, name, stopping(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            encode(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    for name in ("captions-00003.safetensors", "captions-00003.json", "manifest.json"):
        (tmp_path / f".{name}.77.part").write_bytes(b"left by a run that was killed")
    report = encode(tmp_path)
    # The fifth step names the record of the first shard, which is finished from then on.
    assert report.encoded == (48 if stop_at == 0 else 43) and contents(tmp_path) == whole


@pytest.mark.parametrize(
    "content, message", [('{"name": "a web app"}', "not a file of pre-encoded captions"), ("[]", "not a file")]
)
def test_a_manifest_of_something_else_is_not_written_over(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        encode(tmp_path)
    assert contents(tmp_path) == {"manifest.json": content.encode()}


def test_processes_that_end_at_once_do_not_take_each_others_manifest(tmp_path, whole, monkeypatch):
    replace, cleared = os.replace, []

    def clearing(source, target):
        if Path(target).name == "manifest.json" and len(cleared) < 2:
            # What another process does that gets to the manifest at this moment.
            caption_format._remove_unfinished(Path(target))
            cleared.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", clearing)
    encode(tmp_path)
    assert len(cleared) == 2 and contents(tmp_path) == whole


def test_again_there_is_nothing_to_do(tmp_path, capsys):
    assert cli.main([*COMMAND, "--OUT", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    assert "48 captions encoded in" in first and "/s), on cpu." in first
    # 6 tokens of 64 numbers each and the index; headers of ten shards.
    each = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) / 48
    assert 6 * 64 * 2 + 36 < each < 1000
    assert f"48 captions, {48 * each / 1e6:.2f} MB, {each:,.0f} bytes per caption" in first
    assert f"in float32 it would be {64 * 64 * 4:,} ({64 * 64 * 4 / each:.1f} times as much)" in first
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert cli.main([*COMMAND, "--OUT", str(tmp_path)]) == 0
    assert "Nothing was left to encode." in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_the_page_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "captions.md").read_text(encoding="utf-8")
    command = "minimagen-fast encode-captions --DATA built-in --OUT shapes --T5_NAME t5_tiny"
    assert command in page
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split()[1:], "--DEVICE", "cpu"]) == 0
    for line in capsys.readouterr().out.splitlines()[1:]:  # the first has the time
        assert line in page


@pytest.mark.parametrize(
    "name, change, fault",
    [
        ("captions-00002.safetensors", lambda content: content[:-9], "bytes instead of"),
        ("captions-00002.safetensors", lambda content: content[:-1] + b"\xff", "its checksum is another one"),
        ("captions-00002.safetensors", None, "it is missing"),
        ("captions-00002.json", lambda content: content[:30], "its record captions-00002.json is damaged"),
    ],
)
def test_a_damaged_shard_is_named_and_made_anew(tmp_path, whole, capsys, name, change, fault):
    encode(tmp_path)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if "00002" not in path.name}
    if change is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    assert cli.main([*COMMAND, "--OUT", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"Made anew, since it was damaged: {tmp_path / 'captions-00002.safetensors'}: " in shown and fault in shown
    assert "5 captions encoded" in shown and contents(tmp_path) == whole
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits on the size of files")
def test_a_full_disk_leaves_what_is_complete(tmp_path, whole):
    # A limit on the size of a file is met by the write itself, as a full disk is; the last shard is smaller.
    program = f"""
import resource, sys
from minimagen_fast import caption_encoding, cli
original = caption_encoding.write_shard
def write_shard(directory, number, *args):
    if number == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    return original(directory, number, *args)
caption_encoding.write_shard = write_shard
sys.exit(cli.main({[*COMMAND, "--OUT", str(tmp_path)]!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.returncode == cli.MISUSED and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    for words in ("captions-00004.safetensors cannot be written", "4 of 10 shards are finished", "run the same again"):
        assert words in message
    left = contents(tmp_path)
    assert len(left) == 8 and left.items() <= whole.items()
    assert encode(tmp_path).encoded == 28 and contents(tmp_path) == whole


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, whole):
    words = [sys.executable, "-m", "minimagen_fast", *COMMAND, "--OUT", str(tmp_path)]
    ranks = [
        subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, env=environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2)
        )
        for rank in range(2)
    ]
    shown = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "Process 1 of 2: 25 captions encoded" in shown[0] and "Process 2 of 2: 23 captions encoded" in shown[1]
    assert contents(tmp_path) == whole


def test_processes_make_their_own_shards_only(tmp_path, whole):
    second = encode(tmp_path, rank=1, world_size=3)
    assert second.shards_left == 7 and {path.name for path in tmp_path.glob("*.safetensors")} == {
        f"captions-{number:05d}.safetensors" for number in (1, 4, 7)
    }
    with pytest.raises(FileNotFoundError, match="not all encoded"):
        CaptionStore(tmp_path)
    assert encode(tmp_path).encoded == 48 - second.encoded, "one process goes on with what three began"
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("moment", [1, 2])
def test_another_process_may_take_a_damaged_shard_away_at_any_moment(tmp_path, whole, monkeypatch, moment):
    encode(tmp_path)
    record, readings = tmp_path / "captions-00000.json", []

    def read_text(path, *args, real=Path.read_text, **options):
        if path == record:
            readings.append(path)
            if len(readings) == moment:
                record.unlink()
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    report = encode(tmp_path, rank=1, world_size=2)
    assert (report.encoded, report.shards_left) == (0, 1) and len(readings) == 2
    assert encode(tmp_path).encoded == 5 and contents(tmp_path) == whole


def test_the_order_of_the_captions_does_not_matter(tmp_path, whole):
    encode(tmp_path, [*all_captions()[::-1], *all_captions()])
    assert contents(tmp_path) == whole


def test_batches_do_not_matter_but_for_rounding(tmp_path):
    captions = [" ".join(["word"] * count) for count in range(40)]
    for size in (1, 7):
        encode(tmp_path / str(size), captions, batch_size=size)
    one, seven = (CaptionStore(tmp_path / str(size)) for size in (1, 7))
    for caption in captions:
        assert (one.get(caption)[0] - seven.get(caption)[0]).abs().max() < 2**-6  # two fp16 steps at the largest number


def test_little_is_padded(tmp_path, monkeypatch):
    from minimagen_fast import caption_encoding

    captions = [" ".join(["red"] * (1 + 7 * index % 48)) + " " * index for index in range(48)]
    padded, used = 0, 0

    def counted(batch, *args, **options):
        nonlocal padded, used
        encodings, mask = original(batch, *args, **options)
        padded, used = padded + mask.numel(), used + int(mask.sum())
        return encodings, mask

    original = caption_encoding.t5_encode_text
    monkeypatch.setattr(caption_encoding, "t5_encode_text", counted)
    encode(tmp_path, captions, shard_size=48, batch_size=4)
    assert used <= padded < 1.1 * used


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"max_length": 32},
            "holds encodings by t5_tiny, captions of at most 64 tokens, float16.* wanted .* 32 tokens",
        ),
        ({"dtype": "bfloat16"}, "float16.*wanted are those by .*bfloat16"),
        ({"shard_size": 6}, "in shards of another size"),
        ({"captions": ["something else"]}, "encodings of other captions"),
        ({"captions": []}, "there is no caption"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"dtype": "float64"}, "dtype must be one of float16, bfloat16"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1"),
        ({"encoder": "no such"}, "no text encoder"),
    ],
)
def test_a_folder_holds_one_store(tmp_path, whole, options, message):
    encode(tmp_path)
    with pytest.raises(ValueError, match=message):
        encode(tmp_path, **options)
    assert contents(tmp_path) == whole


def test_a_t5_in_a_folder_is_known_by_its_files(tmp_path):
    mine = shutil.copytree(embedded_t5_directory(), tmp_path / "mine")
    (mine / "README.md").write_text("changes nothing")
    captions = ["", "a red circle", "größer 夕焼け " * 40]
    assert [file.name for file in encoder_files(str(mine))] == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ]
    _, mask = t5_encode_text(captions, str(mine), 16, device="cpu", batch_size=1)
    assert token_counts(captions, str(mine), 16) == mask.sum(1).tolist()
    encode(tmp_path / "store", captions, encoder=str(mine))
    store = CaptionStore(tmp_path / "store")
    elsewhere = shutil.copytree(mine, tmp_path / "elsewhere" / "mine")
    (elsewhere / "README.md").unlink()
    store.check_encoder(str(elsewhere), 64)
    store.check_content(str(elsewhere))
    weights = load_file(elsewhere / "model.safetensors")
    weights["shared.weight"][0, 0] += 1
    save_file(weights, elsewhere / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="encoded with another mine .files"):
        store.check_content(str(elsewhere))
    with pytest.raises(ValueError, match="holds encodings by mine.*wanted are those by mine"):
        encode(tmp_path / "store", captions, encoder=str(elsewhere))


def test_errors_of_the_command_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "first")
    assert cli.main([*COMMAND, "--OUT", "out"]) == cli.MISUSED
    assert "variable RANK must be a whole number" in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    assert cli.main([*COMMAND, "--OUT", "out", "--DEVICE", "meta"]) == cli.MISUSED
    assert "--DEVICE 'meta' cannot be used here" in capsys.readouterr().err
    words = [*COMMAND, "--OUT", "out"]
    words[2] = "nowhere"
    assert cli.main(words) == cli.MISUSED and "there is no folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_conceptual_captions(tmp_path, monkeypatch):
    from minimagen_fast import encode_command

    rows = {"image_url": ["x"] * 4, "caption": ["one", None, "two", "one"]}
    validation = {"image_url": ["x"], "caption": ["three"]}
    monkeypatch.setattr(encode_command, "conceptual_rows", lambda: {"train": rows, "validation": validation})
    words = ["encode-captions", "-t5", "t5_tiny", "--DEVICE", "cpu", "--OUT", str(tmp_path)]
    assert cli.main(words) == 0
    store = CaptionStore(tmp_path)
    assert len(store) == 3 and all(caption in store for caption in ("one", "two", "three"))


def test_a_training_needs_no_text_encoder(tmp_path, monkeypatch, capsys):
    def parameters(args):
        args.BATCH_SIZE, args.IMG_SIDE_LEN, args.TIMESTEPS, args.TRAIN_VALID_FRAC = 2, 16, 20, 0.75
        return args

    def no_t5(*args, **options):
        raise AssertionError("the text encoder is not needed")

    monkeypatch.setattr(train_command, "load_testing_parameters", parameters)
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "pictures"
    data.mkdir()
    captions = ["a red circle on black", "größer 夕焼け", "", "a red circle on black", "x", "y", "z", "one two three"]
    rows = []
    for index, caption in enumerate(captions):
        (data / f"{index}.png").write_bytes(encoded(picture(), "PNG"))
        rows.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (data / "metadata.jsonl").write_text("\n".join(rows))

    common = ["--DATA", str(data), "-t5", "t5_tiny", "-mw", "16", "--DEVICE", "cpu"]
    assert cli.main(["encode-captions", *common, "--OUT", "store"]) == 0
    assert "7 captions encoded" in capsys.readouterr().out
    monkeypatch.setattr(caption_store, "t5_encode_text", no_t5)
    assert cli.main(["train", *common, "--CAPTIONS", "store", "--TESTING", "-e", "1"]) == 0
    (directory,) = tmp_path.glob("training_*")
    assert len(list((directory / "state_dicts").iterdir())) == 2
    capsys.readouterr()
    assert cli.main(["train", *common[:-4], "--DEVICE", "cpu", "--CAPTIONS", "store", "-e", "1"]) == cli.MISUSED
    assert "encoded with t5_tiny, at most 16 tokens, but t5_tiny, at most 64 tokens, is" in capsys.readouterr().err
    assert cli.main(["train", *common, "--CAPTIONS", "nowhere", "-e", "1"]) == cli.MISUSED
    assert "holds no pre-encoded captions" in capsys.readouterr().err
