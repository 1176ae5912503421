"""`RAdamTrainingArguments`: the arguments of transformers plus the flags of this package, checked when made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ForwardRef

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_radam.averaging import DEFAULT_HALF_LIFE_RATIO, check_averaging
from hf_radam.names import CONSTANT_SCHEDULES, OPTIMIZERS, OptimizerName, SchedulerName
from hf_radam.schedules import SCHEDULE_FLAGS, Schedule, SchedulePast, check_decay, count_from_ratio

UPSTREAM_DEFAULT_SCHEDULE = TrainingArguments.__dataclass_fields__["lr_scheduler_type"].default


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


class HorizonError(ValueError):
    """Arguments that do not fit into a run of this length, which may be known only when training begins."""


@dataclass
class RAdamTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the flags of RAdamScheduleFree, WSD, WSD-S and EWA.

    One inherited default changes: `lr_scheduler_type` is `auto`, and is resolved to the name of a schedule when the
    arguments are made. Every inherited flag keeps working, and without the flags below all is as in transformers.

    Raises:
        ValueError: For any value or combination under which a method would not do what it says.
    """

    optim: OptimizerName | str = _flag(
        TrainingArguments.__dataclass_fields__["optim"].default,
        "Optimizer: `radam`, `radam_schedulefree` (or `schedule_free_radam`), or any name that transformers knows.",
    )
    lr_scheduler_type: SchedulerName | str = _flag(
        "auto",
        "Schedule: `wsd`, `wsd_s`, or any name that transformers knows. `auto` is a constant learning rate (after "
        "`warmup_steps`) for `radam_schedulefree` and with `ewa`, `wsd` for `radam` alone, and else the default of "
        "transformers.",
    )
    decay_steps: float = _flag(
        0.1,
        "Length of the decay: in steps, or below 1 as a ratio of the run (`wsd`) or of each budget (`wsd_s`).",
    )
    decay_type: str = _flag("1-sqrt", "Shape of the decay: `linear`, `cosine`, `1-sqrt`, `exponential` or `inverse`.")
    min_lr_ratio: float = _flag(0.0, "Learning rate at the end of the decay, as a ratio of `learning_rate`.")
    budgets: list[float] | None = _flag(
        None,
        "Steps at which `wsd_s` ends a decay, or ratios of the run below 1. The end of the run is always the last "
        "budget and need not be listed; by default it is the only one.",
    )
    ewa: bool = _flag(
        False, "Keep an EWA, an exponential moving average of the weights: evaluation and the saved model use it."
    )
    ewa_half_life_ratio: float | None = _flag(
        None,
        "Half-life of the average as a ratio of the steps since averaging began, so that its window grows. "
        f"{DEFAULT_HALF_LIFE_RATIO} unless `ewa_decay` is set.",
    )
    ewa_decay: float | None = _flag(
        None,
        "Decay of the average per step, such as 0.999: a window of fixed length in place of one that grows.",
    )
    ewa_every: int = _flag(1, "Steps between two averagings. The window of the average stays the same.")
    ewa_start_step: int = _flag(0, "Completed steps before averaging begins. 0 averages from the first step on.")
    ewa_device: str | None = _flag(
        None,
        "`cpu` keeps the average in host memory and moves it there while a GPU computes on. By default it is kept "
        "on the device of the model.",
    )
    ewa_eval_raw: bool = _flag(False, "Evaluate the training weights too, and report their loss as `eval_raw_loss`.")
    fused_optimizer: str = _flag(
        "auto",
        "Make each step of `radam` and `radam_schedulefree` in one pass over memory: `true`, `false`, or `auto`, "
        "which does so wherever it is possible.",
    )
    extend_from: str | None = _flag(
        None,
        "Folder of a run to continue to a larger `max_steps`: from the checkpoint before its decay (`wsd`), at its "
        "last budget (`wsd_s`), or from its last checkpoint. Prints the old and the new schedule.",
    )
    recalibrate_batch_norm_batches: int = _flag(
        50,
        "Training batches from which the BatchNorm statistics of averaged weights are computed; 0 takes those of the "
        "training weights. Without effect on a model that has no BatchNorm layer.",
    )

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Keep the defaults of a dataclass that this is combined with, such as TRL's `SFTConfig`."""
        super().__init_subclass__(**keywords)
        _keep_declared_fields(cls)

    def __post_init__(self) -> None:
        """Resolve names, let transformers check its part with stand-ins for names it lacks, then check the rest."""
        _check_decorated(type(self))
        optim, schedule = self._resolved_names()
        self.optim = OptimizerNames.ADAMW_TORCH if optim in OPTIMIZERS else optim.value
        self.lr_scheduler_type = SchedulerType.CONSTANT if schedule in Schedule.registered() else schedule.value
        super().__post_init__()
        self.optim, self.lr_scheduler_type = optim, schedule
        self.check()

    def _resolved_names(self) -> tuple[Any, Any]:
        """Return optimizer and schedule as enum members, an alias or `auto` as what it stands for."""
        optim, schedule = OptimizerName(self.optim), SchedulerName(self.lr_scheduler_type)
        if optim == "schedule_free_radam":
            optim = OptimizerName("radam_schedulefree")
        if schedule != "auto":
            return optim, schedule
        if optim == "radam_schedulefree" or self.ewa:
            return optim, SchedulerName("constant_with_warmup" if self.warmup_steps else "constant")
        return optim, SchedulerName("wsd" if optim == "radam" else UPSTREAM_DEFAULT_SCHEDULE)

    @property
    def uses_hf_radam(self) -> bool:
        """Whether any method of this package is on; if not, everything is left to transformers."""
        return self.optim in OPTIMIZERS or self.lr_scheduler_type in Schedule.registered() or self.ewa

    def check(self) -> None:
        """Raise `ValueError` for values under which a method would not do what it says.

        The trainer calls it again before training, as a search sets fields.
        """
        self.optim, self.lr_scheduler_type = self._resolved_names()
        self._check_names()
        self._check_fused()
        self._check_schedule()
        self._check_ewa()
        self._check_extension()
        if self.uses_hf_radam:
            self._check_numbers()
            check_combinations(self)
        if self.max_steps > 0 and self.extend_from is None:  # whose past is known when training begins
            self.check_horizon(self.max_steps)

    def check_horizon(self, total_steps: int, past: SchedulePast | None = None) -> None:
        """Raise `HorizonError` if schedule or averaging do not fit into a run of `total_steps` steps."""
        self.schedule(total_steps, past)
        first = self.ewa_start_step + self.ewa_every
        if self.ewa and total_steps < first:
            raise HorizonError(
                f"ewa_start_step={self.ewa_start_step} and ewa_every={self.ewa_every} leave no averaging in a run of "
                f"{total_steps} steps: the first would be after step {first}. Lower them."
            )

    def schedule(self, total_steps: int, past: SchedulePast | None = None) -> Schedule | None:
        """Return the schedule of a run of `total_steps` steps; None for the schedules of transformers.

        Raises:
            HorizonError: If decay, warm-up and budgets do not fit into the run.
        """
        kind = Schedule.registered().get(SchedulerName(self.lr_scheduler_type).value)
        try:
            return None if kind is None else kind.from_arguments(self, total_steps, past)
        except ValueError as error:
            raise HorizonError(str(error)) from error

    def resolve_warmup_steps(self, total_steps: int, past: SchedulePast | None = None) -> int:
        """Return the length of the warm-up in steps; an extended run keeps its own, or raises `HorizonError`."""
        if past is None or past.warmup_steps is None:
            return self.get_warmup_steps(total_steps)
        if self.warmup_steps >= 1 and self.warmup_steps != past.warmup_steps:
            raise HorizonError(
                f"warmup_steps={self.warmup_steps}, but the run that is extended had {past.warmup_steps}. Leave it out."
            )
        return past.warmup_steps

    def optimizer_class_and_kwargs(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """Return class and options of the optimizer, None for those of transformers; `ValueError` for wrong ones."""
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
                    f"optim_args={self.optim_args!r}: {name_of_optimizer} has no option {name!r}. Use {[*types]}."
                )
            try:
                kwargs[name] = types[name](value)
            except ValueError as error:
                raise ValueError(f"optim_args={self.optim_args!r}: {name}={value!r} is not valid: {error}.") from None
        return optimizer, kwargs

    def _changed(self, names: Collection[str]) -> str | None:
        defaults = {one.name: one.default for one in dataclasses.fields(self)}
        return next((f"{name}={getattr(self, name)}" for name in names if getattr(self, name) != defaults[name]), None)

    def _check_names(self) -> None:
        optim, schedule = OptimizerName(self.optim).value, SchedulerName(self.lr_scheduler_type).value
        if optim in ("schedule_free_adamw", "schedule_free_sgd"):
            raise ValueError(
                f"optim={optim}: transformers evaluates and saves its gradient point, not its averaged weights. Use "
                "radam_schedulefree."
            )
        if optim == "radam_schedulefree" and schedule not in CONSTANT_SCHEDULES:
            raise ValueError(
                f"lr_scheduler_type={schedule} with radam_schedulefree: schedule-free averaging needs a constant "
                "learning rate. Use auto, constant or constant_with_warmup."
            )
        kind = Schedule.registered().get(schedule)
        options = set() if kind is None else kind.option_names()
        unused = self._changed([name for name in SCHEDULE_FLAGS if name not in options])
        if unused:
            fitting = {
                name for name, one in Schedule.registered().items() if unused.split("=")[0] in one.option_names()
            }
            raise ValueError(
                f"{unused} has no effect with lr_scheduler_type={schedule}. Use {' or '.join(sorted(fitting))}, or "
                "leave it out."
            )
        further = options - {*SCHEDULE_FLAGS}
        unknown = set() if kind is None else {*(self.lr_scheduler_kwargs or {})} - further
        if unknown:
            raise ValueError(
                f"lr_scheduler_kwargs={self.lr_scheduler_kwargs}: {min(unknown)} has no effect with {schedule}. "
                f"Use the flags, and here {', '.join(sorted(further)) or 'nothing'}."
            )

    def _check_fused(self) -> None:
        wanted = str(self.fused_optimizer).lower()  # a YAML file may give a boolean
        if wanted not in ("auto", "true", "false"):
            raise ValueError(f"fused_optimizer={self.fused_optimizer!r} is not known. Use auto, true or false.")
        name = OptimizerName(self.optim).value
        if wanted == "true" and name not in OPTIMIZERS:
            raise ValueError(
                f"fused_optimizer=true has no effect with optim={name}. Use {' or '.join(OPTIMIZERS)}, or leave it out."
            )
        self.fused_optimizer = wanted

    def _check_schedule(self) -> None:
        if self.recalibrate_batch_norm_batches < 0:
            raise ValueError(
                f"recalibrate_batch_norm_batches={self.recalibrate_batch_norm_batches} is negative. Use 0 or more."
            )
        if not isinstance(self.budgets, (list, tuple, type(None))):
            raise ValueError(f"budgets={self.budgets!r} is not a list. Write [{self.budgets!r}].")
        if self.lr_scheduler_type in Schedule.registered():
            check_decay(self.decay_type, self.min_lr_ratio)
            for name, value in [("decay_steps", self.decay_steps), *(("budgets", b) for b in self.budgets or ())]:
                count_from_ratio(value, 10**6, name=name)  # any length: only to ask whether it is a count or a ratio

    def _check_ewa(self) -> None:
        if not self.ewa:
            unused = self._changed([one.name for one in dataclasses.fields(self) if one.name.startswith("ewa_")])
            if unused:
                raise ValueError(f"{unused} has no effect without ewa. Set --ewa.")
            return
        check_averaging(
            decay=self.ewa_decay,
            half_life_ratio=self.ewa_half_life_ratio,
            every=self.ewa_every,
            start_step=self.ewa_start_step,
            prefix="ewa_",
        )
        if self.ewa_device not in (None, "cpu"):
            raise ValueError(f"ewa_device={self.ewa_device!r} is not known. Use cpu, or leave it out.")

    def _check_extension(self) -> None:
        if self.extend_from is None:
            return
        schedule = SchedulerName(self.lr_scheduler_type).value
        if schedule not in (*Schedule.registered(), *CONSTANT_SCHEDULES):
            raise ValueError(
                f"extend_from={self.extend_from} with lr_scheduler_type={schedule}: its learning rates so far would "
                "depend on max_steps. Use wsd, wsd_s or a constant learning rate."
            )
        if self.max_steps <= 0:
            raise ValueError(f"extend_from={self.extend_from} needs a new length of the run. Set --max_steps.")
        if not Path(self.extend_from).is_dir():
            raise ValueError(f"extend_from={self.extend_from} is not a folder. Give the folder of the run to extend.")
        if str(self.resume_from_checkpoint).lower() not in ("none", "true", "false"):
            raise ValueError(
                f"extend_from={self.extend_from} and resume_from_checkpoint={self.resume_from_checkpoint} exclude each "
                "other. Drop one; extend_from also takes a checkpoint."
            )

    def _check_numbers(self) -> None:
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number, 0 or more.")
        warmup = self.warmup_steps
        if not math.isfinite(warmup) or (warmup >= 1 and warmup != int(warmup)):
            raise ValueError(f"warmup_steps={warmup} must be a whole number of steps, or a ratio below 1.")
        made = self.optimizer_class_and_kwargs()
        if made is not None:
            optimizer, kwargs = made
            optimizer([torch.zeros(1)], **kwargs)


