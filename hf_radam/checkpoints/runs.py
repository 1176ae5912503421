"""Find, pin and rotate the checkpoints of a run: at its root, before the decay (WSD) and at each budget (WSD-S)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from hf_radam.checkpoints.layouts import has_optimizer, missing_state
from hf_radam.checkpoints.manifest import (
    EVALUATION_FOLDERS,
    MANIFEST_NAME,
    CheckpointError,
    PathLike,
    recorded_step,
)
from hf_radam.checkpoints.storage import interrupted, remove
from hf_radam.checkpoints.verify import check_complete
from hf_radam.schedules import BUDGETS_FOLDER, PRE_DECAY_FOLDER

logger = logging.getLogger(__name__)

PINNED_FOLDERS = (PRE_DECAY_FOLDER, BUDGETS_FOLDER)
PREFIX = "checkpoint-"


def step_of(checkpoint: PathLike) -> int | None:
    """Return the step in a checkpoint's name, or None for another name."""
    match = re.fullmatch(rf"{PREFIX}(\d+)", Path(checkpoint).name)
    return int(match[1]) if match else None


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to."""
    parent = checkpoint.parent
    return parent.parent if parent.name in PINNED_FOLDERS else parent


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint of a run: the step in its name, the folder that keeps it permanently (or ``""``), and its place."""

    step: int
    pinned_in: str
    path: Path
    """In the run, or in its staging folder if its replacement was interrupted."""


def list_checkpoints(run: PathLike) -> list[CheckpointRef]:
    """List the checkpoints of a run, complete or not: the latest first, pinned ones after others of their step."""
    root = Path(run)
    refs = []
    for pinned_in in ("", *PINNED_FOLDERS):
        found = {path: path for path in (root / pinned_in).glob(f"{PREFIX}*") if path.is_dir()}
        found |= {target: now for target, now in interrupted(root) if target.parent == root / pinned_in}
        refs += [
            CheckpointRef(step, pinned_in, now) for path, now in found.items() if (step := step_of(path)) is not None
        ]
    return sorted(refs, key=lambda ref: -ref.step)


def is_checkpoint(folder: PathLike) -> bool:
    """Return whether a folder is a checkpoint, complete or not, rather than a run.

    Its content decides: an `output_dir` may be named `checkpoint-7` as well, and a run may hold a trainer state.
    """
    path = Path(folder)
    if list_checkpoints(path):
        return False
    if (path / MANIFEST_NAME).is_file() or has_optimizer(path):
        return True
    step = step_of(path.resolve())
    has_evaluation_weights = any((path / name).is_dir() for name in EVALUATION_FOLDERS)
    return step is not None and (recorded_step(path) == step or has_evaluation_weights)


def newest_checkpoint(
    run: PathLike, accept: Callable[[Path], None], *, among: Callable[[CheckpointRef], bool] = lambda ref: True
) -> CheckpointRef | None:
    """Return the latest checkpoint for which `accept` raises no `CheckpointError`, warning of those passed over."""
    for ref in filter(among, list_checkpoints(run)):
        try:
            accept(ref.path)
        except CheckpointError as error:
            logger.warning("Passing over %s: %s", ref.path, error)
            continue
        return ref
    return None


def check_resumable(checkpoint: PathLike, *, verify: bool = True) -> None:
    """Raise `CheckpointError` unless a checkpoint is complete and verified, and has an optimizer and a scheduler."""
    if verify:
        check_complete(checkpoint)
    for name in missing_state(checkpoint):
        raise CheckpointError(
            f"{checkpoint} has no {name}, so it cannot be resumed (was it saved with save_only_model?). To start a new "
            "run from its weights, load it as the model instead."
        )


def rotate(run: Path, limit: int | None, *, protected: Collection[Path]) -> None:
    """Remove the oldest checkpoints at the root of a run, by modification time, until `limit` are left.

    Protected checkpoints stay; without a limit (None or 0) all stay. Step numbers are not ages if a run was restarted;
    they are used on file systems that set all times alike (upstream's rule).
    """
    if limit is None or limit <= 0:
        return
    folders = [ref.path for ref in reversed(list_checkpoints(run)) if ref.path.parent == run]
    times = {folder: folder.stat().st_mtime for folder in folders}
    if folders and max(times.values()) - min(times.values()) >= 1.0:
        folders.sort(key=times.__getitem__)
    kept = {path.resolve() for path in protected}  # a resumed run may know its best checkpoint by another path
    free = [folder for folder in folders if folder.resolve() not in kept]
    excess = len(folders) - max(limit, len(folders) - len(free))
    for folder in free[: max(excess, 0)]:
        remove(run, folder)
