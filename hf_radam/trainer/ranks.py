"""Decide on rank 0 what all ranks do, and refuse ranks that were started differently."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import transformers
from transformers.trainer_utils import has_length

from hf_radam import __version__
from hf_radam.checkpoints.manifest import MANIFEST_NAME, CheckpointError, PathLike
from hf_radam.checkpoints.storage import STAGING
from hf_radam.checkpoints.verify import check_complete
from hf_radam.sharding.base import all_gather_object, rank, world_size

MAY_DIFFER = frozenset(
    "local_rank log_level log_level_replica disable_tqdm report_to run_name project hub_token "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context".split()
)
"""Arguments that each rank may have its own value of: settings of logs and data loaders."""
FSDP_OPTIONS = (
    "state_dict_type reshard_after_forward cpu_offload mixed_precision_policy activation_checkpointing "
    "transformer_cls_names_to_wrap"
).split()
FUNCTIONS = "model_init compute_loss_func compute_metrics preprocess_logits_for_metrics data_collator".split()
MOST_NAMED = 10  # differences that the error names; a model of another shape has hundreds
PATIENCE = 30.0  # seconds until a file of another machine must be visible; network file systems cache its absence


class DisagreementError(ValueError):
    """The ranks of a run were started differently. Every rank raises it."""


# ---- Decisions of rank 0 ----


def decide_on_rank0(decide: Callable[[], Any]) -> Any:
    """Return on every rank what `decide` returns on rank 0, or raise what it raises there; collective."""
    if world_size() == 1:
        return decide()
    result: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = decide()
            pickle.dumps(result)
        except Exception as raised:  # whatever it is, the other ranks wait for it
            error = raised
    result, told = _broadcast((result, error and _picklable(error)))
    if told is not None:
        raise error or told
    return result


def check_same_folder(checkpoint: PathLike) -> None:
    """Raise `CheckpointError` on every rank if they do not find the same checkpoint at a path; collective."""
    manifest = Path(checkpoint, MANIFEST_NAME)
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
    seen = all_gather_object((digest, manifest.parent.stat().st_ino if manifest.parent.is_dir() else None))
    error = None
    if len({digest for digest, _ in seen}) > 1 or None in {inode for _, inode in seen}:
        error = CheckpointError(
            f"{checkpoint} is not the same folder on every rank: its {MANIFEST_NAME} differs or is missing. Give a "
            "path on a file system that all machines share."
        )
    elif seen[rank()] != seen[0]:  # a copy on another machine
        try:
            check_complete(checkpoint)
        except CheckpointError as raised:
            error = raised
    for of_rank in filter(None, all_gather_object(error)):
        raise of_rank


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} on rank {rank()}: {error}")
    return error


def _broadcast(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# ---- The same run on every rank ----


def check_agreement(trainer: Any, **further: Any) -> None:
    """Raise `DisagreementError` on every rank if they are not about to train the same, into one folder; collective.

    Compared are arguments, options of the back-end, the model's parameters, lengths of data, versions, and `further`.
    """
    if world_size() == 1:
        return
    facts = describe_run(trainer) | {name: _text(value) for name, value in further.items()}
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    if len(set(all_gather_object(digest))) > 1:
        raise DisagreementError(
            "The ranks of this run were started differently, and would wait for each other or train different things: "
            f"{'; '.join(differences(all_gather_object(facts)))}. Start every rank with the same flags, model and data."
        )
    check_shared_folder(trainer.args)


def differences(by_rank: list[dict[str, str]]) -> list[str]:
    """List, for each fact that is not the same on every rank, its name and values with their first ranks."""
    found = []
    for name in dict.fromkeys(name for facts in by_rank for name in facts):
        ranks: dict[str, list[int]] = {}
        for number, facts in enumerate(by_rank):
            ranks.setdefault(facts.get(name, "absent"), []).append(number)
        if len(ranks) > 1:
            more = {value: f" and {len(which) - 1} more" if len(which) > 1 else "" for value, which in ranks.items()}
            values = [f"{value} on rank {which[0]}{more[value]}" for value, which in ranks.items()]
            found.append(f"{name}: {', '.join(values)}")
    return found[:MOST_NAMED] + ([f"and {len(found) - MOST_NAMED} more"] if len(found) > MOST_NAMED else [])


def describe_run(trainer: Any) -> dict[str, str]:
    """Describe what a trainer is about to train as names and texts."""
    facts = {name: value for name, value in trainer.args.to_dict().items() if name not in MAY_DIFFER}
    facts |= {f"version of {package.__name__}": package.__version__ for package in (torch, transformers, accelerate)}
    facts["version of hf_radam"] = __version__
    functions = {name: getattr(trainer, name) for name in FUNCTIONS}
    # By name: their contents may differ, such as the seed of a collator.
    facts |= {name: getattr(one, "__qualname__", type(one).__qualname__) for name, one in functions.items()}
    facts["optimizer_cls_and_kwargs"] = trainer.optimizer_cls_and_kwargs
    facts |= {f"optimizer {name}": value for name, value in getattr(trainer.optimizer, "defaults", {}).items()}
    facts |= {name: type(getattr(trainer, name)) for name in ("optimizer", "lr_scheduler")}
    for kind in ("train_dataset", "eval_dataset"):
        data = getattr(trainer, kind)
        for name, one in data.items() if isinstance(data, dict) else [("", data)]:
            facts[f"length of {kind} {name}".rstrip()] = len(one) if one is not None and has_length(one) else "unknown"
    if trainer.is_fsdp_enabled:
        facts |= {f"FSDP {name}": getattr(trainer.accelerator.state.fsdp_plugin, name) for name in FSDP_OPTIONS}
    if trainer.is_deepspeed_enabled:
        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        facts |= {f"DeepSpeed {section}": value for section, value in config.items()}
    for name, parameter in trainer.model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor in its place
        dtype = str(parameter.dtype).removeprefix("torch.")
        facts[f"parameter {name}"] = f"{shape} {dtype}{'' if parameter.requires_grad else ', frozen'}"
    return {name: _text(value) for name, value in facts.items()}


def _text(value: Any) -> str:
    """Write a value as every process does: without memory addresses, sets in order."""
    text = sorted(map(str, value)) if isinstance(value, (set, frozenset)) else value
    return re.sub(r" at 0x[0-9a-f]+", "", str(text))


def check_shared_folder(args: Any) -> None:
    """Raise `DisagreementError` if what rank 0 writes into `output_dir` is not visible on all machines; collective.

    What the other machines wrote would be missing from every checkpoint. On one machine nothing is done.
    """
    if args.world_size == 1 or int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)) == args.world_size:
        return
    if args.save_on_each_node:
        raise DisagreementError(
            "save_on_each_node is not supported: a checkpoint is one folder, into which every rank writes. Leave it "
            "out, and set output_dir to a folder that all machines share."
        )
    token = _broadcast(uuid.uuid4().hex)
    probe = Path(str(args.output_dir), STAGING, f"visible-{token}")
    if rank() == 0:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    dist.barrier()
    visible = all_gather_object(_becomes_visible(probe))
    if rank() == 0:
        probe.unlink()
        if not any(probe.parent.iterdir()):
            probe.parent.rmdir()
    if not all(visible):
        blind = [number for number, sees in enumerate(visible) if not sees]
        raise DisagreementError(
            f"output_dir={args.output_dir} is not shared by all machines: ranks {blind} do not see what rank 0 writes. "
            "Set it to a folder on a shared file system."
        )


def _becomes_visible(file: Path) -> bool:
    until = time.monotonic() + PATIENCE
    while not (found := file.exists()) and time.monotonic() < until:
        time.sleep(0.5)
        if file.parent.is_dir():
            os.listdir(file.parent)  # has a network file system look again
    return found
