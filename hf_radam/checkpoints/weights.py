"""Write and read model folders: training weights at a checkpoint's root, evaluation weights in folders beside them.

    checkpoint-500/       standard Trainer checkpoint: the training weights at its root
      ewa/                averaged weights, a complete model folder in float32
      schedule_free/      x of the schedule-free optimizer, the same kind of folder

Complete weights are written tensor by tensor: every rank takes part in gathering each, and rank 0 writes a file as soon
as it is complete, so that it never holds more than one file. They are read through `from_pretrained`, because the files
of some architectures (Mixtral) have other keys than the state dict; where they have not, each rank reads its shard.

Private parts of transformers used: `core_model_loading.revert_weight_conversion`, `_keys_to_ignore_on_save`,
`deepspeed._hf_deepspeed_config_weak_ref` (transformers 5.24).
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations import deepspeed
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as hf_logging

from hf_radam.checkpoints.layouts import SHARDED_FOLDER
from hf_radam.checkpoints.manifest import CheckpointError, PathLike
from hf_radam.checkpoints.peft import is_peft, load_adapter, read_adapter, save_adapter_folder
from hf_radam.checkpoints.sharded import (
    Ranges,
    ShardedWeights,
    TensorShard,
    check_keys,
    has_shards,
    read_from_files,
    weight_files,
    write_sharded,
)
from hf_radam.random_state import preserved_random_state
from hf_radam.sharding import Sharding, Weights
from hf_radam.sharding.base import canonical, rank

logger = hf_logging.get_logger(__name__)

MAX_FILE_BYTES = 5_000_000_000
"""Bytes of tensors in one file; a larger tensor has a file of its own."""
RANK0_LOADS = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@dataclass(frozen=True)
class Tensors:
    """Tensors to write, each of which is made when its turn comes."""

    like: dict[str, Tensor]
    """On the meta device, with the shape and dtype to write, by the name in the state dict."""
    read: Callable[[str], Tensor | None]
    """Makes one of them by its name, on the rank that writes; collective."""


def promote_to_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which evaluation folders hold a tensor: float32 for bf16 and fp16, else its own."""
    return torch.float32 if dtype.is_floating_point and torch.finfo(dtype).bits < 32 else dtype


def parameter_dtypes(model: nn.Module) -> dict[str, Any]:
    """Return the dtype of most parameters, and by name those of the parameters that have another."""
    dtypes: dict[str, str] = {}
    numel: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        dtypes[canonical(name)] = dtype = str(parameter.dtype).removeprefix("torch.")
        # Under ZeRO-3 a parameter is empty itself.
        numel[dtype] = numel.get(dtype, 0) + int(getattr(parameter, "ds_numel", parameter.numel()))
    common = max(numel, key=lambda dtype: numel[dtype])
    return {"dtype": common, "other_dtypes": {name: d for name, d in dtypes.items() if d != common}}


