"""Curves of the training weights beside those of the evaluation weights: `eval_raw/loss` and `eval/loss`.

Upstream's callbacks turn `eval_raw_loss` into `eval/raw_loss`: one group, another name. For tensorboard, wandb and
trackio the curve gets the name of its twin in a group of its own, while a record is written: the callbacks do all that
they do, and what they write with goes by other names meanwhile. Any other integration keeps upstream's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    rewrite_logs,
)

WRITES_WITH: dict[type, tuple[str, ...]] = {
    # A callback that has no writer yet, or no longer, makes one when it is told of a record.
    TensorBoardCallback: ("tb_writer", "_SummaryWriter"),
    WandbCallback: ("_wandb",),
    TrackioCallback: ("_trackio",),
}
"""Attributes of upstream's callbacks that hold what they write with."""


def raw_curves(twins: Mapping[str, str]) -> dict[str, str]:
    """The names of the curves of the training weights, by those that upstream gives them.

    Args:
        twins: each metric of the training weights, with the name of the same metric of the evaluation weights.

    Example:
        >>> raw_curves({"eval_raw_loss": "eval_loss", "eval_a_raw_loss": "eval_a_loss"})
        {'eval/raw_loss': 'eval_raw/loss', 'eval/a_raw_loss': 'eval_raw/a_loss'}
    """
    names = {}
    for raw, twin in twins.items():
        (upstream,), (beside,) = rewrite_logs({raw: None}), rewrite_logs({twin: None})
        group, _, metric = beside.partition("/")
        names[upstream] = f"{group}_raw/{metric}"
    return names


@contextmanager
def renamed(callbacks: Iterable[Any], names: Mapping[str, str]) -> Iterator[None]:
    """Context in which tensorboard, wandb and trackio get curves under other names.

    Args:
        callbacks: of a trainer; those of other integrations are left alone.
        names: the new names by upstream's.
    """
    places = [
        (callback, name)
        for callback in callbacks
        for kind, attributes in WRITES_WITH.items()
        for name in attributes
        if names and isinstance(callback, kind)
    ]
    try:
        for callback, name in places:
            if getattr(callback, name) is not None:
                setattr(callback, name, _Renaming(getattr(callback, name), names))
        yield
    finally:
        for callback, name in places:
            held = getattr(callback, name)
            if isinstance(held, _Renaming):
                setattr(callback, name, held.target)


class _Renaming:
    """A writer of tensorboard, the class of one, or the module wandb or trackio, which it does not change."""

    def __init__(self, target: Any, names: Mapping[str, str]):
        self.target = target
        self.names = names

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def __call__(self, *args: Any, **kwargs: Any) -> _Renaming:
        return _Renaming(self.target(*args, **kwargs), self.names)

    def log(self, metrics: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.target.log({self.names.get(name, name): v for name, v in metrics.items()}, *args, **kwargs)

    def add_scalar(self, tag: str, *args: Any, **kwargs: Any) -> Any:
        return self.target.add_scalar(self.names.get(tag, tag), *args, **kwargs)

    def add_text(self, tag: str, *args: Any, **kwargs: Any) -> Any:
        return self.target.add_text(self.names.get(tag, tag), *args, **kwargs)
