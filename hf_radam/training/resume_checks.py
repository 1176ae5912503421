"""Refuse to go on from a checkpoint with other hyper-parameters than it was trained with.

Stock resume takes the optimizer's and the schedule's numbers from the checkpoint without a word: a new learning rate
or weight decay on the command line has no effect, and a checkpoint without optimizer or schedule restarts both.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_radam.averaging import WeightAverage
from hf_radam.checkpoints.extension import right_command
from hf_radam.checkpoints.layouts import DEEPSPEED, layout_of, process_count, zero_stages
from hf_radam.checkpoints.manifest import EWA_FOLDER, TRAINER_STATE_NAME, CheckpointError, read_manifest
from hf_radam.checkpoints.optimizer_state import read_groups
from hf_radam.checkpoints.peft import evaluation_subfolder, is_peft
from hf_radam.checkpoints.runs import check_resumable
from hf_radam.checkpoints.verify import VerifyFn, verify_checkpoint
from hf_radam.checkpoints.weights import read_optimizer_shards, read_parameters

logger = logging.get_logger(__name__)

# What changes while training, and which kernel does the work: not hyper-parameters.
NOT_COMPARED = frozenset(
    "params lr k train_mode weight_sum lr_max scheduled_lr foreach fused capturable differentiable maximize".split()
)


def check_checkpoint(checkpoint: str, *, verify_fn: VerifyFn = verify_checkpoint) -> None:
    """Raise `CheckpointError` if there is no checkpoint to resume from, or it is damaged, naming the bad files."""
    if not (Path(checkpoint) / TRAINER_STATE_NAME).is_file() and read_manifest(checkpoint) is None:
        raise CheckpointError(
            f"{checkpoint} has no {TRAINER_STATE_NAME}: to resume, give the folder of a whole checkpoint, checkpoint-N."
        )
    check_resumable(checkpoint, verify_fn=verify_fn)


def check_deepspeed(checkpoint: str, *, stage: int | None, processes: int) -> None:
    """Raise `CheckpointError` if a state in DeepSpeed's form would be needed and is not there, or the other way round.

    Args:
        checkpoint: its folder.
        stage: of ZeRO, in which DeepSpeed is to go on, or None without it.
        processes: that go on.
    """
    written = process_count(checkpoint)
    saved = layout_of(checkpoint)
    if saved is DEEPSPEED:
        stages = zero_stages(checkpoint)
        if stage in stages and processes == written:
            return
        of = " or ".join(map(str, stages))
        was, way_out = f"DeepSpeed (ZeRO-{of}, {written} processes)", "Resume with just that"
    elif stage is not None:
        was, way_out = f"{saved.words} ({written} processes)", "Resume without DeepSpeed"
    else:
        return
    now = "without DeepSpeed" if stage is None else f"with DeepSpeed (ZeRO-{stage})"
    raise CheckpointError(
        f"{checkpoint} was saved with {was}, and this run goes on {now} with {processes}: DeepSpeed keeps the "
        f"optimizer in pieces that fit one stage and one number of processes. {way_out}, or start a new "
        f"run from its weights: hf-radam consolidate {checkpoint}, then with the folder that it prints as the model "
        "(run_clm.py: --model_name_or_path)."
    )


def warn_of_move(checkpoint: str, *, processes: int) -> None:
    """Say so where a run goes on with another number of processes, of what is then not the same."""
    written = process_count(checkpoint)
    if written is not None and written != processes:
        logger.warning(
            f"{checkpoint} was written by {written} processes, and {processes} go on from it: random numbers, as for "
            "dropout, are others than they would have been."
        )


def check_data(state: TrainerState, train_dataloader: Any, *, checkpoint: str) -> None:
    """Raise `CheckpointError` if the checkpoint stands in a later round through data without a length.

    Upstream counts the batches to skip from the beginning of the run, as if such data never ended.
    """
    if not has_length(train_dataloader) and state.epoch is not None and state.epoch > 1:
        raise CheckpointError(
            f"{checkpoint} stands in round {math.ceil(state.epoch)} through a train_dataset without a length, where "
            "the place to go on from is not known: give the data a length, more data, or set ignore_data_skip "
            "to begin it anew."
        )


def epochs_after(updates: int, *, batches_per_epoch: int, accumulation: int) -> float:
    """How many rounds through the data `updates` updates are: the place from which upstream goes on.

    Args:
        updates: updates done.
        batches_per_epoch: batches of one process in a round.
        accumulation: batches of one process in an update; the last update of a round may have fewer.
    """
    updates_per_epoch = math.ceil(batches_per_epoch / accumulation)
    whole, rest = divmod(updates, updates_per_epoch)
    return whole + rest * accumulation / batches_per_epoch


def warn_of_other_place(state: TrainerState, train_dataloader: Any, *, accumulation: int, checkpoint: str) -> None:
    """Say so where the same number of updates is another place in the data: an update has more or fewer samples now.

    One update more or less may come from the last batch of a round, which processes fill up.
    """
    if not has_length(train_dataloader) or not state.epoch:
        return
    batches = len(train_dataloader)
    now = epochs_after(state.global_step, batches_per_epoch=batches, accumulation=accumulation)
    if abs(now - state.epoch) > accumulation / batches:
        logger.warning(
            f"{checkpoint} has gone {state.epoch:.4g} times through the data, but {state.global_step} updates of these "
            f"arguments are {now:.4g} times, and that is where training goes on: some samples are left out, or come "
            "again. For the same place keep per_device_train_batch_size * gradient_accumulation_steps * processes as "
            "it was."
        )


def hyperparameters(param_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbers of every parameter group that stay the same over a run."""
    return [{k: v for k, v in group.items() if k not in NOT_COMPARED} for group in param_groups]


