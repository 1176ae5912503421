"""Which elements of each parameter a process holds (its shard), and how to gather complete tensors.

One idea serves every back-end: **a rank's shard of a flattened parameter is one range** `[start, start + length)`,
which may be all of it or empty. Elementwise arithmetic (an average, x of a schedule-free optimizer) runs on shards;
what needs complete tensors (writing a file, evaluating with replicated weights) gathers one tensor at a time.

| back-end | the optimizer's shard | the forward pass uses |
|---|---|---|
| one process, DDP | the complete parameter (`local.py`) | the same tensor |
| FSDP2, sharding at load time | rows of the parameter (`local.py`) | the same tensor |
| ZeRO-1, ZeRO-2 | a range of the float32 partition (`zero.py`) | the complete parameter, maybe in bf16 |
| ZeRO-3 | a range in float32 (`zero.py`) | the same range, maybe in bf16 |

Under DDP an average is still divided among the ranks: `Sharding.shared` slices complete parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_radam.sharding.base import Sharding as Sharding
from hf_radam.sharding.base import Weights as Weights
from hf_radam.sharding.local import LocalSharding as LocalSharding


def find_sharding(model: nn.Module, *, wrapped: Any = None, device: torch.device | None = None) -> Sharding:
    """Return the sharding of a model's parameters.

    Args:
        model: the unwrapped model.
        wrapped: DeepSpeed's engine or DDP's wrapper around it, if there is one.
        device: device on which tensors can be sent to other ranks; by default each parameter's own.

    Raises:
        ValueError: for a parameter that is sharded otherwise than by rows (tensor parallelism).
    """
    if type(wrapped).__module__.startswith("deepspeed."):
        from hf_radam.sharding.zero import zero_sharding

        return zero_sharding(model, wrapped, device=device)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError(
            "The model is partitioned by ZeRO-3, and there is no engine yet that could gather it. Save and average it "
            "only after training has begun."
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # else some of its parameters are not the ones that train
    return LocalSharding(model.named_parameters(), modules=model.modules(), device=device)
