"""Names of optimizers and schedules that the flags take: upstream's and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import ExplicitEnum

from hf_radam.optim import RAdam, RAdamScheduleFree

OUR_SCHEDULES = ("wsd", "wsd_s")
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
"""Upstream's schedules under which schedule-free averaging is right."""


class _OptimizerName(ExplicitEnum):
    """Members hash by name, as upstream's do: its table of optimizers is a dict keyed by them."""

    __hash__ = ExplicitEnum.__hash__

    def __format__(self, spec: str) -> str:
        """Written as upstream's member is, where there is one: in a model card, for instance."""
        known = self.value in {member.value for member in OptimizerNames}
        return format(OptimizerNames(self.value) if known else str(self.value), spec)


class _SchedulerName(ExplicitEnum):
    """Members hash by value, so that upstream's `SchedulerType(member)` finds its own."""

    __hash__ = str.__hash__


def _extended(base: Any, upstream: type[ExplicitEnum], name: str, ours: dict[str, str]) -> Any:
    """An enum of `upstream`'s names and ours: search back-ends turn a value into `type(old_value)(value)`."""
    members = {member.name: member.value for member in upstream} | ours
    return base(name, members, module=__name__)


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
