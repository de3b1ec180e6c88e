"""The messages of a plan against those of real processes."""

from collections import Counter

import pytest
from plan_runs import SMALL, TINY, measure
from rank_processes import run_ranks

from minimagen_fast.plan_memory import memory
from minimagen_fast.plan_network import Collective, Links, collectives, total
from minimagen_fast.plan_setup import CARDS, Setup
from minimagen_fast.plan_unet import units

CPU = {"batch": 2, "device": "cpu", "ema": True}
TWO = [
    (Setup(SMALL, gpus=2, accumulate=2, **CPU), "ddp", True),
    (Setup(SMALL, gpus=2, **{**CPU, "batch": 8}), "fsdp", True),
    (Setup(TINY, gpus=2, **CPU), "ddp", False),
    (Setup(TINY, gpus=2, accumulate=2, gather=4, **CPU), "fsdp", False),
    (Setup(TINY, gpus=2, checkpoint_levels=(0, 1, 2), **CPU), "fsdp", False),
]
FOUR = [(Setup(TINY, gpus=4, gpus_per_node=2, **CPU), "hybrid", False)]


def planned(setup, how):
    """Bytes of the tensors by kind of collective."""
    found = Counter()
    for each in collectives(setup, how):
        found[each.kind] += each.bytes * (1 if each.synchronised else setup.accumulate)
    return dict(found)


@pytest.fixture(scope="module")
def measured():
    both = [(TWO, run_ranks(measure, 2, TWO)), (FOUR, run_ranks(measure, 4, FOUR, local_ranks=2))]
    return [(case, ranks) for cases, found in both for case, ranks in zip(cases, zip(*found, strict=True), strict=True)]


def test_every_byte_that_real_ranks_exchange_is_planned(measured):
    kinds = set()
    for (setup, how, _), ranks in measured:
        for sent, _ in ranks:
            assert sent == planned(setup, how), (setup, how)
            kinds |= set(sent)
    assert kinds == {"broadcast", "all_reduce", "all_gather", "reduce_scatter"}


def test_the_memory_of_real_ranks_is_planned(measured):
    compared = 0
    for (setup, how, with_memory), ranks in measured:
        if with_memory:
            # The profiler also sees what Gloo's threads take for themselves, more on one rank than on another.
            peak = min(found for _, found in ranks)
            assert memory(setup, how).peak == pytest.approx(peak, rel=0.02 if how == "ddp" else 0.1), (setup, how)
            compared += 1
    assert compared == 2


def test_shares_of_a_ring():
    def sent(kind, ranks=4):
        return Collective(kind, 1200, ranks, 1, "backward", True).sent

    assert [sent(kind) for kind in ("all_reduce", "all_gather", "reduce_scatter", "broadcast")] == [
        1800,
        900,
        900,
        1200,
    ]
    assert sent("all_reduce", 1) == 0


def test_bytes_and_time_of_replicas():
    setup = Setup(SMALL, 1, gpus=16)
    numel = sum(unit.numel for unit in units(SMALL)[0])
    (broadcast, reduce) = collectives(setup, "ddp")
    assert reduce.sent == 2 * 15 / 16 * 4 * numel and reduce.sent_between == reduce.sent / 8
    links = Links.of(CARDS["h200"], 0.5, 0.0, 0.0)
    # 3600 and 400 Gb/s at half of the rate.
    assert links.seconds(reduce) == pytest.approx(max(reduce.sent / 225e9, reduce.sent / 8 / 25e9))
    assert total([broadcast, reduce], lambda each: each.sent, 5) == broadcast.sent + reduce.sent


def test_accumulated_batches_gather_every_time_and_reduce_once():
    once, thrice = (Counter(planned(Setup(SMALL, 1, gpus=8, accumulate=n), "fsdp")) for n in (1, 3))
    assert thrice["all_gather"] == 3 * once["all_gather"] and thrice["reduce_scatter"] == once["reduce_scatter"]


def test_hybrid_sends_less_between_nodes_than_full_sharding():
    setup = Setup(SMALL, 1, gpus=64)
    within, across = (sum(c.sent_between for c in collectives(setup, how)) for how in ("hybrid", "fsdp"))
    assert 0 < within < across
    reduced = [c for c in collectives(setup, "hybrid") if c.kind == "all_reduce"]
    assert {(c.ranks, c.nodes) for c in reduced} == {(8, 8)}


def test_steps_of_a_ring_count_where_there_are_many_ranks():
    links = Links(1e12, 1e12, 1e-6, 1e-5)

    def seconds(kind, ranks, nodes, parts=1):
        return links.seconds(Collective(kind, 0, ranks, nodes, "forward", False, parts))

    assert seconds("all_gather", 8, 1) == pytest.approx(7e-6)
    assert seconds("all_gather", 64, 8) == pytest.approx(8 * 1e-5 + 55 * 1e-6)
    assert seconds("all_reduce", 64, 8) == pytest.approx(2 * (3 * 1e-5 + 7 * 1e-6))
    assert seconds("all_reduce", 64, 8, parts=10) == pytest.approx(20 * (3 * 1e-5 + 7 * 1e-6))
    assert seconds("all_gather", 1, 1) == 0
