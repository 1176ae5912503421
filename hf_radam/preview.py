"""What a schedule will do in a run, update by update and phase by phase, without training.

The learning rates are those of the scheduler that the trainer would make: of ours the pure function, of upstream's the
function inside the scheduler that upstream makes on an optimizer without gradients. Update n (1 for the first) is made
at `learning_rate * multiplier(n - 1)`, as everywhere here.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from hf_radam.averaging import DEFAULT_HALF_LIFE_RATIO
from hf_radam.checkpoints.runs import PREFIX
from hf_radam.names import OPTIMIZERS, OptimizerName, SchedulerName
from hf_radam.optim import radam, schedule_free
from hf_radam.optim.radam import rectification
from hf_radam.schedules import DECAY, STABLE, WARM_UP, Schedule, SchedulePast, describe_schedule
from hf_radam.training_args import RAdamTrainingArguments

THRESHOLDS = {"radam": radam.THRESHOLD, "radam_schedulefree": schedule_free.THRESHOLD}


@dataclass(frozen=True)
class Phase:
    """Updates that follow each other and do the same.

    Attributes:
        name: `warm-up`, `stable` or `decay`.
        first, last: numbers of its first and last update, from 1.
        first_rate, last_rate: the learning rates at which these two are made.
        kept: the checkpoint of the state after the last one that is kept for good, by its path in the run, or None.
    """

    name: str
    first: int
    last: int
    first_rate: float
    last_rate: float
    kept: str | None = None

    @property
    def updates(self) -> int:
        """How many there are."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Preview:
    """A schedule, resolved for a run.

    Attributes:
        words: the schedule in a line.
        rates: the learning rate of every update, the first one's at index 0.
        phases: the phases, which make up the run.
        factors: RAdam's rectification of every update, None where it is undefined; None for another optimizer.
        optim: the optimizer, by its name.
        average: the window of the average in a line, or None.
        warning: what training would warn of in the schedule, or None.
    """

    words: str
    rates: list[float]
    phases: list[Phase]
    factors: list[float | None] | None
    optim: str
    average: str | None
    warning: str | None


def preview(args: RAdamTrainingArguments, past: SchedulePast | None = None) -> Preview:
    """Resolve the schedule of a run of `args.max_steps` updates.

    Raises:
        ValueError: if the length of the run is not set, or the schedule follows the losses of the training.
    """
    if args.max_steps <= 0:
        raise ValueError(
            f"max_steps is not set, and how many updates num_train_epochs={args.num_train_epochs:g} are is known only "
            "with the data: add --max_steps N."
        )
    total, name = args.max_steps, SchedulerName(args.lr_scheduler_type).value
    schedule = args.schedule(total, past)
    multiplier = upstream_multiplier(args, total, past) if schedule is None else schedule.multiplier
    rates = [args.learning_rate * multiplier(step) for step in range(total + 1)]
    phases = phases_of_rates(rates) if schedule is None else phases_of_schedule(schedule, rates)
    return Preview(
        words=describe_schedule(schedule, name=name, total_steps=total),
        rates=rates[:-1],
        phases=phases,
        factors=_factors(args, total),
        optim=OptimizerName(args.optim).value,
        average=_average(args, total),
        warning=None if schedule is None else schedule.warning(),
    )


def upstream_multiplier(args: RAdamTrainingArguments, total: int, past: SchedulePast | None) -> Callable[[int], float]:
    """The function of the updates done by which upstream's scheduler multiplies the learning rate.

    Raises:
        ValueError: if upstream refuses its options, or the schedule has no such function.
    """
    name = SchedulerName(args.lr_scheduler_type).value
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate),
            num_warmup_steps=args.resolve_warmup_steps(total, past),
            num_training_steps=total,
            scheduler_specific_kwargs=cast("dict[str, Any] | None", args.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        options = f"lr_scheduler_kwargs={args.lr_scheduler_kwargs}"
        raise ValueError(f"lr_scheduler_type={name} with {options} is refused by transformers: {error}") from error
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type={name} follows the losses of the training: there is no curve before it has run."
        )
    (function,) = scheduler.lr_lambdas
    return function


