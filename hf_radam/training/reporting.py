"""The half of the trainer that reports: what stands in its logs, under which names, and in the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from hf_radam import model_card
from hf_radam.training.card_facts import facts_of
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

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Add to upstream's card what it does not know: the method, which weights these are, how to load each kind."""
        super().create_model_card(
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
        )
        if self._active and self.is_world_process_zero():
            file = Path(str(self.args.output_dir), "README.md")
            card = model_card.completed(file.read_text(encoding="utf-8"), facts_of(self))
            file.write_text(card, encoding="utf-8")
