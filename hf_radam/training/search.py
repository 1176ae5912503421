"""The half of the trainer that starts over: with a `model_init`, and for each trial of a hyperparameter search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.trainer_utils import default_compute_objective

from hf_radam.training.evaluation import EvaluationWeights
from hf_radam.training.parts import PartsMixin
from hf_radam.training.raw_names import prefixes, raw_twins
from hf_radam.training.support import check_supported


class SearchMixin(PartsMixin):
    """Overrides of `Trainer`'s search, so that a trial is the run that its values would make alone."""

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the model, and let go of what belongs to the last one: nothing must speak of its weights any more."""
        self.average = None
        model = super().call_model_init(trial)
        self._evaluation = EvaluationWeights(model)
        self._best_model_loaded = False
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """Check the arguments as when they were made: a trial, or the user, may have set fields since."""
        super()._hp_search_setup(trial)
        self.args.check()
        if trial is not None:
            check_supported(self)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, float]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: Any = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Search as upstream does, by default for what it would search for without `ewa_eval_raw`.

        Upstream's default objective is the loss, or the sum of all other metrics where there are any; `eval_raw_loss`
        would be one.
        """
        objective = self._objective if compute_objective is None else compute_objective
        return super().hyperparameter_search(hp_space, objective, n_trials, direction, backend, hp_name, **kwargs)

    def _objective(self, metrics: dict[str, float]) -> float:
        if self.args.ewa_eval_raw:
            raw = raw_twins(metrics, prefixes(self.eval_dataset))
            metrics = {name: value for name, value in metrics.items() if name not in raw}
        return default_compute_objective(metrics)