def phases_of_schedule(schedule: Schedule, rates: Sequence[float]) -> list[Phase]:
    """Return the phases of a schedule with the learning rate of each step."""
    phases = []
    for phase in schedule.phases():
        folder = schedule.pinned_at(phase.end)
        kept = None if folder is None else f"{folder}/{PREFIX}{phase.end}"
        phases.append(_phase(phase.name, phase.start + 1, phase.end, rates, kept=kept))
    return phases


def phases_of_rates(rates: Sequence[float]) -> list[Phase]:
    """The phases of any curve: whether the rate after an update is more, the same or less tells what it belongs to.

    So a decay's first update still has the peak and a warm-up's last has not reached it, as in `wsd`. A rise that ends
    a fall in one update is the jump of a restart: the update before it belongs to the fall, and another one begins.

    Args:
        rates: the learning rate of each update, and that of one after the last.
    """
    changes = [(after > before) - (after < before) for before, after in itertools.pairwise(rates)]
    jumps = {
        index
        for index, change in enumerate(changes)
        if change > 0 and index > 0 and changes[index - 1] < 0 and changes[index + 1 : index + 2] != [1]
    }
    signs = [-1 if index in jumps else change for index, change in enumerate(changes)]
    starts = [0] + [i for i in range(1, len(signs)) if signs[i] != signs[i - 1] or i - 1 in jumps]
    names = {1: WARM_UP, 0: STABLE, -1: DECAY}
    return [
        _phase(names[signs[start]], start + 1, end, rates)
        for start, end in zip(starts, [*starts[1:], len(signs)], strict=True)
    ]


def _phase(name: str, first: int, last: int, rates: Sequence[float], *, kept: str | None = None) -> Phase:
    return Phase(name, first, last, rates[first - 1], rates[last - 1], kept)


def _factors(args: RAdamTrainingArguments, total: int) -> list[float | None] | None:
    if args.optim not in OPTIMIZERS:
        return None
    threshold = THRESHOLDS[OptimizerName(args.optim).value]
    of = functools.partial(rectification, beta2=args.adam_beta2, threshold=threshold)
    return [of(update) for update in range(1, total + 1)]


def describe_factors(preview: Preview, args: RAdamTrainingArguments) -> str | None:
    """From which update on RAdam's factor on the learning rate is what, in a line; None for another optimizer."""
    if preview.factors is None:
        return None
    begins = next((update for update, factor in enumerate(preview.factors, 1) if factor is not None), None)
    if begins is None:
        begins = len(preview.factors) + 1
    options = (args.optimizer_class_and_kwargs() or (None, {}))[1]
    silent = preview.optim == "radam_schedulefree" and options.get("silent_sgd_phase", True)
    before = "no step" if silent else "plain momentum" if preview.optim == "radam" else "plain gradient steps"
    parts = [f"{before} in updates 1-{begins - 1}"] if begins > 1 else []
    if begins > len(preview.factors):
        return f"{parts[0]}, all of the run (beta2 {args.adam_beta2:g})"
    parts.append(f"{preview.factors[begins - 1]:.3f} at update {begins}")
    for level in (0.5, 0.9, 0.99):
        reached = next((update for update, f in enumerate(preview.factors, 1) if f is not None and f >= level), None)
        if reached is not None and reached > begins:
            parts.append(f"{level:g} from update {reached}")
    last = preview.factors[-1]
    if last is not None and last < 0.99:
        parts.append(f"{last:.3f} at the last")
    return f"{', '.join(parts)} (beta2 {args.adam_beta2:g})"


def _average(args: RAdamTrainingArguments, total: int) -> str | None:
    if not args.ewa:
        return None
    begins = f"from update {args.ewa_start_step + args.ewa_every} on"
    if args.ewa_decay is not None:
        half_life = -math.log(2) / math.log(args.ewa_decay)
        return f"{begins}, decay {args.ewa_decay:g} per update: a half-life of {half_life:.4g} updates"
    ratio = args.ewa_half_life_ratio or DEFAULT_HALF_LIFE_RATIO
    at_the_end = ratio * (total - args.ewa_start_step)
    return f"{begins}, half-life {ratio:g} of the updates so far: {at_the_end:.4g} updates at the end"
