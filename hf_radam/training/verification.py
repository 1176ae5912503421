"""Decide on the first process which checkpoint is gone on from, while every process takes the sha256 of its share.

One process would take minutes over a large model's checkpoint, for which all the others wait. Processes that see the
same folder share its files; where machines have copies of their own, each copy is verified whole.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from hf_radam.checkpoints.manifest import MANIFEST_NAME, CheckpointError, PathLike
from hf_radam.checkpoints.verify import VerifyFn, verify_checkpoint
from hf_radam.sharding.base import all_gather_object, rank, world_size


class Seen(NamedTuple):
    """What tells the folder that a process finds under a name from another one of that name."""

    manifest: str | None
    """Its sha256."""
    folder: int | None
    """Number of the folder in its file system, which all machines know it by if they share that."""


def decide_on_rank0(decide: Callable[[VerifyFn], Any]) -> Any:
    """What `decide` returns or raises on the first process, on every process; all of them must call this.

    Args:
        decide: called on the first process, with a `verify_checkpoint` in which the other
            processes help.

    Raises:
        Exception: what `decide` raised.
    """
    if world_size() == 1:
        return decide(verify_checkpoint)
    if rank() > 0:
        while (request := _from_first(None))[0] == "find":
            _look(*request[1:])
        _, result, error = request
        if error is not None:
            raise error
        return result
    try:
        result = decide(_ask)
    except Exception as error:
        _from_first(("done", None, _sendable(error)))
        raise
    _from_first(("done", result, None))
    return result


def _ask(checkpoint: PathLike, *, only: str | None = None) -> dict[str, str]:
    """`verify_checkpoint`, of which every process does its share; the others wait for this in `decide_on_rank0`."""
    _from_first(("find", Path(checkpoint), only))
    shares = _look(Path(checkpoint), only)
    for error in [share for share in shares if isinstance(share, Exception)]:
        raise error
    return {name: problem for share in shares for name, problem in share.items()}


def _look(checkpoint: Path, only: str | None) -> list[Any]:
    """What each process has found in its share, or the error with which it could not look."""
    seen = all_gather_object(_seen(checkpoint))
    mine: dict[str, str] | Exception
    try:
        if len({each.manifest for each in seen}) > 1:
            raise CheckpointError(
                f"{checkpoint} is not the same on every process (its {MANIFEST_NAME} differs, or is not there): give "
                "the path of a folder that all machines see."
            )
        together = [number for number, each in enumerate(seen) if each == seen[rank()]]
        mine = verify_checkpoint(checkpoint, only=only, share=(together.index(rank()), len(together)))
    except Exception as error:
        mine = _sendable(error)
    return all_gather_object(mine)


def _seen(checkpoint: Path) -> Seen:
    try:
        folder = checkpoint.stat().st_ino
    except OSError:
        return Seen(None, None)
    try:
        return Seen(hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest(), folder)
    except OSError:
        return Seen(None, folder)


def _sendable(error: Exception) -> Exception:
    """An error that another process can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} on rank {rank()}: {error}")
    return error


def _from_first(message: tuple[Any, ...] | None) -> Any:
    """The message of the first process; the others give None."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]
