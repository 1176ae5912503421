"""Put the evaluation weights into the model and the training weights back, bit for bit.

Evaluation weights are the average if one is kept, else x of a schedule-free optimizer, else the training weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from hf_radam.averaging import WeightAverage
from hf_radam.batch_norm import load_statistics, statistics, statistics_restored
from hf_radam.optim import RAdamScheduleFree, schedule_free_x


class EvaluationWeights:
    """Knows which weights a model is evaluated with, and swaps them in and out.

    Args:
        model: the unwrapped model that trains.
        average: its EWA, or None.
        optimizer: its schedule-free optimizer, or None.
        recalibrate: takes BatchNorm statistics again, in place, for the weights in the model; None if there is no
            BatchNorm or it is switched off. Called once for each kind of weights until `forget_statistics()`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        average: WeightAverage | None = None,
        optimizer: RAdamScheduleFree | None = None,
        recalibrate: Callable[[], None] | None = None,
    ):
        self.model = model
        self.average = average
        self.optimizer = optimizer
        self._recalibrate = recalibrate
        self._statistics: dict[str, list[Tensor]] = {}
        self.inside = False
        """Whether the model holds the evaluation weights now."""

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
    def applied(self) -> Iterator[None]:
        """Context in which the model holds the evaluation weights.

        The training weights come back bit for bit, whatever is raised. Entering it again inside changes nothing.
        """
        if self.inside or self.source is None:
            yield
            return
        with self._applied(self.source):
            self.inside = True
            try:
                yield
            finally:
                self.inside = False

    @contextmanager
    def training_weights(self) -> Iterator[None]:
        """Context in which evaluating uses the training weights: upstream's own `optimizer.eval()` changes nothing."""
        with ExitStack() as stack:
            if self.optimizer is not None:
                stack.enter_context(self.optimizer.evaluating(write_x=False))
            yield

    @contextmanager
    def _applied(self, source: str) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(statistics_restored(self.model))
            if self.optimizer is not None:
                stack.enter_context(self.optimizer.evaluating(write_x=source == "schedule_free"))
            if source == "ewa":
                assert self.average is not None
                stack.enter_context(self.average.applied())
            if self._recalibrate is not None:
                if source in self._statistics:
                    load_statistics(self.model, self._statistics[source])
                else:
                    self._recalibrate()
                    self._statistics[source] = statistics(self.model)
            yield

    def folders(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every set of weights that a checkpoint keeps beside the training weights, by the name of its folder.

        Parameters that are not in a set are as in the model: frozen ones, of which a model with an adapter has many.

        While one is handed out the model's BatchNorm buffers are those that belong to it.
        """
        sources = [("ewa", self.averaged), ("schedule_free", self.optimizer is not None)]
        for source in [name for name, kept in sources if kept]:
            weights = self._weights(source)
            if self._recalibrate is None:
                yield source, weights
                continue
            with statistics_restored(self.model):
                with self._applied(source):
                    recalibrated = statistics(self.model)
                load_statistics(self.model, recalibrated)
                yield source, weights

    def _weights(self, source: str) -> dict[str, Tensor]:
        if source == "ewa":
            assert self.average is not None
            return self.average.state_dict()["averages"]
        assert self.optimizer is not None
        return schedule_free_x(self.model, self.optimizer, changed_only=True)
