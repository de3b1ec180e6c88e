"""Training on several ranks: the same as on one, however the work is shared out."""

import functools
import json

import pytest
import torch
import torch.distributed as dist
from rank_processes import run_ranks
from training_runs import Pictures, make_imagen, state_of

from minimagen_fast import blocks
from minimagen_fast.batches import permutation
from minimagen_fast.ema import EMA
from minimagen_fast.loading import ShardedLoader
from minimagen_fast.parallel import _mesh, full, shard
from minimagen_fast.ranks import open_ranks
from minimagen_fast.settings import TrainingSettings
from minimagen_fast.trainer import Trainer
from minimagen_fast.watching import Watch

CPU = torch.device("cpu")
# Sums over a batch are made in another order on every number of ranks.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def train(
    folder,
    *,
    how="ddp",
    epochs=2,
    missing=(),
    spoiled=(),
    restart=None,
    stages=1,
    batch_size=8,
    levels=(),
    compile="off",
    **settings,
):
    """Trains; returns the losses of all steps, the weights, and what this rank holds of the optimizer's states."""
    folder.mkdir(exist_ok=True)
    with open_ranks(CPU) as ranks:
        imagen = make_imagen(stages)
        imagen.accelerate(checkpoint_levels=levels, compile=compile)
        if how != "ddp":
            for unet in imagen.unets:
                shard(unet, ranks, CPU, how, torch.bfloat16 if "precision" in settings else None)
        # With the usual eps the first steps have the sign of a gradient, however small: rounding would decide.
        optimizer = torch.optim.AdamW(imagen.parameters(), lr=1e-2, eps=1e-2)
        losses, pictures = [], Pictures(16, missing=missing)
        for index in spoiled:
            pictures.items[index]["image"].fill_(torch.nan)
        options = {"seed": 3, "rank": ranks.rank, "ranks": ranks.size}
        trainer = Trainer(
            TrainingSettings(epochs=epochs, **{"seed": 5, "ema_decay": 0.9, "max_grad_norm": 0.3, **settings}),
            imagen,
            optimizer,
            ShardedLoader(pictures, batch_size, **options),
            ShardedLoader(Pictures(5, seed=2), 4, shuffle=False, drop_last=False, **options),
            folder,
            timestamp="1",
            ranks=ranks,
            restart_directory=restart,
            watch=Watch(folder, imagen, range(1, stages + 1), ranks, log_interval=1, steps=None),
            callback=lambda step: losses.append(step.loss),
            progress=False,
        )
        assert trainer.skips_by_itself, "every step waits for the device"
        assert trainer.run() == "done"
        assert trainer.bad_steps == bool(spoiled)
        weights = {name: full(value.detach()).clone() for name, value in imagen.named_parameters()}
        held = sum(
            (value.to_local() if hasattr(value, "to_local") else value).numel()
            for state in optimizer.state.values()
            for key, value in state.items()
            if key == "exp_avg"
        )
    return losses, {name: value.numpy() for name, value in weights.items()}, held, trainer.best_losses[1]


