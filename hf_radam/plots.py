"""Figures of a schedule, and of what runs have logged. Needs matplotlib (the extra `plots`).

Each line carries its name as its `gid`, so that a figure can be asked for its numbers.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hf_radam.plot_parts import (
    RAW_STYLE,
    after_the_start,
    fitted_legend,
    loss_styles,
    plain,
    usual_limits,
    words_outside,
)
from hf_radam.schedules import DECAY, STABLE, WARM_UP
from hf_radam.training_logs import TrainingLog, smoothed

SUFFIXES = (".png", ".pdf", ".svg")
DOTS_PER_INCH = 150
HALF_LIFE_RATIO = 0.02
"""Half-life of the smoothed training loss, as a ratio of the updates so far."""
PHASE_COLOURS = {WARM_UP: "#f4a582", STABLE: "#d9d9d9", DECAY: "#92c5de"}
TITLE_WIDTH = 100  # characters
WIDTH = 9.0  # inches


def save_figure(figure: Figure, file: str | os.PathLike[str]) -> None:
    """Write a figure; the suffix of the file says in which format, one of `SUFFIXES`.

    Raises:
        ValueError: for another suffix.
        OSError: if the file cannot be written.
    """
    check_suffix(file)
    # The factor above an axis is made in the drawing, and the layout has to make room for it: so it is drawn twice.
    figure.draw_without_rendering()
    path = Path(file)
    aside = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        figure.savefig(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_suffix(file: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES) -> None:
    """Raise `ValueError` for a file that cannot be written to by its name."""
    if Path(file).suffix.lower() not in suffixes:
        raise ValueError(f"{file} must end in {' or '.join(suffixes)}.")


def schedule_figure(preview: Any) -> Figure:
    """Draw the learning rate of every step over its phases, with RAdam's rectification where there is one.

    Args:
        preview: the `hf_radam.cli.schedule.Preview` of a run.
    """
    figure = Figure(figsize=(9, 4), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="learning rate", title=_title(preview))
    axes.title.set_fontsize("medium")
    steps = range(1, len(preview.rates) + 1)
    for phase in preview.phases:
        axes.axvspan(phase.start + 0.5, phase.end + 0.5, color=PHASE_COLOURS[phase.name], alpha=0.45, linewidth=0)
    (line,) = axes.plot(steps, preview.rates, color="black", label="learning rate", gid="learning rate")
    handles: list[Any] = [line]
    if preview.factors is not None:
        effective = [
            math.nan if factor is None else rate * factor
            for rate, factor in zip(preview.rates, preview.factors, strict=True)
        ]
        label = "times RAdam's rectification"
        handles += axes.plot(steps, effective, color="#b2182b", linestyle="--", label=label, gid="rectified")
    if preview.pinned:
        ends = [*preview.pinned], [preview.rates[step - 1] for step in preview.pinned]
        label = f"pinned in {'/ and '.join(sorted({path.split('/')[0] for path in preview.pinned.values()}))}/"
        handles += axes.plot(
            *ends, linestyle="none", marker="v", color="#2166ac", markersize=9, label=label, gid="pinned", clip_on=False
        )
    names = {phase.name for phase in preview.phases}
    handles += [Patch(color=colour, alpha=0.45, label=name) for name, colour in PHASE_COLOURS.items() if name in names]
    axes.set_xlim(0.5, len(preview.rates) + 0.5)
    _whole_numbers(axes)
    axes.set_ylim(0, 1.08 * max(preview.rates) or 1)
    _scientific(axes)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _title(preview: Any) -> str:
    lines = textwrap.wrap(preview.summary, TITLE_WIDTH)
    return "\n".join(lines) if len(lines) <= 3 else preview.summary.split(": ")[0]  # a dozen budgets fill the figure


def runs_figure(
    logs: Sequence[TrainingLog], *, half_life_ratio: float = HALF_LIFE_RATIO, logarithmic: bool = False
) -> Figure:
    """Training loss, losses of evaluations and learning rate of runs, a panel for each of them that was logged.

    Args:
        logs: what each run has logged.
        half_life_ratio: half-life of the smoothed training loss over the updates so far; 0 draws the logged alone.
        logarithmic: whether the updates stand on a logarithmic axis.

    Raises:
        ValueError: if `half_life_ratio` is not in [0, 1], or all was logged at update 0 and the axis is logarithmic.
    """
    if not 0 <= half_life_ratio <= 1:
        raise ValueError(
            f"the half-life of the smoothed loss is a ratio of the updates, 0 to 1, not {half_life_ratio}."
        )
    recorded = logs
    if logarithmic:
        logs = [after_the_start(log) for log in logs]
    drawn = [
        (height, draw)
        for height, draw, logged in (
            (3.0, _training, any(log.loss for log in logs)),
            (3.0, _evaluations, any(any(log.evaluations.values()) for log in logs)),
            (1.8, _learning_rates, any(log.learning_rate for log in logs)),
        )
        if logged
    ]
    if not drawn:
        raise ValueError("all was logged at update 0, which a logarithmic axis does not have: draw it without --log_x.")
    heights = [height for height, _ in drawn]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(len(drawn), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    names, colours = labels([log.path for log in logs]), _colours(len(logs))
    for axes, (_, draw) in zip(panels, drawn, strict=True):
        draw(axes, logs, names, colours, half_life_ratio)
        axes.grid(alpha=0.3)
    if logarithmic:
        panels[-1].set_xscale("log")
    else:
        _whole_numbers(panels[-1])
    left_out = "" if list(logs) == list(recorded) else ", without update 0"
    panels[-1].set_xlabel(f"update (logarithmic{left_out})" if logarithmic else "update")
    figure.align_ylabels(panels)
    handles = [Line2D([], [], color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    legend = fitted_legend(figure.legend, handles, width=0.98 * figure.bbox.width, loc="outside upper center")
    own = [legend, *(axes.get_legend() for axes in panels if axes.get_legend() is not None)]
    figure.set_figheight(figure.get_figheight() + sum(one.get_window_extent().height for one in own) / figure.dpi)
    return figure


def labels(paths: Sequence[str]) -> list[str]:
    """The names of folders: of each path as many of the last parts as tell all of them apart, of a checkpoint two."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        counts = [count + bool(part[-1].startswith("checkpoint-")) for part in parts]
        names = ["/".join(part[-length:]) for part, length in zip(parts, counts, strict=True)]
        if len(set(names)) == len(names):
            return names
    return list(paths)  # one folder named twice


