"""`hf-radam plot`: plot the logs of runs. Needs matplotlib (the extra `plots`).

Each line of a figure has its name as its `gid`, by which its data can be read back.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_radam.checkpoints.manifest import TRAINER_STATE_NAME, PathLike, recorded_step
from hf_radam.checkpoints.runs import is_checkpoint, list_checkpoints
from hf_radam.cli.main import add_command, folder, printable, table

SUFFIXES = (".png", ".pdf", ".svg")
HALF_LIFE_RATIO = 0.02
EVALUATION_LOSS = re.compile(r"eval_(.+_)?loss")  # between them the name of a data set, or "raw"
MARKERS = "os^DvPX*<>ph"
Points = list[tuple[int, float]]


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "plot",
        run,
        description="Plot the training loss, the evaluation losses (of the average and of the training weights, where "
        "both were evaluated) and the learning rate of runs, also of stock Trainer, from their trainer_state.json. Of "
        "a run it takes the latest one, at its root or in a checkpoint. Needs matplotlib.",
        examples=[
            "hf-radam plot runs/wsd -o wsd.png",
            "hf-radam plot runs/wsd runs/constant -o both.png --log_x",
            "hf-radam plot runs/wsd/checkpoint-18 -o until_18.pdf --half_life 0",
        ],
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, or a checkpoint")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="a .png, .pdf or .svg file")
    parser.add_argument("--log_x", action="store_true", help="use a logarithmic axis for the steps")
    ratio = "half-life of the smoothed training loss as a ratio of the steps so far (0.02); 0 does not smooth"
    parser.add_argument("--half_life", type=float, default=HALF_LIFE_RATIO, metavar="RATIO", help=ratio)


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """Return the output and the exit code; a run without a loss in its log is a `ValueError`."""
    check_drawing(arguments.output)
    logs = [read_training_log(folder(path)) for path in arguments.runs]
    figure = runs_figure(logs, half_life_ratio=arguments.half_life, logarithmic=arguments.log_x)
    save_figure(figure, arguments.output)
    kinds = list(dict.fromkeys(kind for log in logs for kind in log.evaluations))
    rows = [["run", "step", "training loss", *kinds, "from"]]
    for log in logs:
        series = [log.loss, *(log.evaluations.get(kind) for kind in kinds)]
        last = [f"{points[-1][1]:.4f}" if points else "-" for points in series]
        rows.append([log.path, str(log.step), *last, str(log.source)])
    lines = table(rows, right=range(1, len(rows[0]) - 1))
    return printable("\n".join([*lines, "", f"drawn in {arguments.output}"]) + "\n"), 0


@dataclass(frozen=True)
class TrainingLog:
    """Values of a run's log with their steps, the `trainer_state.json` that they are from, and its step."""

    path: str
    source: Path
    step: int
    loss: Points
    evaluations: dict[str, Points]
    learning_rate: Points


