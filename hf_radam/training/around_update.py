"""What the average must know of each update: that it comes, and that it was made."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_radam.training.parts import PartsMixin


def tell_of_updates(trainer: PartsMixin) -> None:
    """Have a trainer's average told of its updates, once for each trainer."""
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(callback, AfterUpdate) and callback.trainer is trainer for callback in callbacks):
        return
    callbacks.insert(0, BeforeUpdate(trainer))
    trainer.add_callback(AfterUpdate(trainer))


class BeforeUpdate(TrainerCallback):
    """Tells the trainer's average that weights will be written to. Comes first: a user's callback may do that, too."""

    def __init__(self, trainer: PartsMixin):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the weights copied before they change, if they are being copied."""
        if self.trainer.average is not None:
            self.trainer.average.wait_for_copies()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave nothing under way."""
        if self.trainer.average is not None:
            self.trainer.average.finish()


class AfterUpdate(TrainerCallback):
    """Tells the trainer's average, and what depends on the weights, of every optimizer step that was not skipped.

    Comes last: what a user's callback does to the new weights is averaged.
    """

    def __init__(self, trainer: PartsMixin):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average the update just made; `global_step` is advanced after this event, so it has the next number."""
        if self.trainer.accelerator.optimizer_step_was_skipped:
            return
        self.trainer._evaluation.forget_statistics()
        if self.trainer.average is not None:
            # DeepSpeed makes its updates before on_pre_optimizer_step.
            self.trainer.average.update(state.global_step + 1, overlap=not self.trainer.is_deepspeed_enabled)
