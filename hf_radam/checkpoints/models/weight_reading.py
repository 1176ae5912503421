"""Read parts of the tensors in a model folder, whole or sharded: each process what it has of them, and no more."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_radam.checkpoints.dcp_folders import read_folder
from hf_radam.checkpoints.layouts import FSDP_WEIGHTS_FOLDER, SHARDED_FOLDER
from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.checkpoints.models.model_folders import read_state_dict, state_keys
from hf_radam.checkpoints.models.sharded_weights import read_sharded, shapes_in
from hf_radam.checkpoints.models.weight_files import files_have_its_keys
from hf_radam.sharding import Sharding
from hf_radam.sharding.base import canonical

Places = Mapping[str, tuple[int, Tensor]]
"""By a tensor's name: the first element wanted, of the flattened tensor, and a one-dimensional tensor to fill."""


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a model folder, by its key in the files; empty if it has no safetensors."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    try:
        if index.is_file():
            return {key: folder / name for key, name in json.loads(index.read_text("utf-8"))["weight_map"].items()}
        if not (folder / SAFE_WEIGHTS_NAME).is_file():
            return {}
        with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SAFE_WEIGHTS_NAME)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def read_parts(folder: Path, model: nn.Module, sharding: Sharding, into: Places) -> None:
    """Fill in parts of parameters and buffers, out of a model folder in whatever form.

    A model whose files have other keys than its state dict is read whole, on the CPU, by every process.

    Args:
        folder: the model folder, or a checkpoint with its weights at the root.
        model: the bare model.
        sharding: where its parameters lie.
        into: what to fill, by the names of `state_keys`.

    Raises:
        CheckpointError: if the folder does not hold exactly the weights of such a model.
    """
    files = weight_files(folder)
    written, name_of = state_keys(model, sharding)
    shapes = {key: sharding.shape(name_of[key]) if key in name_of else value.shape for key, value in written.items()}
    if (folder / SHARDED_FOLDER).is_dir():  # also where they were put together: it is what was written first
        _check_keys(folder, shapes, shapes_in(folder / SHARDED_FOLDER))
        read_sharded(folder / SHARDED_FOLDER, into)
    elif files and files_have_its_keys(model):
        _check_keys(folder, shapes, dict.fromkeys(files))
        _read_from_files(files, shapes, into)
    elif not files and (folder / FSDP_WEIGHTS_FOLDER).is_dir():
        state: dict[str, Tensor] = read_folder(folder / FSDP_WEIGHTS_FOLDER).get("model", {})
        others = {canonical(name) for name in model.state_dict()} - set(shapes)  # further names of tied parameters
        _check_keys(folder, shapes, {key: value.shape for key, value in state.items() if key not in others})
        _copy_parts(state, into)
    else:
        _copy_parts(read_state_dict(model, folder, shapes=_shapes_by_every_name(model, sharding)), into)


def _shapes_by_every_name(model: nn.Module, sharding: Sharding) -> dict[str, torch.Size]:
    """The whole shapes of the parameters in the state dict, where ZeRO-3 shows empty ones."""
    names = {id(parameter): name for name, parameter in sharding.parameters.items()}
    state = model.state_dict(keep_vars=True).items()
    return {key: sharding.shape(names[id(value)]) for key, value in state if id(value) in names}


def _check_keys(folder: Path, wanted: Mapping[str, torch.Size], found: Mapping[str, torch.Size | None]) -> None:
    missing, unexpected = set(wanted) - set(found), set(found) - set(wanted)
    other = [key for key in wanted if found.get(key) is not None and found[key] != wanted[key]]
    if missing or unexpected or other:
        raise CheckpointError(
            f"{folder} does not hold the weights of this model: missing {sorted(missing)[:5]}, "
            f"unexpected {sorted(unexpected)[:5]}, of another shape {sorted(other)[:5]}."
        )


def _copy_parts(state: Mapping[str, Tensor], into: Places) -> None:
    for key, (start, target) in into.items():
        target.copy_(state[key].reshape(-1)[start : start + target.numel()])


def _read_from_files(files: Mapping[str, Path], shapes: Mapping[str, torch.Size], into: Places) -> None:
    by_file: dict[Path, list[str]] = {}
    for key in into:
        by_file.setdefault(files[key], []).append(key)
    for path, keys in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                for key in keys:
                    _read_stretch(file.get_slice(key), shapes[key], *into[key], place=f"{path}: {key}")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_stretch(stored: object, shape: torch.Size, start: int, target: Tensor, *, place: str) -> None:
    """Read the rows that a stretch lies in, and take it out of them."""
    found = torch.Size(stored.get_shape())  # type: ignore[attr-defined]
    if found != shape:
        raise CheckpointError(f"{place} has the shape {tuple(found)}, the model's has {tuple(shape)}.")
    if not target.numel():
        return
    if not shape:
        target.copy_(stored[...].reshape(-1))  # type: ignore[index]
        return
    row = max(math.prod(shape[1:]), 1)
    first, last = start // row, -(-(start + target.numel()) // row)
    rows = stored[first:last].reshape(-1)  # type: ignore[index]
    target.copy_(rows[start - first * row :][: target.numel()])


@torch.no_grad()
def load_parts(folder: Path, model: nn.Module, sharding: Sharding) -> None:
    """Copy a model folder into the weights of the forward pass and the buffers, of each what this process has.

    Raises:
        CheckpointError: if the folder does not hold exactly the weights of such a model; nothing is changed then.
    """
    written, name_of = state_keys(model, sharding)
    targets = {key: sharding.model_shard(name_of[key]) if key in name_of else value for key, value in written.items()}
    starts = {key: sharding.model_start(name_of[key]) if key in name_of else 0 for key in written}
    into = {key: (starts[key], torch.empty(t.numel(), dtype=t.dtype)) for key, t in targets.items()}
    read_parts(folder, model, sharding, into)
    with sharding.editing():
        for key, target in targets.items():
            target.copy_(into[key][1].view(target.shape))


def read_pieces(folder: Path, model: nn.Module, sharding: Sharding) -> dict[str, Tensor]:
    """Read the trained parameters in float32 on the CPU, shaped as `Sharding.optimizer_shard`.

    Raises:
        CheckpointError: if the folder does not hold exactly the weights of such a model.
    """
    _, name_of = state_keys(model, sharding)
    key_of = {name: key for key, name in name_of.items()}
    unwritten = [name for name in sharding.trained if name not in key_of]
    if unwritten:
        raise CheckpointError(f"{folder} has no {unwritten[0]}: the class of the model leaves it out of what it saves.")
    keys = {name: key_of[name] for name in sharding.trained}
    live = {name: sharding.optimizer_shard(name) for name in keys}
    into = {keys[n]: (sharding.optimizer_start(n), torch.empty(piece.numel())) for n, piece in live.items()}
    read_parts(folder, model, sharding, into)
    return {name: into[key][1].view(live[name].shape) for name, key in keys.items()}
