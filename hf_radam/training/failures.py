"""What is said of a checkpoint that could not be written: by the process whose disk failed, and by all the others.

A process that fails leaves the others in a collective operation that cannot end, and what ends it (a closed connection)
says nothing of the cause. So the cause is left in the store through which the group met, where the others look.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from hf_radam.checkpoints import storage

KEY = "hf_radam/failed save/{checkpoint}/{rank}"


class CheckpointSaveError(OSError):
    """A checkpoint that could not be written; every earlier one is as it was."""


def save_error(error: BaseException, checkpoint: Path) -> CheckpointSaveError | None:
    """The error that a failed save is reported with, if it was a disk that failed it: here or on another rank.

    Args:
        error: what was raised here.
        checkpoint: folder that the checkpoint would have had, in the folder of its run.
    """
    cause = _cause(error, checkpoint)
    if cause is None:
        return None
    return CheckpointSaveError(
        f"{checkpoint} could not be written: {cause}. Every earlier checkpoint is as it was: make room in the folder "
        "or make it writable, and go on with --resume_from_checkpoint true."
    )


def _cause(error: BaseException, checkpoint: Path) -> str | None:
    if isinstance(error, CheckpointException):  # torch's sharded saves tell every rank of what failed on any
        failed = {rank: failure for rank, (failure, _) in error.failures.items()}
        if not all(map(_of_disk, failed.values())):
            return None
        return "; ".join(f"rank {rank}: {failure}" for rank, failure in failed.items())
    if not _of_disk(error):
        return _left_by_another(checkpoint) if isinstance(error, RuntimeError) else None
    # Another's cause may be that of this error, too: a save that failed is removed while others still write to it.
    another = _left_by_another(checkpoint)
    if another is not None:
        return another
    cause = f"{error} ({storage.free_space(checkpoint.parent)})"
    _leave(cause, checkpoint)
    return cause


def _of_disk(error: BaseException) -> bool:
    """Whether an error is of a write that failed."""
    # Torch tells of one in a RuntimeError, by the file of its source that found it or as C++ does.
    of_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in ("inline_container", "iostream"))
    return isinstance(error, (OSError, SafetensorError)) or of_torch


def _store() -> dist.Store | None:
    """The store of the group, if there is one; torch has no public name for it."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.distributed_c10d._get_default_store() if several else None


def _leave(cause: str, checkpoint: Path) -> None:
    """Leave the cause for the others; where the process that keeps the store is gone, they learn nothing."""
    store = _store()
    if store is not None:
        with suppress(RuntimeError):
            store.set(KEY.format(checkpoint=checkpoint, rank=dist.get_rank()), cause)


def _left_by_another(checkpoint: Path) -> str | None:
    """What the first rank that left a cause says of it."""
    store = _store()
    if store is not None:
        with suppress(RuntimeError):
            for rank in range(dist.get_world_size()):
                key = KEY.format(checkpoint=checkpoint, rank=rank)
                if store.check([key]):
                    return f"rank {rank}: {store.get(key).decode()}"
    return None