def check_same_optimizer(
    planned: list[dict[str, Any]], loaded: list[dict[str, Any]], *, name: str, checkpoint: str
) -> None:
    """Refuse an optimizer's state that was trained otherwise.

    Args:
        planned: hyper-parameters of each group as the arguments made them.
        loaded: groups of the optimizer now, for a state that was loaded into it already, as DeepSpeed does. Else those
            in the checkpoint are looked at: torch fills gaps in what it loads with defaults.
        name: what the arguments call the optimizer.
        checkpoint: folder that the state is in.

    Raises:
        CheckpointError: if the checkpoint's optimizer is another one or has other hyper-parameters.
    """
    manifest = read_manifest(checkpoint)
    if manifest is not None and manifest["method"]["optim"] != name:
        raise CheckpointError(
            f"{checkpoint} was trained with optim={manifest['method']['optim']}, the arguments say {name}: resume with "
            "the same, or start a new run from its weights."
        )
    saved = loaded if layout_of(checkpoint) is DEEPSPEED else read_groups(checkpoint)
    check_same_hyperparameters(planned, hyperparameters(saved), checkpoint=checkpoint)


def check_same_hyperparameters(planned: list[dict[str, Any]], saved: list[dict[str, Any]], *, checkpoint: str) -> None:
    """Raise `CheckpointError` if a group that was saved differs from the one that the arguments ask for."""
    if len(planned) != len(saved):
        raise CheckpointError(
            f"{checkpoint} was trained with {len(saved)} groups of parameters, this optimizer has {len(planned)}: "
            "resume with the optimizer it was trained with, or start a new run from its weights."
        )
    for ours, theirs in zip(planned, saved, strict=True):
        if set(ours) != set(theirs):
            raise CheckpointError(
                f"{checkpoint} was trained with another optimizer: its parameter groups differ in "
                f"{sorted(set(ours) ^ set(theirs))}. Resume with the optimizer it was trained with, or start a new run "
                "from its weights."
            )
        for name, value in ours.items():
            if _plain(value) != _plain(theirs[name]):
                flag = "learning_rate" if name == "initial_lr" else name
                raise CheckpointError(
                    f"{checkpoint} was trained with {flag}={_plain(theirs[name])}, the arguments say "
                    f"{_plain(value)}: resume with the same, or start a new run from its weights."
                )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def planned_learning_rates(scheduler: LambdaLR) -> list[float]:
    """The learning rate of each parameter group at the next update, as the schedule now asked for has it."""
    bases = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [(group["lr"], float(base) * multiplier(scheduler.last_epoch)) for group, base, multiplier in bases]
    # A tensor holds the number in its own precision.
    return [float(torch.tensor(rate, dtype=lr.dtype)) if isinstance(lr, Tensor) else rate for lr, rate in rates]


