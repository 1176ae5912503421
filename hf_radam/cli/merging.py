"""Merge the weights of checkpoints: theta = sum_j c_j theta_j, tensor by tensor as they are stored in the files.

The idea (arXiv:2507.17634): weights trained at a constant learning rate are a sum of updates, and a decay would have
shrunk the later ones. Let theta_n = theta_(n-1) + u_n, and let a decay multiply u_n by f_n after step t_0. With
checkpoints at t_0 < ... < t_k only the sum of the u_n between two of them is known, so all of these are multiplied by
the mean w_j of their f_n, with D = t_k - t_0 and f the shapes of `hf_radam.schedules`:

    w_j = (1 / (t_j - t_(j-1))) sum_(t_(j-1) < n <= t_j) f((n - 1 - t_0) / D)

    theta = theta_(t_0) + sum_j w_j (theta_(t_j) - theta_(t_(j-1)))
          = (1 - w_1) theta_(t_0) + sum_(0<j<k) (w_j - w_(j+1)) theta_(t_j) + w_k theta_(t_k)

So c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_k = w_k. This equals the decay where the updates between two checkpoints are
equal; elsewhere it is an approximation. The checkpoints need not be evenly spaced.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_radam import averaging
from hf_radam.checkpoints.layouts import ADAPTER_FILES, DEEPSPEED_LATEST
from hf_radam.checkpoints.manifest import (
    MANIFEST_NAME,
    TRAINER_STATE_NAME,
    CheckpointError,
    PathLike,
    read_manifest,
    recorded_step,
)
from hf_radam.checkpoints.runs import is_checkpoint
from hf_radam.checkpoints.sharded import is_sharded_alone
from hf_radam.checkpoints.storage import flush
from hf_radam.checkpoints.verify import INCOMPLETE_NAME, check_complete
from hf_radam.checkpoints.weights import Tensors, promote_to_fp32, set_config_dtype, weight_files, write_weights
from hf_radam.schedules import Schedule, decay_multiplier

RECORD_NAME = "hf_radam_average.json"
DECAY_SHAPES = ("linear", "cosine", "1-sqrt")
CONSTANT = ("constant", "constant_with_warmup")
CHUNK = 2**20  # elements that are merged at once
FREE_IN_CONFIG = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")
NOT_OF_THE_MODEL = (TRAINER_STATE_NAME, MANIFEST_NAME, INCOMPLETE_NAME, DEEPSPEED_LATEST, "zero_to_fp32.py")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
TEMPLATES_FOLDER = "additional_chat_templates"


def coefficients(
    steps: Sequence[int], *, weights: str, decay: float | None = None, half_life_ratio: float | None = None
) -> list[float]:
    """Return the factor of each checkpoint; they sum to 1 and none is negative.

    The `steps` of the checkpoints increase. `weights` are `uniform`; `ewa`, of an EWA of the checkpoints, with a window
    as in `WeightAverage`; or `linear`, `cosine` or `1-sqrt`, of a decay.

    Example:
        >>> [round(c, 4) for c in coefficients([800, 900, 1000], weights="linear")]
        [0.2475, 0.5, 0.2525]
        >>> [round(c, 4) for c in coefficients([800, 900, 1000], weights="1-sqrt")]
        [0.4677, 0.3927, 0.1395]
    """
    if len(steps) < 2:
        raise ValueError(f"{len(steps)} checkpoint cannot be averaged. Give two or more.")
    if weights == "ewa":
        return _ewa_coefficients(steps, decay=decay, half_life_ratio=half_life_ratio)
    if decay is not None or half_life_ratio is not None:
        raise ValueError(f"decay and half_life_ratio have no effect on weights={weights!r}. Use them with 'ewa'.")
    if weights == "uniform":
        return [1 / len(steps)] * len(steps)
    begin, length = steps[0], steps[-1] - steps[0]
    means = [
        math.fsum(decay_multiplier((step - begin) / length, weights, 0.0) for step in range(start, end)) / (end - start)
        for start, end in itertools.pairwise(steps)
    ]
    return [before - after for before, after in itertools.pairwise([1.0, *means, 0.0])]


def _ewa_coefficients(steps: Sequence[int], *, decay: float | None, half_life_ratio: float | None) -> list[float]:
    """Return s_j (1 - s_(j+1)) ... (1 - s_k) for the step sizes s_j of `hf_radam.averaging`, with s_0 = 1."""
    averaging.check_averaging(decay=decay, half_life_ratio=half_life_ratio, every=1, start_step=0)
    ratio = averaging.DEFAULT_HALF_LIFE_RATIO if half_life_ratio is None else half_life_ratio
    found, weight_sum = [1.0], 1.0
    for before, after in itertools.pairwise(steps):
        every = after - before
        if decay is None:
            size = averaging.growing_window_step_size(after, half_life_ratio=ratio, every=every)
        else:
            size = averaging.fixed_decay_step_size(weight_sum, decay=decay, every=every)
            weight_sum = 1.0 + decay**every * weight_sum
        found = [factor * (1.0 - size) for factor in found] + [size]
    return found


@dataclass(frozen=True)
class Source:
    """A checkpoint: its step, the file of each tensor, and each tensor's shape and dtype (on the meta device)."""

    path: Path
    step: int
    files: Mapping[str, Path]
    like: dict[str, Tensor]

    def read(self, key: str) -> Tensor:
        """Read a tensor; raise `CheckpointError` if it cannot be read."""
        try:
            # The file is closed after each tensor: until then its read pages count as memory.
            with safe_open(self.files[key], framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.files[key]} cannot be read: {error}") from error


