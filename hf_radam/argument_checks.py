"""Checks of `RAdamTrainingArguments`: each raises `ValueError` with the flag, its value and the way out."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import torch

from hf_radam.names import CONSTANT_SCHEDULES, OPTIMIZERS, OUR_SCHEDULES, OptimizerName, SchedulerName
from hf_radam.schedules import check_decay, count_from_ratio
from hf_radam.windows import check_averaging


class HorizonError(ValueError):
    """Arguments that do not fit into a run whose length is known only when training begins."""


ANY_LENGTH = 10**6  # updates; only to ask whether a value is a count or a ratio at all
SCHEDULE_FLAGS = ("decay_steps", "decay_type", "min_lr_ratio", "budgets")
EWA_FLAGS = ("half_life_ratio", "decay", "every", "start_step", "device", "eval_raw", "folded")


def _changed(args: Any, names: tuple[str, ...]) -> str | None:
    """The first of the fields `names` that is not at its default, as text, or None."""
    defaults = {f.name: f.default for f in dataclasses.fields(args)}
    for name in names:
        if getattr(args, name) != defaults[name]:
            return f"{name}={getattr(args, name)}"
    return None


def check_names(args: Any) -> None:
    """Refuse optimizers and schedules that do not go together, and flags that would have no effect."""
    optim, schedule = OptimizerName(args.optim).value, SchedulerName(args.lr_scheduler_type).value
    if optim in ("schedule_free_adamw", "schedule_free_sgd"):
        raise ValueError(
            f"optim={optim} is not one of ours, and upstream saves and ships its gradient point instead "
            "of its averaged weights: use radam_schedulefree."
        )
    if optim == "radam_schedulefree" and schedule not in CONSTANT_SCHEDULES:
        raise ValueError(
            f"lr_scheduler_type={schedule} with radam_schedulefree: schedule-free averaging needs a constant "
            "learning rate. Use auto, constant or constant_with_warmup."
        )
    if schedule not in OUR_SCHEDULES:
        unused = _changed(args, SCHEDULE_FLAGS)
        if unused:
            raise ValueError(f"{unused} has no effect with lr_scheduler_type={schedule}: use wsd or wsd_s.")
    elif args.budgets is not None and schedule == "wsd":
        raise ValueError(f"budgets={args.budgets} has no effect with lr_scheduler_type=wsd: use wsd_s.")
    elif args.lr_scheduler_kwargs:
        raise ValueError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs} has no effect with {schedule}: "
            "use decay_steps, decay_type, min_lr_ratio, warmup_steps."
        )


def check_fused(args: Any) -> None:
    """Check `fused_optimizer`, which a YAML file may give as a boolean, and write it as a word."""
    wanted = str(args.fused_optimizer).lower()
    if wanted not in ("auto", "true", "false"):
        raise ValueError(f"fused_optimizer={args.fused_optimizer!r} must be auto, true or false.")
    name = OptimizerName(args.optim).value
    if wanted == "true" and name not in OPTIMIZERS:
        raise ValueError(
            f"fused_optimizer=true is for {' and '.join(OPTIMIZERS)}, not for optim={name}: leave it out (upstream has "
            "adamw_torch_fused)."
        )
    if args.ewa_folded and (wanted == "false" or name not in OPTIMIZERS):
        raise ValueError(
            f"ewa_folded=True with optim={name}, fused_optimizer={wanted}: an average moves with the fused update of "
            f"{' or '.join(OPTIMIZERS)} alone. Leave it out."
        )
    args.fused_optimizer = wanted


def check_schedule(args: Any) -> None:
    """Check what is known of our schedules before the length of the run is."""
    if args.recalibrate_batch_norm_batches < 0:
        raise ValueError(
            f"recalibrate_batch_norm_batches={args.recalibrate_batch_norm_batches} must be 0 (off) or more."
        )
    if args.lr_scheduler_type not in OUR_SCHEDULES:
        return
    check_decay(args.decay_type, args.min_lr_ratio)
    if args.budgets is not None and not isinstance(args.budgets, (list, tuple)):
        raise ValueError(f"budgets={args.budgets} must be a list, for instance [{args.budgets}].")
    for name, value in [("decay_steps", args.decay_steps), *(("budgets", b) for b in args.budgets or ())]:
        count_from_ratio(value, ANY_LENGTH, name=name)
    for earlier, later in itertools.pairwise(args.budgets or ()):
        if (earlier < 1) == (later < 1) and earlier >= later:
            raise ValueError(f"budgets must increase, got {later} after {earlier} in {args.budgets}: sort them.")


def check_ewa(args: Any) -> None:
    """Check the flags of the average, and refuse them where no average is kept."""
    if not args.ewa:
        unused = _changed(args, tuple(f"ewa_{name}" for name in EWA_FLAGS))
        if unused:
            raise ValueError(f"{unused} has no effect without ewa: set --ewa.")
        return
    check_averaging(
        decay=args.ewa_decay,
        half_life_ratio=args.ewa_half_life_ratio,
        every=args.ewa_every,
        start_step=args.ewa_start_step,
        prefix="ewa_",
    )
    if args.ewa_device is not None and args.ewa_device != "cpu":
        raise ValueError(f"ewa_device={args.ewa_device!r} must be cpu, or left out for the model's own device.")


def check_numbers(args: Any) -> None:
    """Check numbers that upstream takes as they come; the optimizer checks its own."""
    for name in ("learning_rate", "weight_decay"):
        value = getattr(args, name)
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be a finite number, 0 or more.")
    warmup = args.warmup_steps
    if not math.isfinite(warmup) or (warmup >= 1 and warmup != int(warmup)):
        raise ValueError(f"warmup_steps={warmup} must be a whole number of updates, or a ratio below 1.")
    made = args.optimizer_class_and_kwargs()
    if made is not None:
        optimizer, kwargs = made
        optimizer([torch.zeros(1)], **kwargs)


def check_combinations(args: Any) -> None:
    """Refuse upstream options that would silently break what our methods promise."""
    if args.lr_scheduler_type == "constant" and args.warmup_steps:
        raise ValueError(
            f"lr_scheduler_type=constant ignores warmup_steps={args.warmup_steps}: use auto or constant_with_warmup."
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name} leaves the parameters cast after an evaluation, so what trains and ships would change: "
                "use bf16 (autocast), which evaluates in bf16 too."
            )


def check_extension(args: Any) -> None:
    """Check the flags of an extension, and that there is a run to extend."""
    if args.extend_from is None:
        return
    schedule = SchedulerName(args.lr_scheduler_type).value
    if schedule not in (*OUR_SCHEDULES, *CONSTANT_SCHEDULES):
        raise ValueError(
            f"extend_from={args.extend_from} with lr_scheduler_type={schedule}: its past would change with its length. "
            "Use wsd, wsd_s or a constant learning rate."
        )
    if args.max_steps <= 0:
        raise ValueError(f"extend_from={args.extend_from} needs max_steps, the new total of updates.")
    if not Path(args.extend_from).is_dir():
        raise ValueError(f"extend_from={args.extend_from} is no folder: give the folder of the run to go on with.")
    if str(args.resume_from_checkpoint).lower() not in ("none", "true", "false"):
        raise ValueError(
            f"extend_from={args.extend_from} and resume_from_checkpoint={args.resume_from_checkpoint} both say where "
            "to go on from: drop one. (extend_from also takes a checkpoint.)"
        )
