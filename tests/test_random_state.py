"""What is drawn inside `preserved_random_state` leaves no trace, and a seed draws the same each time."""

import random

import numpy as np
import pytest
import torch

from hf_radam.random_state import preserved_random_state


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [None, 5])
def test_nothing_is_left_behind_even_after_an_exception(seed):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = [draw(), draw()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = draw()
    with pytest.raises(KeyError), preserved_random_state(seed):
        draw()
        raise KeyError
    second = draw()
    assert [first, second] == expected
    for before, after in zip(first, second, strict=True):
        assert before != after


def test_a_seed_draws_the_same_each_time():
    inside = []
    for _ in range(2):
        with preserved_random_state(7):
            inside.append(draw())
        draw()
    assert inside[0] == inside[1]
