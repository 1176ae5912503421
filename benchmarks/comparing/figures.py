"""The figures of a comparison: loss against updates, learning rates, loss against learning rate, updates to serve."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .results import COSINE, EWA, FREE, RAW, WSD, WSD_S, Results
from .settings import EVALUATIONS

COLOURS = {
    COSINE: "#555555",
    RAW: "#e8a87c",
    EWA: "#c0392b",
    WSD: "#1b6ca8",
    WSD_S: "#2a9d5c",
    FREE: "#8e5bb5",
}
STYLES = {COSINE: "-", RAW: "-", EWA: "-", WSD: "--", WSD_S: "-.", FREE: "-"}
"""Lines that lie on one another can be told apart."""
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


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _joined(results: Results, curve: dict[str, Any], what: str) -> dict[int, float]:
    """Numbers by update of a training, after those of its trunk."""
    found: dict[int, float] = {}
    for name in filter(None, (curve["trunk"], curve["training"])):
        begins = results["trained"][curve["training"]]["begins"]
        values = results["trained"][name][what]
        found |= {
            int(step): value for step, value in values.items() if name == curve["training"] or int(step) <= begins
        }
    return dict(sorted(found.items()))


def _curves(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings that lead to an arm's losses, each once."""
    return [*{curve["training"]: curve for curve in arm["curves"]}.values()]


def losses(results: Results) -> Any:
    """Validation loss of the first seed against updates; and every seed at every horizon, against the cosine's mean."""
    figure, (curves, ends) = _figure(14, 6, columns=2, width_ratios=(3, 2))
    first = SKIPPED * results["settings"]["updates"]
    (cosine,) = [arm for arm in results["arms"] if arm["name"] == COSINE]
    for place, arm in enumerate(results["arms"]):
        colour, label = COLOURS[arm["name"]], arm["name"]
        for curve in _curves(arm):
            points = _joined(results, curve, "raw" if curve["raw"] else "evaluated")
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
    curves.set_xlabel(f"updates (evaluated every {results['horizons'][-1] // EVALUATIONS})")
    curves.set_ylabel("validation loss (nats per token)")
    curves.set_title("One seed of each method; the horizons are marked")
    curves.grid(alpha=0.3)
    curves.legend()
    ends.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    ends.set_xticks(range(len(results["horizons"])), [f"{horizon} updates" for horizon in results["horizons"]])
    ends.set_ylabel("loss, in % above the mean of AdamW with a cosine")
    ends.set_title("All seeds at the horizons; a line is their mean")
    ends.grid(axis="y", alpha=0.3)
    return figure


def learning_rates(results: Results) -> Any:
    """The learning rates of the trainings that lead to the horizons, as they were recorded; a panel for each method."""
    figure, panels = _figure(13, 6.5, 2, 3, sharex=True, sharey=True)
    figure.suptitle("As set and recorded; what RAdam's own factor takes off in the first updates is not in it")
    for panel, arm in zip(panels.flat, results["arms"], strict=True):
        for curve in _curves(arm):
            points = _joined(results, curve, "rate")
            panel.plot(points.keys(), points.values(), color=COLOURS[arm["name"]], linewidth=1.3)
        panel.set_title(arm["name"])
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("updates")
    for panel in panels[:, 0]:
        panel.set_ylabel("learning rate")
    return figure


def _is_chosen(results: Results, arm: dict[str, Any], grid: dict[str, Any]) -> bool:
    """Whether a grid has the warm-up that was chosen for its horizon."""
    return grid["warmup"] == arm["warmups"][results["horizons"].index(grid["horizon"])]


def tuning(results: Results) -> Any:
    """Loss against learning rate, of the first seed, with the warm-up that was chosen."""
    figure, panel = _figure(10, 6)
    for arm in results["arms"]:
        shown = [grid for grid in arm["grids"] if _is_chosen(results, arm, grid)]
        for number, grid in enumerate(shown):
            points = sorted(zip(grid["rates"], grid["losses"], strict=True))
            style = (":", "--", "-")[number - len(shown)]
            label = f"{arm['name']}, {grid['horizon']} updates"
            if len(shown) > 1:
                label += f", warm-up {grid['warmup']}"
            panel.plot(*zip(*points, strict=True), style, marker="o", color=COLOURS[arm["name"]], label=label)
    panel.set_xscale("log", base=2)
    rates = sorted({rate for arm in results["arms"] for grid in arm["grids"] for rate in grid["rates"]})
    panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
    panel.set_xlabel("learning rate")
    panel.set_ylabel("validation loss (nats per token)")
    panel.set_title("Loss against learning rate, first seed; warm-up as chosen")
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
        f"{count} updates; loss {statistics.fmean(arm['losses'][-1]):.3f} at the end"
        for count, arm in zip(counts, results["arms"], strict=True)
    ]
    panel.bar_label(bars, texts, padding=4, fontsize=9)
    panel.set_xlim(0, 1.6 * max(counts))
    panel.invert_yaxis()
    panel.set_xlabel(f"updates for models at {', '.join(map(str, results['horizons']))} updates, once it is tuned")
    panel.set_title("What it takes to have a model at every horizon")
    return figure