def _colours(count: int) -> list[Any]:
    if count <= 10:
        return [colormaps["tab10"](index) for index in range(count)]
    return [colormaps["viridis"](index / (count - 1)) for index in range(count)]


def _training(axes: Any, logs: Sequence[TrainingLog], names: list[str], colours: list[Any], ratio: float) -> None:
    for log, name, colour in zip(logs, names, colours, strict=True):
        faint = 0.3 if ratio else 1.0
        axes.plot(log.loss.updates, log.loss.values, color=colour, alpha=faint, linewidth=1, gid=f"{name}: loss")
        if ratio and log.loss:
            mean = smoothed(log.loss, half_life_ratio=ratio)
            axes.plot(mean.updates, mean.values, color=colour, gid=f"{name}: smoothed loss")
    axes.set_ylabel("training loss")
    logged = [log.loss for log in logs]
    limits, lines = usual_limits(logged), []
    if limits is not None:
        margin = 0.05 * (limits[1] - limits[0] or abs(limits[1]) or 1.0)
        axes.set_ylim(limits[0] - margin, limits[1] + margin)
        lines.append(words_outside(logged, limits))
    if ratio:
        lines.append(f"faint: as logged; line: mean of the past, half-life {100 * ratio:g} % of the updates so far")
    axes.set_title("\n".join(lines), fontsize="small", loc="right")


def _evaluations(axes: Any, logs: Sequence[TrainingLog], names: list[str], colours: list[Any], ratio: float) -> None:
    kinds = list(dict.fromkeys(kind for log in logs for kind, series in log.evaluations.items() if series))
    kinds.sort(key=lambda kind: (kind != "eval_loss", kind != "eval_raw_loss"))
    styles = loss_styles(kinds)
    for log, name, colour in zip(logs, names, colours, strict=True):
        for kind, series in log.evaluations.items():
            if series:
                axes.plot(series.updates, series.values, color=colour, gid=f"{name}: {kind}", **styles[kind])
    axes.set_ylabel("evaluation loss" if len(kinds) > 1 else plain(kinds[0]))
    if len(kinds) > 1:
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
        options = place | {"fontsize": "small", "handlelength": 3}
        fitted_legend(axes.legend, _kinds(kinds, styles), width=0.88 * axes.figure.bbox.width, **options)


def _kinds(kinds: Sequence[str], styles: Mapping[str, Any]) -> list[Line2D]:
    """What the legend says of losses: each of them if they are of one data set, else each data set and both lines."""
    if len({styles[kind]["marker"] for kind in kinds}) == 1:
        return [Line2D([], [], color="black", label=kind, **styles[kind]) for kind in kinds]
    raw = any(styles[kind]["linestyle"] == RAW_STYLE for kind in kinds)
    handles = [
        Line2D([], [], color="black", label=kind, **styles[kind] | ({"linestyle": "none"} if raw else {}))
        for kind in kinds
        if styles[kind]["linestyle"] != RAW_STYLE
    ]
    if raw:
        handles.append(Line2D([], [], color="black", label="evaluation weights"))
        handles.append(Line2D([], [], color="black", label="training weights (raw)", linestyle=RAW_STYLE))
    return handles


def _learning_rates(axes: Any, logs: Sequence[TrainingLog], names: list[str], colours: list[Any], ratio: float) -> None:
    for log, name, colour in zip(logs, names, colours, strict=True):
        rate = log.learning_rate
        axes.plot(rate.updates, rate.values, color=colour, gid=f"{name}: learning_rate")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    _scientific(axes)


def _whole_numbers(axes: Any) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _scientific(axes: Any) -> None:
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
