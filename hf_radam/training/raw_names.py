"""Which metrics are of the training weights (`ewa_eval_raw`), and the refusal of names that would say two things.

The metrics of an evaluation begin with its prefix, those of the training weights with `{prefix}_raw`. A user's metric
may be called `raw_...` as well: it is then there of both kinds of weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any


def prefixes(eval_dataset: Any) -> list[str]:
    """The prefixes of what `evaluate()` measures: `eval`, or `eval_{name}` for each of several data sets."""
    return [f"eval_{name}" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["eval"]


def raw_twins(metrics: Collection[str], prefixes: Iterable[str]) -> dict[str, str]:
    """The metrics of the training weights, with the names that the same ones of the evaluation weights have.

    Args:
        metrics: of evaluations, whether of both kinds of weights or of one.
        prefixes: of these evaluations.

    Example:
        >>> raw_twins(["eval_a_loss", "eval_a_raw_loss", "eval_a_raw_x", "eval_a_raw_raw_x"], ["eval_a"])
        {'eval_a_raw_loss': 'eval_a_loss', 'eval_a_raw_raw_x': 'eval_a_raw_x'}
        >>> raw_twins(["eval_loss", "eval_raw_x"], ["eval"])
        {}
    """
    twins: dict[str, str] = {}
    for prefix in prefixes:
        raw = f"{prefix}_raw_"
        names = {name: f"{prefix}_{name.removeprefix(raw)}" for name in metrics if name.startswith(raw)}
        if any(twin in metrics for twin in names.values()):  # else only one kind was evaluated
            own = f"{prefix}_"
            twins |= {name: twin for name, twin in names.items() if raw + name.removeprefix(own) not in metrics}
    return twins


def check_data_sets(eval_dataset: Any) -> None:
    """Raise `ValueError` if the loss of a data set would have the name of one of the training weights.

    Args:
        eval_dataset: what is evaluated with `ewa_eval_raw`; only several data sets, in a dict, have names.
    """
    names = set(eval_dataset) if isinstance(eval_dataset, dict) else set()
    for name in sorted({"raw", *(f"{name}_raw" for name in names)} & names):
        raise ValueError(
            f"eval_dataset has a data set {name!r}, whose eval_{name}_loss would have the name of a loss of the "
            "training weights (ewa_eval_raw): call it otherwise, or leave ewa_eval_raw out."
        )


def check_names(metrics: Collection[str], raw: Mapping[str, str]) -> None:
    """Raise `ValueError` if a metric of the training weights has the name of another metric.

    Args:
        metrics: of the evaluation weights.
        raw: the metrics of the training weights, with the names of the same ones of the evaluation weights.
    """
    for name, twin in raw.items():
        if name in metrics:
            raise ValueError(
                f"{name} is a metric of yours, and with ewa_eval_raw the name of {twin} of the training weights: "
                "rename yours, or leave ewa_eval_raw out."
            )


def check_choice(metric: str, raw: Collection[str]) -> None:
    """Raise `ValueError` if the best model is to be chosen by a metric of the training weights.

    Args:
        metric: `metric_for_best_model`.
        raw: the metrics of the training weights.
    """
    if f"eval_{metric.removeprefix('eval_')}" in raw:
        raise ValueError(
            f"metric_for_best_model={metric} is of the training weights, and load_best_model_at_end loads the "
            "evaluation weights: choose by loss."
        )
