"""The figures of a comparison: loss against updates, learning rates, loss against learning rate, updates to serve."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .results import COSINE, EWA, FREE, RAW, WSD, WSD_S, Results

COLOURS = {
    COSINE: "#555555",
    RAW: "#e8a87c",
    EWA: "#c0392b",
    WSD: "#1b6ca8",
    WSD_S: "#2a9d5c",
    FREE: "#8e5bb5",
}
SKIPPED = 0.1
"""Ratio of the longest run before which losses are left out: they would hide the differences at the end."""


def draw(results: Results, folder: Path) -> list[Path]:
    """Write all figures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _save(figure(results), folder / f"{name}.png")
        for name, figure in (
            ("losses", losses),
            ("learning_rates", learning_rates),
            ("tuning", tuning),
            ("updates_to_serve", updates_to_serve),
        )
    ]


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels)


def _points(results: Results, curve: dict[str, Any]) -> dict[int, float]:
    """Loss by update of a training, after that of its trunk."""
    found: dict[int, float] = {}
    for name in filter(None, (curve["trunk"], curve["training"])):
        training = results["trained"][name]
        values = training["raw"] if curve["raw"] else training["evaluated"]
        begins = results["trained"][curve["training"]]["begins"]
        found |= {int(step): loss for step, loss in values.items() if name == curve["training"] or int(step) <= begins}
    return dict(sorted(found.items()))


def losses(results: Results) -> Any:
    """Validation loss of the first seed against updates; a dot at every horizon, with the range of the seeds."""
    figure, panel = _figure(10, 6)
    first = SKIPPED * results["settings"]["updates"]
    for arm in results["arms"]:
        colour = COLOURS[arm["name"]]
        drawn = set()
        for curve in arm["curves"]:
            if curve["training"] in drawn:
                continue
            drawn.add(curve["training"])
            points = {step: loss for step, loss in _points(results, curve).items() if step >= first}
            panel.plot(points.keys(), points.values(), color=colour, linewidth=1.2, alpha=0.75)
        means = arm["mean"]
        ends = [(min(values), max(values)) for values in arm["losses"]]
        panel.errorbar(
            results["horizons"],
            means,
            yerr=[
                [m - low for m, (low, _) in zip(means, ends, strict=True)],
                [high - m for m, (_, high) in zip(means, ends, strict=True)],
            ],
            color=colour,
            fmt="o",
            markersize=6,
            capsize=3,
            label=arm["name"],
        )
    for horizon in results["horizons"]:
        panel.axvline(horizon, color="#cccccc", linewidth=0.8, zorder=0)
    panel.set_xlabel("updates")
    panel.set_ylabel("validation loss (nats per token)")
    panel.set_title("Loss against updates: lines of one seed, dots the mean of all at each horizon, bars their range")
    panel.grid(alpha=0.3)
    panel.legend()
    return figure


def learning_rates(results: Results) -> Any:
    """The learning rate of every training that leads to a horizon, as it was recorded."""
    figure, panels = _figure(13, 6, 1)
    panel = panels
    for arm in results["arms"]:
        if arm["name"] == EWA:
            continue  # the run of the raw weights, at a rate of its own
        label: str | None = arm["name"]
        for curve in arm["curves"]:
            points: dict[int, float] = {}
            for name in filter(None, (curve["trunk"], curve["training"])):
                begins = results["trained"][curve["training"]]["begins"]
                rates = results["trained"][name]["rate"]
                points |= {int(s): r for s, r in rates.items() if name == curve["training"] or int(s) <= begins}
            points = dict(sorted(points.items()))
            panel.plot(points.keys(), points.values(), color=COLOURS[arm["name"]], linewidth=1.4, label=label)
            label = None
    panel.set_xlabel("updates")
    panel.set_ylabel("learning rate")
    panel.set_yscale("log")
    panel.set_title("Learning rates at the rates that were chosen, recorded at every evaluation")
    panel.grid(alpha=0.3)
    panel.legend()
    return figure


def tuning(results: Results) -> Any:
    """Loss against learning rate, of the first seed, for every grid."""
    figure, panel = _figure(10, 6)
    for arm in results["arms"]:
        for number, grid in enumerate(arm["grids"]):
            points = sorted(zip(grid["rates"], grid["losses"], strict=True))
            style = (":", "--", "-")[number - len(arm["grids"])]
            label = arm["name"] + (f", {grid['horizon']} updates" if len(arm["grids"]) > 1 else "")
            panel.plot(*zip(*points, strict=True), style, marker="o", color=COLOURS[arm["name"]], label=label)
    panel.set_xscale("log", base=2)
    rates = sorted({rate for arm in results["arms"] for grid in arm["grids"] for rate in grid["rates"]})
    panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
    panel.set_xlabel("learning rate")
    panel.set_ylabel("validation loss (nats per token)")
    panel.set_title("Loss against learning rate, first seed")
    panel.grid(alpha=0.3)
    panel.legend()
    return figure


def updates_to_serve(results: Results) -> Any:
    """Updates that each arm makes to have a model at all horizons, and the mean loss at the last one."""
    figure, panel = _figure(9, 4.5)
    names = [arm["name"] for arm in results["arms"]]
    counts = [arm["updates_to_serve"] for arm in results["arms"]]
    bars = panel.barh(names, counts, color=[COLOURS[name] for name in names])
    texts = [
        f"{count} updates, loss {statistics.fmean(arm['losses'][-1]):.3f} at the last"
        for count, arm in zip(counts, results["arms"], strict=True)
    ]
    panel.bar_label(bars, texts, padding=4, fontsize=9)
    panel.set_xlim(0, 1.45 * max(counts))
    panel.invert_yaxis()
    panel.set_xlabel(f"updates for models at {', '.join(map(str, results['horizons']))} updates, rates being known")
    panel.set_title("What it takes to have a model at every horizon")
    return figure
