"""What figures of runs are made of: legends of which nothing is cut off, marks that tell losses apart, limits."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from hf_radam.training_logs import Series, TrainingLog

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
RAW_STYLE = (0, (4, 2))
COLUMNS = 4  # of a legend, at most
LABEL_WIDTH = 80  # characters of a line
QUANTILES = (0.05, 0.95)
FAR = 10.0
"""A value lies outside a panel if it is further than so many times the distance of the quantiles from both."""
FEWEST = 10
"""Values without which no quantile is taken."""


def fitted_legend(place: Callable[..., Any], handles: Sequence[Any], *, width: float, **options: Any) -> Any:
    """A legend in as many columns as there is room for; a label that is too long for one stands in several lines.

    Args:
        place: makes the legend, `figure.legend` or `axes.legend`.
        handles: its entries, with their labels.
        width: how wide it may be, in pixels.
        **options: for `place`.
    """
    for handle in handles:
        handle.set_label(plain("\n".join(textwrap.wrap(handle.get_label(), LABEL_WIDTH))))
    for columns in range(min(len(handles), COLUMNS), 0, -1):
        legend = place(handles=handles, ncols=columns, frameon=False, **options)
        if columns == 1 or legend.get_window_extent().width <= width:
            return legend
        legend.remove()


def plain(text: str) -> str:
    """A name as it is: matplotlib takes what stands between dollars for a formula."""
    return text.replace("$", r"\$")


def loss_styles(kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The marker and line of each loss: a data set has its marker, the training weights where others count are dashed.

    Args:
        kinds: names of losses. `eval_raw_loss` is that of the training weights where there is an `eval_loss`, and
            `eval_a_raw_loss` where there is an `eval_a_loss`; without it `a_raw` is the name of a data set.
    """
    without = {kind: re.sub(r"(^|_)raw_loss$", r"\1loss", kind) for kind in kinds}
    twins = {kind: twin if twin in kinds else kind for kind, twin in without.items()}
    sets = list(dict.fromkeys(twins.values()))
    more = [f"${number}$" for number in range(len(MARKERS) + 1, len(sets) + 1)]  # no shape left: its number
    markers = dict(zip(sets, [*MARKERS, *more], strict=False))
    return {
        kind: {
            "linestyle": "-" if twin == kind else RAW_STYLE,
            "marker": markers[twin],
            "markersize": 7 if markers[twin].startswith("$") else 4,
        }
        for kind, twin in twins.items()
    }


def usual_limits(series: Sequence[Series]) -> tuple[float, float] | None:
    """Between which values a panel is drawn when single ones would flatten all others; None if none would.

    With q and Q the 5 % and 95 % quantiles of all values, those outside [q - 10 (Q - q), Q + 10 (Q - q)] are left
    outside. The first value of each line is not: there a loss is high.

    Args:
        series: what is drawn.

    Returns:
        The lowest and the highest value that lie inside.
    """
    finite = [[value for value in one.values if math.isfinite(value)] for one in series]
    values = sorted(value for line in finite for value in line)
    if len(values) < FEWEST:
        return None
    low, high = (values[int(quantile * (len(values) - 1))] for quantile in QUANTILES)
    margin = FAR * (high - low or 0.1 * abs(high) or 1.0)
    firsts = [line[0] for line in finite if line]
    inside = [value for value in values if low - margin <= value <= high + margin] + firsts
    limits = min(inside), max(inside)
    return None if limits == (values[0], values[-1]) else limits


def words_outside(series: Sequence[Series], limits: tuple[float, float]) -> str:
    """How many values lie outside of limits, and how far away."""
    values = [value for one in series for value in one.values if math.isfinite(value)]
    above, below = ([v for v in values if v > limits[1]], [v for v in values if v < limits[0]])
    ends = [f"{len(above)} above, up to {max(above):.4g}"] if above else []
    ends += [f"{len(below)} below, down to {min(below):.4g}"] if below else []
    return f"outside the panel, of {len(values)} logged values: {'; '.join(ends)}; means that hold them leave it too"


def after_the_start(log: TrainingLog) -> TrainingLog:
    """What a run has logged after its first update: a logarithmic axis has no place for update 0."""

    def later(series: Series) -> Series:
        kept = [(update, value) for update, value in zip(series.updates, series.values, strict=True) if update > 0]
        return Series([update for update, _ in kept], [value for _, value in kept])

    return TrainingLog(
        path=log.path,
        source=log.source,
        update=log.update,
        loss=later(log.loss),
        evaluations={kind: later(series) for kind, series in log.evaluations.items()},
        learning_rate=later(log.learning_rate),
    )
