"""What a checkpoint is, where it stands, what it holds and whether it is whole: facts, read and never changed.

A checkpoint of ours says it in its manifest. Of one by stock `Trainer`, or whose manifest is damaged, the other files
tell what they can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_radam.checkpoints.layouts import SCHEDULER_NAME, layout_of, missing_state, process_count
from hf_radam.checkpoints.manifest import (
    EVALUATION_FOLDERS,
    FORMAT_VERSION,
    MANIFEST_NAME,
    TRAINER_STATE_NAME,
    CheckpointError,
    PathLike,
    has_hf_radam_files,
    read_manifest,
)
from hf_radam.checkpoints.verify import verify_checkpoint
from hf_radam.describe import describe_schedule
from hf_radam.inspection.facts import (
    DAMAGED,
    NOT_RESUMABLE,
    OTHER_FORMAT,
    TRAINING,
    WHOLE,
    CheckpointFacts,
    FileFacts,
    X,
    Y,
)
from hf_radam.inspection.peeking import count, json_object, learning_rates, parameter_groups
from hf_radam.inspection.phases import multiplier, phase
from hf_radam.inspection.pickled import pickled_attributes

ARGUMENTS_NAME = "training_args.bin"


def inspect_checkpoint(checkpoint: PathLike) -> CheckpointFacts:
    """Read everything that the files of a checkpoint tell, damaged or not.

    Whatever they hold, nothing in them is run, and nothing is written. Only the checksums take time.
    """
    path = Path(checkpoint)
    manifest, trouble = _manifest(path)
    layout = layout_of(path)
    problems = _problems(path, manifest, trouble)
    method = _method(path, manifest)
    groups = [] if any(name.split("/")[0] == layout.optimizer for name in problems) else parameter_groups(path)
    average = _schedule_free(groups)
    return CheckpointFacts(
        path=str(checkpoint),
        written_by=_writer(path, manifest),
        state=_state(path, problems),
        checked="form" if manifest is None else "checksums",
        problems=problems,
        **method,
        **_standing(path, manifest, method),
        root=_root(method["optim"], average, ours=has_hf_radam_files(path), read=bool(groups)),
        evaluation_folder=(manifest["evaluation"]["folder"] or "")
        if manifest
        else None
        if has_hf_radam_files(path)
        else "",
        beside=[name for name in EVALUATION_FOLDERS if (path / name).is_dir()],
        averaging=manifest["averaging"] if manifest else None,
        schedule_free=average,
        layout=layout.words,
        processes=process_count(path),
        files=_files(path, manifest, problems),
    )


def _manifest(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The manifest if there is a good one, and what is wrong if there should be and is not."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return None, str(error)
    try:
        if manifest is not None:
            _check_shape(manifest)
        return manifest, None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return None, f"{path / MANIFEST_NAME} has not the form of a manifest ({error!r})."


def _check_shape(manifest: Mapping[str, Any]) -> None:
    """Raise whatever comes of using a manifest that is not of the form that is read here."""
    schedule = manifest["schedule"]
    name, total = manifest["method"]["lr_scheduler_type"], int(manifest["max_steps"])
    describe_schedule(schedule, name=name, total_steps=total)
    if schedule is not None:
        multiplier(schedule, int(manifest["schedule_step"]))
    names = [*manifest["files"], *(manifest["averaging"] or {}).keys()]
    sizes = [facts["size"] for facts in manifest["files"].values() if facts["sha256"]]
    numbers = [*sizes, manifest["global_step"], manifest["warmup_steps"], manifest["learning_rate"]]
    texts = [*names, manifest["method"]["optim"], name, manifest["evaluation"]["folder"] or ""]
    if not all(isinstance(n, (int, float)) for n in numbers) or any("\0" in text for text in texts):
        raise TypeError(f"{numbers}, {texts}")


def _problems(path: Path, manifest: Any, trouble: str | None) -> dict[str, str]:
    try:
        if manifest is not None:
            return verify_checkpoint(path)
        wrong = verify_checkpoint(path)
    except OSError as error:
        return {".": f"cannot be read ({error})"}
    return wrong if trouble is None else {MANIFEST_NAME: trouble, **wrong}


def _state(path: Path, problems: Mapping[str, str]) -> str:
    if MANIFEST_NAME in problems:
        version = count(json_object(path / MANIFEST_NAME)[0], "format_version")
        if version not in (None, FORMAT_VERSION):
            return OTHER_FORMAT
    if problems:
        return DAMAGED
    return NOT_RESUMABLE if missing_state(path) else WHOLE


def _writer(path: Path, manifest: Mapping[str, Any] | None) -> str:
    if manifest is not None:
        return f"hf_radam {manifest.get('hf_radam_version', '')}".strip()
    return "hf_radam" if has_hf_radam_files(path) else "stock Trainer"


def _method(path: Path, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """The method by the manifest, else by the arguments that the trainer pickled."""
    if manifest is not None:
        return {key: manifest["method"].get(key) for key in ("optim", "lr_scheduler_type", "ewa")}
    arguments = pickled_attributes(path / ARGUMENTS_NAME)
    names = {key: arguments.get(key) for key in ("optim", "lr_scheduler_type")}
    return {key: name if isinstance(name, str) else None for key, name in names.items()} | {
        "ewa": arguments.get("ewa") is True if arguments else None
    }


def _standing(path: Path, manifest: Mapping[str, Any] | None, method: Mapping[str, Any]) -> dict[str, Any]:
    """How far the run is, and where in its schedule."""
    state = manifest or json_object(path / TRAINER_STATE_NAME)[0]
    update, total = count(state, "global_step"), count(state, "max_steps")
    schedule = manifest["schedule"] if manifest else None
    step: Any = manifest["schedule_step"] if manifest else update
    name, warmup = method["lr_scheduler_type"], _warmup(path, manifest, total)
    rates = learning_rates(path / SCHEDULER_NAME)
    if not rates and manifest and schedule:
        rates = [manifest["learning_rate"] * multiplier(schedule, step)]
    # A damaged checkpoint of ours does not tell the keywords of its schedule: no phase is better than a wrong one.
    known = update is not None and (schedule is not None or name not in ("wsd", "wsd_s"))
    finished = update is not None and bool(total) and update >= (total or 0)
    where = phase(name, schedule, step or 0, finished=finished, warmup_steps=warmup) if known or finished else None
    words = describe_schedule(schedule, name=name, total_steps=total) if name else None
    standing = {"update": update, "max_steps": total, "schedule_step": step, "learning_rates": rates}
    return standing | {"schedule": schedule, "schedule_words": words, "phase": where}


def _warmup(path: Path, manifest: Mapping[str, Any] | None, total: int | None) -> int | None:
    """Updates of the warm-up, where they can be known."""
    asked = manifest["warmup_steps"] if manifest else pickled_attributes(path / ARGUMENTS_NAME).get("warmup_steps")
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not 0 <= asked < float("inf"):
        return None
    if asked >= 1 or not asked:
        return int(asked)
    return None if total is None else -int(-total * asked // 1)  # upstream rounds up


def _schedule_free(groups: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Mode and counters of a schedule-free optimizer, of all groups (None where they differ); None for another one."""
    own = [group for group in groups if {"train_mode", "weight_sum"} <= set(group)]
    if not own:
        return None
    modes = {group["train_mode"] for group in own if isinstance(group["train_mode"], bool)}
    sums = [g["weight_sum"] for g in own if isinstance(g["weight_sum"], float) and math.isfinite(g["weight_sum"])]
    numbers = {count(group, "k") for group in own}
    return {
        "train_mode": modes.pop() if len(modes) == 1 else None,
        "weight_sum": max(sums, default=None),
        "k": numbers.pop() if len(numbers) == 1 else None,
    }


def _root(optim: str | None, average: Mapping[str, Any] | None, *, ours: bool, read: bool) -> str | None:
    """Which weights lie at the root: hf_radam always saves y; stock Trainer what its optimizer's mode says."""
    named = "schedule" in (optim or "") and "free" in (optim or "")
    if ours and (named or average is not None):
        return Y
    if average is not None:
        return None if average["train_mode"] is None else Y if average["train_mode"] else X
    return TRAINING if read or (optim is not None and not named) else None


def _files(path: Path, manifest: Mapping[str, Any] | None, problems: Mapping[str, str]) -> list[FileFacts]:
    known = set(manifest["files"]) | {MANIFEST_NAME} if manifest else None
    there = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return [
        FileFacts(
            name=name,
            size=there[name].stat().st_size if name in there else None,
            problem=problems.get(name),
            in_manifest=None if known is None else name in known,
        )
        for name in sorted({*there, *(known or ()), *problems})
    ]
