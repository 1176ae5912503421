"""Learning-rate schedules as pure functions: updates done so far -> multiplier of `learning_rate`.

The idea: a run warms up, stays at a constant learning rate for as long as one likes, and decays only in the last few
per cent, where most of the visible gain in loss comes. The stable phase has no horizon in it, so a run can be extended.

The convention everywhere: `step` is the number of updates already done, and the value is the multiplier for the *next*
update (as in torch's `LambdaLR`). Steps, lengths and budgets are counted in updates (optimizer steps), never in tokens
or batches. Nothing here needs torch: `LambdaLR(optimizer, functools.partial(wsd, total_steps=..., decay_steps=...))`.
"""

import math
from collections.abc import Sequence

DECAY_TYPES = ("linear", "cosine", "1-sqrt", "exponential", "inverse")
_NEED_A_FLOOR = ("exponential", "inverse")  # 0^q and 1/0: these two shapes never reach a floor of zero


def wsd(
    step: int,
    *,
    total_steps: int,
    decay_steps: int,
    warmup_steps: int = 0,
    decay_type: str = "1-sqrt",
    min_lr_ratio: float = 0.0,
) -> float:
    """Return the warmup-stable-decay multiplier, in [0, 1], for the update that follows `step` updates.

    With s = `step`, T = `total_steps`, D = `decay_steps`, W = `warmup_steps`, m = `min_lr_ratio`:

        s / W                  0     <= s < W          warm-up: update n = s + 1 gets (n - 1) / W
        1                      W     <= s < T - D      stable
        f((s - (T - D)) / D)   T - D <= s < T          decay; f is `decay_multiplier`
        m                      T     <= s              after the run: the floor

    The first update of the decay still has the peak (q = 0) and the last has q = (D - 1) / D: no update is spent at
    the floor. From the end of the warm-up on, `linear`, `cosine` and `1-sqrt` equal `transformers.get_wsd_schedule`
    number for number; its warm-up starts at the floor, ours at 0, as upstream's other schedules do.

    Source: MiniCPM, arXiv:2404.06395; shapes: Hägele et al., arXiv:2405.18392.

    Args:
        step: Updates already done, 0 or more.
        total_steps: Length of the run in updates, decay included.
        decay_steps: Length of the decay in updates, 1 or more. About 10 % of the run is enough.
        warmup_steps: Length of the linear warm-up in updates; 0 for none.
        decay_type: One of `DECAY_TYPES`.
        min_lr_ratio: Floor as a multiplier of `learning_rate`, in [0, 1).

    Raises:
        ValueError: As `check_wsd` does, and if `step` is not a count of updates.

    Example: a warm-up of 2, a stable phase until 6 and a decay of 4 in a run of 10 updates.

        >>> [wsd(s, total_steps=10, decay_steps=4, warmup_steps=2, decay_type="linear") for s in range(12)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        >>> [round(wsd(s, total_steps=300, decay_steps=30), 4) for s in (0, 269, 270, 271, 299, 300)]
        [1.0, 1.0, 1.0, 0.8174, 0.0168, 0.0]
    """
    _check_count("step", step, at_least=0)
    check_wsd(
        total_steps=total_steps,
        decay_steps=decay_steps,
        warmup_steps=warmup_steps,
        decay_type=decay_type,
        min_lr_ratio=min_lr_ratio,
    )
    if step >= total_steps:
        return float(min_lr_ratio)
    return _one_branch(step, total_steps, decay_steps, warmup_steps, decay_type, min_lr_ratio)


