"""Go on with a run on a longer schedule: which of its checkpoints, and what of its schedule stays.

A run with WSD goes on from before its decay; one with WSD-S from the last budget it reached, or from later where it has
not begun to decay again; any other from its last checkpoint. Warm-up, and the budgets that were passed, stay as they
were: a ratio of the new total would change the past.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_radam.checkpoints.manifest import OWN_CHECKSUM, TRAINER_STATE_NAME, CheckpointError, read_manifest
from hf_radam.checkpoints.runs import (
    CheckpointRef,
    check_resumable,
    is_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    recorded_step,
    run_of,
)
from hf_radam.checkpoints.storage import sha256
from hf_radam.checkpoints.verify import VerifyFn, verify_checkpoint
from hf_radam.names import SchedulerName
from hf_radam.schedules import Schedule, SchedulePast, describe_schedule
from hf_radam.training_args import HorizonError, RAdamTrainingArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extension:
    """Where an extended run begins.

    Attributes:
        checkpoint: what it goes on from: the source, or a later checkpoint of its own.
        leaves_decay: whether that is the end of a decay of WSD-S, where the learning rate goes back to the peak.
        past: what stays of the old schedule; None of a stock run.
        identity: what tells the source from any other checkpoint; written into those of the extended run.
        words: the old and the new schedule, for the user.
    """

    checkpoint: Path
    leaves_decay: bool
    past: SchedulePast | None
    identity: str
    words: str


def right_command(checkpoint: str, total_steps: int) -> str:
    """What to say instead of resuming a decayed checkpoint into a longer schedule."""
    return f"--extend_from {shlex.quote(str(run_of(Path(checkpoint))))} --max_steps {total_steps}"


def extend(args: RAdamTrainingArguments, *, verify_fn: VerifyFn = verify_checkpoint) -> Extension:
    """Choose where the extended run begins, and what stays of the old schedule.

    Args:
        args: `extend_from` is the run (or one checkpoint of it), `max_steps` the new total.
        verify_fn: verifies a checkpoint.

    Raises:
        CheckpointError: if no checkpoint of the run can be gone on from to that total; the message says why.
        HorizonError: if that total is no extension.
    """
    assert args.extend_from is not None
    source = _source(Path(args.extend_from), args, verify_fn)
    manifest = read_manifest(source.path)
    old, past = "unknown (stock Trainer)", None
    if manifest is not None:
        name, schedule = manifest["method"]["lr_scheduler_type"], schedule_of(manifest)
        old = describe_schedule(schedule, name=name, total_steps=manifest["max_steps"])
        past = SchedulePast(manifest["schedule_step"], schedule, manifest["warmup_steps"])
    args.resolve_warmup_steps(args.max_steps, past)
    schedule = args.schedule(args.max_steps, past)
    _check_decay_to_come(schedule, past.step if past else source.step, source.path)
    new = describe_schedule(schedule, name=SchedulerName(args.lr_scheduler_type).value, total_steps=args.max_steps)

    identity = manifest[OWN_CHECKSUM] if manifest else sha256(source.path / TRAINER_STATE_NAME)
    in_place = _same_folder(run_of(source.path), args.output_dir)

    def check_own(checkpoint: Path) -> None:
        own = read_manifest(checkpoint)
        if not in_place and (own is None or own.get("extended_from") != identity):
            raise HorizonError(
                f"{checkpoint} in output_dir is not of this extension of {args.extend_from}: give another output_dir."
            )
        if own is None or schedule_of(own) != schedule:
            raise CheckpointError("it is not on the schedule of the extended run.")
        check_resumable(checkpoint, verify_fn=verify_fn)

    own = newest_checkpoint(str(args.output_dir), check_own, among=lambda place: place.step > source.step)
    begin = source if own is None else own
    words = f"Extending {args.extend_from} from {begin.path}\n  old: {old}\n  new: {new}"
    leaves_decay = own is None and past is not None and _at_budget(past)
    return Extension(begin.path, leaves_decay, past, identity, words)


def _same_folder(one: Path, other: str | None) -> bool:
    return one.resolve() == Path(str(other)).resolve()


def schedule_of(manifest: Mapping[str, Any]) -> Schedule | None:
    """Return the schedule that a manifest tells of; None for one of transformers."""
    if manifest["schedule"] is None:
        return None
    return Schedule.from_dict(manifest["method"]["lr_scheduler_type"], manifest["schedule"])


def _source(root: Path, args: RAdamTrainingArguments, verify_fn: VerifyFn) -> CheckpointRef:
    """Return the latest checkpoint of the run that the new schedule can begin with."""
    places = [CheckpointRef(recorded_step(root) or 0, "", root)] if is_checkpoint(root) else list_checkpoints(root)
    damaged: list[str] = []
    in_decay: list[str] = []
    total_checked = False
    for place in places:
        try:
            manifest = read_manifest(place.path)
            if manifest is not None and not total_checked:
                _check_total(manifest, root, args)
                total_checked = True
            decay = None
            if manifest is not None and (schedule := schedule_of(manifest)) is not None:
                decay = schedule.decay_at(manifest["schedule_step"])
            if decay is not None:
                in_decay.append(f"{place.path} stands in the decay from update {decay[0]} to {decay[1]}.")
                continue
            check_resumable(place.path, verify_fn=verify_fn)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            logger.warning("Passing over: %s", text)
        return place
    why = " ".join([*damaged, *in_decay]) or "There is no checkpoint in it."
    raise CheckpointError(f"extend_from={root}: nothing to go on from to {args.max_steps} updates. {why}")


def _check_total(newest_manifest: Mapping[str, Any], root: Path, args: RAdamTrainingArguments) -> None:
    """Raise `HorizonError` if the new total is no extension of what was planned (WSD) or done (others)."""
    schedule, total = newest_manifest["schedule"], args.max_steps
    if schedule is not None and "total_steps" in schedule:
        if total < schedule["total_steps"]:
            raise HorizonError(
                f"max_steps={total} is fewer than the {schedule['total_steps']} updates of {root}: raise it, or for a "
                "shorter run resume one of its checkpoints from before the decay with --resume_from_checkpoint."
            )
        return
    done = newest_manifest["schedule_step"]
    again = _same_folder(root, args.output_dir)  # the command may be given again at the end
    if total < done or (total == done and not again):
        raise HorizonError(
            f"max_steps={total} leaves nothing to train: {root} has had {done} updates. Raise max_steps, the new total."
        )


def _check_decay_to_come(schedule: Schedule | None, step: int, checkpoint: Path) -> None:
    """Raise `HorizonError` if a decay of the new schedule should have begun before the checkpoint."""
    for start, end in [] if schedule is None else schedule.decays():
        if start < step < end:
            raise HorizonError(
                f"The decay to update {end} would begin at {start}, before {checkpoint} at update {step}: raise "
                "max_steps, shorten decay_steps, or name an earlier checkpoint of the run in extend_from."
            )


def _at_budget(past: SchedulePast) -> bool:
    return past.schedule is not None and past.schedule.resets_to_peak(past.step)
