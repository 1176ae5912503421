"""`hf_radam.json`, the manifest of a checkpoint: what was trained and how far, what is evaluated, which files it has.

The manifest is written last, so a checkpoint with evaluation weights but no manifest was not finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_radam.averaging import WeightAverage

MANIFEST_NAME = "hf_radam.json"
FORMAT_VERSION = 1
EWA_FOLDER = "ewa"
SCHEDULE_FREE_FOLDER = "schedule_free"
EVALUATION_FOLDERS = (EWA_FOLDER, SCHEDULE_FREE_FOLDER)

PathLike = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or that the arguments do not allow to go on from."""


def parameter_dtypes(model: nn.Module) -> dict[str, Any]:
    """The dtype that most parameters have, and those of the parameters that have another one, by name."""
    dtypes = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()}
    numel: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        numel[dtypes[name]] = numel.get(dtypes[name], 0) + parameter.numel()
    common = max(numel, key=lambda dtype: numel[dtype])
    return {"dtype": common, "other_dtypes": {name: d for name, d in dtypes.items() if d != common}}


def sha256(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(checkpoint: PathLike, content: Mapping[str, Any]) -> None:
    """Write `hf_radam.json`: `content`, the format's version, and size and sha256 of every file in the checkpoint."""
    path = Path(checkpoint)
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != MANIFEST_NAME:
            files[file.relative_to(path).as_posix()] = {"size": file.stat().st_size, "sha256": sha256(file)}
    manifest = {"format_version": FORMAT_VERSION, **content, "files": files}
    temporary = path / f".{MANIFEST_NAME}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path / MANIFEST_NAME)


def read_manifest(checkpoint: PathLike) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None for one that stock `Trainer` wrote.

    Raises:
        CheckpointError: if the checkpoint has evaluation weights of ours but no manifest (it was not finished), or a
            manifest that cannot be read.
    """
    path = Path(checkpoint)
    if not (path / MANIFEST_NAME).is_file():
        leftovers = [folder for folder in EVALUATION_FOLDERS if (path / folder).is_dir()]
        if leftovers:
            raise CheckpointError(f"{path} has {leftovers[0]}/ but no {MANIFEST_NAME}: it was not written to the end.")
        return None
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
        version = int(manifest["format_version"])
        for facts in manifest["files"].values():
            int(facts["size"])
        for part, key in (("evaluation", "folder"), ("evaluation", "dtype"), ("method", "optim")):
            manifest[part][key]
        manifest["averaging"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path / MANIFEST_NAME} cannot be read ({error!r}): the checkpoint is damaged."
        ) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path / MANIFEST_NAME} has format {version}, this hf_radam knows up to {FORMAT_VERSION}: update hf_radam."
        )
    return manifest


def check_files(checkpoint: PathLike, manifest: Mapping[str, Any], *, model_in: str | None = None) -> None:
    """Raise `CheckpointError` if a file that the manifest lists is missing or has another size.

    Args:
        checkpoint: the checkpoint's folder.
        manifest: its manifest.
        model_in: look only at the weights in this folder of the checkpoint (``""`` is its root); by default at all.
    """
    path = Path(checkpoint)
    for name, facts in manifest["files"].items():
        file = path / name
        if model_in is not None and not (file.suffix == ".safetensors" and file.parent == path / model_in):
            continue
        if not file.is_file() or file.stat().st_size != facts["size"]:
            raise CheckpointError(f"{file} is missing or not {facts['size']} bytes long: the checkpoint is damaged.")


def describe_average(average: WeightAverage | None, *, requested_start_step: int) -> dict[str, Any] | None:
    """Window and counters of an average, and the `ewa_start_step` that was asked for (it may have begun later)."""
    if average is None:
        return None
    window = {"decay": average.decay, "half_life_ratio": average.half_life_ratio, "every": average.every}
    return {**window, "requested_start_step": requested_start_step, **average.counters()}
