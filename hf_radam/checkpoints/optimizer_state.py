"""Read and load the state of an optimizer in each layout, also for a model in another layout.

    one process, DDP    {"state": {0: {...}, 1: {...}}, "param_groups": [{"params": [0, 1], "lr": 0.1}]}
    FSDP2               {"state": {"w": {...}, "b": {...}}, "param_groups": [{"params": ["w", "b"], "lr": 0.1}]}

The numbers count the optimizer's parameters, group by group. Nothing is computed, so every bit is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

from hf_radam.checkpoints.layouts import DEEPSPEED, FSDP_FULL, FSDP_SHARDED, PLAIN, Layout, layout_of
from hf_radam.checkpoints.manifest import CheckpointError, PathLike
from hf_radam.checkpoints.sharded import read_tree
from hf_radam.sharding import LocalSharding
from hf_radam.sharding.base import all_gather_object, canonical, rank

State = dict[str, Any]


def names_by_group(param_groups: Iterable[dict[str, Any]], model: nn.Module) -> list[list[str]]:
    """Return the parameter names in each group of an optimizer, in its order."""
    names = {id(parameter): canonical(name) for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in param_groups]


def _by_name(state: State, names: list[list[str]]) -> State:
    """Convert a state by numbers into one by names.

    Raises:
        CheckpointError: if the groups have other sizes than `names`.
    """
    groups = state["param_groups"]
    sizes, expected = [len(group["params"]) for group in groups], [len(group) for group in names]
    if sizes != expected:
        raise CheckpointError(f"the saved optimizer has groups of {sizes} parameters, this one of {expected}")
    name_of = {
        number: name
        for group, named in zip(groups, names, strict=True)
        for number, name in zip(group["params"], named, strict=True)
    }
    renamed = [{**group, "params": list(named)} for group, named in zip(groups, names, strict=True)]
    return {"state": {name_of[number]: value for number, value in state["state"].items()}, "param_groups": renamed}


def read_state(checkpoint: PathLike, names: list[list[str]], *, mmap: bool = False) -> State:
    """Read the complete state in a checkpoint by parameter names, on the CPU; DeepSpeed's cannot be read.

    `names` are those in each group of the optimizer that it is for; `mmap` maps tensors into memory if possible.
    Raises `CheckpointError` if it cannot be read, or belongs to an optimizer with other parameters.
    """
    path, layout = Path(checkpoint), layout_of(checkpoint)
    if layout is FSDP_SHARDED:
        return _of_tree(read_tree(path / layout.optimizer), path / layout.optimizer)
    state = _read_file(path / layout.optimizer, mmap=mmap)
    return _by_name(state, names) if layout is PLAIN else state


def read_groups(checkpoint: PathLike) -> list[dict[str, Any]]:
    """Read the parameter groups in a checkpoint without its tensors, and without executing anything in it.

    Raises:
        CheckpointError: if they cannot be read; DeepSpeed's never can.
    """
    path, layout = Path(checkpoint), layout_of(checkpoint)
    file = path / layout.optimizer
    if layout is DEEPSPEED:
        raise CheckpointError(f"{path}: the optimizer's state is in DeepSpeed's own form")
    is_tree = layout is FSDP_SHARDED
    state = _of_tree(read_tree(file, tensors=False), file) if is_tree else _read_file(file, mmap=True)
    groups: list[dict[str, Any]] = state["param_groups"]
    return groups


def _read_file(file: Path, *, mmap: bool) -> State:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a corrupted pickle raises almost anything
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    return _checked(state, file)


def _of_tree(tree: dict[str, Any], folder: Path) -> State:
    state = tree.get("optimizer")
    return _checked({"state": {}, **state} if isinstance(state, dict) else None, folder)


def _checked(state: Any, source: Path) -> State:
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{source} does not hold the state of an optimizer")
    return state


# ---- Load ----


@contextmanager
def fsdp_state_dict_type(plugin: Any, layout: Layout, *, world_size: int) -> Iterator[None]:
    """Enter a context in which accelerate's FSDP `plugin` reads the kind of state dicts that a checkpoint has."""
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
    """Let torch make the step (with learning rate 0) by which it initializes the state before loading.

    A schedule-free optimizer refuses it in evaluation mode; its own `train()` would make empty states, for which torch
    then loads nothing. Mode and counters are the checkpoint's afterwards.
    """
    for group in optimizer.param_groups:
        if "train_mode" in group:
            group["train_mode"] = True


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, checkpoint: str) -> None:
    """Load the state in a checkpoint of another layout into the optimizer of `model`; collective.

    Where the model is sharded (FSDP2) rank 0 reads, and torch broadcasts one tensor after another, of which every rank
    takes its shard.

    Raises:
        CheckpointError: if the state belongs to an optimizer with other parameters.
    """
    sharded = LocalSharding(model.named_parameters()).is_sharded
    state: State = {}
    error: CheckpointError | None = None
    if rank() == 0 or not sharded:
        try:
            names = names_by_group(optimizer.param_groups, model)
            state = read_state(checkpoint, names, mmap=sharded)
            shapes = {canonical(name): parameter.shape for name, parameter in model.named_parameters()}
            _check_same_parameters(state, names, shapes if sharded else {})
        except CheckpointError as raised:
            error = CheckpointError(f"{checkpoint} cannot be resumed: {raised}.")
    error = all_gather_object(error)[0] if sharded else error
    if error is not None:
        raise error
    allow_a_first_step(optimizer)
    options = StateDictOptions(full_state_dict=sharded, broadcast_from_rank0=sharded)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def _check_same_parameters(state: State, names: list[list[str]], shapes: dict[str, torch.Size]) -> None:
    """Compare groups, as torch skips parameters that it does not find, and shapes where the state is sharded."""
    saved = [set(group["params"]) for group in state["param_groups"]]
    if saved != [set(group) for group in names]:
        here, there = {name for group in names for name in group}, set().union(*saved)
        raise CheckpointError(
            "the saved optimizer has other parameters in its groups than this one (only saved: "
            f"{sorted(there - here)[:3]}, only here: {sorted(here - there)[:3]})"
        )
    for name, shape in shapes.items():
        for key, value in state["state"].get(name, {}).items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != shape:
                raise CheckpointError(
                    f"the state {key} of {name} has the shape {tuple(value.shape)}, not {tuple(shape)}, and "
                    "cannot be sharded; resume with as many processes and the back-end of the checkpoint"
                )
