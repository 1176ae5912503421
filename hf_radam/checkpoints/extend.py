"""Plan how a run is resumed or extended: a pure function of the run's folder and the arguments.

A run with WSD is extended from before its decay; one with WSD-S from the last budget it reached, or from later where it
has not begun to decay again; any other from its last checkpoint. Its warm-up and the budgets it has passed stay as they
were: a ratio of the new total would change the past.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_radam.checkpoints.manifest import (
    OWN_CHECKSUM,
    TRAINER_STATE_NAME,
    CheckpointError,
    read_manifest,
)
from hf_radam.checkpoints.runs import (
    CheckpointRef,
    check_resumable,
    is_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    recorded_step,
    run_of,
    step_of,
)
from hf_radam.checkpoints.storage import sha256
from hf_radam.names import SchedulerName
from hf_radam.schedules import Schedule, SchedulePast, describe_schedule
from hf_radam.training_args import HorizonError, RAdamTrainingArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePlan:
    """What a run resumes from. Made on rank 0, broadcast, and only read afterwards.

    Attributes:
        checkpoint: the folder to load.
        manifest: its manifest without the list of files; None for one of stock `Trainer`.
        past: what the new schedule keeps of the old one; None for a schedule of upstream's.
        sets_learning_rate: whether the new schedule sets the rate of the next step, which the old one would have made
            another: an extension begins at a checkpoint that the old schedule pinned, such as a budget of WSD-S.
        extended_from: hash that identifies the checkpoint of another run from which this run was extended, or None.
        summary: the old and the new schedule, to be printed; None but for an extension.
    """

    checkpoint: str
    manifest: Mapping[str, Any] | None
    past: SchedulePast | None = None
    sets_learning_rate: bool = False
    extended_from: str | None = None
    summary: str | None = None


def plan_resume(args: RAdamTrainingArguments, wanted: str | bool | None, *, verify: bool = True) -> ResumePlan | None:
    """Choose the checkpoint to resume from, complete and verified, and what stays of its schedule; None for a new run.

    Args:
        args: the arguments; they are only read.
        wanted: `resume_from_checkpoint` of `Trainer.train`: a checkpoint, True for the newest of the run, or nothing.
        verify: whether to verify the checkpoint that is extended; a preview goes by the manifests alone.

    Raises:
        CheckpointError: if the checkpoint is corrupted, or there is none to resume from.
        HorizonError: if `max_steps` is no extension of the run in `extend_from`.
        ValueError: if `extend_from` and a checkpoint are both given.
    """
    if isinstance(wanted, str) and wanted.lower() in ("true", "false"):  # as the field of the arguments has it
        wanted = wanted.lower() == "true"
    if args.extend_from is not None:
        if isinstance(wanted, str):
            raise ValueError(
                f"extend_from={args.extend_from} and resume_from_checkpoint={wanted} both name a checkpoint. Drop one."
            )
        return _plan_extension(args, verify)
    if not wanted:
        _warn_of_earlier_run(args)
        return None
    checkpoint = _newest(args) if wanted is True else _named(args, str(wanted))
    manifest = _manifest(checkpoint)
    if manifest is None:
        return ResumePlan(checkpoint, None)
    past = SchedulePast(manifest["schedule_step"], _schedule(manifest), None)
    return ResumePlan(checkpoint, manifest, past, extended_from=manifest.get("extended_from"))


def extend_command(checkpoint: str, total_steps: int) -> str:
    """Return the flags that extend the run of a checkpoint."""
    return f"--extend_from {shlex.quote(str(run_of(Path(checkpoint))))} --max_steps {total_steps}"


# ---- Resume ----


def _warn_of_earlier_run(args: RAdamTrainingArguments) -> None:
    found = list_checkpoints(str(args.output_dir))
    if found:
        logger.warning(
            f"{found[0].path} belongs to an earlier run. This run starts anew, and resume_from_checkpoint=True would "
            "take the highest number, whichever run wrote it: give each run its own output_dir."
        )


def _newest(args: RAdamTrainingArguments) -> str:
    run = Path(str(args.output_dir))
    found = newest_checkpoint(run, check_resumable)
    if found is None:
        raise CheckpointError(
            f"There is no complete checkpoint in {run} to resume from. Leave resume_from_checkpoint out to start."
        )
    return str(found.path)


def _named(args: RAdamTrainingArguments, path: str) -> str:
    if not Path(path, TRAINER_STATE_NAME).is_file() and read_manifest(path) is None:
        raise CheckpointError(f"{path} has no {TRAINER_STATE_NAME}. Give the folder of a checkpoint, checkpoint-N.")
    check_resumable(path)
    later = list_checkpoints(str(args.output_dir))[:1]
    if later and later[0].step > (step_of(path) or later[0].step):
        logger.warning(
            f"{later[0].path} is later than {path}, from which this run resumes. It stays until it is overwritten, and "
            "resume_from_checkpoint=True would take it: remove it, or use another output_dir."
        )
    return path


def _manifest(checkpoint: str | Path) -> dict[str, Any] | None:
    manifest = read_manifest(checkpoint)
    return None if manifest is None else {key: value for key, value in manifest.items() if key != "files"}


def _schedule(manifest: Mapping[str, Any]) -> Schedule | None:
    keywords = manifest["schedule"]
    return None if keywords is None else Schedule.from_dict(manifest["method"]["lr_scheduler_type"], keywords)


# ---- Extension ----


def _plan_extension(args: RAdamTrainingArguments, verify: bool) -> ResumePlan:
    source = _find_source(args, verify)
    manifest, name = _manifest(source.path), SchedulerName(args.lr_scheduler_type).value
    past, old = None, "unknown (stock Trainer)"
    if manifest is not None:
        schedule = _schedule(manifest)
        past = SchedulePast(manifest["schedule_step"], schedule, manifest["warmup_steps"])
        old = describe_schedule(
            schedule, name=manifest["method"]["lr_scheduler_type"], total_steps=manifest["max_steps"]
        )
    args.resolve_warmup_steps(args.max_steps, past)  # also of a schedule of transformers
    new = args.schedule(args.max_steps, past)
    _check_decay_to_come(new, manifest["schedule_step"] if manifest else source.step, source.path)
    identity = manifest[OWN_CHECKSUM] if manifest else sha256(source.path / TRAINER_STATE_NAME)
    own = _own_checkpoint(args, source, new, identity, verify)
    begin = source if own is None else own
    begin_manifest = manifest if own is None else _manifest(own.path)
    return ResumePlan(
        checkpoint=str(begin.path),
        manifest=begin_manifest,
        past=past,
        sets_learning_rate=own is None and past is not None and _is_pinned(past),
        extended_from=identity,
        summary=f"Extending {args.extend_from} from {begin.path}\n  old: {old}\n"
        f"  new: {describe_schedule(new, name=name, total_steps=args.max_steps)}",
    )


def _is_pinned(past: SchedulePast) -> bool:
    return past.schedule is not None and past.schedule.pinned_at(past.step) is not None


def _own_checkpoint(
    args: RAdamTrainingArguments, source: CheckpointRef, new: Schedule | None, identity: str, verify: bool
) -> CheckpointRef | None:
    """Find the newest checkpoint that an earlier start of the same command wrote into `output_dir`."""
    in_place = run_of(source.path).resolve() == Path(str(args.output_dir)).resolve()

    def accept(checkpoint: Path) -> None:
        own = read_manifest(checkpoint)
        if not in_place and (own is None or own.get("extended_from") != identity):
            raise HorizonError(
                f"{checkpoint} in output_dir is not of this extension of {args.extend_from}. Use another output_dir."
            )
        if own is None or _schedule(own) != new:
            raise CheckpointError("it is not on the schedule of the extended run.")
        check_resumable(checkpoint, verify=verify)

    return newest_checkpoint(str(args.output_dir), accept, among=lambda ref: ref.step > source.step)


def _find_source(args: RAdamTrainingArguments, verify: bool) -> CheckpointRef:
    """Find the latest checkpoint in `extend_from` from which a longer schedule can continue."""
    root = Path(str(args.extend_from))
    found = [CheckpointRef(recorded_step(root) or 0, "", root)] if is_checkpoint(root) else list_checkpoints(root)
    corrupted: list[str] = []
    in_decay: list[str] = []
    is_newest = True
    for ref in found:
        try:
            manifest = read_manifest(ref.path)
            if manifest is not None:
                if is_newest:
                    _check_total(manifest, root, args)
                is_newest = False
                schedule = _schedule(manifest)
                decay = None if schedule is None else schedule.decay_at(manifest["schedule_step"])
                if decay is not None:
                    in_decay.append(f"{ref.path} is in the decay from step {decay[0]} to {decay[1]}.")
                    continue
            check_resumable(ref.path, verify=verify)
        except CheckpointError as error:
            corrupted.append(str(error))
            continue
        for text in corrupted:
            logger.warning("Skipping: %s", text)
        return ref
    why = " ".join([*corrupted, *in_decay]) or "There is no checkpoint in it."
    raise CheckpointError(f"extend_from={root} cannot be extended to {args.max_steps} steps. {why}")


def _check_total(newest: Mapping[str, Any], root: Path, args: RAdamTrainingArguments) -> None:
    """Raise `HorizonError` if the new total is less than was planned (WSD) or done (others)."""
    schedule, total = _schedule(newest), args.max_steps
    if schedule is not None and schedule.decay_at(schedule.total_steps) is not None:
        if total < schedule.total_steps:
            raise HorizonError(
                f"max_steps={total} is less than the {schedule.total_steps} steps of {root}. Raise it, or for a "
                "shorter run resume one of its checkpoints from before the decay with --resume_from_checkpoint."
            )
        return
    done = newest["schedule_step"]
    again = root.resolve() == Path(str(args.output_dir)).resolve()  # the finished command may be given again
    if total < done or (total == done and not again):
        raise HorizonError(f"max_steps={total} leaves nothing to train: {root} has completed {done} steps. Raise it.")


def _check_decay_to_come(schedule: Schedule | None, step: int, checkpoint: Path) -> None:
    """Raise `HorizonError` if a decay of the new schedule would have begun before the checkpoint."""
    for phase in schedule.phases() if schedule is not None else ():
        if phase.name == "decay" and phase.start < step < phase.end:
            raise HorizonError(
                f"The decay to step {phase.end} would begin at {phase.start}, before {checkpoint} at step {step}. "
                "Raise max_steps, shorten decay_steps, or name an earlier checkpoint of the run in extend_from."
            )
