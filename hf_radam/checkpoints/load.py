"""Load the weights that evaluation used from a checkpoint or a run, and consolidate weights that lie in shards.

Loading never writes into a checkpoint: weights in shards are assembled in memory. `consolidate` is for everything else
that reads `from_pretrained`'s files; one process does it, with memory for one file of weights.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from hf_radam.checkpoints.layouts import ADAPTER_FILES, WEIGHT_FILES
from hf_radam.checkpoints.manifest import TRAINER_STATE_NAME, CheckpointError, PathLike, add_files, read_manifest
from hf_radam.checkpoints.peft import base_and_adapter, cast_parameters, exact_dtype
from hf_radam.checkpoints.runs import is_checkpoint, list_checkpoints, newest_checkpoint
from hf_radam.checkpoints.sharded import ShardedWeights, has_shards, is_sharded_alone
from hf_radam.checkpoints.storage import flush
from hf_radam.checkpoints.verify import check_complete, evaluation_folder
from hf_radam.checkpoints.weights import Tensors, saved_keys, to_file_form, write_weights

logger = logging.getLogger(__name__)


def load_evaluation_model(
    path: PathLike, *, model_class: type[PreTrainedModel] | None = None, **from_pretrained_kwargs: Any
) -> PreTrainedModel:
    """Load the weights with which the trainer evaluated, in the dtype in which it did.

    An adapter is loaded on top of the base model that its configuration names. Nothing is written.

    Args:
        path: a checkpoint, or the folder of a run: there its root model (what `save_model()` wrote), else its newest
            complete checkpoint.
        model_class: class to load, of an adapter that of its base model; by default the one that the folder's
            configuration names.
        **from_pretrained_kwargs: passed on; a `dtype` given here wins.

    Returns:
        The model in evaluation mode (`model.eval()`), as `from_pretrained` leaves it; for an adapter a `PeftModel`.

    Raises:
        FileNotFoundError: if there is neither a model nor a complete checkpoint.
        CheckpointError: if the weights are incomplete.
        ValueError: if the model class is unknown to `transformers`, or an adapter does not name its base model.
    """
    root = Path(path)
    if "torch_dtype" in from_pretrained_kwargs:  # the name that transformers 5 deprecates
        from_pretrained_kwargs["dtype"] = from_pretrained_kwargs.pop("torch_dtype")
    if is_checkpoint(root):
        return _load_checkpoint(root, model_class, from_pretrained_kwargs)
    if holds_model(root):
        later = later_than_model(root)
        if later is not None:
            logger.warning("Loading the model at the root of %s, which is older than its %s.", root, later)
        return load_model_folder(root, model_class=model_class, **from_pretrained_kwargs)
    return _load_checkpoint(newest_loadable_checkpoint(root), model_class, from_pretrained_kwargs)


def later_than_model(run: PathLike) -> str | None:
    """Return the name of a checkpoint that was saved after the model at the root of a run, or None."""
    root = Path(run)
    configs = [root / name for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME) if (root / name).is_file()]
    written = max(file.stat().st_mtime for file in configs)  # `save_model` writes it with the weights
    states = [ref.path / TRAINER_STATE_NAME for ref in list_checkpoints(root)]
    return next((s.parent.name for s in states if s.is_file() and s.stat().st_mtime > written), None)


def holds_model(folder: PathLike) -> bool:
    """Return whether a folder has a configuration and weights, of a model (maybe sharded) or an adapter."""
    path = Path(folder)
    has_weights = has_shards(path) or any((path / name).is_file() for name in WEIGHT_FILES)
    has_adapter = any((path / name).is_file() for name in ADAPTER_FILES)
    return has_weights and (path / CONFIG_NAME).is_file() or has_adapter and (path / ADAPTER_CONFIG_NAME).is_file()


def newest_loadable_checkpoint(run: PathLike) -> Path:
    """Return the newest checkpoint of a run with complete evaluation weights; `FileNotFoundError` if there is none."""

    def accept(folder: Path) -> None:
        if not (holds_model(evaluation_folder(folder)) and is_checkpoint(folder)):
            raise CheckpointError(f"it has no {TRAINER_STATE_NAME} or no weights.")

    ref = newest_checkpoint(run, accept)
    if ref is None:
        raise FileNotFoundError(
            f"{run} holds neither a model (config.json and weights) nor a complete checkpoint-N folder."
        )
    return ref.path


def _load_checkpoint(
    checkpoint: Path, model_class: type[PreTrainedModel] | None, kwargs: dict[str, Any]
) -> PreTrainedModel:
    folder = evaluation_folder(checkpoint)
    manifest = read_manifest(checkpoint)
    if manifest is None or "dtype" in kwargs:
        return load_model_folder(folder, model_class=model_class, **kwargs)
    evaluated = manifest["evaluation"]
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return base_and_adapter(folder, model_class=model_class, dtypes=evaluated, **kwargs)
    dtype = exact_dtype([evaluated["dtype"], *evaluated["other_dtypes"].values()])
    model = load_model_folder(folder, model_class=model_class, dtype=dtype, **kwargs)
    if evaluated["other_dtypes"]:
        cast_parameters(model, evaluated)
    return model


def load_model_folder(
    folder: PathLike, *, model_class: type[PreTrainedModel] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a folder with complete or sharded weights, or with an adapter; arguments as for `from_pretrained`."""
    path, trust = Path(folder), kwargs.get("trust_remote_code")
    if (path / ADAPTER_CONFIG_NAME).is_file():
        return base_and_adapter(path, model_class=model_class, dtypes=None, **kwargs)
    if not is_sharded_alone(path):
        model_class = model_class or _class_of(path, _config_of(path, None, trust))
        try:
            return model_class.from_pretrained(path, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"The weights in {path} are incomplete: {error}. Save them again.") from error
    config = kwargs.pop("config", None) or _config_of(path, model_class, trust)
    model = _meta_model(path, copy.deepcopy(config), model_class, trust)
    shards = ShardedWeights(path)
    state = {key: torch.empty_like(shards.like[key], device="cpu") for key in _saved_in(shards, path, model)}
    shards.read({key: (0, value.view(-1)) for key, value in state.items()})
    if (path / GENERATION_CONFIG_NAME).is_file():
        kwargs = {"generation_config": GenerationConfig.from_pretrained(path)} | kwargs
    state = to_file_form(model, state)
    loaded: PreTrainedModel = type(model).from_pretrained(None, config=config, state_dict=state, **kwargs)
    return loaded


