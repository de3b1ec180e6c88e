"""``minimagen-fast plan``: what it says, in which words, and what it refuses."""

import json
from dataclasses import replace

import pytest
from plan_runs import SMALL, folder_of_results

from minimagen_fast import cli, plan_command
from minimagen_fast.plan_data import Data
from minimagen_fast.plan_network import Collective, Links, collectives
from minimagen_fast.plan_setup import CARDS, Card, Setup
from minimagen_fast.plan_time import Rate, from_mfu, from_profile, times
from minimagen_fast.plan_unet import Network, count_flops, units
from minimagen_fast.settings import TrainingSettings
from minimagen_fast.training import get_default_args
from minimagen_fast.Unet import Base, BaseTest, Super, SuperTest

FREE = Links(1e30, 1e30, 0.0, 0.0)
TINY = ["--unet", "BaseTest", "--batch", "2", "--images", "1000000"]


def plan(capsys, *words):
    assert cli.main(["plan", *words]) == 0
    return capsys.readouterr().out


def as_json(capsys, *words):
    return json.loads(plan(capsys, *words, "--json"))


def refusal(capsys, *words):
    assert cli.main(["plan", *words]) == cli.MISUSED
    return capsys.readouterr().err


# What is counted


@pytest.mark.parametrize("make, side, forward", [(Base, 64, 1.09e12), (Super, 256, 0.80e12)])
def test_flops_are_those_of_the_networks(make, side, forward):
    lowres = {"lowres_cond": True} if make is Super else {}
    network = Network("", {**make.defaults, **lowres, "text_embed_dim": 512}, side)
    flops = count_flops(network)
    assert flops.forward == pytest.approx(forward, rel=0.01)
    # Two products of the size of one forward, but for the first convolution's input.
    assert 1.9 * flops.forward < flops.backward <= 2 * flops.forward and flops.again == 0
    twice = count_flops(network, (0, 1, 2, 3, 4))
    assert 0.5 * flops.forward < twice.again < flops.forward and twice.model == flops.model


def test_units_are_all_parameters_once():
    _, unet = SMALL.imagen()
    groups, buffers = units(SMALL)
    assert sum(group.numel for group in groups) == sum(p.numel() for p in unet.parameters())
    assert buffers == sum(b.nbytes for b in unet.buffers()) > 0
    assert all(group.shard_numel(1) == group.numel for group in groups)


# Time


def test_the_time_of_a_gpu_alone():
    setup, card = Setup(SMALL, 4, ema=True), CARDS["h100"]
    rate = from_mfu(setup, card, 0.5)
    assert rate.assumed and rate.seconds_per_image == count_flops(SMALL).run / (0.5 * 989e12)
    numel = sum(unit.numel for unit in units(SMALL)[0])
    found = times(setup, "ddp", rate, card, FREE, 0.5)
    assert found.compute == 4 * rate.seconds_per_image and found.waited == found.exchange == found.sent == 0
    # Adam reads four values and writes three, the average reads two and writes one.
    assert found.optimizer == pytest.approx(40 * numel / (0.5 * 3350e9))
    assert found.step == found.compute + found.optimizer and found.efficiency == 1
    assert found.images_per_second == pytest.approx(4 / found.step)


def test_replicas_wait_for_what_the_backward_pass_does_not_hide():
    # So wide that there is more than one bucket.
    network = replace(SMALL, settings={**SMALL.settings, "dim": 128})
    setup, card = Setup(network, 4, gpus=16), CARDS["h100"]
    broadcast, reduce = collectives(setup, "ddp")
    rate = Rate(1.0, "", True, True)
    assert reduce.parts > 2
    backward = 4 * count_flops(network).backward / count_flops(network).run
    for seconds in (0.5 * backward, 3 * backward):
        slow = Links(1e30, reduce.sent_between / seconds, 0.0, 0.0)
        found = times(setup, "ddp", rate, card, slow, 1.0)
        bare = slow.seconds(broadcast) + seconds / reduce.parts
        rest = seconds - seconds / reduce.parts
        first = slow.seconds(broadcast)
        assert found.exchange == pytest.approx(seconds + first)
        assert found.waited == pytest.approx(bare + max(0.0, rest - backward), rel=1e-6)
        assert found.optimizer == 0
    assert found.efficiency == pytest.approx(1 - found.waited / found.step) and found.efficiency < 0.7


