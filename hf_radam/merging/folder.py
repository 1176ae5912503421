"""Write the merged model: tensor by tensor, on the CPU, as a complete model folder.

The tensors are merged as they lie in the files, so that no model is made and none of its code is run. Memory holds one
file that is written (`max_file_bytes` or `weights.MAX_FILE_BYTES`), and of what is read the tensor that is merged.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from hf_radam.checkpoints.layouts import DEEPSPEED_LATEST
from hf_radam.checkpoints.manifest import MANIFEST_NAME, TRAINER_STATE_NAME, CheckpointError, PathLike
from hf_radam.checkpoints.storage import flush
from hf_radam.checkpoints.verify import INCOMPLETE_NAME
from hf_radam.checkpoints.weights import Tensors, promote_to_fp32, set_config_dtype, write_weights
from hf_radam.merging.coefficients import DECAY_SHAPES, coefficients
from hf_radam.merging.differences import differences
from hf_radam.merging.sources import Source, configuration, find_sources, is_statistic, not_constant

RECORD_NAME = "hf_radam_average.json"
"""In the model folder: which checkpoints it is made of, and how much each counts."""
ASIDE = ".averaging-"
"""How the name of a folder begins in which a merge is written, beside the one that it becomes."""
CHUNK = 2**20
"""Elements that are merged at once."""
NOT_OF_THE_MODEL = frozenset(
    {
        TRAINER_STATE_NAME,
        MANIFEST_NAME,
        SAFE_WEIGHTS_INDEX_NAME,
        WEIGHTS_INDEX_NAME,
        INCOMPLETE_NAME,
        DEEPSPEED_LATEST,
        "zero_to_fp32.py",
    }
)
WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth"})
TEMPLATES_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class Merge:
    """What was merged.

    Attributes:
        sources: the checkpoints, by increasing update.
        coefficients: how much each counts.
        notes: sentences that the user should know.
    """

    sources: list[Source]
    coefficients: list[float]
    notes: list[str]


def merge(
    checkpoints: Sequence[PathLike],
    into: PathLike,
    *,
    weights: str,
    decay: float | None = None,
    half_life_ratio: float | None = None,
    max_file_bytes: int | None = None,
) -> Merge:
    """Merge the training weights of checkpoints into a model folder that plain `from_pretrained` loads.

    Floating-point tensors below float32 are summed and written in float32, float64 in itself; one that is the same in
    all checkpoints stays the same bit for bit. BatchNorm's statistics and what is not floating-point are those of the
    last checkpoint. So are configuration, tokenizer and whatever else of the model lies there.

    Args:
        checkpoints: their folders, in any order.
        into: the folder to make; it may be there, empty.
        weights: one of `hf_radam.merging.coefficients.WEIGHTS`.
        decay: as for `coefficients`.
        half_life_ratio: likewise.
        max_file_bytes: of a file of weights.

    Raises:
        CheckpointError: if a checkpoint is damaged, or not a number is in its weights.
        ValueError: if the checkpoints cannot be merged, or `into` is not empty.
        OSError: if the folder cannot be written; nothing is left of it.
    """
    target = _place(into)
    if max_file_bytes is not None and max_file_bytes < 1:
        raise ValueError(f"a file of at most {max_file_bytes} bytes cannot hold weights: give 1 or more.")
    sources = find_sources(checkpoints)
    _check_kind(sources[-1])
    updates = [source.update for source in sources]
    shares = coefficients(updates, weights=weights, decay=decay, half_life_ratio=half_life_ratio)
    notes = _notes(sources, weights)
    notes += [
        f"{folder} is what a merge that was killed has left, or of one that is running: remove it if none is."
        for folder in sorted(target.parent.glob(f"{ASIDE}*"))
    ]
    with _aside(target.parent) as aside:
        made = Path(aside, "model")  # the folder around it is closed to others
        made.mkdir()
        _write(made, target, sources, shares, weights=weights, max_file_bytes=max_file_bytes)
        if target.exists():
            target.rmdir()
        made.rename(target)
        flush(target.parent)
    return Merge(sources, shares, notes)


@contextlib.contextmanager
def _aside(parent: Path) -> Iterator[Path]:
    """A folder that is removed on the way out, also where that is interrupted itself; parents that stay empty too."""
    new = [place for place in (parent, *parent.parents) if not place.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=ASIDE, dir=parent))
        try:
            yield folder
        finally:
            try:
                shutil.rmtree(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    finally:
        for place in new:
            with contextlib.suppress(OSError):  # there is something in it, or it was not made
                place.rmdir()


def _place(into: PathLike) -> Path:
    """Where the folder is made, behind links; `ValueError` if a folder that is whole cannot take that place."""
    target = Path(into).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{into} is there already and not empty: give a new folder.")
    if target.is_mount() or target == Path.cwd():
        here = "the folder you are in" if target == Path.cwd() else "where a file system is mounted"
        raise ValueError(f"{into} is {here}, which cannot be replaced as a whole: give a new folder.")
    return target


def _check_kind(newest: Source) -> None:
    if "quantization_config" in configuration(newest.path):
        raise ValueError(f"{newest.path} is quantized: its numbers cannot be averaged. Merge before quantizing.")
    strange = [key for key, tensor in newest.like.items() if tensor.dtype.is_complex]
    if strange:
        raise ValueError(f"{newest.path} has complex numbers in {strange[0]}, which are not averaged here.")


def _notes(sources: Sequence[Source], weights: str) -> list[str]:
    notes: list[str | None] = [*differences([source.path for source in sources])]
    notes += [not_constant(sources)] if weights in DECAY_SHAPES else []
    if any(is_statistic(key) for key in sources[-1].like):
        notes.append(
            "the model has BatchNorm layers, whose statistics are those of the last checkpoint: take them again with "
            "hf_radam.recalibrate_batch_norm before evaluating."
        )
    return [note for note in notes if note is not None]


def _write(
    folder: Path,
    target: Path,
    sources: Sequence[Source],
    shares: Sequence[float],
    *,
    weights: str,
    max_file_bytes: int | None,
) -> None:
    """Write the model into a folder whose place will be `target`."""
    newest = sources[-1]
    _copy_surroundings(newest.path, folder)
    like = {key: torch.empty_like(tensor, dtype=promote_to_fp32(tensor.dtype)) for key, tensor in newest.like.items()}
    if (folder / CONFIG_NAME).is_file() and all(tensor.dtype != torch.float64 for tensor in like.values()):
        set_config_dtype(folder / CONFIG_NAME)
    tensors = Tensors(like, lambda key: merged_tensor(key, sources, shares))
    write_weights(folder, None, tensors, writes=True, max_bytes=max_file_bytes)
    parts = [
        {"path": _seen_from(target, source.path.resolve()), "update": source.update, "weight": share}
        for source, share in zip(sources, shares, strict=True)
    ]
    record = json.dumps({"weights": weights, "checkpoints": parts}, indent=2) + "\n"
    (folder / RECORD_NAME).write_text(record, encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def _seen_from(folder: Path, path: Path) -> str:
    """A path that stays right when both are moved together; as it is if they are on two drives of Windows."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:
        return str(path)


