"""Have wandb and DVCLive upload the evaluation weights as the final model, where they are asked to upload one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations.integration_utils import DVCLiveCallback, WandbCallback
from transformers.utils import logging

from hf_radam.training.backends import is_sharded_in_forward
from hf_radam.training.parts import PartsMixin

logger = logging.get_logger(__name__)


@contextmanager
def of_evaluation_weights(trainer: PartsMixin) -> Iterator[None]:
    """Context in which upstream's callbacks find the evaluation weights in the model when they upload the final one.

    At the end of training they save the model by a plain `Trainer`, and would upload the weights that train. Every
    process must be told the same (`WANDB_LOG_MODEL`). A sharded model is left to upstream, with a warning.
    """
    uploading = [callback for callback in trainer.callback_handler.callbacks if _uploads(callback)]
    if uploading and trainer._evaluation.source is not None and is_sharded_in_forward(trainer):
        logger.warning(
            f"{' and '.join(type(one).__name__ for one in uploading)} will not upload the evaluation weights of a "
            "sharded model: upload the folder that save_model() writes."
        )
        uploading = []
    before = [vars(callback).get("on_train_end") for callback in uploading]
    try:
        for callback in uploading:
            callback.on_train_end = _inside(trainer, callback.on_train_end)
        yield
    finally:
        for callback, own in zip(uploading, before, strict=True):
            del callback.on_train_end
            if own is not None:
                callback.on_train_end = own


def _uploads(callback: Any) -> bool:
    if isinstance(callback, WandbCallback):
        return bool(callback._log_model.is_enabled)
    return isinstance(callback, DVCLiveCallback) and callback._log_model is True


def _inside(trainer: PartsMixin, on_train_end: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **keywords: Any) -> Any:
        with trainer._evaluation.applied(exchange=True):
            return on_train_end(*args, **keywords)

    return inside
