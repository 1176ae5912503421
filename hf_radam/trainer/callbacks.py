"""Callbacks that give the trainer its timing: before and after each step, at the start and end, and after a SIGTERM."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_radam.trainer import reporting


class FirstCallback(TrainerCallback):
    """Runs before every other callback: completes the preparation of training, and finishes copies that are pending."""

    limit: int | None = None  # `save_total_limit`, while it is off

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare averaging and evaluation, now that model and optimizer are prepared and loaded."""
        self.trainer._begin_training()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the weights copied to an average in host memory before they change."""
        if self.trainer.average is not None:
            self.trainer.average.wait_for_copies()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the last checkpoint: with a limit of 1 upstream's end of training removes all but the best."""
        if logs and "train_runtime" in logs and self.trainer._active:
            self.limit, args.save_total_limit = args.save_total_limit, None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the average, and have loggers upload the evaluation weights as the final model."""
        if self.limit is not None:
            self.limit, args.save_total_limit = None, self.limit
        if self.trainer.average is not None:
            self.trainer.average.finish()
        if reporting.uploads_final_model(self.trainer):
            self.trainer._final_upload.enter_context(self.trainer._evaluation.applied(exchange=True))


class LastCallback(TrainerCallback):
    """Runs after every other callback, so that what they write to the new weights is averaged."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average the weights after a step that was not skipped; `global_step` is advanced after this event."""
        trainer = self.trainer
        if trainer.accelerator.optimizer_step_was_skipped:
            return
        trainer._evaluation.forget_statistics()
        if trainer.average is not None:
            # DeepSpeed steps before on_pre_optimizer_step.
            trainer.average.update(state.global_step + 1, overlap=not trainer.is_deepspeed_enabled)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do nothing more in a run that was finished before: strategies of `epoch` would evaluate and save again."""
        if self.trainer._was_finished:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the training weights back."""
        self.trainer._final_upload.close()


class SigtermCallback(TrainerCallback):
    """Saves a checkpoint after a SIGTERM at the end of the step, and stops (`enable_jit_checkpoint`).

    Upstream's callback saves where it finds the request: before the optimizer's step, or after the next batches were
    drawn. A run resumed from there differs from the uninterrupted one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Handle SIGTERM from now on."""
        if threading.current_thread() is threading.main_thread():
            self.requested = False
            self._previous = signal.signal(signal.SIGTERM, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True  # never reset while training, so that no request is lost

    def release(self) -> None:
        """Give SIGTERM back to its former handler."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def is_requested(self, args: Any) -> bool:
        """Return whether a SIGTERM reached any rank; collective."""
        if args.world_size == 1:
            return self.requested
        flag = torch.tensor(int(self.requested), device=args.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


def replace_jit_callback(trainer: Any) -> SigtermCallback | None:
    """Replace upstream's callback for SIGTERM, whose timer thread sets a flag that it also resets."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) is JITCheckpointCallback and callback.jit_manager is not None:
            trainer.remove_callback(callback)
            signal.signal(signal.SIGTERM, callback.jit_manager._original_sigterm_handler or signal.SIG_DFL)
            own = SigtermCallback()
            trainer.add_callback(own)
            return own
    return None


def install_callbacks(trainer: Any) -> None:
    """Put `FirstCallback` first and `LastCallback` last; upstream appends callbacks that it restores."""
    callbacks = trainer.callback_handler.callbacks
    first = next((one for one in callbacks if isinstance(one, FirstCallback) and one.trainer is trainer), None)
    last = next((one for one in callbacks if isinstance(one, LastCallback) and one.trainer is trainer), None)
    if first is None:
        callbacks.insert(0, FirstCallback(trainer))
    if last is not None:
        callbacks.remove(last)
    callbacks.append(last or LastCallback(trainer))
