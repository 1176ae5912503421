"""`hf-radam schedule`: the learning rates of a run before there is one, without training and without hashing.

The learning rates are those of the scheduler that the trainer would make. A phase "50-4500" has the steps after 50 to
4499 completed ones, and the state at its end is `checkpoint-4500`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_radam.checkpoints.runs import PREFIX
from hf_radam.cli.main import add_command, table
from hf_radam.schedules import DECAY, STABLE, WARM_UP, Phase, SchedulePast, describe_schedule

if TYPE_CHECKING:
    from hf_radam.training_args import RAdamTrainingArguments

BLOCKS = "▁▂▃▄▅▆▇█"
INDENT = 16


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "schedule",
        run,
        usage="hf-radam schedule [CONFIG] [--flag value ...]",
        description="Print the phases of a schedule, the checkpoints that are pinned, and the curve in one line.\n\n"
        "CONFIG is a file as examples/run_clm.py takes it (.yaml, .yml, .json; keys for model and data are ignored), "
        "and the flags after it are those of RAdamTrainingArguments: they win over the file.",
        examples=[
            "hf-radam schedule configs/radam_wsd.yaml --max_steps 5000 --decay_steps 0.1",
            "hf-radam schedule --optim radam --lr_scheduler_type wsd_s --max_steps 1000 --budgets 300 700",
            "hf-radam schedule --lr_scheduler_type cosine --warmup_steps 0.05 --max_steps 2000",
        ],
    )
    parser.set_defaults(training_flags=[])


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """Return the output and the exit code."""
    from hf_radam.checkpoints.extend import plan_resume
    from hf_radam.config_files import ConfigArgumentParser
    from hf_radam.training_args import RAdamTrainingArguments

    parser = ConfigArgumentParser([RAdamTrainingArguments], refuse=arguments.refuse, allow_other_keys=True)
    # The hardware that the run is for need not be here, and changes no learning rate.
    (args,) = parser.parse(arguments.training_flags, use_cpu=True, tf32=None, deepspeed=None, fsdp=None)
    # Manifests are enough for a preview; training verifies the checkpoint.
    plan = None if args.extend_from is None else plan_resume(args, None, verify=False)
    found = preview(args, None if plan is None else plan.past)
    lines = [] if plan is None else [str(plan.summary), ""]
    lines += report(found, width=shutil.get_terminal_size().columns)
    if parser.other_keys:
        lines += ["", f"ignored, as they are not about training: {', '.join(parser.other_keys)}"]
    return "\n".join(lines) + "\n", 0


@dataclass(frozen=True)
class Preview:
    """A schedule, resolved for a run."""

    summary: str
    rates: list[float]  # of every step, the first at index 0
    phases: list[Phase]
    pinned: dict[int, str]  # paths of the checkpoints that are kept permanently, by their steps
    factors: list[float | None] | None  # RAdam's rectification of every step, None where undefined, or without RAdam
    notes: dict[str, str]  # further lines by their labels
    warning: str | None


def preview(args: RAdamTrainingArguments, past: SchedulePast | None = None) -> Preview:
    """Resolve the schedule of a run of `args.max_steps` steps, or raise `ValueError` if that cannot be known."""
    if args.max_steps <= 0:
        raise ValueError(
            f"max_steps is not set, and num_train_epochs={args.num_train_epochs:g} is a number of steps only with the "
            "data. Add --max_steps N."
        )
    from hf_radam.names import SchedulerName

    total, name = args.max_steps, str(SchedulerName(args.lr_scheduler_type).value)
    schedule = args.schedule(total, past)
    multiplier = transformers_multiplier(args, total, past) if schedule is None else schedule.multiplier
    rates = [args.learning_rate * multiplier(step) for step in range(total + 1)]
    phases = phases_of_rates(rates) if schedule is None else schedule.phases()
    folders = {} if schedule is None else {phase.end: schedule.pinned_at(phase.end) for phase in phases}
    factors = _factors(args, total)
    notes = {} if factors is None else {"RAdam's factor": _describe_factors(factors, args)}
    if args.ewa:
        notes["average (EWA)"] = _describe_average(args, total)
    return Preview(
        summary=describe_schedule(schedule, name=name, total_steps=total),
        rates=rates[:-1],
        phases=phases,
        pinned={step: f"{folder}/{PREFIX}{step}" for step, folder in folders.items() if folder is not None},
        factors=factors,
        notes=notes,
        warning=None if schedule is None else schedule.warning(),
    )


def transformers_multiplier(
    args: RAdamTrainingArguments, total: int, past: SchedulePast | None
) -> Callable[[int], float]:
    """Return the function by which a scheduler of transformers multiplies the learning rate, or raise `ValueError`."""
    import torch
    from transformers import get_scheduler

    name = f"lr_scheduler_type={args.lr_scheduler_type.value}"  # type: ignore[union-attr]  # resolved when made
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate),
            num_warmup_steps=args.resolve_warmup_steps(total, past),
            num_training_steps=total,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]  # a dictionary by now
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: transformers refuses its lr_scheduler_kwargs. {error}") from error
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise ValueError(f"{name} follows the losses of the training, so its curve is not known before.")
    return scheduler.lr_lambdas[0]


def phases_of_rates(rates: Sequence[float]) -> list[Phase]:
    """Return the phases of any curve, given the learning rate of each step and one more after the last.

    The rate after a step tells its phase, so the first step of a decay is still at the peak. A rise of one step after a
    decay is the jump of a restart.
    """
    names = {1: WARM_UP, 0: STABLE, -1: DECAY}
    changes = [(after > before) - (after < before) for before, after in itertools.pairwise(rates)]
    phases: list[Phase] = []
    for change, group in itertools.groupby(range(len(changes)), changes.__getitem__):
        start, *rest = group
        if change > 0 and not rest and phases and phases[-1].name == DECAY:
            phases[-1] = replace(phases[-1], end=start + 1)
        else:
            phases.append(Phase(names[change], start, start + len(rest) + 1))
    return phases


def report(found: Preview, *, width: int) -> list[str]:
    """Return the schedule as lines of text, `width` characters wide, with a curve."""
    total, rates = len(found.rates), found.rates
    rows = [["phase", "steps", "share", "learning rate", *(["pinned at its end"] if found.pinned else [])]]
    for phase in found.phases:
        first, last = f"{rates[phase.start]:.4g}", f"{rates[phase.end - 1]:.4g}"
        share = f"{100 * (phase.end - phase.start) / total:.1f} %"
        rows.append([phase.name, f"{phase.start}-{phase.end}", share, first if first == last else f"{first} to {last}"])
        rows[-1] += [found.pinned.get(phase.end, "")] if found.pinned else []
    curve = sparkline(rates, width=width - INDENT)
    lines = [found.summary, "", *table(rows, right=(1, 2)), "", f"{'learning rate'.ljust(INDENT)}{curve}"]
    for label, text in found.notes.items():
        lines += textwrap.wrap(text, width, initial_indent=label.ljust(INDENT), subsequent_indent=" " * INDENT)
    return lines + ([] if found.warning is None else ["", *textwrap.wrap(f"Warning: {found.warning}", width)])


def sparkline(values: Sequence[float], *, width: int) -> str:
    """Draw values of 0 or more in one line; a character stands for the lowest of its values."""
    columns, top = min(max(width, 1), len(values)), max(values) or 1.0
    edges = [column * len(values) // columns for column in range(columns + 1)]
    lowest = [min(values[start:end]) for start, end in itertools.pairwise(edges)]
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * value / top)] for value in lowest)


def _factors(args: RAdamTrainingArguments, total: int) -> list[float | None] | None:
    from hf_radam.optim import radam, schedule_free

    threshold = {"radam": radam.THRESHOLD, "radam_schedulefree": schedule_free.THRESHOLD}.get(args.optim.value)  # type: ignore[union-attr]
    if threshold is None:
        return None
    return [radam.rectification(n, beta2=args.adam_beta2, threshold=threshold) for n in range(1, total + 1)]


def _describe_factors(factors: list[float | None], args: RAdamTrainingArguments) -> str:
    defined = [factor for factor in factors if factor is not None]
    first = len(factors) - len(defined) + 1
    parts = [f"undefined in steps 1-{first - 1}"] if first > 1 else []
    parts += [f"{defined[0]:.3f} at step {first}"] if defined else []
    for level in (0.5, 0.9, 0.99):
        reached = next((step for step, factor in enumerate(defined, first) if factor >= level), None)
        parts += [] if reached is None else [f"{level:g} from step {reached}"]
    return f"{', '.join(parts)} (beta2 {args.adam_beta2:g})"


def _describe_average(args: RAdamTrainingArguments, total: int) -> str:
    from hf_radam.averaging import DEFAULT_HALF_LIFE_RATIO

    begins = f"from step {args.ewa_start_step + args.ewa_every} on"
    if args.ewa_decay is not None:
        half_life = -math.log(2) / math.log(args.ewa_decay)
        return f"{begins}, decay {args.ewa_decay:g} per step: a half-life of {half_life:.4g} steps"
    ratio = args.ewa_half_life_ratio or DEFAULT_HALF_LIFE_RATIO
    return f"{begins}, half-life {ratio:g} of the steps so far: {ratio * (total - args.ewa_start_step):.4g} at the end"