def test_sharded_ranks_wait_for_the_first_weights_and_the_last_gradients():
    setup, card, rate = Setup(SMALL, 4, gpus=8, accumulate=2), CARDS["h100"], Rate(1e3, "", True, True)
    found = collectives(setup, "fsdp")
    links = Links(1e6, 1e6, 0.0, 0.0)  # slow, yet there is time enough to hide all that can be
    *_, rest = units(SMALL)[0]
    size = rest.shard_numel(8) * 8
    first, gathered = found[0], Collective("all_gather", 2 * size, 8, 1, "forward", False)
    last = [c for c in found if c.when == "backward" and c.kind == "all_gather"][-1]
    expected = 2 * (links.seconds(first) + links.seconds(gathered) + links.seconds(last))
    expected += links.seconds(replace(gathered, kind="reduce_scatter", bytes=4 * size))
    assert times(setup, "fsdp", rate, card, links, 1.0).waited == pytest.approx(expected)
    assert times(setup, "fsdp", rate, card, links, 1.0).compute == 2 * 4 * 1e3


# A measured profile


EPYC = Card("AMD EPYC", 23, 0.4, 40, 1, 1, "cpu")


def recent_results():
    for path in sorted(folder_of_results().glob("**/cpu-*.json")):
        cases = [case for case in json.loads(path.read_text())["cases"] if case["section"] == "training"]
        if any(case["name"] == "quickstart-base@16" for case in cases):
            return path, cases
    raise AssertionError("no committed results have a training")


def test_a_measured_profile_says_how_fast_it_is():
    path, cases = recent_results()
    setup = Setup(replace(SMALL, name="quickstart-base@16"), 30, device="cpu")
    rate = from_profile(setup, EPYC, path)
    ours = [c for c in cases if c["name"] == "quickstart-base@16" and c["variant"].startswith("ours")]
    nearest = [c["seconds"]["median"] for c in ours if c["shape"].startswith("b32-")]
    assert rate.seconds_per_image == min(nearest) / 32
    assert not rate.assumed and path.name in rate.source and "batch 32" in rate.source and "AMD EPYC" in rate.source
    # What the suite did not compute twice takes longer by its FLOPs.
    twice = from_profile(replace(setup, checkpoint_levels=(0, 1, 2)), EPYC, path)
    flops = count_flops(SMALL, (0, 1, 2))
    assert twice.seconds_per_image / rate.seconds_per_image == pytest.approx(flops.run / flops.model)
    assert from_profile(replace(setup, network=SMALL), EPYC, path, "quickstart-base@16") == rate


def test_a_measured_profile_is_named_in_the_output(capsys, tmp_path):
    path, _ = recent_results()
    card = tmp_path / "card.json"
    values = {"name": "AMD EPYC", "memory_gib": 23, "tflops": 0.4, "memory_gbps": 40, "device": "cpu"}
    card.write_text(json.dumps({**values, "link_gbps": 1, "node_link_gbps": 1}))
    words = [*TINY, "--card", str(card), "--profile", str(path), "--profile-network", "quickstart-base@16"]
    out = plan(capsys, *words)
    assert "computing, ms [measured]" in out and f"Measured:\n  {path.name}" in out and "TFLOP/s" not in out
    found = as_json(capsys, *words)
    assert path.name in found["measured"]["seconds_per_image"] and "seconds_per_image" not in found["assumed"]


@pytest.mark.parametrize(
    "content, words, why",
    [
        ("{", [], "not valid JSON"),
        ("[]", [], "must hold a JSON object"),
        ("{}", [], "not a result file"),
        ('{"machine": {"device": "NVIDIA H200"}, "cases": []}', [], "has no training of BaseTest@16; it has none"),
        (
            '{"machine": {"device": "AMD EPYC"}, "cases": []}',
            [],
            "was measured on 'AMD EPYC', but the plan is for H200",
        ),
        (None, [], "there is no file"),
    ],
)
def test_profiles_that_do_not_fit_are_refused(capsys, tmp_path, content, words, why):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    assert why in refusal(capsys, *TINY, "--profile", str(path), *words)


# The command


