"""What is logged of a training: means over steps and ranks, speed without pauses, what the progress bar shows."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from rank_processes import run_ranks
from torch.utils.flop_counter import FlopCounterMode
from training_runs import make_imagen

from minimagen_fast.parallel import shard
from minimagen_fast.ranks import Ranks, open_ranks
from minimagen_fast.run_log import read_run
from minimagen_fast.throughput import Clock, peak_memory, training_flops
from minimagen_fast.Unet import Unet
from minimagen_fast.watching import Watch

CPU = torch.device("cpu")
NO_BAD = torch.zeros((), dtype=torch.int64)


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def watch(folder, imagen=None, numbers=(1,), ranks=None, **options):
    imagen = make_imagen(max(numbers)) if imagen is None else imagen
    return Watch(folder, imagen, numbers, ranks or Ranks(), **{"log_interval": 1, "steps": None, **options})


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def batch(*pairs):
    losses, times = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.tensor(losses, dtype=torch.float32), torch.tensor(times, dtype=torch.int64)


def step(seen, number=1, norm=1.0, bad=NO_BAD, rates=(0.1,), epoch=0):
    return seen.step(number, epoch, number, torch.tensor(norm), list(rates), bad)


# Losses and gradients


def test_losses_are_means_over_all_images_since_the_last_line_and_by_timestep(tmp_path):
    seen = watch(tmp_path, log_interval=2)  # 25 timesteps: 0 to 2 are the first tenth
    seen.losses(1, 3, *batch((1.0, 0), (2.0, 2), (6.0, 3)))
    assert step(seen, 1, norm=3.0) is None and lines(tmp_path) == []
    seen.losses(1, 1, *batch((7.0, 24)))
    record = step(seen, 2, norm=5.0, rates=(0.1, 0.2), epoch=4, bad=torch.tensor(6))

    assert lines(tmp_path) == [record]
    assert record["unets"] == {"1": {"loss": 4.0, "loss_by_timestep": [1.5, 6.0, *[None] * 7, 7.0]}}
    assert (record["kind"], record["step"], record["epoch"], record["batch"]) == ("step", 2, 4, 2)
    assert record["grad_norm"] == 4.0 and record["learning_rates"] == [0.1, 0.2] and record["bad_steps"] == 6
    assert record["images"] == 4 and record["ranks"] == 1 and record["mfu"] is None
    assert record["seconds_to_end"] is None

    seen.losses(1, 1, *batch((3.0, 10)))
    step(seen, 3)
    record = step(seen, 4)
    assert record["unets"]["1"]["loss"] == 3.0, "the line before is forgotten"
    assert record["images"] == 1 and record["grad_norm"] == 1.0
    seen.close()


def test_every_timestep_has_its_tenth(tmp_path):
    seen = watch(tmp_path)
    seen.losses(1, 25, *batch(*((float(time), time) for time in range(25))))
    tenths = step(seen)["unets"]["1"]["loss_by_timestep"]
    assert tenths == [np.mean([time for time in range(25) if time * 10 // 25 == place]) for place in range(10)]
    seen.close()


def test_unets_are_told_apart_and_a_batch_of_both_counts_once(tmp_path):
    imagen = make_imagen(2, timesteps=[20, 100])
    time = Time()
    seen = watch(tmp_path, imagen, (1, 2), now=time)
    for number, loss in ((1, 2.0), (2, 4.0)):
        seen.losses(number, 2, *batch((loss, 19), (loss, 19)))
    time.now += 4.0
    record = step(seen)
    assert record["unets"]["1"]["loss"] == 2.0 and record["unets"]["1"]["loss_by_timestep"][9] == 2.0
    assert record["unets"]["2"]["loss"] == 4.0 and record["unets"]["2"]["loss_by_timestep"][1] == 4.0
    assert record["images"] == 2 and record["images_per_second"] == 0.5
    flops = 2 * (training_flops(imagen, 1) + training_flops(imagen, 2))
    assert record["flops_per_second"] == flops / 4.0
    seen.close()


def test_what_is_not_finite_is_null_and_spoils_no_other_line(tmp_path):
    seen = watch(tmp_path)
    seen.losses(1, 2, *batch((math.nan, 0), (1.0, 24)))
    record = step(seen, 1, norm=math.inf)
    assert record["unets"]["1"]["loss"] is None and record["grad_norm"] is None
    assert record["unets"]["1"]["loss_by_timestep"][0] is None and record["unets"]["1"]["loss_by_timestep"][9] == 1.0
    assert "NaN" not in (tmp_path / "log.jsonl").read_text() and seen.shown()["loss"] == "not finite"
    seen.losses(1, 1, *batch((1.0, 0)))
    assert step(seen, 2)["unets"]["1"]["loss"] == 1.0
    seen.close()


def test_the_norm_is_that_of_the_steps_that_were_made(tmp_path):
    seen = watch(tmp_path, log_interval=3)
    for number, norm in enumerate((2.0, math.nan, 4.0), start=1):
        record = step(seen, number, norm=norm)
    assert record["grad_norm"] == 3.0
    seen.close()


def test_a_batch_without_images_on_this_rank_is_none(tmp_path):
    seen = watch(tmp_path)
    seen.losses(1, 5, *batch())
    record = step(seen)
    assert record["unets"]["1"]["loss"] is None and record["images"] == 5
    seen.close()


def test_nothing_waits_for_the_device_between_two_lines(tmp_path):
    imagen = make_imagen().to("meta")  # where nothing can be read
    seen = watch(tmp_path, imagen, log_interval=100)
    seen.losses(1, 2, torch.rand(2, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta"))
    bad = torch.zeros((), dtype=torch.int64, device="meta")
    assert seen.step(1, 0, 1, torch.rand((), device="meta"), [0.1], bad) is None
    with pytest.raises((RuntimeError, NotImplementedError)):
        seen.step(100, 0, 1, torch.rand((), device="meta"), [0.1], bad)
    seen.close()


@pytest.mark.gpu
def test_nothing_waits_for_a_cuda_device_between_two_lines(tmp_path):
    device = torch.device("cuda")
    seen = watch(tmp_path, make_imagen().to(device), log_interval=2)
    losses, times = (value.to(device) for value in batch((1.0, 0), (3.0, 24)))
    norm, bad = torch.ones((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen.losses(1, 2, losses, times)
        assert seen.step(1, 0, 1, norm, [0.1], bad) is None
        seen.losses(1, 2, losses, times)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with seen.paused():
        pass
    record = seen.step(2, 0, 2, norm, [0.1], bad)
    assert record["unets"]["1"]["loss"] == 2.0 and record["grad_norm"] == 1.0
    assert 0 < record["memory_bytes"] <= torch.cuda.max_memory_allocated(device)
    seen.close()


# Speed


def test_speed_leaves_out_pauses_and_the_time_to_end_does_not(tmp_path):
    time, imagen = Time(), make_imagen()
    seen = watch(tmp_path, imagen, log_interval=2, steps=12, precision_peak_flops=1e6, now=time)
    time.now += 1000  # what comes before the first batch is no training
    with seen.paused():
        time.now += 50
    time.now += 1
    seen.waited(1.0)
    seen.losses(1, 8, *batch((1.0, 0)))
    time.now += 2
    step(seen, 1)
    with seen.paused(), seen.paused():
        time.now += 30
    seen.waited(0.5)
    seen.losses(1, 8, *batch((1.0, 0)))
    time.now += 2
    record = step(seen, 2)
    # 1 s of waiting, 2 s, and again 2 s; of which 1.5 s were waited.
    assert record["seconds"] == 5.0 and record["images_per_second"] == 16 / 5 and record["seconds_per_step"] == 2.5
    assert record["data_wait_share"] == pytest.approx(1.5 / 5)
    assert record["flops_per_second"] == 16 * training_flops(imagen, 1) / 5
    assert record["mfu"] == pytest.approx(record["flops_per_second"] / 1e6)
    assert record["seconds_to_end"] == pytest.approx(10 * (2.5 + 30 / 2))

    time.now += 4
    step(seen, 3)
    record = step(seen, 4)
    assert record["seconds"] == 4.0 and record["data_wait_share"] == 0.0 and record["images"] == 0
    assert record["seconds_to_end"] == pytest.approx(8 * (2.0 + 30 / 4))
    time.now += 1
    seen.step(20, 0, 1, torch.tensor(1.0), [0.1], NO_BAD)
    assert seen._last["seconds_to_end"] == 0.0, "more steps than were expected"
    seen.close()


def test_a_pause_ends_with_an_error_too():
    time = Time()
    clock = Clock(time)
    clock.begin(3.0)
    with pytest.raises(KeyError), clock.paused():
        time.now += 5
        raise KeyError
    time.now += 1
    assert clock.lap() == (4.0, 5.0)
    time.now += 2
    assert clock.lap() == (2.0, 0.0)


def test_a_lap_that_begins_in_a_pause_is_not_shortened_by_what_was_before():
    time = Time()
    clock = Clock(time)
    with clock.paused():
        time.now += 7
        clock.begin()
        time.now += 1
    time.now += 2
    assert clock.lap() == (2.0, 1.0)


@pytest.mark.parametrize("number", [1, 2])
def test_flops_are_those_of_a_real_training_step(number):
    imagen = make_imagen(2)
    expected = {}
    for images in (1, 2):
        imagen.accelerate("reference")
        with FlopCounterMode(display=False) as counter:
            words = {"text_embeds": torch.randn(images, 3, 512), "text_masks": torch.ones(images, 3, dtype=torch.bool)}
            imagen(torch.rand(images, 3, 16, 16), **words, unet_number=number).backward()
        expected[images] = counter.get_total_flops()

    torch.manual_seed(4)
    expected_draw = torch.rand(3)
    torch.manual_seed(4)
    counted = training_flops(imagen, number)
    assert torch.equal(torch.rand(3), expected_draw), "random numbers of the training were used up"
    # Padding is not multiplied by the weights of the text in a real step, as far as the caption is shorter.
    assert counted == pytest.approx(expected[1], rel=0.01)
    assert 2 * counted == pytest.approx(expected[2], rel=0.01)
    imagen.accelerate("reference", checkpoint_levels=[0, 1])
    assert training_flops(imagen, number) == counted, "what is computed twice is no more of a model"


def test_memory_of_this_process():
    before = peak_memory(CPU)
    assert 2**26 < before < 2**40
    held = torch.ones(200 * 2**20, dtype=torch.uint8)
    grown = peak_memory(CPU)
    assert grown >= before and held.numel() < grown


# Ranks


def on_two_ranks(folder):
    with open_ranks(CPU) as ranks:
        imagen = make_imagen()
        with pytest.raises(FileNotFoundError):  # all learn at once that rank 0 cannot write
            watch(folder / "not there", imagen, ranks=ranks)
        whole = training_flops(imagen, 1)
        shard(imagen.unets[0], ranks, CPU, "fsdp")
        time = Time()
        seen = watch(folder, imagen, ranks=ranks, now=time, precision_peak_flops=1e9)
        seen.start(0, {"a": 1})
        seen.waited(1.0 + 2 * ranks.rank)
        # One image here, three there, in different tenths.
        mine = [(2.0, 0)] if ranks.first else [(3.0, 24), (4.0, 24), (5.0, 12)]
        seen.losses(1, 4, *batch(*mine))
        time.now += 4.0
        record = step(seen, norm=7.0, bad=torch.tensor(3))
        seen.event(1, f"said by rank {ranks.rank}")
        seen.validation(1, {1: 0.5})
        seen.close()
    return record, whole, peak_memory(CPU)


def test_what_ranks_have_seen_is_one(tmp_path):
    (first, flops, memory), (second, _, other_memory) = run_ranks(on_two_ranks, 2, tmp_path)
    written = lines(tmp_path)
    assert [line["kind"] for line in written] == ["start", "step", "event", "validation"], "only rank 0 writes"
    assert written[1] == first and written[2]["text"] == "said by rank 0"
    for record in (first, second):
        assert record["unets"]["1"]["loss"] == 14 / 4
        assert record["unets"]["1"]["loss_by_timestep"] == [2.0, *[None] * 3, 5.0, *[None] * 4, 3.5]
        assert record["grad_norm"] == 7.0 and record["bad_steps"] == 3, "not summed: they are the same on all"
        assert record["ranks"] == 2 and record["images"] == 4
    # Rank 0 began its time one second before, and rank 1 waited three.
    assert first["seconds"] == 5.0 and first["data_wait_share"] == pytest.approx(3 / 5)
    assert first["flops_per_second"] == 4 * flops / 5 and first["mfu"] == pytest.approx(4 * flops / 5 / 2e9)
    assert first["memory_bytes"] == second["memory_bytes"] <= max(memory, other_memory)
    assert first["memory_bytes"] > 2**26
    assert written[0]["unets"]["1"]["parameters"] == sum(p.numel() for p in make_imagen().unets[0].parameters())


# Start, end, continuing, what is shown


class OfItsOwn(Unet):
    def __init__(self, width):
        super().__init__(dim=width, dim_mults=(1,), num_resnet_blocks=1, layer_attns=False, layer_cross_attns=False)


def test_the_flops_of_a_unet_that_cannot_be_made_again_are_not_told(tmp_path):
    imagen = make_imagen()
    imagen.unets[0] = OfItsOwn(8)
    with pytest.warns(UserWarning, match="FLOPs of U-Net 1, a OfItsOwn, cannot be counted"):
        seen = watch(tmp_path, imagen, precision_peak_flops=1e9)
    seen.start(0, {})
    seen.losses(1, 1, *batch((1.0, 0)))
    record = step(seen)
    assert record["flops_per_second"] is None and record["mfu"] is None and record["images"] == 1
    assert lines(tmp_path)[0]["unets"]["1"]["flops_per_image"] is None
    seen.close()


def test_at_the_end_the_steps_since_the_last_line_have_one_too(tmp_path):
    time = Time()
    seen = watch(tmp_path, log_interval=10, steps=14, now=time)
    for number in range(1, 14):
        seen.losses(1, 2, *batch((float(number), 0)))
        time.now += 2
        step(seen, number, norm=float(number))
    seen.end()
    seen.end()
    first, last = lines(tmp_path)
    assert (first["step"], first["images"], last["step"], last["batch"]) == (10, 20, 13, 13)
    assert last["unets"]["1"]["loss"] == last["grad_norm"] == 12.0
    assert (last["images"], last["seconds"], last["images_per_second"], last["seconds_to_end"]) == (6, 6.0, 1.0, 2.0)
    seen.close()


def test_a_run_that_goes_on_appends_to_the_log(tmp_path):
    for first in (1, 2):
        seen = watch(tmp_path)
        seen.start(first - 1, {"folder": tmp_path, "precision": None})
        seen.losses(1, 1, *batch((float(first), 0)))
        step(seen, first)
        seen.samples(first, tmp_path / "samples" / "a.png")
        seen.close()
    read = read_run(tmp_path / "log.jsonl")
    assert [record["unets"]["1"]["loss"] for record in read.steps] == [1.0, 2.0]
    assert [record["step"] for record in read.starts] == [0, 1]
    start = read.starts[0]
    assert start["settings"] == {"folder": str(tmp_path), "precision": None} and start["ranks"] == 1
    assert start["versions"]["torch"] == torch.__version__ and start["machine"]["threads"] == torch.get_num_threads()
    imagen = make_imagen()
    assert start["unets"]["1"] == {
        "parameters": sum(p.numel() for p in imagen.unets[0].parameters()),
        "image_size": 8,
        "timesteps": 25,
        "flops_per_image": training_flops(imagen, 1),
    }
    assert [record["file"] for record in read.samples] == ["samples/a.png"] * 2


def test_the_progress_bar_shows_the_last_line_in_words(tmp_path):
    time = Time()
    seen = watch(tmp_path, make_imagen(2), (1, 2), steps=3700, now=time)
    assert seen.shown() == {}
    for number in (1, 2):
        seen.losses(number, 8, *batch((number / 8, 0)))
    time.now += 1
    step(seen, 100, norm=12.3456)
    shown = seen.shown()
    assert shown.pop("memory").endswith("B")
    assert shown == {"loss": "0.125/0.25", "norm": "12.35", "images/s": "8", "left": "1:00:00"}
    seen.close()


@pytest.mark.parametrize("options", [{"log_interval": 0}, {"precision_peak_flops": 0.0}])
def test_wrong_arguments_are_named(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        watch(tmp_path, **options)


# TensorBoard


class Writer:
    made: list = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.told, self.closed = folder, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, tag, value, step):
        self.told.append((tag, value, step))

    def add_image(self, tag, pixels, step, dataformats):
        self.told.append((tag, (pixels.shape, pixels.dtype, dataformats), step))

    def add_text(self, tag, text, step):
        self.told.append((tag, text, step))

    def close(self):
        self.closed = True


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.setattr(Writer, "made", [])
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return Writer


def use_board(folder, time=None):
    seen = watch(
        folder, make_imagen(2), (2,), log_interval=5, tensorboard=True, now=time or Time(), precision_peak_flops=1e9
    )
    seen.start(0, {})
    seen.losses(2, 8, *batch((0.5, 0), (1.0, 24), (math.nan, 5)))
    return seen


def test_tensorboard_gets_every_value_under_its_tag(tmp_path, writer):
    time = Time()
    seen = use_board(tmp_path, time)
    time.now += 2
    record = step(seen, 5, rates=(0.1, 0.2), epoch=3)
    seen.validation(5, {2: 0.25})
    Image.new("RGB", (5, 4)).save(tmp_path / "grid.png")
    seen.samples(5, tmp_path / "grid.png")
    seen.event(6, "stopped")
    (board,) = writer.made
    assert (board.folder, board.purge_step, board.closed) == (str(tmp_path / "tensorboard"), 5, False)
    told = {tag: (value, at) for tag, value, at in board.told}
    assert len(told) == len(board.told)
    assert told == {
        "gradient/norm": (1.0, 5),
        "gradient/bad_steps": (0, 5),
        "speed/images_per_second": (4.0, 5),
        "speed/seconds_per_step": (2.0, 5),
        "speed/data_wait_share": (0.0, 5),
        "speed/flops_per_second": (record["flops_per_second"], 5),
        "speed/mfu": (record["mfu"], 5),
        "memory/bytes": (record["memory_bytes"], 5),
        "progress/epoch": (3, 5),
        "learning_rate/group_0": (0.1, 5),
        "learning_rate/group_1": (0.2, 5),
        "loss_by_timestep_unet_2/0.0-0.1": (0.5, 5),
        "loss_by_timestep_unet_2/0.9-1.0": (1.0, 5),
        "validation_loss/unet_2": (0.25, 5),
        "samples": (((4, 5, 3), np.uint8, "HWC"), 5),
        "events": ("stopped", 6),
    }, "what is null is left out"
    seen.close()
    assert board.closed


def test_tensorboard_forgets_the_steps_that_are_done_over_and_not_the_one_that_is_continued(tmp_path, writer):
    seen = use_board(tmp_path)
    seen.event(10, "continued from step 10")
    assert writer.made[0].purge_step == 11
    seen.close()


@pytest.mark.parametrize("failing", ["add_scalar", "close"])
def test_where_tensorboard_fails_the_training_goes_on(tmp_path, writer, monkeypatch, failing):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(writer, failing, full)
    time = Time()
    seen = use_board(tmp_path, time)
    time.now += 2
    with pytest.warns(UserWarning, match="TensorBoard's files in .* end here: no space left") as said:
        step(seen, 5)
        seen.event(5, "goes on")
        seen.close()
    assert len(said) == 1 and [line["kind"] for line in lines(tmp_path)] == ["start", "step", "event"]


def test_without_tensorboard_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'minimagen_fast\[tensorboard\]'"):
        use_board(tmp_path)
    watch(tmp_path).close()


def test_only_the_first_rank_writes_for_tensorboard(tmp_path, writer, monkeypatch):
    monkeypatch.setattr(Ranks, "from_first", lambda self, value: (None, {1: 1}))
    seen = watch(tmp_path, ranks=Ranks(1, 2), tensorboard=True)
    seen.event(1, "said")
    seen.close()
    assert writer.made == [] and list(tmp_path.iterdir()) == []


def test_the_real_tensorboard_reads_it(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    time = Time()
    seen = use_board(tmp_path, time)
    time.now += 2
    step(seen, 5, norm=1.5)
    Image.new("RGB", (5, 4), (255, 0, 0)).save(tmp_path / "grid.png")
    seen.samples(5, tmp_path / "grid.png")
    seen.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("gradient/norm")] == [(5, 1.5)]
    assert board.Images("samples")[0].width == 5
