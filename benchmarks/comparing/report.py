"""A comparison as Markdown tables."""

from __future__ import annotations

import math
import statistics

from measured import Parts, markdown

from .results import COSINE, Results


def table(results: Results) -> str:
    """Loss of every arm at every horizon: mean over the seeds, and half their range; what was tuned; updates."""
    losses = [f"loss at {horizon}" for horizon in results["horizons"]]
    head = ["method", *losses, "learning rate", "warm-up", "updates for all three", "updates to tune"]
    rows = []
    for arm in results["arms"]:
        cells = [_mean(values) for values in arm["losses"]]
        tuned = [", ".join(f"{value:g}" for value in _distinct(arm[name])) for name in ("rates", "warmups")]
        rows.append([arm["name"], *cells, *tuned, str(arm["updates_to_serve"]), str(arm["updates_to_tune"])])
    return markdown(head, rows)


def _distinct(values: list[float]) -> list[float]:
    """One for each horizon, or one if they are the same."""
    return values if len(set(values)) > 1 else values[:1]


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
        cells = [_difference(*each) for each in zip(claim["differences"], claim["by_seed"], strict=True)]
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
            by_rate = dict(zip(grid["rates"], grid["losses"], strict=True))
            best = min(min(other["losses"]) for other in arm["grids"] if other["horizon"] == grid["horizon"])
            shown = {rate: f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for rate, loss in by_rate.items()}
            warmup = f", warm-up {grid['warmup']}" if grid["warmup"] else ""
            rows.append([f"{arm['name']}, {grid['horizon']} updates{warmup}", *(shown.get(rate, "") for rate in rates)])
    return markdown(["learning rate", *(f"{rate:g}" for rate in rates)], rows)


def warmups(results: Results) -> str:
    """What a longer warm-up does to RAdam: losses of the first seed as it was compared, and with another."""
    rows = []
    for arm in [arm for arm in results["arms"] if arm["warmed"]]:
        as_compared = {"rate": arm["rates"][-1], "warmup": 0, "beta2": None}
        as_compared["losses"] = [losses[0] for losses in arm["losses"]]
        for tried in (as_compared, *arm["warmed"]):
            beta2 = results["settings"]["beta2"] if tried["beta2"] is None else tried["beta2"]
            losses = [f"{loss:.3f}" for loss in tried["losses"]]
            rows.append([arm["name"], f"{beta2:g}", str(tried["warmup"]), f"{tried['rate']:g}", *losses])
    head = ["method", "beta2", "linear warm-up", "learning rate"]
    return markdown([*head, *(f"loss at {each}" for each in results["horizons"])], rows)


def setting(results: Results) -> str:
    """What was trained, in a sentence or two."""
    made = results["settings"]
    horizons = ", ".join(map(str, results["horizons"]))
    ratios = ", ".join(f"{value:.1f}" for value in results["tokens_per_parameter"])
    return (
        f"A llama of {results['parameters']:,} parameters (width {made['width']}, {made['layers']} layers, "
        f"{made['vocabulary']} tokens), {results['tokens_of_an_update']} tokens an update; horizons of {horizons} "
        f"updates, which are {ratios} tokens per parameter; {len(made['seeds'])} seeds; "
        f"{len(results['trained'])} trainings, {results['updates_in_all']} updates in all.\n"
    )


def longer_cosines(results: Results) -> str:
    """The loss of the tuned cosines beside the best that a longer one has on its way, first seed."""
    (cosine,) = [arm for arm in results["arms"] if arm["name"] == COSINE]
    rows = []
    for number, longer in enumerate(results["longer_cosines"]):
        which = f"{longer['ends']} updates, learning rate {longer['rate']:g}, warm-up {longer['warmup']}"
        rows.append([str(longer["horizon"]), f"{cosine['losses'][number][0]:.3f}", f"{longer['loss']:.3f}", which])
    return markdown(["at", "the cosine that ends here", "the lowest of the longer", "that is of"], rows)


def first_budget(results: Results) -> str:
    """WSD-S and WSD at the first horizon, with one rate and seed."""
    found = results["same_at_first_budget"]
    if found is None:
        return "No learning rate was tried with both.\n"
    return (
        f"At {results['horizons'][0]} updates and a learning rate of {found['rate']:g}, first seed: WSD-S "
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


def whole(results: Results) -> str:
    """Everything, as it is printed."""
    return "\n".join(part(results) for part in PARTS.values())
