"""Refuse a run on several machines whose `output_dir` is not one folder that all of them see.

What the others wrote would be missing from every checkpoint, and upstream says nothing.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hf_radam.checkpoints.storage import STAGING
from hf_radam.sharding.base import all_gather_object
from hf_radam.training.agreement import DisagreementError

PATIENCE = 30.0
"""Seconds after which a file that another machine has made must be seen; network file systems remember what was not."""


def check_shared_folder(args: Any) -> None:
    """Raise `DisagreementError` on every process if what the first one writes into `output_dir` is not seen by all.

    Every process must call this; on one machine it does nothing.
    """
    if args.world_size == 1 or int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)) == args.world_size:
        return
    if args.save_on_each_node:
        raise DisagreementError(
            "save_on_each_node is not supported: a checkpoint is one folder, in which every process writes its files. "
            "Take an output_dir that all machines see (a shared file system) and leave save_on_each_node out."
        )
    name: list[Any] = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    probe = Path(str(args.output_dir), STAGING, f"seen-by-all-{name[0]}")
    if args.process_index == 0:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    dist.barrier()
    seen = all_gather_object(_appears(probe))
    if args.process_index == 0:
        probe.unlink()
        if not any(probe.parent.iterdir()):
            probe.parent.rmdir()
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if blind:
        raise DisagreementError(
            f"output_dir={args.output_dir} is not one folder for all machines: ranks {blind} do not see what rank 0 "
            "writes there, and what they write would be missing from every checkpoint. Take a folder on a file system "
            "that all machines share."
        )


def _appears(probe: Path) -> bool:
    """Whether a file is there, or comes to be seen; listing the folder has a network file system look again."""
    until = time.monotonic() + PATIENCE
    while not probe.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
        if probe.parent.is_dir():
            os.listdir(probe.parent)
    return True
