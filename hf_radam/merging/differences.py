"""What the user should know of checkpoints before they are merged: whether they are of one method and one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_radam.checkpoints.manifest import TRAINER_STATE_NAME, CheckpointError, read_manifest

SCHEDULE_FREE = "radam_schedulefree"


def differences(checkpoints: Sequence[Path]) -> list[str]:
    """Sentences on the methods of checkpoints, and on whether one training led from each to the next.

    Args:
        checkpoints: their folders, by increasing update.
    """
    manifests = [(path, read_manifest(path)) for path in checkpoints]
    methods = [(path, _method(manifest)) for path, manifest in manifests]
    notes = []
    first, method = methods[0]
    other = next(((path, another) for path, another in methods if another != method), None)
    if other is not None:
        notes.append(f"{first} was trained with {method}, {other[0]} with {other[1]}: one merge of both means little.")
    free = [path for path, manifest in manifests if manifest and manifest["method"]["optim"] == SCHEDULE_FREE]
    if free:
        all_of_them = len(free) == len(manifests)
        which = "the checkpoints are of a schedule-free run" if all_of_them else f"{free[0]} is of a schedule-free run"
        notes.append(f"{which}: merged is y, which trains, not x, which is an average already.")
    histories = [(path, _losses(path)) for path in checkpoints]
    for (before, past), (after, later) in zip(histories, histories[1:], strict=False):
        step = next((step for step, loss in past.items() if later.get(step, loss) != loss), None)
        if step is not None:
            notes.append(
                f"{before} and {after} are not of one run: the training losses that they logged at update {step} "
                "differ. Weights of different runs are seldom near each other."
            )
            break
    return notes


def _method(manifest: dict[str, Any] | None) -> str:
    if manifest is None:
        return "stock Trainer"
    return f"optim={manifest['method']['optim']}"  # a schedule shows in the learning rates; an average is not merged


def _losses(path: Path) -> dict[int, str]:
    """The training losses that a checkpoint has logged, as text (one may be nan), by update.

    Raises:
        CheckpointError: if the trainer's state cannot be read.
    """
    file = path / TRAINER_STATE_NAME
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return {entry["step"]: repr(entry["loss"]) for entry in state["log_history"] if "loss" in entry}
    except FileNotFoundError:
        return {}  # weights that somebody kept without it
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
