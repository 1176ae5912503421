"""Load a checkpoint's optimizer for a model in another layout than it was saved in.

Where the model is sharded (FSDP2) the first process reads, and of each tensor in turn every process gets its shard: no
other one ever holds a whole model. Nothing is computed, so every bit is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_radam.checkpoints import optimizer_states
from hf_radam.checkpoints.layouts import FSDP_FULL, FSDP_SHARDED, Layout
from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.sharding import LocalSharding
from hf_radam.training.verification import decide_on_rank0


class Facts(NamedTuple):
    """What the other processes have to know of a tensor that the first one has read."""

    shape: torch.Size
    dtype: torch.dtype


@contextmanager
def state_dicts_as_written(plugin: Any, layout: Layout, *, world_size: int) -> Iterator[None]:
    """Context in which accelerate's FSDP reads what it wrote with the other kind of state dicts.

    Args:
        plugin: accelerate's FSDP plugin; unchanged if its kind is the one of the checkpoint.
        layout: the checkpoint's.
        world_size: processes; with one there is nothing to broadcast.
    """
    kind = {FSDP_FULL: "FULL_STATE_DICT", FSDP_SHARDED: "SHARDED_STATE_DICT"}[layout]
    if plugin.state_dict_type.name == kind:
        yield
        return
    names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    own = {name: getattr(plugin, name) for name in names}
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    try:
        plugin.set_state_dict_type(kind)
        if layout is FSDP_FULL:
            plugin.state_dict_config.rank0_only = world_size > 1
        yield
    finally:
        for name, value in own.items():
            setattr(plugin, name, value)


def allow_a_first_step(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's loading make its step without gradients, by which it finds out what an optimizer keeps.

    A schedule-free optimizer refuses it in evaluation mode. Its own `train()` would make empty entries for all
    parameters, from which torch concludes that there is nothing to find out, and loads nothing. Mode and counters are
    those of the checkpoint afterwards.
    """
    for group in optimizer.param_groups:
        if "train_mode" in group:
            group["train_mode"] = True


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, checkpoint: str) -> None:
    """Load the state in a checkpoint of another layout into the optimizer of `model`.

    Raises:
        CheckpointError: if it is the state of an optimizer with other parameters.
    """
    names = optimizer_states.names_by_group(optimizer.param_groups, model)
    sharded = LocalSharding(model.named_parameters()).is_sharded

    def read() -> optimizer_states.State:
        try:
            state = optimizer_states.read_state(checkpoint, names, on_disk=sharded)
            return optimizer_states.by_number(state, names)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint} cannot be gone on from: {error}.") from error

    optimizer.load_state_dict(_scattered(read, optimizer) if sharded else read())


def _scattered(read: Callable[[], optimizer_states.State], optimizer: torch.optim.Optimizer) -> optimizer_states.State:
    """The state that the first process reads, with each process's own shards of the tensors in it."""
    whole: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def outline() -> optimizer_states.State:
        state = read()
        whole.update(state["state"])
        return {"state": {n: _outline(kept, parameters[n]) for n, kept in whole.items()}} | {
            "param_groups": state["param_groups"]
        }

    state = decide_on_rank0(lambda verify_fn: outline())
    for number, kept in state["state"].items():
        for key, value in kept.items():
            if isinstance(value, Facts):
                kept[key] = _shard(whole.get(number, {}).get(key), value, parameters[number])
        whole.pop(number, None)
    return state


def _outline(kept: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The state of one parameter, with facts in place of its large tensors."""
    outline: dict[str, Any] = {}
    for key, value in kept.items():
        large = isinstance(value, Tensor) and value.dim() > 0
        if large and value.shape != parameter.shape:
            raise CheckpointError(
                f"The optimizer keeps {key} in the shape {tuple(value.shape)} for a parameter of "
                f"{tuple(parameter.shape)}: such a state cannot be split among processes. Resume without FSDP."
            )
        outline[key] = Facts(value.shape, value.dtype) if large else value
    return outline


def _shard(whole: Tensor | None, facts: Facts, like: Tensor) -> Tensor:
    """This process's shard of a tensor that the first process has, laid out as `like`; whole where that is no shard."""
    device = like.device
    tensor = torch.empty(facts.shape, dtype=facts.dtype, device=device)
    if whole is not None:
        tensor.copy_(whole)  # away from the file, which may be removed
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    dist.broadcast(tensor, src=0)
    return tensor