def merged_tensor(key: str, sources: Sequence[Source], shares: Sequence[float]) -> Tensor:
    """One tensor of the merge: theta_k + sum_j c_j (theta_j - theta_k), in which what is equal stays as it is.

    Args:
        key: its name in the files.
        sources: the checkpoints, by increasing update.
        shares: their factors c_j, which sum to 1.

    Raises:
        CheckpointError: if something in it is not a number.
    """
    newest = sources[-1].read(key)
    if not newest.dtype.is_floating_point or is_statistic(key):
        return newest.clone()
    dtype = promote_to_fp32(newest.dtype)
    merged = newest.to(dtype, copy=True)
    flat, last = merged.view(-1), newest.reshape(-1)
    for source, share in zip(sources[:-1], shares[:-1], strict=True):
        other = source.read(key).reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            stretch = slice(start, start + CHUNK)
            one, end = other[stretch].to(dtype), last[stretch].to(dtype)
            flat[stretch] += share * (one - end).masked_fill_(one == end, 0.0)  # infinite ones in a mask are equal
    if torch.isnan(merged).any():
        names = [str(source.path) for source in sources if torch.isnan(source.read(key)).any()]
        raise CheckpointError(f"{key} is not a number in {' and '.join(names) or 'the sum of infinite weights'}.")
    return merged


def _copy_surroundings(checkpoint: Path, folder: Path) -> None:
    """Copy what belongs to the model but its weights: configurations, tokenizer, chat templates, code of its own."""
    for file in sorted(checkpoint.iterdir()):
        if file.is_file() and file.suffix not in WEIGHT_SUFFIXES and file.name not in NOT_OF_THE_MODEL:
            shutil.copyfile(file, folder / file.name)
    if (checkpoint / TEMPLATES_FOLDER).is_dir():
        shutil.copytree(checkpoint / TEMPLATES_FOLDER, folder / TEMPLATES_FOLDER)
