"""Write and read the weights in a checkpoint: training weights at its root, evaluation weights in folders beside them.

    checkpoint-500/       standard Trainer checkpoint: the training weights at its root
      ewa/                averaged weights, a complete model folder in float32
      schedule_free/      x of the schedule-free optimizer, the same kind of folder
      hf_radam.json       the manifest (`hf_radam.checkpoints.manifest`)

Weights are always read back through `from_pretrained`: the keys in the files of some architectures (Mixtral, for one)
are not those of the model's state dict.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as hf_logging

from hf_radam.checkpoints.adapters import is_peft, load_adapter, read_adapter, save_adapter_folder
from hf_radam.checkpoints.manifest import CheckpointError, PathLike
from hf_radam.random_state import preserved_random_state


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


def save_model_folder(
    folder: PathLike, model: nn.Module, weights: Mapping[str, Tensor], *, processing_class: Any
) -> None:
    """Write a complete model folder, of a PEFT model an adapter folder, with `weights` in place of its own, in float32.

    Args:
        folder: where to; made if needed. Only the process that saves may call this.
        model: the unwrapped model: its configuration, buffers and frozen parameters are written too.
        weights: float32 tensors by parameter name.
        processing_class: tokenizer or processor to save beside them, or None.
    """
    path = Path(folder)
    if is_peft(model):
        save_adapter_folder(path, model, weights, processing_class=processing_class)
        return
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
    """Read a model folder as a state dict for `model`, on the CPU, in float32 (float64 if the model has any).

    What the model's class does not save (`_keys_to_ignore_on_save`) is not in it.

    Raises:
        CheckpointError: if the folder does not hold exactly the weights of such a model.
    """
    path = Path(folder)
    if isinstance(model, PreTrainedModel):
        state, missing, unexpected = _read_pretrained(model, path)
    else:
        state, missing, unexpected = _read_files(model, path)
    own = model.state_dict()
    other_shapes = [name for name, value in state.items() if name in own and value.shape != own[name].shape]
    if missing or unexpected or other_shapes:
        raise CheckpointError(
            f"{path} does not hold the weights of this {type(model).__name__}: missing {sorted(missing)[:5]}, "
            f"unexpected {sorted(unexpected)[:5]}, of another shape {sorted(other_shapes)[:5]}."
        )
    return state


def _read_pretrained(model: PreTrainedModel, path: Path) -> tuple[dict[str, Tensor], set[str], set[str]]:
    """Weights, missing and unexpected names, by way of `from_pretrained` with the configuration of `model`."""
    wide = any(p.dtype == torch.float64 for p in model.parameters())
    options: dict[str, Any] = {"config": copy.deepcopy(model.config), "dtype": torch.float64 if wide else torch.float32}
    try:
        # Weights that are missing would be initialised, with random numbers of the running training.
        with preserved_random_state(), _no_progress_bars():
            result: Any = type(model).from_pretrained(path, output_loading_info=True, **options)
    except TypeError:
        # The class is not made from a configuration alone, so it is not one whose file keys differ either.
        return _read_files(model, path)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a {type(model).__name__}: {error}") from error
    loaded, info = result
    absent = set(info["missing_keys"])
    state = {name: value for name, value in loaded.state_dict().items() if name not in absent}
    unexpected = set(info["unexpected_keys"]) | set(map(str, info["mismatched_keys"]))
    return state, (set(model.state_dict()) - set(state)) - set(model._keys_to_ignore_on_save or ()), unexpected


def _read_files(model: nn.Module, path: Path) -> tuple[dict[str, Tensor], set[str], set[str]]:
    """Weights, missing and unexpected names of a model whose file keys are those of its state dict."""
    file: dict[str, Tensor] = {}
    for part in sorted(path.glob("model*.safetensors")):
        file |= safetensors.torch.load_file(part)
    names = model.state_dict(keep_vars=True)
    first = {id(value): file[name] for name, value in names.items() if name in file}  # tied: written once
    state = {name: first[id(value)] for name, value in names.items() if id(value) in first}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return state, set(names) - set(state) - ignored, set(file) - set(names)


@torch.no_grad()
def load_weights(model: nn.Module, folder: PathLike) -> None:
    """Copy the weights and buffers of a model or adapter folder into `model`, in place and in its dtypes.

    Raises:
        CheckpointError: if the folder does not hold exactly the weights of such a model; nothing is changed then.
    """
    if is_peft(model):
        load_adapter(model, folder)
        return
    state = read_state_dict(model, folder)
    for name, value in model.state_dict(keep_vars=True).items():
        if name in state:
            value.copy_(state[name])


def read_parameters(model: nn.Module, folder: PathLike) -> dict[str, Tensor]:
    """Read a model or adapter folder as tensors by parameter name, tied parameters once."""
    state = read_adapter(model, folder) if is_peft(model) else read_state_dict(model, folder)
    return {name: state[name] for name, _ in model.named_parameters() if name in state}
