"""Checkpoint files, random states, and the order of the data after a restart."""

import errno
import io
import pickle
import random
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from minimagen_fast import checkpoint

CPU = torch.device("cpu")


def test_save_and_load_keep_everything(tmp_path):
    value = {"weights": torch.randn(3, 2), "n": [1, 2.5, None, "text"], "nested": {0: (True, torch.tensor(3))}}
    checkpoint.save(value, tmp_path / "a.pth")
    loaded = checkpoint.load(tmp_path / "a.pth")
    assert torch.equal(loaded["weights"], value["weights"])
    assert loaded["n"] == value["n"] and loaded["nested"] == value["nested"]


@pytest.mark.parametrize("room", [1_000, 30_000, 60_000])
def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path, room):
    # In the middle of an archive torch's writer makes a RuntimeError about positions of it.
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.pth"
    checkpoint.save(1, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.pth") as raised:
            checkpoint.save({name: torch.zeros(5_000) for name in "abcde"}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert checkpoint.load(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("ends_with", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, ends_with):
    path = tmp_path / "a.pth"
    checkpoint.save(1, path)

    def half_a_save(value, file):
        file.write(b"half of it")
        raise ends_with

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(type(ends_with)):
        checkpoint.save(2, path)
    assert checkpoint.load(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_a_file_is_replaced_as_a_whole_and_not_written_over(tmp_path):
    checkpoint.save(1, tmp_path / "a.pth")
    (tmp_path / "old").hardlink_to(tmp_path / "a.pth")
    checkpoint.save(2, tmp_path / "a.pth")
    assert (checkpoint.load(tmp_path / "old"), checkpoint.load(tmp_path / "a.pth")) == (1, 2)


def test_files_are_readable_by_others_like_any_other_file(tmp_path):
    checkpoint.save(1, tmp_path / "a.pth")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.pth").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_cut_short_files_are_named(tmp_path):
    checkpoint.save({"weight": torch.randn(1000)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    cut = tmp_path / "cut.pth"
    for length in (0, 1, 2, 10, 100, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pth cannot be read.*Delete it"):
            checkpoint.load(cut)


def _old_format(value):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


OLD = _old_format({"weight": torch.randn(3)})


@pytest.mark.parametrize(
    "content",
    [b"a picture", b"j\x01\xd6AJ.", b"U\x05\xdcb\xb7: .", OLD[:250], OLD.replace(b"weight", b"w\xffight")],
    ids=["instructions", "unknown key", "no text", "cut list", "damaged name"],
)
def test_whatever_is_no_checkpoint_is_named(tmp_path, content):
    file = tmp_path / "other.pth"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pth cannot be read.*Delete it"):
        checkpoint.load(file)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint file .*missing\.pth"):
        checkpoint.load(tmp_path / "missing.pth")


class _RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [torch.save, _plain_pickle])
def test_no_code_is_run_from_a_file(tmp_path, write):
    write(_RunsCode(tmp_path / "was_run"), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="bad.pth cannot be read"):
        checkpoint.load(tmp_path / "bad.pth")
    assert not (tmp_path / "was_run").exists()


def test_numbers_of_numpy_are_saved_as_pythons(tmp_path):
    value = {np.int64(1): [np.float64(0.5), (np.bool_(True), np.arange(2))], "m": Counter({np.int32(3): 1})}
    plain = checkpoint.plain(value, "state")
    assert plain == {1: [0.5, (True, [0, 1])], "m": Counter({3: 1})}
    checkpoint.save(plain, tmp_path / "a.pth")
    assert checkpoint.load(tmp_path / "a.pth") == plain
    kept = {"a": OrderedDict(b=None), "size": torch.Size([2]), "dtype": torch.float16, "tensor": torch.ones(2)}
    assert checkpoint.plain(kept, "state") == kept


@pytest.mark.parametrize("bad", [type(None), Path("a"), lambda: None, _RunsCode("a")])
def test_what_could_not_be_read_again_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"state\['a'\]\[1\] is a .*, which a checkpoint cannot hold"):
        checkpoint.plain({"a": [1, bad]}, "state")


def _draw(generator):
    return (
        torch.rand(3).tolist(),
        torch.rand(3, generator=generator).tolist(),
        np.random.normal(size=3).tolist(),
        [random.random(), random.gauss(0, 1)],
    )


def test_random_states_survive_a_file(tmp_path):
    generator = torch.Generator().manual_seed(5)
    np.random.normal()  # numpy and random keep the second of two Gaussian numbers: it belongs to the state
    random.gauss(0, 1)
    state = checkpoint.capture_rng(CPU, [generator])
    checkpoint.save(state, tmp_path / "rng.pth")
    expected = _draw(generator)
    assert _draw(generator) != expected
    checkpoint.restore_rng(checkpoint.load(tmp_path / "rng.pth"), CPU, [generator])
    assert _draw(generator) == expected


def test_another_number_of_generators_is_refused():
    with pytest.raises(ValueError, match="1 data loader generators, this run has 0"):
        checkpoint.restore_rng(checkpoint.capture_rng(CPU, [torch.Generator()]), CPU)


def test_isolated_rng_repeats_inside_and_leaves_no_trace_outside():
    generator = torch.Generator().manual_seed(5)
    before = checkpoint.capture_rng(CPU, [generator])
    expected = _draw(generator)
    checkpoint.restore_rng(before, CPU, [generator])
    inside = []
    for _ in range(2):
        with pytest.raises(KeyError), checkpoint.isolated_rng(3, CPU, [generator]):
            inside.append(_draw(generator))
            raise KeyError
    assert inside[0] == inside[1] != expected
    assert _draw(generator) == expected


class _Numbers(Dataset):
    def __init__(self):
        self.read = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.read.append(index)
        # Uses up random numbers of the main process, as a data set with augmentation does.
        return torch.tensor([float(index), torch.rand(()).item()])


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(10.0).unsqueeze(1) + torch.randperm(10).unsqueeze(1) * 100)


class _AtOnce:
    """Batches of indices whose order is drawn when they are asked for, and not with the first of them."""

    def __iter__(self):
        return iter(torch.randperm(10).split(2))

    def __len__(self):
        return 5


def _loader(kind):
    dataset = _Numbers()
    own = torch.Generator().manual_seed(1)
    return {
        "shuffled": lambda: DataLoader(dataset, batch_size=2, shuffle=True),
        "in order": lambda: DataLoader(dataset, batch_size=2),
        "own generator": lambda: DataLoader(dataset, batch_size=2, shuffle=True, generator=own),
        "sampler with a generator": lambda: DataLoader(
            dataset, batch_size=2, sampler=RandomSampler(dataset, generator=own)
        ),
        "batch sampler": lambda: DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 2, False)),
        "batch sampler that draws at once": lambda: DataLoader(dataset, batch_sampler=_AtOnce()),
        "iterable": lambda: DataLoader(_Stream(), batch_size=2),
    }[kind]()


@pytest.mark.parametrize("done", [0, 1, 3, 5])
@pytest.mark.parametrize(
    "kind",
    [
        *("shuffled", "in order", "own generator", "sampler with a generator", "batch sampler"),
        *("batch sampler that draws at once", "iterable"),
    ],
)
def test_the_rest_of_an_epoch_after_a_restart(kind, done):
    torch.manual_seed(0)
    loader = _loader(kind)
    generators = checkpoint.loader_generators(loader)
    assert len(generators) == (1 if "generator" in kind else 0)
    start = checkpoint.capture_rng(CPU, generators)
    batches = iter(loader)
    for _ in range(done):
        next(batches)
    here = checkpoint.capture_rng(CPU, generators)
    expected = [batch.tolist() for batch in batches]
    next_epoch = [batch.tolist() for batch in loader]

    torch.manual_seed(99)
    loader = _loader(kind)
    generators = checkpoint.loader_generators(loader)
    checkpoint.restore_rng(start, CPU, generators)
    batches = checkpoint.iterate_from(loader, done)
    if done:
        checkpoint.restore_rng(here, CPU, generators)
    assert [batch.tolist() for batch in batches] == expected
    assert [batch.tolist() for batch in loader] == next_epoch
    if kind != "iterable":
        assert len(loader.dataset.read) == 10 - 2 * done + 10  # nothing that was done is read again


@pytest.mark.parametrize("order", [{"batch_size": 2, "shuffle": True}, {"batch_sampler": _AtOnce()}])
def test_worker_processes_give_the_rest_of_an_epoch_in_the_same_order(order):
    torch.manual_seed(0)
    loader = DataLoader(_Numbers(), num_workers=2, **order)
    start = checkpoint.capture_rng(CPU)
    expected = [batch[:, 0].tolist() for batch in loader][3:]
    checkpoint.restore_rng(start, CPU)
    assert [batch[:, 0].tolist() for batch in checkpoint.iterate_from(loader, 3)] == expected
