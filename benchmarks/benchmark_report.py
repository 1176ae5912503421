"""The benchmark's Markdown tables and its figure."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tables import Parts, markdown

Data = dict[str, Any]
TITLES = {"steps": "step", "averaging": "averaging"}
SUMMARY = {
    "steps": "hf_radam.RAdamScheduleFree, fused|schedulefree.RAdamScheduleFree, foreach|hf_radam.RAdam, fused|"
    "torch.optim.RAdam, foreach|torch.optim.AdamW, fused",
    "averaging": "hf_radam.WeightAverage|torch AveragedModel, multi_avg_fn",
    "trainers": "Trainer, adamw_torch_fused|RAdamTrainer, radam + EWA every step",
}
"""Rows of the short table."""


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} million"


def milliseconds(seconds: float) -> str:
    """Write three digits, or as many as there are before the point."""
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"


def largest_table(data: Data, what: str) -> Data:
    """The table with all rows of `steps` or `averaging`."""
    return max((table for table in data["tables"] if table["what"] == what), key=lambda table: len(table["rows"]))


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def _find(rows: list[Data], name: str) -> Data | None:
    return next((row for row in rows if row["name"] == name), None)


def _growing(data: Data, what: str) -> dict[str, list[tuple[int, Data]]]:
    """By name of the rows measured at every size: the numbers of parameters and the rows."""
    tables = sorted((t for t in data["tables"] if t["what"] == what), key=lambda table: table["parameters"])
    found = {
        row["name"]: [(t["parameters"], _find(t["rows"], row["name"])) for t in tables] for row in tables[0]["rows"]
    }
    return {
        name: [(size, row) for size, row in pairs if row] for name, pairs in found.items() if all(r for _, r in pairs)
    }


# ---- Tables ----


def machine(data: Data) -> str:
    """Write what this was measured on, and with."""
    machine, packages = data["machine"], ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, on {machine['device']}; "
        f"{packages}. Medians of {data['rounds']} rounds.\n"
    )


def _costs(data: Data, what: str) -> str:
    table = largest_table(data, what)
    memory = next((measured["rows"] for measured in data["memory"] if measured["what"] == what), [])
    rows = []
    for row in table["rows"]:
        taken = _find(memory, row["name"])
        cells = [f"{taken['held']:.1f}", f"{taken['peak']:.1f}"] if taken else ["", ""]
        rows.append([row["name"], milliseconds(row["seconds"]), f"{row['to_limit']:.2f}", *cells])
    head = [TITLES[what], "ms", "to the limit", "bytes held", "bytes at the peak"]
    return f"{_millions(table['parameters'])} parameters in {table['tensors']} tensors:\n\n{markdown(head, rows)}"


def growth(data: Data) -> str:
    """Write the rows that were measured at every size."""
    parts = []
    for what, title in TITLES.items():
        rows = _growing(data, what)
        sizes = [_millions(size) for size, _ in next(iter(rows.values()))]
        cells = {
            name: [f"{milliseconds(row['seconds'])} ({row['to_limit']:.2f})" for _, row in pairs]
            for name, pairs in rows.items()
        }
        table = markdown([f"{title}, ms (to the limit)", *sizes], [[name, *own] for name, own in cells.items()])
        parts.append(table)
    return "\n".join(parts)


def every(data: Data) -> str:
    """Write what an average costs per step with longer intervals."""
    rows = data["every"]["rows"]
    first = rows[0]["seconds"]
    cells = [[str(r["every"]), milliseconds(r["seconds"]), f"{r['seconds'] / first:.3f}"] for r in rows]
    text = markdown(["`every`", "ms per step", "of that at 1"], cells)
    return f"{_millions(data['every']['parameters'])} parameters, `hf_radam.WeightAverage`:\n\n{text}"


def trainers(data: Data) -> str:
    """Write the steps of whole trainings."""
    parts = []
    for measured in data["trainers"]:
        rows = []
        for row in measured["rows"]:
            low, middle, high = _quartiles(row["to_stock"])
            rows.append([row["name"], f"{row['steps_per_second']:.2f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"])
        parts.append(
            f"{_millions(measured['parameters'])} parameters, {measured['batch']} x {measured['block']} tokens per "
            f"step, of which the optimizer step takes stock {100 * measured['optimizer_share']:.1f} %, "
            f"{len(measured['rows'][0]['seconds'])} steps of each:\n\n"
            + markdown(["trainer", "steps/s", "to stock", "middle half of the steps"], rows)
        )
    return "\n".join(parts)


def summary(data: Data) -> str:
    """Write a short table: hf_radam's rows and those they stand beside."""
    rows = []
    for what in TITLES:
        for row in largest_table(data, what)["rows"]:
            if row["name"] in SUMMARY[what].split("|"):
                rows.append([row["name"], f"{milliseconds(row['seconds'])} ms", f"{row['to_limit']:.2f} x the limit"])
    for measured in data["trainers"]:
        tokens = measured["batch"] * measured["block"]
        for row in measured["rows"]:
            if row["name"] in SUMMARY["trainers"].split("|"):
                ratio, speed = f"{_quartiles(row['to_stock'])[1]:.3f} x stock", f"{row['steps_per_second']:.2f} steps/s"
                rows.append([f"{row['name']} ({tokens} tokens per step)", speed, ratio])
    return markdown(["", "median", "ratio"], rows)


