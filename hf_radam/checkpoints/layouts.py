"""How a checkpoint keeps weights and optimizer: in one of four layouts, which its files tell apart.

    one process, DDP      model.safetensors, optimizer.pt
    FSDP2, full           model.safetensors, pytorch_model_fsdp.bin (the same again), optimizer.bin
    FSDP2, sharded        pytorch_model_fsdp_0/, optimizer_0/
    DeepSpeed             global_stepN/, latest; model.safetensors or nothing

Each has a scheduler.pt beside them, but for DeepSpeed's own schedules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hf_radam.checkpoints.dcp_folders import damaged_files, ranks
from hf_radam.checkpoints.manifest import PathLike

SCHEDULER_NAME = "scheduler.pt"
OPTIMIZER_NAME = "optimizer.pt"
FSDP_OPTIMIZER_NAME, FSDP_OPTIMIZER_FOLDER = "optimizer.bin", "optimizer_0"
FSDP_WEIGHTS_NAME, FSDP_WEIGHTS_FOLDER = "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"
SHARDED_FOLDER = "sharded"
"""In a model folder: weights that we wrote in shards, `hf_radam.checkpoints.models.sharded_weights`."""
DEEPSPEED_LATEST, DEEPSPEED_FOLDER = "latest", "global_step"


@dataclass(frozen=True)
class Layout:
    """One of the four.

    Attributes:
        words: what wrote it.
        optimizer: name of the file or folder that holds the optimizer's state.
        fsdp_weights: name of the one from which upstream's FSDP takes the weights, or None.
    """

    words: str
    optimizer: str
    fsdp_weights: str | None = None


PLAIN = Layout("one process or DDP", OPTIMIZER_NAME)
FSDP_FULL = Layout("FSDP2 with full state dicts", FSDP_OPTIMIZER_NAME, FSDP_WEIGHTS_NAME)
FSDP_SHARDED = Layout("FSDP2 with sharded state dicts", FSDP_OPTIMIZER_FOLDER, FSDP_WEIGHTS_FOLDER)
DEEPSPEED = Layout("DeepSpeed", DEEPSPEED_LATEST)


def layout_of(checkpoint: PathLike) -> Layout:
    """The layout of a checkpoint, whole or damaged; without any optimizer it is that of one process."""
    path = Path(checkpoint)
    if (path / DEEPSPEED_LATEST).is_file() or any(path.glob(f"{DEEPSPEED_FOLDER}*/")):
        return DEEPSPEED
    for layout, names in (
        (FSDP_SHARDED, (FSDP_OPTIMIZER_FOLDER, FSDP_WEIGHTS_FOLDER)),
        (FSDP_FULL, (FSDP_OPTIMIZER_NAME, FSDP_WEIGHTS_NAME)),
    ):
        if any((path / name).exists() for name in names):
            return layout
    return PLAIN


def has_optimizer(checkpoint: PathLike) -> bool:
    """Whether a folder holds the state of an optimizer, in whatever layout."""
    return Path(checkpoint, layout_of(checkpoint).optimizer).exists()


def missing_state(checkpoint: PathLike) -> list[str]:
    """What training cannot go on without and a checkpoint has not, as after a save with `save_only_model`."""
    layout = layout_of(checkpoint)
    # DeepSpeed keeps the state of a schedule of its own in its folder, and `scheduler.pt` is not written.
    names = [layout.optimizer] if layout is DEEPSPEED else [layout.optimizer, SCHEDULER_NAME]
    return [name for name in names if not Path(checkpoint, name).exists()]


def process_count(checkpoint: PathLike) -> int | None:
    """How many processes have written a checkpoint, as the names of its files tell, or None if they do not."""
    path = Path(checkpoint)
    if (path / "rng_state.pth").is_file():
        return 1
    found = [len(list(path.glob("rng_state_*.pth"))), ranks(path / FSDP_OPTIMIZER_FOLDER)]
    return max(*found, len(_deepspeed_ranks(path))) or None


def zero_stages(checkpoint: PathLike) -> tuple[int, ...]:
    """The ZeRO stages in which DeepSpeed may have written a checkpoint, by its file names: 1 and 2 are alike."""
    if not _deepspeed_ranks(Path(checkpoint)):
        return (0,)
    partitioned = any(Path(checkpoint).glob(f"{DEEPSPEED_FOLDER}*/zero_pp_rank_*_model_states.pt"))
    return (3,) if partitioned else (1, 2)


def deepspeed_folder(checkpoint: PathLike) -> Path | None:
    """The folder that DeepSpeed would load from, which `latest` names, or None without a name of that form."""
    try:
        tag = Path(checkpoint, DEEPSPEED_LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return Path(checkpoint, tag) if re.fullmatch(rf"{DEEPSPEED_FOLDER}\d+", tag) else None


def damaged_parts(checkpoint: PathLike) -> dict[str, str]:
    """What is wrong with the parts that a sharded layout cannot do without, by their paths in the checkpoint."""
    path = Path(checkpoint)
    wrong: dict[str, str] = {}
    for folder in (FSDP_WEIGHTS_FOLDER, FSDP_OPTIMIZER_FOLDER):
        if (path / folder).is_dir():
            wrong |= {f"{folder}/{name}": problem for name, problem in damaged_files(path / folder).items()}
    if layout_of(path) is FSDP_SHARDED and not (path / FSDP_WEIGHTS_FOLDER).is_dir():
        wrong[FSDP_WEIGHTS_FOLDER] = "is missing"
    if layout_of(path) is DEEPSPEED:
        wrong |= _damaged_deepspeed(path)
    return wrong


def _damaged_deepspeed(path: Path) -> dict[str, str]:
    folder = deepspeed_folder(path)
    if folder is None:
        return {DEEPSPEED_LATEST: "is missing, or names no folder of DeepSpeed's"}
    if not any(folder.glob("*model_states.pt")):
        return {folder.name: "has no model states"}
    wrong: dict[str, str] = {}
    count = process_count(path) or 0
    for kind in ("optim", "model"):
        files = sorted(file.name for file in folder.glob(f"*zero_pp_rank_*_{kind}_states.pt"))
        names = [re.sub(r"(?<=zero_pp_rank_)\d+", str(rank), files[0]) for rank in range(count)] if files else []
        wrong |= {f"{folder.name}/{name}": "is missing" for name in names if name not in files}
    return wrong


def _deepspeed_ranks(path: Path) -> set[int]:
    """The ranks that have written their part of the optimizer into the folder that DeepSpeed would load from."""
    folder = deepspeed_folder(path)
    files = folder.glob("*zero_pp_rank_*_optim_states.pt") if folder else ()
    matches = [re.search(r"zero_pp_rank_(\d+)_", file.name) for file in files]
    return {int(match[1]) for match in matches if match}


def state_files(checkpoint: PathLike) -> list[Path]:
    """Files of torch's below the root that belong to the layout: those of DeepSpeed."""
    folder = deepspeed_folder(checkpoint)
    return sorted(folder.glob("*.pt")) if folder else []
