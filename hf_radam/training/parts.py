"""What the halves of the trainer have in common: the bare model and optimizer behind the wrappers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer

from hf_radam.averaging import WeightAverage
from hf_radam.names import OptimizerName
from hf_radam.optim import RAdamScheduleFree
from hf_radam.schedules import SchedulePast
from hf_radam.training.evaluation import EvaluationWeights
from hf_radam.training.support import is_schedule_free
from hf_radam.training_args import RAdamTrainingArguments

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class PartsMixin(_Base):
    """Attributes of a trainer of ours, and what stands behind the wrappers around them.

    Attributes:
        average: the EWA, or None.
    """

    args: RAdamTrainingArguments
    average: WeightAverage | None
    _evaluation: EvaluationWeights
    _best_model_loaded: bool = False
    _past: SchedulePast | None = None
    """What a resumed or extended run keeps of the schedule that it followed so far."""
    _extended_from: str | None = None
    """What identifies the checkpoint of another run that this one, or the one it resumes, was extended from."""

    @property
    def _bare_model(self) -> nn.Module:
        """The model without wrappers: its parameter names have no prefix, and its tensors are the ones that train."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _bare_optimizer(self) -> Any:
        """The optimizer without the wrappers of accelerate and DeepSpeed; None before training."""
        optimizer: Any = self.optimizer
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
            while self.is_deepspeed_enabled and hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer
        return optimizer

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

    def _updates_scheduled(self) -> int:
        """Updates that the schedule has counted: those of the optimizer, without skipped ones."""
        return int(getattr(self.lr_scheduler, "last_epoch", self.state.global_step))
