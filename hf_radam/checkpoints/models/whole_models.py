"""Load a model whole, on this process, while a sharded one trains: upstream would shard, or skip, what it loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import deepspeed

RANK_ZERO_ONLY = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def unsharded_class(model: nn.Module) -> Any:
    """The class that a model had before FSDP2 put one of its own in its place."""
    return type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)


@contextmanager
def whole_models() -> Iterator[None]:
    """Context in which `from_pretrained` gives every process that calls it a whole model.

    Upstream goes by a global configuration (ZeRO-3) and by the environment (FSDP: only the first process reads).
    """
    zero3 = deepspeed._hf_deepspeed_config_weak_ref
    efficient = os.environ.pop(RANK_ZERO_ONLY, None)
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
        if efficient is not None:
            os.environ[RANK_ZERO_ONLY] = efficient
