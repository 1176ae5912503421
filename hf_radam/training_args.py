"""`RAdamTrainingArguments`: upstream's arguments plus the flags of our methods, checked when they are made."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import ExplicitEnum

from hf_radam.averaging import DEFAULT_HALF_LIFE_RATIO, check_averaging
from hf_radam.optim import RAdam, RAdamScheduleFree
from hf_radam.schedules import check_wsd, check_wsd_s, count_from_ratio, wsd, wsd_s


class _OptimizerName(ExplicitEnum):
    """Members hash by name, as upstream's do: its table of optimizers is a dict keyed by them."""

    __hash__ = ExplicitEnum.__hash__


class _SchedulerName(ExplicitEnum):
    """Members hash by value, so that upstream's `SchedulerType(member)` finds its own."""

    __hash__ = str.__hash__  # type: ignore[assignment]


def _extended(base: type[ExplicitEnum], upstream: type[ExplicitEnum], name: str, ours: dict[str, str]) -> Any:
    """An enum of `upstream`'s names and ours: search back-ends turn a value into `type(old_value)(value)`."""
    members = {member.name: member.value for member in upstream} | ours
    return base(name, members, module=__name__)  # type: ignore[call-arg, arg-type]


OptimizerName = _extended(
    _OptimizerName, OptimizerNames, "OptimizerName", {"RADAM": "radam", "RADAM_SCHEDULEFREE": "radam_schedulefree"}
)
"""Every optimizer that upstream knows, and ours: `radam`, `radam_schedulefree`."""
SchedulerName = _extended(
    _SchedulerName, SchedulerType, "SchedulerName", {"AUTO": "auto", "WSD": "wsd", "WSD_S": "wsd_s"}
)
"""Every schedule that upstream knows, and ours: `auto`, `wsd`, `wsd_s`."""

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Callable[[str], Any]]]] = {}
"""Our optimizers: their class, and the options that `--optim_args` may set, each with its type."""


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("must be true or false")
    return text.lower() == "true"


OPTIMIZERS["radam"] = (RAdam, {"foreach": _boolean})
OPTIMIZERS["radam_schedulefree"] = (
    RAdamScheduleFree,
    {"r": float, "weight_lr_power": float, "silent_sgd_phase": _boolean, "foreach": _boolean},
)

UPSTREAM_DEFAULT_SCHEDULE = TrainingArguments.__dataclass_fields__["lr_scheduler_type"].default
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
SCHEDULE_FLAGS = ("decay_steps", "decay_type", "min_lr_ratio", "budgets")
EWA_FLAGS = ("half_life_ratio", "decay", "every", "start_step", "device", "eval_raw")


