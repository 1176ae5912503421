"""`hf_radam.json`, the manifest of a checkpoint: what was trained and how far, what is evaluated, which files it has.

It is written last and holds the checksum of every other file, and of itself. A checkpoint of ours also says so in its
`trainer_state.json`, so that one whose manifest is lost is not taken for one of stock `Trainer`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_radam.averaging import WeightAverage
from hf_radam.checkpoints.storage import NOTHING, Sealing, flush, sha256
from hf_radam.sharding.base import canonical

MANIFEST_NAME = "hf_radam.json"
FORMAT_VERSION = 2
OWN_CHECKSUM = "manifest_sha256"
NO_CHECKSUM = "0" * 64
TRAINER_STATE_NAME = "trainer_state.json"
MARK = "hf_radam"
"""Key of our mark among the `stateful_callbacks` of the trainer's state."""
EWA_FOLDER = "ewa"
SCHEDULE_FREE_FOLDER = "schedule_free"
EVALUATION_FOLDERS = (EWA_FOLDER, SCHEDULE_FREE_FOLDER)

PathLike = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or that the arguments do not allow to go on from."""


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


def mark(step: int) -> dict[str, int]:
    """What the trainer's state says of a checkpoint of ours, under `MARK`.

    With the update it was made at: stock `Trainer` carries it on into the checkpoints that it writes later.
    """
    return {"global_step": step}


def is_marked(checkpoint: PathLike) -> bool:
    """Whether the trainer's state in a checkpoint says that it is one of ours."""
    try:
        state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return bool(state["stateful_callbacks"].get(MARK) == mark(state["global_step"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def is_ours(checkpoint: PathLike) -> bool:
    """Whether a checkpoint has parts that only we write, whole or not."""
    return any((Path(checkpoint) / name).exists() for name in (MANIFEST_NAME, *EVALUATION_FOLDERS)) or is_marked(
        checkpoint
    )


def write_manifest(
    checkpoint: PathLike,
    content: Mapping[str, Any],
    *,
    sealing: Sealing | None = None,
    sealed: Mapping[str, tuple[int, str]] = NOTHING,
) -> None:
    """Write `hf_radam.json`: `content`, the format's version, and size and sha256 of every file in the checkpoint.

    When it returns, everything in the checkpoint is on the disk.

    Args:
        checkpoint: its folder, complete but for this file.
        content: what else the manifest says.
        sealing: of that folder, if some of its files are under way already.
        sealed: what other processes have sealed: size and sha256 by path.
    """
    path = Path(checkpoint)
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    files = {
        name: {"size": size, "sha256": checksum}
        for name, (size, checksum) in (sealing or Sealing(path)).finish(sealed=sealed).items()
    }
    _write(path / MANIFEST_NAME, {"format_version": FORMAT_VERSION, **content, "files": files})
    flush(path)


def add_files(checkpoint: PathLike, names: Iterable[str]) -> None:
    """Take files that were written later into the manifest of a checkpoint, if it has one.

    Args:
        checkpoint: its folder.
        names: their paths in it; they are on the disk.
    """
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
    """Write a manifest with the checksum of its own, and have it on the disk."""
    text = json.dumps({**manifest, OWN_CHECKSUM: NO_CHECKSUM}, indent=2) + "\n"
    file.write_text(text.replace(NO_CHECKSUM, _own_checksum(text)), encoding="utf-8")
    flush(file)


def _own_checksum(text: str) -> str:
    """The sha256 of a manifest's text in which the place of this checksum is filled with `NO_CHECKSUM`."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_manifest(checkpoint: PathLike) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None for one that stock `Trainer` wrote.

    Raises:
        CheckpointError: if the checkpoint has evaluation weights of ours but no manifest (it was not finished), or a
            manifest that cannot be read.
    """
    path = Path(checkpoint)
    if not (path / MANIFEST_NAME).is_file():
        leftovers = [f"{folder}/" for folder in EVALUATION_FOLDERS if (path / folder).is_dir()]
        if leftovers or is_marked(path):
            own = leftovers[0] if leftovers else f"our mark in {TRAINER_STATE_NAME}"
            raise CheckpointError(f"{path} has {own} but no {MANIFEST_NAME}: it is damaged or was not finished.")
        return None
    try:
        text = (path / MANIFEST_NAME).read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        version = int(manifest["format_version"])
        if version == FORMAT_VERSION:
            own = manifest[OWN_CHECKSUM]
            if _own_checksum(text.replace(own, NO_CHECKSUM)) != own:
                raise ValueError("its checksum does not agree with its content")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path / MANIFEST_NAME} cannot be read ({error!r}): the checkpoint is damaged."
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / MANIFEST_NAME} has format {version}, this hf_radam reads {FORMAT_VERSION}: use the hf_radam that "
            "wrote it, or the newest."
        )
    return manifest


def describe_average(average: WeightAverage | None, *, requested_start_step: int) -> dict[str, Any] | None:
    """Window and counters of an average, and the `ewa_start_step` that was asked for (it may have begun later)."""
    if average is None:
        return None
    window = {"decay": average.decay, "half_life_ratio": average.half_life_ratio, "every": average.every}
    return {**window, "requested_start_step": requested_start_step, **average.counters()}
