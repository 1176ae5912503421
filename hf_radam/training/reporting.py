"""The half of the trainer that reports: what stands in its logs, and under which names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hf_radam.training.curves import raw_curves, renamed
from hf_radam.training.parts import PartsMixin


class ReportingMixin(PartsMixin):
    """Overrides of `Trainer`'s reporting."""

    _raw_metrics: Mapping[str, str] = MappingProxyType({})
    """Each metric of the training weights in the last evaluation, and the same one of the evaluation weights."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Say with a training loss how far back the average looks, and have raw curves in a group of their own.

        Only the callbacks that draw curves see other names; the history and every other callback see those in `logs`.
        """
        if "loss" in logs and self.average is not None and self.average.started:
            logs["ewa_half_life"] = self.average.half_life
        with renamed(self.callback_handler.callbacks, raw_curves(self._raw_metrics)):
            super().log(logs, start_time)
