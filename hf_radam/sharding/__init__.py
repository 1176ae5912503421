"""Where the numbers of a model's parameters lie among the processes that train it, and how to bring them together.

One idea serves every back-end: **of each parameter, flattened, a rank holds one stretch** `[start, start + length)`,
which may be all of it or nothing. What is computed element by element (an average, x of a schedule-free optimizer) is
computed on the stretches alone; what needs whole tensors (writing a file, evaluating with replicated weights) gathers
them one tensor at a time. What is averaged, written and swapped goes by this.

| back-end | a rank holds, to train | the weights of the forward pass |
|---|---|---|
| one process, DDP | every parameter whole (`local.py`) | the same tensors |
| FSDP2, sharding at load time | its rows of every parameter (`local.py`) | the same tensors |
| ZeRO-1, ZeRO-2 | stretches of the float32 partition (`zero.py`) | whole parameters, maybe in bf16 |
| ZeRO-3 | a stretch of every parameter in float32 (`zero.py`) | the same stretch, maybe in bf16 |

Under DDP an average is shared among the ranks all the same: `Sharding.shared` cuts whole parameters into equal
stretches (`slices.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_radam.sharding.base import Sharding as Sharding
from hf_radam.sharding.local import LocalSharding as LocalSharding
from hf_radam.sharding.weights import Weights as Weights


def find_sharding(model: nn.Module, *, wrapped: Any = None, device: torch.device | None = None) -> Sharding:
    """How the parameters of `model` lie among the processes.

    Args:
        model: the bare model.
        wrapped: what the trainer runs, if that is another object: DeepSpeed's engine, or DDP's wrapper.
        device: where tensors must lie to be sent to other processes; by default each parameter's own device.

    Raises:
        ValueError: for a parameter that is sharded otherwise than by rows (tensor parallelism).
    """
    if type(wrapped).__module__.startswith("deepspeed."):
        from hf_radam.sharding.zero import zero_sharding

        return zero_sharding(model, wrapped, device=device)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError(
            "The model is partitioned by ZeRO-3, and there is no engine yet that could gather it: save and average it "
            "only after training has begun."
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # else some of the parameters that it shows are not those that train
    return LocalSharding(model.named_parameters(), modules=model.modules(), device=device)
