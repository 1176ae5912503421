"""Learning-rate schedules: completed steps -> multiplier of `learning_rate`.

A run warms up, stays at a constant learning rate for as long as needed, and decays only in the last few per cent, where
most of the visible gain in loss comes. The stable phase has no horizon, so a run can be extended.

`wsd` and `wsd_s` are pure functions. `WSD` and `WSDS` are the same schedules as objects that a run resolves once:
besides the multiplier they know their phases and which checkpoints to pin. A new schedule is one subclass of
`Schedule`; importing it is enough for `lr_scheduler_type` to accept its name.

The convention everywhere: `step` is the number of completed steps, and the value is the multiplier for the *next* step
(as in torch's `LambdaLR`). Lengths and budgets are counted in optimizer steps, never in tokens or batches. Only the
standard library is needed: `LambdaLR(optimizer, WSD(total_steps=..., decay_steps=...).multiplier)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar

DECAY_TYPES = ("linear", "cosine", "1-sqrt", "exponential", "inverse")
WARM_UP, STABLE, DECAY = "warm-up", "stable", "decay"
PRE_DECAY_FOLDER, BUDGETS_FOLDER = "_pre_decay", "_budgets"
SCHEDULE_FLAGS = ("decay_steps", "decay_type", "min_lr_ratio", "budgets")
"""Flags that a schedule has for a field of that name."""
_NEED_A_FLOOR = ("exponential", "inverse")  # 0^q and 1/0: these two shapes never reach a floor of zero
_REGISTRY: dict[str, type[Schedule]] = {}


@dataclass(frozen=True)
class Phase:
    """A part of a schedule, "warm-up", "stable" or "decay": its steps follow `start` to `end - 1` completed steps."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class SchedulePast:
    """What a resumed or extended run keeps of the schedule that it followed so far.

    Attributes:
        step: Completed steps of the checkpoint.
        schedule: Schedule of the checkpoint; None for one of transformers.
        warmup_steps: Warm-up of the run that is extended; None if it is only resumed.
    """

    step: int
    schedule: Schedule | None = None
    warmup_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A learning-rate schedule, resolved for one run.

    A subclass is a frozen dataclass with a `name`, `multiplier` and `phases`; the rest follows from these. Its fields
    take the values of the flags in `SCHEDULE_FLAGS` with their names, and else those of `lr_scheduler_kwargs`.

    Attributes:
        name: Value of `lr_scheduler_type` that selects the class.
        total_steps: Length of the run.
        warmup_steps: Length of the warm-up at its start; 0 for none.
    """

    name: ClassVar[str]
    total_steps: int
    warmup_steps: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class by its name."""
        super().__init_subclass__(**kwargs)
        name = vars(cls).get("name")
        if name is None:
            return
        known = _REGISTRY.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # a notebook's cell runs twice
            raise ValueError(f"The schedule name {name!r} is taken by {known.__qualname__}. Choose another name.")
        _REGISTRY[name] = cls

    def __post_init__(self) -> None:
        """Check the fields, once; a subclass that overrides this calls it."""
        self._set(
            total_steps=_whole("total_steps", self.total_steps, at_least=1),
            warmup_steps=_whole("warmup_steps", self.warmup_steps, at_least=0),
        )

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen

    @abstractmethod
    def multiplier(self, step: int) -> float:
        """Return the multiplier for the step that follows `step` completed steps; options were checked before.

        Give `LambdaLR` this bound method, undecorated: then `scheduler.pt` holds nothing of the schedule.
        """

    @abstractmethod
    def phases(self) -> list[Phase]:
        """Return the phases in order; together they are the whole run."""

    def decays(self) -> list[tuple[int, int]]:
        """Return start and end of every decay, in completed steps."""
        return [(phase.start, phase.end) for phase in self.phases() if phase.name == DECAY]

    def resets_to_peak(self, step: int) -> bool:
        """Return whether a decay ends after `step` completed steps and the next step is back at the peak."""
        return False

    def decay_at(self, step: int) -> tuple[int, int] | None:
        """Return the decay in which the state after `step` completed steps stands.

        The end of a decay belongs to it, unless the learning rate goes back to the peak from there.
        """
        if self.resets_to_peak(step):
            return None
        return next(((start, end) for start, end in self.decays() if start < step <= end), None)

    def pinned_at(self, step: int) -> str | None:
        """Return the folder that keeps the checkpoint after `step` completed steps for good, or None."""
        if self.resets_to_peak(step):
            return BUDGETS_FOLDER
        return PRE_DECAY_FOLDER if step > 0 and any(step == start for start, _ in self.decays()) else None

    def warning(self) -> str | None:
        """Return what is wrong with a schedule that is allowed, or None."""
        if all(end - start > 1 for start, end in self.decays()):
            return None
        return "A decay of 1 step has no effect: its only step is still at the peak. Use 2 steps or more."

    def describe(self) -> str:
        """Return one line that says what the schedule does from the first step to the last."""
        phases = (f"{phase.name} over steps {phase.start}-{phase.end}" for phase in self.phases())
        return f"{self.name}, {self.total_steps} steps: {', '.join(phases)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON holds them, for `from_dict`."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @staticmethod
    def from_dict(name: str, mapping: Mapping[str, Any]) -> Schedule:
        """Make the schedule called `name` from the result of its `to_dict`."""
        if name not in _REGISTRY:
            raise ValueError(f"There is no schedule {name!r}. Import the module that defines it.")
        try:
            return _REGISTRY[name](**mapping)
        except TypeError as error:
            raise ValueError(f"{dict(mapping)} does not describe a schedule {name!r}: {error}.") from error

    @staticmethod
    def registered() -> Mapping[str, type[Schedule]]:
        """Return all schedule classes by name; the schedules of transformers are not among them."""
        return MappingProxyType(_REGISTRY)

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the names of the options that flags or `lr_scheduler_kwargs` set."""
        return {one.name for one in fields(cls) if one.init} - {"total_steps", "warmup_steps"}

    @classmethod
    def from_arguments(cls, args: Any, total_steps: int, past: SchedulePast | None = None) -> Schedule:
        """Resolve the flags of `RAdamTrainingArguments` for a run of `total_steps` steps.

        Raises:
            ValueError: If an option is missing or wrong, or they do not fit into the run.
        """
        options = {name: getattr(args, name) for name in SCHEDULE_FLAGS if name in cls.option_names()}
        if "decay_steps" in options:
            options["decay_steps"] = count_from_ratio(options["decay_steps"], total_steps, name="decay_steps")
        options |= args.lr_scheduler_kwargs or {}
        warmup_steps = args.resolve_warmup_steps(total_steps, past)
        try:
            return cls(total_steps=total_steps, warmup_steps=warmup_steps, **options)
        except TypeError as error:
            raise ValueError(
                f"lr_scheduler_kwargs={args.lr_scheduler_kwargs} does not fit lr_scheduler_type={cls.name}: {error}."
            ) from error


@dataclass(frozen=True, kw_only=True)
class _DecaysToBudgets(Schedule):
    """What WSD and WSD-S have in common: one or several parts of a ramp, the peak and a decay."""

    decay_type: str = "1-sqrt"
    min_lr_ratio: float = 0.0
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _parts: tuple[tuple[int, int, int], ...] = field(init=False, repr=False, compare=False)
    """Start, steps of the ramp and steps of the decay of each part."""

    def _set_parts(self, ends: Sequence[int], decays: Sequence[int], rewarmup_steps: int = 0) -> None:
        """Check that the decay fits into each part, and keep them for `multiplier`."""
        check_decay(self.decay_type, self.min_lr_ratio)
        starts = (0, *ends[:-1])
        ramps = (self.warmup_steps, *[rewarmup_steps] * (len(ends) - 1))
        for start, ramp, decay, end in zip(starts, ramps, decays, ends, strict=True):
            if end <= start:
                raise ValueError(f"budgets must increase, got {end} after {start} in {[*ends]}. Sort them.")
            if ramp + decay > end - start:
                raise ValueError(
                    f"Warm-up and decay ({ramp} + {decay} steps) do not fit between steps {start} and {end}. Shorten "
                    "one of them, or set a later end (max_steps or budgets)."
                )
        self._set(_ends=tuple(ends), _parts=tuple(zip(starts, ramps, decays, strict=True)))

    def multiplier(self, step: int) -> float:
        """Return the multiplier for the step that follows `step` completed steps."""
        if step >= self.total_steps:
            return float(self.min_lr_ratio)
        index = bisect_right(self._ends, step)
        start, ramp, decay = self._parts[index]
        if step - start < ramp:
            return (step - start) / ramp
        if step < self._ends[index] - decay:
            return 1.0
        return decay_multiplier((step - self._ends[index] + decay) / decay, self.decay_type, self.min_lr_ratio)

    def phases(self) -> list[Phase]:
        """Return warm-up, stable phase and decay of each part."""
        phases = []
        for (start, ramp, decay), end in zip(self._parts, self._ends, strict=True):
            bounds = (start, start + ramp, end - decay, end)
            phases += [Phase(*phase) for phase in zip((WARM_UP, STABLE, DECAY), bounds[:-1], bounds[1:], strict=True)]
        return [phase for phase in phases if phase.start < phase.end]

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
        self._set(decay_steps=_whole("decay_steps", self.decay_steps, at_least=1))
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
        for name, values in (("budgets", self.budgets), ("decay_steps", self.decay_steps)):
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise ValueError(f"{name} must be a list with one entry per budget, like [300, 700], got {values!r}.")
        if len(self.decay_steps) != len(self.budgets):
            raise ValueError(
                f"decay_steps={self.decay_steps!r} has {len(self.decay_steps)} lengths for {len(self.budgets)} budgets "
                f"({self.budgets!r}). Give one length per budget."
            )
        self._set(
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

    def pinned_at(self, step: int) -> str | None:
        """Return the folder that keeps the decayed checkpoint at each budget."""
        return BUDGETS_FOLDER if step in self.budgets else None

    def to_dict(self) -> dict[str, Any]:
        """Return the options; a re-warm-up of 0 is left out, as in checkpoints written before it was an option."""
        options = super().to_dict()
        return options if self.rewarmup_steps else {k: v for k, v in options.items() if k != "rewarmup_steps"}

    @classmethod
    def from_arguments(cls, args: Any, total_steps: int, past: SchedulePast | None = None) -> WSDS:
        """Resolve the budgets: first those that the run has passed, the end of the run last."""
        asked = [count_from_ratio(budget, total_steps, name="budgets") for budget in args.budgets or ()]
        if any(budget > total_steps for budget in asked):
            raise ValueError(
                f"budgets={args.budgets} reach past the end of the run at step {total_steps}. Raise max_steps or drop "
                "those budgets."
            )
        passed: dict[int, int] = {}
        if past is not None and isinstance(past.schedule, WSDS):
            pairs = zip(past.schedule.budgets, past.schedule.decay_steps, strict=True)
            passed = {budget: decay for budget, decay in pairs if budget <= min(past.step, total_steps)}
        last = max(passed, default=0)
        late = [budget for budget in asked if budget <= last and budget not in passed]
        if late:
            raise ValueError(
                f"budgets={args.budgets}: the run is past step {late[0]} of {total_steps}, at its budget {last}. List "
                "later budgets only, in steps."
            )
        budgets = [budget for budget in asked if budget > last]
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

        s / W                  0     <= s < W          warm-up: step n = s + 1 gets (n - 1) / W
        1                      W     <= s < T - D      stable
        f((s - (T - D)) / D)   T - D <= s < T          decay; f is `decay_multiplier`
        m                      T     <= s              after the run: the floor

    The first step of the decay is still at the peak (q = 0) and the last has q = (D - 1) / D: no step is spent at the
    floor. From the end of the warm-up on, `linear`, `cosine` and `1-sqrt` equal `transformers.get_wsd_schedule` number
    for number; its warm-up starts at the floor, this one at 0, as the other schedules of transformers do.

    Source: MiniCPM, arXiv:2404.06395; shapes: Hägele et al., arXiv:2405.18392.

    Example: a warm-up of 2, a stable phase until 6 and a decay of 4 in a run of 10 steps.

        >>> [wsd(s, total_steps=10, decay_steps=4, warmup_steps=2, decay_type="linear") for s in range(12)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        >>> [round(wsd(s, total_steps=300, decay_steps=30), 4) for s in (0, 269, 270, 271, 299, 300)]
        [1.0, 1.0, 1.0, 0.8174, 0.0168, 0.0]
    """
    schedule = WSD(
        total_steps=total_steps,
        decay_steps=decay_steps,
        warmup_steps=warmup_steps,
        decay_type=decay_type,
        min_lr_ratio=min_lr_ratio,
    )
    return schedule.multiplier(_whole("step", step, at_least=0))


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

    One run, with a decayed model at each of several budgets; the last budget is the length of the run. The arguments
    are those of `wsd`, but for one of `decay_steps` per budget and a warm-up of `rewarmup_steps` after each of them.
    With s = `step`, budgets B_1 < ... < B_k (B_0 = 0), decay lengths D_1 ... D_k, m = `min_lr_ratio`, and between
    B_{i-1} and B_i the ramp R_1 = `warmup_steps`, R_i = `rewarmup_steps` for i > 1:

        (s - B_{i-1}) / R_i          B_{i-1}       <= s < B_{i-1} + R_i      (re-)warm-up, from 0
        1                            B_{i-1} + R_i <= s < B_i - D_i          stable
        f((s - (B_i - D_i)) / D_i)   B_i - D_i     <= s < B_i                decay; f is `decay_multiplier`
        m                            B_k           <= s                      after the last budget: the floor

    So after B_i steps a model decayed for that budget can be saved, and the very next step is back at the peak (the
    authors' choice, `rewarmup_steps=0`). With one budget this is `wsd`, number for number.

    Source: Wen et al., WSD-S, arXiv:2410.05192.

    Example: budgets of 6 and 12 steps with decays of 2 and 4; then the same with a re-warm-up of 2.

        >>> [wsd_s(s, budgets=(6, 12), decay_steps=(2, 4), decay_type="linear") for s in range(14)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        >>> again = dict(budgets=(6, 12), decay_steps=(2, 4), rewarmup_steps=2, decay_type="linear")
        >>> [wsd_s(s, **again) for s in range(4, 10)]
        [1.0, 0.5, 0.0, 0.5, 1.0, 0.75]
    """
    schedule = WSDS(
        budgets=budgets,  # type: ignore[arg-type]  # any sequence: made a tuple there
        decay_steps=decay_steps,  # type: ignore[arg-type]
        warmup_steps=warmup_steps,
        rewarmup_steps=rewarmup_steps,
        decay_type=decay_type,
        min_lr_ratio=min_lr_ratio,
    )
    return schedule.multiplier(_whole("step", step, at_least=0))


def decay_multiplier(progress: float, decay_type: str, min_lr_ratio: float) -> float:
    """Return the multiplier of `learning_rate` at a point of the decay: 1 at its start, the floor at its end.

    With q = `progress` and m = `min_lr_ratio`:

        linear        m + (1 - m) (1 - q)
        cosine        m + (1 - m) (1 + cos(pi q)) / 2
        1-sqrt        m + (1 - m) (1 - sqrt(q))     best of those tried by Hägele et al., arXiv:2405.18392
        exponential   m^q                           m > 0; MiniCPM's 0.5^(s / half-life) written by its end point
        inverse       1 / (q / m + (1 - q))         m > 0; WSD-S, arXiv:2410.05192: 1 / lr grows linearly

    Called for every step of a decay, so nothing is checked here: `check_decay` did it when the schedule was made.

    Example:
        >>> [[round(decay_multiplier(q, shape, 0.1), 4) for q in (0.0, 0.5, 1.0)] for shape in DECAY_TYPES]
        [[1.0, 0.55, 0.1], [1.0, 0.55, 0.1], [1.0, 0.3636, 0.1], [1.0, 0.3162, 0.1], [1.0, 0.1818, 0.1]]
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
    # The order of these operations is that of transformers, so that the curves are equal to the last bit.
    return factor * (1.0 - min_lr_ratio) + min_lr_ratio


def check_decay(decay_type: str, min_lr_ratio: float) -> None:
    """Raise a ValueError if this shape cannot decay to this floor."""
    if decay_type not in DECAY_TYPES:
        raise ValueError(f"decay_type must be one of {', '.join(DECAY_TYPES)}, got {decay_type!r}.")
    if not _is_number(min_lr_ratio) or not 0.0 <= min_lr_ratio < 1.0:
        raise ValueError(
            f"min_lr_ratio must lie in [0, 1), got {min_lr_ratio!r}: it is the floor as a ratio of learning_rate, "
            f"such as 0.1."
        )
    if decay_type in _NEED_A_FLOOR and min_lr_ratio == 0.0:
        raise ValueError(
            f"decay_type={decay_type!r} never reaches min_lr_ratio={min_lr_ratio!r}. Set --min_lr_ratio 0.1, or choose "
            f"linear, cosine or 1-sqrt, which decay to zero."
        )


def count_from_ratio(value: float, total: int, *, name: str) -> int:
    """Convert the value of the flag `name`, a number of steps or a ratio of `total`, to steps.

    As in `TrainingArguments.get_warmup_steps`, a value of 1 or more is a number of steps and must be whole; a value
    below 1 is a ratio and gives ceil(`total` * `value`). So 1 and 1.0 are one step, never the whole run.

    Example:
        >>> [count_from_ratio(0.1, total, name="decay_steps") for total in (300, 700, 1000, 1001)]
        [30, 70, 100, 101]
        >>> count_from_ratio(0.07, 100, name="decay_steps"), count_from_ratio(40, 700, name="decay_steps")
        (7, 40)
    """
    _whole("total", total, at_least=1)
    if not _is_number(value) or not 0.0 < value < math.inf or (value >= 1 and value != math.floor(value)):
        raise ValueError(
            f"{name} must be a whole number of steps (1 or more) or a ratio between 0 and 1, got {value!r}: "
            f"for example 50 for 50 steps, or 0.1 for a tenth of them."
        )
    if value >= 1:
        return int(value)
    product = total * value
    nearest = round(product)
    # 0.07 * 100 is 7.000000000000001 in floats, and its ceiling 8. A product this close to a whole number is that
    # number: rounding the ratio and the product moves it by 2.3e-16 of itself at most. The test is relative, so a tiny
    # ratio still gives 1 step and never 0.
    return nearest if math.isclose(product, nearest, rel_tol=1e-12) else math.ceil(product)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(name: str, value: float, *, at_least: int) -> int:
    """Return a number of steps as an integer, or refuse it."""
    # NaN and infinity are not integers to float.is_integer(), so this covers them.
    whole = _is_number(value) and (isinstance(value, int) or value.is_integer())
    if not whole or value < at_least:
        raise ValueError(f"{name} must be a whole number of steps, {at_least} or more, got {value!r}.")
    return int(value)