def check_combinations(args: RAdamTrainingArguments) -> None:
    """Refuse options of transformers that would silently break what the methods of this package promise."""
    if args.lr_scheduler_type == "constant" and args.warmup_steps:
        raise ValueError(
            f"lr_scheduler_type=constant ignores warmup_steps={args.warmup_steps}. Use auto or constant_with_warmup."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True begins again at step 0 with weights that have trained. Set "
            "per_device_train_batch_size, and gradient_accumulation_steps for the rest."
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name}=True leaves the parameters cast after an evaluation, so other weights would train and ship. "
                "Use bf16=True (autocast), which evaluates in bf16 too."
            )


# `dataclasses` takes a field that several bases have from the first, and a base has all fields that it inherits:
# `(RAdamTrainingArguments, SFTConfig)` would have the learning rate of `TrainingArguments`, not of `SFTConfig`.
# The functions below take each default from the class that declares it, as a plain class does.


def _keep_declared_fields(cls: type) -> None:
    """Declare in a class that `@dataclass` is about to see every field that it would take from the wrong base."""
    options = ("default", "default_factory", "init", "repr", "hash", "compare", "metadata", "kw_only")
    for name, (base, declared) in _declared_fields(cls, own=cls.__annotations__).items():
        # A type in quotes is looked up where it was written.
        quoted = isinstance(declared.type, str)
        cls.__annotations__[name] = ForwardRef(str(declared.type), module=base.__module__) if quoted else declared.type
        setattr(cls, name, field(**{option: getattr(declared, option) for option in options}))


def _check_decorated(cls: type) -> None:
    if "__dataclass_fields__" not in vars(cls) and _declared_fields(cls, own=()):
        raise TypeError(f"{cls.__name__} has fields of several dataclasses. Write @dataclass above it.")


def _declared_fields(cls: type, *, own: Collection[str]) -> dict[str, tuple[type, dataclasses.Field[Any]]]:
    """Return the fields, with the base that declares them, that would be taken from a base that only inherits them."""
    bases = [base for base in cls.__mro__[1:] if "__dataclass_fields__" in vars(base)]
    known = {base: vars(base)["__dataclass_fields__"] for base in bases}
    declared: dict[str, tuple[type, dataclasses.Field[Any]]] = {}
    for base in bases:
        inherited = [known[further] for further in base.__mro__[1:] if further in known]
        for name, one in known[base].items():
            if name not in declared and not any(one is of_base.get(name) for of_base in inherited):
                declared[name] = base, one  # a field that is inherited is the same object
    taken = {name: one for base in reversed(bases) for name, one in known[base].items()}
    return {name: found for name, found in declared.items() if found[1] is not taken[name] and name not in own}
