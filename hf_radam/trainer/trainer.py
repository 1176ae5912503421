"""`RAdamTrainer`: optimizer, schedule, averaging and checkpoints in `transformers.Trainer`. All overrides are here.

The saved model is the one that was evaluated, and the root of a checkpoint holds the training weights. With none of our
methods on, every override steps aside and the trainer is upstream's.

`tests/trainer/test_contract.py` lists every private name of upstream that is overridden or called.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, TrainOutput, default_compute_objective
from transformers.utils import logging

from hf_radam.averaging import WeightAverage
from hf_radam.batch_norm import recalibrate_batch_norm
from hf_radam.checkpoints import storage
from hf_radam.checkpoints.extend import ResumePlan, plan_resume
from hf_radam.optim import RAdamScheduleFree
from hf_radam.optim.fused import agree_on_fused
from hf_radam.random_state import preserved_random_state
from hf_radam.schedules import Schedule
from hf_radam.sharding import find_sharding
from hf_radam.trainer import callbacks, compatibility, evaluation, ranks, reporting, resume, session
from hf_radam.training_args import RAdamTrainingArguments

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class RAdamTrainerMixin(_Base):
    """The methods of this package for any subclass of `Trainer`: `class MyTrainer(RAdamTrainerMixin, Seq2SeqTrainer)`.

    Args:
        *args: as for the trainer that this is mixed into; its `args` is a `RAdamTrainingArguments` (for a subclass of
            `Trainer` with arguments of its own, a dataclass derived from both).
        **kwargs: likewise.

    Attributes:
        average: the `WeightAverage` that `--ewa` keeps, from the start of training; else None.

    Raises:
        TypeError: if `args` is not a `RAdamTrainingArguments`, or not also of the class that the trainer needs.
        ValueError: for a set-up in which the weights evaluated or saved would not be the right ones.
    """

    args: RAdamTrainingArguments
    average: WeightAverage | None = None

    _evaluation: evaluation.EvaluationWeights
    _passed_optimizer: type | None = None
    _schedule: Schedule | None = None  # of this package, resolved once for a run; None for one of upstream's
    _plan: ResumePlan | None = None
    _session: session.CheckpointSession | None = None
    _planned: list[dict[str, Any]] = []  # hyper-parameters of each parameter group as the arguments made them
    _sigterm: callbacks.SigtermCallback | None = None
    _final_upload: ExitStack
    _trial_of_run: Any = None
    _best_model_loaded = False
    _refused = False
    _was_finished = False
    _in_evaluate = False
    _checked = False  # by `_check_methods`, with a method on

    def __init__(self, *args: Any, **kwargs: Any):
        try:
            super().__init__(*args, **kwargs)
        except (TypeError, AttributeError) as error:
            compatibility.check_argument_class(self, error)
            raise
        compatibility.check_arguments(self)
        self._final_upload = ExitStack()
        self._passed_optimizer = compatibility.given_optimizer_class(self)
        self._evaluation = evaluation.EvaluationWeights(self._bare_model)
        self._check_methods()

    def _check_methods(self) -> None:
        """Refuse what is not supported, when the trainer is made or, in a search, when a trial turns a method on."""
        compatibility.check_supported(self)
        if self.args.ewa_eval_raw:
            evaluation.check_trainer(self)
        if self._active:
            self._checked, self._sigterm = True, callbacks.replace_jit_callback(self)

    # ---- Behind the wrappers ----

    @property
    def _active(self) -> bool:
        """Whether any of our methods is on; if not, every override steps aside."""
        return self.args.uses_hf_radam or compatibility.is_schedule_free(self)

    @property
    def _bare_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _bare_optimizer(self) -> Any:
        return compatibility.unwrap_optimizer(self.optimizer)

    @property
    def _schedule_free(self) -> RAdamScheduleFree | None:
        optimizer = self._bare_optimizer
        return optimizer if isinstance(optimizer, RAdamScheduleFree) else None

    @property
    def _scheduled_steps(self) -> int:
        """Steps that the schedule has counted: those of the optimizer, without skipped ones."""
        return int(getattr(self.lr_scheduler, "last_epoch", self.state.global_step))

    # ---- Optimizer and schedule ----

    @classmethod
    def get_optimizer_cls_and_kwargs(cls, args: Any, model: Any = None) -> tuple[Any, Any]:
        """Return class and options of `radam` and `radam_schedulefree`; upstream knows the others."""
        own = args.optimizer_class_and_kwargs() if isinstance(args, RAdamTrainingArguments) else None
        if own is None:
            return super().get_optimizer_cls_and_kwargs(args, model)
        return own[0], own[1] | {"master_weights": args.deepspeed_plugin is not None}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Check, once the length of the run is known, what must be right before the model is prepared."""
        if self.is_in_train and self._active:
            self.args.check()  # a search, or the user, may have set fields since they were made
            if not self._checked:
                self._check_methods()
            compatibility.undo_evaluation_wrapping(self)
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> LRScheduler:
        """Resolve a schedule of this package once, and make a `LambdaLR` of it, which upstream then uses.

        `LambdaLR` saves nothing of a bound method, so that a resumed run follows the arguments, which are checked.
        """
        if self.lr_scheduler is None:
            past = self._plan.past if self._plan else None
            scheduled: Any = self.optimizer if optimizer is None else optimizer
            self._schedule = self.args.schedule(num_training_steps, past)
            if self._schedule is not None:
                if (warning := self._schedule.warning()) is not None:
                    logger.warning(warning)
                self.lr_scheduler = LambdaLR(scheduled, self._schedule.multiplier)
                self._created_lr_scheduler = True
            else:
                compatibility.check_schedule_of_optimizer(self)
                if past is not None and past.warmup_steps is not None:
                    # A warm-up given as a ratio would be another one in the longer run.
                    self.lr_scheduler = get_scheduler(
                        self.args.lr_scheduler_type,
                        optimizer=scheduled,
                        num_warmup_steps=self.args.resolve_warmup_steps(num_training_steps, past),
                        num_training_steps=num_training_steps,
                        scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,  # type: ignore[arg-type]
                    )
                    self._created_lr_scheduler = True
        scheduler = super().create_scheduler(num_training_steps, optimizer, **kwargs)
        if self._bare_optimizer is not None:  # upstream loads what was saved over it soon after
            self._planned = resume.hyperparameters(self._bare_optimizer.param_groups)
        return scheduler

    # ---- Training ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as upstream does, from a checkpoint that is complete and verified.

        Raises:
            DisagreementError: on every rank, if they were started with different flags, models or data.
            CheckpointError: if the checkpoint named is corrupted, or there is none to resume from.
            HorizonError: if schedule or averaging do not fit into the run.
        """
        if not self._active and trial is None:  # a trial of a search may turn a method on
            self._plan = None
            return super().train(resume_from_checkpoint, trial, *args, **kwargs)
        compatibility.check_search(self, trial)
        ranks.check_agreement(self, resume_from_checkpoint=resume_from_checkpoint)
        if (self._refused or self._best_model_loaded) and self.model_init is None:
            raise RuntimeError(
                "The model holds the best evaluation weights (load_best_model_at_end), or parts of a refused "
                "checkpoint. Make a new trainer and model, and resume from a checkpoint."
            )
        limit, self._trial_of_run = self.args.save_total_limit, trial
        callbacks.install_callbacks(self)
        with contextlib.ExitStack() as at_end:
            at_end.callback(self._end_training, limit)
            self._plan = ranks.decide_on_rank0(functools.partial(self._make_plan, resume_from_checkpoint, at_end))
            if self._plan is not None:
                ranks.check_same_folder(self._plan.checkpoint)
                self._refused = True  # until everything is loaded
                resume.check_deepspeed(self, self._plan.checkpoint)
            return super().train(self._plan.checkpoint if self._plan else None, trial, *args, **kwargs)

    def _make_plan(self, wanted: str | bool | None, at_end: ExitStack) -> ResumePlan | None:
        """Take the lock of the run, finish a save that was interrupted, and choose the checkpoint. Rank 0 does."""
        run = Path(self._get_output_dir(self._trial_of_run))
        at_end.enter_context(storage.run_lock(run))
        storage.recover_interrupted_save(run)
        plan = plan_resume(self.args, wanted)
        if plan is not None and plan.summary is not None:
            print(plan.summary)
        return plan

    def _end_training(self, limit: int | None) -> None:
        self.args.save_total_limit = limit
        self._final_upload.close()
        if self._sigterm is not None:
            self._sigterm.release()
        if self._session is not None and not self._refused:  # the best model may have been loaded
            reporting.write_card_section(self, only_if_present=True)

    def _begin_training(self) -> None:
        """Prepare fusing, averaging and evaluation, once model and optimizer are prepared and loaded."""
        if not self._active:  # as in a trial of a search
            return
        args, model, optimizer = self.args, self._bare_model, self._bare_optimizer
        callbacks.install_callbacks(self)
        args.check_horizon(self.state.max_steps, self._plan.past if self._plan else None)
        compatibility.check_prepared(self, optimizer, model)
        run = Path(self._get_output_dir(self._trial_of_run))
        self._session = session.CheckpointSession(run, args.save_total_limit, self.accelerator.wait_for_everyone)
        sharding = find_sharding(model, wrapped=self.model_wrapped, device=args.device)
        sharding.check()
        agree_on_fused(optimizer, args.fused_optimizer, sharding, log=self.is_world_process_zero())
        self.average = None
        if args.ewa:
            self.average = WeightAverage(
                sharding.shared(),
                decay=args.ewa_decay,
                half_life_ratio=args.ewa_half_life_ratio,
                every=args.ewa_every,
                start_step=args.ewa_start_step,
                device=args.ewa_device,
            )
        if self._plan is not None:
            resume.restore(self, self._plan, run)
        self._evaluation = evaluation.EvaluationWeights(
            model,
            sharding=sharding,
            average=self.average,
            optimizer=self._schedule_free,
            recalibrate=self._recalibrate_batch_norm if evaluation.must_recalibrate(self) else None,
        )
        self._was_finished = self.state.global_step >= self.state.max_steps
        if self._was_finished:
            logger.warning(f"The run has completed its {self.state.max_steps} steps: there is nothing left to train.")
        self._refused = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return no batches if the run was finished when it was resumed: upstream takes one step more."""
        if self._was_finished:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Make a new model, and drop what belongs to the last one."""
        self.average = None
        model = super().call_model_init(*args, **kwargs)
        self._evaluation = evaluation.EvaluationWeights(model)
        self._best_model_loaded = self._refused = False
        return model

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Search as upstream does; its default objective would add the metrics of `ewa_eval_raw`."""

        def objective(metrics: dict[str, float]) -> float:
            raw = evaluation.raw_twins(metrics, evaluation.metric_prefixes(self.eval_dataset))
            return default_compute_objective({k: v for k, v in metrics.items() if k not in raw})

        own = objective if self.args.ewa_eval_raw else None
        return super().hyperparameter_search(hp_space, compute_objective or own, *args, **kwargs)

    # ---- Evaluation ----

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Open a context in which the model holds the evaluation weights; its own come back bit for bit."""
        with self._evaluation.applied():
            yield

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the evaluation weights, and with `ewa_eval_raw` the training weights too."""
        if self.args.ewa_eval_raw:
            given = args[0] if args else kwargs.get("eval_dataset")
            evaluation.check_dataset_names(self.eval_dataset if given is None else given)
        outer, self._in_evaluate = self._in_evaluate, True
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._in_evaluate = outer

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate the evaluation weights, leaving weights and random state unchanged."""
        if not self._active:
            return super().evaluation_loop(*args, **kwargs)
        compatibility.check_evaluable(self)
        if self.average is not None and not self.average.started:
            logger.warning(f"There is no average yet ({self.average}): evaluating without it.")
        with_raw, self._in_evaluate = self.args.ewa_eval_raw and self._in_evaluate, False  # callbacks may predict
        if with_raw and (self._best_model_loaded or self._evaluation.inside):
            logger.warning("The model holds the evaluation weights here: the training weights are not evaluated.")
            with_raw = False
        return evaluation.evaluate_weights(self, super().evaluation_loop, *args, with_raw=with_raw, **kwargs)

    def _recalibrate_batch_norm(self) -> None:
        """Recalibrate with the same seeded training batches, for whatever weights the model holds."""
        batch_size = self._train_batch_size
        dataset: Any = self.train_dataset  # which has a length
        generator = torch.Generator().manual_seed(self.args.seed)
        count = self.args.recalibrate_batch_norm_batches * batch_size
        order = torch.randperm(len(dataset), generator=generator)[:count].tolist()
        if len(order) > batch_size:  # a last batch of one row has no variance
            order = order[: len(order) // batch_size * batch_size]
        loader = DataLoader(
            Subset(dataset, order),
            batch_size=batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="training"),
        )
        with preserved_random_state(self.args.seed), self.compute_loss_context_manager():
            with evaluation.collected_apart(self):
                batches = (self._prepare_inputs(batch) for batch in loader)
                recalibrate_batch_norm(self._bare_model, batches, forward=self.compute_loss)

    # ---- Saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the evaluation weights; inside a checkpoint the training weights, and the others beside them.

        Upstream's `_internal_call` is also set by `push_to_hub()`, so a session says whether this is a checkpoint.
        """
        if not self._active:
            super().save_model(output_dir, _internal_call)
        elif self._session is not None and self._session.staging and output_dir is not None:
            session.save_checkpoint_weights(self, Path(output_dir), stock=super().save_model)
            self.args.hub_strategy = HubStrategy.END  # so that upstream pushes nothing; restored by `session.saving`
        else:
            target = Path(str(output_dir or self.args.output_dir))
            session.save_evaluation_weights(self, target, stock=super().save_model)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @property
    def _tokenizer_to_save(self) -> Any:
        """What upstream saves beside a model."""
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        """Return the staging folder while a checkpoint is written."""
        run = super()._get_output_dir(*args, **kwargs)
        return os.path.join(run, storage.STAGING) if self._session is not None and self._session.staging else run

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Have upstream write the checkpoint into the staging folder, and commit it when it is complete."""
        if not self._active:
            session.remove_own_checkpoint(self)
            super()._save_checkpoint(*args, **kwargs)
            return
        with session.saving(self, at_root=True):
            super()._save_checkpoint(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Save what `save_strategy` does not know of: pins, a new best model, and the state after a SIGTERM."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._active:
            save = functools.partial(super()._save_checkpoint, self.model_wrapped, self._trial_of_run)
            session.save_what_is_missing(self, save)

    def _save_training_state(self, folder: Path) -> None:
        """Write optimizer, schedule, loss scale and random states, as upstream does without `save_only_model`."""
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))

    @property
    def _pinned_in(self) -> str | None:
        """The folder in which the state after the last step is kept permanently, or None."""
        if self._schedule is None or self.accelerator.optimizer_step_was_skipped:
            return None
        return self._schedule.pinned_at(self._scheduled_steps)

    # ---- Loading ----

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Read the training weights in any layout; upstream skips keys that files spell otherwise."""
        stock = functools.partial(super()._load_from_checkpoint, *args, **kwargs)
        if self._active and self._plan is not None:
            resume.load_training_weights(self, self._plan.checkpoint, stock)
        else:
            stock()

    def _load_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        """Load both in any layout, and refuse hyper-parameters that changed."""
        stock = functools.partial(super()._load_optimizer_and_scheduler, *args, **kwargs)
        if self._active and self._plan is not None:
            resume.load_optimizer_and_scheduler(self, self._plan.checkpoint, stock)
        else:
            stock()

    def _load_best_model(self, *args: Any, **kwargs: Any) -> None:
        """Leave the best evaluation weights in the model: upstream would load the training weights."""
        if not self._active:
            super()._load_best_model(*args, **kwargs)
            return
        resume.load_best_weights(self)
        self.average, self._best_model_loaded = None, True
        self._evaluation = evaluation.EvaluationWeights(self._bare_model, sharding=self._evaluation.sharding)

    # ---- Reporting ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add to a training loss how far back the average looks, in steps."""
        if "loss" in logs and self.average is not None and self.average.started:
            logs["ewa_half_life"] = self.average.half_life
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Add the method, the metrics of both kinds of weights and how to load them to upstream's card."""
        super().create_model_card(*args, **kwargs)
        if self._active:
            reporting.write_card_section(self)


class RAdamTrainer(RAdamTrainerMixin, Trainer):
    """`transformers.Trainer` with RAdamScheduleFree, WSD, WSD-S and EWA: see `RAdamTrainingArguments`."""

    def __init__(
        self, model: Any = None, args: RAdamTrainingArguments | None = None, *others: Any, **keywords: Any
    ) -> None:
        super().__init__(model, args or RAdamTrainingArguments(output_dir="tmp_trainer"), *others, **keywords)
