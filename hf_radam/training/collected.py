"""Keep apart what a trainer of TRL collects in `compute_loss`, where two evaluations are made for one log.

TRL's trainers append accuracy, entropy and more of each batch to `_metrics["train"]` or `_metrics["eval"]`, and the
next `log()` writes their means. Of two evaluations before one `log()` it would write the mean of both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOT_OF_WEIGHTS = "num_tokens"
"""Tokens trained on so far, which stand among the metrics of an evaluation."""


def is_of_trl(trainer: Any) -> bool:
    """Whether this is one of TRL's trainers, or derived from one."""
    return any(base.__module__.partition(".")[0] == "trl" for base in type(trainer).__mro__)


def keeps_metrics(trainer: Any) -> bool:
    """Whether it is one that keeps them where TRL's own base class and `SFTTrainer` do."""
    return is_of_trl(trainer) and hasattr(trainer, "_metrics") and hasattr(trainer, "_total_train_tokens")


@contextmanager
def collected_apart(trainer: Any) -> Iterator[dict[str, float]]:
    """Context in which the trainer collects for us; what it has collected before comes back at the end.

    Yields:
        the means of what it collects about the weights that are evaluated, filled in at the end:
        `{"mean_token_accuracy": 0.5, ...}`. It stays empty for trainers that collect nothing.
    """
    means: dict[str, float] = {}
    if not keeps_metrics(trainer):
        yield means
        return
    before, tokens = trainer._metrics, trainer._total_train_tokens
    trainer._metrics = copy.deepcopy(before)
    for of_mode in trainer._metrics.values():
        of_mode.clear()
    try:
        yield means
        collected = {name: values for name, values in trainer._metrics["eval"].items() if name != NOT_OF_WEIGHTS}
        means.update((name, sum(values) / len(values)) for name, values in collected.items())
    finally:
        trainer._metrics, trainer._total_train_tokens = before, tokens