def logged(folder):
    """What the log says of every step that does not depend on the machine."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    return [(s["step"], s["epoch"], s["batch"], s["images"], s["grad_norm"], s["unets"]) for s in steps]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return *train(folder), folder


def agree(one, other):
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(other[0]), **CLOSE)
    for name, value in one[1].items():
        torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(other[1][name]), **CLOSE)
    assert one[3] == pytest.approx(other[3], rel=1e-3)


def four_ranks(folder):
    """Every way in which four ranks can train, one after the other."""
    with open_ranks(CPU):
        return all_ways(folder)


def all_ways(folder):
    return {
        "ddp": train(folder / "ddp"),
        "fsdp": train(folder / "fsdp"),
        "half": train(folder / "half", how="fsdp", epochs=1),
        "accumulated": train(folder / "accumulated", how="fsdp", batch_size=4, accumulate=2, epochs=1),
        "accumulated ddp": train(folder / "accumulated ddp", batch_size=4, accumulate=3, epochs=1),
        "missing": train(folder / "missing", missing=range(3, 16), epochs=1),
        "missing sharded": train(folder / "missing sharded", how="fsdp", missing=range(3, 16), epochs=1),
        "hybrid": train(folder / "hybrid", how="hybrid"),
        "bfloat16": train(folder / "bfloat16", how="fsdp", precision="bfloat16"),
        "checkpointed": train(folder / "checkpointed", how="fsdp", levels=(0, 1), epochs=1),
        "compiled": compiled(folder / "compiled"),
        "spoiled": train(folder / "spoiled", how="fsdp", spoiled=(3,), epochs=1),
        "swapped": swapped(),
        "timeouts": timeouts(),
        "both": train(folder / "both", stages=2, epochs=1, min_snr_gamma=5.0),
    }


def swapped():
    """Losses of a sharded U-Net with its own weights, with its averages, and with its own again."""
    imagen, pictures = make_imagen(), ShardedLoader(Pictures(4), 4, seed=0)
    with open_ranks(CPU) as ranks:
        shard(imagen.unets[0], ranks, CPU, "fsdp")
        average = EMA(imagen.unets[0], 0.9)
        with torch.no_grad():
            for parameter in imagen.parameters():
                parameter.mul_(1.1)
        [batch] = pictures.epoch(0)

        def loss():
            inputs = {"text_embeds": batch["encoding"], "text_masks": batch["mask"], "seeds": [1, 2, 3, 4]}
            return imagen(batch["image"], unet_number=1, **inputs).item()

        with torch.no_grad():
            losses = [loss()]
            with average.swapped():
                losses.append(loss())
            return [*losses, loss()]


def timeouts():
    """Seconds that the groups of a hybrid training wait for a rank."""
    with open_ranks(CPU, 77) as ranks:
        mesh = _mesh(ranks, "cpu", "hybrid")
        return [mesh.get_group(place)._get_backend(CPU).options._timeout.total_seconds() for place in (0, 1)]


def compiled(folder):
    """A sharded training through Dynamo, with a backend that runs what it is given; and how often it was given some."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(compile, backend=backend, fullgraph=True))
        result = train(folder, how="fsdp", epochs=1, compile="blocks", levels=(1,))
    return result, len(graphs), len(blocks._kinds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("four")


@pytest.fixture(scope="module")
def four(folder):
    return run_ranks(four_ranks, 4, folder, local_ranks=2)


@pytest.mark.parametrize("how", ["ddp", "fsdp", "hybrid"])
def test_four_ranks_train_as_one_does(four, alone, how):
    for result in four:
        agree(result[how], alone)
        assert len(result[how][0]) == 4


@pytest.mark.parametrize("how", ["ddp", "fsdp", "missing"])
def test_the_log_says_the_same(four, alone, folder, tmp_path, how):
    if how == "missing":
        train(tmp_path, missing=range(3, 16), epochs=1)
    expected = logged(tmp_path if how == "missing" else alone[4])
    found = logged(folder / how)
    assert [line[:4] for line in found] == [line[:4] for line in expected] and len(found) == (
        2 if how == "missing" else 4
    )
    for one, other in zip(found, expected, strict=True):
        assert one[4] == pytest.approx(other[4], rel=1e-3)
        assert one[5]["1"]["loss"] == pytest.approx(other[5]["1"]["loss"], rel=1e-4)
        buckets = one[5]["1"]["loss_by_timestep"], other[5]["1"]["loss_by_timestep"]
        assert [b is None for b in buckets[0]] == [b is None for b in buckets[1]]


def test_weights_that_are_gathered_in_bfloat16(four, tmp_path):
    expected = train(tmp_path, precision="bfloat16")
    assert four[2]["bfloat16"][0] == pytest.approx(expected[0], rel=2e-2)
    assert four[2]["bfloat16"][0] != pytest.approx(four[2]["fsdp"][0], rel=1e-6), "it was no bfloat16"
    assert all(value.dtype == "float32" for value in four[2]["bfloat16"][1].values())


def test_sharded_ranks_hold_a_quarter_of_the_states_each(four, alone):
    held = [result["half"][2] for result in four]
    assert sum(held) == alone[2] and max(held) < 0.4 * alone[2]


@pytest.mark.parametrize("how, batch_size, accumulate", [("accumulated", 4, 2), ("accumulated ddp", 4, 3)])
def test_accumulated_gradients(four, tmp_path, how, batch_size, accumulate):
    expected = train(tmp_path, batch_size=batch_size, accumulate=accumulate, epochs=1)
    agree(four[0][how], expected)
    agree(four[3][how], expected)


def test_a_group_ends_sooner_than_was_known_also_where_one_rank_is_sharded(tmp_path):
    missing = permutation(16, 3, 0)[8:]  # the second of two batches has no images
    expected = train(tmp_path / "plain", missing=missing, accumulate=2, epochs=1)
    agree(expected, train(tmp_path / "steps", missing=missing, epochs=1))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        agree(train(tmp_path / "sharded", how="fsdp", missing=missing, accumulate=2, epochs=1), expected)
    finally:
        dist.destroy_process_group()


def test_averages_are_gathered_anew_and_so_are_the_weights_after_them(four):
    own, averaged, again = four[0]["swapped"]
    assert own == again != averaged
    assert averaged == pytest.approx(alone_loss(), rel=1e-4)


def alone_loss():
    imagen = make_imagen()
    [batch] = ShardedLoader(Pictures(4), 4, seed=0).epoch(0)
    inputs = {"text_embeds": batch["encoding"], "text_masks": batch["mask"], "seeds": [1, 2, 3, 4]}
    return imagen(batch["image"], unet_number=1, **inputs).item()


def test_all_groups_wait_no_longer_than_they_are_told(four):
    assert all(result["timeouts"] == [77.0, 77.0] for result in four)


def test_what_could_not_be_had_is_counted_on_all_ranks(four, folder):
    text = (folder / "missing" / "training_progess.txt").read_text()
    assert "images that could not be had: {'missing': 13}" in text


@pytest.mark.parametrize("how", ["missing", "missing sharded"])
def test_images_that_could_not_be_had_leave_the_mean_right(four, tmp_path, how):
    agree(four[0][how], train(tmp_path, missing=range(3, 16), epochs=1))


def test_sharded_weights_are_gathered_again_for_what_is_computed_twice(four):
    assert four[1]["checkpointed"][0] == pytest.approx(four[1]["half"][0], rel=1e-5)


def test_sharded_blocks_are_compiled(four):
    for (losses, weights, *_), graphs, compiled_blocks in (result["compiled"] for result in four):
        assert losses == pytest.approx(four[0]["half"][0], rel=1e-5)
        for name, value in four[0]["half"][1].items():
            torch.testing.assert_close(torch.from_numpy(weights[name]), torch.from_numpy(value), **CLOSE)
        assert compiled_blocks > 3 and 3 < graphs <= 2 * compiled_blocks, "once with gradients and once without"


def test_a_step_whose_gradients_are_not_finite_is_left_out_on_all_ranks(four, tmp_path):
    expected = train(tmp_path, spoiled=(3,), epochs=1)[1]
    for result in four:
        for name, value in result["spoiled"][1].items():
            torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(expected[name]), **CLOSE)
    before = make_imagen().unets[0].final_conv.weight.detach().numpy()
    assert (expected["unets.0.final_conv.weight"] != before).any()


def test_two_unets_and_weighted_timesteps(four, tmp_path):
    agree(four[0]["both"], train(tmp_path, stages=2, epochs=1, min_snr_gamma=5.0))


def resumed_on_two(folder, out):
    with open_ranks(CPU):
        return {
            "fsdp": train(out / "fsdp", how="fsdp", restart=folder / "half"),
            "ddp": train(out / "ddp", restart=folder / "half"),
        }


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_four_sharded_ranks_is_continued_on_another_number(four, alone, folder, tmp_path, ranks):
    if ranks == 1:
        results = {"ddp": train(tmp_path, restart=folder / "half")}
    else:
        results = run_ranks(resumed_on_two, 2, folder, tmp_path)[1]
    for result in results.values():
        agree((alone[0][2:], *alone[1:]), result)
    assert state_of(folder / "half")["position"]["epoch"] == 1
