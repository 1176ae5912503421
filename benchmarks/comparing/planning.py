"""Which trainings a comparison needs next, given what those that are finished say.

Each arm is tuned by the first seed: its learning rate, and AdamW's warm-up with it, by steps of a factor 2, until the
neighbours of the best are worse. Then all seeds are trained with what was chosen. AdamW with a cosine is tuned for each
horizon by itself, the others once, at the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from . import jobs
from .jobs import Job, Point
from .reading import Curves
from .settings import LARGER_BETA2, Settings

WIDEST = 16
"""Points of a grid beyond which something else is wrong."""
Known = Mapping[str, Curves]
"""The finished jobs by name."""


class NoBestRate(RuntimeError):
    """A grid whose best stays at its end."""


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
        reading: where its loss at a horizon is, for what is tuned and a seed.
        to_serve: updates that it makes to have a model at each of the horizons, once it is tuned.
        tuned_for_each_horizon: whether it is tuned anew for every horizon, its warm-up too.
        warmed: whether it is shown too what a longer warm-up does to it.
    """

    name: str
    family: str
    reading: Callable[[int, Point, int], Reading]
    to_serve: Callable[[], int]
    tuned_for_each_horizon: bool = False
    warmed: bool = False


def arms(settings: Settings) -> list[Arm]:
    """The six methods that are compared."""
    end = settings.updates

    def trunk(raw: bool) -> Callable[[int, Point, int], Reading]:
        return lambda horizon, point, seed: Reading(jobs.trunk(settings, point, seed), raw, horizon)

    branches = sum(horizon - jobs.branching(settings, horizon) for horizon in settings.horizons)
    return [
        Arm(
            "AdamW, cosine",
            "adamw",
            lambda horizon, point, seed: Reading(jobs.cosine(settings, horizon, point, seed), False, horizon),
            lambda: sum(settings.horizons),
            tuned_for_each_horizon=True,
        ),
        Arm("RAdam, constant, raw", "radam", trunk(raw=True), lambda: end),
        Arm("RAdam + EWA", "radam", trunk(raw=False), lambda: end, warmed=True),
        Arm(
            "RAdam + WSD",
            "radam",
            lambda horizon, point, seed: Reading(jobs.branch(settings, horizon, point, seed), True, horizon),
            lambda: jobs.branching(settings, end) + branches,
        ),
        Arm(
            "RAdam + WSD-S",
            "radam",
            lambda horizon, point, seed: Reading(jobs.several_budgets(settings, point, seed), False, horizon),
            lambda: end,
        ),
        Arm(
            "RAdamScheduleFree",
            "radam_schedulefree",
            lambda horizon, point, seed: Reading(jobs.schedule_free(settings, point, seed), False, horizon),
            lambda: end,
            warmed=True,
        ),
    ]


@dataclass(frozen=True)
class Grid:
    """Losses of an arm at a horizon by what is tuned, as far as they are known.

    Attributes:
        losses: None where the training is not finished.
        best: the point with the lowest loss, once all its neighbours are known to be worse; else None.
    """

    losses: dict[Point, float | None]
    best: Point | None


def missing(best: Point, points: Collection[Point], horizon: int, *, warmup: bool) -> list[Point]:
    """What is to be tried around the best point: a lower and a higher rate, if there are none; then so with warm-ups.

    A warm-up is half or double, and leaves at least half of the horizon to the decay.
    """
    rates = [point.rate for point in points if point.warmup == best.warmup]
    found = [best._replace(rate=best.rate / 2)] if best.rate == min(rates) else []
    found += [best._replace(rate=best.rate * 2)] if best.rate == max(rates) else []
    if warmup and not found:
        steps = {best.warmup // 2, max(1, best.warmup * 2)}
        found += [best._replace(warmup=step) for step in sorted(steps) if 2 * step <= horizon]
    return [point for point in found if point not in points]


def grid(settings: Settings, arm: Arm, horizon: int, known: Known) -> Grid:
    """What was tried for an arm and is to be tried next, with what is known of it.

    Raises:
        NoBestRate: if the best stays at an end.
    """
    seed, warmup = settings.seeds[0], arm.tuned_for_each_horizon
    points = {Point(rate, settings.warmup if warmup else 0) for rate in settings.rates[arm.family]}
    while True:
        losses = {point: arm.reading(horizon, point, seed).loss(known) for point in sorted(points)}
        found = [(loss, point) for point, loss in losses.items() if loss is not None]
        if len(found) < len(points):
            return Grid(losses, None)
        loss, best = min(found)
        new = missing(best, points, horizon, warmup=warmup)
        if not math.isfinite(loss):  # all diverged, and the lowest rate is the first of them: only lower ones help
            new = [best._replace(rate=best.rate / 2)]
        if not new:
            return Grid(losses, best)
        if len(points) >= WIDEST:
            raise NoBestRate(
                f"{arm.name}: of {len(points)} trainings with learning rates from {min(points).rate:g} to "
                f"{max(points).rate:g} the best at update {horizon}, with {best.rate:g}, is still at an end. Begin "
                "elsewhere with --rates."
            )
        points.update(new)


def tuned_at(settings: Settings, arm: Arm, horizon: int) -> int:
    """The horizon at which an arm is tuned for this one."""
    return horizon if arm.tuned_for_each_horizon else settings.updates


def warmed(settings: Settings, best: Point) -> list[Point]:
    """What RAdam is shown with besides its best: longer warm-ups, at the same rate and the double, which they allow.

    RAdam's own warm-up is longer with a larger beta2.
    """
    warmups = [(settings.warmup, None), *((0, beta2) for beta2 in LARGER_BETA2)]
    return [Point(rate, warmup, beta2) for warmup, beta2 in warmups for rate in (best.rate, 2 * best.rate)]


def readings(settings: Settings, known: Known) -> Iterable[Reading]:
    """Every loss that is wanted by now: of the grids; where one has its best, of all seeds and longer warm-ups."""
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
            for point in warmed(settings, tried.best) if arm.warmed else ():
                yield arm.reading(horizon, point, settings.seeds[0])


def with_trunk(settings: Settings, job: Job) -> list[Job]:
    """A job, after the one that it branches from."""
    if job.trunk is None:
        return [job]
    return [jobs.trunk(settings, job.point, job.seed), job]


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
