"""The half of the trainer that saves and loads: training weights at a checkpoint's root, the others beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from hf_radam import __version__, checkpoint, manifest, resume
from hf_radam.averaging import WeightAverage
from hf_radam.evaluation import EvaluationWeights
from hf_radam.hub import push_evaluation_weights
from hf_radam.loading import evaluation_folder
from hf_radam.names import OptimizerName, SchedulerName
from hf_radam.optim import RAdamScheduleFree
from hf_radam.support import is_peft, is_schedule_free
from hf_radam.training_args import RAdamTrainingArguments

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.get_logger(__name__)


class CheckpointingMixin(_Base):
    """Overrides of `Trainer`'s saving and loading; `RAdamTrainerMixin` brings what they speak of.

    Attributes:
        average: the EWA, or None.
    """

    args: RAdamTrainingArguments
    average: WeightAverage | None
    _evaluation: EvaluationWeights
    _saving_checkpoint: bool = False
    _best_model_loaded: bool = False

    @property
    def _bare_model(self) -> nn.Module:
        """The model without wrappers: its parameter names have no prefix, and its tensors are the ones that train."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _bare_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper; None before training."""
        return self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer

    @property
    def _schedule_free(self) -> RAdamScheduleFree | None:
        """Our schedule-free optimizer, if that is what trains."""
        optimizer = self._bare_optimizer
        return optimizer if isinstance(optimizer, RAdamScheduleFree) else None

    @property
    def _active(self) -> bool:
        """Whether any of our methods is on; if not, every override steps aside."""
        return self.args.uses_hf_radam or is_schedule_free(self)

    @property
    def _optimizer_name(self) -> str:
        return "radam_schedulefree" if is_schedule_free(self) else OptimizerName(self.args.optim).value

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
            with self.evaluation_weights():
                super().save_model(output_dir, _internal_call)
            return
        assert output_dir is not None
        if self.args.should_save:
            checkpoint.discard_evaluation_weights(output_dir)
        super().save_model(output_dir, _internal_call)
        # What upstream's root gets, too
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        for name, weights in self._evaluation.folders():
            if self.args.should_save:
                folder = Path(output_dir, name)
                checkpoint.save_model_folder(folder, self._bare_model, weights, processing_class=tokenizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Mark the save as a checkpoint's, and write the manifest when every process has written its files."""
        with self._checkpoint_mark():
            super()._save_checkpoint(model, trial)
        if self._active:
            self.accelerator.wait_for_everyone()
            self._write_manifest(Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))

    def _tune_save_checkpoint(self, checkpoint_dir: str) -> None:
        """Mark the save as a checkpoint's here as well: a trial of Ray resumes from it."""
        with self._checkpoint_mark():
            super()._tune_save_checkpoint(checkpoint_dir)
        if self._active:
            self._write_manifest(Path(checkpoint_dir, f"checkpoint-{self.state.global_step}"))

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

    def _write_manifest(self, folder: Path) -> None:
        if not self.args.should_save:
            return
        schedule = self.args.schedule(self.state.max_steps)
        content = {
            "hf_radam_version": __version__,
            "method": {
                "optim": self._optimizer_name,
                "lr_scheduler_type": SchedulerName(self.args.lr_scheduler_type).value,
                "ewa": self.args.ewa,
            },
            "global_step": self.state.global_step,
            "learning_rate": self.args.learning_rate,
            "weight_decay": self.args.weight_decay,
            "schedule": None if schedule is None else dict(schedule.keywords),
            "schedule_step": getattr(self.lr_scheduler, "last_epoch", None),
            "averaging": manifest.describe_average(self.average, requested_start_step=self.args.ewa_start_step),
            "evaluation": {"folder": self._evaluation.source, **manifest.parameter_dtypes(self._bare_model)},
        }
        manifest.write_manifest(folder, content)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the evaluation weights as the model: upstream copies the checkpoint's root, the training weights."""
        if not self._active:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        self._write_manifest(Path(checkpoint_folder))
        push_evaluation_weights(self, checkpoint_folder, push_model=super()._push_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the training weights as `from_pretrained` does: upstream silently skips keys that files spell otherwise.

        Remove when upstream's resume goes through its weight conversion (not so in transformers 5.23).
        """
        if self._active and model is None and isinstance(self._bare_model, PreTrainedModel):
            resume.check_checkpoint(resume_from_checkpoint)
            checkpoint.load_weights(self._bare_model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both as upstream does, and refuse what it would let pass: see `hf_radam.resume`."""
        if checkpoint is None or not self._active:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.lr_scheduler is not None
        resume.check_state_files(checkpoint)
        with resume.same_optimizer(self._bare_optimizer, name=self._optimizer_name, checkpoint=checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if isinstance(self.lr_scheduler, LambdaLR):
            resume.check_same_learning_rate(self.lr_scheduler, checkpoint=checkpoint)

    def _load_best_model(self) -> None:
        """Leave the best evaluation weights in the model: upstream would load the checkpoint's training weights."""
        if not self._active or is_peft(self._bare_model):  # adapters are refused where evaluation has its own weights
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        assert best is not None, "upstream asks only after a best checkpoint was saved"
        logger.info(f"Loading the evaluation weights of {best} (score: {self.state.best_metric}).")
        checkpoint.load_weights(self._bare_model, evaluation_folder(best))
        if self._schedule_free is not None:
            self._schedule_free.forget_training_weights()
        self.average = None
        self._evaluation = EvaluationWeights(self._bare_model)
        self._best_model_loaded = True
