"""Learning-rate schedules: completed steps -> multiplier of `learning_rate`.

A run warms up, stays at a constant learning rate for as long as needed, and decays only in the last few per cent. The
stable phase has no horizon, so a run can be extended.

`wsd` and `wsd_s` are pure functions; `WSD` and `WSDS` are the same schedules as objects that a run resolves once. A new
schedule is one subclass of `Schedule`; importing it is enough for `lr_scheduler_type` to accept its name.

Everywhere, `step` is the number of completed steps, and the value is the multiplier for the *next* step (as in torch's
`LambdaLR`). Lengths and budgets are counted in optimizer steps. Only the standard library is needed:
`LambdaLR(optimizer, WSD(total_steps=..., decay_steps=...).multiplier)`.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

DECAY_TYPES = ("linear", "cosine", "1-sqrt", "exponential", "inverse")
WARM_UP, STABLE, DECAY = "warm-up", "stable", "decay"
PRE_DECAY_FOLDER, BUDGETS_FOLDER = "_pre_decay", "_budgets"
SCHEDULE_FLAGS = ("decay_steps", "decay_type", "min_lr_ratio", "budgets")
"""Flags that a schedule has for a field of that name."""
_REGISTRY: dict[str, type[Schedule]] = {}


@dataclass(frozen=True)
class Phase:
    """A part of a schedule, "warm-up", "stable" or "decay": its steps follow `start` to `end - 1` completed steps."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class SchedulePast:
    """What a resumed or extended run keeps of the schedule that it followed for the first `step` steps.

    `schedule` is None for one of transformers, and `warmup_steps` unless the run is extended.
    """

    step: int
    schedule: Schedule | None = None
    warmup_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A learning-rate schedule, resolved for one run of `total_steps` steps.

    A subclass is a frozen dataclass with `multiplier`, `phases` and a `name`, the value of `lr_scheduler_type` that
    selects it. Its fields take the values of the flags in `SCHEDULE_FLAGS` with their names, and else those of
    `lr_scheduler_kwargs`.
    """

    name: ClassVar[str]
    total_steps: int
    warmup_steps: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class by its name."""
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            taken = _REGISTRY.get(cls.name, cls).__qualname__
            if taken != cls.__qualname__:  # equal where a notebook's cell runs twice
                raise ValueError(f"The schedule name {cls.name!r} is taken by {taken}. Choose another name.")
            _REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        """Check the fields, once; a subclass that overrides this calls it."""
        vars(self).update(  # the fields are frozen
            total_steps=_whole("total_steps", self.total_steps, at_least=1),
            warmup_steps=_whole("warmup_steps", self.warmup_steps, at_least=0),
        )

    @abstractmethod
    def multiplier(self, step: int) -> float:
        """Return the multiplier for the step that follows `step` completed steps.

        `LambdaLR` gets this bound method, undecorated: then `scheduler.pt` holds nothing of the schedule.
        """

    @abstractmethod
    def phases(self) -> list[Phase]:
        """Return the phases in order; together they are the run."""

    def decays(self) -> list[tuple[int, int]]:
        """Return start and end of every decay, in completed steps."""
        return [(phase.start, phase.end) for phase in self.phases() if phase.name == DECAY]

    def resets_to_peak(self, step: int) -> bool:
        """Return whether a decay ends after `step` completed steps and the next step is back at the peak."""
        return False

    def decay_at(self, step: int) -> tuple[int, int] | None:
        """Return the decay in which the state after `step` completed steps stands; its end belongs to it."""
        if self.resets_to_peak(step):
            return None
        return next(((start, end) for start, end in self.decays() if start < step <= end), None)

    def pinned_at(self, step: int) -> str | None:
        """Return the folder that permanently keeps the checkpoint after `step` completed steps, or None."""
        if self.resets_to_peak(step):
            return BUDGETS_FOLDER
        starts = [start for start, end in self.decays() if not self.resets_to_peak(end)]
        return PRE_DECAY_FOLDER if step > 0 and step in starts else None

    def warning(self) -> str | None:
        """Return a warning about a schedule that is allowed but useless, or None."""
        if all(end - start > 1 for start, end in self.decays()):
            return None
        return "A decay of 1 step has no effect: its only step is still at the peak. Use 2 steps or more."

    def describe(self) -> str:
        """Describe the schedule in one line."""
        phases = (f"{phase.name} over steps {phase.start}-{phase.end}" for phase in self.phases())
        return f"{self.name}, {self.total_steps} steps: {', '.join(phases)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the options, for `from_dict`; a manifest holds them."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    @staticmethod
    def from_dict(name: str, mapping: Mapping[str, Any]) -> Schedule:
        """Make the schedule called `name` from the result of its `to_dict`."""
        if name not in _REGISTRY:
            raise ValueError(f"There is no schedule {name!r}. Import the module that defines it.")
        try:
            return _REGISTRY[name](**mapping)
        except TypeError as error:
            raise ValueError(f"{mapping} does not describe a schedule {name!r}: {error}.") from error

    @staticmethod
    def registered() -> Mapping[str, type[Schedule]]:
        """Return all schedule classes by name; the schedules of transformers are not among them."""
        return _REGISTRY

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the names of the options that flags or `lr_scheduler_kwargs` set."""
        return {one.name for one in fields(cls) if one.init} - {"total_steps", "warmup_steps"}

    @classmethod
    def from_arguments(cls, args: Any, total_steps: int, past: SchedulePast | None = None) -> Schedule:
        """Resolve the flags of `RAdamTrainingArguments` for a run of `total_steps` steps, or raise a `ValueError`."""
        options = {name: getattr(args, name) for name in SCHEDULE_FLAGS if name in cls.option_names()}
        if "decay_steps" in options:
            options["decay_steps"] = count_from_ratio(options["decay_steps"], total_steps, name="decay_steps")
        options |= args.lr_scheduler_kwargs or {}
        warmup = args.resolve_warmup_steps(total_steps, past)
        return cls.from_dict(cls.name, {"total_steps": total_steps, "warmup_steps": warmup} | options)


@dataclass(frozen=True, kw_only=True)
class _DecaysToBudgets(Schedule):
    """Parts of a ramp, the peak and a decay: WSD has one of them, WSD-S one for each budget."""

    decay_type: str = "1-sqrt"
    min_lr_ratio: float = 0.0
    _parts: tuple[tuple[int, int, int, int], ...] = field(init=False, repr=False, compare=False)
    """Where each part starts, reaches the peak, begins to decay and ends, in completed steps."""

    def _set_parts(self, ends: Sequence[int], decays: Sequence[int], rewarmup_steps: int = 0) -> None:
        check_decay(self.decay_type, self.min_lr_ratio)
        parts = []
        start, ramp = 0, self.warmup_steps
        for end, decay in zip(ends, decays, strict=True):
            if end <= start:
                raise ValueError(f"budgets must increase, got {end} after {start} in {[*ends]}. Sort them.")
            if ramp + decay > end - start:
                raise ValueError(
                    f"Warm-up and decay ({ramp} + {decay} steps) do not fit between steps {start} and {end}. Shorten "
                    "one of them, or set a later end (max_steps or budgets)."
                )
            parts.append((start, start + ramp, end - decay, end))
            start, ramp = end, rewarmup_steps
        vars(self).update(_parts=tuple(parts))

    def multiplier(self, step: int) -> float:
        """Return the multiplier for the step that follows `step` completed steps."""
        if step >= self.total_steps:
            return float(self.min_lr_ratio)
        start, peak, decay, end = next(part for part in self._parts if step < part[-1])
        if step < peak:
            return (step - start) / (peak - start)
        if step < decay:
            return 1.0
        return decay_multiplier((step - decay) / (end - decay), self.decay_type, self.min_lr_ratio)

    def phases(self) -> list[Phase]:
        """Return warm-up, stable phase and decay of each part."""
        phases = []
        for part in self._parts:
            for name, (start, end) in zip((WARM_UP, STABLE, DECAY), itertools.pairwise(part), strict=True):
                phases += [Phase(name, start, end)] if start < end else []
        return phases

    def describe(self) -> str:
        """Return one line with the warm-up, the decays and their shape."""
        warmup = f"warm-up {self.warmup_steps} steps, " if self.warmup_steps else ""
        over = ", ".join(f"{start}-{end}" for start, end in self.decays())
        decay = f"{self.decay_type} decay over steps {over} to {self.min_lr_ratio:g} of the peak"
        return f"{self.name}, {self.total_steps} steps: {warmup}peak, {decay}"


@dataclass(frozen=True, kw_only=True)
class WSD(_DecaysToBudgets):
    """Warmup-stable-decay: see `wsd`, whose keywords are its fields."""

    name = "wsd"
    decay_steps: int

    def __post_init__(self) -> None:
        """Check that warm-up and decay fit into the run."""
        super().__post_init__()
        vars(self).update(decay_steps=_whole("decay_steps", self.decay_steps, at_least=1))
        self._set_parts((self.total_steps,), (self.decay_steps,))


@dataclass(frozen=True, kw_only=True)
class WSDS(_DecaysToBudgets):
    """WSD-S, a decay before each of several budgets: see `wsd_s`, whose keywords are its fields."""

    name = "wsd_s"
    total_steps: int = field(init=False)
    budgets: tuple[int, ...]
    decay_steps: tuple[int, ...]
    rewarmup_steps: int = 0

    def __post_init__(self) -> None:
        """Check that every decay fits between its budgets."""
        for values in (self.budgets, self.decay_steps):
            listed = isinstance(values, Sequence) and not isinstance(values, str)
            if not listed or not len(values) == len(self.budgets) > 0:
                raise ValueError(
                    f"budgets={self.budgets!r} and decay_steps={self.decay_steps!r} must be lists of one length, like "
                    "[300, 700] and [30, 70]. Give one decay per budget."
                )
        vars(self).update(
            budgets=tuple(_whole("each of budgets", budget, at_least=1) for budget in self.budgets),
            decay_steps=tuple(_whole("each of decay_steps", decay, at_least=1) for decay in self.decay_steps),
            rewarmup_steps=_whole("rewarmup_steps", self.rewarmup_steps, at_least=0),
            total_steps=self.budgets[-1],
        )
        super().__post_init__()
        self._set_parts(self.budgets, self.decay_steps, self.rewarmup_steps)

    def resets_to_peak(self, step: int) -> bool:
        """Return whether `step` is a budget: the last one too, as from there the run can be extended."""
        return step in self.budgets

    @classmethod
    def from_arguments(cls, args: Any, total_steps: int, past: SchedulePast | None = None) -> WSDS:
        """Resolve the budgets: first those that the run has passed, the end of the run last."""
        passed: dict[int, int] = {}
        if past is not None and isinstance(past.schedule, WSDS):
            pairs = zip(past.schedule.budgets, past.schedule.decay_steps, strict=True)
            passed = {budget: decay for budget, decay in pairs if budget <= min(past.step, total_steps)}
        last = max(passed, default=0)
        asked = [count_from_ratio(budget, total_steps, name="budgets") for budget in args.budgets or ()]
        budgets = [budget for budget in asked if budget not in passed]
        if not all(last < budget <= total_steps for budget in budgets):
            raise ValueError(
                f"budgets={args.budgets} must lie after step {last}, the last budget that the run has passed, and up "
                f"to its end at step {total_steps}. Raise max_steps, or list later budgets only, in steps."
            )
        if max(budgets, default=last) != total_steps:
            budgets.append(total_steps)
        lengths = [count_from_ratio(args.decay_steps, budget, name="decay_steps") for budget in budgets]
        return cls(
            budgets=(*passed, *budgets),
            decay_steps=(*passed.values(), *lengths),
            warmup_steps=args.resolve_warmup_steps(total_steps, past),
            decay_type=args.decay_type,
            min_lr_ratio=args.min_lr_ratio,
            **(args.lr_scheduler_kwargs or {}),
        )


def describe_schedule(schedule: Schedule | None, *, name: str, total_steps: int | None) -> str:
    """Describe a schedule in one line; of one of transformers (`schedule` is None) only name and length are known."""
    if schedule is not None:
        return schedule.describe()
    return name if total_steps is None else f"{name}, {total_steps} steps"


def wsd(
    step: int,
    *,
    total_steps: int,
    decay_steps: int,
    warmup_steps: int = 0,
    decay_type: str = "1-sqrt",
    min_lr_ratio: float = 0.0,
) -> float:
    """Return the warmup-stable-decay multiplier, in [0, 1], for the step that follows `step` completed steps.

    With s = `step` and, all in steps, T = `total_steps` (the run, decay included), D = `decay_steps` (about 10 % of T
    is enough), W = `warmup_steps`; `decay_type` is one of `DECAY_TYPES`, and the floor m = `min_lr_ratio` in [0, 1):

        s / W                  0     <= s < W          warm-up, from 0
        1                      W     <= s < T - D      stable
        f((s - (T - D)) / D)   T - D <= s < T          decay; f is `decay_multiplier`
        m                      T     <= s              after the run: the floor

    So the first step of the decay is still at the peak, and none is spent at the floor. From the end of the warm-up on,
    `linear`, `cosine` and `1-sqrt` equal `transformers.get_wsd_schedule` number for number; its warm-up starts at the
    floor.

    Source: MiniCPM, arXiv:2404.06395; shapes: Hägele et al., arXiv:2405.18392.

    Example:
        >>> [wsd(s, total_steps=10, decay_steps=4, warmup_steps=2, decay_type="linear") for s in range(12)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return WSD(
        total_steps=total_steps,
        decay_steps=decay_steps,
        warmup_steps=warmup_steps,
        decay_type=decay_type,
        min_lr_ratio=min_lr_ratio,
    ).multiplier(_whole("step", step, at_least=0))


def wsd_s(
    step: int,
    *,
    budgets: Sequence[int],
    decay_steps: Sequence[int],
    warmup_steps: int = 0,
    rewarmup_steps: int = 0,
    decay_type: str = "1-sqrt",
    min_lr_ratio: float = 0.0,
) -> float:
    """Return the WSD-S multiplier, in [0, 1], for the step that follows `step` completed steps.

    One run with a decayed model after each of several budgets, the last of which is its length. From one budget to the
    next the formula is that of `wsd`, with one of `decay_steps` per budget; the step after a budget is back at the peak
    (the authors' choice), or at the start of a warm-up of `rewarmup_steps`.

    Source: Wen et al., WSD-S, arXiv:2410.05192.

    Example:
        >>> [wsd_s(s, budgets=(6, 12), decay_steps=(2, 4), decay_type="linear") for s in range(14)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return WSDS(
        budgets=budgets,  # type: ignore[arg-type]  # any sequence: made a tuple there
        decay_steps=decay_steps,  # type: ignore[arg-type]
        warmup_steps=warmup_steps,
        rewarmup_steps=rewarmup_steps,
        decay_type=decay_type,
        min_lr_ratio=min_lr_ratio,
    ).multiplier(_whole("step", step, at_least=0))


def decay_multiplier(progress: float, decay_type: str, min_lr_ratio: float) -> float:
    """Return the multiplier at `progress` q from 0 to 1 through the decay to the floor m = `min_lr_ratio`; unchecked.

    linear        m + (1 - m) (1 - q)
    cosine        m + (1 - m) (1 + cos(pi q)) / 2
    1-sqrt        m + (1 - m) (1 - sqrt(q))     best of those tried by Hägele et al., arXiv:2405.18392
    exponential   m^q                           m > 0; MiniCPM's 0.5^(s / half-life) written by its end point
    inverse       1 / (q / m + (1 - q))         m > 0; WSD-S, arXiv:2410.05192: 1 / lr grows linearly
    """
    if decay_type == "exponential":
        return math.pow(min_lr_ratio, progress)
    if decay_type == "inverse":
        return 1.0 / (progress / min_lr_ratio + (1.0 - progress))
    if decay_type == "linear":
        factor = 1.0 - progress
    elif decay_type == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        factor = 1.0 - math.sqrt(progress)
    # In the order of transformers, so that the curves are equal to the last bit.
    return factor * (1.0 - min_lr_ratio) + min_lr_ratio


def check_decay(decay_type: str, min_lr_ratio: float) -> None:
    """Raise a ValueError if this shape cannot decay to this floor."""
    if decay_type not in DECAY_TYPES:
        raise ValueError(f"decay_type must be one of {', '.join(DECAY_TYPES)}, got {decay_type!r}.")
    if not _is_number(min_lr_ratio) or not 0.0 <= min_lr_ratio < 1.0:
        raise ValueError(f"min_lr_ratio must lie in [0, 1), got {min_lr_ratio!r}. Set a ratio such as 0.1.")
    if decay_type in ("exponential", "inverse") and min_lr_ratio == 0.0:
        raise ValueError(f"decay_type={decay_type!r} never reaches min_lr_ratio=0.0. Set --min_lr_ratio 0.1.")


def count_from_ratio(value: float, total: int, *, name: str) -> int:
    """Convert the value of the flag `name`, a number of steps or a ratio of `total` below 1, to steps.

    The rule of `TrainingArguments.get_warmup_steps`: a ratio gives ceil(`total` * `value`), and 1.0 is one step.

    Example:
        >>> count_from_ratio(0.1, 1001, name="decay_steps"), count_from_ratio(40, 700, name="decay_steps")
        (101, 40)
    """
    if not _is_number(value) or not 0.0 < value < math.inf or (value >= 1 and value % 1):
        raise ValueError(f"{name} must be a whole number of steps (1 or more) or a ratio below 1, got {value!r}.")
    if value >= 1:
        return int(value)
    product = total * value
    nearest = round(product)
    # 0.07 * 100 is 7.000000000000001 in floats, and its ceiling 8: rounding moves a product by 2.3e-16 of itself at
    # most. A relative test, so that a tiny ratio gives 1 step and never 0.
    return nearest if math.isclose(product, nearest, rel_tol=1e-12) else math.ceil(product)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(name: str, value: float, *, at_least: int) -> int:
    if not _is_number(value) or value % 1 or value < at_least:  # NaN % 1 and inf % 1 are NaN, which is true
        raise ValueError(f"{name} must be a whole number of steps, {at_least} or more, got {value!r}.")
    return int(value)
