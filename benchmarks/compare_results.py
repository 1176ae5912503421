"""The results of a comparison: losses by arm, horizon and seed, claims held against them, and the Markdown tables."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

import compare_plan as plan
from compare_plan import COSINE, EWA, FREE, RAW, WSD, WSD_S, Arm, Known, Reading, Settings
from tables import Parts, markdown

Results = dict[str, Any]
OWN_RAW = "raw weights of the same training"


@dataclass(frozen=True)
class Claim:
    """A bound on how far one loss lies above another, in per cent."""

    words: str
    arm: str
    against: str  # another arm, tuned for itself, or `OWN_RAW` with the same seed
    most: float  # negative: how far below it must lie
    least: float = -math.inf


CLAIMS = (
    Claim("The average is at least 2 % below its training weights", EWA, OWN_RAW, -2.0),
    Claim("The average is at least 2 % below raw weights at their own best rate", EWA, RAW, -2.0),
    Claim("The average is at most 1 % above a cosine tuned for the horizon", EWA, COSINE, 1.0),
    Claim("The average is at most 2 % above WSD", EWA, WSD, 2.0),
    Claim("WSD-S is not farther than 1 % from WSD", WSD_S, WSD, 1.0, -1.0),
    Claim("A decay ends at least 3 % below the constant run that it left", WSD, OWN_RAW, -3.0),
    Claim("Schedule-free is at most 2 % above a cosine tuned for the horizon", FREE, COSINE, 2.0),
)


def collect(settings: Settings, known: Known, folder: Path) -> Results:
    """Collect everything, for JSON."""
    made = {job.name: job for job in plan.jobs(settings, known)}
    compared = [_arm(settings, arm, known) for arm in plan.arms(settings)]
    drawn = {curve[name] for arm in compared for curve in arm["curves"] for name in ("training", "trunk")}
    count, tokens = _parameters(folder), settings.sequences * settings.block
    return {
        "settings": dataclasses.asdict(settings),
        "horizons": list(settings.horizons),
        "parameters": count,
        "tokens_per_step": tokens,
        "tokens_per_parameter": [horizon * tokens / count for horizon in settings.horizons],
        "arms": compared,
        "claims": [_claim(claim, compared) for claim in CLAIMS],
        "longer_cosines": _longer_cosines(settings, known, made),
        "same_at_first_budget": _same_at_first_budget(settings, known),
        "trained": {name: _training(settings, made[name], known[name], name in drawn) for name in sorted(made)},
        "total_steps": sum(job.ends - job.begins for job in made.values()),
    }


def _parameters(folder: Path) -> int:
    """Count the parameters in a file that one of the trainings wrote."""
    with safe_open(next(iter(sorted(folder.rglob("model.safetensors")))), framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def _arm(settings: Settings, arm: Arm, known: Known) -> dict[str, Any]:
    tuned = {horizon: plan.tuned_at(settings, arm, horizon) for horizon in settings.horizons}
    grids = {horizon: plan.grid(settings, arm, tuned[horizon], known) for horizon in settings.horizons}
    chosen: dict[int, Any] = {horizon: grid.best for horizon, grid in grids.items()}
    readings = [[arm.reading(at, chosen[at], seed) for seed in settings.seeds] for at in settings.horizons]
    losses = [[reading.loss(known) for reading in seeds] for seeds in readings]
    seed = settings.seeds[0]
    tried = {arm.reading(tuned[at], point, seed).job.name: tuned[at] for at in tuned for point in grids[at].losses}
    return {
        "name": arm.name,
        "rates": [point.rate for point in chosen.values()],
        "warmups": [point.warmup for point in chosen.values()],
        "losses": losses,
        "own_raw": [[_own_raw(settings, reading, known) for reading in seeds] for seeds in readings],
        "mean": [statistics.fmean(seeds) for seeds in losses],
        "grids": [
            {"horizon": at, "warmup": warmup, "rates": [*by_rate], "losses": [*by_rate.values()]}
            for at in settings.horizons
            if tuned[at] == at
            for warmup, by_rate in _by_warmup(grids[at]).items()
        ],
        "warmed": [
            {**point._asdict(), "losses": [arm.reading(at, point, seed).loss(known) for at in settings.horizons]}
            for point in (plan.longer_warmups(settings, chosen[settings.steps]) if arm.warmed else ())
        ],
        "steps_to_serve": arm.steps_to_serve,
        "steps_to_tune": sum(tried.values()),  # of a branch, with its trunk up to there
        "curves": [
            {"training": seeds[0].job.name, "raw": seeds[0].raw, "trunk": seeds[0].job.trunk} for seeds in readings
        ],
    }


def _by_warmup(grid: plan.Grid) -> dict[int, dict[float, float | None]]:
    """Losses of a grid by warm-up and learning rate."""
    warmups = sorted({point.warmup for point in grid.losses})
    return {one: {p.rate: loss for p, loss in grid.losses.items() if p.warmup == one} for one in warmups}


def _own_raw(settings: Settings, reading: Reading, known: Known) -> float | None:
    """Loss of the training weights at a constant rate, of the same training or its trunk, where there is one."""
    return known[plan.with_trunk(settings, reading.job)[0].name].raw.get(reading.step)


def _longer_cosines(settings: Settings, known: Known, made: dict[str, plan.Job]) -> list[dict[str, Any]]:
    """The lowest loss of the first seed's longer cosines at every horizon but the last.

    A cosine that was tuned for the horizon must be below it.
    """
    lowest = []
    for horizon in settings.horizons[:-1]:
        cosines = [job for job in made.values() if job.flags["optim"] == "adamw_torch_fused" and job.ends > horizon]
        cosines = [job for job in cosines if job.seed == settings.seeds[0]]
        best = min(cosines, key=lambda job: known[job.name].evaluated[horizon])
        loss = known[best.name].evaluated[horizon]
        lowest.append({"horizon": horizon, "loss": loss, "ends": best.ends, **best.point._asdict()})
    return lowest


def _claim(claim: Claim, compared: list[dict[str, Any]]) -> dict[str, Any]:
    """The difference of the losses at every horizon and seed, in per cent of the other loss."""
    by_name = {arm["name"]: arm for arm in compared}
    one = by_name[claim.arm]
    other = one["own_raw"] if claim.against == OWN_RAW else by_name[claim.against]["losses"]
    by_seed = [
        [100 * (a - b) / b for a, b in zip(*seeds, strict=True)] for seeds in zip(one["losses"], other, strict=True)
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
    """WSD-S and WSD at the first horizon, which are the same steps; None if no rate was tried with both."""
    seed, horizon = settings.seeds[0], settings.horizons[0]
    (arm,) = [arm for arm in plan.arms(settings) if arm.name == WSD_S]
    for point in plan.grid(settings, arm, settings.steps, known).losses:
        one = known.get(plan.wsd_s(settings, point, seed).name)
        other = known.get(plan.wsd(settings, horizon, point, seed).name)
        if one is not None and other is not None:
            return {"rate": point.rate, "wsd_s": one.evaluated[horizon], "wsd": other.raw[horizon]}
    return None


def _training(settings: Settings, job: plan.Job, curves: plan.Curves, drawn: bool) -> dict[str, Any]:
    """The losses of a training; training loss and learning rate, which have many entries, only if drawn."""
    return {
        "command": " ".join(["python examples/run_clm.py", *plan.command(job, settings, "FOLDER")]),
        "begins": job.begins,
        "ends": job.ends,
        "seconds": curves.seconds,
        "evaluated": curves.evaluated,
        "raw": curves.raw,
        "training": curves.training if drawn else {},
        "rate": curves.rate if drawn else {},
    }


# ---- Tables ----


def table(results: Results) -> str:
    """Loss of every arm at every horizon: mean over the seeds and half their range; the best point; steps."""
    losses = [f"loss at {horizon}" for horizon in results["horizons"]]
    head = ["method", *losses, "learning rate", "warm-up", "steps for all three", "steps to tune"]
    rows = []
    for arm in results["arms"]:
        cells = [_mean(values) for values in arm["losses"]]
        for values in (arm["rates"], arm["warmups"]):  # one per horizon, or the one that all have
            cells.append(", ".join(f"{value:g}" for value in (values if len(set(values)) > 1 else values[:1])))
        rows.append([arm["name"], *cells, str(arm["steps_to_serve"]), str(arm["steps_to_tune"])])
    return markdown(head, rows)


def _mean(losses: list[float]) -> str:
    """Mean over the seeds and half their range, where there are several."""
    if not all(map(math.isfinite, losses)):
        return f"diverged ({sum(not math.isfinite(loss) for loss in losses)} of {len(losses)} seeds)"
    spread = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.3f}{spread}"


def claims(results: Results) -> str:
    """Every claim, the difference at every horizon, and whether it holds there."""
    head = ["claim", *(f"at {horizon}" for horizon in results["horizons"]), "here"]
    rows = []
    for claim in results["claims"]:
        cells = [_difference(*pair) for pair in zip(claim["differences"], claim["by_seed"], strict=True)]
        rows.append([claim["words"], *cells, _verdict(claim["holds"], claim["holds_for_every_seed"])])
    return markdown(head, rows)


def _difference(mean: float, by_seed: list[float]) -> str:
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:+.2f} %" + (f" ({min(by_seed):+.2f} to {max(by_seed):+.2f})" if len(by_seed) > 1 else "")


def _verdict(holds: list[bool], for_every_seed: list[bool]) -> str:
    if not any(holds):
        return "does not hold"
    where = "holds" if all(holds) else f"holds at {sum(holds)} of {len(holds)}"
    return where if holds == for_every_seed else f"{where}, on the mean of the seeds"


def grids(results: Results) -> str:
    """Loss of the first seed at every learning rate that was tried."""
    rates = sorted({rate for arm in results["arms"] for grid in arm["grids"] for rate in grid["rates"]})
    rows = []
    for arm in results["arms"]:
        for grid in arm["grids"]:
            best = min(min(other["losses"]) for other in arm["grids"] if other["horizon"] == grid["horizon"])
            by_rate = dict(zip(grid["rates"], grid["losses"], strict=True))
            cells = {rate: f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for rate, loss in by_rate.items()}
            warmup = f", warm-up {grid['warmup']}" if grid["warmup"] else ""
            rows.append([f"{arm['name']}, {grid['horizon']} steps{warmup}", *(cells.get(rate, "") for rate in rates)])
    return markdown(["learning rate", *(f"{rate:g}" for rate in rates)], rows)


def warmups(results: Results) -> str:
    """What a longer warm-up does to RAdam: losses of the first seed."""
    rows = []
    for arm in [arm for arm in results["arms"] if arm["warmed"]]:
        losses = [seeds[0] for seeds in arm["losses"]]
        as_compared = {"rate": arm["rates"][-1], "warmup": 0, "beta2": None, "losses": losses}
        for tried in (as_compared, *arm["warmed"]):
            beta2 = results["settings"]["beta2"] if tried["beta2"] is None else tried["beta2"]
            cells = [f"{beta2:g}", str(tried["warmup"]), f"{tried['rate']:g}", *(f"{x:.3f}" for x in tried["losses"])]
            rows.append([arm["name"], *cells])
    head = ["method", "beta2", "linear warm-up", "learning rate"]
    return markdown([*head, *(f"loss at {horizon}" for horizon in results["horizons"])], rows)


def setting(results: Results) -> str:
    """What was trained, in a sentence."""
    made = results["settings"]
    horizons = ", ".join(map(str, results["horizons"]))
    ratios = ", ".join(f"{value:.1f}" for value in results["tokens_per_parameter"])
    return (
        f"A llama of {results['parameters']:,} parameters (width {made['width']}, {made['layers']} layers, "
        f"{made['vocabulary']} tokens), {results['tokens_per_step']} tokens per step; horizons of {horizons} "
        f"steps, which are {ratios} tokens per parameter; {len(made['seeds'])} seeds; "
        f"{len(results['trained'])} trainings, {results['total_steps']} steps in all.\n"
    )


def longer_cosines(results: Results) -> str:
    """The loss of the tuned cosines beside the lowest that a longer one has there, first seed."""
    (cosine,) = [arm for arm in results["arms"] if arm["name"] == COSINE]
    rows = []
    for losses, longer in zip(cosine["losses"], results["longer_cosines"], strict=False):
        which = f"{longer['ends']} steps, learning rate {longer['rate']:g}, warm-up {longer['warmup']}"
        rows.append([str(longer["horizon"]), f"{losses[0]:.3f}", f"{longer['loss']:.3f}", which])
    return markdown(["at", "the cosine that ends here", "the lowest of the longer", "that is of"], rows)


def first_budget(results: Results) -> str:
    """WSD-S and WSD at the first horizon, with one rate and seed."""
    found = results["same_at_first_budget"]
    if found is None:
        return "No learning rate was tried with both.\n"
    return (
        f"At {results['horizons'][0]} steps and a learning rate of {found['rate']:g}, first seed: WSD-S "
        f"{found['wsd_s']:.6f}, WSD {found['wsd']:.6f}.\n"
    )


PARTS: Parts = {
    "setting": setting,
    "table": table,
    "claims": claims,
    "grids": grids,
    "longer_cosines": longer_cosines,
    "warmups": warmups,
    "first_budget": first_budget,
}
