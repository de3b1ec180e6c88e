"""The table of attention implementations is made from timings; here of a clock that the test winds."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import attention_order
from minimagen_fast.kernels import attention_table
from minimagen_fast.kernels.attention_table import Key

PIXELS = (64, 256)


def clock(case, name):
    """Our kernels win at 256 queries and the library elsewhere; the merge cannot be captured at one batch."""
    if name == "sdpa_merge" and case.shape.startswith("b32"):
        return None
    ours = 1.0 if "-256x" in case.shape else 3.0
    return {"triton": ours, "sdpa_merge": 2.0, "sdpa": 1.5, "xformers": None}[name]


def executed(text):
    namespace = {"__name__": "table"}
    exec(compile(text, "table", "exec"), namespace)
    return namespace


def test_every_key_that_the_u_nets_meet_is_timed():
    found = attention_order.measured(clock)
    assert {(key.shared, key.queries) for key in found} == {
        (shared, pixels) for shared in (False, True) for pixels in attention_table.QUERIES
    }
    assert {key.keys for key in found if not key.shared} == {320}


def test_the_fastest_comes_first_and_what_fails_at_a_batch_is_left_out():
    orders = attention_order.orders(attention_order.measured(clock, PIXELS))
    assert orders[Key(True, 64, 256, 320)] == ("triton", "sdpa")
    assert orders[Key(False, 64, 64, 320)] == ("sdpa", "triton")
    assert len(orders) == 4


def test_ratios_are_averaged_over_the_batches():
    def uneven(case, name):
        return {"triton": 1.0, "sdpa": 4.0 if case.shape.startswith("b2-") else 0.5}.get(name)

    found = attention_order.measured(uneven, PIXELS)
    assert found[Key(True, 64, 64, 64)] == pytest.approx({"triton": 2**0.5, "sdpa": 2.0})


def test_the_module_is_rewritten_and_can_be_again():
    text = attention_order.TABLE.read_text()
    before = executed(text)
    orders = attention_order.orders(attention_order.measured(clock, PIXELS))
    once = attention_order.rewritten(text, orders, "Measured on a card.")
    after = executed(once)
    assert after["MEASURED"] == {tuple(key): order for key, order in orders.items()}
    plain = {"dtype": torch.bfloat16, "masked": False, "training": False}
    assert after["order"](after["key_of"](True, 64, 200, 300), **plain) == ("triton", "sdpa")
    assert after["order"](after["key_of"](True, 64, 10**6, 10**6), **plain) == before["DEFAULT"]
    assert all(len(line) <= 120 for line in once.splitlines())
    again = attention_order.rewritten(once, dict(list(orders.items())[:1]), "Measured on another.")
    assert len(executed(again)["MEASURED"]) == 1 and "a card" not in again
    assert attention_order.rewritten(again, before["MEASURED"], "x").replace("# x\n", "") == text.replace(
        "MEASURED: dict[Key, Order] = {}", "MEASURED: dict[Key, Order] = {\n}"
    )


def test_a_module_without_the_table_is_refused():
    with pytest.raises(ValueError, match="0 tables MEASURED"):
        attention_order.rewritten("DEFAULT = ()\n", {}, "x")


def test_the_report_has_every_implementation():
    report = attention_order.report(attention_order.measured(clock, PIXELS))
    assert "| shared | 64 | 256 | 320 | 1.00x | – | 1.50x | – |" in report.splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="would time for minutes")
def test_without_a_card_it_says_so(capsys):
    assert attention_order.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("capturable", [True, False])
def test_graphs_are_captured_on_a_stream_of_their_own_or_it_is_said(monkeypatch, capsys, capturable):
    streams, graphs = [], []

    @contextlib.contextmanager
    def stream(new):
        streams.append(new)
        yield
        streams.pop()

    class Timer:
        def __init__(self, call, device, graph=False):
            assert streams == ["a stream"] and call(0) == ("inputs", "sdpa")
            graphs.append(graph)
            if graph and not capturable:
                raise attention_order.NotCapturable("it waits")

        def sample(self):
            return 2.0

    def inputs(device, dtype):
        assert streams, "made on another stream"
        return "inputs"

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "a stream")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(attention_order, "settle", lambda device: None)
    monkeypatch.setattr(attention_order, "Timer", Timer)
    case = SimpleNamespace(name="attention/b2", inputs=inputs, run=lambda *arguments: arguments)
    assert attention_order._seconds(case, "sdpa") == 2.0
    said = capsys.readouterr().err
    if capturable:
        assert graphs == [True] and not said
    else:
        assert graphs == [True, False]
        assert "attention/b2, sdpa: timed with the host's work" in said and "it waits" in said


@pytest.mark.parametrize("words, stops", [("cuDNN Frontend error: No execution plans", False), ("broken", True)])
def test_what_a_library_refuses_is_left_out_and_what_is_broken_is_not(monkeypatch, capsys, words, stops):
    def run(inputs, name):
        raise RuntimeError(words)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(attention_order, "settle", lambda device: None)
    monkeypatch.setattr(attention_order, "_timer", lambda call, device, what: call(0))
    case = SimpleNamespace(name="attention/b2", inputs=lambda device, dtype: {}, run=run)
    with pytest.raises(RuntimeError, match=words) if stops else contextlib.nullcontext():
        assert attention_order._seconds(case, "sdpa") is None
        assert f"attention/b2, sdpa: {words}" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_clock_times_what_can_be_done():
    case = attention_order.attention(1, 64, 64, shared=True)
    assert attention_order._seconds(case, "triton") > 0
    assert attention_order._seconds(case, "sdpa") > 0