def test_the_table_has_a_column_for_each_strategy_and_marks_what_is_assumed(capsys):
    lines = plan(capsys, *TINY, "--gpus", "16", "--ema").splitlines()
    assert lines[0].startswith("BaseTest@16: ") and lines[0].endswith(
        "on 16 x H200, 2 nodes; 2 images a GPU: 32 a step"
    )
    rows = {line[:44].strip(): line[44:].split() for line in lines if line[44:].strip()}
    assert rows["An optimizer step"] == rows["Memory of a GPU, GiB"] == ["ddp", "fsdp", "hybrid"]
    assert rows["fits into 127 GiB [assumed]"] == ["yes"] * 3
    assert rows["averages (EMA)"] == rows["weights"] and "computing, ms [assumed]" in rows
    assert any("40% of 989 TFLOP/s" in line for line in lines[lines.index("Assumed, not measured:") :])


def test_one_gpu_has_one_column_and_no_links(capsys):
    out = plan(capsys, *TINY)
    assert "one GPU" in out and "links reach" not in out and "sent by" not in out


def test_json_is_the_same_plan(capsys):
    words = [*TINY, "--gpus", "16", "--captions", "5000", "--t5", "t5_large", "--accumulate", "3"]
    found = as_json(capsys, *words)
    assert found["setup"]["batch"] == 2 and found["setup"]["accumulate"] == 3
    for name in ("ddp", "fsdp", "hybrid"):
        strategy = found["strategies"][name]
        rate = strategy["time"]["images_per_second"]
        assert rate == pytest.approx(2 * 16 * 3 / strategy["time"]["step"])
        assert strategy["time"]["days"] == pytest.approx(1e6 / rate / 86400)
        # Two nodes; a picture of 50 000 bytes and a caption of 20 tokens of 1024 half-precision numbers.
        assert strategy["read_bytes_per_second_and_node"] == pytest.approx(rate / 2 * (50e3 + 20 * 1024 * 2 + 36))
    data = found["data"]
    assert data["caption_bytes"] == 5000 * (20 * 1024 * 2 + 36)
    assert data["padded_float32_caption_bytes"] == 5000 * 64 * 1024 * 4
    assert data["picture_bytes"] == 5000 * 50e3
    assert found["assumed"]["tokens_per_caption"] == 20 and found["measured"] == {}


def test_captions_take_what_a_store_takes():
    # The figures of docs/captions.md.
    assert Data(12_000_000, 1.0, 20, 2048, 64).bytes_per_caption == 81_956
    assert Data(48, 1.0, 6, 64, 64).bytes_per_caption == 804
    assert Data(12_000_000, 1.0, 32, 2048, 64).captions == pytest.approx(1.57e12, rel=0.01)


def test_given_links_and_shares_are_used(capsys):
    words = [*TINY, "--gpus", "16", "--strategy", "ddp"]
    slow = as_json(capsys, *words, "--node-link-gbps", "1", "--link-efficiency", "0.5")
    fast = as_json(capsys, *words, "--node-link-gbps", "800", "--link-efficiency", "1", "--usable-memory", "0.5")
    exchange = [found["strategies"]["ddp"]["time"]["exchange"] for found in (slow, fast)]
    assert list(slow["strategies"]) == ["ddp"] and exchange[0] > exchange[1]
    largest = [found["strategies"]["ddp"]["memory"]["largest_batch"] for found in (slow, fast)]
    assert largest[0] == pytest.approx(1.8 * largest[1], rel=0.01)


def test_gathering_in_bfloat16_sends_less(capsys):
    sent = [
        as_json(capsys, *TINY, "--gpus", "8", "--strategy", "fsdp", "--gather", gather)["strategies"]["fsdp"]["time"]
        for gather in ("float32", "bfloat16")
    ]
    assert 0.6 < sent[1]["sent"] / sent[0]["sent"] < 0.7  # two gatherings of three messages


def trained(folder, **further):
    """A training directory's settings, as a training of a cascade at 16 and 32 pixels writes them."""
    unets = [get_default_args(BaseTest), get_default_args(SuperTest)]
    imagen = {"image_sizes": [16, 32], "text_encoder_name": "t5_large", "text_embed_dim": None}
    values = {"unets": unets, "imagen": imagen, "batch_size": 32, "ranks": 4, "parallel": "fsdp", "unet_number": 2}
    values["checkpoint_levels"] = [0]
    settings = TrainingSettings(accumulate=3, ema_decay=0.99)
    settings.save(folder / "config.json", **{**values, **further})
    return folder


