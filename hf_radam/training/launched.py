"""Refuse a back-end that was asked for and is not there: accelerate runs plain DDP in its place without a word."""

from __future__ import annotations

import os

from accelerate.utils import DistributedType, str_to_bool
from transformers import TrainingArguments

WITHOUT_SHARDING = (DistributedType.NO, DistributedType.MULTI_CPU)


def _asked_for(args: TrainingArguments) -> str | None:
    """Name the back-end that the arguments or the launcher ask for; None is plain DDP or one process."""
    for name, argument, variable in (
        ("FSDP", args.fsdp, "ACCELERATE_USE_FSDP"),
        ("DeepSpeed", args.deepspeed, "ACCELERATE_USE_DEEPSPEED"),
    ):
        if argument or str_to_bool(os.environ.get(variable, "false")):
            return name
    return None


def check_launched(args: TrainingArguments) -> None:
    """Raise `ValueError` where FSDP or DeepSpeed was asked for, but nothing would be sharded.

    accelerate gives both to processes on accelerators only. Processes on CPUs, and processes that found no accelerator,
    train as if neither had been named, each with the whole model (seen with accelerate 1.15).
    """
    backend = _asked_for(args)
    state = args.distributed_state
    if backend is None or state is None:
        return
    # Asked for by the launch file, DeepSpeed is the type even of processes that do not know of each other.
    alone = state.num_processes < int(os.environ.get("WORLD_SIZE", "1"))
    if alone or state.distributed_type in WITHOUT_SHARDING:
        raise ValueError(
            f"{backend} was asked for, but it shards only over several GPUs, and here is a {args.device.type}: on CPUs "
            "accelerate would train without it. Use DDP there: configs/accelerate/ddp.yaml, with use_cpu=true."
        )
