"""The trainings of a comparison, as commands of `run_clm.py`, and which of them are needed next.

RAdam at a constant rate is a trunk: its raw and averaged weights are evaluated at every horizon, and WSD branches from
its checkpoints with `--extend_from`. An arm is tuned with the first seed, by factors of 2, until the neighbours of the
best are worse: its learning rate and, for AdamW, the warm-up. Then every seed is trained with the best. AdamW with a
cosine is tuned for each horizon, the others once, for the last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

HORIZONS = (0.25, 0.5, 1.0)
"""Ratios of the longest run at which every method must have a good model."""
DECAY = 0.2
"""Length of a decay, as a ratio of the horizon that it ends at."""
LARGER_BETA2 = (0.98, 0.99)
"""Values that show what a longer warm-up does to RAdam."""
EVALUATIONS = 20
"""Evaluations in the longest run; every horizon and every start of a decay is one of them."""
MAX_POINTS = 16
"""Points of a grid beyond which something else is wrong."""
COSINE, RAW, EWA = "AdamW, cosine", "RAdam, constant, raw", "RAdam + EWA"
WSD, WSD_S, FREE = "RAdam + WSD", "RAdam + WSD-S", "RAdamScheduleFree"


class NoBestRate(RuntimeError):
    """A grid whose best point stays at its end."""


def _rates(lowest: float) -> dict[str, tuple[float, ...]]:
    grids = {"adamw": lowest, "radam": lowest, "radam_schedulefree": 2 * lowest}
    return {name: (rate, 2 * rate, 4 * rate) for name, rate in grids.items()}


@dataclass(frozen=True)
class Settings:
    """One comparison."""

    steps: int = 1060  # of the longest run; a multiple of `EVALUATIONS`
    sequences: int = 32  # per step
    block: int = 128  # tokens per sequence
    vocabulary: int = 1024
    width: int = 64  # of the llama, a multiple of 4
    layers: int = 3
    evaluated: int = 200  # blocks of validation text
    rates: dict[str, tuple[float, ...]] = field(default_factory=lambda: _rates(4e-3))  # first grids, by optimizer
    seeds: tuple[int, ...] = (0, 1, 2)  # of the weights and the order of the data; the first one tunes
    beta2: float = 0.95  # it also sets how long RAdam warms up
    warmup: int = 106  # first value for AdamW, and where the effect on RAdam is shown
    flags: dict[str, Any] = field(default_factory=lambda: {"weight_decay": 0.1, "use_cpu": True})  # of run_clm.py

    def __post_init__(self) -> None:
        if self.steps < 1 or self.steps % EVALUATIONS:
            raise ValueError(f"steps={self.steps} must be a positive multiple of {EVALUATIONS}.")
        if not 1 <= self.warmup <= self.horizons[0] // 2:
            raise ValueError(f"warmup={self.warmup} must be 1 to {self.horizons[0] // 2}, half of the first horizon.")
        for name, rates in self.rates.items():
            if len(set(rates)) < 3 or not all(0 < rate < math.inf for rate in rates):
                raise ValueError(f"rates of {name}, {rates}: give at least three different positive numbers.")

    @property
    def horizons(self) -> tuple[int, ...]:
        """The horizons in steps."""
        return tuple(round(ratio * self.steps) for ratio in HORIZONS)

    @property
    def digest(self) -> str:
        """Name of what is compared; more learning rates and seeds do not change it."""
        own = dataclasses.asdict(self) | {"rates": None, "seeds": None}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def interval(self) -> int:
        """Steps between two evaluations."""
        return self.steps // EVALUATIONS


QUICK = Settings(steps=60, warmup=6, sequences=8, width=32, layers=2, evaluated=10, seeds=(0,), rates=_rates(8e-3))


@dataclass(frozen=True)
class Curves:
    """What one training logged, by step."""

    evaluated: dict[int, float]  # loss of the evaluation weights; infinite where it diverged
    raw: dict[int, float]  # loss of the training weights, where they were evaluated too
    training: dict[int, float]  # training loss
    rate: dict[int, float]  # learning rate
    seconds: float


Known = Mapping[str, Curves]
"""The finished jobs by name."""


# ---- Jobs ----


class Point(NamedTuple):
    """What is tuned: the learning rate, the steps of a linear warm-up, and a beta2 other than the comparison's."""

    rate: float
    warmup: int = 0
    beta2: float | None = None


@dataclass(frozen=True)
class Job:
    """One training."""

    name: str  # folder, relative to that of the comparison
    flags: Mapping[str, Any]  # of `run_clm.py`, besides those that all jobs share
    point: Point
    seed: int
    ends: int  # last step
    begins: int = 0  # steps of the trunk that it branches from
    trunk: str | None = None  # name of that job


