"""What a comparison found, as data: losses by arm, horizon and seed, learning rates, updates, and the claims tested."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from safetensors import safe_open

from . import jobs, planning
from .jobs import command
from .planning import Arm, Known
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
CLAIMS: tuple[tuple[str, str, str, float], ...] = (
    ("The average is at least 2 % better than the weights it is of", EWA, RAW, -2.0),
    ("The average is within 1 % of a cosine tuned for the horizon", EWA, COSINE, 1.0),
    ("The average is within 2 % of WSD", EWA, WSD, 2.0),
    ("WSD-S is within 1 % of WSD", WSD_S, WSD, 1.0),
    ("A decay gains at least 3 %", WSD, RAW, -3.0),
    ("Schedule-free is within 2 % of a cosine tuned for the horizon", FREE, COSINE, 2.0),
)
"""In words; an arm; what it is held against; and the most that its loss may lie above that one's, in per cent."""


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
        "claims": [_claim(words, one, other, limit, compared) for words, one, other, limit in CLAIMS],
        "same_at_first_budget": _same_at_first_budget(settings, known),
        "trained": {name: _training(settings, made[name], known[name], whole=name in drawn) for name in sorted(made)},
        "updates_in_all": sum(job.cost for job in made.values()),
    }


def _tuning(settings: Settings, arm: Arm, known: Known) -> int:
    """Updates that were made to choose the learning rates of an arm, with one seed."""
    tried = {planning.tuned_at(settings, arm, horizon) for horizon in settings.horizons}
    found: dict[str, jobs.Job] = {}
    for horizon in tried:
        for rate in planning.grid(settings, arm, horizon, known).losses:
            job = arm.reading(horizon, rate, settings.seeds[0]).job
            found |= {each.name: each for each in planning.with_trunk(settings, job)}
    return sum(job.cost for job in found.values())


def _arm(settings: Settings, arm: Arm, known: Known) -> dict[str, Any]:
    tuned = {horizon: planning.tuned_at(settings, arm, horizon) for horizon in settings.horizons}
    grids = {horizon: planning.grid(settings, arm, each, known) for horizon, each in tuned.items()}
    rates = {horizon: grid.best for horizon, grid in grids.items()}
    losses = {
        horizon: [arm.reading(horizon, rates[horizon], seed).loss(known) for seed in settings.seeds]
        for horizon in settings.horizons
    }
    return {
        "name": arm.name,
        "rates": [rates[horizon] for horizon in settings.horizons],
        "losses": [losses[horizon] for horizon in settings.horizons],
        "mean": [statistics.fmean(losses[horizon]) for horizon in settings.horizons],
        "grids": [
            {"horizon": horizon, "rates": [*grid.losses], "losses": [*grid.losses.values()]}
            for horizon, grid in grids.items()
            if tuned[horizon] == horizon
        ],
        "updates_to_serve": arm.to_serve(),
        "updates_to_tune": _tuning(settings, arm, known),
        "curves": [_curve(settings, arm, rates, horizon) for horizon in settings.horizons],
    }


def _curve(settings: Settings, arm: Arm, rates: dict[int, Any], horizon: int) -> dict[str, Any]:
    """Which training, of the first seed, leads to the loss at a horizon."""
    reading = arm.reading(horizon, rates[horizon], settings.seeds[0])
    return {"training": reading.job.name, "raw": reading.raw, "trunk": reading.job.trunk}


def _claim(words: str, one: str, other: str, limit: float, compared: list[dict[str, Any]]) -> dict[str, Any]:
    """The difference of two arms at every horizon, seed by seed, in per cent of the second's loss."""
    of = {arm["name"]: arm["losses"] for arm in compared}
    by_seed = [
        [100 * (a - b) / b for a, b in zip(mine, theirs, strict=True)]
        for mine, theirs in zip(of[one], of[other], strict=True)
    ]
    differences = [statistics.fmean(values) for values in by_seed]
    return {
        "words": words,
        "arm": one,
        "against": other,
        "limit": limit,
        "by_seed": by_seed,
        "differences": differences,
        "holds": [difference <= limit for difference in differences],
    }


def _same_at_first_budget(settings: Settings, known: Known) -> dict[str, Any] | None:
    """WSD-S and WSD at the first horizon: the same updates. None if no rate was tried with both."""
    seed, horizon = settings.seeds[0], settings.horizons[0]
    for rate in planning.grid(settings, _named(settings, WSD_S), settings.updates, known).losses:
        one = known.get(jobs.several_budgets(settings, rate, seed).name)
        other = known.get(jobs.branch(settings, horizon, rate, seed).name)
        if one is not None and other is not None:
            return {"rate": rate, "wsd_s": one.evaluated[horizon], "wsd": other.raw[horizon]}
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