def read_sources(checkpoints: Sequence[PathLike]) -> list[Source]:
    """Return the checkpoints by increasing step, after verifying that they are complete and of one model.

    Raises:
        ValueError: if they cannot be averaged; `CheckpointError` if the weights at the root of one are incomplete.
    """
    sources = sorted((_source(Path(checkpoint)) for checkpoint in checkpoints), key=lambda source: source.step)
    for before, after in itertools.pairwise(sources):
        if before.step == after.step:
            raise ValueError(f"{before.path} and {after.path} are both of step {before.step}. Leave one out.")
        _check_same_model(before, sources[-1])
    for source in sources:
        check_complete(source.path, only="")
    if sources and "quantization_config" in _config(sources[-1].path):
        raise ValueError(f"{sources[-1].path} is quantized and cannot be averaged. Average before quantizing.")
    return sources


def _source(path: Path) -> Source:
    if not path.is_dir() or not is_checkpoint(path):
        raise ValueError(f"{path} is not a checkpoint. Give folders checkpoint-N, as a Trainer saves them.")
    if any((path / name).is_file() for name in ADAPTER_FILES):
        raise ValueError(f"{path} holds an adapter. Only complete models can be averaged.")
    if is_sharded_alone(path):
        command = f"hf-radam consolidate {path} --training_weights"
        raise ValueError(f"{path} holds its weights in shards. Join them first: {command}")
    files = weight_files(path)
    if not files:
        raise ValueError(f"{path} has no safetensors weights at its root. Save it with a model.safetensors.")
    manifest = read_manifest(path)
    step = recorded_step(path) if manifest is None else int(manifest["global_step"])
    if step is None:
        raise CheckpointError(f"{path / TRAINER_STATE_NAME} is missing or corrupted, so its step is not known.")
    source = Source(path, step, files, {})
    for key in files:
        tensor = source.read(key)  # memory-mapped
        source.like[key] = torch.empty_like(tensor, device="meta")
    return source


def _check_same_model(source: Source, newest: Source) -> None:
    one, other = (
        {key: tuple(tensor.shape) for key, tensor in each.like.items()}
        | {key: value for key, value in _config(each.path).items() if key not in FREE_IN_CONFIG}
        for each in (source, newest)
    )
    for key in sorted({*one, *other}):
        if one.get(key) != other.get(key):
            raise ValueError(
                f"{source.path} is of another model than {newest.path}: {key} is {one.get(key)}, not {other.get(key)}. "
                "Average checkpoints of one run."
            )


def _config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be read: {error}") from error


def notes(sources: Sequence[Source], *, weights: str) -> list[str]:
    """Return sentences on what the user should know of these checkpoints."""
    manifests = [read_manifest(source.path) for source in sources]
    found = []
    if any(manifest is not None and manifest["method"]["optim"] == "radam_schedulefree" for manifest in manifests):
        found.append("a checkpoint is of a schedule-free run: its y is averaged, not x, which is an average already.")
    if weights in DECAY_SHAPES and manifests[-1] is not None and not _is_constant(sources, manifests[-1]):
        found.append(
            f"the learning rate was not constant from step {sources[0].step} to {sources[-1].step} "
            f"({manifests[-1]['method']['lr_scheduler_type']}): the average decays it once more."
        )
    if any(_is_statistic(key) for key in sources[-1].like):
        found.append(
            "the statistics of BatchNorm layers are those of the last checkpoint. Recompute them with "
            "hf_radam.recalibrate_batch_norm before evaluating."
        )
    return found


