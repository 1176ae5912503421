"""`RAdamTrainer`: wires optimizer, schedule, averaging and checkpoints into `transformers.Trainer`.

What is evaluated is what ships, and a checkpoint's root holds what trains. With none of our methods on, every override
below steps aside and the trainer is upstream's, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import logging

from hf_radam.averaging import WeightAverage
from hf_radam.batch_norm import batch_norm_modules, recalibrate_batch_norm
from hf_radam.names import CONSTANT_SCHEDULES, SchedulerName
from hf_radam.optim.fused import agree_on_fused
from hf_radam.random_state import preserved_random_state
from hf_radam.sharding import Sharding, find_sharding
from hf_radam.training.around_update import tell_of_updates
from hf_radam.training.backends import check_evaluable, check_prepared, forget_evaluation
from hf_radam.training.collected import collected_apart
from hf_radam.training.evaluation import EvaluationWeights
from hf_radam.training.given import with_our_arguments
from hf_radam.training.just_in_time import SaveBetweenUpdates
from hf_radam.training.raw_names import check_choice, check_data_sets, check_names, prefixes
from hf_radam.training.reporting import ReportingMixin
from hf_radam.training.resuming import ResumingMixin
from hf_radam.training.saving import SavingMixin
from hf_radam.training.search import SearchMixin
from hf_radam.training.support import check_supported
from hf_radam.training_args import RAdamTrainingArguments

logger = logging.get_logger(__name__)


class RAdamTrainerMixin(SearchMixin, SavingMixin, ReportingMixin, ResumingMixin):
    """Our methods for any subclass of `Trainer`: `class MyTrainer(RAdamTrainerMixin, Seq2SeqTrainer)`.

    Args:
        *positional: as for the trainer that this is mixed into; `args` is a `RAdamTrainingArguments` (for a subclass of
            `Trainer` with arguments of its own, a dataclass derived from both).
        **keywords: likewise.

    Attributes:
        average: the `WeightAverage` that `--ewa` keeps, from the start of training; else None.

    Raises:
        TypeError: if `args` are not ours, or not also those of the trainer that this is mixed into.
        ValueError: for a set-up in which the weights evaluated or saved would not be the right ones.
    """

    def __init__(self, *positional: Any, **keywords: Any):
        classes = type(self).__mro__
        bases = classes[classes.index(RAdamTrainerMixin) + 1 :]
        given, named = with_our_arguments(type(self).__name__, bases, positional, keywords)
        self.average: WeightAverage | None = None
        super().__init__(*given, **named)
        self._evaluation = EvaluationWeights(self._bare_model)
        check_supported(self)
        if self.args.ewa_eval_raw:
            check_data_sets(self.eval_dataset)
        if self.args.ewa_eval_raw and self.args.load_best_model_at_end and self.args.metric_for_best_model:
            raw_losses = [f"{prefix}_raw_loss" for prefix in prefixes(self.eval_dataset)]
            check_choice(self.args.metric_for_best_model, raw_losses)  # other names are known when they are measured
        if self._active:
            SaveBetweenUpdates.install(self)

    # ---- Optimizer and schedule ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """Our optimizers, which upstream does not know, or upstream's."""
        ours = args.optimizer_class_and_kwargs() if isinstance(args, RAdamTrainingArguments) else None
        if ours is None:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        return ours[0], ours[1] | {"master_weights": args.deepspeed_plugin is not None}

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Make our schedule where one is asked for; upstream then keeps it.

        A `LambdaLR` over a bound method saves no hyper-parameter, and follows skipped fp16 steps.
        """
        schedule = self.args.schedule(num_training_steps, self._past)
        scheduled = self.optimizer if optimizer is None else optimizer
        if schedule is not None and self.lr_scheduler is None:
            if (warning := schedule.warning()) is not None:
                logger.warning(warning)
            assert scheduled is not None, "upstream makes the optimizer first"
            self.lr_scheduler = LambdaLR(scheduled, schedule.multiplier)
            self._created_lr_scheduler = True
        elif self._schedule_free is not None and self.args.lr_scheduler_type not in CONSTANT_SCHEDULES:
            name = SchedulerName(self.args.lr_scheduler_type).value
            raise ValueError(
                f"lr_scheduler_type={name} with RAdamScheduleFree: schedule-free averaging "
                "needs a constant learning rate. Use constant or constant_with_warmup."
            )
        elif self._past is not None and self._past.warmup_steps is not None and self.lr_scheduler is None:
            # A warm-up given as a ratio would be another one in the longer run.
            kwargs: Any = self.args.lr_scheduler_kwargs
            assert scheduled is not None, "upstream makes the optimizer first"
            self.lr_scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=scheduled,
                num_warmup_steps=self.args.resolve_warmup_steps(num_training_steps, self._past),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs=kwargs,
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- Training ----

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Begin the average, or go on with the checkpoint's, once the parameters are the ones that will train."""
        if self._best_model_loaded:
            raise RuntimeError(
                "The model holds the best evaluation weights (load_best_model_at_end), which is not a state to train "
                "on from: make a new trainer, and resume it from a checkpoint."
            )
        self.args.check_horizon(max_steps, self._past)
        self._last_saved = None
        self._extended_from = None
        if self._active:
            forget_evaluation(self)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if not self._active:
            self._evaluation = EvaluationWeights(self._bare_model)
            return prepared
        check_prepared(self)
        sharding = find_sharding(self._bare_model, wrapped=self.model_wrapped, device=self.args.device)
        sharding.check()
        log = self.is_world_process_zero()
        agree_on_fused(self._bare_optimizer, self.args.fused_optimizer, sharding, log=log)
        self.average = self._new_average(sharding.shared()) if self.args.ewa else None
        if resume_from_checkpoint is not None:
            self._go_on_from(self.average, train_dataloader, resume_from_checkpoint)
        tell_of_updates(self)
        self._evaluation = EvaluationWeights(
            self._bare_model,
            sharding=sharding,
            average=self.average,
            optimizer=self._schedule_free,
            recalibrate=self._recalibrate_batch_norm if self._must_recalibrate() else None,
        )
        return prepared

    def _run_epoch(
        self,
        model: Any,
        epoch: Any,
        train_dataloader: Any,
        steps_in_epoch: Any,
        num_update_steps_per_epoch: Any,
        trial: Any,
        ignore_keys_for_eval: Any,
        start_time: Any,
        resume_from_checkpoint: Any,
        epochs_trained: Any,
        steps_trained_in_current_epoch: Any,
    ) -> None:
        """Train nothing more where a finished run is resumed: upstream makes one update past the end."""
        if self._active and self.state.global_step >= self.state.max_steps:
            logger.warning(f"The run has had its {self.state.max_steps} updates: there is nothing left to train.")
            self.control.should_training_stop = True
            return
        super()._run_epoch(
            model,
            epoch,
            train_dataloader,
            steps_in_epoch,
            num_update_steps_per_epoch,
            trial,
            ignore_keys_for_eval,
            start_time,
            resume_from_checkpoint,
            epochs_trained,
            steps_trained_in_current_epoch,
        )

    def _new_average(self, sharding: Sharding) -> WeightAverage:
        return WeightAverage(
            sharding,
            decay=self.args.ewa_decay,
            half_life_ratio=self.args.ewa_half_life_ratio,
            every=self.args.ewa_every,
            start_step=self.args.ewa_start_step,
            device=self.args.ewa_device,
        )

    def _must_recalibrate(self) -> bool:
        if not self.args.recalibrate_batch_norm_batches or not batch_norm_modules(self._bare_model):
            return False
        if self.average is None and self._schedule_free is None:
            return False
        if not has_length(self.train_dataset):
            raise ValueError(
                "The model has BatchNorm layers, whose statistics are taken again for the averaged weights; that needs "
                "a train_dataset with a length, so that the same batches can be drawn each time. Set "
                "recalibrate_batch_norm_batches=0 to evaluate with the statistics of the training weights."
            )
        return True

    def _recalibrate_batch_norm(self) -> None:
        """Take the statistics of the same seeded training batches, for whatever weights the model holds."""
        count = self.args.recalibrate_batch_norm_batches
        batch_size = self._train_batch_size
        dataset: Any = self.train_dataset
        generator = torch.Generator().manual_seed(self.args.seed)
        order = torch.randperm(len(dataset), generator=generator)[: count * batch_size].tolist()
        if len(order) > batch_size:  # a last batch of one row has no variance
            order = order[: len(order) // batch_size * batch_size]
        loader = DataLoader(
            Subset(dataset, order),
            batch_size=batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="training"),
        )
        with preserved_random_state(self.args.seed), self.compute_loss_context_manager(), collected_apart(self):
            batches = (self._prepare_inputs(batch) for batch in loader)
            recalibrate_batch_norm(self._bare_model, batches, forward=self.compute_loss)

    # ---- Evaluation ----

    def evaluate(self, *positional: Any, **keywords: Any) -> dict[str, float]:
        """Refuse data sets whose names would make two losses one.

        The arguments are those of the class that this is mixed into: `Seq2SeqTrainer` takes others than `Trainer`.
        """
        if self.args.ewa_eval_raw:
            given = positional[0] if positional else keywords.get("eval_dataset")
            check_data_sets(self.eval_dataset if given is None else given)
        return super().evaluate(*positional, **keywords)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate the evaluation weights, leaving neither the weights nor the random state changed.

        Upstream's loop draws from the global random state and calls `optimizer.eval()`; inside our context that call
        finds evaluation mode already set.
        """
        rest = (prediction_loss_only, ignore_keys)
        if not self._active:
            return super().evaluation_loop(dataloader, description, *rest, metric_key_prefix)
        check_evaluable(self)
        if self.average is not None and not self.average.started:
            logger.warning(f"There is no average yet ({self.average}): evaluating without it.")
        self._raw_metrics = {}
        # Upstream's name for `evaluate()`, as against `predict()`, whose predictions are asked for once.
        with_raw = self.args.ewa_eval_raw and description == "Evaluation" and self._has_training_weights()
        with preserved_random_state():
            with self._evaluation.applied(exchange=True):
                output = super().evaluation_loop(dataloader, description, *rest, metric_key_prefix)
            if with_raw:
                prefix = f"{metric_key_prefix}_raw"
                with self._evaluation.training_weights(), collected_apart(self) as collected:
                    raw = super().evaluation_loop(dataloader, description, *rest, prefix)
                of_raw = (raw.metrics or {}) | {f"{prefix}_{name}": mean for name, mean in collected.items()}
                self._raw_metrics = {name: f"{metric_key_prefix}{name.removeprefix(prefix)}" for name in of_raw}
                check_names(output.metrics or {}, self._raw_metrics)
                if self.args.load_best_model_at_end and self.args.metric_for_best_model is not None:
                    check_choice(self.args.metric_for_best_model, of_raw)
                output = output._replace(metrics=(output.metrics or {}) | of_raw)
        return output

    def _has_training_weights(self) -> bool:
        if self._best_model_loaded:
            logger.warning("The model holds the best evaluation weights: there are no training weights to evaluate.")
        elif self._evaluation.inside:
            logger.warning(
                "The model holds the evaluation weights here (evaluation_weights()): evaluate outside for the metrics "
                "of the training weights."
            )
        return not (self._best_model_loaded or self._evaluation.inside)


class RAdamTrainer(RAdamTrainerMixin, Trainer):
    """`transformers.Trainer` with RAdamScheduleFree, WSD, WSD-S and EWA: see `RAdamTrainingArguments`."""

    def __init__(
        self, model: Any = None, args: RAdamTrainingArguments | None = None, *others: Any, **keywords: Any
    ) -> None:
        super().__init__(model, args, *others, **keywords)
