"""Make a model folder out of sharded weights, offline and file by file: `hf-radam consolidate`.

One process does it, with room for one file of weights in its memory. The files are written aside, then moved in beside
the shards, and the manifest gets their checksums; until then a reader finds what it found before.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_radam.checkpoints import manifest
from hf_radam.checkpoints.layouts import FSDP_WEIGHTS_FOLDER, SHARDED_FOLDER, WEIGHT_FILES
from hf_radam.checkpoints.manifest import CheckpointError, PathLike
from hf_radam.checkpoints.models.model_class import meta_model
from hf_radam.checkpoints.models.sharded_weights import CachedReader, read_sharded, shapes_in
from hf_radam.checkpoints.models.weight_files import Tensors, write_weights, written_names
from hf_radam.checkpoints.storage import flush
from hf_radam.checkpoints.verify import check_complete, evaluation_folder

logger = logging.getLogger(__name__)


def is_sharded_alone(folder: PathLike) -> bool:
    """Whether a model folder has its weights in shards and not whole."""
    path = Path(folder)
    whole = any((path / name).is_file() for name in WEIGHT_FILES)
    return not whole and any((path / name).is_dir() for name in (SHARDED_FOLDER, FSDP_WEIGHTS_FOLDER))


def consolidate(
    checkpoint: PathLike,
    *,
    training_weights: bool = False,
    model_class: Any = None,
    trust_remote_code: bool | None = None,
) -> Path:
    """Write the weights that evaluation uses, which a checkpoint holds in shards, whole into the same folder.

    Args:
        checkpoint: its folder.
        training_weights: write the weights that train instead, at the checkpoint's root.
        model_class: class of the model, where its configuration names none that `transformers` has.
        trust_remote_code: as for `from_pretrained`.

    Returns:
        The model folder, as `from_pretrained` loads it; at once if its weights are whole already.

    Raises:
        CheckpointError: if the checkpoint is damaged.
        OSError: if it cannot be written to.
    """
    if training_weights:
        check_complete(checkpoint, only="")
    folder = Path(checkpoint) if training_weights else evaluation_folder(checkpoint)
    if not is_sharded_alone(folder):
        return folder
    root = Path(checkpoint)
    times = root.stat()
    with tempfile.TemporaryDirectory(prefix=".consolidating-", dir=folder) as aside:
        names = _write_whole(folder, Path(aside), model_class=model_class, trust_remote_code=trust_remote_code)
        for name in sorted(names, key=lambda name: name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
            Path(aside, name).replace(folder / name)  # last the one by which a folder is taken for whole
    flush(folder)
    manifest.add_files(root, [(folder / name).relative_to(root).as_posix() for name in names])
    os.utime(root, ns=(times.st_atime_ns, times.st_mtime_ns))  # by which rotation tells which is the oldest
    return folder


@contextmanager
def consolidated(checkpoint: Path, folder: Path, **options: Any) -> Iterator[Path]:
    """Context with the evaluation weights as a whole model folder: in the checkpoint, or aside if that is read-only."""
    try:
        written = consolidate(checkpoint, **options)
    except OSError as error:
        logger.warning("%s cannot be written to (%s): its weights are put together elsewhere.", folder, error)
    else:
        yield written
        return
    with tempfile.TemporaryDirectory() as aside:
        for file in folder.iterdir():
            if file.is_file():
                shutil.copy2(file, aside)
        _write_whole(folder, Path(aside), **options)
        yield Path(aside)


def _write_whole(
    folder: Path, into: Path, *, model_class: Any = None, trust_remote_code: bool | None = None
) -> list[str]:
    """Write the weights of a sharded folder into another one, in at most `MAX_FILE_BYTES` each; returns the files."""
    model = meta_model(folder, model_class=model_class, trust_remote_code=trust_remote_code)
    tensors = _flattened(folder) if (folder / SHARDED_FOLDER).is_dir() else _of_fsdp(folder, model)
    write_weights(into, model, tensors, writes=True)
    names = [file.name for file in into.iterdir() if file.name.startswith(SAFE_WEIGHTS_NAME.split(".")[0])]
    for name in names:
        flush(into / name)
    return names


def _flattened(folder: Path) -> Tensors:
    """The tensors in shards of ours."""
    reader, shapes = CachedReader(folder / SHARDED_FOLDER), shapes_in(folder / SHARDED_FOLDER)
    facts = reader.contents.state_dict_metadata
    if set(facts) != set(shapes):
        raise CheckpointError(f"{folder / SHARDED_FOLDER} is damaged: its parts speak of other tensors.")
    like = {name: torch.empty(shape, dtype=_dtype(facts[name]), device="meta") for name, shape in shapes.items()}

    def read(name: str) -> Tensor:
        target = torch.empty(like[name].numel(), dtype=like[name].dtype)
        read_sharded(reader, {name: (0, target)})
        return target.view(like[name].shape)

    return Tensors(like, read)


def _of_fsdp(folder: Path, model: nn.Module | None) -> Tensors:
    """The tensors in shards of upstream's FSDP, which names them `model.NAME`, those that are tied by every name."""
    reader = CachedReader(folder / FSDP_WEIGHTS_FOLDER)
    like: dict[str, Tensor] = {}
    for name, facts in reader.contents.state_dict_metadata.items():
        if isinstance(facts, TensorStorageMetadata):
            key = name.removeprefix("model.")
            like[key] = torch.empty(facts.size, dtype=_dtype(facts), device="meta")
    if model is not None:
        written = written_names(model)
        if not set(written) <= set(like):
            raise CheckpointError(f"{reader.path} has no {min(set(written) - set(like))}: it is of another model.")
        like = {key: like[key] for key in written}

    def read(key: str) -> Tensor:
        content = {f"model.{key}": torch.empty(like[key].shape, dtype=like[key].dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what no_dist asks for
            dcp.load(content, storage_reader=reader, no_dist=True)
        return content[f"model.{key}"]

    return Tensors(like, read)


def _dtype(facts: Any) -> torch.dtype:
    dtype: torch.dtype = facts.properties.dtype
    return dtype
