"""The losses and learning rates that a run has logged, out of its `trainer_state.json`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_radam.checkpoints.load import is_checkpoint
from hf_radam.checkpoints.manifest import TRAINER_STATE_NAME, CheckpointError, PathLike, read_manifest
from hf_radam.checkpoints.runs import newest_checkpoint, recorded_step
from hf_radam.checkpoints.storage import sha256

LOSS = re.compile(r"eval_(.+_)?loss")
"""The loss of an evaluation; between them stands the name of its data set, which may be any text."""


@dataclass(frozen=True)
class Series:
    """Values, each with the number of updates that had been made when it was logged."""

    updates: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.updates)


@dataclass(frozen=True)
class TrainingLog:
    """What a run has logged, in the order in which it is recorded.

    Attributes:
        path: the folder that was named.
        source: the `trainer_state.json` it is from.
        update: updates made by then.
        loss: the training loss: each value is the mean since the one before.
        evaluations: the losses of evaluations by their names, `eval_loss` first; `eval_raw_loss` is that of the
            training weights where `eval_loss` is that of the average.
        learning_rate: the learning rate, where the losses were logged.
    """

    path: str
    source: Path
    update: int
    loss: Series
    evaluations: dict[str, Series]
    learning_rate: Series


def read_training_log(path: PathLike) -> TrainingLog:
    """Read what a run or the run up to a checkpoint has logged.

    Of a run it is the state that has seen most updates: the one at its root (`save_state()`), or that of the newest
    checkpoint in which that file is whole, by its checksum where there is one. (The other files do not matter here.)

    Args:
        path: the folder of a run, or a checkpoint.

    Raises:
        ValueError: if there is no such file, it is damaged, or there is no loss in it.
    """
    folder = Path(path)
    if is_checkpoint(folder):
        _check(folder)
        source = folder
    else:
        place = newest_checkpoint(folder, _check)
        own = recorded_step(folder)
        if place is None and own is None:
            raise ValueError(f"{path} has no {TRAINER_STATE_NAME} that can be read, nor a checkpoint with one.")
        source = folder if place is None or own is not None and own >= place.step else place.path
    state = _state(source)
    history = state["log_history"]
    names = sorted({key for entry in history for key in entry if LOSS.fullmatch(key)}, key=_order)
    log = TrainingLog(
        path=str(path),
        source=source / TRAINER_STATE_NAME,
        update=state["global_step"],
        loss=_series(history, "loss"),
        evaluations={name: _series(history, name) for name in names},
        learning_rate=_series(history, "learning_rate"),
    )
    if not log.loss and not any(log.evaluations.values()):
        raise ValueError(
            f"{log.source} has no loss in it: the run had logged none by update {log.update} (logging_steps, "
            "eval_steps)."
        )
    return log


def _order(name: str) -> tuple[bool, bool, str]:
    return name != "eval_loss", name != "eval_raw_loss", name


def _check(checkpoint: Path) -> None:
    """Raise `CheckpointError` if the trainer's state in a checkpoint is missing, damaged or of another form."""
    file = checkpoint / TRAINER_STATE_NAME
    manifest = read_manifest(checkpoint)
    written = (manifest or {"files": {}})["files"].get(TRAINER_STATE_NAME)
    if written is not None and file.is_file() and sha256(file) != written["sha256"]:
        raise CheckpointError(f"{file} has another sha256 than when it was written.")
    _state(checkpoint)


def _state(folder: Path) -> dict[str, Any]:
    file = folder / TRAINER_STATE_NAME
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state["global_step"], int) or not all(isinstance(e, dict) for e in state["log_history"]):
            raise TypeError("it has not the form of a trainer's state")
        if any(not isinstance(entry["step"], int) for entry in state["log_history"]):
            raise TypeError("an entry does not say at which update it was made")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
    return state


def _series(history: Sequence[Mapping[str, Any]], key: str) -> Series:
    found = [(entry["step"], entry[key]) for entry in history if key in entry]
    kept = [(step, _float(value)) for step, value in found if isinstance(value, int | float)]
    return Series([step for step, _ in kept], [value for _, value in kept])


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of 400 digits is what 1e400 is in JSON
        return math.inf if value > 0 else -math.inf


def smoothed(series: Series, *, half_life_ratio: float) -> Series:
    """The weighted mean of each value and those before it, in a window that grows with the run.

    s_i = S_i / W_i with S_i = d_i S_(i-1) + v_i and W_i = d_i W_(i-1) + 1, where t_i is the update of value v_i and
    d_i = 0.5^((t_i - t_(i-1)) / (half_life_ratio t_i)). So a longer run is smoothed as a shorter one, as far
    as that goes, and the fast fall at the beginning lags as little as the end. Values that are not finite are left out
    of both sums.

    Args:
        series: the values.
        half_life_ratio: the half-life as a ratio of the updates so far, above 0.
    """
    total = weight = 0.0
    before, means = 0, []
    for update, value in zip(series.updates, series.values, strict=True):
        fade = 0.5 ** (abs(update - before) / (half_life_ratio * max(update, 1)))
        total, weight, before = fade * total, fade * weight, update
        if math.isfinite(value):
            total, weight = total + value, weight + 1.0
        means.append(total / weight if weight else math.nan)
    return Series(series.updates, means)
