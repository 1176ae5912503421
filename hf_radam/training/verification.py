"""Decide on the first process which checkpoint is gone on from, while every process takes the sha256 of its share.

One process would take minutes over a large model's checkpoint, for which all the others wait.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import broadcast_object_list

from hf_radam.checkpoints.integrity import FindDamage, damage
from hf_radam.checkpoints.manifest import PathLike
from hf_radam.sharding.base import rank, world_size


def agreed(decide: Callable[[FindDamage], Any]) -> Any:
    """What `decide` returns or raises on the first process, on every process; all of them must call this.

    Args:
        decide: called on the first process, with what finds the damage of a checkpoint in its place: `damage` itself,
            by which the others help.

    Raises:
        ValueError, OSError: what `decide` raised.
    """
    if world_size() == 1:
        return decide(damage)
    if rank() > 0:
        while (request := _from_first(None))[0] == "find":
            _look(*request[1:])
        _, result, error = request
    else:
        result = error = None
        try:
            result = decide(_ask)
        except (ValueError, OSError) as raised:
            error = raised
        _from_first(("done", result, error))
    if error is not None:
        raise error
    return result


def _ask(checkpoint: PathLike, *, only: str | None = None) -> dict[str, str]:
    """`damage`, of which every process does its share; the others wait for this in `agreed`."""
    _from_first(("find", Path(checkpoint), only))
    shares = _look(Path(checkpoint), only)
    for error in [share for share in shares if isinstance(share, Exception)]:
        raise error
    return {name: problem for share in shares for name, problem in share.items()}


def _look(checkpoint: Path, only: str | None) -> list[Any]:
    """What each process has found in its share, or the error with which it could not look."""
    mine: dict[str, str] | Exception
    try:
        mine = damage(checkpoint, only=only, share=(rank(), world_size()))
    except (ValueError, OSError) as error:
        mine = error
    shares: list[Any] = [None] * world_size()
    dist.all_gather_object(shares, mine)
    return shares


def _from_first(message: tuple[Any, ...] | None) -> Any:
    """The message of the first process; the others give None."""
    box = [message]
    broadcast_object_list(box)
    return box[0]
