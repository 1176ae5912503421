"""The measurements as one figure of four panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import find, largest_table, quartiles

OURS, OTHERS, LIMIT = "#1b6ca8", "#b8b8b8", "#c0392b"
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
"""A number stands readable on a line."""
LINES = ("#1b6ca8", "#e08e0b", "#2a9d5c", "#8e5bb5", "#777777", "#c0392b")


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the figure; the suffix says in which format."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    updates, averaging = (largest_table(data, what)["rows"][1:] for what in ("updates", "averaging"))
    trainings = sum(len(measured["rows"]) for measured in data["trainers"])
    heights = [max(len(updates), 9), max(len(averaging), trainings, 5)]
    figure = Figure(figsize=(13.5, 2.4 + 0.34 * sum(heights)), layout="constrained")
    parts = figure.subfigures(3, 2, height_ratios=[*heights, 0.7])  # each keeps its own margins
    panels = [[part.subplots() for part in row] for row in parts[:2]]
    size = largest_table(data, "updates")["parameters"] / 1e6
    bars(panels[0][0], updates, f"Updates of {size:.1f} million parameters")
    lines(panels[0][1], data)
    bars(panels[1][0], averaging, f"Averaging of {size:.1f} million parameters")
    trainers(panels[1][1], data["trainers"])
    figure.legend(
        handles=[
            Patch(color=OURS, label="hf_radam"),
            Patch(color=OTHERS, label="others"),
            Line2D([], [], color=LIMIT, linestyle="--", label="limit (its bytes at the bandwidth of lerp_), or stock"),
        ],
        loc="lower center",
        ncols=3,
        fontsize=9,
    )
    machine, torch = data["machine"], data["versions"]["torch"]
    figure.suptitle(
        f"{machine['processor']}, {machine['threads']} threads, {machine['device']}, torch {torch}; "
        f"medians of {data['rounds']} rounds",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def bars(panel: Any, rows: list[dict[str, Any]], title: str) -> None:
    """One bar for each row, its length the ratio to the limit."""
    names, ratios = [row["name"] for row in rows], [row["to_limit"] for row in rows]
    drawn = panel.barh(names, ratios, color=[OURS if name.startswith("hf_radam") else OTHERS for name in names])
    panel.bar_label(drawn, [f"{ratio:.2f}" for ratio in ratios], padding=5, fontsize=8, bbox=BEHIND)
    panel.axvline(1, color=LIMIT, linewidth=1, linestyle="--")
    panel.invert_yaxis()
    panel.set_xlim(0, 1.15 * max(1, *ratios))
    panel.set_xlabel("time, in times the limit (less is better)")
    panel.set_title(title, fontsize=11)
    panel.tick_params(axis="y", labelsize=8)


def lines(panel: Any, data: dict[str, Any]) -> None:
    """Time of an update and of an averaging against the number of parameters."""
    styles = iter(zip(LINES * 2, "osD^vPX<>*" * 2, strict=False))
    for what in ("updates", "averaging"):
        tables = sorted((t for t in data["tables"] if t["what"] == what), key=lambda table: table["parameters"])
        for name in [row["name"] for row in tables[0]["rows"][1:]]:
            points = [(table["parameters"] / 1e6, find(table["rows"], name)) for table in tables]
            if all(row for _, row in points):
                colour, marker = next(styles)
                panel.plot(
                    [size for size, _ in points],
                    [1e3 * row["seconds"] for _, row in points if row],
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linewidth=1.3,
                    linestyle="-" if what == "updates" else ":",
                    label=name,
                )
    panel.set_xscale("log")
    panel.set_yscale("log")
    sizes = sorted({table["parameters"] / 1e6 for table in data["tables"]})
    panel.set_xticks(sizes, [f"{size:.3g}" for size in sizes], minor=False)
    panel.set_xticks([], minor=True)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("million parameters")
    panel.set_ylabel("milliseconds")
    panel.set_title("Growth with size (dotted: averaging)", fontsize=11)
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def trainers(panel: Any, trainings: list[dict[str, Any]]) -> None:
    """Updates per second of each trainer as a ratio to stock's: the median, and the middle half of the updates."""
    names, ends = [], [1.0]
    for measured in trainings:
        for row in measured["rows"]:
            low, middle, high = quartiles(row["to_stock"])
            colour = OURS if row["name"].startswith("RAdam") else OTHERS
            position = len(names)
            panel.plot([low, high], [position, position], color=colour, linewidth=3, alpha=0.5)
            panel.plot(middle, position, "o", color=colour)
            panel.annotate(
                f"{middle:.3f}",
                (middle, position),
                (0, 6),
                textcoords="offset points",
                ha="center",
                size=8,
                bbox=BEHIND,
            )
            names.append(f"{row['name']}, {measured['batch']} x {measured['block']}")
            ends += [low, high]
    panel.axvline(1, color=LIMIT, linewidth=1, linestyle="--")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.5, -0.8)
    margin = max(0.05, 0.1 * (max(ends) - min(ends)))
    panel.set_xlim(min(ends) - margin, max(ends) + margin)
    panel.grid(alpha=0.3, axis="x")
    panel.set_xlabel("updates/s to stock's; middle half of updates")
    panel.set_title("Trainings (more is better)", fontsize=11)