def saved_keys(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that `save_pretrained` would write, by their names in the state dict.

    Names that the class ties to another one, or does not save, are left out.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = {canonical(name): value for name, value in model.state_dict(keep_vars=True).items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names: dict[int, list[str]] = {}
    for name, value in state.items():
        names.setdefault(id(value), []).append(name)
    saved = {next((name for name in group if name not in tied), group[0]) for group in names.values()}
    return {name: value for name, value in state.items() if name in saved and name not in ignored}


@dataclass(frozen=True)
class _Saved:
    """A tensor that is saved: a parameter with its name and complete shape, or a buffer without a name."""

    value: Tensor
    name: str | None
    shape: torch.Size


def _saved_tensors(model: nn.Module, sharding: Sharding) -> dict[str, _Saved]:
    with sharding.editing():  # so that the model shows the parameters that train
        saved = saved_keys(model)
    names = {id(value): name for name, value in sharding.parameters.items()}
    named = {key: names.get(id(value)) for key, value in saved.items()}
    shapes = {key: saved[key].shape if name is None else sharding.shape(name) for key, name in named.items()}
    return {key: _Saved(value, named[key], shapes[key]) for key, value in saved.items()}


def model_tensors(model: nn.Module, weights: Weights, *, in_float32: bool) -> Tensors:
    """Return what the weight files of a model hold: parameters from `weights`, buffers from the model."""
    saved = _saved_tensors(model, weights.sharding)
    dtypes = {key: promote_to_fp32(t.value.dtype) if in_float32 else t.value.dtype for key, t in saved.items()}
    like = {key: torch.empty(t.shape, dtype=dtypes[key], device="meta") for key, t in saved.items()}

    def read(key: str) -> Tensor | None:
        name = saved[key].name
        return saved[key].value.detach() if name is None else weights.gather_to_rank0(name)

    return Tensors(like, read)


# ---- Write ----


def save_model_folder(
    folder: PathLike, model: nn.Module, weights: Weights, *, processing_class: Any, in_float32: bool = True
) -> None:
    """Write a complete model folder, or the adapter folder of a PEFT model; collective, rank 0 writes.

    The configuration and the buffers are those of the unwrapped `model`, the parameters are `weights`. With
    `in_float32` bf16 and fp16 are promoted to float32, in the configuration as well.
    """
    path = Path(folder)
    if is_peft(model):
        gathered = {name: weights.gather_to_rank0(name) for name in weights.sharding.trained}
        if rank() == 0:
            adapter = {name: value for name, value in gathered.items() if value is not None}
            save_adapter_folder(path, model, adapter, processing_class=processing_class)
        return
    save_config_and_tokenizer(path, model, processing_class=processing_class, in_float32=in_float32)
    write_weights(path, model, model_tensors(model, weights, in_float32=in_float32), writes=rank() == 0)


def save_sharded_folder(
    folder: PathLike, model: nn.Module, weights: Weights, *, processing_class: Any, in_float32: bool = True
) -> None:
    """Write a model folder with its weights in shards, of which every rank writes its own; collective."""
    path = Path(folder)
    save_config_and_tokenizer(path, model, processing_class=processing_class, in_float32=in_float32)
    like, shards = model_tensors(model, weights, in_float32=in_float32).like, {}
    for key, t in _saved_tensors(model, weights.sharding).items():
        if t.name is None:
            shards[key] = TensorShard(like[key], 0, t.value.numel() if rank() == 0 else 0, t.value.detach)
        else:
            start, shard = weights.start_and_shard(t.name)
            read = partial(lambda name: weights.start_and_shard(name)[1], t.name)
            shards[key] = TensorShard(like[key], start, shard.numel(), read)
    write_sharded(path / SHARDED_FOLDER, shards)


def save_config_and_tokenizer(folder: Path, model: nn.Module, *, processing_class: Any, in_float32: bool) -> None:
    """Write the other files of a model folder: configuration, custom code, tokenizer.

    Collective: upstream synchronizes the ranks for a model that was sharded at load time.
    """
    if isinstance(model, PreTrainedModel):
        with _no_progress_bars():
            model.save_pretrained(folder, state_dict={}, is_main_process=rank() == 0)
    if rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel) and in_float32:
        set_config_dtype(folder / CONFIG_NAME)
    if processing_class is not None:
        processing_class.save_pretrained(folder)


def set_config_dtype(file: Path, dtype: str = "float32") -> None:
    """Set the dtype that plain `from_pretrained` loads, in nested configurations too."""
    config = re.sub(r'("(?:torch_)?dtype": )"[\w.]+"', rf'\1"{dtype}"', file.read_text(encoding="utf-8"))
    file.write_text(config, encoding="utf-8")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


def write_weights(folder: Path, model: nn.Module | None, tensors: Tensors, *, writes: bool) -> None:
    """Write weight files as `from_pretrained` reads them into an existing folder; collective where `tensors.read` is.

    The class of `model` decides on the form of the files, None is the form of `tensors`. `writes` is for this rank. A
    failure to write is raised after the last tensor was gathered.
    """
    units = list(_units(model, tensors.like))
    split = split_torch_state_dict_into_shards(
        {key: tensor for _, unit in units for key, tensor in unit.items()},
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=MAX_FILE_BYTES,
    )
    pending: dict[str, Tensor] = {}
    missing = {name: len(keys) for name, keys in split.filename_to_tensors.items()}
    failure: Exception | None = None
    for names, unit in units:
        gathered = {name: tensors.read(name) for name in names}
        if not writes or failure is not None:
            continue
        try:
            cast = {n: v.detach().to(tensors.like[n].dtype) for n, v in gathered.items() if v is not None}
            pending |= {key: value.cpu().contiguous() for key, value in to_file_form(model, cast).items()}
            for name in [split.tensor_to_filename[key] for key in unit]:
                missing[name] -= 1
                if not missing[name]:
                    content = {key: pending.pop(key) for key in split.filename_to_tensors[name]}
                    safetensors.torch.save_file(content, folder / name, metadata={"format": "pt"})
                    del content
        except Exception as error:  # whatever it is, the other ranks still gather
            failure = error
            pending.clear()
    if failure is not None:
        raise failure
    if writes and split.is_sharded:
        metadata = {"total_parameters": sum(tensor.numel() for tensor in tensors.like.values()), **split.metadata}
        index = json.dumps({"metadata": metadata, "weight_map": split.tensor_to_filename}, indent=2, sort_keys=True)
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index + "\n", encoding="utf-8")


