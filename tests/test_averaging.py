"""`WeightAverage` against explicit weighted sums in float64, a closed form, and misuse."""

import itertools
import math
import re

import pytest
import tiny
import torch
from torch import nn

from hf_radam import WeightAverage
from hf_radam.averaging import move_averages
from hf_radam.sharding import base

STEPS = 60


def walk(steps: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A seeded random walk, (steps, 3): row t is the parameter after step t + 1."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, 3, generator=generator).cumsum(0).to(dtype)


def run(path: torch.Tensor, state: dict | None = None, **options) -> WeightAverage:
    """Average along a path, or along the rest of it after a state."""
    parameter = nn.Parameter(torch.full_like(path[0], 1000.0))  # theta_0: must not be found in any average
    average = WeightAverage([("w", parameter)], **options)
    if state is not None:
        average.load_state_dict(state)
    for step in range(average.last_step + 1, len(path) + 1):
        parameter.data.copy_(path[step - 1])
        average.update(step)
    return average


def weighted_sum(path: torch.Tensor, times: list[int], weights: list[float]) -> torch.Tensor:
    points = torch.stack([path[t - 1].double() for t in times])
    w = torch.tensor(weights, dtype=torch.float64)
    return (w[:, None] * points).sum(0) / w.sum()


# An fp32 average of n points of size 10 rounds each time by about 1e-6 relative: 60 of them stay below this.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start_step", [0, 7])
@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("window", [{"decay": 0.95}, {"half_life_ratio": 0.1}], ids=["fixed", "growing"])
def test_the_average_is_its_weighted_sum(window, every, start_step, dtype):
    path = walk(STEPS, dtype)
    average = run(path, **window, every=every, start_step=start_step)
    times = [t for t in range(1, STEPS + 1) if t > start_step and (t - start_step) % every == 0]
    weights: list[float] = []
    for t in times:
        share = 1 - 0.5 ** (every / (0.1 * (t - start_step))) if weights else 1.0
        weights = [w * (1 - share) for w in weights] + [share]
    if "decay" in window:
        weights = [0.95 ** (times[-1] - t) for t in times]
    result = average.averaged_state_dict()["w"]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), weighted_sum(path, times, weights), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 0.3, 0.499, 0.5, 0.9, 1.0])
def test_an_average_moves_as_lerp_does(dtype, size):
    """With sizes around the ends of vectors and chunks, and strides. Oracle: `lerp`, and the same in float64."""
    torch.manual_seed(0)
    averages = [torch.randn(n) for n in (0, 1, 7, 16384, 16385, 200_001)] + [torch.randn(40, 30).t()]
    weights = [torch.randn(a.shape).to(dtype) for a in averages]
    before = [value.clone() for value in averages]
    versions = [value._version for value in averages]
    move_averages(averages, weights, size)
    assert all(value._version > version for value, version in zip(averages, versions, strict=True))
    for average, weight, old in zip(averages, weights, before, strict=True):
        if dtype in (torch.float32, torch.bfloat16):  # alike, so that a run may move to a machine without a compiler
            assert torch.equal(average, old.lerp(weight.float(), size))
        exact = old.double() + size * (weight.float().double() - old.double())
        torch.testing.assert_close(average.double(), exact, rtol=2e-7, atol=3e-7)


@pytest.mark.parametrize("window", [{"decay": 0.9}, {"half_life_ratio": 0.0625}, {"half_life_ratio": 1.0}])
def test_half_life_is_that_with_which_the_first_point_fades(window):
    """Weights that are 1 at the first averaging and 0 from then on: the average is the rest of that point."""
    parameter, every, start_step = nn.Parameter(torch.ones(1)), 4, 7
    average = WeightAverage([("w", parameter)], every=every, start_step=start_step, **window)
    rest = []
    for step in range(start_step + every, STEPS, every):
        assert average.update(step)
        parameter.data.zero_()
        rest.append(average.averages["w"].item())
        faded = every / -math.log2(rest[-1] / rest[-2]) if len(rest) > 1 else 0.0
        assert average.half_life == pytest.approx(faded, rel=1e-5)  # of a float32 product
        if "half_life_ratio" in window and len(rest) > 1:
            assert average.half_life == pytest.approx(window["half_life_ratio"] * (step - start_step), rel=1e-12)


