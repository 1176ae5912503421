"""Write, read and load the evaluation weights of a PEFT model: a standard adapter folder for its one adapter.

    checkpoint-500/         the adapter that trains, as PEFT writes it
      ewa/adapter/          the averaged adapter: PeftModel.from_pretrained(base, "checkpoint-500/ewa/adapter")
      schedule_free/adapter/

It lies one level deeper than a full model, because upstream's resume loads an adapter from every first-level folder
that has one. PEFT is imported only where there is an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, is_peft_available

from hf_radam.batch_norm import batch_norm_modules
from hf_radam.checkpoints.layouts import ADAPTER_FILES
from hf_radam.checkpoints.manifest import CheckpointError, PathLike

ADAPTER_FOLDER = "adapter"
ADAPTER_NAME = "default"
"""PEFT's name for an adapter whose files lie in the folder itself, not in one of that name."""


def is_peft(model: Any) -> bool:
    """Return whether the model is a PEFT model."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def evaluation_subfolder(source: str, model: nn.Module) -> str:
    """Return the folder in a checkpoint of the model's evaluation weights `source` (`ewa` or `schedule_free`)."""
    return f"{source}/{ADAPTER_FOLDER}" if is_peft(model) else source


def _saved_keys(model: Any, *, embeddings: bool | Literal["auto"]) -> dict[str, Tensor]:
    """Return the model's own tensors by the keys that PEFT writes; with embeddings `"auto"` it may ask the hub."""
    from peft import get_peft_model_state_dict

    own = model.state_dict(keep_vars=True)
    options = {"state_dict": own, "adapter_name": ADAPTER_NAME, "save_embedding_layers": embeddings}
    state: dict[str, Tensor] = get_peft_model_state_dict(model, **options)
    return state


def _unsupported_reason(model: Any) -> str | None:
    """Return why one adapter folder cannot hold everything that trains, or None."""
    kind = next((c.peft_type for c in model.peft_config.values() if c.is_prompt_learning), None)
    if kind is not None:
        return f"{getattr(kind, 'value', kind)} trains a prompt, not the model. Use another kind of adapter."
    if list(model.peft_config) != [ADAPTER_NAME]:
        return (
            f"the model has the adapters {list(model.peft_config)}. Train one, with PEFT's own name for it, "
            f"{ADAPTER_NAME!r} (get_peft_model without adapter_name)."
        )
    unsaved = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    choices: tuple[Literal[False, "auto"], ...] = (False, "auto")
    for choice in choices:
        for tensor in _saved_keys(model, embeddings=choice).values() if unsaved else ():
            unsaved.pop(id(tensor), None)
    for name in unsaved.values():
        return f"PEFT does not write {name}, which trains. Freeze it, or name its module in modules_to_save."
    return None


def is_on_its_own(model: Any) -> bool:
    """Return whether this is a PEFT model with one adapter that holds everything that trains."""
    return is_peft(model) and _unsupported_reason(model) is None


def check_adapter(model: Any) -> None:
    """Raise `ValueError` for a PEFT model whose evaluation weights one adapter folder could not hold."""
    reason = _unsupported_reason(model)
    if reason is None and batch_norm_modules(model):
        reason = "the model has BatchNorm layers, whose statistics no adapter holds. Merge the adapter first."
    if reason is not None:
        raise ValueError(
            "The evaluation weights of a PEFT model with ewa, radam_schedulefree or load_best_model_at_end are one "
            f"adapter folder, but {reason}"
        )


