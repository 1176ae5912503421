"""`RAdamTrainingArguments`: upstream's arguments plus the flags of our methods, checked when they are made."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_radam import argument_checks
from hf_radam.inherited_fields import check_decorated, keep_declared_fields
from hf_radam.names import OPTIMIZERS, OUR_SCHEDULES, OptimizerName, SchedulerName
from hf_radam.schedules import check_wsd, check_wsd_s, count_from_ratio, wsd, wsd_s
from hf_radam.windows import DEFAULT_HALF_LIFE_RATIO

UPSTREAM_DEFAULT_SCHEDULE = TrainingArguments.__dataclass_fields__["lr_scheduler_type"].default


@dataclass
class RAdamTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the flags of RAdamScheduleFree, WSD, WSD-S and EWA.

    One inherited default changes: `lr_scheduler_type` is `auto`, and is resolved to a schedule's name when the
    arguments are made. Every inherited flag keeps working, and with none of ours set everything is as upstream.

    Raises:
        ValueError: for any value or combination under which a method would not do what it says; the message names
            the flag, the value and the way out.
    """

    optim: OptimizerName | str = field(
        default=TrainingArguments.__dataclass_fields__["optim"].default,
        metadata={
            "help": "Optimizer: `radam` and `radam_schedulefree` (also `schedule_free_radam`) are ours; every upstream "
            "name works too."
        },
    )
    lr_scheduler_type: SchedulerName | str = field(
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
    min_lr_ratio: float = field(default=0.0, metadata={"help": "Floor of the decay, as a ratio of `learning_rate`."})
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
    ewa_every: int = field(default=1, metadata={"help": "Average every this many updates; the window stays the same."})
    ewa_start_step: int = field(default=0, metadata={"help": "Updates to let pass before averaging begins."})
    ewa_device: str | None = field(
        default=None,
        metadata={
            "help": "`cpu` keeps the average in host memory, where it moves while a GPU computes on; the model's "
            "device when not set."
        },
    )
    ewa_eval_raw: bool = field(
        default=False,
        metadata={"help": "Evaluate the training weights too and report them as `eval_raw_loss`."},
    )
    ewa_folded: bool = field(
        default=False,
        metadata={
            "help": "Move the average in the same pass over memory as a fused update: the same average, in less time. "
            "What a callback writes to the weights in `on_optimizer_step` is not averaged then: an error, but for "
            "writes to `p.data`, which nobody sees."
        },
    )
    fused_optimizer: str = field(
        default="auto",
        metadata={
            "help": "Make the updates of `radam` and `radam_schedulefree` in one pass over memory: `true`, `false`, or "
            "`auto`, which does on CPUs where it can be."
        },
    )
    extend_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a run to go on with until `max_steps`: from before its decay (WSD), from its last "
            "budget (WSD-S), or from its last checkpoint; prints the old and the new schedule."
        },
    )
    recalibrate_batch_norm_batches: int = field(
        default=50,
        metadata={
            "help": "Training batches from which BatchNorm statistics are taken again for averaged weights; 0 keeps "
            "those of the training weights. No effect on a model without BatchNorm."
        },
    )

    # What an extended run keeps of the schedule it goes on with (`go_on_with_schedule`): no flags.
    _kept_warmup_steps: int | None = field(default=None, init=False, repr=False)
    _passed_budgets: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Keep the defaults of a dataclass that this is combined with, such as TRL's `SFTConfig`."""
        super().__init_subclass__(**keywords)
        keep_declared_fields(cls)

    def __post_init__(self) -> None:
        """Resolve names, let upstream check its part with stand-ins for ours, then check ours."""
        check_decorated(type(self))
        optim, schedule = self._resolved_names()
        ours_optim, ours_schedule = optim in OPTIMIZERS, schedule in OUR_SCHEDULES
        self.optim = OptimizerNames.ADAMW_TORCH if ours_optim else optim.value
        self.lr_scheduler_type = SchedulerType.CONSTANT if ours_schedule else schedule.value
        super().__post_init__()
        self.optim, self.lr_scheduler_type = optim, schedule
        self.check()

    def _resolved_names(self) -> tuple[Any, Any]:
        """Optimizer and schedule as members of our enums, an alias or `auto` as what it stands for."""
        optim, schedule = OptimizerName(self.optim), SchedulerName(self.lr_scheduler_type)
        if optim == "schedule_free_radam":
            optim = OptimizerName("radam_schedulefree")
        if schedule != "auto":
            return optim, schedule
        if optim == "radam_schedulefree" or self.ewa:
            return optim, SchedulerName("constant_with_warmup" if self.warmup_steps else "constant")
        return optim, SchedulerName("wsd" if optim == "radam" else UPSTREAM_DEFAULT_SCHEDULE)

    def check(self) -> None:
        """Raise `ValueError` for values under which a method would not do what it says.

        Called when the arguments are made, and by the trainer before training, as fields may have been set since
        (each trial of a search does).
        """
        self.optim, self.lr_scheduler_type = self._resolved_names()
        argument_checks.check_names(self)
        argument_checks.check_fused(self)
        argument_checks.check_schedule(self)
        argument_checks.check_ewa(self)
        argument_checks.check_extension(self)
        if self.uses_hf_radam:
            argument_checks.check_numbers(self)
            argument_checks.check_combinations(self)
        if self.max_steps > 0:
            self.check_horizon(self.max_steps)

    def check_horizon(self, num_training_steps: int) -> None:
        """Raise `HorizonError` (a `ValueError`) if schedule or averaging do not fit into a run of so many updates."""
        try:
            self.schedule(num_training_steps)
        except ValueError as error:
            raise argument_checks.HorizonError(str(error)) from error
        if self.ewa and num_training_steps < self.ewa_start_step + self.ewa_every:
            raise argument_checks.HorizonError(
                f"ewa_start_step={self.ewa_start_step} and ewa_every={self.ewa_every} leave no averaging in a run of "
                f"{num_training_steps} updates: the first would come with update "
                f"{self.ewa_start_step + self.ewa_every}."
            )

    @property
    def uses_hf_radam(self) -> bool:
        """Whether any of our methods is on; if not, everything is upstream's."""
        return self.optim in OPTIMIZERS or self.lr_scheduler_type in OUR_SCHEDULES or self.ewa

    def schedule(self, num_training_steps: int) -> functools.partial[float] | None:
        """Our schedule for a run of so many updates, as a partial of a pure function; None for upstream's schedules.

        Raises:
            ValueError: if decay, warm-up and budgets do not fit into the run.
        """
        if self.lr_scheduler_type not in OUR_SCHEDULES:
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
        options["budgets"], options["decay_steps"] = self._resolved_budgets(num_training_steps)
        check_wsd_s(**options)
        return functools.partial(wsd_s, **options)

    def _resolved_budgets(self, num_training_steps: int) -> tuple[list[int], list[int]]:
        """Budgets in updates and the length of the decay before each: first those that were passed, the end last."""
        asked = [count_from_ratio(b, num_training_steps, name="budgets") for b in self.budgets or ()]
        if any(budget > num_training_steps for budget in asked):
            raise ValueError(
                f"budgets={self.budgets} reach past the end of the run at {num_training_steps} updates: "
                "raise max_steps or drop those budgets."
            )
        passed = {budget: length for budget, length in self._passed_budgets.items() if budget <= num_training_steps}
        last = max(passed, default=0)
        late = [budget for budget in asked if budget <= last and budget not in passed]
        if late:
            raise argument_checks.HorizonError(
                f"budgets={self.budgets}: update {late[0]} of {num_training_steps} has passed in the run that is "
                f"extended, which stands at its budget {last}: list later ones only, in updates."
            )
        budgets = [budget for budget in asked if budget > last]
        if max(budgets, default=last) != num_training_steps:
            budgets.append(num_training_steps)
        lengths = [count_from_ratio(self.decay_steps, b, name="decay_steps") for b in budgets]
        return [*passed, *budgets], [*passed.values(), *lengths]

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Updates of the warm-up, as upstream counts them; an extended run keeps those it had."""
        kept = self._kept_warmup_steps
        return super().get_warmup_steps(num_training_steps) if kept is None else kept

    def go_on_with_schedule(self, *, warmup_steps: int, schedule: Mapping[str, Any] | None, step: int) -> None:
        """Keep the past of a run that is extended: its warm-up, and the budgets of WSD-S that it has passed.

        Args:
            warmup_steps: the warm-up that the run had, in updates.
            schedule: keywords of the schedule that the run had; None for one of upstream's.
            step: updates that it has counted.

        Raises:
            HorizonError: if the arguments ask for another warm-up than the run had.
        """
        if self.warmup_steps >= 1 and self.warmup_steps != warmup_steps:
            raise argument_checks.HorizonError(
                f"warmup_steps={self.warmup_steps}, but the run that is extended had {warmup_steps}: leave it out."
            )
        self._kept_warmup_steps = warmup_steps
        self.keep_passed_budgets(schedule, step=step)

    def keep_passed_budgets(self, schedule: Mapping[str, Any] | None, *, step: int) -> None:
        """Keep the budgets of WSD-S that a run has passed by update `step`, from its schedule's keywords."""
        past = schedule if schedule is not None and "budgets" in schedule else {"budgets": [], "decay_steps": []}
        passed = zip(past["budgets"], past["decay_steps"], strict=True)
        self._passed_budgets = {budget: decay for budget, decay in passed if budget <= step}

    def optimizer_class_and_kwargs(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """Class and options of our optimizer; None for upstream's.

        Raises:
            ValueError: if `optim_args` has an option that the optimizer does not know, or a value of another type.
        """
        if self.optim not in OPTIMIZERS:
            return None
        name_of_optimizer = OptimizerName(self.optim).value
        optimizer, types = OPTIMIZERS[name_of_optimizer]
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
                    f"optim_args={self.optim_args!r}: {name_of_optimizer} has no option {name!r}, only {sorted(types)}."
                )
            try:
                kwargs[name] = types[name](value)
            except ValueError as error:
                raise ValueError(f"optim_args={self.optim_args!r}: {name}={value!r} is not valid: {error}.") from None
        return optimizer, kwargs
