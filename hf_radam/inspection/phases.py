"""Where in its schedule a checkpoint stands.

All counts are of updates already done, as in `hf_radam.schedules`: a checkpoint that stands exactly where a decay
begins has had none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_radam.describe import decays
from hf_radam.schedules import wsd, wsd_s

WARM_UP, STABLE, DECAY, BUDGET, FINISHED = "warm-up", "stable", "decay", "budget", "finished"
WORDS = {
    WARM_UP: "in the warm-up",
    STABLE: "stable",
    DECAY: "in the decay",
    BUDGET: "at a budget",
    FINISHED: "finished",
}
CONSTANT = ("constant", "constant_with_warmup")
DECAYING = ("linear", "cosine", "polynomial", "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr")
"""Schedules of upstream's that decay from the end of their warm-up on."""
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")


def phase(
    name: str | None,
    schedule: Mapping[str, Any] | None,
    step: int,
    *,
    finished: bool,
    warmup_steps: int | None = None,
) -> str | None:
    """One of the phases above, or None where a schedule of upstream's does not tell.

    Args:
        name: what `lr_scheduler_type` calls the schedule; None if not known.
        schedule: keywords of `wsd` or `wsd_s`; None for a schedule of upstream's.
        step: updates that the schedule has counted.
        finished: whether the run has had all its updates.
        warmup_steps: the warm-up of a schedule of upstream's, if known.
    """
    if finished:
        return FINISHED
    if schedule is not None:
        return _own_phase(schedule, step)
    if name not in WITHOUT_WARMUP and warmup_steps is not None and step < warmup_steps:
        return WARM_UP
    if warmup_steps is None and name != "constant":
        return None
    return STABLE if name in CONSTANT else DECAY if name in DECAYING else None


def _own_phase(schedule: Mapping[str, Any], step: int) -> str:
    begin, ramp = 0, schedule["warmup_steps"]
    parts = decays(schedule)
    for start, end in parts:
        if step < end:
            return WARM_UP if step < begin + ramp else STABLE if step <= start else DECAY
        if step == end and end != parts[-1][1]:
            return BUDGET
        begin, ramp = end, schedule.get("rewarmup_steps", 0)
    return FINISHED


def multiplier(schedule: Mapping[str, Any], step: int) -> float:
    """The multiplier of `learning_rate` for the update that follows `step` updates of `wsd` or `wsd_s`."""
    return wsd_s(step, **schedule) if "budgets" in schedule else wsd(step, **schedule)
