"""Upstream's just-in-time checkpoint (`enable_jit_checkpoint`: save after a SIGTERM), moved between two updates.

Upstream saves where the request finds it: before the optimizer's step, with the gradients of that update lost, or after
the next batches were drawn. A run resumed from there is not the run that was stopped. Here its callback only keeps the
request, and the trainer saves when the update is complete.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class SaveBetweenUpdates(JITCheckpointCallback):
    """Upstream's callback with its signal handler, and without its saves."""

    @classmethod
    def install(cls, trainer: Any) -> None:
        """Take the place of upstream's callback in a trainer, if it has one; the signal handler stays the one set."""
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback) is JITCheckpointCallback:
                trainer.remove_callback(callback)
                ours = cls()
                ours.trainer, ours.jit_manager = trainer, callback.jit_manager
                trainer.add_callback(ours)

    @classmethod
    def take_request(cls, trainer: Any) -> bool:
        """Whether to save now and stop, because a SIGTERM reached any of the processes; once for each. All must ask."""
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, cls) and callback.jit_manager is not None:
                asked = callback.jit_manager.is_checkpoint_requested
                if trainer.args.world_size > 1:
                    flag = torch.tensor(int(asked), device=trainer.args.device)
                    dist.all_reduce(flag, dist.ReduceOp.MAX)
                    asked = bool(flag.item())
                callback.jit_manager.is_checkpoint_requested = False
                return bool(asked)
        return False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing yet: the gradients are not in the weights."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing: the batches of this update were drawn already."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing: the trainer saves after it has evaluated."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing: the trainer saves after it has evaluated."""
