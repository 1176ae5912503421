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
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils import logging as hf_logging

from hf_radam.checkpoints.layouts import SHARDED_FOLDER
from hf_radam.checkpoints.manifest import CheckpointError, PathLike
from hf_radam.checkpoints.models.adapters import is_peft, load_adapter, read_adapter, save_adapter_folder
from hf_radam.checkpoints.models.sharded_weights import Stretch, write_sharded
from hf_radam.checkpoints.models.weight_files import Tensors, widened, write_weights, written_names
from hf_radam.checkpoints.models.whole_models import unsharded_class, whole_models
from hf_radam.random_state import preserved_random_state
from hf_radam.sharding import Sharding, Weights
from hf_radam.sharding.base import rank


def state_keys(model: nn.Module, sharding: Sharding) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is written of a model.

    Returns:
        The tensors by their names in the state dict, and of those that are parameters the parameter's name.
    """
    with sharding.editing():  # so that the model shows its parameters as they are kept
        written = written_names(model)
    names = {id(value): name for name, value in sharding.parameters.items()}
    return written, {key: names[id(value)] for key, value in written.items() if id(value) in names}


def state_tensors(model: nn.Module, weights: Weights, *, in_float32: bool) -> Tensors:
    """What the weight files of `model` hold: its parameters out of `weights`, its buffers as they are.

    Args:
        model: the bare model.
        weights: its parameters.
        in_float32: widen floating-point tensors below float32; else each has the dtype that it has in the model.
    """
    written, name_of = state_keys(model, weights.sharding)
    like = {}
    for key, value in written.items():
        shape = weights.sharding.shape(name_of[key]) if key in name_of else value.shape
        like[key] = torch.empty(shape, dtype=widened(value.dtype) if in_float32 else value.dtype, device="meta")

    def read(key: str) -> Tensor | None:
        return weights.gather_to_rank0(name_of[key]) if key in name_of else written[key].detach()

    return Tensors(like, read)


def save_model_folder(
    folder: PathLike,
    model: nn.Module,
    weights: Weights,
    *,
    processing_class: Any,
    in_float32: bool = True,
) -> None:
    """Write a complete model folder, of a PEFT model an adapter folder: the first process does. All must call it.

    Args:
        folder: where to; made if needed.
        model: the unwrapped model: its configuration and buffers are written too.
        weights: its parameters.
        processing_class: tokenizer or processor to save beside them, or None.
        in_float32: widen floating-point tensors below float32, and say so in the configuration; else they are written
            in the dtypes that the model has.
    """
    path = Path(folder)
    if is_peft(model):
        brought = {name: weights.gather_to_rank0(name) for name in weights.sharding.trained}
        if rank() == 0:
            adapter = {name: value for name, value in brought.items() if value is not None}
            save_adapter_folder(path, model, adapter, processing_class=processing_class)
        return
    save_surroundings(path, model, processing_class=processing_class, in_float32=in_float32)
    tensors = state_tensors(model, weights, in_float32=in_float32)
    write_weights(path, model, tensors, writes=rank() == 0)


def save_sharded_folder(
    folder: PathLike, model: nn.Module, weights: Weights, *, processing_class: Any, in_float32: bool = True
) -> None:
    """Write a model folder in which the weights are sharded: no process holds more than its part of them.

    Every process must call it; see `hf_radam.checkpoints.models.sharded_weights`. Arguments as for `save_model_folder`.
    """
    path, first = Path(folder), rank() == 0
    save_surroundings(path, model, processing_class=processing_class, in_float32=in_float32)
    written, name_of = state_keys(model, weights.sharding)
    stretches = {}
    for key, value in written.items():
        dtype = widened(value.dtype) if in_float32 else value.dtype
        if key in name_of:
            name = name_of[key]
            start, piece = weights.start_and_shard(name)
            read = partial(lambda name: weights.start_and_shard(name)[1], name)
            stretches[key] = Stretch(weights.sharding.shape(name), dtype, start, piece.numel(), read)
        else:
            stretches[key] = Stretch(value.shape, dtype, 0, value.numel() if first else 0, value.detach)
    write_sharded(path / SHARDED_FOLDER, stretches, first=first)


def save_surroundings(folder: Path, model: nn.Module, *, processing_class: Any, in_float32: bool) -> None:
    """Write what a model folder has beside the weights: configuration, code of the model's own, tokenizer.

    Every process must call it: for a model that was sharded at load time upstream has them wait for each other.
    """
    if isinstance(model, PreTrainedModel):
        with _no_progress_bars():
            model.save_pretrained(folder, state_dict={}, is_main_process=rank() == 0)
    if rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel) and in_float32:
        say_float32(folder / CONFIG_NAME)
    if processing_class is not None:
        processing_class.save_pretrained(folder)


def say_float32(file: Path) -> None:
    """Have plain `from_pretrained` load float32: `save_pretrained` names the dtype of the model that trains."""
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(_with_dtype(config, "float32"), indent=2) + "\n", encoding="utf-8")


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


def read_state_dict(
    model: nn.Module, folder: PathLike, *, shapes: Mapping[str, torch.Size] | None = None
) -> dict[str, Tensor]:
    """Read a model folder as a state dict for `model`, on the CPU, in float32 (float64 if the model has any).

    Args:
        model: the model; its parameters may be sharded.
        folder: the model folder.
        shapes: shapes that tensors must have, by name; of the others it is that of the model's tensor.

    What the model's class does not save (`_keys_to_ignore_on_save`) is not in it.

    Raises:
        CheckpointError: if the folder does not hold exactly the weights of such a model.
    """
    path = Path(folder)
    if isinstance(model, PreTrainedModel):
        state, missing, unexpected = _read_pretrained(model, path)
    else:
        state, missing, unexpected = _read_files(model, path)
    wanted = {name: value.shape for name, value in model.state_dict().items()} | dict(shapes or {})
    other_shapes = [name for name, value in state.items() if name in wanted and value.shape != wanted[name]]
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
        with preserved_random_state(), _no_progress_bars(), whole_models():
            result: Any = unsharded_class(model).from_pretrained(path, output_loading_info=True, **options)
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