def read_training_log(path: PathLike) -> TrainingLog:
    """Read the log of a checkpoint, or the latest log of a run: at its root, or in its newest readable checkpoint."""
    root = Path(path)
    folders = [root] if is_checkpoint(root) else [root, *(ref.path for ref in list_checkpoints(root))]
    steps = {one: step for one in folders if (step := recorded_step(one)) is not None}
    if not steps:
        raise ValueError(f"{path} has no readable {TRAINER_STATE_NAME}. Give a run or a checkpoint of a Trainer.")
    source = max(steps, key=steps.__getitem__) / TRAINER_STATE_NAME
    try:
        history = json.loads(source.read_text(encoding="utf-8"))["log_history"]
        keys = dict.fromkeys(key for entry in history for key in entry)
        values = {
            key: [(int(entry["step"]), float(entry[key])) for entry in history if key in entry]
            for key in keys
            if key in ("loss", "learning_rate") or EVALUATION_LOSS.fullmatch(key)
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{source} is not the log of a Trainer: {error!r}.") from error
    loss, rate = values.pop("loss", []), values.pop("learning_rate", [])
    evaluations = dict(sorted(values.items(), key=lambda item: (item[0] != "eval_loss", item[0] != "eval_raw_loss")))
    if not loss and not evaluations:
        raise ValueError(f"{source} has no loss in it. Train further, or set logging_steps or eval_steps.")
    return TrainingLog(str(path), source, steps[source.parent], loss, evaluations, rate)


def smoothed(points: Points, *, half_life_ratio: float) -> Points:
    """Return the mean of each value and those before it, with weights that halve over a ratio of the steps so far.

    s_i = S_i / W_i with S_i = d_i S_(i-1) + v_i and W_i = d_i W_(i-1) + 1, where t_i is the step of value v_i and
    d_i = 0.5^((t_i - t_(i-1)) / (half_life_ratio t_i)). Values that are not finite are left out.
    """
    total, weight, before = 0.0, 0.0, 0
    means = []
    for step, value in points:
        fade = 0.5 ** (abs(step - before) / (half_life_ratio * max(step, 1)))
        total, weight, before = fade * total, fade * weight, step
        if math.isfinite(value):
            total, weight = total + value, weight + 1.0
        means.append((step, total / weight if weight else math.nan))
    return means


def check_drawing(file: PathLike) -> None:
    """Raise `ValueError` unless the name of a file ends in one of `SUFFIXES`, and matplotlib is installed."""
    if Path(file).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{file} must end in {' or '.join(SUFFIXES)}.")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("Drawing needs matplotlib. Install it: pip install 'hf_radam[plots]'") from None


def save_figure(figure: Any, file: PathLike) -> None:
    """Write a complete figure to a file; the suffix selects the format."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(file).suffix[1:].lower())
    Path(file).write_bytes(drawn.getvalue())


def runs_figure(
    logs: Sequence[TrainingLog], *, half_life_ratio: float = HALF_LIFE_RATIO, logarithmic: bool = False
) -> Any:
    """Return a figure with a panel each for training loss, evaluation losses and learning rate, where logged.

    `half_life_ratio` is that of `smoothed`, 0 does not smooth; `logarithmic` is the axis of the steps.
    """
    if not 0 <= half_life_ratio <= 1:
        raise ValueError(f"half_life={half_life_ratio} is not a ratio of the steps. Give a number from 0 to 1.")
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind for log in logs for kind in log.evaluations))
    found = {
        "training loss": any(log.loss for log in logs),
        "evaluation loss": bool(kinds),
        "learning rate": any(log.learning_rate for log in logs),
    }
    panels = [label for label, present in found.items() if present]
    figure = Figure(figsize=(9.0, 1.0 + 3.0 * len(panels)), dpi=150, layout="constrained")
    axes = dict(zip(panels, figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], strict=True))
    for index, log in enumerate(logs):
        color, name = f"C{index % 10}", log.path
        if log.loss and half_life_ratio:
            _line(axes["training loss"], log.loss, f"{name}: loss", label=None, alpha=0.3, color=color)
            mean = smoothed(log.loss, half_life_ratio=half_life_ratio)
            _line(axes["training loss"], mean, f"{name}: smoothed loss", label=name, color=color)
        elif log.loss:
            _line(axes["training loss"], log.loss, f"{name}: loss", label=name, color=color)
        for kind, points in log.evaluations.items():
            style = {"linestyle": "--" if kind.endswith("_raw_loss") else "-", "markersize": 4, "color": color}
            style["marker"] = MARKERS[kinds.index(kind) % len(MARKERS)]
            label = f"{name}: {kind}" if len(kinds) > 1 else name
            _line(axes["evaluation loss"], points, f"{name}: {kind}", label=label, **style)
        if log.learning_rate:
            _line(axes["learning rate"], log.learning_rate, f"{name}: learning_rate", label=name, color=color)
    for label, panel in axes.items():
        panel.set(ylabel=label, xscale="log" if logarithmic else "linear")
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    panel.set_xlabel("step")
    return figure


def _line(axes: Any, points: Points, gid: str, *, label: str | None, **options: Any) -> None:
    label = label and label.replace("$", r"\$")  # matplotlib would typeset a formula
    axes.plot([step for step, _ in points], [value for _, value in points], gid=gid, label=label, **options)
