"""Find the class of the model in a folder, by its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME


def class_of(folder: Path, *, trust_remote_code: bool | None = None) -> Any:
    """The class that the configuration names; for a model with code of its own, the Auto class that finds it.

    Raises:
        ValueError: if there is no configuration, or it names no class that `transformers` has.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_NAME}: the model was not a PreTrainedModel. Load {SAFE_WEIGHTS_NAME} in it with "
            "safetensors.torch.load_file."
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    names = [*(config.architectures or ()), *(n for n in getattr(config, "auto_map", {}) if n.startswith("AutoModel"))]
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise ValueError(f"{folder / CONFIG_NAME} names no model class that transformers has ({names}): pass model_class.")


def meta_model(
    folder: Path, *, model_class: Any = None, trust_remote_code: bool | None = None
) -> PreTrainedModel | None:
    """A model of the class in a folder without its numbers, or None if the folder has no configuration."""
    if not (folder / CONFIG_NAME).is_file():
        return None
    kind = class_of(folder, trust_remote_code=trust_remote_code) if model_class is None else model_class
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        if hasattr(kind, "_from_config"):
            return kind._from_config(config)
        return kind.from_config(config, trust_remote_code=trust_remote_code)  # an Auto class