@dataclass
class RAdamTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the flags of RAdamScheduleFree, WSD, WSD-S and EWA.

    One inherited default changes: `lr_scheduler_type` is `auto`, and is resolved to a schedule's name when the
    arguments are made. Every inherited flag keeps working, and with none of ours set everything is as upstream.

    Raises:
        ValueError: for any value or combination under which a method would not do what it says; the message names
            the flag, the value and the way out.
    """

    optim: OptimizerName | str = field(  # type: ignore[valid-type]
        default=TrainingArguments.__dataclass_fields__["optim"].default,
        metadata={
            "help": "Optimizer: `radam` and `radam_schedulefree` (also `schedule_free_radam`) are ours; every upstream "
            "name works too."
        },
    )
    lr_scheduler_type: SchedulerName | str = field(  # type: ignore[valid-type]
        default="auto",
        metadata={
            "help": "Schedule: `wsd` and `wsd_s` are ours. `auto` is constant (after `warmup_steps`) for "
            "`radam_schedulefree` and with `ewa`, `wsd` for `radam` alone, and upstream's default otherwise."
        },
    )
    decay_steps: float = field(
        default=0.1,
        metadata={
            "help": "Length of the decay of `wsd` and `wsd_s`: updates, or below 1 a ratio of the whole run (WSD) or "
            "of each budget (WSD-S)."
        },
    )
    decay_type: str = field(
        default="1-sqrt",
        metadata={"help": "Shape of the decay: linear, cosine, 1-sqrt, exponential or inverse."},
    )
    min_lr_ratio: float = field(
        default=0.0, metadata={"help": "Floor of the decay, as a ratio of `learning_rate`."}
    )
    budgets: list[float] | None = field(
        default=None,
        metadata={
            "help": "WSD-S: updates (below 1: ratios of the whole run) at which a decayed model is wanted; the end of "
            "the run is always the last and need not be listed."
        },
    )
    ewa: bool = field(
        default=False,
        metadata={"help": "Keep an exponentially weighted average of the weights, evaluate and ship it."},
    )
    ewa_half_life_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Growing window: half-life of the average as a ratio of the updates so far; "
            f"{DEFAULT_HALF_LIFE_RATIO} unless `ewa_decay` is set."
        },
    )
    ewa_decay: float | None = field(
        default=None,
        metadata={"help": "Fixed window instead: decay of the average per update."},
    )
    ewa_every: int = field(
        default=1, metadata={"help": "Average every this many updates; the window stays the same."}
    )
    ewa_start_step: int = field(default=0, metadata={"help": "Updates to let pass before averaging begins."})
    ewa_device: str | None = field(
        default=None,
        metadata={"help": "`cpu` keeps the average in host memory; the model's device when not set."},
    )
    ewa_eval_raw: bool = field(
        default=False,
        metadata={"help": "Evaluate the training weights too and report them as `eval_raw_loss`."},
    )
    recalibrate_batch_norm_batches: int = field(
        default=50,
        metadata={
            "help": "Training batches from which BatchNorm statistics are taken again for averaged weights; 0 keeps "
            "those of the training weights. No effect on a model without BatchNorm."
        },
    )

    def __post_init__(self) -> None:
        """Resolve names, let upstream check its part with stand-ins for ours, then check ours."""
        optim = OptimizerName(self.optim)
        if optim == "schedule_free_radam":
            optim = OptimizerName("radam_schedulefree")
        schedule = self._resolved_schedule(optim, SchedulerName(self.lr_scheduler_type))
        ours_optim, ours_schedule = optim in OPTIMIZERS, schedule in ("wsd", "wsd_s")
        self.optim = OptimizerNames.ADAMW_TORCH if ours_optim else optim.value
        self.lr_scheduler_type = SchedulerType.CONSTANT if ours_schedule else schedule.value
        super().__post_init__()
        self.optim, self.lr_scheduler_type = optim, schedule
        if self.ewa and self.ewa_decay is None and self.ewa_half_life_ratio is None:
            self.ewa_half_life_ratio = DEFAULT_HALF_LIFE_RATIO
        self.check()

    def _resolved_schedule(self, optim: Any, schedule: Any) -> Any:
        if schedule != "auto":
            return schedule
        if optim == "radam_schedulefree" or self.ewa:
            return SchedulerName("constant_with_warmup" if self.warmup_steps else "constant")
        return SchedulerName("wsd" if optim == "radam" else UPSTREAM_DEFAULT_SCHEDULE)

    def check(self) -> None:
        """Raise `ValueError` for values under which a method would not do what it says.

        Called when the arguments are made, and by the trainer before training, as fields may have been set since.
        """
        _check_names(self)
        _check_ewa(self)
        if self.uses_hf_radam:
            _check_numbers(self)
            _check_combinations(self)
        if self.max_steps > 0:
            self.check_horizon(self.max_steps)

    def check_horizon(self, num_training_steps: int) -> None:
        """Raise `ValueError` if schedule or averaging do not fit into a run of so many updates."""
        self.schedule(num_training_steps)
        if self.ewa and num_training_steps < self.ewa_start_step + self.ewa_every:
            raise ValueError(
                f"ewa_start_step={self.ewa_start_step} and ewa_every={self.ewa_every} leave no averaging in a run of "
                f"{num_training_steps} updates: the first would come with update "
                f"{self.ewa_start_step + self.ewa_every}."
            )

    @property
    def uses_hf_radam(self) -> bool:
        """Whether any of our methods is on; if not, everything is upstream's."""
        return self.optim in OPTIMIZERS or self.lr_scheduler_type in ("wsd", "wsd_s") or self.ewa

    def schedule(self, num_training_steps: int) -> functools.partial[float] | None:
        """Our schedule for a run of so many updates, as a partial of a pure function; None for upstream's schedules.

        Raises:
            ValueError: if decay, warm-up and budgets do not fit into the run.
        """
        if self.lr_scheduler_type not in ("wsd", "wsd_s"):
            return None
        options: dict[str, Any] = {
            "warmup_steps": self.get_warmup_steps(num_training_steps),
            "decay_type": self.decay_type,
            "min_lr_ratio": self.min_lr_ratio,
        }
        if self.lr_scheduler_type == "wsd":
            options["total_steps"] = num_training_steps
            options["decay_steps"] = count_from_ratio(self.decay_steps, num_training_steps, name="decay_steps")
            check_wsd(**options)
            return functools.partial(wsd, **options)
        budgets = [count_from_ratio(b, num_training_steps, name="budgets") for b in self.budgets or ()]
        if any(budget > num_training_steps for budget in budgets):
            raise ValueError(
                f"budgets={self.budgets} reach past the end of the run at {num_training_steps} updates: "
                "raise max_steps or drop those budgets."
            )
        if not budgets or budgets[-1] != num_training_steps:
            budgets.append(num_training_steps)
        options["budgets"] = budgets
        options["decay_steps"] = [count_from_ratio(self.decay_steps, b, name="decay_steps") for b in budgets]
        check_wsd_s(**options)
        return functools.partial(wsd_s, **options)

    def optimizer_class_and_kwargs(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """Class and options of our optimizer; None for upstream's.

        Raises:
            ValueError: if `optim_args` has an option that the optimizer does not know, or a value of another type.
        """
        if self.optim not in OPTIMIZERS:
            return None
        optimizer, types = OPTIMIZERS[self.optim.value]
        kwargs: dict[str, Any] = {
            "lr": self.learning_rate,
            "betas": (self.adam_beta1, self.adam_beta2),
            "eps": self.adam_epsilon,
            "weight_decay": self.weight_decay,
        }
        for option in filter(None, (self.optim_args or "").replace(" ", "").split(",")):
            name, _, value = option.partition("=")
            if name not in types:
                raise ValueError(
                    f"optim_args={self.optim_args!r}: {self.optim.value} has no option {name!r}, only {sorted(types)}."
                )
            try:
                kwargs[name] = types[name](value)
            except ValueError as error:
                raise ValueError(f"optim_args={self.optim_args!r}: {name}={value!r} is not valid: {error}.") from None
        return optimizer, kwargs


def _changed(args: RAdamTrainingArguments, names: tuple[str, ...]) -> str | None:
    """The first of the fields `names` that is not at its default, as text, or None."""
    defaults = {f.name: f.default for f in dataclasses.fields(RAdamTrainingArguments)}
    for name in names:
        if getattr(args, name) != defaults[name]:
            return f"{name}={getattr(args, name)}"
    return None


def _check_names(args: RAdamTrainingArguments) -> None:
    """Refuse optimizers and schedules that do not go together, and flags that would have no effect."""
    if args.optim in ("schedule_free_adamw", "schedule_free_sgd"):
        raise ValueError(
            f"optim={args.optim.value} is not one of ours, and upstream saves and ships its gradient point instead "
            "of its averaged weights: use radam_schedulefree."
        )
    schedule = args.lr_scheduler_type
    if args.optim == "radam_schedulefree" and schedule not in CONSTANT_SCHEDULES:
        raise ValueError(
            f"lr_scheduler_type={schedule.value} with radam_schedulefree: schedule-free averaging needs a constant "
            "learning rate. Use auto, constant or constant_with_warmup."
        )
    if schedule not in ("wsd", "wsd_s"):
        unused = _changed(args, SCHEDULE_FLAGS)
        if unused:
            raise ValueError(f"{unused} has no effect with lr_scheduler_type={schedule.value}: use wsd or wsd_s.")
    elif args.budgets is not None and schedule == "wsd":
        raise ValueError(f"budgets={args.budgets} has no effect with lr_scheduler_type=wsd: use wsd_s.")
    elif args.lr_scheduler_kwargs:
        raise ValueError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs} has no effect with {schedule.value}: "
            "use decay_steps, decay_type, min_lr_ratio, warmup_steps."
        )


def _check_ewa(args: RAdamTrainingArguments) -> None:
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


def _check_numbers(args: RAdamTrainingArguments) -> None:
    """Check numbers that upstream takes as they come; the optimizer checks its own."""
    for name in ("learning_rate", "weight_decay"):
        value = getattr(args, name)
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be a finite number, 0 or more.")
    warmup = args.warmup_steps
    if math.isnan(warmup) or (warmup >= 1 and warmup != int(warmup)):
        raise ValueError(f"warmup_steps={warmup} must be a whole number of updates, or a ratio below 1.")
    if args.recalibrate_batch_norm_batches < 0:
        raise ValueError(
            f"recalibrate_batch_norm_batches={args.recalibrate_batch_norm_batches} must be 0 (off) or more."
        )
    made = args.optimizer_class_and_kwargs()
    if made is not None:
        optimizer, kwargs = made
        optimizer([torch.zeros(1)], **kwargs)  # type: ignore[call-arg]


def _check_combinations(args: RAdamTrainingArguments) -> None:
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
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size restarts at update 0 with the used weights and optimizer state: "
            "set per_device_train_batch_size, and gradient_accumulation_steps for the rest."
        )
