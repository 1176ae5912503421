"""How much each checkpoint counts: as a training with that decay, and the average itself have it.

Oracles: plain SGD in float64 under `LambdaLR` with `wsd`; `WeightAverage`.
"""

import doctest
import functools
import math

import numpy as np
import pytest
import torch

import hf_radam.cli.merging
from hf_radam import WeightAverage
from hf_radam.cli.merging import DECAY_SHAPES, coefficients
from hf_radam.schedules import wsd


def test_uniform_weights_are_equal():
    assert coefficients([800, 850, 900, 999], weights="uniform") == [0.25] * 4


def trained(gradient, *, total, decay, shape, saved=()):
    """Weights in float64 after SGD whose step n has the gradient `gradient(n)`, with WSD where there is a decay."""
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule = functools.partial(wsd, total_steps=total, decay_steps=decay, decay_type=shape) if decay else lambda n: 1
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    kept = {}
    for step in range(1, total + 1):
        weight.grad = gradient(step)
        optimizer.step()
        scheduler.step()
        if step in saved:
            kept[step] = weight.detach().clone()
    return weight.detach(), kept


@pytest.mark.parametrize("shape", DECAY_SHAPES)
@pytest.mark.parametrize("saved", [[20, 25, 30, 35, 40], [20, 21, 33, 40], [20, 40]], ids=str)
def test_merging_equals_training_with_that_decay_where_a_stretch_has_equal_gradients(shape, saved):
    """The gradients do not depend on the weights, and change from one checkpoint to the next alone."""
    directions = torch.randn(len(saved) + 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(step):
        return directions[sum(step > end for end in saved)].clone()

    decayed, _ = trained(gradient, total=saved[-1], decay=saved[-1] - saved[0], shape=shape)
    _, kept = trained(gradient, total=saved[-1], decay=0, shape=shape, saved=saved)
    found = coefficients(saved, weights=shape)
    assert min(found) >= 0 and math.fsum(found) == pytest.approx(1, abs=1e-12)
    merged = sum(c * kept[step] for c, step in zip(found, saved, strict=True))
    torch.testing.assert_close(merged, decayed, rtol=1e-12, atol=1e-12)
    assert (decayed - kept[saved[-1]]).abs().max() > 0.05  # the decay does something


@pytest.mark.parametrize("window", [{"decay": 0.97}, {"half_life_ratio": 0.1}, {}], ids=str)
def test_ewa_is_the_average_that_training_would_have_kept(window):
    """`WeightAverage`, moved every 20 steps, of weights that are a unit vector at each: their factors, in float32."""
    steps = list(range(20, 201, 20))
    weight = torch.nn.Parameter(torch.zeros(len(steps)))
    average = WeightAverage([("weight", weight)], every=20, **window)
    for step in range(1, 201):
        weight.data = torch.eye(len(steps))[(step - 1) // 20]
        average.update(step)
    found = coefficients(steps, weights="ewa", **window)
    np.testing.assert_allclose(found, average.averaged_state_dict()["weight"], rtol=0, atol=1e-6)


def test_the_examples_in_the_docstrings():
    failed, tried = doctest.testmod(hf_radam.cli.merging)
    assert (failed, tried) == (0, 2)


def test_a_window_that_is_none_is_refused():
    for window in ({"decay": 1.0}, {"half_life_ratio": math.nan}, {"decay": 0.9, "half_life_ratio": 0.1}):
        with pytest.raises(ValueError, match=next(iter(window))):
            coefficients([800, 850], weights="ewa", **window)
