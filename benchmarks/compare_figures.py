"""The figures of a comparison: loss by step, learning rates, loss by learning rate, steps to serve."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from compare_plan import COSINE, EVALUATIONS, EWA, FREE, RAW, WSD, WSD_S
from compare_results import Results

COLOURS = {COSINE: "#555555", RAW: "#e8a87c", EWA: "#c0392b", WSD: "#1b6ca8", WSD_S: "#2a9d5c", FREE: "#8e5bb5"}
STYLES = {COSINE: "-", RAW: "-", EWA: "-", WSD: "--", WSD_S: "-.", FREE: "-"}  # some lines lie on one another
SKIPPED = 0.1
"""Ratio of the longest run before which losses would hide the differences at the end."""


def draw(results: Results, folder: Path) -> list[Path]:
    """Write all figures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in (losses, learning_rates, tuning, steps_to_serve):
        paths.append(folder / f"{figure.__name__}.png")
        figure(results).savefig(paths[-1], dpi=110)
    return paths


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _curves(results: Results, arm: dict[str, Any], what: str | None) -> list[dict[int, float]]:
    """Numbers by step of the trainings that lead to an arm's losses, each after its trunk; None: the losses."""
    found = []
    for curve in {curve["training"]: curve for curve in arm["curves"]}.values():
        name = what or ("raw" if curve["raw"] else "evaluated")
        own = results["trained"][curve["training"]]
        before = results["trained"][curve["trunk"]][name] if curve["trunk"] else {}
        points = {int(step): value for step, value in before.items() if int(step) <= own["begins"]}
        found.append(dict(sorted((points | {int(step): value for step, value in own[name].items()}).items())))
    return found


def losses(results: Results) -> Any:
    """Validation loss of the first seed by step; every seed at every horizon, against the cosine's mean."""
    figure, (curves, ends) = _figure(14, 6, columns=2, width_ratios=(3, 2))
    first = SKIPPED * results["horizons"][-1]
    (cosine,) = [arm for arm in results["arms"] if arm["name"] == COSINE]
    for place, arm in enumerate(results["arms"]):
        colour, label = COLOURS[arm["name"]], arm["name"]
        for points in _curves(results, arm, None):
            points = {step: loss for step, loss in points.items() if step >= first}
            curves.plot(points.keys(), points.values(), STYLES[arm["name"]], color=colour, linewidth=1.3, label=label)
            label = None
        for number, (values, mean) in enumerate(zip(arm["losses"], cosine["mean"], strict=True)):
            x = number + 0.12 * (place - (len(results["arms"]) - 1) / 2)
            away = [100 * (value - mean) / mean for value in values]
            ends.plot([x] * len(away), away, "o", color=colour, markersize=4, alpha=0.6)
            ends.plot([x - 0.05, x + 0.05], [statistics.fmean(away)] * 2, color=colour, linewidth=2)
    for horizon in results["horizons"]:
        curves.axvline(horizon, color="#bbbbbb", linewidth=0.8, zorder=0)
    curves.set_xlabel(f"steps (evaluated every {results['horizons'][-1] // EVALUATIONS})")
    curves.set_ylabel("validation loss (nats per token)")
    curves.set_title("One seed of each method; the horizons are marked")
    curves.grid(alpha=0.3)
    curves.legend()
    ends.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    ends.set_xticks(range(len(results["horizons"])), [f"{horizon} steps" for horizon in results["horizons"]])
    ends.set_ylabel("loss, in % above the mean of AdamW with a cosine")
    ends.set_title("All seeds at the horizons; a line is their mean")
    ends.grid(axis="y", alpha=0.3)
    return figure


def learning_rates(results: Results) -> Any:
    """The logged learning rates; a panel for each method."""
    figure, panels = _figure(13, 6.5, 2, 3, sharex=True, sharey=True)
    figure.suptitle("As logged, without the factor of RAdam's own warm-up")
    for panel, arm in zip(panels.flat, results["arms"], strict=True):
        for points in _curves(results, arm, "rate"):
            panel.plot(points.keys(), points.values(), color=COLOURS[arm["name"]], linewidth=1.3)
        panel.set_title(arm["name"])
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("steps")
    for panel in panels[:, 0]:
        panel.set_ylabel("learning rate")
    return figure


def tuning(results: Results) -> Any:
    """Loss by learning rate, of the first seed, with the best warm-up."""
    figure, panel = _figure(10, 6)
    for arm in results["arms"]:
        best = dict(zip(results["horizons"], arm["warmups"], strict=True))
        shown = [grid for grid in arm["grids"] if grid["warmup"] == best[grid["horizon"]]]
        for number, grid in enumerate(shown):
            points = sorted(zip(grid["rates"], grid["losses"], strict=True))
            style = (":", "--", "-")[number - len(shown)]
            warmup = f", warm-up {grid['warmup']}" if len(shown) > 1 else ""
            label = f"{arm['name']}, {grid['horizon']} steps{warmup}"
            panel.plot(*zip(*points, strict=True), style, marker="o", color=COLOURS[arm["name"]], label=label)
    panel.set_xscale("log", base=2)
    rates = sorted({rate for arm in results["arms"] for grid in arm["grids"] for rate in grid["rates"]})
    panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
    panel.set_xlabel("learning rate")
    panel.set_ylabel("validation loss (nats per token)")
    panel.set_title("Loss by learning rate, first seed, best warm-up")
    panel.grid(alpha=0.3)
    panel.legend()
    return figure


def steps_to_serve(results: Results) -> Any:
    """Steps that each arm makes to have a model at all horizons, and the mean loss at the last one."""
    figure, panel = _figure(9, 4.5)
    names = [arm["name"] for arm in results["arms"]]
    counts = [arm["steps_to_serve"] for arm in results["arms"]]
    bars = panel.barh(names, counts, color=[COLOURS[name] for name in names])
    texts = [f"{arm['steps_to_serve']} steps; loss {arm['mean'][-1]:.3f} at the end" for arm in results["arms"]]
    panel.bar_label(bars, texts, padding=4, fontsize=9)
    panel.set_xlim(0, 1.6 * max(counts))
    panel.invert_yaxis()
    panel.set_xlabel(f"steps for models at {', '.join(map(str, results['horizons']))} steps, once tuned")
    panel.set_title("What it takes to have a model at every horizon")
    return figure
