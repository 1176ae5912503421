"""Load the weights that evaluation used, from a checkpoint or from the folder of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
)

from hf_radam.checkpoints.layouts import ADAPTER_FILES, WEIGHT_FILES
from hf_radam.checkpoints.manifest import (
    TRAINER_STATE_NAME,
    CheckpointError,
    PathLike,
    read_manifest,
)
from hf_radam.checkpoints.models.adapters import base_and_adapter
from hf_radam.checkpoints.models.consolidation import consolidated, is_sharded_alone
from hf_radam.checkpoints.models.model_class import class_of
from hf_radam.checkpoints.runs import is_checkpoint, list_checkpoints, newest_checkpoint, recorded_step, step_of
from hf_radam.checkpoints.verify import evaluation_folder

logger = logging.getLogger(__name__)


def load_evaluation_model(
    path: PathLike, *, model_class: type[PreTrainedModel] | None = None, **from_pretrained_kwargs: Any
) -> PreTrainedModel:
    """Load the weights with which the trainer evaluated, in the dtype in which it did.

    An adapter is loaded on top of the base model that its configuration names.

    Args:
        path: a checkpoint, or the folder of a run: there its root model (what `save_model()` wrote), else its newest
            whole checkpoint.
        model_class: class to load, of an adapter that of its base model; by default the one that the folder's
            configuration names.
        **from_pretrained_kwargs: passed on; a `dtype` given here wins.

    Returns:
        The model in evaluation mode (`model.eval()`), as `from_pretrained` leaves it; for an adapter a `PeftModel`.

    Raises:
        FileNotFoundError: if there is neither a model nor a whole checkpoint.
        ValueError: if the checkpoint is damaged (`CheckpointError`), its model class is unknown to `transformers`, or
            an adapter does not name its base model.
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
        return _from_pretrained(root, model_class, from_pretrained_kwargs)
    return _load_checkpoint(newest_loadable_checkpoint(root), model_class, from_pretrained_kwargs)


def later_than_model(run: PathLike) -> str | None:
    """The name of a checkpoint that was made after the model at the root of a run, whose training then went on."""
    root = Path(run)
    folders = [place.path for place in list_checkpoints(root) if (place.path / TRAINER_STATE_NAME).is_file()]
    written = recorded_step(root)  # of `save_state()`, where it was called
    if written is not None:
        later = [folder.name for folder in folders if (step_of(folder) or 0) > written]
    else:
        files = [root / name for name in (*WEIGHT_FILES, *ADAPTER_FILES) if (root / name).is_file()]
        newest_file = max(file.stat().st_mtime for file in files)
        later = [folder.name for folder in folders if (folder / TRAINER_STATE_NAME).stat().st_mtime > newest_file]
    return later[0] if later else None


def holds_model(folder: PathLike) -> bool:
    """Whether `folder` has a configuration and weights, of a model (maybe sharded) or of an adapter, at its root."""
    path = Path(folder)
    if (path / CONFIG_NAME).is_file() and is_sharded_alone(path):
        return True
    kinds = ((CONFIG_NAME, WEIGHT_FILES), (ADAPTER_CONFIG_NAME, ADAPTER_FILES))
    return any((path / config).is_file() and any((path / f).is_file() for f in files) for config, files in kinds)


def newest_loadable_checkpoint(run: PathLike) -> Path:
    """The latest checkpoint of a run whose evaluation weights are whole; others are passed over with a warning.

    Raises:
        FileNotFoundError: if there is none.
    """

    def accept(folder: Path) -> None:
        if not (holds_model(evaluation_folder(folder)) and is_checkpoint(folder)):
            raise CheckpointError(f"it has no {TRAINER_STATE_NAME} or no weights.")

    place = newest_checkpoint(run, accept)
    if place is None:
        raise FileNotFoundError(
            f"{run} holds neither a model (config.json and weights) nor a whole checkpoint-N folder."
        )
    return place.path


def _load_checkpoint(
    checkpoint: Path, model_class: type[PreTrainedModel] | None, kwargs: dict[str, Any]
) -> PreTrainedModel:
    folder = evaluation_folder(checkpoint)
    if not is_sharded_alone(folder):
        return _load_folder(checkpoint, folder, model_class, kwargs)
    with consolidated(checkpoint, folder, model_class=model_class, **_only(kwargs, "trust_remote_code")) as whole:
        return _load_folder(checkpoint, whole, model_class, kwargs)


def _only(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: kwargs[name] for name in names if name in kwargs}


def _load_folder(
    checkpoint: Path, folder: Path, model_class: type[PreTrainedModel] | None, kwargs: dict[str, Any]
) -> PreTrainedModel:
    manifest = read_manifest(checkpoint)
    if manifest is None or "dtype" in kwargs:
        return _from_pretrained(folder, model_class, kwargs)
    evaluated = manifest["evaluation"]
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return base_and_adapter(folder, model_class=model_class, dtypes=evaluated, **kwargs)
    if not evaluated["other_dtypes"]:
        return _from_pretrained(folder, model_class, {"dtype": getattr(torch, evaluated["dtype"])} | kwargs)
    wide = "float64" in (evaluated["dtype"], *evaluated["other_dtypes"].values())
    model = _from_pretrained(folder, model_class, {"dtype": torch.float64 if wide else torch.float32} | kwargs)
    for name, parameter in model.named_parameters():
        dtype = evaluated["other_dtypes"].get(name, evaluated["dtype"])
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def _from_pretrained(
    folder: Path, model_class: type[PreTrainedModel] | None, kwargs: dict[str, Any]
) -> PreTrainedModel:
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return base_and_adapter(folder, model_class=model_class, dtypes=None, **kwargs)
    if model_class is None:
        model_class = class_of(folder, trust_remote_code=kwargs.get("trust_remote_code"))
    return model_class.from_pretrained(folder, **kwargs)
