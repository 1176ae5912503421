"""Schedules by their keywords alone, for `hf_radam.inspection`: `Schedule.from_dict` takes its place there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_radam import schedules
from hf_radam.schedules import Schedule


def _schedule(keywords: Mapping[str, Any]) -> Schedule:
    return Schedule.from_dict("wsd_s" if "budgets" in keywords else "wsd", keywords)


def decays(schedule: Mapping[str, Any] | None) -> list[tuple[int, int]]:
    """Return start and end of every decay, in completed steps."""
    return [] if schedule is None else _schedule(schedule).decays()


def decay_at(schedule: Mapping[str, Any] | None, step: int) -> tuple[int, int] | None:
    """Return the decay in which the state after `step` completed steps stands."""
    return None if schedule is None else _schedule(schedule).decay_at(step)


def describe_schedule(schedule: Mapping[str, Any] | None, *, name: str, total_steps: int | None) -> str:
    """Describe a schedule in one line."""
    known = None if schedule is None else _schedule(schedule)
    return schedules.describe_schedule(known, name=name, total_steps=total_steps)