def wsd_s(
    step: int,
    *,
    budgets: Sequence[int],
    decay_steps: Sequence[int],
    warmup_steps: int = 0,
    rewarmup_steps: int = 0,
    decay_type: str = "1-sqrt",
    min_lr_ratio: float = 0.0,
) -> float:
    """Return the WSD-S multiplier, in [0, 1], for the update that follows `step` updates.

    One run, with a decayed model at each of several budgets.
    With s = `step`, budgets B_1 < ... < B_k (B_0 = 0), decay lengths D_1 ... D_k, m = `min_lr_ratio`, and in the
    stretch B_{i-1} <= s < B_i the ramp R_1 = `warmup_steps`, R_i = `rewarmup_steps` for i > 1:

        (s - B_{i-1}) / R_i          B_{i-1}       <= s < B_{i-1} + R_i      (re-)warm-up, from 0
        1                            B_{i-1} + R_i <= s < B_i - D_i          stable
        f((s - (B_i - D_i)) / D_i)   B_i - D_i     <= s < B_i                decay; f is `decay_multiplier`
        m                            B_k           <= s                      after the last budget: the floor

    So after B_i updates a model decayed for that budget can be saved, and the very next update is back at the peak
    (the authors' choice, `rewarmup_steps=0`). A re-warm-up has the form of the warm-up: it starts at 0, not at the
    floor. With one budget this is `wsd`, number for number.

    Source: Wen et al., WSD-S, arXiv:2410.05192.

    Args:
        step: Updates already done, 0 or more.
        budgets: Updates at which a decayed model is wanted, increasing; the last is the length of the run.
        decay_steps: Length of the decay before each budget, in updates: one per budget.
        warmup_steps: Length of the linear warm-up at the start, in updates; 0 for none.
        rewarmup_steps: Length of the linear warm-up after each budget but the last, in updates; 0 jumps to the peak.
        decay_type: One of `DECAY_TYPES`.
        min_lr_ratio: Floor as a multiplier of `learning_rate`, in [0, 1).

    Raises:
        ValueError: As `check_wsd_s` does, and if `step` is not a count of updates.

    Example: budgets of 6 and 12 updates with decays of 2 and 4; then the same with a re-warm-up of 2.

        >>> [wsd_s(s, budgets=(6, 12), decay_steps=(2, 4), decay_type="linear") for s in range(14)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        >>> again = dict(budgets=(6, 12), decay_steps=(2, 4), rewarmup_steps=2, decay_type="linear")
        >>> [wsd_s(s, **again) for s in range(4, 10)]
        [1.0, 0.5, 0.0, 0.5, 1.0, 0.75]
    """
    _check_count("step", step, at_least=0)
    check_wsd_s(
        budgets=budgets,
        decay_steps=decay_steps,
        warmup_steps=warmup_steps,
        rewarmup_steps=rewarmup_steps,
        decay_type=decay_type,
        min_lr_ratio=min_lr_ratio,
    )
    previous, ramp = 0, warmup_steps
    for budget, decay in zip(budgets, decay_steps, strict=True):
        if step < budget:
            return _one_branch(step - previous, budget - previous, decay, ramp, decay_type, min_lr_ratio)
        previous, ramp = budget, rewarmup_steps
    return float(min_lr_ratio)


def decay_multiplier(progress: float, decay_type: str, min_lr_ratio: float) -> float:
    """Return the multiplier of `learning_rate` at a point of the decay: 1 at its start, the floor at its end.

    With q = `progress` and m = `min_lr_ratio`:

        linear        m + (1 - m) (1 - q)
        cosine        m + (1 - m) (1 + cos(pi q)) / 2
        1-sqrt        m + (1 - m) (1 - sqrt(q))     best of those tried by Hägele et al., arXiv:2405.18392
        exponential   m^q                           m > 0; MiniCPM's 0.5^(s / half-life) written by its end point
        inverse       1 / (q / m + (1 - q))         m > 0; WSD-S, arXiv:2410.05192: 1 / lr grows linearly

    Args:
        progress: Part of the decay that is over, in [0, 1].
        decay_type: One of `DECAY_TYPES`.
        min_lr_ratio: Floor as a multiplier of `learning_rate`, in [0, 1).

    Raises:
        ValueError: If `progress` lies outside [0, 1], or `check_decay` rejects the shape or the floor.

    Example:
        >>> [[round(decay_multiplier(q, shape, 0.1), 4) for q in (0.0, 0.5, 1.0)] for shape in DECAY_TYPES]
        [[1.0, 0.55, 0.1], [1.0, 0.55, 0.1], [1.0, 0.3636, 0.1], [1.0, 0.3162, 0.1], [1.0, 0.1818, 0.1]]
    """
    check_decay(decay_type, min_lr_ratio)
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must lie in [0, 1], got {progress!r}: it is (updates of the decay done) / length.")
    if decay_type == "exponential":
        return math.pow(min_lr_ratio, progress)
    if decay_type == "inverse":
        return 1.0 / (progress / min_lr_ratio + (1.0 - progress))
    if decay_type == "linear":
        factor = 1.0 - progress
    elif decay_type == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        factor = 1.0 - math.sqrt(progress)
    # The order of these operations is transformers', so that the curves are equal to the last bit.
    return factor * (1.0 - min_lr_ratio) + min_lr_ratio


def check_wsd(
    *,
    total_steps: int,
    decay_steps: int,
    warmup_steps: int = 0,
    decay_type: str = "1-sqrt",
    min_lr_ratio: float = 0.0,
) -> None:
    """Raise a ValueError that names the value and the way out, if `wsd` cannot take these arguments."""
    _check_count("total_steps", total_steps, at_least=1)
    _check_count("decay_steps", decay_steps, at_least=1)
    _check_count("warmup_steps", warmup_steps, at_least=0)
    check_decay(decay_type, min_lr_ratio)
    if warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} and decay_steps={decay_steps} need {warmup_steps + decay_steps} updates, but "
            f"the run has {total_steps}: shorten one of them, or set --max_steps {warmup_steps + decay_steps} or more."
        )


