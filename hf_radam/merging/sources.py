"""The checkpoints that are merged: read in order of their updates, refused where they are not of one model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import CONFIG_NAME

from hf_radam.checkpoints.layouts import ADAPTER_FILES, WEIGHT_FILES
from hf_radam.checkpoints.load import is_checkpoint
from hf_radam.checkpoints.manifest import CheckpointError, PathLike, read_manifest
from hf_radam.checkpoints.runs import recorded_step
from hf_radam.checkpoints.sharded import is_sharded_alone
from hf_radam.checkpoints.verify import check_complete
from hf_radam.checkpoints.weights import weight_files
from hf_radam.inspection.phases import CONSTANT, multiplier
from hf_radam.inspection.pickled import pickled_attributes

FREE_IN_CONFIG = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Entries of a configuration that say nothing of the model's form."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that is merged.

    Attributes:
        path: its folder.
        update: updates made by then.
        files: the file of each tensor, by its key there.
        like: each tensor without its numbers, by key: shape and dtype, on the meta device.
    """

    path: Path
    update: int
    files: Mapping[str, Path]
    like: Mapping[str, Tensor]

    def read(self, key: str) -> Tensor:
        """A tensor that is read from the file when it is used, and not held in memory before.

        Raises:
            CheckpointError: if it cannot be read.
        """
        try:
            # A handle for each tensor: what was touched of the file counts as memory until it is closed.
            with safe_open(self.files[key], framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.files[key]} cannot be read: {error}") from error


def find_sources(checkpoints: Sequence[PathLike]) -> list[Source]:
    """The checkpoints by increasing update, whole and of one model.

    Args:
        checkpoints: their folders, in any order.

    Raises:
        CheckpointError: if the weights at the root of one are damaged.
        ValueError: if there are fewer than two, two of the same update, one whose weights cannot be read tensor by
            tensor, or one of another model.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"{len(checkpoints)} checkpoint cannot be averaged: give two or more.")
    sources = sorted((_source(Path(checkpoint)) for checkpoint in checkpoints), key=lambda source: source.update)
    for before, after in zip(sources, sources[1:], strict=False):
        if before.update == after.update:
            raise ValueError(f"{before.path} and {after.path} are both of update {before.update}: leave one out.")
    for source in sources[:-1]:
        _check_same_model(source, sources[-1])
    for source in sources:
        check_complete(source.path, only="")
    return sources


def _source(path: Path) -> Source:
    _check_readable(path)
    manifest = read_manifest(path)
    update = recorded_step(path) if manifest is None else int(manifest["global_step"])
    if update is None:
        raise CheckpointError(f"{path} does not say at which update it was saved: its trainer_state.json is damaged.")
    files = weight_files(path)
    like = {}
    try:
        for file in dict.fromkeys(files.values()):
            with safe_open(file, framework="pt") as opened:
                for key in (key for key in opened.keys() if files.get(key) == file):  # noqa: SIM118
                    tensor = opened.get_tensor(key)
                    like[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if set(like) != set(files):
        raise CheckpointError(f"{path} is damaged: no file has {min(set(files) - set(like))}, which the index names.")
    return Source(path, update, files, like)


def _check_readable(path: Path) -> None:
    """Raise `ValueError`, saying what to do, for a folder without a model's weights in safetensors at its root."""
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: give checkpoints, such as runs/wsd/checkpoint-800.")
    if not is_checkpoint(path):
        raise ValueError(f"{path} is no checkpoint: give folders checkpoint-N, as a Trainer saves them.")
    if any((path / name).is_file() for name in ADAPTER_FILES):
        raise ValueError(f"{path} holds an adapter: only the weights of whole models are averaged here.")
    if is_sharded_alone(path):
        words = f"hf-radam consolidate {path} --training_weights"
        raise ValueError(f"{path} holds its weights in shards: put each together first, with {words}")
    if not any((path / name).is_file() for name in WEIGHT_FILES):
        raise ValueError(f"{path} has no weights at its root that can be averaged (model.safetensors).")
    if not weight_files(path):
        raise ValueError(f"{path} has its weights in .bin files: only safetensors can be read tensor by tensor.")


def _check_same_model(source: Source, newest: Source) -> None:
    missing, more = set(newest.like) - set(source.like), set(source.like) - set(newest.like)
    other = [key for key in newest.like if key in source.like and newest.like[key].shape != source.like[key].shape]
    for words, keys in (("without", missing), ("with", more), ("with another shape of", other)):
        if keys:
            raise ValueError(f"{source.path} is of another model than {newest.path}: {words} {min(keys)}.")
    here, there = _form(source.path), _form(newest.path)
    different = sorted(key for key in {*here, *there} if here.get(key) != there.get(key))
    if different:
        key = different[0]
        raise ValueError(
            f"{source.path} is of another model than {newest.path}: its {key} is {here.get(key)!r}, not "
            f"{there.get(key)!r}."
        )


def configuration(path: Path) -> dict[str, Any]:
    """The configuration at the root of a checkpoint; empty for a model that has none.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        content = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        return dict(content)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / CONFIG_NAME} cannot be read: {error}") from error


def _form(path: Path) -> dict[str, Any]:
    return {key: value for key, value in configuration(path).items() if key not in FREE_IN_CONFIG}


def not_constant(sources: Sequence[Source]) -> str | None:
    """A sentence if the learning rate did not stay the same between the first and the last of them.

    A decay that was trained is then in the weights already, and one that is put on them comes on top.
    """
    first, newest = sources[0].update, sources[-1].update
    manifest = read_manifest(sources[-1].path)
    if manifest is None:
        name = pickled_attributes(sources[-1].path / "training_args.bin").get("lr_scheduler_type")
        schedule = None
    else:
        name, schedule = manifest["method"]["lr_scheduler_type"], manifest["schedule"]
    if schedule is not None:
        changes = any(multiplier(schedule, step) != 1.0 for step in range(first, newest))
    else:
        changes = name not in CONSTANT
    if not changes:
        return None
    return (
        f"the learning rate of updates {first + 1}-{newest} was not constant ({name or 'schedule not known'}): weights "
        "in the shape of a decay are meant for checkpoints at a constant one, and come on top of it here."
    )


def is_statistic(key: str) -> bool:
    """Whether a tensor is one of BatchNorm's running statistics, by its name."""
    return re.fullmatch(r"(.*\.)?(running_mean|running_var|num_batches_tracked)", key) is not None
