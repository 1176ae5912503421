"""Folders of `torch.distributed.checkpoint`: every rank writes its own shards, and reads any range of any tensor.

    ewa/sharded/.metadata       a pickle: which range of which tensor lies where
    ewa/sharded/__1_0.distcp    what rank 1 wrote
    ewa/sharded/shapes.json     shapes of the tensors, each of which is written flattened
    pytorch_model_fsdp_0/       the model as FSDP2 writes it: tensors by rows, named `model.NAME`
    optimizer_0/                the optimizer as FSDP2 writes it

No rank holds more than its own shards. Every back-end and number of processes reads what another wrote: a range is
assembled from the ranges that were written. Nothing that is stored in a folder is executed. Files of complete tensors
(safetensors) are read by ranges as well.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict  # private (torch 2.13)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_radam.checkpoints.layouts import FSDP_WEIGHTS_FOLDER, SHARDED_FOLDER, WEIGHT_FILES
from hf_radam.checkpoints.manifest import CheckpointError, PathLike
from hf_radam.sharding.base import rank, world_size

METADATA_NAME, SHAPES_NAME = ".metadata", "shapes.json"
TRUSTED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What metadata consists of: plain records, and functions that only make a value."""


# ---- Write ----


@dataclass(frozen=True)
class TensorShard:
    """The shard of one tensor that this rank writes."""

    like: Tensor  # on the meta device, with the complete shape and the dtype to write
    start: int  # index of the shard's first element in the flattened tensor
    length: int  # number of elements; 0 if other ranks write them all
    read: Callable[[], Tensor]  # makes the elements, in any shape and dtype


class _SavePlanner(dcp.DefaultSavePlanner):
    """Writes shards of flattened tensors, and makes each only when it is written."""

    def __init__(self, shards: Mapping[str, TensorShard]):
        super().__init__()
        self.shards = shards

    def create_local_plan(self) -> SavePlan:
        """Return one item for each shard that is not empty."""
        items = [_write_item(name, shard) for name, shard in self.shards.items() if shard.length]
        self.plan = SavePlan(items, planner_data={name: (name,) for name in self.shards})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the shard's elements on the CPU."""
        shard = self.shards[write_item.index.fqn]
        return shard.read().detach().reshape(-1).to(device="cpu", dtype=shard.like.dtype)


def _write_item(name: str, shard: TensorShard) -> WriteItem:
    chunk = ChunkStorageMetadata(offsets=torch.Size([shard.start]), sizes=torch.Size([shard.length]))
    size, properties = torch.Size([shard.like.numel()]), TensorProperties(dtype=shard.like.dtype)
    data = TensorWriteData(chunk=chunk, properties=properties, size=size)
    return WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)


def write_sharded(folder: Path, shards: Mapping[str, TensorShard]) -> None:
    """Write this rank's shards, by name, to a folder on a shared file system; collective, same names on every rank."""
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {name: list(shard.like.shape) for name, shard in shards.items()}
        (folder / SHAPES_NAME).write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")
    # One thread: every shard that waits to be written takes memory.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    dcp.save({}, storage_writer=writer, planner=_SavePlanner(shards), no_dist=world_size() == 1)


# ---- Read ----


class _Unpickler(pickle.Unpickler):
    """Makes nothing but the records of metadata."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib":  # the folder's path, whose class depends on Python's version
            return lambda *parts: "/".join(parts)
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if name in TRUSTED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")


def read_metadata(folder: PathLike) -> Metadata:
    """Read a folder's metadata without executing anything in it; raise `CheckpointError` if it cannot be read."""
    file = Path(folder) / METADATA_NAME
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it is a {type(metadata).__name__}")
        places = dict(metadata.storage_data)
        if {index.fqn for index in places} != set(metadata.state_dict_metadata) or metadata.planner_data is None:
            raise ValueError("it is incomplete")
        if not all(Path(place.relative_path).name == place.relative_path for place in places.values()):
            raise ValueError("it names files outside of the folder")
    except Exception as error:  # an incomplete pickle raises almost anything
        raise CheckpointError(f"{file} cannot be read ({error}).") from error
    return metadata