def _job(method: str, ends: int, point: Point, seed: int, flags: dict[str, Any], **branch: Any) -> Job:
    flags = {"max_steps": ends, "learning_rate": point.rate, "seed": seed, "save_strategy": "no"} | flags
    folder = f"rate_{point.rate:g}/seed_{seed}"
    if point.warmup:
        folder, flags["warmup_steps"] = f"warmup_{point.warmup}/{folder}", point.warmup
    if point.beta2 is not None:
        folder, flags["adam_beta2"] = f"beta2_{point.beta2:g}/{folder}", point.beta2
    return Job(f"{method}/{folder}", flags, point, seed, ends, **branch)


def cosine(settings: Settings, horizon: int, point: Point, seed: int) -> Job:
    """AdamW with a warm-up and a cosine to zero at a horizon, which it must know."""
    flags = {"optim": "adamw_torch_fused", "lr_scheduler_type": "cosine"}
    return _job(f"adamw_cosine/{horizon}", horizon, point, seed, flags)


def trunk(settings: Settings, point: Point, seed: int) -> Job:
    """RAdam at a constant rate with the average; checkpoints where decays begin."""
    saving = {"save_strategy": "steps", "save_steps": decay_start(settings.horizons[0])}
    flags = {"optim": "radam", "ewa": True, "ewa_eval_raw": True}
    return _job("radam_constant", settings.steps, point, seed, flags | saving)


def decay_start(horizon: int) -> int:
    """Step at which the decay to a horizon begins."""
    return horizon - round(DECAY * horizon)


def wsd(settings: Settings, horizon: int, point: Point, seed: int) -> Job:
    """The decay of WSD to a horizon, from a checkpoint of the trunk."""
    begin, source = decay_start(horizon), trunk(settings, point, seed)
    decay = {"lr_scheduler_type": "wsd", "decay_steps": horizon - begin}
    flags = {"optim": "radam", "ewa": True, "ewa_eval_raw": True} | decay
    return _job(f"radam_wsd/{horizon}", horizon, point, seed, flags, begins=begin, trunk=source.name)


def wsd_s(settings: Settings, point: Point, seed: int) -> Job:
    """WSD-S: one run that decays to every horizon and continues."""
    flags = {"optim": "radam", "lr_scheduler_type": "wsd_s", "budgets": settings.horizons[:-1], "decay_steps": DECAY}
    return _job("radam_wsd_s", settings.steps, point, seed, flags)


def schedule_free(settings: Settings, point: Point, seed: int) -> Job:
    """RAdamScheduleFree: one run at a constant rate, evaluated at x."""
    return _job("radam_schedulefree", settings.steps, point, seed, {"optim": "radam_schedulefree"})


