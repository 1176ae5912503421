"""What a comparison found, as data: losses by arm, horizon and seed, learning rates, updates, and the claims tested."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from . import jobs, planning
from .jobs import command
from .planning import Arm, Known, Reading
from .reading import Curves
from .settings import Settings

Results = dict[str, Any]
COSINE, RAW, EWA, WSD, WSD_S, FREE = (
    "AdamW, cosine",
    "RAdam, constant, raw",
    "RAdam + EWA",
    "RAdam + WSD",
    "RAdam + WSD-S",
    "RAdamScheduleFree",
)
OWN_RAW = "raw weights of the same training"


@dataclass(frozen=True)
class Claim:
    """Something that is said of the methods, as a bound on a difference of losses.

    Attributes:
        words: what is said.
        arm: of which.
        against: what it is held against: another arm, as that was tuned, or `OWN_RAW` with the same seed.
        most: how far its loss may lie above that, in per cent; negative: how far it must lie below.
        least: likewise how far below it may lie.
    """

    words: str
    arm: str
    against: str
    most: float
    least: float = -math.inf


CLAIMS = (
    Claim("The average is at least 2 % below the weights that it is of", EWA, OWN_RAW, -2.0),
    Claim("The average is at least 2 % below raw weights at their own best rate", EWA, RAW, -2.0),
    Claim("The average is at most 1 % above a cosine tuned for the horizon", EWA, COSINE, 1.0),
    Claim("The average is at most 2 % above WSD", EWA, WSD, 2.0),
    Claim("WSD-S is not farther than 1 % from WSD", WSD_S, WSD, 1.0, -1.0),
    Claim("A decay ends at least 3 % below what its trunk has by then", WSD, OWN_RAW, -3.0),
    Claim("Schedule-free is at most 2 % above a cosine tuned for the horizon", FREE, COSINE, 2.0),
)


def parameters(folder: Path, settings: Settings) -> int:
    """Parameters of the model, counted in a file that one of the trainings wrote."""
    files = sorted(folder.rglob("model.safetensors"))
    with safe_open(files[0], framework="numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    return sum(math.prod(shape) for shape in shapes)


def collect(settings: Settings, known: Known, folder: Path) -> Results:
    """Everything, for JSON."""
    made = {job.name: job for job in planning.jobs_of(settings, known)}
    compared = [_arm(settings, arm, known) for arm in planning.arms(settings)]
    drawn = {curve[name] for arm in compared for curve in arm["curves"] for name in ("training", "trunk")}
    count, tokens = parameters(folder, settings), settings.sequences * settings.block
    return {
        "settings": settings.as_json(),
        "horizons": list(settings.horizons),
        "parameters": count,
        "tokens_of_an_update": tokens,
        "tokens_per_parameter": [horizon * tokens / count for horizon in settings.horizons],
        "arms": compared,
        "claims": [_claim(claim, compared) for claim in CLAIMS],
        "longer_cosines": _longer(settings, known, made),
        "same_at_first_budget": _same_at_first_budget(settings, known),
        "trained": {name: _training(settings, made[name], known[name], whole=name in drawn) for name in sorted(made)},
        "updates_in_all": sum(job.cost for job in made.values()),
    }


def _tuning(settings: Settings, arm: Arm, known: Known) -> int:
    """Updates that were made to tune an arm, with one seed."""
    tried = {planning.tuned_at(settings, arm, horizon) for horizon in settings.horizons}
    found: dict[str, jobs.Job] = {}
    for horizon in tried:
        for point in planning.grid(settings, arm, horizon, known).losses:
            job = arm.reading(horizon, point, settings.seeds[0]).job
            found[job.name] = job
    return sum(job.ends for job in found.values())  # of a branch, with its trunk as far as it is needed


def _arm(settings: Settings, arm: Arm, known: Known) -> dict[str, Any]:
    tuned = {horizon: planning.tuned_at(settings, arm, horizon) for horizon in settings.horizons}
    grids = {horizon: planning.grid(settings, arm, each, known) for horizon, each in tuned.items()}
    chosen: dict[int, Any] = {horizon: grid.best for horizon, grid in grids.items()}
    losses = {
        horizon: [arm.reading(horizon, chosen[horizon], seed).loss(known) for seed in settings.seeds]
        for horizon in settings.horizons
    }
    seed, last = settings.seeds[0], chosen[settings.updates]
    return {
        "name": arm.name,
        "rates": [chosen[horizon].rate for horizon in settings.horizons],
        "warmups": [chosen[horizon].warmup for horizon in settings.horizons],
        "losses": [losses[horizon] for horizon in settings.horizons],
        "own_raw": [
            [_own_raw(settings, arm.reading(horizon, chosen[horizon], each), known) for each in settings.seeds]
            for horizon in settings.horizons
        ],
        "mean": [statistics.fmean(losses[horizon]) for horizon in settings.horizons],
        "grids": [
            {"horizon": horizon, "warmup": warmup, "rates": [*by_rate], "losses": [*by_rate.values()]}
            for horizon, grid in grids.items()
            if tuned[horizon] == horizon
            for warmup, by_rate in _by_warmup(grid).items()
        ],
        "warmed": [
            {
                **point._asdict(),
                "losses": [arm.reading(horizon, point, seed).loss(known) for horizon in settings.horizons],
            }
            for point in (planning.warmed(settings, last) if arm.warmed else ())
        ],
        "updates_to_serve": arm.to_serve(),
        "updates_to_tune": _tuning(settings, arm, known),
        "curves": [_curve(arm.reading(horizon, chosen[horizon], seed)) for horizon in settings.horizons],
    }


def _by_warmup(grid: planning.Grid) -> dict[int, dict[float, float | None]]:
    """The losses of a grid by learning rate, for every warm-up that was tried."""
    warmups = sorted({point.warmup for point in grid.losses})
    return {
        warmup: {point.rate: loss for point, loss in grid.losses.items() if point.warmup == warmup}
        for warmup in warmups
    }


def _curve(reading: Reading) -> dict[str, Any]:
    """Which training leads to a loss."""
    return {"training": reading.job.name, "raw": reading.raw, "trunk": reading.job.trunk}


def _own_raw(settings: Settings, reading: Reading, known: Known) -> float | None:
    """Loss of the training weights at a constant rate, of the same training or of its trunk, where it has them."""
    curves = known[planning.with_trunk(settings, reading.job)[0].name]
    return curves.raw.get(reading.step)


def _longer(settings: Settings, known: Known, made: dict[str, jobs.Job]) -> list[dict[str, Any]]:
    """At every horizon but the last: of all longer cosines of the first seed, the one with the lowest loss there.

    A cosine that was tuned for the horizon must be below it.
    """
    lowest = []
    for horizon in settings.horizons[:-1]:
        longer = [
            job
            for job in made.values()
            if job.ends > horizon and job == jobs.cosine(settings, job.ends, job.point, settings.seeds[0])
        ]
        best = min(longer, key=lambda job: known[job.name].evaluated[horizon])
        loss = known[best.name].evaluated[horizon]
        lowest.append({"horizon": horizon, "loss": loss, "ends": best.ends, **best.point._asdict()})
    return lowest


def _claim(claim: Claim, compared: list[dict[str, Any]]) -> dict[str, Any]:
    """The difference of the losses at every horizon, seed by seed, in per cent of what the arm is held against."""
    by_name = {arm["name"]: arm for arm in compared}
    mine = by_name[claim.arm]
    theirs = mine["own_raw"] if claim.against == OWN_RAW else by_name[claim.against]["losses"]
    by_seed = [
        [100 * (one - other) / other for one, other in zip(*seeds, strict=True)]
        for seeds in zip(mine["losses"], theirs, strict=True)
    ]
    differences = [statistics.fmean(values) for values in by_seed]
    return {
        "words": claim.words,
        "arm": claim.arm,
        "against": claim.against,
        "by_seed": by_seed,
        "differences": differences,
        "holds": [claim.least <= difference <= claim.most for difference in differences],
        "holds_for_every_seed": [all(claim.least <= value <= claim.most for value in values) for values in by_seed],
    }


def _same_at_first_budget(settings: Settings, known: Known) -> dict[str, Any] | None:
    """WSD-S and WSD at the first horizon: the same updates. None if no rate was tried with both."""
    seed, horizon = settings.seeds[0], settings.horizons[0]
    for point in planning.grid(settings, _named(settings, WSD_S), settings.updates, known).losses:
        one = known.get(jobs.several_budgets(settings, point, seed).name)
        other = known.get(jobs.branch(settings, horizon, point, seed).name)
        if one is not None and other is not None:
            return {"rate": point.rate, "wsd_s": one.evaluated[horizon], "wsd": other.raw[horizon]}
    return None


def _named(settings: Settings, name: str) -> Arm:
    return next(arm for arm in planning.arms(settings) if arm.name == name)


def _training(settings: Settings, job: jobs.Job, curves: Curves, *, whole: bool) -> dict[str, Any]:
    """A training's losses; training loss and learning rate, which have many records, only of the whole."""
    return {
        "command": " ".join(["python examples/run_clm.py", *command(job, settings, "FOLDER")]),
        "begins": job.begins,
        "ends": job.ends,
        "seconds": curves.seconds,
        "evaluated": curves.evaluated,
        "raw": curves.raw,
        "training": curves.training if whole else {},
        "rate": curves.rate if whole else {},
    }
