"""Put the evaluation weights into the model and the training weights back, and evaluate both where that is asked for.

Evaluation weights are the EWA if there is one, else x of a schedule-free optimizer, else the training weights.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import logging

from hf_radam.averaging import WeightAverage
from hf_radam.batch_norm import batch_norm_modules, load_statistics, statistics, statistics_restored
from hf_radam.optim import RAdamScheduleFree, x_shard, x_shards
from hf_radam.random_state import preserved_random_state
from hf_radam.sharding import Sharding, Weights, find_sharding

logger = logging.get_logger(__name__)

NOT_OF_WEIGHTS = "num_tokens"
"""TRL's count of the tokens trained on, which it keeps among the metrics of an evaluation."""


class EvaluationWeights:
    """Knows which weights a model is evaluated with, and swaps them in and out.

    `model` is the unwrapped one, `optimizer` a schedule-free one. `recalibrate` recalibrates BatchNorm statistics in
    place for the weights in the model, once for each kind of weights until `forget_statistics()`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sharding: Sharding | None = None,
        average: WeightAverage | None = None,
        optimizer: RAdamScheduleFree | None = None,
        recalibrate: Callable[[], None] | None = None,
    ):
        self.model = model
        self.average = average
        self.optimizer = optimizer
        self.inside = False
        """Whether the model holds the evaluation weights now."""
        self._sharding = sharding
        self._recalibrate = recalibrate
        self._statistics: dict[str, list[Tensor]] = {}

    @property
    def sharding(self) -> Sharding:
        """Where the model's parameters are."""
        if self._sharding is None:
            self._sharding = find_sharding(self.model)
        return self._sharding

    @property
    def source(self) -> str | None:
        """What evaluation uses: `ewa`, `schedule_free`, or None for the training weights."""
        return self.saved_sources[0] if self.saved_sources else None

    @property
    def saved_sources(self) -> list[str]:
        """The weights that a checkpoint holds beside the training weights, those of evaluation first."""
        averaged = self.average is not None and self.average.started
        return [*(["ewa"] if averaged else []), *(["schedule_free"] if self.optimizer is not None else [])]

    def forget_statistics(self) -> None:
        """Recalibrate BatchNorm at the next use: the weights have changed."""
        self._statistics.clear()

    @contextmanager
    def applied(self, *, exchange: bool = False) -> Iterator[None]:
        """Open a context in which the model holds the evaluation weights; a nested one changes nothing.

        The training weights come back bit for bit, whatever is raised. `exchange` as in `WeightAverage.applied`.
        """
        if self.inside or self.source is None:
            yield
            return
        with self._applied(self.source, exchange=exchange):
            self.inside = True
            try:
                yield
            finally:
                self.inside = False

    def training_weights(self) -> AbstractContextManager[None]:
        """Open a context in which upstream's call of `optimizer.eval()` leaves the training weights in the model."""
        return nullcontext() if self.optimizer is None else self.optimizer.evaluating(write_x=False)

    @contextmanager
    def _applied(self, source: str, *, exchange: bool = False) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(statistics_restored(self.model))
            if source == "ewa":
                assert self.average is not None
                stack.enter_context(self.average.applied(exchange=exchange))
            elif self.optimizer is not None:
                optimizer = self.optimizer
                stack.enter_context(self.sharding.holding(lambda: x_shards(self.sharding, optimizer)))
            stack.enter_context(self.training_weights())
            if self._recalibrate is not None:
                if source in self._statistics:
                    load_statistics(self.model, self._statistics[source])
                else:
                    self._recalibrate()
                    self._statistics[source] = statistics(self.model)
            yield

    @contextmanager
    def weights(self, source: str) -> Iterator[Weights]:
        """Open a context with one of `saved_sources`, for writing it.

        Inside it the model's BatchNorm buffers are those of these weights; its parameters are not touched.
        """
        with statistics_restored(self.model):
            if self._recalibrate is not None:
                with self._applied(source, exchange=True):
                    recalibrated = statistics(self.model)
                load_statistics(self.model, recalibrated)
            if source == "ewa":
                assert self.average is not None
                yield Weights(self.average.sharding, self.average.averages.get)
            else:
                assert self.optimizer is not None
                yield Weights(self.sharding, x_shard(self.sharding, self.optimizer))


def must_recalibrate(trainer: Any) -> bool:
    """Return whether BatchNorm is recalibrated for the evaluation weights.

    Raises:
        ValueError: if the data has no length.
    """
    if not trainer.args.recalibrate_batch_norm_batches or not batch_norm_modules(trainer._bare_model):
        return False
    if trainer.average is None and trainer._schedule_free is None:
        return False
    if not has_length(trainer.train_dataset):
        raise ValueError(
            "Recalibrating BatchNorm needs a train_dataset with a length, to draw the same batches each time. Set "
            "recalibrate_batch_norm_batches=0 to evaluate with the statistics of the training weights."
        )
    return True


