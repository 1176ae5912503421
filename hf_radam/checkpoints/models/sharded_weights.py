"""Weights in a folder of `torch.distributed.checkpoint`, to which every process writes what it has of each tensor.

    ewa/sharded/.metadata       which stretch of which tensor is where
    ewa/sharded/__1_0.distcp    what rank 1 wrote
    ewa/sharded/shapes.json     the tensors' shapes: every tensor is written flattened

No process ever holds more than its own part and one tensor's stretch of it. As tensors are flattened, what one
back-end or number of processes has written is read by any other: a stretch is found in whatever stretches there are.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from hf_radam.checkpoints.dcp_folders import read_metadata
from hf_radam.checkpoints.manifest import CheckpointError

SHAPES_NAME = "shapes.json"


@dataclass(frozen=True)
class Stretch:
    """What this process has of one tensor.

    Attributes:
        shape: of the whole tensor.
        dtype: in which it is written.
        start: first element, of the flattened tensor.
        length: how many elements; 0 if another process has them.
        read: makes them, as a tensor of any shape and dtype.
    """

    shape: torch.Size
    dtype: torch.dtype
    start: int
    length: int
    read: Callable[[], Tensor]


class _SavePlanner(dcp.DefaultSavePlanner):
    """Writes stretches of flattened tensors, each made only when its turn comes."""

    def __init__(self, stretches: Mapping[str, Stretch]):
        super().__init__()
        self.stretches = stretches

    def create_local_plan(self) -> SavePlan:
        """One item for each stretch that is not empty."""
        items = [_write_item(name, stretch) for name, stretch in self.stretches.items() if stretch.length]
        self.plan = SavePlan(items, planner_data={name: (name,) for name in self.stretches})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The stretch's elements, on the CPU."""
        stretch = self.stretches[write_item.index.fqn]
        return stretch.read().detach().reshape(-1).to(device="cpu", dtype=stretch.dtype)


def _write_item(name: str, stretch: Stretch) -> WriteItem:
    chunk = ChunkStorageMetadata(offsets=torch.Size([stretch.start]), sizes=torch.Size([stretch.length]))
    properties = TensorProperties(dtype=stretch.dtype)
    return WriteItem(
        index=MetadataIndex(name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=torch.Size([stretch.shape.numel()])),
    )


def write_sharded(folder: Path, stretches: Mapping[str, Stretch], *, first: bool) -> None:
    """Write what this process has; every process must call it, with the same names.

    Args:
        folder: where to; on a file system that all processes share.
        stretches: by the tensors' names in the model's state dict.
        first: whether this is the process that writes what is said once.
    """
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {name: list(stretch.shape) for name, stretch in stretches.items()}
        (folder / SHAPES_NAME).write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")
    # One thread: a stretch that waits to be written is one too many.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    dcp.save({}, storage_writer=writer, planner=_SavePlanner(stretches), no_dist=not _together())


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Reads stretches of flattened tensors, from whatever stretches were written."""

    def __init__(self, into: Mapping[str, tuple[int, Tensor]]):
        super().__init__()
        self.into = into

    def create_local_plan(self) -> LoadPlan:
        """Where each element of each stretch is to be found."""
        assert self.metadata is not None, "it was read before a plan is asked for"
        items: list[ReadItem] = []
        for name, (start, target) in self.into.items():
            facts = self.metadata.state_dict_metadata[name]
            assert isinstance(facts, TensorStorageMetadata), "nothing else is written"
            chunk = ChunkStorageMetadata(offsets=torch.Size([start]), sizes=torch.Size([target.numel()]))
            found = create_read_items_for_chunk_list(name, facts, [chunk])
            if sum(item.lengths.numel() for item in found) != target.numel():
                raise ValueError(f"not all of {name} is there")
            items += found
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The place for what an item reads."""
        target = self.into[read_item.dest_index.fqn][1]
        return target.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: it was read into its place."""


def shapes_in(folder: Path) -> dict[str, torch.Size]:
    """The shapes of the tensors in a folder, by their names in the model's state dict.

    Raises:
        CheckpointError: if the folder does not say.
    """
    try:
        shapes = json.loads((folder / SHAPES_NAME).read_text(encoding="utf-8"))
        return {name: torch.Size(shape) for name, shape in shapes.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / SHAPES_NAME} cannot be read ({error!r}): the folder is damaged.") from error


class CachedReader(dcp.FileSystemReader):
    """Reads a folder's metadata once, however often it is read from, and runs nothing that is in it."""

    @cached_property
    def contents(self) -> Metadata:
        """The metadata."""
        return read_metadata(self.path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, for torch."""
        return self.contents


def read_sharded(folder: Path | CachedReader, into: Mapping[str, tuple[int, Tensor]]) -> None:
    """Fill this process's stretches; each process reads by itself.

    Args:
        folder: a folder that `write_sharded` wrote, or a reader of it.
        into: first element and a one-dimensional tensor to fill, by the tensors' names; empty ones may be left out.

    Raises:
        CheckpointError: if the folder cannot be read.
    """
    wanted: dict[str, Any] = {name: place for name, place in into.items() if place[1].numel()}
    reader = folder if isinstance(folder, CachedReader) else CachedReader(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what no_dist asks for
            dcp.load({}, storage_reader=reader, planner=_LoadPlanner(wanted), no_dist=True)
    except Exception as error:  # torch wraps what went wrong in one of several of its own
        raise CheckpointError(f"{reader.path} cannot be read: {error}") from error


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
