"""How fast an average forgets: the step size of each averaging, for a fixed window and for one that grows with the run.

Pure functions; `hf_radam.averaging` says what a step size is.
"""

from __future__ import annotations

import math

DEFAULT_HALF_LIFE_RATIO = 0.0625
"""Half-life of the growing window, as a ratio of the updates since averaging began."""


def fixed_decay_step_size(weight_sum: float, *, decay: float, every: int) -> float:
    """Step size of the bias-corrected EWA with a fixed decay per update.

    The newest point has weight 1 and the weights before it sum to `decay**every * weight_sum`, so the n-th step size
    is `(1 - decay**every) / (1 - decay**(every * n))`. `every` only changes how often the average is touched, not the
    length of its window.

    Args:
        weight_sum: sum of the weights so far, in units of the newest one's weight; 0 before the first averaging.
        decay: decay per update, in (0, 1).
        every: updates between two averagings.

    Source:
        Zhang et al. 2025, arXiv:2410.21676; the bias correction is Adam's (arXiv:1412.6980, section 3).
    """
    return 1.0 / (1.0 + decay**every * weight_sum)


def growing_window_step_size(elapsed: int, *, half_life_ratio: float, every: int) -> float:
    """Step size of an EWA whose half-life is a fixed ratio of the updates since averaging began.

    `1 - 0.5**(every / (half_life_ratio * elapsed))`: needs no horizon, as the window grows with the run. It does not
    depend on `every` while `every` is small against `half_life_ratio * elapsed`.

    Args:
        elapsed: updates since averaging began, 1 or more.
        half_life_ratio: half-life over `elapsed`.
        every: updates between two averagings.
    """
    return -math.expm1(-math.log(2.0) * every / (half_life_ratio * elapsed))


def half_life_of(step_size: float, *, every: int) -> float:
    """Updates over which an average forgets half of what it holds, at the step size with which it moves.

    One averaging keeps `1 - step_size` of it, so it is `every * ln 2 / -ln(1 - step_size)`: `half_life_ratio * elapsed`
    in the growing window; in a fixed one it rises towards `ln 2 / -ln(decay)`, as the bias correction has the first
    points share the weight. 0 where the average is a copy (`step_size` 1).

    Args:
        step_size: the share that the newest point gets, in (0, 1].
        every: updates between two averagings.

    Example:
        >>> half_life_of(growing_window_step_size(160, half_life_ratio=0.0625, every=4), every=4)
        10.0
    """
    return 0.0 if step_size == 1.0 else -every * math.log(2.0) / math.log1p(-step_size)


def check_averaging(
    *, decay: float | None, half_life_ratio: float | None, every: int, start_step: int, prefix: str = ""
) -> None:
    """Raise `ValueError` for options that no average can follow; `prefix` goes before the option's name."""
    if decay is not None and half_life_ratio is not None:
        raise ValueError(
            f"{prefix}decay={decay} and {prefix}half_life_ratio={half_life_ratio} are two windows for one average: "
            "set the first for a fixed window or the second for a growing one."
        )
    if decay is not None and not 0.0 < decay < 1.0:
        raise ValueError(f"{prefix}decay={decay} must lie strictly between 0 and 1, for instance 0.999.")
    if half_life_ratio is not None and not 0.0 < half_life_ratio <= 1.0:
        raise ValueError(
            f"{prefix}half_life_ratio={half_life_ratio} must be above 0 and at most 1, "
            f"for instance {DEFAULT_HALF_LIFE_RATIO}."
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"{prefix}every={every} must be a whole number of updates, 1 or more.")
    if isinstance(start_step, bool) or not isinstance(start_step, int) or start_step < 0:
        raise ValueError(f"{prefix}start_step={start_step} must be a whole number of updates, 0 or more.")
