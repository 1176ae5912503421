"""Write and read the parts of a checkpoint that are ours: evaluation weights as model folders, and `hf_radam.json`.

    checkpoint-500/       standard Trainer checkpoint: the training weights at its root
      ewa/                averaged weights, a complete model folder in float32
      schedule_free/      x of the schedule-free optimizer, the same kind of folder
      hf_radam.json       the manifest: method, schedule, counters of the average, size and sha256 of every file

Weights are always read back through `from_pretrained`: the keys in the files of some architectures (Mixtral, for one)
are not those of the model's state dict.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as hf_logging

from hf_radam.random_state import preserved_random_state

MANIFEST_NAME = "hf_radam.json"
FORMAT_VERSION = 1
EWA_FOLDER = "ewa"
SCHEDULE_FREE_FOLDER = "schedule_free"
EVALUATION_FOLDERS = (EWA_FOLDER, SCHEDULE_FREE_FOLDER)

PathLike = str | os.PathLike[str]


def full_state_dict(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `model` with `weights` (by parameter name) in place of the parameters they name.

    Every name of a tied parameter gets the one tensor, buffers are the model's, and floating-point tensors of fewer
    than 32 bits are widened to float32, which loses nothing.
    """
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    widened: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in widened:
            tensor = weights.get(first_names.get(id(value), ""), value).detach()
            narrow = tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32
            widened[id(value)] = tensor.float() if narrow else tensor
        state[name] = widened[id(value)]
    return state


def save_model_folder(folder: PathLike, model: nn.Module, weights: Mapping[str, Tensor], *, processing_class: Any) -> None:
    """Write a complete model folder with `weights` in place of the model's own, in float32.

    Args:
        folder: where to; made if needed. Only the process that saves may call this.
        model: the unwrapped model: its configuration, buffers and frozen parameters are written too.
        weights: float32 tensors by parameter name.
        processing_class: tokenizer or processor to save beside them, or None.
    """
    path = Path(folder)
    state = full_state_dict(model, weights)
    if isinstance(model, PreTrainedModel):
        with _no_progress_bars():
            model.save_pretrained(path, state_dict=state)
        # save_pretrained names the model's dtype, in which plain from_pretrained would then load the average.
        config = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        (path / CONFIG_NAME).write_text(json.dumps(_with_dtype(config, "float32"), indent=2) + "\n", encoding="utf-8")
    else:
        path.mkdir(parents=True, exist_ok=True)
        unique = {id(tensor): name for name, tensor in reversed(state.items())}
        tensors = {name: state[name].contiguous() for name in unique.values()}
        safetensors.torch.save_file(tensors, path / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    if processing_class is not None:
        processing_class.save_pretrained(path)


def _with_dtype(config: Any, dtype: str) -> Any:
    """`config` with every `dtype` entry, of nested configurations too, replaced."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else _with_dtype(value, dtype)
        for key, value in config.items()
    }


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """No bars for reading and writing small parts of a checkpoint in the middle of a training run."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


def read_state_dict(model: nn.Module, folder: PathLike) -> dict[str, Tensor]:
    """Read a model folder as a state dict for `model`, in float32, on the CPU.

    Raises:
        ValueError: if the folder does not hold exactly the weights of such a model.
    """
    path = Path(folder)
    if not isinstance(model, PreTrainedModel):
        file = safetensors.torch.load_file(path / SAFE_WEIGHTS_NAME)
        names = model.state_dict(keep_vars=True)
        first = {id(value): file[name] for name, value in names.items() if name in file}  # tied: written once
        state = {name: first[id(value)] for name, value in names.items() if id(value) in first}
        missing, unexpected = set(names) - set(state), set(file) - set(names)
    else:
        # Weights that are missing would be initialised, with random numbers of the running training.
        with preserved_random_state(), _no_progress_bars():
            loaded, info = type(model).from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        state = loaded.state_dict()
        missing = set(info["missing_keys"]) - set(model._keys_to_ignore_on_save or ())
        unexpected = set(info["unexpected_keys"]) | set(map(str, info["mismatched_keys"]))
    if missing or unexpected:
        raise ValueError(
            f"{path} does not hold the weights of this {type(model).__name__}: "
            f"missing {sorted(missing)[:5]}, unexpected {sorted(unexpected)[:5]}."
        )
    return state


@torch.no_grad()
def load_weights(model: nn.Module, folder: PathLike) -> None:
    """Copy the weights and buffers of a model folder into `model`, in place and in its dtypes.

    Raises:
        ValueError: if the folder does not hold exactly the weights of such a model.
    """
    state = read_state_dict(model, folder)
    for name, value in model.state_dict(keep_vars=True).items():
        value.copy_(state[name])


def read_parameters(model: nn.Module, folder: PathLike) -> dict[str, Tensor]:
    """Read a model folder as float32 tensors by parameter name, tied parameters once."""
    state = read_state_dict(model, folder)
    return {name: state[name] for name, _ in model.named_parameters()}


def discard_evaluation_weights(checkpoint: PathLike) -> None:
    """Remove our part of a checkpoint that is about to be written again, so that nothing stale survives."""
    path = Path(checkpoint)
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    for folder in EVALUATION_FOLDERS:
        if (path / folder).is_dir():
            shutil.rmtree(path / folder)


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
        ValueError: if the checkpoint has evaluation weights of ours but no manifest (it was not finished), if the
            manifest is of a newer format, or if a file it lists is missing or has another size.
    """
    path = Path(checkpoint)
    if not (path / MANIFEST_NAME).is_file():
        leftovers = [folder for folder in EVALUATION_FOLDERS if (path / folder).is_dir()]
        if leftovers:
            raise ValueError(f"{path} has {leftovers[0]}/ but no {MANIFEST_NAME}: it was not written to the end.")
        return None
    manifest: dict[str, Any] = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    if manifest["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path / MANIFEST_NAME} has format {manifest['format_version']}, this hf_radam knows up to "
            f"{FORMAT_VERSION}: update hf_radam."
        )
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != facts["size"]:
            raise ValueError(f"{file} is missing or not {facts['size']} bytes long: the checkpoint is damaged.")
    return manifest
