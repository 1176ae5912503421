"""How much each checkpoint counts in a merge: pure functions of the updates at which they were saved.

The idea (arXiv:2507.17634): weights that train at a constant learning rate are a sum of updates, and a decay would have
shrunk the later ones. Let theta_n = theta_(n-1) + u_n, and let a decay multiply u_n by f_n after update t_0. With
checkpoints at t_0 < t_1 < ... < t_k the u_n of one stretch between two of them are known as their sum alone, so they
are all multiplied by the same w_j:

    theta = theta_(t_0) + sum_j w_j (theta_(t_j) - theta_(t_(j-1)))
          = (1 - w_1) theta_(t_0) + sum_(0<j<k) (w_j - w_(j+1)) theta_(t_j) + w_k theta_(t_k)

So c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_k = w_k. They sum to one, and none is negative while w falls.

Which w_j stands for the f_n of its stretch? Their mean: with D = t_k - t_0 and the shapes f of `hf_radam.schedules`,
where update n follows n - 1 updates,

    w_j = (1 / (t_j - t_(j-1))) sum_(t_(j-1) < n <= t_j) f((n - 1 - t_0) / D)

It is the w_j with which the merge equals the decay exactly where the updates of a stretch are equal (and for any
updates where each stretch is one update long). Elsewhere it is an approximation, as is the theory itself: with smaller
steps the later gradients would have been others. Nothing in it asks for even spacing.

Evenly spaced, `linear` is the trapezoidal rule but for one update:
c_0 = 1/(2k) - 1/(2D), c_j = 1/k, c_k = 1/(2k) + 1/(2D).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hf_radam.averaging import (
    DEFAULT_HALF_LIFE_RATIO,
    check_averaging,
    fixed_decay_step_size,
    growing_window_step_size,
)
from hf_radam.schedules import decay_multiplier

DECAY_SHAPES = ("linear", "cosine", "1-sqrt")
"""Shapes of `hf_radam.schedules` that fall to zero."""
UNIFORM, EWA = "uniform", "ewa"
WEIGHTS = (UNIFORM, EWA, *DECAY_SHAPES)


def coefficients(
    updates: Sequence[int], *, weights: str, decay: float | None = None, half_life_ratio: float | None = None
) -> list[float]:
    """The factor of each checkpoint in the merge; they sum to 1 and none is negative.

        uniform                   1 / (k + 1)
        ewa                       those of the average that the trainer would have kept (`ewa_coefficients`)
        linear, cosine, 1-sqrt    those that stand for a decay of this shape (`decay_multipliers`)

    Args:
        updates: at which the checkpoints were saved, increasing; two or more.
        weights: one of `WEIGHTS`.
        decay: of `ewa` with a fixed window: per update.
        half_life_ratio: of `ewa` with a growing window.

    Raises:
        ValueError: for another name, updates that do not increase, or a window that is none or has no use here.

    Example:
        >>> [round(c, 4) for c in coefficients([800, 900, 1000], weights="linear")]
        [0.2475, 0.5, 0.2525]
        >>> [round(c, 4) for c in coefficients([800, 900, 1000], weights="1-sqrt")]
        [0.4677, 0.3927, 0.1395]
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} must be one of {', '.join(WEIGHTS)}.")
    if len(updates) < 2:
        raise ValueError(f"{len(updates)} checkpoint cannot be averaged: give two or more.")
    if any(after <= before for before, after in itertools.pairwise(updates)):
        raise ValueError(f"the updates {list(updates)} must increase.")
    if weights == EWA:
        return ewa_coefficients(updates, decay=decay, half_life_ratio=half_life_ratio)
    if decay is not None or half_life_ratio is not None:
        raise ValueError(f"a decay per update and a half-life are of an average: they have no effect on {weights!r}.")
    if weights == UNIFORM:
        return [1 / len(updates)] * len(updates)
    multipliers = [1.0, *decay_multipliers(updates, shape=weights), 0.0]
    return [before - after for before, after in itertools.pairwise(multipliers)]


def decay_multipliers(updates: Sequence[int], *, shape: str) -> list[float]:
    """The mean multiplier w_j of the learning rate over each stretch between two checkpoints.

    Args:
        updates: as for `coefficients`; the first checkpoint is the one from which the decay goes out, the last its end.
        shape: one of `DECAY_SHAPES`.
    """
    begin, length = updates[0], updates[-1] - updates[0]
    return [
        math.fsum(decay_multiplier((step - begin) / length, shape, 0.0) for step in range(start, end)) / (end - start)
        for start, end in itertools.pairwise(updates)
    ]


def ewa_coefficients(
    updates: Sequence[int], *, decay: float | None = None, half_life_ratio: float | None = None
) -> list[float]:
    """The factors of an EWA that was moved at each checkpoint, by the step sizes of `hf_radam.averaging`.

    Step size s_j at checkpoint j (s_0 = 1) leaves it the factor s_j (1 - s_(j+1)) ... (1 - s_k). With a fixed decay b
    that is b^(t_k - t_j), normed to the sum 1.

    Args:
        updates: as for `coefficients`.
        decay: per update, in (0, 1).
        half_life_ratio: half-life over the updates done so far; the default if `decay` is not given either.

    Raises:
        ValueError: for a window that is none.
    """
    check_averaging(decay=decay, half_life_ratio=half_life_ratio, every=1, start_step=0)
    ratio = DEFAULT_HALF_LIFE_RATIO if half_life_ratio is None else half_life_ratio
    found, weight_sum = [1.0], 1.0
    for before, after in itertools.pairwise(updates):
        every = after - before
        if decay is None:
            size = growing_window_step_size(after, half_life_ratio=ratio, every=every)
        else:
            size = fixed_decay_step_size(weight_sum, decay=decay, every=every)
            weight_sum = 1.0 + decay**every * weight_sum
        found = [factor * (1.0 - size) for factor in found] + [size]
    return found