def check_wsd_s(
    *,
    budgets: Sequence[int],
    decay_steps: Sequence[int],
    warmup_steps: int = 0,
    rewarmup_steps: int = 0,
    decay_type: str = "1-sqrt",
    min_lr_ratio: float = 0.0,
) -> None:
    """Raise a ValueError that names the value and the way out, if `wsd_s` cannot take these arguments."""
    _check_list("budgets", budgets)
    _check_list("decay_steps", decay_steps)
    if len(decay_steps) != len(budgets):
        raise ValueError(
            f"decay_steps={decay_steps!r} has {len(decay_steps)} lengths for {len(budgets)} budgets "
            f"({budgets!r}): give one length per budget."
        )
    _check_count("warmup_steps", warmup_steps, at_least=0)
    _check_count("rewarmup_steps", rewarmup_steps, at_least=0)
    check_decay(decay_type, min_lr_ratio)
    previous, ramp, ramp_name = 0, warmup_steps, "warmup_steps"
    for budget, decay in zip(budgets, decay_steps, strict=True):
        _check_count("each of budgets", budget, at_least=1)
        _check_count("each of decay_steps", decay, at_least=1)
        if budget <= previous:
            raise ValueError(f"budgets must increase, got {budget} after {previous} in {budgets!r}: sort them.")
        if ramp + decay > budget - previous:
            raise ValueError(
                f"the decay of {decay} updates before budget {budget} (with {ramp_name}={ramp}) reaches back past "
                f"update {previous}, where its stretch begins: shorten it to {budget - previous - ramp} or less, "
                f"or move the budget."
            )
        previous, ramp, ramp_name = budget, rewarmup_steps, "rewarmup_steps"


def check_decay(decay_type: str, min_lr_ratio: float) -> None:
    """Raise a ValueError that names the value and the way out, if this shape cannot decay to this floor."""
    if decay_type not in DECAY_TYPES:
        raise ValueError(f"decay_type must be one of {', '.join(DECAY_TYPES)}, got {decay_type!r}.")
    if not _is_number(min_lr_ratio) or not 0.0 <= min_lr_ratio < 1.0:
        raise ValueError(
            f"min_lr_ratio must lie in [0, 1), got {min_lr_ratio!r}: it is the floor as a ratio of learning_rate, "
            f"such as 0.1."
        )
    if decay_type in _NEED_A_FLOOR and min_lr_ratio == 0.0:
        raise ValueError(
            f"decay_type={decay_type!r} never reaches min_lr_ratio={min_lr_ratio!r}: set --min_lr_ratio 0.1, or choose "
            f"linear, cosine or 1-sqrt, which decay to zero."
        )


def count_from_ratio(value: float, total: int, *, name: str) -> int:
    """Convert a flag that is a count of updates or a ratio of `total` to a count, by upstream's rule.

    A value of 1 or more is a count and must be whole; a value below 1 is a ratio and gives ceil(`total` * `value`), as
    `TrainingArguments.get_warmup_steps` has it. So 1 and 1.0 are one update, never the whole run.

    Args:
        value: What the user gave: a count of updates, or a ratio of `total` between 0 and 1.
        total: What the ratio refers to, in updates.
        name: The flag as the user knows it, such as `--decay_steps`, for the error.

    Raises:
        ValueError: If `value` is NaN, zero, negative, a bool, not a number, or 1 or more and not whole.

    Example:
        >>> [count_from_ratio(0.1, total, name="--decay_steps") for total in (300, 700, 1000, 1001)]
        [30, 70, 100, 101]
        >>> count_from_ratio(0.07, 100, name="--decay_steps"), count_from_ratio(40, 700, name="--decay_steps")
        (7, 40)
    """
    _check_count("total", total, at_least=1)
    if not _is_number(value) or not 0.0 < value < math.inf or (value >= 1 and value != math.floor(value)):
        raise ValueError(
            f"{name} must be a whole number of updates (1 or more) or a ratio between 0 and 1, got {value!r}: "
            f"for example 50 for 50 updates, or 0.1 for a tenth of them."
        )
    if value >= 1:
        return int(value)
    product = total * value
    nearest = round(product)
    # 0.07 * 100 is 7.000000000000001 in floats, and its ceiling 8. A product this close to a whole number is that
    # number: rounding the ratio and the product moves it by 2.3e-16 of itself at most. The test is relative, so a tiny
    # ratio still gives 1 update and never 0.
    return nearest if math.isclose(product, nearest, rel_tol=1e-12) else math.ceil(product)


def _one_branch(step: int, length: int, decay: int, ramp: int, decay_type: str, min_lr_ratio: float) -> float:
    """Return the multiplier inside one stretch of `length` updates: ramp from 0, stable, decay at the end."""
    if step < ramp:
        return step / ramp
    if step < length - decay:
        return 1.0
    return decay_multiplier((step - (length - decay)) / decay, decay_type, min_lr_ratio)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_count(name: str, value: float, *, at_least: int) -> None:
    # NaN and infinity are not integers to float.is_integer(), so this covers them.
    whole = _is_number(value) and (isinstance(value, int) or value.is_integer())
    if not whole or value < at_least:
        raise ValueError(f"{name} must be a whole number of updates, {at_least} or more, got {value!r}.")


def _check_list(name: str, values: object) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{name} must be a list with one entry per budget, such as [300, 700], got {values!r}.")
