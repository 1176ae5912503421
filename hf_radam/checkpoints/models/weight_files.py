"""Write a model's weights tensor by tensor, so that the writing process never holds more than one file of them.

The whole of a large model fits no process that trains a part of it. So a plan is made first, from names and shapes
alone: which tensors go into which file. Then every process helps to bring one tensor after another to the first one,
which writes a file as soon as it has all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as hf_logging

from hf_radam.sharding.base import canonical

logger = hf_logging.get_logger(__name__)

MAX_FILE_BYTES = 5_000_000_000
"""Bytes of tensors in one file; a larger tensor has a file of its own."""


@dataclass(frozen=True)
class Tensors:
    """What is to be written, without the numbers.

    Attributes:
        like: a tensor on the meta device, of the shape and dtype to be written, by its name in the state dict.
        read: brings one of them here, by that name, on the process that writes; every process must call it.
    """

    like: dict[str, Tensor]
    read: Callable[[str], Tensor | None]


@dataclass
class WeightFile:
    """One file: which units it has, a unit being tensors of the state dict that are turned into file tensors together.

    Attributes:
        units: names in the state dict, of every unit.
        keys: names in the file.
        size: bytes of its tensors.
    """

    units: list[list[str]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    size: int = 0


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an evaluation folder keeps a tensor: floating-point ones below float32 lose nothing in it."""
    return torch.float32 if dtype.is_floating_point and torch.finfo(dtype).bits < 32 else dtype


def written_names(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that are written, by their names in the state dict: of tied ones those that are loaded.

    Which is as `save_pretrained` does it: a name that the class ties to another one is left out, and one that it does
    not save.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = {canonical(name): value for name, value in model.state_dict(keep_vars=True).items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names: dict[int, list[str]] = {}
    for name, value in state.items():
        names.setdefault(id(value), []).append(name)
    kept = {next((name for name in group if name not in tied), group[0]) for group in names.values()}
    return {name: value for name, value in state.items() if name in kept and name not in ignored}


def plan(model: nn.Module | None, like: dict[str, Tensor], *, max_bytes: int) -> list[WeightFile]:
    """Which tensors go into which file, in the order in which they are brought."""
    files = [WeightFile()]
    for unit, written in _units(model, like):
        size = sum(tensor.numel() * tensor.element_size() for tensor in written.values())
        if files[-1].size and files[-1].size + size > max_bytes:
            files.append(WeightFile())
        files[-1].units.append(unit)
        files[-1].keys += list(written)
        files[-1].size += size
    return files


def _units(model: nn.Module | None, like: dict[str, Tensor]) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Names that must be brought together, and the tensors of the file that they become.

    Some classes keep tensors in another form in their files (the experts of a Mixtral, one by one). What belongs
    together there lies in one layer; a class of which that is not true is brought all at once.
    """
    if files_have_its_keys(model):
        for name, tensor in like.items():
            yield [name], {name: tensor}
        return
    converted = _as_in_files(model, like)
    layers: dict[str, list[str]] = {}
    for name in like:
        numbered = re.match(r"(.*?\.\d+)\.", name)
        layers.setdefault(numbered[1] if numbered else name, []).append(name)
    units = [(names, _as_in_files(model, {name: like[name] for name in names})) for names in layers.values()]
    shapes = {key: tensor.shape for _, written in units for key, tensor in written.items()}
    if shapes == {key: tensor.shape for key, tensor in converted.items()}:
        yield from units
        return
    logger.warning(f"The weights of {type(model).__name__} can only be written together: one process gathers them all.")
    yield list(like), converted


def files_have_its_keys(model: nn.Module | None) -> bool:
    """Whether the tensors in the files of such a model are those of its state dict, under the same names."""
    nothing: dict[str, Tensor] = {}
    return not isinstance(model, PreTrainedModel) or revert_weight_conversion(model, nothing) is nothing


def _as_in_files(model: nn.Module | None, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return revert_weight_conversion(model, dict(state)) if isinstance(model, PreTrainedModel) else state


def write_weights(
    folder: Path, model: nn.Module | None, tensors: Tensors, *, writes: bool, max_bytes: int | None = None
) -> None:
    """Write the weights of `model` into a folder, as `from_pretrained` reads them. Every process must call it.

    Args:
        folder: where to; it must be there.
        model: whose class says what the files look like; None for one that is not upstream's.
        tensors: what to write, and how to get at it.
        writes: whether this process does.
        max_bytes: limit of a file's size; `MAX_FILE_BYTES` if not given.

    Raises:
        OSError: (or `SafetensorError`) if a file could not be written; after the last tensor was brought, so that the
            other processes wait for nothing.
    """
    files = plan(model, tensors.like, max_bytes=MAX_FILE_BYTES if max_bytes is None else max_bytes)
    names = [SAFE_WEIGHTS_NAME]
    if len(files) > 1:
        names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    failure: Exception | None = None
    for file, name in zip(files, names, strict=True):
        content: dict[str, Tensor] = {}
        for unit in file.units:
            brought = {key: tensors.read(key) for key in unit}
            if writes and failure is None:
                content |= _ready(model, {key: value for key, value in brought.items() if value is not None}, tensors)
        if writes and failure is None:
            try:
                safetensors.torch.save_file(content, folder / name, metadata={"format": "pt"})
            except Exception as error:  # whatever it is, the other processes wait for this one
                failure = error
    if failure is not None:
        raise failure
    if writes and len(files) > 1:
        _write_index(folder, tensors, files, names)


def _ready(model: nn.Module | None, brought: dict[str, Tensor], tensors: Tensors) -> dict[str, Tensor]:
    """The file's tensors, in memory of their own size: a live parameter is written from where it is."""
    cast = {key: value.detach().to(tensors.like[key].dtype) for key, value in brought.items()}
    return {key: value.cpu().contiguous() for key, value in _as_in_files(model, cast).items()}


def _write_index(folder: Path, tensors: Tensors, files: list[WeightFile], names: list[str]) -> None:
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in tensors.like.values()),
            "total_size": sum(file.size for file in files),
        },
        "weight_map": {key: name for file, name in zip(files, names, strict=True) for key in file.keys},
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parameter_dtypes(model: nn.Module) -> dict[str, Any]:
    """The dtype that most parameters have, and those of the parameters that have another one, by name."""
    dtypes: dict[str, str] = {}
    numel: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        dtypes[canonical(name)] = dtype = str(parameter.dtype).removeprefix("torch.")
        # Where it is partitioned by ZeRO-3 it shows no elements.
        numel[dtype] = numel.get(dtype, 0) + int(getattr(parameter, "ds_numel", parameter.numel()))
    common = max(numel, key=lambda dtype: numel[dtype])
    return {"dtype": common, "other_dtypes": {name: d for name, d in dtypes.items() if d != common}}