def _is_constant(sources: Sequence[Source], manifest: Mapping[str, Any]) -> bool:
    name, options = manifest["method"]["lr_scheduler_type"], manifest["schedule"]
    if options is None or name not in Schedule.registered():
        return name in CONSTANT
    schedule = Schedule.from_dict(name, options)
    return all(schedule.multiplier(step) == 1.0 for step in range(sources[0].step, sources[-1].step))


def _is_statistic(key: str) -> bool:
    return re.fullmatch(r"(.*\.)?(running_mean|running_var|num_batches_tracked)", key) is not None


def merge(
    sources: Sequence[Source],
    shares: Sequence[float],
    output: PathLike,
    *,
    weights: str,
) -> None:
    """Write the merged weights as a model folder, with the other files of the last checkpoint's model.

    Tensors below float32 are summed and stored in float32; one that is equal in all checkpoints stays bitwise equal.
    BatchNorm statistics and integers are those of the last checkpoint. Memory holds a file and a tensor.

    The `sources` are ordered by step, and `shares` are their factors, which `weights` names in the record. `output`
    must be empty or not exist (`ValueError`); nothing is left in it where a weight is NaN (`CheckpointError`).
    """
    target = Path(output).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{output} is not an empty folder. Output folders must be empty.")
    if target == Path.cwd():
        raise ValueError(f"{output} is the current folder. Choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".averaging-", dir=target.parent) as temporary:
        staged = Path(temporary, "model")  # the temporary folder is private to the user
        staged.mkdir()
        _write(staged, target, sources, shares, weights=weights)
        staged.replace(target)
        flush(target.parent)


def _write(folder: Path, target: Path, sources: Sequence[Source], shares: Sequence[float], *, weights: str) -> None:
    newest = sources[-1]
    for file in sorted(newest.path.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and file.name not in NOT_OF_THE_MODEL:
            shutil.copyfile(file, folder / file.name)
    if (newest.path / TEMPLATES_FOLDER).is_dir():
        shutil.copytree(newest.path / TEMPLATES_FOLDER, folder / TEMPLATES_FOLDER)
    like = {key: torch.empty_like(tensor, dtype=promote_to_fp32(tensor.dtype)) for key, tensor in newest.like.items()}
    if (folder / "config.json").is_file() and all(tensor.dtype != torch.float64 for tensor in like.values()):
        set_config_dtype(folder / "config.json")
    tensors = Tensors(like, lambda key: _merged(key, sources, shares))
    write_weights(folder, None, tensors, writes=True)
    parts = [
        {"path": os.path.relpath(source.path.resolve(), target), "update": source.step, "weight": share}
        for source, share in zip(sources, shares, strict=True)
    ]
    record = json.dumps({"weights": weights, "checkpoints": parts}, indent=2) + "\n"
    (folder / RECORD_NAME).write_text(record, encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def _merged(key: str, sources: Sequence[Source], shares: Sequence[float]) -> Tensor:
    """Return theta_k + sum_j c_j (theta_j - theta_k), in which equal values stay as they are."""
    newest = sources[-1].read(key)
    if not newest.dtype.is_floating_point or _is_statistic(key):
        return newest.clone()
    dtype = promote_to_fp32(newest.dtype)
    merged = newest.to(dtype, copy=True)
    flat, last = merged.view(-1), newest.reshape(-1)
    for source, share in zip(sources[:-1], shares[:-1], strict=True):
        other = source.read(key).reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            one, end = other[part].to(dtype), last[part].to(dtype)
            flat[part] += share * (one - end).masked_fill_(one == end, 0.0)  # a mask may be infinite in both
    if torch.isnan(merged).any():
        names = [str(source.path) for source in sources if torch.isnan(source.read(key)).any()]
        raise CheckpointError(f"{key} is NaN in {' and '.join(names) or 'the sum of infinite weights'}.")
    return merged