@pytest.mark.parametrize("file", ["", "config.json"])
def test_the_settings_of_a_training_are_planned(capsys, tmp_path, file):
    path = str(trained(tmp_path) / file)
    found = as_json(capsys, "--config", path, "--images", "10")
    setup = found["setup"]
    assert {name: setup[name] for name in ("batch", "gpus", "accumulate", "ema", "checkpoint_levels")} == {
        "batch": 8,
        "gpus": 4,
        "accumulate": 3,
        "ema": True,
        "checkpoint_levels": [0],
    }
    assert setup["network"]["name"] == "unet-2@32" and setup["network"]["settings"]["text_embed_dim"] == 1024
    assert setup["network"]["settings"]["lowres_cond"] and list(found["strategies"]) == ["fsdp"]


def test_the_command_line_has_the_last_word(capsys, tmp_path):
    words = ["--config", str(trained(tmp_path)), "--images", "10", "--unet-number", "1", "--gpus", "2", "--batch", "5"]
    found = as_json(capsys, *words, "--strategy", "all", "--accumulate", "1", "--checkpoint-levels", "1")
    setup = found["setup"]
    assert (setup["batch"], setup["gpus"], setup["accumulate"], setup["checkpoint_levels"]) == (5, 2, 1, [1])
    assert setup["network"]["name"] == "unet-1@16" and list(found["strategies"]) == ["ddp", "fsdp"]


def test_a_parameters_folder_is_planned(capsys, tmp_path):
    for name, values in (
        ("imagen_params_1.json", {"image_sizes": [16], "text_encoder_name": "t5_small"}),
        ("unet_0_params_1.json", get_default_args(BaseTest)),
    ):
        (tmp_path / name).write_text(json.dumps(values))
    found = as_json(capsys, "--config", str(tmp_path), "--images", "10", "--batch", "4")
    assert found["setup"]["network"]["name"] == "unet-1@16" and found["setup"]["network"]["side"] == 16


def test_a_training_directory_without_settings_is_planned(capsys, tmp_path):
    (tmp_path / "parameters").mkdir()
    test_a_parameters_folder_is_planned(capsys, tmp_path / "parameters")
    found = as_json(capsys, "--config", str(tmp_path), "--images", "10", "--batch", "4")
    assert found["setup"]["network"]["name"] == "unet-1@16"


def test_on_a_cpu_it_is_float32_as_in_training(capsys, tmp_path, monkeypatch):
    setups = []

    def stop(setup, *_, **__):
        setups.append(setup)
        raise ValueError("enough")

    monkeypatch.setattr(plan_command, "from_mfu", stop)
    card = {"name": "CPU", "memory_gib": 8, "tflops": 1, "memory_gbps": 20, "link_gbps": 10, "node_link_gbps": 10}
    (tmp_path / "cpu.json").write_text(json.dumps({**card, "device": "cpu"}))
    words = ["--images", "10", "--card", str(tmp_path / "cpu.json")]
    refusal(capsys, "--unet", "BaseTest", "--batch", "1", *words)
    refusal(capsys, "--unet", "BaseTest", "--batch", "1", "--images", "10")
    refusal(capsys, "--config", str(trained(tmp_path, precision="bfloat16")), *words)
    assert [(setup.precision, setup.gather) for setup in setups] == [("float32", 4), ("bfloat16", 2), ("bfloat16", 2)]
    trained(tmp_path, precision="float16")
    assert "precision in the --config must be null or bfloat16" in refusal(capsys, "--config", str(tmp_path), *words)


def test_a_unet_in_a_file(capsys, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"dim": 16, "dim_mults": [1, 2]}))
    words = ["--unet", str(path), "--batch", "1", "--images", "10"]
    assert as_json(capsys, *words, "--side", "8")["setup"]["network"]["name"] == "mine@8"
    assert "--side is needed" in refusal(capsys, *words)
    path.write_text('{"dimension": 16}')
    assert "cannot be built as a U-Net" in refusal(capsys, *words, "--side", "8")
    path.write_text('{"dim": 15}')
    assert "multiple of 8" in refusal(capsys, *words, "--side", "8")


