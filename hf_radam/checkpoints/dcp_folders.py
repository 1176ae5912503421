"""Read the folders that `torch.distributed.checkpoint` writes: what is in them, and whether they are whole.

    optimizer_0/.metadata       a pickle: every entry's name, shape and place
    optimizer_0/__1_0.distcp    what rank 1 wrote: entries one behind the other, each as `torch.save` makes it

Only `read_folder` trusts a folder as upstream's resume does. The other functions run nothing that is written in it.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hf_radam.checkpoints.manifest import CheckpointError, PathLike

METADATA_NAME = ".metadata"
LARGEST_METADATA = 2**30  # bytes; an entry of a tensor on a rank takes about 200
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
"""What the metadata is made of: plain records, and functions that make nothing but a value."""


class _Unpickler(pickle.Unpickler):
    """Makes nothing but the records of the metadata."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib":  # where it was written, under names that differ by Python's version
            return lambda *parts: "/".join(parts)
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if name in TRUSTED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def read_metadata(folder: PathLike) -> Metadata:
    """The metadata of a folder, without running anything in it.

    Raises:
        CheckpointError: if it is missing, or is none.
    """
    file = Path(folder) / METADATA_NAME
    try:
        if file.stat().st_size > LARGEST_METADATA:
            raise ValueError("it is too long")
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it is a {type(metadata).__name__}")
        places = dict(metadata.storage_data)
        if {index.fqn for index in places} != set(metadata.state_dict_metadata) or metadata.planner_data is None:
            raise ValueError("it does not say where everything is")
        if not all(Path(place.relative_path).name == place.relative_path for place in places.values()):
            raise ValueError("it names files outside")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except Exception as error:  # what a damaged pickle raises depends on where the damage is
        raise CheckpointError(f"{file} cannot be read ({error})") from error
    return metadata


def damaged_files(folder: PathLike) -> dict[str, str]:
    """What is wrong with each bad file of a folder, by its name; every entry that the metadata names is read."""
    path = Path(folder)
    try:
        metadata = read_metadata(path)
    except CheckpointError as error:
        return {METADATA_NAME: str(error).removeprefix(f"{path / METADATA_NAME} ")}
    wrong: dict[str, str] = {}
    for index, place in metadata.storage_data.items():
        if place.relative_path not in wrong:
            problem = _damaged_entry(path / place.relative_path, place)
            if problem:
                wrong[place.relative_path] = problem.format(index.fqn)
    return wrong


def _damaged_entry(file: Path, place: Any) -> str | None:
    try:
        entry = _entry(file, place)
        if len(entry) != place.length:
            return f"is {file.stat().st_size} bytes long, too short for its {{}}"
        if not place.transform_descriptors:  # else compressed
            with zipfile.ZipFile(io.BytesIO(entry)) as archive:
                if archive.testzip() is not None:
                    return "has another checksum in {} than when it was written"
    except FileNotFoundError:
        return f"is missing, though {METADATA_NAME} names it"
    except Exception as error:  # a zip archive fails in as many ways as it has fields
        return f"cannot be read in its {{}} ({type(error).__name__})"
    return None


def _entry(file: Path, place: Any) -> bytes:
    with file.open("rb") as stream:
        stream.seek(place.offset)
        return stream.read(place.length)


def plain_values(folder: PathLike) -> dict[str, Any]:
    """The tree of a folder without its tensors, but for a learning rate that is one.

    Raises:
        CheckpointError: if the folder is damaged.
    """
    metadata = read_metadata(folder)
    return _tree(metadata, dict(_plain_entries(Path(folder), metadata)))


def _plain_entries(folder: Path, metadata: Metadata) -> Iterator[tuple[str, Any]]:
    for index, place in metadata.storage_data.items():
        of_group = "param_groups" in metadata.planner_data[index.fqn]
        if of_group or not isinstance(metadata.state_dict_metadata[index.fqn], TensorStorageMetadata):
            try:
                entry = io.BytesIO(_entry(folder / place.relative_path, place))
                yield index.fqn, torch.load(entry, map_location="cpu", weights_only=True)
            except Exception as error:  # as above
                raise CheckpointError(
                    f"{folder / place.relative_path} cannot be read in its {index.fqn} ({type(error).__name__})"
                ) from error


def ranks(folder: PathLike) -> int:
    """How many ranks have written into a folder, as the names of its files tell."""
    return len({file.name.split("_")[2] for file in Path(folder).glob("__*_*.distcp")})


def read_folder(folder: PathLike) -> dict[str, Any]:
    """Everything in a folder as one tree with whole tensors on the CPU; each process reads by itself.

    Raises:
        CheckpointError: if the folder is damaged.
    """
    metadata = read_metadata(folder)
    flat: dict[str, Any] = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        if isinstance(facts, TensorStorageMetadata)
        else None
        for name, facts in metadata.state_dict_metadata.items()
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what no_dist asks for
            dcp.load(flat, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    except Exception as error:  # torch wraps what went wrong in one of several of its own
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return _tree(metadata, flat)


def _tree(metadata: Metadata, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Put flat entries back where they were in the tree that was written."""
    root: dict[Any, Any] = {}
    for name, value in flat.items():
        *parents, last = metadata.planner_data[name]
        branch = root
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = value
    return _with_lists(root)


def _with_lists(branch: Any) -> Any:
    """Dicts whose keys are numbers back into the lists that they were."""
    if not isinstance(branch, dict):
        return branch
    values = {key: _with_lists(value) for key, value in branch.items()}
    if values and all(isinstance(key, int) for key in values):
        return [values[key] for key in sorted(values)]
    return values
