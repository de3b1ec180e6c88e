"""Batches on any number of ranks: their order, resuming, failures, worker processes."""

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from minimagen_fast.batches import chances, permutation
from minimagen_fast.captioned import NoItem
from minimagen_fast.loading import ShardedLoader


class Numbers(Dataset):
    """Items that say what they were made of; every `bad`-th cannot be had."""

    def __init__(self, length, bad=None):
        self.length, self.bad, self.read = length, bad, []

    def __len__(self):
        return self.length

    def item(self, index, chance):
        assert type(index) is int
        self.read.append(index)
        if self.bad is not None and index % self.bad == 0:
            raise NoItem("timeout" if index % 2 else "http")
        image = torch.tensor([float(index), chance[0], chance[2]]).view(3, 1, 1)
        return {
            "image": image,
            "encoding": torch.ones(1, 1 + index % 3, 2),
            "mask": torch.ones(1, 1 + index % 3).bool(),
        }


class Plain(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 4:
            return None
        return {"image": torch.full((3, 1, 1), float(index)), "encoding": torch.ones(1, 1, 2), "mask": torch.ones(1, 1)}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class Broken(Numbers):
    def item(self, index, chance):
        raise ValueError("the captions were encoded otherwise")


def ids(batches):
    return [[] if batch is None else batch["id"].tolist() for batch in batches]


def global_batches(length, batch_size, ranks, epoch=0, start=0, **options):
    """The ids of every global batch, as the ranks see them together."""
    options = {"seed": 3, **options}
    parts = [
        ids(ShardedLoader(Numbers(length), batch_size, rank=rank, ranks=ranks, **options).epoch(epoch, start))
        for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1, "all ranks have as many batches"
    return [sum(together, []) for together in zip(*parts, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_any_number_of_ranks_sees_the_same_global_batches(ranks):
    order = permutation(50, 3, 7).tolist()
    assert global_batches(50, 8, ranks, 7) == [order[place : place + 8] for place in range(0, 48, 8)]


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_an_epoch_is_every_sample_once(ranks):
    batches = global_batches(53, 8, ranks, drop_last=False)
    assert [len(batch) for batch in batches] == [8] * 6 + [5] and sorted(sum(batches, [])) == list(range(53))


def test_a_last_batch_is_divided_evenly_and_some_rank_may_have_none_of_it():
    sizes = [
        [len(part) for part in ids(ShardedLoader(Numbers(10), 8, seed=0, rank=rank, ranks=4, drop_last=False).epoch(0))]
        for rank in range(4)
    ]
    assert [first for first, _ in sizes] == [2] * 4
    assert sorted(last for _, last in sizes) == [0, 0, 1, 1]
    loader = ShardedLoader(Numbers(10), 8, seed=0, ranks=4, drop_last=False)
    assert loader.batches_in_epoch == 2 and list(loader.epoch(0))[1] is None and loader.failures == {}


def test_orders_follow_from_seed_and_epoch():
    assert permutation(12, 0, 0).tolist() == [2, 0, 1, 11, 4, 5, 6, 7, 8, 10, 3, 9], "the same for ever"
    orders = [tuple(permutation(40, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9 and all(sorted(order) == list(range(40)) for order in orders)
    batches = global_batches(16, 8, 1, shuffle=False)
    assert batches == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize("start", [1, 3, 6])
@pytest.mark.parametrize("ranks", [1, 2])
def test_starting_in_an_epoch_is_exact_and_reads_nothing_else(start, ranks):
    whole = global_batches(50, 8, 4, 2)
    assert global_batches(50, 8, ranks, 2, start) == whole[start:]
    dataset = Numbers(50)
    list(ShardedLoader(dataset, 8, seed=3).epoch(2, start))
    assert dataset.read == sum(whole[start:], [])


def test_chance_belongs_to_seed_epoch_and_index():
    def crops(ranks, rank, **options):
        loader = ShardedLoader(Numbers(16), 8, seed=5, rank=rank, ranks=ranks)
        batches = list(loader.epoch(**{"epoch": 1, **options}))
        return {int(image[0]): tuple(image[1:, 0, 0].tolist()) for batch in batches for image in batch["image"]}

    whole = crops(1, 0)
    assert len(whole) == 16 and len(set(whole.values())) == 16
    assert crops(2, 0) | crops(2, 1) == whole
    assert crops(1, 0, start=1).items() < whole.items()
    assert crops(1, 0, epoch=2).keys() == whole.keys() and not crops(1, 0, epoch=2).items() & whole.items()
    many = np.array([chances(0, 0, index) for index in range(2000)])
    assert 0 <= many.min() and many.max() < 1 and np.abs(many.mean(axis=0) - 0.5).max() < 0.03


def test_ids_are_those_behind_subsets():
    dataset = Numbers(20)
    inner = Subset(dataset, [19, 3, 5, 7, 11, 2])
    loader = ShardedLoader(Subset(inner, torch.tensor([5, 0, 1, 2])), 4, seed=0, shuffle=False)
    (batch,) = loader.epoch(0)
    assert batch["id"].tolist() == [2, 19, 3, 5] and batch["image"][:, 0, 0, 0].tolist() == [2, 19, 3, 5]
    assert batch["id"].dtype == torch.int64 and batch["mask"].shape == (4, 3)
    from_the_end = Subset(Subset(dataset, [-1, 3, -20, 7]), [-1, 0, -2])
    assert ids(ShardedLoader(from_the_end, 3, seed=0, shuffle=False).epoch(0)) == [[7, 19, 0]]
    for wrong in (20, -21):
        with pytest.raises(ValueError, match=f"indices must be from -20 to 19, got {wrong}"):
            ShardedLoader(Subset(Subset(dataset, [0, wrong]), [0, 1]), 1, seed=0)


def test_numpy_numbers_are_numbers():
    numpy = ShardedLoader(Numbers(20), np.int64(4), seed=np.int64(3), rank=np.int64(1), ranks=np.int64(2))
    assert ids(numpy.epoch(1)) == ids(ShardedLoader(Numbers(20), 4, seed=3, rank=1, ranks=2).epoch(1))
    for wrong in (4.0, True, "4"):
        with pytest.raises(TypeError, match="batch_size must be an int"):
            ShardedLoader(Numbers(20), wrong, seed=0)


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(ShardedLoader(Numbers(8), 4, seed=0).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_other_data_sets_work_too():
    loader = ShardedLoader(Plain(), 3, seed=0, shuffle=False)
    assert ids(loader.epoch(0)) == [[0, 1, 2], [3, 5]]
    assert loader.failures == {"missing": 1}


# Failures


def test_failures_are_counted_by_cause_and_their_ids_are_left_out():
    loader = ShardedLoader(Numbers(12, bad=3), 4, seed=0, shuffle=False)
    assert ids(loader.epoch(0)) == [[1, 2], [4, 5, 7], [8, 10, 11]]
    assert loader.failures == {"http": 2, "timeout": 2}
    list(loader.epoch(1))
    assert loader.failures == {"http": 4, "timeout": 4}
    assert next(ShardedLoader(Numbers(4, bad=1), 4, seed=0).epoch(0)) is None


def test_too_many_failures_end_it():
    loader = ShardedLoader(Numbers(200, bad=4), 10, seed=0, shuffle=False, max_bad_fraction=0.2)
    batches = loader.epoch(0)
    assert len([next(batches) for _ in range(4)]) == 4, "fewer than 50 samples say nothing"
    with pytest.raises(ValueError, match=r"13 of 50 samples .*http: 13\), which is more than MAX_BAD_FRACTION=0.2"):
        next(batches)
    assert len(list(ShardedLoader(Numbers(200, bad=4), 10, seed=0, max_bad_fraction=0.3).epoch(0))) == 20
    exactly = ShardedLoader(Numbers(100, bad=5), 10, seed=0, shuffle=False, max_bad_fraction=0.2)
    assert len(list(exactly.epoch(0))) == 10
    loader = ShardedLoader(Numbers(60, bad=59), 10, seed=0, shuffle=False, max_bad_fraction=0.0)
    with pytest.raises(ValueError, match="1 of 50"):
        list(loader.epoch(0))


def test_the_bound_is_that_of_an_epoch():
    dataset = Numbers(100)
    loader = ShardedLoader(dataset, 10, seed=0, max_bad_fraction=0.5)
    list(loader.epoch(0))
    dataset.bad = 1
    with pytest.raises(ValueError, match="50 of 50"):
        list(loader.epoch(1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 9, "ranks": 2}, "batch of 9 cannot be divided equally among 2 ranks"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be"),
        ({"rank": 2, "ranks": 2}, "rank must be from 0 to 1, got 2"),
        ({"batch_size": 22}, "20 samples are less than one batch of 22"),
        ({"max_bad_fraction": 2}, "MAX_BAD_FRACTION must be from 0 to 1"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ShardedLoader(Numbers(20), **{"batch_size": 4, "seed": 0, **options})


def test_nothing_is_no_data_and_streams_are_others():
    with pytest.raises(ValueError, match="0 samples"):
        ShardedLoader(Numbers(0), 4, seed=0, drop_last=False)
    with pytest.raises(TypeError, match="cannot be read by index"):
        ShardedLoader(Stream(), 4, seed=0)
    loader = ShardedLoader(Numbers(20), 4, seed=0)
    for epoch, start in ((-1, 0), (0, -1), (0, 6)):
        with pytest.raises(ValueError, match="start must be"):
            loader.epoch(epoch, start)
    assert list(loader.epoch(0, 5)) == []


# Worker processes


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_change_nothing(context):
    options = dict(seed=1, rank=1, ranks=2)
    here = ShardedLoader(Numbers(40, bad=5), 8, **options)
    there = ShardedLoader(Numbers(40, bad=5), 8, **options, num_workers=2, multiprocessing_context=context)
    broken_off = there.epoch(9)
    next(broken_off)  # and left, with batches on their way
    for epoch, start in ((0, 0), (1, 2)):
        for one, two in zip(here.epoch(epoch, start), there.epoch(epoch, start), strict=True):
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    unread = Counter(there.failures)
    unread.subtract(here.failures)
    assert 0 <= unread.total() <= 4, "what was never asked for is not counted"
    with pytest.raises(RuntimeError, match="another epoch"):
        next(broken_off)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="nothing tells who has sent a signal")
def test_signals_to_all_processes_of_a_training_leave_its_workers_alone():
    loader = ShardedLoader(Numbers(40), 4, seed=0, num_workers=1, multiprocessing_context="fork")
    batches = loader.epoch(0)
    next(batches)
    [worker] = loader._loader._iterator._workers
    for name in ("TERM", "USR1", "INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        next(batches)
    assert len(list(batches)) == 5
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0, "its parent's signal ends it"


def test_errors_for_the_user_come_out_of_workers_as_they_are():
    loader = ShardedLoader(Broken(4), 2, seed=0, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(ValueError, match="^the captions were encoded otherwise$") as caught:
        list(loader.epoch(0))
    assert "in a worker process" in str(caught.value.__cause__)
    with pytest.raises(ValueError, match="^the captions were encoded otherwise$"):
        list(ShardedLoader(Broken(4), 2, seed=0).epoch(0))


def test_another_process_has_the_same_order():
    program = "from minimagen_fast.batches import permutation, chances;"
    program += "print(permutation(20, 1, 2).tolist(), chances(1, 2, 3))"
    root = Path(__file__).resolve().parent.parent
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True).stdout
    assert shown.strip() == f"{permutation(20, 1, 2).tolist()} {chances(1, 2, 3)}"
