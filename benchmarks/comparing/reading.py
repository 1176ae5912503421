"""What a finished training says: its losses by update, from the `trainer_state.json` that it wrote."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .jobs import Job

STATE = "trainer_state.json"
RAW = "eval_raw_loss"
EVALUATED = "eval_loss"


@dataclass(frozen=True)
class Curves:
    """Losses of one training.

    Attributes:
        evaluated: of the evaluation weights, by update.
        raw: of the training weights, where they were evaluated too.
        training: mean over the updates since the last record.
        rate: learning rate.
        seconds: that it took.
    """

    evaluated: dict[int, float]
    raw: dict[int, float]
    training: dict[int, float]
    rate: dict[int, float]
    seconds: float


def is_finished(folder: Path, job: Job) -> bool:
    """Whether a job has made all its updates and written all its losses."""
    try:
        state = json.loads((folder / job.name / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return state["global_step"] == job.ends and any(
        entry["step"] == job.ends and EVALUATED in entry for entry in state["log_history"]
    )


def read(folder: Path, job: Job) -> Curves:
    """The losses of a finished job; a loss that is not finite is infinite, the worst there is."""
    state = json.loads((folder / job.name / STATE).read_text(encoding="utf-8"))
    history: list[dict[str, Any]] = [entry for entry in state["log_history"] if entry["step"] > job.begins]

    def values(name: str) -> dict[int, float]:
        found = {entry["step"]: float(entry[name]) for entry in history if name in entry}
        return {step: value if math.isfinite(value) else math.inf for step, value in found.items()}

    seconds = next((float(entry["train_runtime"]) for entry in history if "train_runtime" in entry), math.nan)
    return Curves(values(EVALUATED), values(RAW), values("loss"), values("learning_rate"), seconds)
