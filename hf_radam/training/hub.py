"""Push what ships while training: the evaluation weights as the model, whole checkpoints as they are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from hf_radam.checkpoints.storage import STAGING, remove_staging


def push_evaluation_weights(trainer: Any, checkpoint: str, *, push_model: Callable[[str], None]) -> Future[Any] | None:
    """Push the evaluation weights as the model, then the checkpoint as it is where `hub_strategy` asks for it.

    Every process calls it; only the first one pushes, in the background.

    Args:
        trainer: the trainer that has just written `checkpoint`.
        checkpoint: the checkpoint's folder.
        push_model: upstream's push, which takes the model from the folder it is given. It would also send that folder
            as the checkpoint, so it runs under a strategy that sends the model alone.

    Returns:
        The upload of the checkpoint, which reads its files until it is done; None if there is none.
    """
    args = trainer.args
    strategy = args.hub_strategy
    if strategy == HubStrategy.END:
        return None
    with_checkpoint = strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
    busy = trainer.is_world_process_zero() and _busy(trainer)
    staging = Path(args.output_dir, STAGING, "push")
    trainer.save_model(str(staging), _internal_call=True)
    if with_checkpoint:
        args.hub_strategy = HubStrategy.EVERY_SAVE
    try:
        push_model(str(staging))
    finally:
        args.hub_strategy = strategy
        if args.should_save:
            remove_staging(Path(args.output_dir))
    if with_checkpoint and not busy and trainer.is_world_process_zero():
        return _push_checkpoint(trainer, Path(checkpoint))
    return None


def _busy(trainer: Any) -> bool:
    """Whether upstream skips this push because the last one is still under way."""
    last = trainer.push_in_progress
    return not trainer.args.hub_always_push and last is not None and not last.is_done()


def _push_checkpoint(trainer: Any, checkpoint: Path) -> Future[Any]:
    args = trainer.args
    job = HfApi().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=checkpoint,
        path_in_repo="last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name,
        commit_message=f"Training in progress, step {trainer.state.global_step}, checkpoint",
        token=args.hub_token,
        run_as_future=True,
        revision=args.hub_revision,
    )
    trainer.push_in_progress.jobs.append(job)
    return job
