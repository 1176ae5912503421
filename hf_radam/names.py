"""Names that `--optim` and `--lr_scheduler_type` take: those of transformers and of this package."""

from __future__ import annotations

from collections.abc import Callable
from enum import EnumMeta
from typing import Any

import torch
from accelerate.utils import str_to_bool
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import ExplicitEnum

from hf_radam.optim import RAdam, RAdamScheduleFree
from hf_radam.schedules import Schedule

CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
"""Schedules of transformers under which schedule-free averaging is right."""


class _OptimizerName(ExplicitEnum):
    __hash__ = ExplicitEnum.__hash__  # by name, as in transformers: its table of optimizers is a dict keyed by them

    def __format__(self, spec: str) -> str:
        """Format as transformers does, in a model card for instance."""
        return format(OptimizerNames[self.name] if self.name in OptimizerNames.__members__ else self.value, spec)


class _WithRegistered(EnumMeta):
    """Make a member of each schedule that was registered since: `HfArgumentParser` takes the members as choices."""

    def __iter__(cls) -> Any:
        for name in Schedule.registered():
            cls(name)
        return super().__iter__()


class _SchedulerName(ExplicitEnum, metaclass=_WithRegistered):
    __hash__ = str.__hash__  # by value, so that `SchedulerType(member)` finds its own

    @classmethod
    def _missing_(cls, value: object) -> Any:
        if value not in Schedule.registered():
            return super()._missing_(value)
        member = str.__new__(cls, value)
        member._name_ = member._value_ = str(value)
        cls._member_names_.append(member._name_)
        cls._member_map_[member._name_] = cls._value2member_map_[value] = member
        return member


def _extended(base: Any, upstream: type[ExplicitEnum], name: str, *more: str) -> Any:
    """Make an enum, as search back-ends turn a value into `type(old_value)(value)`."""
    members = {member.name: member.value for member in upstream} | {value.upper(): value for value in more}
    return base(name, members, module=__name__)


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Callable[[str], Any]]]] = {
    "radam": (RAdam, {"foreach": str_to_bool}),
    "radam_schedulefree": (
        RAdamScheduleFree,
        {"r": float, "weight_lr_power": float, "silent_sgd_phase": str_to_bool, "foreach": str_to_bool},
    ),
}
"""The optimizers of this package: their class, and the options that `--optim_args` may set, each with its type."""
OptimizerName = _extended(_OptimizerName, OptimizerNames, "OptimizerName", *OPTIMIZERS)
"""Every optimizer of transformers, `radam` and `radam_schedulefree`."""
SchedulerName = _extended(_SchedulerName, SchedulerType, "SchedulerName", "auto", "wsd", "wsd_s")
"""Every schedule of transformers, `auto`, `wsd`, `wsd_s`, and each `Schedule` that is defined later."""
