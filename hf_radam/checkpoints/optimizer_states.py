"""The state of an optimizer as the layouts keep it: by the parameters' numbers or by their names.

    one process, DDP    {"state": {0: {...}, 1: {...}}, "param_groups": [{"params": [0, 1], "lr": 0.1}]}
    FSDP2               {"state": {"w": {...}, "b": {...}}, "param_groups": [{"params": ["w", "b"], "lr": 0.1}]}

The numbers count the optimizer's parameters, group by group. Converting changes no tensor and no number.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_radam.checkpoints.dcp_folders import plain_values, read_folder
from hf_radam.checkpoints.layouts import DEEPSPEED, FSDP_SHARDED, PLAIN, layout_of
from hf_radam.checkpoints.manifest import CheckpointError, PathLike
from hf_radam.sharding.base import canonical

State = dict[str, Any]


def names_by_group(param_groups: Iterable[dict[str, Any]], model: nn.Module) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer, in its order."""
    names = {id(parameter): canonical(name) for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in param_groups]


def by_name(state: State, names: list[list[str]]) -> State:
    """A state by numbers as one by names.

    Args:
        state: what `optimizer.state_dict()` of one process gives.
        names: of the parameters in each group.

    Raises:
        CheckpointError: if the groups have other sizes.
    """
    groups = state["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group) for group in names]:
        raise CheckpointError(
            f"the optimizer that was saved has groups of {[len(group['params']) for group in groups]} parameters, this "
            f"one of {[len(group) for group in names]}"
        )
    name_of = {
        number: name
        for group, named in zip(groups, names, strict=True)
        for number, name in zip(group["params"], named, strict=True)
    }
    renamed = [{**group, "params": list(named)} for group, named in zip(groups, names, strict=True)]
    return {"state": {name_of[number]: value for number, value in state["state"].items()}, "param_groups": renamed}


def by_number(state: State, names: list[list[str]]) -> State:
    """A state by names as one by numbers, in the order of `names`: what `optimizer.load_state_dict` takes.

    Raises:
        CheckpointError: if a group holds other parameters.
    """
    groups = state["param_groups"]
    if [set(group["params"]) for group in groups] != [set(group) for group in names]:
        saved, own = ({name for group in all_of for name in group} for all_of in ([g["params"] for g in groups], names))
        raise CheckpointError(
            f"the optimizer that was saved has other parameters in its groups than this one (only saved: "
            f"{sorted(saved - own)[:3]}, only here: {sorted(own - saved)[:3]})"
        )
    flat = [name for group in names for name in group]
    number_of = {name: number for number, name in enumerate(flat)}
    renumbered = [
        {**group, "params": [number_of[name] for name in named]} for group, named in zip(groups, names, strict=True)
    ]
    kept = {number_of[name]: state["state"][name] for name in flat if name in state["state"]}
    return {"state": kept, "param_groups": renumbered}


def read_state(checkpoint: PathLike, names: list[list[str]], *, on_disk: bool = False) -> State:
    """The whole state in a checkpoint, by names, on the CPU.

    Args:
        checkpoint: its folder.
        names: of the parameters in each group of the optimizer that it is for.
        on_disk: leave the tensors in their file until each is used, where that can be done.

    Raises:
        CheckpointError: if it cannot be read, or is of an optimizer with other parameters.
    """
    path, layout = Path(checkpoint), layout_of(checkpoint)
    if layout is FSDP_SHARDED:
        return _of_optimizer(read_folder(path / layout.optimizer), path / layout.optimizer)
    state = _load(path / layout.optimizer, on_disk=on_disk)
    return by_name(state, names) if layout is PLAIN else state


def read_groups(checkpoint: PathLike) -> list[dict[str, Any]]:
    """The parameter groups in a checkpoint, without any of the tensors, and without running anything in it.

    Raises:
        CheckpointError: if they cannot be read; of DeepSpeed's they never can.
    """
    path, layout = Path(checkpoint), layout_of(checkpoint)
    file = path / layout.optimizer
    if layout is DEEPSPEED:
        raise CheckpointError(f"{path}: the optimizer's state is in DeepSpeed's own form")
    state = _of_optimizer(plain_values(file), file) if layout is FSDP_SHARDED else _load(file, on_disk=True)
    groups: list[dict[str, Any]] = state["param_groups"]
    return groups


def _load(file: Path, *, on_disk: bool) -> State:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=on_disk)
    except Exception as error:  # what a damaged pickle raises depends on where the damage is
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    return _checked(state, file)


def _of_optimizer(tree: dict[str, Any], folder: Path) -> State:
    state = tree.get("optimizer")
    return _checked({"state": {}, **state} if isinstance(state, dict) else None, folder)


def _checked(state: Any, where: Path) -> State:
    """The state, if it has the form of one."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{where} holds no state of an optimizer")
    return state