def command(job: Job, settings: Settings, folder: str) -> list[str]:
    """Flags of `run_clm.py` for a job of the comparison in `folder`."""
    model = {"hidden_size": settings.width, "intermediate_size": settings.width * 8 // 3 // 4 * 4}
    model |= {"num_hidden_layers": settings.layers, "num_attention_heads": 4, "num_key_value_heads": 4}
    flags: dict[str, Any] = {
        "model_type": "llama",
        "config_overrides": ",".join(
            [*(f"{name}={value}" for name, value in model.items()), "tie_word_embeddings=true"]
        ),
        "vocab_size": settings.vocabulary,
        "block_size": settings.block,
        "max_eval_samples": settings.evaluated,
        "per_device_train_batch_size": settings.sequences,
        "per_device_eval_batch_size": 50,
        "adam_beta2": settings.beta2,
        "eval_strategy": "steps",
        "eval_steps": settings.interval,
        "logging_steps": max(1, settings.interval // 5),
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": f"{folder}/{job.name}",
        **settings.flags,
        **job.flags,
    }
    if job.trunk is not None:
        flags["extend_from"] = f"{folder}/{job.trunk}/checkpoint-{job.begins}"
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


# ---- Arms and their grids ----


@dataclass(frozen=True)
class Reading:
    """Where a loss is found: the job, whether it is that of the training weights, and the step."""

    job: Job
    raw: bool
    step: int

    def loss(self, known: Known) -> float | None:
        """The loss; None while the job is not finished."""
        curves = known.get(self.job.name)
        return None if curves is None else (curves.raw if self.raw else curves.evaluated)[self.step]


@dataclass(frozen=True)
class Arm:
    """One method."""

    name: str
    family: str  # key of `Settings.rates`
    reading: Callable[[int, Point, int], Reading]  # where the loss is, by horizon, point and seed
    steps_to_serve: int  # steps to have a model at each horizon, once tuned
    tuned_per_horizon: bool = False  # rate and warm-up
    warmed: bool = False  # whether longer warm-ups are shown


def arms(settings: Settings) -> list[Arm]:
    """The six methods that are compared."""
    end, horizons = settings.steps, settings.horizons

    def constant(raw: bool) -> Callable[[int, Point, int], Reading]:
        return lambda horizon, *what: Reading(trunk(settings, *what), raw, horizon)

    def by_horizon(make: Callable[..., Job], raw: bool) -> Callable[[int, Point, int], Reading]:
        return lambda horizon, *what: Reading(make(settings, horizon, *what), raw, horizon)

    def one_run(make: Callable[..., Job]) -> Callable[[int, Point, int], Reading]:
        return lambda horizon, *what: Reading(make(settings, *what), False, horizon)

    branches = decay_start(end) + sum(horizon - decay_start(horizon) for horizon in horizons)
    return [
        Arm(COSINE, "adamw", by_horizon(cosine, raw=False), sum(horizons), tuned_per_horizon=True),
        Arm(RAW, "radam", constant(raw=True), end),
        Arm(EWA, "radam", constant(raw=False), end, warmed=True),
        Arm(WSD, "radam", by_horizon(wsd, raw=True), branches),
        Arm(WSD_S, "radam", one_run(wsd_s), end),
        Arm(FREE, "radam_schedulefree", one_run(schedule_free), end, warmed=True),
    ]


@dataclass(frozen=True)
class Grid:
    """Losses of an arm at a horizon by point; `best` is None until all its neighbours are known to be worse."""

    losses: dict[Point, float | None]
    best: Point | None


def neighbours(best: Point, points: Iterable[Point], horizon: int, *, warmup: bool) -> list[Point]:
    """Points to try next: half and double the rate, then half and double the warm-up.

    A warm-up leaves at least half of the horizon.
    """
    points = set(points)
    rates = [point.rate for point in points if point.warmup == best.warmup]
    found = [best._replace(rate=best.rate / 2)] if best.rate == min(rates) else []
    found += [best._replace(rate=best.rate * 2)] if best.rate == max(rates) else []
    if warmup and not found:
        lengths = {best.warmup // 2, max(1, best.warmup * 2)}
        found += [best._replace(warmup=length) for length in sorted(lengths) if 2 * length <= horizon]
    return [point for point in found if point not in points]


def grid(settings: Settings, arm: Arm, horizon: int, known: Known) -> Grid:
    """Points of an arm that are tried or to be tried next, with the losses known so far.

    Raises:
        NoBestRate: the best stays at an end.
    """
    seed, warmup = settings.seeds[0], arm.tuned_per_horizon
    points = {Point(rate, settings.warmup if warmup else 0) for rate in settings.rates[arm.family]}
    while True:
        losses = {point: arm.reading(horizon, point, seed).loss(known) for point in sorted(points)}
        found = [(loss, point) for point, loss in losses.items() if loss is not None]
        if len(found) < len(points):
            return Grid(losses, None)
        loss, best = min(found)
        new = neighbours(best, points, horizon, warmup=warmup)
        if not math.isfinite(loss):  # all diverged: only lower rates help, and the best is the lowest
            new = [best._replace(rate=best.rate / 2)]
        if not new:
            return Grid(losses, best)
        if len(points) >= MAX_POINTS:
            raise NoBestRate(
                f"{arm.name}: the best of {len(points)} learning rates from {min(points).rate:g} to "
                f"{max(points).rate:g} at step {horizon}, {best.rate:g}, is still at an end. Change `rates`."
            )
        points.update(new)


def tuned_at(settings: Settings, arm: Arm, horizon: int) -> int:
    """The horizon at which an arm is tuned for this one."""
    return horizon if arm.tuned_per_horizon else settings.steps


def longer_warmups(settings: Settings, best: Point) -> list[Point]:
    """Points with a linear warm-up or a larger beta2, which lengthens RAdam's own, at the best rate and its double."""
    warmups = [(settings.warmup, None), *((0, beta2) for beta2 in LARGER_BETA2)]
    return [Point(rate, warmup, beta2) for warmup, beta2 in warmups for rate in (best.rate, 2 * best.rate)]


def _readings(settings: Settings, known: Known) -> Iterable[Reading]:
    """Yield every loss wanted so far: those of the grids; once one has its best, all seeds and longer warm-ups."""
    for arm in arms(settings):
        for horizon in settings.horizons:
            tuning = tuned_at(settings, arm, horizon)
            tried = grid(settings, arm, tuning, known)
            for point in tried.losses:
                yield arm.reading(tuning, point, settings.seeds[0])
            if tried.best is None:
                continue
            for seed in settings.seeds:
                yield arm.reading(horizon, tried.best, seed)
            for point in longer_warmups(settings, tried.best) if arm.warmed else ():
                yield arm.reading(horizon, point, settings.seeds[0])


def with_trunk(settings: Settings, job: Job) -> list[Job]:
    """A job, preceded by the one that it branches from."""
    return [job] if job.trunk is None else [trunk(settings, job.point, job.seed), job]


def jobs(settings: Settings, known: Known) -> list[Job]:
    """The trainings wanted so far, finished or not, each once and after its trunk."""
    found: dict[str, Job] = {}
    for reading in _readings(settings, known):
        for job in with_trunk(settings, reading.job):
            found.setdefault(job.name, job)
    return [*found.values()]