def set_learning_rate(scheduler: LambdaLR) -> None:
    """Go on with the schedule now asked for: a loaded optimizer carries the rate that the old one gave."""
    for group, rate in zip(scheduler.optimizer.param_groups, planned_learning_rates(scheduler), strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def check_same_learning_rate(scheduler: LambdaLR, *, checkpoint: str, total_steps: int) -> None:
    """Raise `CheckpointError` if the schedule now asked for has another learning rate at the next update.

    The optimizer's state carries the learning rate that the old schedule gave for that update. With WSD, going on
    without a jump means from before the decay, which is what the message then says how to do.
    """
    manifest = read_manifest(checkpoint)
    longer = manifest is not None and manifest["schedule"] is not None and total_steps > manifest["max_steps"]
    for group, new in zip(scheduler.optimizer.param_groups, planned_learning_rates(scheduler), strict=True):
        old = float(group["lr"])
        if old != new:
            way_out = "Resume with the flags the run was started with"
            if longer:
                way_out += f", or extend the run: {right_command(checkpoint, total_steps)}"
            raise CheckpointError(
                f"{checkpoint} stands at update {scheduler.last_epoch} with learning rate {old:.6g}, but the schedule "
                f"of these arguments has {new:.6g} there. {way_out}."
            )


def warn_of_dropped_average(checkpoint: str) -> None:
    """Say so where a run with an average goes on without one."""
    manifest = read_manifest(checkpoint)
    if manifest is not None and manifest["averaging"] is not None:
        logger.warning(f"{checkpoint} keeps an average, and ewa is off: it ends here. Set --ewa to go on with it.")


def restore_average(average: WeightAverage, model: nn.Module, *, checkpoint: str, step: int) -> None:
    """Go on with the average that a checkpoint keeps, or begin one after update `step` if it keeps none, and say so.

    Raises:
        CheckpointError: if the checkpoint is damaged, or its run asked for another `ewa_start_step`.
    """
    manifest = read_manifest(checkpoint)
    kept = manifest["averaging"] if manifest else None
    if kept is None:
        average.start_step = max(step, average.start_step)
        average.last_step = step
        logger.warning(f"{checkpoint} keeps no average: averaging begins after update {average.start_step}.")
        return
    if average.start_step != kept["requested_start_step"]:
        raise CheckpointError(
            f"{checkpoint} was trained with ewa_start_step={kept['requested_start_step']}, the arguments say "
            f"{average.start_step}: resume with the same."
        )
    window = {"decay": average.decay, "half_life_ratio": average.half_life_ratio, "every": average.every}
    changed = {name: (kept[name], value) for name, value in window.items() if kept[name] != value}
    if changed:
        logger.warning(f"{checkpoint}: the average goes on with another window (old, new): {changed}.")
    folder = Path(checkpoint, evaluation_subfolder(EWA_FOLDER, model))
    average.load_state_dict(kept | {"averages": _averages(average, model, folder) if kept["num_averaged"] else {}})


def _averages(average: WeightAverage, model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What this process averages, out of a model or adapter folder."""
    if not is_peft(model):
        return read_optimizer_shards(folder, model, average.sharding)
    trained = set(average.sharding.trained)
    return {name: value for name, value in read_parameters(model, folder).items() if name in trained}
