"""The half of the trainer that resumes: which checkpoint, what it must agree with, and what is loaded from it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from hf_radam.averaging import WeightAverage
from hf_radam.checkpoints import optimizer_state, peft, storage, weights
from hf_radam.checkpoints.extension import Extension, extend, schedule_of
from hf_radam.checkpoints.layouts import FSDP_FULL, FSDP_SHARDED, SCHEDULER_NAME, Layout, layout_of
from hf_radam.checkpoints.manifest import CheckpointError, read_manifest
from hf_radam.checkpoints.runs import (
    PREFIX,
    check_resumable,
    list_checkpoints,
    newest_checkpoint,
    run_of,
    step_of,
)
from hf_radam.checkpoints.verify import VerifyFn, evaluation_folder
from hf_radam.checkpoints.weights import load_model_shards
from hf_radam.schedules import SchedulePast
from hf_radam.sharding import find_sharding
from hf_radam.training import resume_checks
from hf_radam.training.agreement import check_agreement
from hf_radam.training.backends import is_sharded
from hf_radam.training.evaluation import EvaluationWeights
from hf_radam.training.parts import PartsMixin
from hf_radam.training.shared_folder import check_shared_folder
from hf_radam.training.verification import decide_on_rank0
from hf_radam.training_args import HorizonError

logger = logging.get_logger(__name__)


class ResumingMixin(PartsMixin):
    """Overrides of `Trainer`'s resuming and loading; `RAdamTrainerMixin` brings what they speak of."""

    _extension: Extension | None = None
    _refused: bool = False
    _planned: Sequence[dict[str, Any]] = ()
    """Hyper-parameters of each group of the optimizer, as the arguments made them."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Choose the checkpoint to go on from, whole and verified: upstream takes the one with the highest number.

        Raises:
            ValueError: on every process, if they were started with different flags, models or data.
            CheckpointError: if the checkpoint named is damaged, or there is none to go on from.
        """
        # Before anything else: a process on which our methods are off would not look for a checkpoint with the others.
        check_agreement(self, resume_from_checkpoint=resume_from_checkpoint)
        self._extension = self._past = None
        if self._refused and self.model_init is None:
            raise RuntimeError(
                "This trainer has loaded parts of a checkpoint that was then refused: make a new trainer and model."
            )
        if self._active:
            check_shared_folder(self.args)
            resume_from_checkpoint = self._chosen(resume_from_checkpoint)
            if resume_from_checkpoint is not None:
                self._check_backend(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except (CheckpointError, HorizonError):
            self._refused = resume_from_checkpoint is not None
            raise

    # ---- Which checkpoint ----

    def _chosen(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to go on from, or None to begin; the first process looks, and all go by what it finds."""
        if isinstance(wanted, str) and wanted.lower() in ("true", "false"):  # as the field of the arguments has it
            wanted = wanted.lower() == "true"
        if self.args.extend_from is not None:
            if isinstance(wanted, str):
                raise ValueError(
                    f"extend_from={self.args.extend_from} and resume_from_checkpoint={wanted} both say where to go on "
                    "from: drop one."
                )
            self._extension = decide_on_rank0(self._extended)
            self._past = self._extension.past
            if self.is_world_process_zero():
                print(self._extension.words)
            return str(self._extension.checkpoint)
        if wanted is None or wanted is False:
            self._warn_of_earlier_run()
            return None
        chosen: str = decide_on_rank0(self._newest if wanted is True else functools.partial(self._named, str(wanted)))
        resumed = read_manifest(chosen)
        if resumed is not None:
            self._past = SchedulePast(resumed["schedule_step"], schedule_of(resumed))
        return chosen

    def _warn_of_earlier_run(self) -> None:
        """Say so where a new run begins in the folder of another: its checkpoints stay, and may have higher numbers."""
        found = list_checkpoints(str(self.args.output_dir))
        if found and self.is_world_process_zero():
            logger.warning(
                f"{found[0].path} is of an earlier run. This one begins anew, and resume_from_checkpoint=True goes on "
                "from the highest number, whichever run wrote it: give each run a folder of its own."
            )

    def _extended(self, verify_fn: VerifyFn) -> Extension:
        storage.recover_interrupted_save(Path(str(self.args.output_dir)))
        return extend(self.args, verify_fn=verify_fn)

    def _newest(self, verify_fn: VerifyFn) -> str:
        run = Path(str(self.args.output_dir))
        storage.recover_interrupted_save(run)
        place = newest_checkpoint(run, functools.partial(check_resumable, verify_fn=verify_fn))
        if place is None:
            raise CheckpointError(
                f"There is no whole checkpoint in {run} to resume from: leave resume_from_checkpoint out to begin."
            )
        return str(place.path)

    def _named(self, path: str, verify_fn: VerifyFn) -> str:
        resume_checks.check_checkpoint(path, verify_fn=verify_fn)
        later = list_checkpoints(str(self.args.output_dir))[:1]
        if later and later[0].step > (step_of(path) or later[0].step):
            logger.warning(
                f"{later[0].path} is later than {path}, from which this run goes on. It stays until it is written "
                "again, and resume_from_checkpoint=True would take it: remove it, or write to another output_dir."
            )
        return path

    def _check_backend(self, checkpoint: str) -> None:
        processes = self.args.world_size
        stage = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None
        resume_checks.check_deepspeed(checkpoint, stage=stage, processes=processes)
        if self.is_world_process_zero():
            resume_checks.warn_of_move(checkpoint, processes=processes)

    # ---- What is loaded ----

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Note what the arguments ask of the optimizer: upstream loads what was saved over it soon after.

        DeepSpeed's state is loaded before `_load_optimizer_and_scheduler` is called.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._bare_optimizer is not None:
            self._planned = resume_checks.hyperparameters(self._bare_optimizer.param_groups)
        return scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the training weights as `from_pretrained` does: upstream silently skips keys that files spell otherwise.

        Remove when upstream's resume goes through its weight conversion (not so in transformers 5.23). It also refuses
        weights in a layout that is not the one it would write now.
        """
        bare, layout = self._bare_model, layout_of(resume_from_checkpoint)
        if not self._active:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif (
            self.is_fsdp_enabled and layout.fsdp_weights and Path(resume_from_checkpoint, layout.fsdp_weights).exists()
        ):
            with self._fsdp_as_in(layout):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.is_fsdp_enabled or layout is FSDP_SHARDED:
            load_model_shards(Path(resume_from_checkpoint), bare, find_sharding(bare, device=self.args.device))
        elif isinstance(bare, PreTrainedModel) or peft.is_on_its_own(bare) or layout is FSDP_FULL:
            weights.load_weights(bare, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @contextmanager
    def _fsdp_as_in(self, layout: Layout) -> Iterator[None]:
        """Context in which upstream's FSDP reads a layout of its own, whichever of the two this run writes."""
        plugin = self.accelerator.state.fsdp_plugin
        with optimizer_state.fsdp_state_dict_type(plugin, layout, world_size=self.args.world_size):
            yield

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both as upstream does, and refuse what it would let pass: see `hf_radam.training.resume_checks`."""
        if checkpoint is None or not self._active:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.lr_scheduler is not None
        bare, layout = self._bare_optimizer, layout_of(checkpoint)
        resume_checks.check_same_optimizer(
            [*self._planned], bare.param_groups, name=self._optimizer_name, checkpoint=checkpoint
        )
        if self.is_fsdp_enabled and layout in (FSDP_FULL, FSDP_SHARDED):
            optimizer_state.allow_a_first_step(bare)
            with self._fsdp_as_in(layout):
                super()._load_optimizer_and_scheduler(checkpoint)
        elif layout in (FSDP_FULL, FSDP_SHARDED) or self.is_fsdp_enabled:
            optimizer_state.load_optimizer(bare, self._bare_model, checkpoint)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if not isinstance(self.lr_scheduler, LambdaLR):
            return
        if self._extension is not None and self._extension.leaves_decay:
            resume_checks.set_learning_rate(self.lr_scheduler)
        else:
            resume_checks.check_same_learning_rate(
                self.lr_scheduler, checkpoint=checkpoint, total_steps=self.state.max_steps
            )

    def _go_on_from(self, average: WeightAverage | None, train_dataloader: Any, checkpoint: str) -> None:
        """Check the place in the data, restore the average, and keep the checkpoint if it is one that is pinned."""
        if not self.args.ignore_data_skip and self.state.global_step < self.state.max_steps:
            resume_checks.check_data(self.state, train_dataloader, checkpoint=checkpoint)
            if self.is_world_process_zero():
                accumulation = self.args.gradient_accumulation_steps
                resume_checks.warn_of_other_place(
                    self.state, train_dataloader, accumulation=accumulation, checkpoint=checkpoint
                )
        if average is None:
            resume_checks.warn_of_dropped_average(checkpoint)
        else:
            step = self.state.global_step
            resume_checks.restore_average(average, self._bare_model, checkpoint=checkpoint, step=step)
        self._find_best(Path(checkpoint))
        if self._extension is not None:
            self._extended_from = self._extension.identity
        else:
            self._extended_from = (read_manifest(checkpoint) or {}).get("extended_from")
        self._keep_pinned(Path(checkpoint))

    def _find_best(self, checkpoint: Path) -> None:
        """Look for the best checkpoint beside the one resumed: upstream forgets it where the run has moved."""
        best = run_of(checkpoint) / f"{PREFIX}{self.state.best_global_step}"
        if self.state.best_model_checkpoint is None and self.state.best_global_step:
            if decide_on_rank0(lambda verify_fn: best.is_dir()):
                self.state.best_model_checkpoint = str(best)

    def _keep_pinned(self, checkpoint: Path) -> None:
        """Pin the checkpoint that is gone on from where this run would have pinned it and has not."""
        schedule = self.args.schedule(self.state.max_steps, self._past)
        folder = None if schedule is None else schedule.pinned_at(self._updates_scheduled())
        if folder is None:
            return
        run, place = Path(str(self.args.output_dir)), Path(folder, f"{PREFIX}{self.state.global_step}")

        def keep(verify_fn: VerifyFn) -> None:
            there = (run / place).exists()
            if there and ((run / place).samefile(checkpoint) or not verify_fn(run / place)):
                return
            storage.recover_interrupted_save(run)
            storage.link_tree(checkpoint, run / storage.STAGING / place)
            storage.commit(run, place)
            storage.remove_staging(run)

        decide_on_rank0(keep)

    def _load_best_model(self) -> None:
        """Leave the best evaluation weights in the model: upstream would load the checkpoint's training weights."""
        if not self._active:
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        assert best is not None, "upstream asks only after a best checkpoint was saved"
        logger.info(f"Loading the evaluation weights of {best} (score: {self.state.best_metric}).")
        folder: Path = decide_on_rank0(lambda verify_fn: evaluation_folder(best, verify_fn=verify_fn))
        if is_sharded(self):
            load_model_shards(folder, self._bare_model, self._evaluation.sharding)
        else:
            weights.load_weights(self._bare_model, folder)
        if self._schedule_free is not None:
            self._schedule_free.forget_training_weights()
        self.average = None
        self._evaluation = EvaluationWeights(self._bare_model, sharding=self._evaluation.sharding)
        self._best_model_loaded = True
