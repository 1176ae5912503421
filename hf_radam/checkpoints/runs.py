"""Find the checkpoints of a run: those at its root, and those that are pinned before the decay and at each budget."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import sort_checkpoints

from hf_radam.checkpoints.integrity import FindDamage, check_whole, damage
from hf_radam.checkpoints.layouts import missing_state
from hf_radam.checkpoints.manifest import TRAINER_STATE_NAME, CheckpointError, PathLike
from hf_radam.checkpoints.storage import interrupted, remove

logger = logging.getLogger(__name__)

PRE_DECAY_FOLDER, BUDGETS_FOLDER = "_pre_decay", "_budgets"
PINNED_FOLDERS = (PRE_DECAY_FOLDER, BUDGETS_FOLDER)
PREFIX = "checkpoint-"


def step_of(checkpoint: PathLike) -> int | None:
    """The number in a checkpoint's name, or None for another name."""
    match = re.fullmatch(rf"{PREFIX}(\d+)", Path(checkpoint).name)
    return int(match[1]) if match else None


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    parent = checkpoint.parent
    return parent.parent if parent.name in PINNED_FOLDERS else parent


def recorded_step(folder: PathLike) -> int | None:
    """The update that the trainer's state in a folder speaks of, or None where there is none that can be read."""
    try:
        return int(json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


@dataclass(frozen=True)
class Place:
    """A checkpoint's place in a run: its update, the folder that keeps it pinned (or ``""``), and where it is now.

    It is not where it belongs only when a process was killed while one took the place of another.
    """

    step: int
    pinned_in: str
    path: Path


def checkpoints(run: PathLike) -> list[Place]:
    """Every checkpoint of a run, whole or not: the latest first, and of one update the pinned one last."""
    root = Path(run)
    places = []
    for pinned_in in ("", *PINNED_FOLDERS):
        named = {path: path for path in (root / pinned_in).glob(f"{PREFIX}*") if path.is_dir()}
        named |= {target: now for target, now in interrupted(root) if target.parent == root / pinned_in}
        places += [Place(step, pinned_in, now) for path, now in named.items() if (step := step_of(path)) is not None]
    return sorted(places, key=lambda place: -place.step)


def newest(
    run: PathLike, accept: Callable[[Path], None], *, among: Callable[[Place], bool] = lambda place: True
) -> Place | None:
    """The latest checkpoint for which `accept` raises no `CheckpointError`; others are passed over with a warning."""
    for place in checkpoints(run):
        if among(place):
            try:
                accept(place.path)
            except CheckpointError as error:
                logger.warning("Passing over %s: %s", place.path, error)
                continue
            return place
    return None


def check_resumable(checkpoint: PathLike, *, find: FindDamage = damage) -> None:
    """Raise `CheckpointError` if `find` finds damage, or a checkpoint was saved without what training goes on from."""
    check_whole(checkpoint, find=find)
    for name in missing_state(checkpoint):
        raise CheckpointError(
            f"{checkpoint} has no {name}, so training cannot go on from it (was it saved with save_only_model?). "
            "To start a new run from its weights, load them as the model instead."
        )


def pinned_folder(schedule: Mapping[str, Any], update: int) -> str | None:
    """The folder that keeps the state after an update for good, or None.

    Args:
        schedule: keywords of `wsd` (kept: the state after its last stable update, unless there is none) or of `wsd_s`
            (kept: the state at each budget).
        update: updates that the schedule has counted.
    """
    if "budgets" in schedule:
        return BUDGETS_FOLDER if update in schedule["budgets"] else None
    return PRE_DECAY_FOLDER if 0 < update == schedule["total_steps"] - schedule["decay_steps"] else None


def rotate(run: Path, limit: int | None, *, protected: Collection[Path]) -> None:
    """Keep `limit` checkpoints at the root of a run (all, if it is None or 0): the oldest go, the protected ones never.

    Older is by modification time, as upstream has it: where a run was begun anew the higher numbers are the older ones.
    """
    if limit is None or limit <= 0:
        return
    folders = [Path(path) for path in sort_checkpoints(str(run), use_mtime=True) if step_of(path) is not None]
    kept = {path.resolve() for path in protected}  # a resumed run may know its best one by another path
    free = [folder for folder in folders if folder.resolve() not in kept]
    excess = len(folders) - max(limit, len(folders) - len(free))
    for folder in free[: max(excess, 0)]:
        remove(run, folder)
