"""The measurements as Markdown: the tables that are printed, and written into documents."""

from __future__ import annotations

import statistics
from typing import Any

from measured import Parts, markdown

Data = dict[str, Any]


def millions(count: int) -> str:
    """A number of parameters in words."""
    return f"{count / 1e6:.1f} million"


def milliseconds(seconds: float) -> str:
    """Three digits, or as many as there are before the point."""
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"


def largest_table(data: Data, what: str) -> Data:
    """The table with all rows of `updates` or `averaging`."""
    return max((table for table in data["tables"] if table["what"] == what), key=lambda table: len(table["rows"]))


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def find(rows: list[Data], name: str) -> Data | None:
    """The row of a name, where there is one."""
    return next((row for row in rows if row["name"] == name), None)


# ---- The tables ----


def machine(data: Data) -> str:
    """On what, and with what, this was measured."""
    machine, versions = data["machine"], data["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, on {machine['device']}; "
        f"{packages}. Medians of {data['rounds']} rounds.\n"
    )


def costs(data: Data, what: str) -> str:
    """Time and memory of every row at one size."""
    table = largest_table(data, what)
    memory = next((measured["rows"] for measured in data["memory"] if measured["what"] == what), [])
    rows = []
    for row in table["rows"]:
        taken = find(memory, row["name"])
        bytes_ = [f"{taken['held']:.1f}", f"{taken['peak']:.1f}"] if taken else ["", ""]
        rows.append([row["name"], milliseconds(row["seconds"]), f"{row['to_limit']:.2f}", *bytes_])
    title = {"updates": "update", "averaging": "averaging"}[what]
    head = [title, "ms", "to the limit", "bytes held", "bytes at the peak"]
    return f"{millions(table['parameters'])} parameters in {table['tensors']} tensors:\n\n{markdown(head, rows)}"


def growth(data: Data) -> str:
    """Ratios to the limit of the rows that were measured at every size."""
    parts = []
    for what, title in (("updates", "update"), ("averaging", "averaging")):
        tables = [table for table in data["tables"] if table["what"] == what]
        tables.sort(key=lambda table: table["parameters"])
        head = [f"{title}, ms (to the limit)", *(millions(table["parameters"]) for table in tables)]
        rows = []
        for name in [row["name"] for row in tables[0]["rows"]]:
            found = [find(table["rows"], name) for table in tables]
            if all(found):
                cells = [f"{milliseconds(row['seconds'])} ({row['to_limit']:.2f})" for row in found if row]
                rows.append([name, *cells])
        parts.append(markdown(head, rows))
    return "\n".join(parts)


def every(data: Data) -> str:
    """What an average costs per update with longer intervals."""
    measured = data["every"]
    first = measured["rows"][0]["seconds"]
    rows = [
        [str(row["every"]), milliseconds(row["seconds"]), f"{row['seconds'] / first:.3f}"] for row in measured["rows"]
    ]
    text = markdown(["`every`", "ms per update", "of that at 1"], rows)
    return f"{millions(measured['parameters'])} parameters, `hf_radam.WeightAverage`:\n\n{text}"


def trainers(data: Data) -> str:
    """Updates of whole trainings."""
    parts = []
    for measured in data["trainers"]:
        rows = []
        for row in measured["rows"]:
            low, middle, high = quartiles(row["to_stock"])
            span = f"{low:.3f} to {high:.3f}"
            rows.append([row["name"], f"{row['updates_per_second']:.2f}", f"{middle:.3f}", span])
        parts.append(
            f"{millions(measured['parameters'])} parameters, {measured['batch']} x {measured['block']} tokens an "
            f"update, of which the optimizer's step takes stock {100 * measured['optimizer_share']:.1f} %, "
            f"{len(measured['rows'][0]['seconds'])} updates of each:\n\n"
            + markdown(["trainer", "updates/s", "to stock", "middle half of the updates"], rows)
        )
    return "\n".join(parts)


def summary(data: Data) -> str:
    """A short table: our rows and those they stand beside."""
    rows = []
    for what in ("updates", "averaging"):
        measured = largest_table(data, what)
        for name in SUMMARY[what]:
            row = find(measured["rows"], name)
            if row:
                rows.append([row["name"], f"{milliseconds(row['seconds'])} ms", f"{row['to_limit']:.2f} x the limit"])
    for measured in data["trainers"]:
        tokens = measured["batch"] * measured["block"]
        for row in measured["rows"]:
            if row["name"] not in SUMMARY["trainers"]:
                continue
            ratio = f"{quartiles(row['to_stock'])[1]:.3f} x stock"
            rows.append(
                [f"{row['name']} ({tokens} tokens an update)", f"{row['updates_per_second']:.2f} updates/s", ratio]
            )
    return markdown(["", "median", "ratio"], rows)


SUMMARY = {
    "updates": (
        "hf_radam.RAdamScheduleFree, fused",
        "schedulefree.RAdamScheduleFree, foreach",
        "hf_radam.RAdam, fused",
        "torch.optim.RAdam, foreach",
        "torch.optim.AdamW, fused",
    ),
    "averaging": ("hf_radam.WeightAverage", "torch AveragedModel, multi_avg_fn"),
    "trainers": ("Trainer, adamw_torch_fused", "RAdamTrainer, radam + EWA every update"),
}
"""Rows of the short table."""
PARTS: Parts = {
    "machine": machine,
    "updates": lambda data: costs(data, "updates"),
    "averaging": lambda data: costs(data, "averaging"),
    "growth": growth,
    "every": every,
    "trainers": trainers,
    "summary": summary,
}
"""What may stand between marks, by the name in the first of them."""


def whole(data: Data) -> str:
    """Everything, as it is printed."""
    return "\n".join(part(data) for name, part in PARTS.items() if name != "summary")
