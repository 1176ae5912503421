"""Put the evaluation weights into the model and the training weights back, bit for bit.

Evaluation weights are the average if one is kept, else x of a schedule-free optimizer, else the training weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from torch import Tensor, nn

from hf_radam.averaging import WeightAverage
from hf_radam.batch_norm import load_statistics, statistics, statistics_restored
from hf_radam.optim import RAdamScheduleFree, x_shard, x_shards
from hf_radam.sharding import Sharding, Weights, find_sharding


class EvaluationWeights:
    """Knows which weights a model is evaluated with, and swaps them in and out.

    Args:
        model: the unwrapped model that trains.
        sharding: where its parameters lie; by default as for a model of one process.
        average: its EWA, or None.
        optimizer: its schedule-free optimizer, or None.
        recalibrate: takes BatchNorm statistics again, in place, for the weights in the model; None if there is no
            BatchNorm or it is switched off. Called once for each kind of weights until `forget_statistics()`.
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
        self._sharding = sharding
        self.average = average
        self.optimizer = optimizer
        self._recalibrate = recalibrate
        self._statistics: dict[str, list[Tensor]] = {}
        self.inside = False
        """Whether the model holds the evaluation weights now."""

    @property
    def sharding(self) -> Sharding:
        """Where the model's parameters lie."""
        if self._sharding is None:
            self._sharding = find_sharding(self.model)
        return self._sharding

    def forget_statistics(self) -> None:
        """Take BatchNorm statistics again at the next use: the weights have moved."""
        self._statistics.clear()

    @property
    def averaged(self) -> bool:
        """Whether there is an average by now."""
        return self.average is not None and self.average.started

    @property
    def source(self) -> str | None:
        """What evaluation uses: `ewa`, `schedule_free`, or None for the training weights."""
        if self.averaged:
            return "ewa"
        return "schedule_free" if self.optimizer is not None else None

    @contextmanager
    def applied(self, *, exchange: bool = False) -> Iterator[None]:
        """Context in which the model holds the evaluation weights; `exchange` as for `WeightAverage.applied`.

        The training weights come back bit for bit, whatever is raised. Entering it again inside changes nothing.
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

    @contextmanager
    def training_weights(self) -> Iterator[None]:
        """Context in which evaluating uses the training weights: upstream's own `optimizer.eval()` changes nothing."""
        with self._in_evaluation_mode():
            yield

    def _in_evaluation_mode(self) -> AbstractContextManager[None]:
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
            stack.enter_context(self._in_evaluation_mode())
            if self._recalibrate is not None:
                if source in self._statistics:
                    load_statistics(self.model, self._statistics[source])
                else:
                    self._recalibrate()
                    self._statistics[source] = statistics(self.model)
            yield

    @property
    def kept(self) -> list[str]:
        """Every kind of weights that a checkpoint keeps beside the training weights."""
        sources = [("ewa", self.averaged), ("schedule_free", self.optimizer is not None)]
        return [name for name, kept in sources if kept]

    @contextmanager
    def weights(self, source: str) -> Iterator[Weights]:
        """Context with one kind of weights, for whoever writes them.

        While in it the model's BatchNorm buffers are those that belong to the weights; its parameters are not touched.

        Args:
            source: one of `kept`.
        """
        with statistics_restored(self.model):
            if self._recalibrate is not None:
                with self._applied(source, exchange=True):
                    recalibrated = statistics(self.model)
                load_statistics(self.model, recalibrated)
            if source == "ewa":
                assert self.average is not None
                yield Weights(self.average.sharding, self.average.state_dict()["averages"].get)
            else:
                assert self.optimizer is not None
                yield Weights(self.sharding, x_shard(self.sharding, self.optimizer))
