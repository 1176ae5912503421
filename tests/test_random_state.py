"""What is drawn inside `preserved_random_state` leaves no trace, and a seed draws the same each time."""

import random
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch

from hf_radam.random_state import preserved_random_state


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [None, 7])
def test_nothing_is_left_behind_even_after_an_exception(seed):
    inside = []

    def run(context):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        drawn = [draw()]
        with suppress(KeyError), context:
            inside.append(draw())
            raise KeyError
        return [*drawn, draw(), draw()]

    expected = run(nullcontext())
    found = [run(preserved_random_state(seed)) for _ in range(2)]
    assert found == [[expected[0], inside[0], expected[1]]] * 2
    assert inside[1] == inside[2]
    assert all((a == b) == (seed is None) for a, b in zip(inside[0], inside[1], strict=True))