PARTS: Parts = {
    "machine": machine,
    "steps": lambda data: _costs(data, "steps"),
    "averaging": lambda data: _costs(data, "averaging"),
    "growth": growth,
    "every": every,
    "trainers": trainers,
    "summary": summary,
}

# ---- The figure ----

OURS, OTHERS, LIMIT = "#1b6ca8", "#b8b8b8", "#c0392b"
LINES = ("#1b6ca8", "#e08e0b", "#2a9d5c", "#8e5bb5", "#777777", "#c0392b")
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # keeps a number readable on a line


def draw(data: Data, path: Path) -> None:
    """Write a figure of four panels; the suffix says in which format."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = {what: largest_table(data, what)["rows"][1:] for what in TITLES}
    trainings = sum(len(measured["rows"]) for measured in data["trainers"])
    heights = [max(len(rows["steps"]), 9), max(len(rows["averaging"]), trainings, 5)]
    figure = Figure(figsize=(13.5, 2.4 + 0.34 * sum(heights)), layout="constrained")
    parts = figure.subfigures(3, 2, height_ratios=[*heights, 0.7])  # each keeps its own margins
    (steps, growing), (averaging, trained) = [[part.subplots() for part in row] for row in parts[:2]]
    size = _millions(largest_table(data, "steps")["parameters"])
    _bars(steps, rows["steps"], f"Steps of {size} parameters")
    _bars(averaging, rows["averaging"], f"Averaging of {size} parameters")
    _lines(growing, data)
    _trainings(trained, data["trainers"])
    limit = Line2D([], [], color=LIMIT, linestyle="--", label="limit (its bytes at the bandwidth of lerp_), or stock")
    handles = [Patch(color=OURS, label="hf_radam"), Patch(color=OTHERS, label="others"), limit]
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=9)
    machine, torch = data["machine"], data["versions"]["torch"]
    where = f"{machine['processor']}, {machine['threads']} threads, {machine['device']}, torch {torch}"
    figure.suptitle(f"{where}; medians of {data['rounds']} rounds", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _bars(panel: Any, rows: list[Data], title: str) -> None:
    """Draw the ratio of each row to the limit."""
    names, ratios = [row["name"] for row in rows], [row["to_limit"] for row in rows]
    drawn = panel.barh(names, ratios, color=[OURS if name.startswith("hf_radam") else OTHERS for name in names])
    panel.bar_label(drawn, [f"{ratio:.2f}" for ratio in ratios], padding=5, fontsize=8, bbox=BEHIND)
    panel.axvline(1, color=LIMIT, linewidth=1, linestyle="--")
    panel.invert_yaxis()
    panel.set_xlim(0, 1.15 * max(1, *ratios))
    panel.set_xlabel("time, in times the limit (less is better)")
    panel.set_title(title, fontsize=11)
    panel.tick_params(axis="y", labelsize=8)


def _lines(panel: Any, data: Data) -> None:
    """Draw time by number of parameters."""
    styles = iter(zip(LINES * 2, "osD^vPX<>*" * 2, strict=False))
    for what, dash in (("steps", "-"), ("averaging", ":")):
        for name, pairs in [*_growing(data, what).items()][1:]:
            colour, marker = next(styles)
            sizes, times = [size / 1e6 for size, _ in pairs], [1e3 * row["seconds"] for _, row in pairs]
            panel.plot(sizes, times, dash, color=colour, marker=marker, markersize=5, linewidth=1.3, label=name)
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


def _trainings(panel: Any, trainings: list[Data]) -> None:
    """Draw the median and the middle half of each trainer's ratios to stock."""
    names, ends = [], [1.0]
    for measured in trainings:
        for row in measured["rows"]:
            low, middle, high = _quartiles(row["to_stock"])
            colour, at = OURS if row["name"].startswith("RAdam") else OTHERS, len(names)
            panel.plot([low, high], [at, at], color=colour, linewidth=3, alpha=0.5)
            panel.plot(middle, at, "o", color=colour)
            place: dict[str, Any] = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "size": 8}
            panel.annotate(f"{middle:.3f}", (middle, at), **place, bbox=BEHIND)
            names.append(f"{row['name']}, {measured['batch']} x {measured['block']}")
            ends += [low, high]
    panel.axvline(1, color=LIMIT, linewidth=1, linestyle="--")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.5, -0.8)
    margin = max(0.05, 0.1 * (max(ends) - min(ends)))
    panel.set_xlim(min(ends) - margin, max(ends) + margin)
    panel.grid(alpha=0.3, axis="x")
    panel.set_xlabel("steps/s to stock's; middle half of the steps")
    panel.set_title("Trainings (more is better)", fontsize=11)
