"""Which trainings a comparison needs next, given what those that are finished say.

Each arm has its learning rate from a grid with factor 2, by the first seed; the grid grows until its best rate is not
at an end. Then all seeds are trained with the rate that was chosen. AdamW with a cosine is tuned for every horizon by
itself, the others once, at the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from . import jobs
from .jobs import Job
from .reading import Curves
from .settings import Settings

WIDEST = 9
"""Rates in a grid beyond which something else is wrong."""
Known = Mapping[str, Curves]
"""The finished jobs by name."""


class NoBestRate(RuntimeError):
    """A grid of learning rates whose best stays at its end."""


@dataclass(frozen=True)
class Reading:
    """Where the loss of an arm at a horizon is found.

    Attributes:
        job: the training.
        raw: whether it is the loss of the training weights, of a job that keeps an average.
        step: the update.
    """

    job: Job
    raw: bool
    step: int

    def loss(self, known: Known) -> float | None:
        """The loss; None while the job is not finished."""
        curves = known.get(self.job.name)
        if curves is None:
            return None
        return (curves.raw if self.raw else curves.evaluated)[self.step]


@dataclass(frozen=True)
class Arm:
    """One method.

    Attributes:
        name: for tables.
        family: whose initial learning rates it takes.
        reading: where its loss at a horizon is, for a rate and a seed.
        tuned_for_each_horizon: whether its rate is chosen anew for every horizon.
        to_serve: updates that it makes to have a model at each of the horizons, once the rates are known.
    """

    name: str
    family: str
    reading: Callable[[int, float, int], Reading]
    to_serve: Callable[[], int]
    tuned_for_each_horizon: bool = False


def arms(settings: Settings) -> list[Arm]:
    """The six methods that are compared."""
    end = settings.updates

    def trunk(raw: bool) -> Callable[[int, float, int], Reading]:
        return lambda horizon, rate, seed: Reading(jobs.trunk(settings, rate, seed), raw, horizon)

    branches = sum(horizon - jobs.branching(settings, horizon) for horizon in settings.horizons)
    return [
        Arm(
            "AdamW, cosine",
            "adamw",
            lambda horizon, rate, seed: Reading(jobs.cosine(settings, horizon, rate, seed), False, horizon),
            lambda: sum(settings.horizons),
            tuned_for_each_horizon=True,
        ),
        Arm("RAdam, constant, raw", "radam", trunk(raw=True), lambda: end),
        Arm("RAdam + EWA", "radam", trunk(raw=False), lambda: end),
        Arm(
            "RAdam + WSD",
            "radam",
            lambda horizon, rate, seed: Reading(jobs.branch(settings, horizon, rate, seed), True, horizon),
            lambda: jobs.branching(settings, end) + branches,
        ),
        Arm(
            "RAdam + WSD-S",
            "radam",
            lambda horizon, rate, seed: Reading(jobs.several_budgets(settings, rate, seed), False, horizon),
            lambda: end,
        ),
        Arm(
            "RAdamScheduleFree",
            "radam_schedulefree",
            lambda horizon, rate, seed: Reading(jobs.schedule_free(settings, rate, seed), False, horizon),
            lambda: end,
        ),
    ]


@dataclass(frozen=True)
class Grid:
    """Losses of an arm at a horizon by learning rate, as far as they are known.

    Attributes:
        losses: None where the training is not finished.
        best: the rate with the lowest loss, once all are known and it is not at an end; else None.
    """

    losses: dict[float, float | None]
    best: float | None


def grid(settings: Settings, arm: Arm, horizon: int, known: Known) -> Grid:
    """The learning rates to try for an arm, with what is known of them.

    Raises:
        NoBestRate: if the best stays at an end.
    """
    seed = settings.seeds[0]
    rates = sorted(settings.rates[arm.family])
    while True:
        losses = {rate: arm.reading(horizon, rate, seed).loss(known) for rate in rates}
        found = [(loss, rate) for rate, loss in losses.items() if loss is not None]
        if len(found) < len(rates):
            return Grid(losses, None)
        loss, best = min(found)
        if rates[0] < best < rates[-1] and math.isfinite(loss):
            return Grid(losses, best)
        if len(rates) >= WIDEST:
            raise NoBestRate(
                f"{arm.name}: of {len(rates)} learning rates from {rates[0]:g} to {rates[-1]:g} the best at update "
                f"{horizon} is still {best:g}, at an end. Begin elsewhere with --rates."
            )
        lower = best == rates[0] or not math.isfinite(loss)
        rates = sorted([*rates, rates[0] / 2 if lower else rates[-1] * 2])


def tuned_at(settings: Settings, arm: Arm, horizon: int) -> int:
    """The horizon at which the rate for this horizon is chosen."""
    return horizon if arm.tuned_for_each_horizon else settings.updates


def readings(settings: Settings, known: Known) -> Iterable[Reading]:
    """Every loss that is wanted by now: those of the grids, and those of all seeds where a rate is chosen."""
    for arm in arms(settings):
        for horizon in settings.horizons:
            tuning = tuned_at(settings, arm, horizon)
            tried = grid(settings, arm, tuning, known)
            for rate in tried.losses:
                yield arm.reading(tuning, rate, settings.seeds[0])
            if tried.best is not None:
                for seed in settings.seeds:
                    yield arm.reading(horizon, tried.best, seed)


def with_trunk(settings: Settings, job: Job) -> list[Job]:
    """A job, after the one that it branches from."""
    if job.trunk is None:
        return [job]
    flags = dict(job.flags)
    return [jobs.trunk(settings, flags["learning_rate"], flags["seed"]), job]


def jobs_of(settings: Settings, known: Known) -> list[Job]:
    """The trainings that are wanted by now, finished or not, each once and after its trunk."""
    found: dict[str, Job] = {}
    for reading in readings(settings, known):
        for job in with_trunk(settings, reading.job):
            found.setdefault(job.name, job)
    return [*found.values()]


def needed(settings: Settings, known: Known) -> list[Job]:
    """Those of them that are not finished; none when all is done."""
    return [job for job in jobs_of(settings, known) if job.name not in known]
