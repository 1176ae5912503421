"""The half of the trainer that saves: training weights at a checkpoint's root, the others beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import logging

from hf_radam import __version__
from hf_radam.checkpoints import manifest, peft, storage
from hf_radam.checkpoints.runs import PREFIX, rotate
from hf_radam.checkpoints.weights import parameter_dtypes
from hf_radam.names import SchedulerName
from hf_radam.sharding.base import all_gather_object
from hf_radam.training.backends import is_sharded
from hf_radam.training.card import renew_our_part
from hf_radam.training.failures import save_error
from hf_radam.training.final_uploads import of_evaluation_weights
from hf_radam.training.folders import FoldersMixin
from hf_radam.training.hub import push_evaluation_weights
from hf_radam.training.just_in_time import SaveBetweenUpdates

logger = logging.get_logger(__name__)


class SavingMixin(FoldersMixin):
    """Overrides of `Trainer`'s saving; `RAdamTrainerMixin` brings what they speak of."""

    _saving_checkpoint: bool = False
    _uploads: Mapping[Path, Future[Any]] = MappingProxyType({})
    _hasher: storage.FileHasher | None = None
    _last_saved: tuple[int, bool] | None = None
    """Update of the last save, and whether it is at the run's root or only pinned."""

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Context in which `trainer.model` holds the evaluation weights; the training weights come back bit for bit."""
        with self._evaluation.applied():
            yield

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the evaluation weights; inside a checkpoint the training weights, and the others beside them.

        Upstream's `_internal_call` is also set by `push_to_hub()`, so checkpoints have a mark of their own.
        """
        if not self._saving_checkpoint:
            target = self.args.output_dir if output_dir is None else output_dir
            if self._active and target is not None and Path(target, manifest.MANIFEST_NAME).is_file():
                raise ValueError(
                    f"save_model({target!r}) would overwrite the training weights of that checkpoint with evaluation "
                    "weights: save to another folder. (The checkpoint holds both.)"
                )
            with self._evaluation.applied(exchange=True):
                gathered = self._active and is_sharded(self)
                if gathered:
                    self._save_gathered(Path(str(target)))
                else:
                    super().save_model(output_dir, _internal_call)
            if target is not None and Path(target) == Path(str(self.args.output_dir)):
                renew_our_part(self)
            if gathered and self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            return
        assert output_dir is not None
        if self._active and is_sharded(self):
            self._save_root(Path(output_dir))
        else:
            super().save_model(output_dir, _internal_call)
        self._seal_weights(output_dir)
        for _ in self._save_beside(Path(output_dir)):
            self._seal_weights(output_dir)

    def _seal_weights(self, folder: str) -> None:
        """Flush the weights written so far, and take their checksums, while what comes after them is written."""
        if self.args.should_save:
            if self._hasher is None or self._hasher.folder != Path(folder):
                self._hasher = storage.FileHasher(Path(folder))
            self._hasher.submit(Path(folder).rglob("*.safetensors"))

    # ---- When ----

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Save what `save_strategy` does not know of: what is pinned, and the state after a SIGTERM."""
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )
        if not self._active:
            return
        step = self.state.global_step
        unsaved = self._last_saved != (step, True)
        if SaveBetweenUpdates.take_request(self):
            self.control.should_training_stop = True
            if unsaved:
                self._write_checkpoint(model, trial, at_root=True, whole=True)
        elif self.args.load_best_model_at_end and self.state.best_global_step == step and unsaved:
            # Evaluated more often than saved: the best would have no checkpoint to be loaded from.
            self._write_checkpoint(model, trial, at_root=True)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        elif self._pinned_in() is not None and (self._last_saved is None or self._last_saved[0] != step):
            self._write_checkpoint(model, trial, at_root=False)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        """Keep the last checkpoint, to go on from, and have the evaluation weights uploaded as the final model.

        With a limit of 1 upstream now removes all checkpoints but the best.
        """
        limit = self.args.save_total_limit
        if self._active:
            self.args.save_total_limit = None
        try:
            with of_evaluation_weights(self):
                output = super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit
        renew_our_part(self)  # the best model may have been loaded
        return output

    def _pinned_in(self) -> str | None:
        """The folder in which the state after the update just made is kept for good, if it is."""
        schedule = self.args.schedule(self.state.max_steps, self._past)
        if schedule is None or self.accelerator.optimizer_step_was_skipped:
            return None
        return schedule.pinned_at(self._updates_scheduled())

    # ---- Where and how ----

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is written, the place where it is staged."""
        run = super()._get_output_dir(trial)
        return os.path.join(run, storage.STAGING) if self._saving_checkpoint else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Have upstream write the checkpoint aside, and rename it into place when it is whole and on the disk."""
        if self._active:
            self._write_checkpoint(model, trial, at_root=True)
            return
        run, name = Path(self._get_output_dir(trial)), f"{PREFIX}{self.state.global_step}"
        if self.args.should_save and manifest.has_hf_radam_files(run / name):
            storage.remove(run, run / name)  # upstream would write between our files
        super()._save_checkpoint(model, trial)

    def _write_checkpoint(self, model: nn.Module, trial: Any, *, at_root: bool, whole: bool = False) -> None:
        """Write the state after the last update: at the run's root, and where it is pinned.

        What is pinned, or asked to be `whole`, has its optimizer, whatever `save_only_model` says: to be gone on from
        is what it is kept for.
        """
        run, step = Path(self._get_output_dir(trial)), self.state.global_step
        name = f"{PREFIX}{step}"
        pin = self._pinned_in()
        places = [Path(pin, name)] if pin else []
        places += [Path(name)] if at_root else []
        best_before = self.state.best_model_checkpoint
        self._mark_state()
        try:
            with self._checkpoint_mark(), self._with_optimizer(whole or pin is not None):
                if self.args.should_save:
                    storage.recover_interrupted_save(run)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
            self._correct_best(run, best_before, written=step if at_root else None)
            sealed = self._sealed_by_others(run / storage.STAGING / name)
            if self.args.should_save:
                self._publish(run, name, places, sealed)
        except BaseException as error:
            self.state.best_model_checkpoint = best_before
            self._abandon(run, name, error)
            raise
        self.accelerator.wait_for_everyone()
        self._last_saved = (step, at_root)
        pushed = at_root and self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END
        renew_our_part(self, model_follows=pushed)  # the push puts a model beside the card first
        if at_root:
            self._push_and_rotate(run, run / name)

    @contextmanager
    def _with_optimizer(self, wanted: bool) -> Iterator[None]:
        only_model = self.args.save_only_model
        self.args.save_only_model = only_model and not wanted
        try:
            yield
        finally:
            self.args.save_only_model = only_model

    def _correct_best(self, run: Path, before: str | None, *, written: int | None) -> None:
        """Let the state name the best checkpoint by its name in the run: upstream looked where this one is staged."""
        best = self.state.best_global_step
        self.state.best_model_checkpoint = str(run / f"{PREFIX}{best}") if best and best == written else before

    def _sealed_by_others(self, folder: Path) -> dict[str, tuple[int, str]]:
        """Have every process but the first seal the files that bear its number: one would take long over all."""
        if self.args.world_size == 1:
            return {}
        index, own = self.args.process_index, {}
        if index > 0:
            own = storage.FileHasher(folder).finish(only=lambda file: storage.rank_of(file) == index)
        return {name: facts for each in all_gather_object(own) for name, facts in each.items()}

    def _publish(self, run: Path, name: str, places: list[Path], sealed: Mapping[str, tuple[int, str]]) -> None:
        """Complete the staged checkpoint and give it its places; the files are stored once."""
        staging = run / storage.STAGING
        self.state.save_to_json(str(staging / name / manifest.TRAINER_STATE_NAME))
        self._write_manifest(staging / name, sealed)
        for place in places:
            if staging / place != staging / name:
                storage.link_tree(staging / name, staging / place)
        for place in places:
            storage.commit(run, place)
        storage.remove_staging(run)

    def _abandon(self, run: Path, name: str, error: BaseException) -> None:
        """Remove what a failed save left, and say what to do if it was the disk that failed it.

        What another process is still writing just then stays aside until the run goes on, when all of it is removed.
        """
        if self._hasher is not None:
            self._hasher.abort()
            self._hasher = None
        of_disk = save_error(error, run / name)  # first, so that others hear of it before they miss what is removed
        if self.args.should_save:
            with suppress(OSError):
                storage.recover_interrupted_save(run)
        if of_disk is not None:
            raise of_disk from error

    def _push_and_rotate(self, run: Path, written: Path) -> None:
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(written))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            uploading = [folder for folder, job in self._uploads.items() if not job.done()]
            protected = {written, *([Path(best)] if best else []), *uploading}
            rotate(run, self.args.save_total_limit, protected=protected)

    def _tune_save_checkpoint(self, checkpoint_dir: str) -> None:
        """Mark the save as a checkpoint's here as well: a trial of Ray resumes from it, and Ray moves it when whole."""
        if self._active:
            self._mark_state()
        with self._checkpoint_mark():
            super()._tune_save_checkpoint(checkpoint_dir)
        if self._active and self.args.should_save:
            self._write_manifest(Path(checkpoint_dir, f"{PREFIX}{self.state.global_step}"))

    def _mark_state(self) -> None:
        states: Any = self.state.stateful_callbacks  # upstream's type is that of the argument it is made from
        states[manifest.MARK] = manifest.mark(self.state.global_step)

    @contextmanager
    def _checkpoint_mark(self) -> Iterator[None]:
        if self._evaluation.inside:
            raise RuntimeError(
                "The model holds the evaluation weights here (evaluation_weights()), and a checkpoint's root must hold "
                "those that train: save the checkpoint outside."
            )
        self._saving_checkpoint = True
        try:
            yield
        finally:
            self._saving_checkpoint = False

    def _write_manifest(self, folder: Path, sealed: Mapping[str, tuple[int, str]] = storage.NOTHING) -> None:
        schedule = self.args.schedule(self.state.max_steps, self._past)
        source = self._evaluation.source
        content = {
            "hf_radam_version": __version__,
            "method": {
                "optim": self._optimizer_name,
                "lr_scheduler_type": SchedulerName(self.args.lr_scheduler_type).value,
                "ewa": self.args.ewa,
            },
            "global_step": self.state.global_step,
            "max_steps": self.state.max_steps,
            "learning_rate": self.args.learning_rate,
            "weight_decay": self.args.weight_decay,
            "warmup_steps": self.args.resolve_warmup_steps(self.state.max_steps, self._past),
            "schedule": None if schedule is None else schedule.to_dict(),
            "schedule_step": self._updates_scheduled(),
            "extended_from": self._extended_from,
            "averaging": self._describe_average(),
            "evaluation": {
                "folder": source and peft.evaluation_subfolder(source, self._bare_model),
                **parameter_dtypes(self._bare_model),
            },
        }
        manifest.write_manifest(folder, content, hasher=self._hasher, known=sealed)
        self._hasher = None

    def _describe_average(self) -> dict[str, Any] | None:
        """Window and counters of the average, and the `ewa_start_step` that was asked for (it may have begun later)."""
        average = self.average
        if average is None:
            return None
        window = {"decay": average.decay, "half_life_ratio": average.half_life_ratio, "every": average.every}
        return {**window, "requested_start_step": self.args.ewa_start_step, **average.counters()}

    # ---- Hub ----

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the evaluation weights as the model: upstream copies the checkpoint's root, the training weights.

        Upstream calls this before the checkpoint has its place; then it is put off.
        """
        if not self._active:
            super()._push_from_checkpoint(checkpoint_folder)
        elif not self._saving_checkpoint:
            upload = push_evaluation_weights(self, checkpoint_folder, push_model=super()._push_from_checkpoint)
            if upload is not None:
                under_way = {folder: job for folder, job in self._uploads.items() if not job.done()}
                self._uploads = under_way | {Path(checkpoint_folder): upload}
