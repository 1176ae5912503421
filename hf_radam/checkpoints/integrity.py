"""Say of every file in a checkpoint whether it is whole.

Files of a checkpoint of ours are compared with the manifest, byte for byte by their sha256. Of one that stock `Trainer`
wrote only the form is known: that the files it cannot do without are there, and that each can be read to its end.
"""

from __future__ import annotations

import heapq
import json
import re
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from hf_radam.checkpoints.layouts import (
    DEEPSPEED,
    DEEPSPEED_FOLDER,
    FSDP_SHARDED,
    FSDP_WEIGHTS_FOLDER,
    SHARDED_FOLDER,
    damaged_parts,
    layout_of,
    state_files,
)
from hf_radam.checkpoints.manifest import MANIFEST_NAME, TRAINER_STATE_NAME, CheckpointError, PathLike, read_manifest
from hf_radam.checkpoints.storage import SHA256_THREADS, sha256

WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
ADAPTER_FILES = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)
"""What reading raises where a file is not what its name says: a zip archive fails in as many ways as it has fields."""
TORCH_BIN = r"(pytorch_model.*|adapter_model|training_args|optimizer|scheduler)\.bin"
"""Files that torch writes under a suffix which others use as well."""
UNFINISHED = "checkpoint-is-incomplete.txt"
"""Upstream's just-in-time save leaves this file in a checkpoint that it did not finish."""


class FindDamage(Protocol):
    """`damage`, or what does the same with the help of other processes."""

    def __call__(self, checkpoint: PathLike, *, only: str | None = None) -> dict[str, str]:
        """See `damage`."""


def damage(checkpoint: PathLike, *, only: str | None = None, share: tuple[int, int] = (0, 1)) -> dict[str, str]:
    """What is wrong with a checkpoint.

    Args:
        checkpoint: its folder.
        only: look only at the model in this folder of the checkpoint (``""`` is its root), which is all that evaluating
            it needs.
        share: which part of the files to look at, and of how many: the parts are about equally large. All that has no
            manifest is in the first.

    Returns:
        What is wrong with each bad file, by its path in the checkpoint; empty for a whole checkpoint.
    """
    path = Path(checkpoint)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return {MANIFEST_NAME: str(error)}
    part, parts = share
    if manifest is None:
        return damaged_form(path, only) if part == 0 else {}
    files = {name: facts for name, facts in manifest["files"].items() if only is None or _belongs_to_model(name, only)}
    mine = _shared_out(files, parts)[part]
    with ThreadPoolExecutor(SHA256_THREADS) as pool:
        problems = pool.map(lambda name: _difference(path / name, files[name]), mine)
        found = dict(zip(mine, problems, strict=True))
    return {name: problem for name in files if (problem := found.get(name)) is not None}


def _shared_out(files: dict[str, Any], parts: int) -> list[list[str]]:
    """The names in parts, of about the same size in all: each in turn, the largest first, goes to the smallest part."""
    names: list[list[str]] = [[] for _ in range(parts)]
    smallest = [(0, part) for part in range(parts)]
    for name in sorted(files, key=lambda name: (-files[name]["size"], name)):
        size, part = smallest[0]
        names[part].append(name)
        heapq.heapreplace(smallest, (size + files[name]["size"], part))
    return names


def check_whole(checkpoint: PathLike, *, only: str | None = None, find: FindDamage = damage) -> None:
    """Raise `CheckpointError`, naming the bad files, if `find` finds any."""
    wrong = find(checkpoint, only=only)
    if MANIFEST_NAME in wrong:
        raise CheckpointError(wrong[MANIFEST_NAME])
    if wrong:
        listed = "; ".join(f"{Path(checkpoint, name)} {problem}" for name, problem in wrong.items())
        raise CheckpointError(f"The checkpoint is damaged: {listed}.")


def evaluation_folder(checkpoint: PathLike, *, find: FindDamage = damage) -> Path:
    """The model folder in a checkpoint that holds the weights that evaluation used; `find` tells whether it is whole.

    Raises:
        CheckpointError: if the files of that model, or the manifest that says which it is, are damaged.
    """
    manifest = read_manifest(checkpoint)
    folder = (manifest["evaluation"]["folder"] if manifest else None) or ""
    check_whole(checkpoint, only=folder, find=find)
    return Path(checkpoint) / folder


def _belongs_to_model(name: str, folder: str) -> bool:
    path = Path(name)
    shards = [Path(folder, SHARDED_FOLDER), *([Path(FSDP_WEIGHTS_FOLDER)] if folder == "" else [])]
    return path.parent in shards or (
        path.parent == Path(folder)
        and path.suffix in (".safetensors", ".bin", ".json")
        and (path.name not in (TRAINER_STATE_NAME, "training_args.bin"))
    )


def _difference(file: Path, facts: dict[str, object]) -> str | None:
    """What tells a file from the one that the manifest describes."""
    try:
        size = file.stat().st_size
        if size != facts["size"]:
            return f"is {size} bytes long, not {facts['size']}"
        return None if sha256(file) == facts["sha256"] else "has another sha256 than when it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"


def damaged_form(path: Path, only: str | None = None) -> dict[str, str]:
    """What is wrong with a checkpoint as far as its form tells, which is all there is to go by without a manifest.

    Arguments and result are those of `damage`.
    """
    wrong = {}
    if only is None and not (path / TRAINER_STATE_NAME).is_file():
        wrong[TRAINER_STATE_NAME] = "is missing"
    if (path / UNFINISHED).is_file():
        wrong[UNFINISHED] = "says that the save did not come to its end"
    adapters = [folder for folder in path.glob("*/") if any((folder / name).is_file() for name in ADAPTER_FILES)]
    if not adapters and not any((path / name).is_file() for name in (*WEIGHT_FILES, *ADAPTER_FILES)):
        problem = _without_weights(path, only)
        wrong |= {SAFE_WEIGHTS_NAME: problem} if problem else {}
    for index in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        for shard in _shards(path / index):
            if not (path / shard).is_file():
                wrong[shard] = f"is missing, though {index} names it"
    for file in [*sorted(p for p in path.iterdir() if p.is_file()), *state_files(path)]:
        name = file.relative_to(path).as_posix()
        if only is None or _belongs_to_model(name, only):
            problem = _malformed(file)
            if problem:
                wrong[name] = problem
    return wrong if only is not None else wrong | damaged_parts(path)


def _without_weights(path: Path, only: str | None) -> str | None:
    """What is wrong with a checkpoint that has no weights at its root, as some sharded ones have not."""
    folder = {FSDP_SHARDED: FSDP_WEIGHTS_FOLDER, DEEPSPEED: f"{DEEPSPEED_FOLDER}N"}.get(layout_of(path))
    if folder is None:
        return "is missing, and there are no other weights"
    # Training goes on from the shards, but they are no model to load.
    return None if only is None else f"is missing: the weights lie in {folder}/, in shards"


def _is_trainer_state(content: object) -> bool:
    return isinstance(content, dict) and isinstance(content.get("global_step"), int)


def _shards(index: Path) -> list[str]:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(str(shard) for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _malformed(file: Path) -> str | None:
    """Why a file cannot be what its name says; torch's files are zip archives with a checksum of every part."""
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            if file.name == TRAINER_STATE_NAME and not _is_trainer_state(content):
                return "is no trainer state: it has no global_step"
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix in (".pt", ".pth") or re.fullmatch(TORCH_BIN, file.name):
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()
            return None if bad is None else f"has another checksum in its part {bad} than when it was written"
    except UNREADABLE as error:
        return f"cannot be read ({str(error) or type(error).__name__})"
    return None
