"""The exponential moving average of a module's parameters."""

import signal

import pytest
import torch
from fast_path import Counts, make_unet
from torch import nn

from minimagen_fast.ema import EMA, local


def _wander(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_average_follows_the_formula_with_its_warm_up():
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    ema = EMA(module, 0.5)
    expected = module.weight.detach().double()
    for n in range(20):
        _wander(module)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * module.weight.detach().double()
    with ema.swapped():
        torch.testing.assert_close(module.weight.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_weights_are_averaged_in_float32():
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1)
    ema = EMA(module, 0.999)
    ema.updates = 10**6  # past the warm-up
    with torch.no_grad():
        module.weight.fill_(2)
    for _ in range(693):
        ema.update()
    # 2 - 0.999^693 = 1.5001; in bfloat16 the first step, of 0.001, would have been rounded away, and so every one.
    with ema.swapped():
        assert module.weight.item() == pytest.approx(1.5, abs=0.01)
    assert module.weight.item() == 2


@pytest.mark.parametrize(
    "convert, copies",
    [(lambda unet: None, 0), (lambda unet: unet.to(torch.bfloat16), 1), (lambda unet: unet.mid_block1.bfloat16(), 1)],
    ids=["float32", "bfloat16", "both"],
)
def test_all_parameters_are_averaged_at_once(convert, copies):
    unet = make_unet()
    convert(unet)
    ema = EMA(unet, 0.9)
    with Counts() as seen:
        ema.update()
    assert {name.partition(".")[0]: number for name, number in seen.names.items() if "empty" not in name} == {
        "_foreach_lerp_": 1,
        **({"_foreach_copy_": 1} if copies else {}),
    }


def test_swapped_gives_the_same_tensors_back_also_on_an_error():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = EMA(module, 0.9)
    _wander(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    tensors = [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(RuntimeError, match="inside"), ema.swapped():
        assert not torch.equal(module[0].weight, before["0.weight"])
        raise RuntimeError("inside")
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [parameter.data_ptr() for parameter in module.parameters()] == tensors


def test_ctrl_c_waits_until_the_weights_are_back(monkeypatch):
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    ema = EMA(module, 0.9)
    _wander(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rung = []

    def ringing(value):
        if not rung:
            rung.append(signal.raise_signal(signal.SIGINT))
        return local(value)

    with pytest.raises(KeyboardInterrupt), ema.swapped():
        monkeypatch.setattr("minimagen_fast.ema.local", ringing)
    assert rung and all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_state_goes_on_where_it_was():
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    one = EMA(module, 0.9)
    for _ in range(5):
        _wander(module)
        one.update()
    other = EMA(nn.Linear(3, 2), 0.9)
    other.load_state_dict(one.state_dict())
    assert other.updates == 5
    assert all(torch.equal(a, b) for a, b in zip(one.averages.values(), other.averages.values(), strict=True))
    with pytest.raises(ValueError, match="other parameter names or shapes"):
        EMA(nn.Linear(4, 2), 0.9).load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="lacks averages and updates"):
        other.load_state_dict(module.state_dict())
    other.load_state_dict({"updates": 1, "averages": dict(module.named_parameters())})
    assert not any(value.requires_grad for value in other.averages.values())


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        EMA(nn.Linear(1, 1), decay)
