"""What the keywords of a schedule say: where its decays are, and the whole of it in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def decays(schedule: Mapping[str, Any] | None) -> list[tuple[int, int]]:
    """Start and end of every decay of `wsd` or `wsd_s`, in updates, from their keywords; empty for another schedule."""
    if schedule is None:
        return []
    if "budgets" not in schedule:
        return [(schedule["total_steps"] - schedule["decay_steps"], schedule["total_steps"])]
    pairs = zip(schedule["budgets"], schedule["decay_steps"], strict=True)
    return [(budget - length, budget) for budget, length in pairs]


def decay_at(schedule: Mapping[str, Any] | None, step: int) -> tuple[int, int] | None:
    """The decay in which the state after `step` updates stands, if the learning rate is not meant to rise again.

    The end of WSD's decay belongs to it. A budget of WSD-S does not: from there it goes back to the peak.
    """
    at_budget = step in (schedule or {}).get("budgets", ())
    return next(((start, end) for start, end in decays(schedule) if start < step <= end and not at_budget), None)


def warning_of_decays(schedule: Mapping[str, Any] | None) -> str | None:
    """A sentence if a decay of the schedule has no effect; None if each has one."""
    if all(end - start != 1 for start, end in decays(schedule)):
        return None
    return "A decay of 1 update has no effect: its only update still has the peak. Use 2 or more."


def describe_schedule(schedule: Mapping[str, Any] | None, *, name: str, total_steps: int | None) -> str:
    """One line that says what a schedule does from the first update to the last.

    Args:
        schedule: keywords of `wsd` or `wsd_s` as a manifest has them; None for a schedule of upstream's.
        name: what `lr_scheduler_type` calls it.
        total_steps: updates of the run; None where they are not known.
    """
    until = "" if total_steps is None else f", {total_steps} updates"
    if schedule is None:
        return f"{name}{until}"
    warmup = f"warm-up {schedule['warmup_steps']} updates, " if schedule["warmup_steps"] else ""
    over = ", ".join(f"{start}-{end}" for start, end in decays(schedule))
    shape, floor = schedule["decay_type"], f"{schedule['min_lr_ratio']:g} of the peak"
    if "budgets" in schedule:
        return f"{name}{until}: {warmup}peak, {shape} decays over updates {over} to {floor}"
    peak = f"peak until update {decays(schedule)[0][0]}"
    return f"{name}{until}: {warmup}{peak}, {shape} decay over updates {over} to {floor}"