def _units(model: nn.Module | None, like: dict[str, Tensor]) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Yield names that must be gathered at once, and the tensors that they become in the files.

    Some classes have tensors in another form in their files (each expert of a Mixtral apart): those of a layer are
    gathered at once, or all, where a tensor in the files is made of several layers.
    """
    if not _has_other_file_keys(model):
        yield from (([name], {name: tensor}) for name, tensor in like.items())
        return
    layers: dict[str, list[str]] = {}
    for name in like:
        numbered = re.match(r"(.*?\.\d+)\.", name)
        layers.setdefault(numbered[1] if numbered else name, []).append(name)
    units = [(names, to_file_form(model, {name: like[name] for name in names})) for names in layers.values()]
    complete = to_file_form(model, like)
    if {k: t.shape for _, unit in units for k, t in unit.items()} == {k: t.shape for k, t in complete.items()}:
        yield from units
        return
    logger.warning(f"The weights of {type(model).__name__} can only be written at once: rank 0 gathers them all.")
    yield list(like), complete


def _has_other_file_keys(model: nn.Module | None) -> bool:
    """Return whether a model's files have other tensors or names than its state dict."""
    empty: dict[str, Tensor] = {}
    return isinstance(model, PreTrainedModel) and revert_weight_conversion(model, empty) is not empty


def to_file_form(model: nn.Module | None, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors of a model's state dict into those of its files."""
    return revert_weight_conversion(model, dict(state)) if isinstance(model, PreTrainedModel) else state


# ---- Read complete tensors ----


def read_state_dict(model: nn.Module, folder: PathLike) -> dict[str, Tensor]:
    """Read a model folder as a state dict for `model`, on the CPU, in float32 (float64 if the model has any).

    Tensors that the model's class does not save are not in it. Other weights raise `CheckpointError`.
    """
    path = Path(folder)
    state, unexpected = (_read_pretrained if isinstance(model, PreTrainedModel) else _read_files)(model, path)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) - set(state)
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in ignored}
    expected = {name: torch.Size(getattr(value, "ds_shape", value.shape)) for name, value in own.items()}  # of ZeRO-3
    check_keys(path, expected, {name: value.shape for name, value in state.items()} | dict.fromkeys(unexpected))
    return state


