"""Read and write `hf_radam.json`, the manifest of a checkpoint: method, schedule, progress, evaluation weights, files.

It is written last and holds the hash of every other file and of itself. `trainer_state.json` carries a mark as well, so
that a checkpoint that lost its manifest is not taken for one of stock `Trainer`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_radam.checkpoints.storage import NOTHING, FileHasher, flush, sha256

MANIFEST_NAME = "hf_radam.json"
FORMAT_VERSION = 2
OWN_CHECKSUM = "manifest_sha256"
NO_CHECKSUM = "0" * 64
TRAINER_STATE_NAME = "trainer_state.json"
MARK = "hf_radam"
"""Key of our mark in the state of `TrainerControl` among the `stateful_callbacks` of the trainer's state."""
EWA_FOLDER, SCHEDULE_FREE_FOLDER = "ewa", "schedule_free"
EVALUATION_FOLDERS = (EWA_FOLDER, SCHEDULE_FREE_FOLDER)
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What reading raises where a JSON file is missing, corrupted, or has another content than expected."""

PathLike = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint is corrupted, or cannot be used with the given arguments."""


def mark_state(stateful_callbacks: dict[str, Any], step: int) -> None:
    """Mark the trainer's state; a stock `Trainer` that resumes writes its control's state anew, without the mark."""
    stateful_callbacks.pop(MARK, None)  # where it was before 0.2
    stateful_callbacks.setdefault("TrainerControl", {})[MARK] = {"global_step": step}


def recorded_step(folder: PathLike) -> int | None:
    """Return the step in a folder's trainer state; None if there is no state that can be read."""
    try:
        return int(json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])
    except UNREADABLE:
        return None


def is_marked(checkpoint: PathLike) -> bool:
    """Return whether the trainer's state in a checkpoint has our mark, made at its step."""
    try:
        state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        marks = [state["stateful_callbacks"].get("TrainerControl", {}), state["stateful_callbacks"]]
        return any(one.get(MARK) == {"global_step": state["global_step"]} for one in marks)
    except UNREADABLE:
        return False


def write_manifest(
    checkpoint: PathLike,
    content: Mapping[str, Any],
    *,
    hasher: FileHasher | None = None,
    known: Mapping[str, tuple[int, str]] = NOTHING,
) -> None:
    """Write `hf_radam.json`: `content`, the format version, and size and sha256 of every file in the checkpoint.

    When it returns, everything in the checkpoint is on the disk. `hasher` is of that folder, if some of its files were
    submitted already; `known` has size and hash, by path, of files that other ranks have hashed.
    """
    path = Path(checkpoint)
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    hashed = (hasher or FileHasher(path)).finish(known=known)
    files = {name: {"size": size, "sha256": digest} for name, (size, digest) in hashed.items()}
    _write(path / MANIFEST_NAME, {"format_version": FORMAT_VERSION, **content, "files": files})
    flush(path)


def add_files(checkpoint: PathLike, names: Iterable[str]) -> None:
    """Add files that were written and flushed later to the manifest of a checkpoint, if it has one."""
    path = Path(checkpoint)
    manifest = read_manifest(path)
    if manifest is None:
        return
    for name in names:
        manifest["files"][name] = {"size": (path / name).stat().st_size, "sha256": sha256(path / name)}
    aside = path / f".{MANIFEST_NAME}"
    _write(aside, manifest)
    aside.replace(path / MANIFEST_NAME)
    flush(path)


def _write(file: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest with its own hash, which is taken with `NO_CHECKSUM` in its place, and flush it."""
    text = json.dumps({**manifest, OWN_CHECKSUM: NO_CHECKSUM}, indent=2) + "\n"
    file.write_text(text.replace(NO_CHECKSUM, _own_checksum(text)), encoding="utf-8")
    flush(file)


def _own_checksum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_manifest(checkpoint: PathLike) -> dict[str, Any] | None:
    """Read and check the manifest of a checkpoint; None for a checkpoint of stock `Trainer`.

    Raises:
        CheckpointError: if the manifest is missing although hf_radam wrote the checkpoint, or cannot be read.
    """
    path = Path(checkpoint)
    file = path / MANIFEST_NAME
    if not file.is_file():
        own = [f"{folder}/" for folder in EVALUATION_FOLDERS if (path / folder).is_dir()]
        own += [f"our mark in {TRAINER_STATE_NAME}"] if is_marked(path) else []
        if own:
            raise CheckpointError(f"{path} has {own[0]} but no {MANIFEST_NAME}: it is corrupted or incomplete.")
        return None
    try:
        text = file.read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        version = int(manifest["format_version"])
        if version == FORMAT_VERSION:
            own_checksum = manifest[OWN_CHECKSUM]
            if _own_checksum(text.replace(own_checksum, NO_CHECKSUM)) != own_checksum:
                raise ValueError("its hash does not match its content")
    except UNREADABLE as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}): the checkpoint is corrupted.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format {version}, this hf_radam reads {FORMAT_VERSION}. Use the hf_radam that wrote it, or "
            "the newest."
        )
    return manifest