def save_adapter_folder(
    folder: PathLike, model: Any, weights: Mapping[str, Tensor], *, processing_class: Any = None
) -> None:
    """Write an adapter folder with `weights` (float32 by name) in place of the model's own; not collective."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = model.state_dict()
    for key, value in model.state_dict(keep_vars=True).items():
        if names.get(id(value)) in weights:
            state[key] = weights[names[id(value)]]
    model.save_pretrained(str(folder), state_dict=state)
    if processing_class is not None:
        processing_class.save_pretrained(folder)


def read_adapter(model: Any, folder: PathLike) -> dict[str, Tensor]:
    """Read an adapter folder as part of a state dict for `model`, on the CPU, in the dtypes of the file."""
    from peft.utils import load_peft_weights

    path = Path(folder)
    if not any((path / name).is_file() for name in ADAPTER_FILES):
        raise CheckpointError(f"{path} has no {ADAPTER_SAFE_WEIGHTS_NAME}: it is not an adapter folder.")
    try:
        file: dict[str, Tensor] = load_peft_weights(str(path), device="cpu")
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as an adapter: {error}") from error
    keys = _saved_keys(model, embeddings=hasattr(model, "get_input_embeddings"))  # written or not
    values = {id(tensor): file[key] for key, tensor in keys.items() if key in file}
    own = model.state_dict(keep_vars=True)
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in values]
    other_shape = [n for n, v in own.items() if id(v) in values and values[id(v)].shape != v.shape]
    unexpected = sorted(set(file) - set(keys))
    if missing or unexpected or other_shape:
        raise CheckpointError(
            f"{path} does not hold the adapter of this model: missing {missing[:5]}, unexpected {unexpected[:5]}, "
            f"of another shape {other_shape[:5]}. Load an adapter with the same configuration."
        )
    return {name: values[id(value)] for name, value in own.items() if id(value) in values}


@torch.no_grad()
def load_adapter(model: Any, folder: PathLike) -> None:
    """Copy an adapter folder into the adapter of `model`, in place and in its dtypes.

    PEFT's own `load_adapter` skips missing tensors, and replaces parameters below float32 by new ones. Here another
    adapter raises `CheckpointError`, and nothing is changed then.
    """
    state = read_adapter(model, folder)
    for name, value in model.state_dict(keep_vars=True).items():
        if name in state:
            value.copy_(state[name])


def base_and_adapter(
    folder: PathLike, *, model_class: Any = None, dtypes: Mapping[str, Any] | None, **kwargs: Any
) -> Any:
    """Load an adapter folder on top of the base model that its configuration names.

    PEFT's Auto class for the adapter's task finds the class of the base model, unless `model_class` is given. `dtypes`
    are `parameter_dtypes` of the model that was evaluated; None for the dtypes as loaded.
    """
    import peft

    config = peft.PeftConfig.from_pretrained(str(folder))
    if not config.base_model_name_or_path:
        raise ValueError(
            f"{Path(folder, ADAPTER_CONFIG_NAME)} does not name the base model (base_model_name_or_path). Load that "
            f"yourself, then peft.PeftModel.from_pretrained(base, {str(folder)!r})."
        )
    if dtypes is not None:
        kwargs = {"dtype": _base_dtype(dtypes)} | kwargs
    if model_class is None:
        target = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
        model = getattr(peft, f"Auto{target.__name__}").from_pretrained(str(folder), **kwargs)
    else:
        base = model_class.from_pretrained(config.base_model_name_or_path, **kwargs)
        model = peft.PeftModel.from_pretrained(base, str(folder))
    if dtypes is not None and cast_parameters(model, dtypes):
        load_adapter(model, folder)  # it was rounded to the base model's dtype
    return model


def _base_dtype(dtypes: Mapping[str, Any]) -> Any:
    """Return a dtype that holds the base model exactly; `auto` if it is quantized."""
    if not getattr(torch, dtypes["dtype"]).is_floating_point:
        return "auto"
    others = [dtype for name, dtype in dtypes["other_dtypes"].items() if ADAPTER_NAME not in name.split(".")]
    return exact_dtype([dtypes["dtype"], *others])


def exact_dtype(names: Iterable[str]) -> torch.dtype:
    """Return a dtype that holds every one of several dtypes exactly."""
    dtypes = {getattr(torch, name) for name in names}
    if len(dtypes) == 1:
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def cast_parameters(model: nn.Module, dtypes: Mapping[str, Any]) -> bool:
    """Cast every floating-point parameter to its dtype in `parameter_dtypes`; return whether any had another."""
    changed = False
    for name, parameter in model.named_parameters():
        dtype = getattr(torch, dtypes["other_dtypes"].get(name, dtypes["dtype"]))
        if parameter.dtype != dtype and dtype.is_floating_point and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
            changed = True
    return changed
