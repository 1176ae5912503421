"""Schedules in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
    floor = f"{schedule['min_lr_ratio']:g} of the peak"
    if "budgets" in schedule:
        pairs = zip(schedule["budgets"], schedule["decay_steps"], strict=True)
        decays = ", ".join(f"{budget - decay}-{budget}" for budget, decay in pairs)
        return f"{name}{until}: {warmup}peak, {schedule['decay_type']} decays over updates {decays} to {floor}"
    start = schedule["total_steps"] - schedule["decay_steps"]
    return (
        f"{name}{until}: {warmup}peak until update {start}, {schedule['decay_type']} decay over updates "
        f"{start}-{schedule['total_steps']} to {floor}"
    )
