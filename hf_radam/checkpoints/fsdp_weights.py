"""Read the training weights that FSDP2 wrote in shards, for a model that has its tensors whole."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from hf_radam.checkpoints.dcp_folders import read_folder
from hf_radam.checkpoints.layouts import FSDP_WEIGHTS_FOLDER
from hf_radam.checkpoints.manifest import CheckpointError, PathLike
from hf_radam.sharding.base import canonical


def read_sharded_weights(model: nn.Module, checkpoint: PathLike) -> dict[str, Tensor]:
    """The weights in `pytorch_model_fsdp_0/` as a state dict for `model`, on the CPU, in the dtypes they have there.

    Raises:
        CheckpointError: if the folder does not hold exactly the weights of such a model.
    """
    folder = Path(checkpoint, FSDP_WEIGHTS_FOLDER)
    saved: dict[str, Tensor] = read_folder(folder).get("model", {})
    own = model.state_dict(keep_vars=True)
    first = {id(value): saved[canonical(name)] for name, value in own.items() if canonical(name) in saved}
    state = {name: first[id(value)] for name, value in own.items() if id(value) in first}
    missing = set(own) - set(state) - set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    unexpected = set(saved) - set(map(canonical, own))
    other_shapes = {name for name, value in state.items() if value.shape != own[name].shape}
    if missing or unexpected or other_shapes:
        raise CheckpointError(
            f"{folder} does not hold the weights of this {type(model).__name__}: missing {sorted(missing)[:5]}, "
            f"unexpected {sorted(unexpected)[:5]}, of another shape {sorted(other_shapes)[:5]}."
        )
    return state