# ---- Evaluation of both kinds of weights (`ewa_eval_raw`) ----


def evaluate_weights(
    trainer: Any, loop: Callable[..., EvalLoopOutput], *args: Any, with_raw: bool, **kwargs: Any
) -> EvalLoopOutput:
    """Run upstream's evaluation loop on the evaluation weights, and on the training weights if `with_raw`.

    Neither the weights nor the global random states change. The metrics of the training weights are named with the
    prefix `{metric_key_prefix}_raw`. The arguments are those of `loop`.

    Raises:
        ValueError: if a metric of the training weights has the name of another metric, or is to choose the best model.
    """
    weights: EvaluationWeights = trainer._evaluation
    with preserved_random_state():
        with weights.applied(exchange=True):
            output = loop(*args, **kwargs)
        if not with_raw:
            return output
        call = inspect.signature(Trainer.evaluation_loop).bind(trainer, *args, **kwargs)
        prefix = f"{call.arguments.get('metric_key_prefix', 'eval')}_raw"
        call.arguments["metric_key_prefix"] = prefix
        with weights.training_weights(), collected_apart(trainer) as collected:
            raw = loop(*call.args[1:], **call.kwargs)
    metrics = (raw.metrics or {}) | {f"{prefix}_{name}": mean for name, mean in collected.items()}
    for name in metrics:
        if name in (output.metrics or {}):
            raise ValueError(
                f"The metric {name} of compute_metrics has the name of a metric of the training weights "
                "(ewa_eval_raw). Rename it, or leave ewa_eval_raw out."
            )
    check_best_metric(trainer.args, metrics)
    return output._replace(metrics=(output.metrics or {}) | metrics)


def metric_prefixes(eval_dataset: Any) -> list[str]:
    """Return the prefixes of the metrics of `evaluate()`: `eval`, or `eval_{name}` for each of several data sets."""
    return [f"eval_{name}" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["eval"]


def raw_twins(metrics: Collection[str], prefixes: Iterable[str]) -> dict[str, str]:
    """Map each metric of the training weights (`eval_raw_loss`) to that of the evaluation weights (`eval_loss`)."""
    twins: dict[str, str] = {}
    for prefix in prefixes:
        raw = f"{prefix}_raw_"
        names = {name: f"{prefix}_{name.removeprefix(raw)}" for name in metrics if name.startswith(raw)}
        if any(twin in metrics for twin in names.values()):  # else the training weights were not evaluated
            own = f"{prefix}_"  # a user's metric may be called raw_x: then raw_raw_x is its twin
            twins |= {name: twin for name, twin in names.items() if raw + name.removeprefix(own) not in metrics}
    return twins


def check_dataset_names(eval_dataset: Any) -> None:
    """Raise `ValueError` if the loss of a data set would have the name of a loss of the training weights."""
    names = set(eval_dataset) if isinstance(eval_dataset, Mapping) else set()
    for name in sorted({"raw", *(f"{name}_raw" for name in names)} & names):
        raise ValueError(
            f"eval_dataset has a data set {name!r}, whose eval_{name}_loss is the name of a loss of the training "
            "weights (ewa_eval_raw). Rename it, or leave ewa_eval_raw out."
        )


def check_best_metric(args: Any, raw_metrics: Collection[str]) -> None:
    """Raise `ValueError` if the best model is to be chosen by a metric of the training weights."""
    if args.load_best_model_at_end and f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}" in raw_metrics:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model} is of the training weights, but "
            "load_best_model_at_end loads the evaluation weights. Choose by a metric of those, such as loss."
        )


# ---- TRL ----


def is_trl(trainer: Any) -> bool:
    """Return whether this is one of TRL's trainers, or derived from one."""
    return any(base.__module__.partition(".")[0] == "trl" for base in type(trainer).__mro__)


def keeps_metrics(trainer: Any) -> bool:
    """Return whether a trainer collects metrics in `compute_loss` the way TRL's `SFTTrainer` does (1.16)."""
    return is_trl(trainer) and hasattr(trainer, "_metrics") and hasattr(trainer, "_total_train_tokens")


def check_trainer(trainer: Any) -> None:
    """Raise `ValueError` if metrics of both kinds of weights could not be told apart, or choose the best model."""
    check_dataset_names(trainer.eval_dataset)
    check_best_metric(trainer.args, [f"{prefix}_raw_loss" for prefix in metric_prefixes(trainer.eval_dataset)])
    if is_trl(trainer) and not keeps_metrics(trainer):
        raise ValueError(
            f"ewa_eval_raw with {type(trainer).__name__}: TRL would log the mean of both evaluations. Leave it out."
        )


@contextmanager
def collected_apart(trainer: Any) -> Iterator[dict[str, float]]:
    """Open a context in which what a TRL trainer collects in `compute_loss` is kept apart from what it has collected.

    TRL's next `log()` writes the means of all that was collected: of two evaluations the mean of both.

    Yields:
        The means of what was collected inside, filled in at the end; empty for other trainers.
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