def _read_pretrained(model: Any, path: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Read weights and unexpected names with `from_pretrained` and the configuration of `model`."""
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
    # FSDP2 has put a class of its own in front.
    model_class: Any = type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)
    try:
        # Missing weights would be initialized, with random numbers of the running training.
        with preserved_random_state(), _no_progress_bars(), _loading_complete():
            loaded, info = model_class.from_pretrained(
                path, config=copy.deepcopy(model.config), dtype=dtype, output_loading_info=True
            )
    except TypeError:
        # A class that cannot be made from a configuration alone has no other keys in its files either.
        return _read_files(model, path)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a {type(model).__name__}: {error}") from error
    state = {name: value for name, value in loaded.state_dict().items() if name not in info["missing_keys"]}
    return state, set(info["unexpected_keys"]) | set(map(str, info["mismatched_keys"]))


def _read_files(model: nn.Module, path: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Read weights and unexpected names of a model whose file keys are those of its state dict."""
    file: dict[str, Tensor] = {}
    for part in sorted(path.glob("model*.safetensors")):
        file |= safetensors.torch.load_file(part)
    names = model.state_dict(keep_vars=True)
    first = {id(value): file[name] for name, value in names.items() if name in file}  # tied ones are written once
    return {name: first[id(v)] for name, v in names.items() if id(v) in first}, set(file) - set(names)


@contextmanager
def _loading_complete() -> Iterator[None]:
    """Let `from_pretrained` load a complete model on every rank that calls it, while a sharded one trains.

    Upstream goes by a global configuration (ZeRO-3: partition) and by the environment (FSDP: only rank 0 reads).
    """
    zero3, rank0_loads = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(RANK0_LOADS, None)
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
        if rank0_loads is not None:
            os.environ[RANK0_LOADS] = rank0_loads


@torch.no_grad()
def load_weights(model: nn.Module, folder: PathLike) -> None:
    """Copy the weights and buffers of a model or adapter folder into `model`, in place and in its dtypes.

    Other weights raise `CheckpointError`, and change nothing.
    """
    if is_peft(model):
        load_adapter(model, folder)
        return
    state = read_state_dict(model, folder)
    for name, value in model.state_dict(keep_vars=True).items():
        if name in state:
            value.copy_(state[name])


def read_parameters(model: nn.Module, folder: PathLike) -> dict[str, Tensor]:
    """Read a model or adapter folder as complete tensors by parameter name, tied parameters once."""
    state = read_adapter(model, folder) if is_peft(model) else read_state_dict(model, folder)
    return {name: state[name] for name, _ in model.named_parameters() if name in state}


# ---- Read shards ----


def _read_ranges(folder: Path, model: nn.Module, sharding: Sharding, into: Ranges) -> None:
    """Fill ranges of parameters and buffers from a model folder, complete or sharded; not collective.

    Where a model's files have other keys than its state dict, every rank reads all of them on the CPU.
    """
    shapes = {key: t.shape for key, t in _saved_tensors(model, sharding).items()}
    if has_shards(folder):  # also where they were consolidated
        shards = ShardedWeights(folder)
        tied = {canonical(name) for name in model.state_dict()} - set(shapes)
        check_keys(folder, shapes, {key: tensor.shape for key, tensor in shards.like.items() if key not in tied})
        shards.read(into)
    elif (files := weight_files(folder)) and not _has_other_file_keys(model):
        check_keys(folder, shapes, dict.fromkeys(files))
        read_from_files(folder, files, shapes, into)
    else:
        state = read_state_dict(model, folder)
        for key, (start, target) in into.items():
            target.copy_(state[key].reshape(-1)[start : start + target.numel()])


@torch.no_grad()
def load_model_shards(folder: Path, model: nn.Module, sharding: Sharding) -> None:
    """Copy this rank's shards of a model folder into the weights of the forward pass and the buffers.

    Other weights raise `CheckpointError`, and change nothing.
    """
    saved = _saved_tensors(model, sharding)
    targets = {key: t.value if t.name is None else sharding.model_shard(t.name) for key, t in saved.items()}
    starts = {key: 0 if t.name is None else sharding.model_start(t.name) for key, t in saved.items()}
    into = {key: (starts[key], torch.empty(t.numel(), dtype=t.dtype)) for key, t in targets.items()}
    _read_ranges(folder, model, sharding, into)
    with sharding.editing():
        for key, target in targets.items():
            target.copy_(into[key][1].view(target.shape))


def read_optimizer_shards(folder: Path, model: nn.Module, sharding: Sharding) -> dict[str, Tensor]:
    """Read this rank's shards of the trainable parameters, shaped as `Sharding.optimizer_shard`, in float32 on the CPU.

    Other weights raise `CheckpointError`.
    """
    key_of = {t.name: key for key, t in _saved_tensors(model, sharding).items()}
    unsaved = [name for name in sharding.trained if name not in key_of]
    if unsaved:
        raise CheckpointError(f"{folder} has no {unsaved[0]}: the class of the model does not save it.")
    like = {name: sharding.optimizer_shard(name) for name in sharding.trained}
    into = {key_of[n]: (sharding.optimizer_start(n), torch.empty(shard.numel())) for n, shard in like.items()}
    _read_ranges(folder, model, sharding, into)
    return {name: into[key_of[name]][1].view(shard.shape) for name, shard in like.items()}