class _Reader(dcp.FileSystemReader):
    """Reads a folder's metadata once, and safely."""

    @cached_property
    def contents(self) -> Metadata:
        return read_metadata(self.path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.contents


Targets = Mapping[str, tuple[tuple[int, ...], Tensor]]
"""By name: offsets in the stored tensor, and the tensor to fill."""


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Reads ranges of tensors into place, and replaces values by the stored ones without executing anything in them."""

    def __init__(self, targets: Targets, values: dict[str, Any]):
        super().__init__()
        self.targets, self.values = targets, values

    def create_local_plan(self) -> LoadPlan:
        """Find the stored chunks that overlap each target."""
        assert self.metadata is not None, "torch sets it up first"
        items: list[ReadItem] = []
        for name, (offsets, target) in self.targets.items():
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=target.shape)
            found = create_read_items_for_chunk_list(name, entry, [chunk])
            if sum(item.lengths.numel() for item in found) != target.numel():
                raise ValueError(f"{name} is incomplete")
            items += found
        zero = torch.Size([0])
        for name in self.values:
            items.append(ReadItem(LoadItemType.BYTE_IO, MetadataIndex(name), zero, MetadataIndex(name), zero, zero))
        return LoadPlan(items)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Unpickle a value."""
        self.values[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of a target that an item fills."""
        target = self.targets[read_item.dest_index.fqn][1]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the item was read into place."""


def _load(reader: _Reader, targets: Targets, values: dict[str, Any]) -> None:
    planner = _LoadPlanner(targets, values)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as no_dist=True asks
            dcp.load({}, storage_reader=reader, planner=planner, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # the latter is none of the former
        reasons = [failure for failure, _ in getattr(error, "failures", {}).values()]
        raise CheckpointError(f"{reader.path} cannot be read: {(reasons or [error])[0]}") from error


def read_tree(folder: PathLike, *, tensors: bool = True) -> dict[str, Any]:
    """Read a folder as the nested state dict that was saved, with complete tensors on the CPU; not collective.

    Without `tensors` only those in `param_groups` are read. Raises `CheckpointError` if the folder cannot be read.
    """
    reader = _Reader(folder)
    metadata = reader.contents
    targets: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    values: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            values[name] = None
        elif tensors or "param_groups" in metadata.planner_data[name]:
            targets[name] = ((0,) * len(entry.size), torch.empty(entry.size, dtype=entry.properties.dtype))
    _load(reader, targets, values)
    tree: dict[str, Any] = unflatten_state_dict(
        values | {name: tensor for name, (_, tensor) in targets.items()}, metadata.planner_data
    )
    return tree


Ranges = Mapping[str, tuple[int, Tensor]]
"""By key: index of the first element in the flattened tensor, and a one-dimensional tensor to fill."""


def rows_of(shape: torch.Size, start: int, length: int) -> tuple[int, int, int]:
    """Return the first row, and the row after the last, that hold a range of a flattened tensor, and their length."""
    row = max(math.prod(shape[1:]), 1)
    return start // row, -(-(start + length) // row), row


class ShardedWeights:
    """The weights of a model folder that lie in shards, `sharded/` or FSDP2's `pytorch_model_fsdp_0/`.

    Attributes:
        like: a tensor on the meta device, with the stored shape and dtype, by its name in the state dict.

    Raises:
        CheckpointError: if the shards cannot be read.
    """

    def __init__(self, folder: PathLike):
        self._flattened = Path(folder, SHARDED_FOLDER).is_dir()
        self._reader = _Reader(Path(folder, SHARDED_FOLDER if self._flattened else FSDP_WEIGHTS_FOLDER))
        self._prefix = "" if self._flattened else "model."
        self.like: dict[str, Tensor] = {}
        try:
            shapes = json.loads(Path(folder, SHARDED_FOLDER, SHAPES_NAME).read_text("utf-8")) if self._flattened else {}
            for name, entry in self._reader.contents.state_dict_metadata.items():
                if isinstance(entry, TensorStorageMetadata):
                    key = name.removeprefix(self._prefix)
                    shape = torch.Size(shapes[key]) if self._flattened else entry.size
                    self.like[key] = torch.empty(shape, dtype=entry.properties.dtype, device="meta")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self._reader.path} cannot be read: {error}") from error

    def read(self, into: Ranges) -> None:
        """Fill ranges; not collective, and no more than the ranges (or their rows) is read."""
        targets: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        unaligned = []
        for name, (start, target) in into.items():
            shape = self.like[name].shape
            if not target.numel():
                continue
            if self._flattened or not shape:
                targets[self._prefix + name] = ((start,), target) if self._flattened else ((), target.view(()))
                continue
            first, end, row = rows_of(shape, start, target.numel())
            rows = target
            if rows.numel() != (end - first) * row:
                rows = target.new_empty((end - first) * row)
                unaligned.append((target, rows[start - first * row :][: target.numel()]))
            offsets = (first, *[0] * (len(shape) - 1))
            targets[self._prefix + name] = (offsets, rows.view(end - first, *shape[1:]))
        _load(self._reader, targets, {})
        for target, part in unaligned:
            target.copy_(part)

    def read_tensor(self, name: str) -> Tensor:
        """Read one complete tensor."""
        target = torch.empty(self.like[name].numel(), dtype=self.like[name].dtype)
        self.read({name: (0, target)})
        return target.view(self.like[name].shape)


# ---- Files of complete tensors ----


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors file of each tensor in a model folder, by its key in the files; empty without any."""
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


def check_keys(folder: Path, expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size | None]) -> None:
    """Raise `CheckpointError` for other keys or shapes than expected; the shape None is not compared."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    other_shape = sorted(key for key in expected if found.get(key) not in (None, expected[key]))
    if missing or unexpected or other_shape:
        raise CheckpointError(
            f"{folder} does not hold the weights of this model: missing {missing[:5]}, unexpected {unexpected[:5]}, of "
            f"another shape {other_shape[:5]}. Load the checkpoint of a model with the same configuration."
        )


def read_from_files(folder: Path, files: Mapping[str, Path], shapes: Mapping[str, torch.Size], into: Ranges) -> None:
    """Fill ranges from safetensors files, of which only the rows that hold a range are read."""
    for path in dict.fromkeys(files[key] for key in into):
        try:
            with safe_open(path, framework="pt") as file:
                for key in (key for key in into if files[key] == path):
                    (start, target), stored = into[key], file.get_slice(key)
                    check_keys(folder, {key: shapes[key]}, {key: torch.Size(stored.get_shape())})
                    if not shapes[key]:
                        target.copy_(stored[...].reshape(-1))
                    elif target.numel():
                        first, end, row = rows_of(shapes[key], start, target.numel())
                        target.copy_(stored[first:end].reshape(-1)[start - first * row :][: target.numel()])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def has_shards(folder: PathLike) -> bool:
    """Return whether a model folder has weights in shards."""
    return any(Path(folder, name).is_dir() for name in (SHARDED_FOLDER, FSDP_WEIGHTS_FOLDER))


def is_sharded_alone(folder: PathLike) -> bool:
    """Return whether a model folder has its weights in shards and not in files that `from_pretrained` loads."""
    return has_shards(folder) and not any(Path(folder, name).is_file() for name in WEIGHT_FILES)
