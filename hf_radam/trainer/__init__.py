"""The trainer: `RAdamTrainer`, and `RAdamTrainerMixin` for other subclasses of `transformers.Trainer`."""

from hf_radam.trainer.trainer import RAdamTrainer, RAdamTrainerMixin

__all__ = ["RAdamTrainer", "RAdamTrainerMixin"]