def mixed_model():
    """A model, and its average, with weights of two dtypes, one not contiguous, and biases that share their memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 50), nn.Linear(50, 30).bfloat16(), nn.Linear(20, 10), nn.Linear(10, 10))
    model[2].weight = nn.Parameter(torch.randn(10, 20).t())
    model[3].bias.data = model[2].bias.data
    average = WeightAverage(model.named_parameters(), decay=0.5)
    for step in range(1, 5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update(step)
    return model, average


def test_the_average_is_cast_and_the_weights_come_back_even_if_evaluation_raises():
    model, average = mixed_model()
    before, kept = tiny.parameters(model), average.averaged_state_dict()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), average.applied():
            applied = tiny.parameters(model)
            1 / 0  # noqa: B018
        assert tiny.same(applied, {name: value.to(before[name].dtype) for name, value in kept.items()})
        assert tiny.same(tiny.parameters(model), before) and not tiny.same(applied, before)


@pytest.mark.parametrize("block", [7, 2**20])
def test_exchanged_for_the_average_weights_and_average_come_back(block, monkeypatch):
    """Oracle: `applied()` with its copies."""
    monkeypatch.setattr(base, "BLOCK", block)
    model, average = mixed_model()
    before, kept = tiny.parameters(model), average.averaged_state_dict()
    with average.applied():
        wanted = tiny.parameters(model)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), average.applied(exchange=True):
        assert tiny.same(tiny.parameters(model), wanted)
        assert tiny.same(average.averaged_state_dict(), kept)
        assert tiny.same(average.state_dict()["averages"], kept)
        assert torch.equal(average._averages["0.weight"], before["0.weight"])  # changed places: there is no copy
        1 / 0  # noqa: B018
    assert tiny.same(tiny.parameters(model), before)
    assert tiny.same(average.averaged_state_dict(), kept)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
    with pytest.raises(RuntimeError, match="Something wrote to 0.bias while the averaged weights"):
        with average.applied(exchange=True):
            model[0].bias.data.clamp_(-0.01, 0.01)
    assert tiny.same(tiny.parameters(model), before)
    kept = average.averaged_state_dict()
    with average.applied(exchange=True):
        model.double()
    assert tiny.same(tiny.parameters(model), {name: value.double() for name, value in before.items()})
    assert tiny.same(average.averaged_state_dict(), kept)


@pytest.mark.parametrize("operation", range(40))
def test_an_exchange_that_is_broken_off_anywhere_is_undone(operation, monkeypatch):
    """As by running out of memory or by Ctrl-C: at every single copy of 5 blocks, before and after it."""
    monkeypatch.setattr(base, "BLOCK", 3)
    ones, others = torch.arange(14.0), torch.arange(100.0, 114.0)
    pairs = [(ones[:8], others[:8]), (ones[8:], others[8:])]
    made, copied, count = base.Exchange(pairs), torch.Tensor.copy_, itertools.count()

    def breaking(tensor, source):
        number = next(count)
        if operation != 2 * number:
            copied(tensor, source)
        if operation // 2 == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", breaking)
        with pytest.raises(KeyboardInterrupt):
            made.swap()
    made.undo()
    assert torch.equal(ones, torch.arange(14.0)) and torch.equal(others, torch.arange(100.0, 114.0))
    made.swap()
    assert torch.equal(others, torch.arange(14.0)) and torch.equal(ones, torch.arange(100.0, 114.0))


def test_tied_weights_once_frozen_ones_kept_and_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    average = WeightAverage(model.named_parameters(remove_duplicate=False), decay=0.5)
    for step in (1, 2):
        with torch.no_grad():
            model[0].weight.fill_(float(step))
        average.update(step)
    result = average.averaged_state_dict()
    assert set(result) == {"0.weight", "0.bias", "1.bias", "2.weight", "2.bias"}
    assert result["0.weight"][0, 0].item() == pytest.approx((0.5 * 1 + 2) / 1.5)  # averaged once per step, not twice
    assert torch.equal(result["1.bias"], model[1].bias)
    tied, buffers = {"1.weight": result["0.weight"]}, {name: b.clone() for name, b in model.named_buffers()}
    with average.applied():  # a state dict inside is complete
        assert tiny.same(model.state_dict(), result | tied | buffers)


@pytest.mark.parametrize("options", [{"decay": 0.9}, {"half_life_ratio": 0.2}])
@pytest.mark.parametrize("stop", [2, 7, 30])
def test_an_average_of_a_state_is_the_uninterrupted_one_bit_for_bit(options, stop):
    path, options = walk(STEPS), options | {"every": 3, "start_step": 4}
    uninterrupted, interrupted = run(path, **options), run(path[:stop], **options)
    resumed = run(path, interrupted.state_dict(), **options)
    assert tiny.same(resumed.averaged_state_dict(), uninterrupted.averaged_state_dict())
    assert resumed.counters() == uninterrupted.counters()


def test_a_decay_changed_on_the_way_stays_a_weighted_mean():
    path = walk(STEPS)
    result = run(path, run(path[:30], decay=0.9).state_dict(), decay=0.5).averaged_state_dict()["w"]
    weights = [0.9 ** (30 - t) * 0.5**30 for t in range(1, 31)] + [0.5 ** (60 - t) for t in range(31, 61)]
    torch.testing.assert_close(result.double(), weighted_sum(path, [*range(1, 61)], weights), **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay=1.0 must lie strictly between 0 and 1"),
        ({"decay": math.nan}, "decay=nan must lie"),
        ({"decay": 0.9, "half_life_ratio": 0.1}, "two windows for one average"),
        ({"half_life_ratio": 0.0}, "half_life_ratio=0.0 must be above 0"),
        ({"half_life_ratio": math.nan}, "half_life_ratio=nan must be"),
        ({"every": 0}, "every=0 must be a whole number of steps, 1 or more"),
        ({"every": 1.5}, "every=1.5 must be a whole number"),
        ({"start_step": -1}, "start_step=-1 must be a whole number of steps, 0 or more"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WeightAverage([("w", nn.Parameter(torch.zeros(1)))], **options)


def test_misuse_is_refused_and_changes_nothing():
    with pytest.raises(ValueError, match="no trainable parameter"):
        WeightAverage([("w", torch.zeros(1))])
    with pytest.raises(ValueError, match="complex"):
        WeightAverage([("w", nn.Parameter(torch.zeros(1, dtype=torch.complex64)))])
    parameter, frozen = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1), requires_grad=False)
    average = WeightAverage([("w", parameter), ("f", frozen)], start_step=3)
    average.update(3)
    for early in (average.averaged_state_dict, average.applied().__enter__, lambda: average.half_life):
        with pytest.raises(RuntimeError, match="no average yet"):
            early()
    assert not average.started
    average.update(4)
    with pytest.raises(ValueError, match=re.escape("update(4) after update(4)")):
        average.update(4)
    with average.applied():
        with pytest.raises(RuntimeError, match="average the average"):
            average.update(5)
        with pytest.raises(RuntimeError, match="cannot be nested"), average.applied():
            pass
    for state, message in (
        ({"averages": {}}, "is not that of a WeightAverage"),
        (average.state_dict() | {"averages": {"v": torch.zeros(1)}}, "of other parameters: v is only in one"),
        (average.state_dict() | {"averages": {"w": torch.zeros(2)}}, r"shape \(2,\), the parameter has \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            average.load_state_dict(state)
    assert average.last_step == 4
    frozen.requires_grad_(True)
    with pytest.raises(RuntimeError, match="f was frozen when the average was made"):
        average.update(5)
