"""Verify the files of a checkpoint against the hashes in its manifest.

A checkpoint of stock `Trainer` has no hashes: it only has to have a readable trainer state and some weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_radam.checkpoints.layouts import FSDP_WEIGHTS_FOLDER, SHARDED_FOLDER, WEIGHT_FILES, has_weights, training_shards
from hf_radam.checkpoints.manifest import (
    MANIFEST_NAME,
    TRAINER_STATE_NAME,
    CheckpointError,
    PathLike,
    is_marked,
    read_manifest,
    recorded_step,
)
from hf_radam.checkpoints.storage import HASH_THREADS, sha256

INCOMPLETE_NAME = "checkpoint-is-incomplete.txt"
"""Upstream's just-in-time save leaves this file in a checkpoint that it could not complete."""


def verify_checkpoint(checkpoint: PathLike, *, only: str | None = None, hashes: bool = True) -> dict[str, str]:
    """Verify a checkpoint.

    Args:
        checkpoint: its folder.
        only: verify only the model in this folder of the checkpoint (``""`` is its root), which is all that evaluation
            needs.
        hashes: whether to hash the files; else only their presence and sizes are compared.

    Returns:
        The problem of each bad file, by its path in the checkpoint; empty if there is none.
    """
    path = Path(checkpoint)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return {MANIFEST_NAME: str(error)}
    if manifest is None:
        return _verify_stock(path, only)
    files = {name: entry for name, entry in manifest["files"].items() if only is None or is_model_file(name, only)}
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        found = pool.map(lambda name: _problem(path / name, files[name], hashes), files)
        return {name: problem for name, problem in zip(files, found, strict=True) if problem is not None}


def is_model_file(name: str, folder: str) -> bool:
    """Return whether a file of a checkpoint belongs to the model in one of its folders (``""`` is its root)."""
    path = Path(name)
    if path.parent == Path(folder, SHARDED_FOLDER) or (folder == "" and path.parent == Path(FSDP_WEIGHTS_FOLDER)):
        return True
    of_model = path.suffix in (".safetensors", ".bin", ".json")
    return path.parent == Path(folder) and of_model and path.name not in (TRAINER_STATE_NAME, "training_args.bin")


def _problem(file: Path, entry: Mapping[str, Any], hashes: bool) -> str | None:
    try:
        size = file.stat().st_size
        if size != entry["size"]:
            return f"is {size} bytes long, not {entry['size']}"
        return None if not hashes or sha256(file) == entry["sha256"] else "has another sha256 than when it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"


def _verify_stock(path: Path, only: str | None) -> dict[str, str]:
    problems = {}
    if only is None and recorded_step(path) is None:
        problems[TRAINER_STATE_NAME] = "is missing or cannot be read"
    if (path / INCOMPLETE_NAME).is_file():
        problems[INCOMPLETE_NAME] = "says that the checkpoint was not saved completely"
    if not has_weights(path):
        shards = training_shards(path)
        if shards is None:
            problems[WEIGHT_FILES[0]] = "is missing, and there are no other weights"
        elif only is not None:
            problems[WEIGHT_FILES[0]] = f"is missing: the weights lie in {shards}/, in shards"
    return problems


def check_complete(checkpoint: PathLike, *, only: str | None = None) -> None:
    """Raise `CheckpointError`, naming the bad files, unless the checkpoint is complete and verified."""
    problems = verify_checkpoint(checkpoint, only=only)
    if MANIFEST_NAME in problems:
        raise CheckpointError(problems[MANIFEST_NAME])
    if problems:
        listed = "; ".join(f"{Path(checkpoint, name)} {problem}" for name, problem in problems.items())
        raise CheckpointError(f"The checkpoint is corrupted: {listed}.")


def evaluation_folder(checkpoint: PathLike) -> Path:
    """Return the folder of the model that evaluation used, complete and verified.

    Raises:
        CheckpointError: if model or manifest are corrupted, or a stock run has written into the checkpoint since.
    """
    manifest = read_manifest(checkpoint)
    folder = (manifest["evaluation"]["folder"] if manifest else None) or ""
    check_complete(checkpoint, only=folder)
    if folder and not is_marked(checkpoint) and recorded_step(checkpoint) is not None:
        raise CheckpointError(
            f"{checkpoint} was overwritten by a run that does not use hf_radam: {folder}/ is of an earlier one. Remove "
            f"{folder}/ and {MANIFEST_NAME} to load the later weights."
        )
    return Path(checkpoint) / folder
