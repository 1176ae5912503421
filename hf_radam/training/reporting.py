"""The half of the trainer that reports: what stands in its logs, under which names, and in the model card."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hf_radam.training.card import write_our_part
from hf_radam.training.card_facts import told_of_best
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

    def create_model_card(self, *positional: Any, **keywords: Any) -> None:
        """Add to the card what upstream does not know: the method, which weights these are, how to load each kind.

        The arguments are those of the class that this is mixed into: TRL's trainers take others than `Trainer`.
        """
        history = self.state.log_history
        if self._best_model_loaded and self.state.best_global_step is not None:
            self.state.log_history = told_of_best(history, self.state.best_global_step)
        try:
            super().create_model_card(*positional, **keywords)
        finally:
            self.state.log_history = history
        if self._active and self.is_world_process_zero():
            write_our_part(self)