@pytest.mark.parametrize(
    "words, why",
    [
        (["--images", "1"], "--unet is needed"),
        (["--unet", "Huge", "--images", "1", "--batch", "1"], "--unet must be Base, Super"),
        (["--unet", "Base", "--images", "1"], "--batch is needed"),
        ([*TINY, "--gpus", "12"], "a multiple of it, got 12"),
        ([*TINY, "--gpus", "0"], "gpus must be a whole number of at least 1"),
        ([*TINY, "--gpus", "8", "--strategy", "hybrid"], "choose from ddp, fsdp, or all"),
        ([*TINY, "--card", "v100"], "--card must be a100, h100, h200, b200"),
        ([*TINY, "--card", "none.json"], "there is no file none.json"),
        ([*TINY, "--mfu", "1.5"], "--mfu must lie in (0, 1], got 1.5"),
        ([*TINY, "--link-gbps", "-1"], "link_gbps of a card must be a positive number"),
        ([*TINY, "--link-gbps", "inf"], "link_gbps of a card must be a positive number, and finite, got inf"),
        ([*TINY, "--usable-memory", "0"], "usable-memory must lie in (0, 1]"),
        ([*TINY, "--checkpoint-levels", "a"], "--checkpoint-levels must be numbers"),
        ([*TINY, "--checkpoint-levels", "3"], "levels 0 to 2"),
        ([*TINY, "--side", "15"], "multiples of 2"),
        ([*TINY, "--t5", "t6"], "t6"),
        ([*TINY, "--max-tokens", "300"], "--max-tokens must lie in 1 to 256"),
        ([*TINY, "--tokens-per-caption", "65"], "--tokens-per-caption must lie in (0, 64]"),
        ([*TINY, "--captions", "0"], "--captions must be at least 1"),
        ([*TINY, "--bytes-per-picture", "inf"], "--bytes-per-picture must be positive and finite, got inf"),
        ([*TINY, "--unet-number", "3"], "--unet-number is of a U-Net in the --config"),
        ([*TINY, "--profile-network", "Base@64"], "--profile-network is of a network in the --profile"),
        (["--unet", "BaseTest", "--batch", "1", "--images", "0"], "--images must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, words, why):
    assert why in refusal(capsys, *words)


def test_settings_that_do_not_fit_are_refused(capsys, tmp_path):
    path = str(trained(tmp_path))
    assert "cannot be shared out to 3 GPUs" in refusal(capsys, "--config", path, "--images", "1", "--gpus", "3")
    assert "1 to 2; got 5" in refusal(capsys, "--config", path, "--images", "1", "--unet-number", "5")
    trained(tmp_path, unet_number=None)
    assert "must say which U-Net" in refusal(capsys, "--config", path, "--images", "1")
    for wrong, why in (
        ({"batch_size": "32"}, "batch_size in the --config must be a whole number of at least 1, got '32'"),
        ({"ranks": [4]}, "ranks in the --config"),
        ({"checkpoint_levels": 1}, "checkpoint_levels in the --config"),
        ({"parallel": "tp"}, "parallel in the --config must be ddp or fsdp or hybrid, got 'tp'"),
        ({"imagen": {"image_sizes": []}}, "a number for each in image_sizes, got []"),
        ({"unets": [1, 2]}, "must have the arguments of each U-Net in unets"),
    ):
        trained(tmp_path, **wrong)
        assert why in refusal(capsys, "--config", path, "--images", "1")
    (tmp_path / "config.json").write_text("{}")
    assert "lacks unets" in refusal(capsys, "--config", path, "--images", "1", "--batch", "1")
    assert "there is no file" in refusal(capsys, "--config", str(tmp_path / "no.json"), "--images", "1")


def test_a_card_in_a_file_must_be_whole():
    values = {"name": "X", "memory_gib": 1, "tflops": 1, "memory_gbps": 1, "link_gbps": 1, "node_link_gbps": 1}
    assert Card.of(values, "here").device == "cuda"
    for wrong, why in (
        ({"tflops": None}, "tflops of a card must be a positive number"),
        ({"device": "tpu"}, "cuda or cpu"),
        ({"price": 1}, "here has price"),
    ):
        with pytest.raises(ValueError, match=why):
            Card.of({**values, **wrong}, "here")
    del values["tflops"]
    with pytest.raises(ValueError, match="lacks tflops"):
        Card.of(values, "here")
