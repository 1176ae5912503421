"""The arguments that a trainer is made with: found wherever its class takes them, and refused if they are not ours."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments

from hf_radam.training_args import RAdamTrainingArguments


def with_our_arguments(
    name: str, bases: Iterable[type], positional: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """What to make a trainer with: what was given, and arguments of ours where none were.

    Args:
        name: class that is made.
        bases: classes of which the first is given all this; `args` is not everywhere the second, as in `Trainer`.
        positional: what it is made with, without `self`.
        keywords: likewise.

    Raises:
        TypeError: if the arguments are not ours, or not also those that the class wants.
    """
    place, wanted = _arguments_of(bases)
    behind = place < len(positional)
    args = positional[place] if behind else keywords.get("args")
    if args is None and not wanted:
        args = RAdamTrainingArguments(output_dir="tmp_trainer")
    classes = (RAdamTrainingArguments, *wanted)
    if not all(isinstance(args, one) for one in classes):
        all_of_them = " and ".join(one.__name__ for one in classes)
        given = "no arguments" if args is None else type(args).__name__
        raise TypeError(
            f"{name} got {given}: make the arguments with "
            + (f"a dataclass derived from {all_of_them}." if wanted else _OURS)
        )
    if behind:
        return [*positional[:place], args, *positional[place + 1 :]], keywords
    return [*positional], keywords | {"args": args}


_OURS = (
    "RAdamTrainingArguments, which takes every upstream field (for a trainer with arguments of its own: a dataclass "
    "derived from RAdamTrainingArguments and them)."
)


def _arguments_of(bases: Iterable[type]) -> tuple[int, list[type]]:
    """Where the first class that names `args` takes them, and of which classes, besides upstream's, they must be."""
    for base in bases:
        parameters = inspect.signature(vars(base).get("__init__", object.__init__)).parameters
        if "args" in parameters and parameters["args"].kind is not inspect.Parameter.VAR_POSITIONAL:
            annotation = parameters["args"].annotation
            classes = [one for one in typing.get_args(annotation) or (annotation,) if isinstance(one, type)]
            own = [one for one in classes if issubclass(one, TrainingArguments) and one is not TrainingArguments]
            return list(parameters).index("args") - 1, own
    raise TypeError("RAdamTrainerMixin is for subclasses of transformers.Trainer.")
