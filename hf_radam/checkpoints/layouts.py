"""Tell how a checkpoint stores weights and optimizer: one of four layouts, by its files.

    one process, DDP      model.safetensors, optimizer.pt
    FSDP2, full           model.safetensors, pytorch_model_fsdp.bin (the same weights), optimizer.bin
    FSDP2, sharded        pytorch_model_fsdp_0/, optimizer_0/
    DeepSpeed             global_stepN/, latest; model.safetensors or nothing

Each has a scheduler.pt beside them, except with DeepSpeed's own schedules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hf_radam.checkpoints.manifest import PathLike

WEIGHT_FILES = tuple(w + end for w in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
SCHEDULER_NAME = "scheduler.pt"
OPTIMIZER_NAME = "optimizer.pt"
FSDP_OPTIMIZER_NAME, FSDP_OPTIMIZER_FOLDER = "optimizer.bin", "optimizer_0"
FSDP_WEIGHTS_NAME, FSDP_WEIGHTS_FOLDER = "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"
SHARDED_FOLDER = "sharded"
"""In a model folder: weights in shards, as `hf-radam consolidate` joins them."""
DEEPSPEED_LATEST, DEEPSPEED_FOLDER = "latest", "global_step"


@dataclass(frozen=True)
class Layout:
    """What wrote a checkpoint, its file or folder with the optimizer, and the one with the weights that FSDP reads."""

    words: str
    optimizer: str
    fsdp_weights: str | None = None


PLAIN = Layout("one process or DDP", OPTIMIZER_NAME)
FSDP_FULL = Layout("FSDP2 with full state dicts", FSDP_OPTIMIZER_NAME, FSDP_WEIGHTS_NAME)
FSDP_SHARDED = Layout("FSDP2 with sharded state dicts", FSDP_OPTIMIZER_FOLDER, FSDP_WEIGHTS_FOLDER)
DEEPSPEED = Layout("DeepSpeed", DEEPSPEED_LATEST)


def layout_of(checkpoint: PathLike) -> Layout:
    """Return the layout of a checkpoint, complete or not; without an optimizer that of one process."""
    path = Path(checkpoint)
    if (path / DEEPSPEED_LATEST).is_file() or any(path.glob(f"{DEEPSPEED_FOLDER}*/")):
        return DEEPSPEED
    for layout in (FSDP_SHARDED, FSDP_FULL):
        if any((path / str(name)).exists() for name in (layout.optimizer, layout.fsdp_weights)):
            return layout
    return PLAIN


def has_optimizer(checkpoint: PathLike) -> bool:
    """Return whether a folder holds the state of an optimizer, in any layout."""
    return Path(checkpoint, layout_of(checkpoint).optimizer).exists()


def has_weights(folder: PathLike) -> bool:
    """Return whether a folder holds the weights of a model or of an adapter, other than in shards."""
    path = Path(folder)
    names = (*WEIGHT_FILES, *ADAPTER_FILES)
    return any((path / name).is_file() for name in names) or any(path.glob("*/adapter_model.*"))


def training_shards(checkpoint: PathLike) -> str | None:
    """Return the name of the folder in which the back-end keeps the weights in shards, or None."""
    path = Path(checkpoint)
    if (path / FSDP_WEIGHTS_FOLDER).is_dir():
        return FSDP_WEIGHTS_FOLDER
    folder = deepspeed_folder(path)
    return folder.name if folder is not None and folder.is_dir() else None


def missing_state(checkpoint: PathLike) -> list[str]:
    """Return the names of optimizer and scheduler states that a checkpoint lacks, as after `save_only_model`."""
    layout = layout_of(checkpoint)
    # DeepSpeed keeps the state of its own schedule in its folder; then `scheduler.pt` is not written.
    names = [layout.optimizer] if layout is DEEPSPEED else [layout.optimizer, SCHEDULER_NAME]
    return [name for name in names if not Path(checkpoint, name).exists()]


def process_count(checkpoint: PathLike) -> int | None:
    """Return how many processes wrote a checkpoint, judging by the names of its files; None if they do not tell."""
    path = Path(checkpoint)
    if (path / "rng_state.pth").is_file():
        return 1
    fsdp_ranks = {file.name.split("_")[2] for file in path.glob(f"{FSDP_OPTIMIZER_FOLDER}/__*_*.distcp")}
    return max(len(list(path.glob("rng_state_*.pth"))), len(fsdp_ranks), len(_deepspeed_ranks(path))) or None


def zero_stages(checkpoint: PathLike) -> tuple[int, ...]:
    """Return the ZeRO stages that may have written a checkpoint, judging by its file names: 1 and 2 are alike."""
    if not _deepspeed_ranks(Path(checkpoint)):
        return (0,)
    partitioned = any(Path(checkpoint).glob(f"{DEEPSPEED_FOLDER}*/zero_pp_rank_*_model_states.pt"))
    return (3,) if partitioned else (1, 2)


def deepspeed_folder(checkpoint: PathLike) -> Path | None:
    """Return the folder that `latest` names, from which DeepSpeed loads; None without a valid name."""
    try:
        tag = Path(checkpoint, DEEPSPEED_LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return Path(checkpoint, tag) if re.fullmatch(rf"{DEEPSPEED_FOLDER}\d+", tag) else None


def _deepspeed_ranks(path: Path) -> set[str]:
    folder = deepspeed_folder(path)
    files = folder.glob("*zero_pp_rank_*_optim_states.pt") if folder else ()
    return {match[1] for file in files if (match := re.search(r"zero_pp_rank_(\d+)_", file.name))}