def _config_of(folder: Path, model_class: Any, trust_remote_code: bool | None) -> Any:
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_NAME}: the model was not a PreTrainedModel. Load its {SAFE_WEIGHTS_NAME} with "
            "safetensors.torch.load_file."
        )
    if getattr(model_class, "config_class", None) is not None:
        return model_class.config_class.from_pretrained(folder)
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _class_of(folder: Path, config: Any) -> Any:
    """Return the class that a configuration names; for a model with custom code, the Auto class that finds it."""
    names = [*(config.architectures or ()), *(n for n in getattr(config, "auto_map", {}) if n.startswith("AutoModel"))]
    if found := [getattr(transformers, name) for name in names if hasattr(transformers, name)]:
        return found[0]
    raise ValueError(f"{folder / CONFIG_NAME} names no model class of transformers ({names}). Pass model_class.")


def _meta_model(folder: Path, config: Any, model_class: Any, trust_remote_code: bool | None) -> Any:
    model_class = model_class or _class_of(folder, config)
    with torch.device("meta"):
        if hasattr(model_class, "_from_config"):
            return model_class._from_config(config)
        return model_class.from_config(config, trust_remote_code=trust_remote_code)  # an Auto class


# ---- Consolidate ----


def consolidate(
    checkpoint: PathLike,
    *,
    training_weights: bool = False,
    model_class: Any = None,
    trust_remote_code: bool | None = None,
) -> Path:
    """Write the weights that evaluation used, which a checkpoint holds in shards, as files into the same folder.

    They are staged and then moved beside the shards, and the manifest gets their hashes. With `training_weights` the
    training weights are written instead, at the checkpoint's root. `model_class` is needed where the configuration
    names none that `transformers` has.

    Returns:
        The model folder, as `from_pretrained` loads it; nothing is written if it has such files already.

    Raises:
        CheckpointError: if the checkpoint is incomplete.
    """
    if training_weights:
        check_complete(checkpoint, only="")
    folder = Path(checkpoint) if training_weights else evaluation_folder(checkpoint)
    if not is_sharded_alone(folder):
        return folder
    root = Path(checkpoint)
    times = root.stat()
    with tempfile.TemporaryDirectory(prefix=".consolidating-", dir=folder) as staging:
        names = write_consolidated(folder, Path(staging), model_class=model_class, trust_remote_code=trust_remote_code)
        for name in sorted(names, key=lambda name: name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
            Path(staging, name).replace(folder / name)  # the file that makes the folder complete comes last
    flush(folder)
    add_files(root, [(folder / name).relative_to(root).as_posix() for name in names])
    os.utime(root, ns=(times.st_atime_ns, times.st_mtime_ns))  # rotation goes by it
    return folder


def write_consolidated(
    folder: Path, into: Path, *, model_class: Any = None, trust_remote_code: bool | None = None
) -> list[str]:
    """Write the weights of a sharded model folder as files into another folder; return the files' names."""
    model, shards = None, ShardedWeights(folder)
    if (folder / CONFIG_NAME).is_file():
        config = _config_of(folder, model_class, trust_remote_code)
        model = _meta_model(folder, config, model_class, trust_remote_code)
    like = {key: shards.like[key] for key in _saved_in(shards, folder, model)}
    write_weights(into, model, Tensors(like, shards.read_tensor), writes=True)
    names = [file.name for file in into.iterdir() if file.name.startswith(SAFE_WEIGHTS_NAME.split(".")[0])]
    for name in names:
        flush(into / name)
    return names


def _saved_in(shards: ShardedWeights, folder: Path, model: Any) -> list[str]:
    """Return the keys that the model's files hold; FSDP2 has written tied tensors by every name."""
    keys = list(shards.like if model is None else saved_keys(model))
    if not set(keys) <= set(shards.like):
        raise CheckpointError(f"{folder} has no {min(set(keys) - set(shards.like))}: it is of another model.")
    return keys
