"""Load a checkpoint, and refuse one that was trained with other hyper-parameters than the arguments ask for.

Stock resume takes the numbers of optimizer and schedule from the checkpoint: a new learning rate or weight decay on the
command line has no effect, and a checkpoint without optimizer or schedule restarts both, without a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_radam.averaging import WeightAverage
from hf_radam.checkpoints import storage
from hf_radam.checkpoints.extend import ResumePlan, extend_command
from hf_radam.checkpoints.layouts import (
    DEEPSPEED,
    FSDP_FULL,
    FSDP_SHARDED,
    SCHEDULER_NAME,
    Layout,
    layout_of,
    process_count,
    zero_stages,
)
from hf_radam.checkpoints.manifest import EWA_FOLDER, MANIFEST_NAME, CheckpointError
from hf_radam.checkpoints.optimizer_state import (
    allow_a_first_step,
    fsdp_state_dict_type,
    load_optimizer,
    read_groups,
)
from hf_radam.checkpoints.peft import evaluation_subfolder, is_on_its_own, is_peft
from hf_radam.checkpoints.runs import PREFIX, run_of
from hf_radam.checkpoints.verify import evaluation_folder, verify_checkpoint
from hf_radam.checkpoints.weights import load_model_shards, load_weights, read_optimizer_shards, read_parameters
from hf_radam.names import OptimizerName
from hf_radam.sharding import find_sharding
from hf_radam.sharding.base import rank
from hf_radam.trainer.compatibility import is_sharded, optimizer_name, zero_stage
from hf_radam.trainer.ranks import decide_on_rank0

logger = logging.get_logger(__name__)

NOT_COMPARED = frozenset(
    "params lr k train_mode weight_sum lr_max scheduled_lr foreach fused capturable differentiable maximize".split()
)
"""Entries of a parameter group that change while training, or say which kernel does the work."""


def _warn(message: str) -> None:
    if rank() == 0:
        logger.warning(message)


# ---- Weights ----


def load_training_weights(trainer: Any, checkpoint: str, stock: Callable[[], None]) -> None:
    """Load the training weights of a checkpoint in any layout.

    Upstream's loading, `stock`, skips keys that files spell otherwise without a message (Mixtral's experts;
    transformers 5.24), and reads only the layout that it would write.
    """
    model, layout = trainer._bare_model, layout_of(checkpoint)
    of_fsdp = layout.fsdp_weights is not None and Path(checkpoint, layout.fsdp_weights).exists()
    if trainer.is_fsdp_enabled and of_fsdp:
        with _fsdp_reads(trainer, layout):
            stock()
    elif trainer.is_fsdp_enabled or layout is FSDP_SHARDED:
        load_model_shards(Path(checkpoint), model, find_sharding(model, device=trainer.args.device))
    elif isinstance(model, PreTrainedModel) or is_on_its_own(model) or layout is FSDP_FULL:
        load_weights(model, checkpoint)
    else:
        stock()


def load_best_weights(trainer: Any) -> None:
    """Load the evaluation weights of the best checkpoint: upstream would load its training weights."""
    best = trainer.state.best_model_checkpoint
    logger.info(f"Loading the evaluation weights of {best} (score: {trainer.state.best_metric}).")
    folder: Path = decide_on_rank0(lambda: evaluation_folder(best))
    if is_sharded(trainer):
        load_model_shards(folder, trainer._bare_model, trainer._evaluation.sharding)
    else:
        load_weights(trainer._bare_model, folder)
    if trainer._schedule_free is not None:
        trainer._schedule_free.forget_training_weights()


def _fsdp_reads(trainer: Any, layout: Layout) -> AbstractContextManager[None]:
    plugin = trainer.accelerator.state.fsdp_plugin
    return fsdp_state_dict_type(plugin, layout, world_size=trainer.args.world_size)


def check_deepspeed(trainer: Any, checkpoint: str) -> None:
    """Raise `CheckpointError` if DeepSpeed wrote the optimizer state for another set-up, or would have to read it."""
    written, layout, processes = process_count(checkpoint), layout_of(checkpoint), trainer.args.world_size
    stage = zero_stage(trainer)
    if layout is DEEPSPEED:
        stages = zero_stages(checkpoint)
        if stage in stages and processes == written:
            return
        was, way_out = f"DeepSpeed (ZeRO-{' or '.join(map(str, stages))}, {written} processes)", "Resume with the same"
    elif stage is not None:
        was, way_out = f"{layout.words} ({written} processes)", "Resume without DeepSpeed"
    else:
        return
    now = "without DeepSpeed" if stage is None else f"with DeepSpeed (ZeRO-{stage})"
    raise CheckpointError(
        f"{checkpoint} was saved with {was}, and this run is {now} and {processes} processes: DeepSpeed's optimizer "
        f"state fits one stage and number of processes. {way_out}, or start a new run from its weights: hf-radam "
        f"consolidate {checkpoint}, then give the folder that it prints as the model (--model_name_or_path)."
    )


# ---- Optimizer and schedule ----


def load_optimizer_and_scheduler(trainer: Any, checkpoint: str, stock: Callable[[], None]) -> None:
    """Load optimizer and schedule in any layout; `stock` is upstream's loading.

    Raises `CheckpointError` if optimizer, hyper-parameters or learning rate are not those of the arguments.
    """
    optimizer, scheduler, layout = trainer._bare_optimizer, trainer.lr_scheduler, layout_of(checkpoint)
    plan: ResumePlan = trainer._plan
    _check_same_optimizer(trainer, optimizer, checkpoint, plan.manifest)
    if trainer.is_fsdp_enabled and layout in (FSDP_FULL, FSDP_SHARDED):
        allow_a_first_step(optimizer)
        with _fsdp_reads(trainer, layout):
            stock()
    elif layout in (FSDP_FULL, FSDP_SHARDED) or trainer.is_fsdp_enabled:
        load_optimizer(optimizer, trainer._bare_model, checkpoint)
        scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
    else:
        stock()
    if not isinstance(scheduler, LambdaLR):
        return
    if plan.sets_learning_rate:
        _set_learning_rates(scheduler)
    else:
        _check_learning_rates(scheduler, checkpoint, plan.manifest, total_steps=trainer.state.max_steps)


def hyperparameters(param_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the numbers of every parameter group that stay the same over a run."""
    return [{k: v for k, v in group.items() if k not in NOT_COMPARED} for group in param_groups]


def _check_same_optimizer(trainer: Any, optimizer: Any, checkpoint: str, manifest: Mapping[str, Any] | None) -> None:
    names = {optimizer_name(trainer), OptimizerName(trainer.args.optim).value}  # format 2 once had only the second
    if manifest is not None and manifest["method"]["optim"] not in names:
        raise CheckpointError(
            f"{checkpoint} was trained with optim={manifest['method']['optim']}, the arguments say "
            f"{optimizer_name(trainer)}. Resume with the same, or start a new run from its weights."
        )
    # DeepSpeed has loaded its state by now. Else the file is read: torch fills gaps in what it loads with defaults.
    saved = optimizer.param_groups if layout_of(checkpoint) is DEEPSPEED else read_groups(checkpoint)
    # A trainer whose create_scheduler is overridden has not noted them, and has not loaded the optimizer yet.
    planned = trainer._planned or hyperparameters(optimizer.param_groups)
    check_same_hyperparameters(planned, hyperparameters(saved), checkpoint=checkpoint)


def check_same_hyperparameters(planned: list[dict[str, Any]], saved: list[dict[str, Any]], *, checkpoint: str) -> None:
    """Raise `CheckpointError` if a parameter group that was saved differs from the one that the arguments ask for."""
    way_out = "Resume with the same, or start a new run from its weights."
    if len(planned) != len(saved):
        raise CheckpointError(
            f"{checkpoint} was trained with {len(saved)} parameter groups, this optimizer has {len(planned)}. {way_out}"
        )
    for own, other in zip(planned, saved, strict=True):
        if set(own) != set(other):
            raise CheckpointError(
                f"{checkpoint} was trained with another optimizer: its parameter groups differ in "
                f"{sorted(set(own) ^ set(other))}. {way_out}"
            )
        for name, value in own.items():
            if _plain(value) != _plain(other[name]):
                flag = "learning_rate" if name == "initial_lr" else name
                raise CheckpointError(
                    f"{checkpoint} was trained with {flag}={_plain(other[name])}, the arguments say {_plain(value)}. "
                    f"{way_out}"
                )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _scheduled_learning_rates(scheduler: LambdaLR) -> list[float]:
    """Return the learning rate of each group at the next step by the schedule that the arguments ask for."""
    groups = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [(group["lr"], float(base) * multiplier(scheduler.last_epoch)) for group, base, multiplier in groups]
    # A tensor holds the number in its own precision.
    return [float(torch.tensor(rate, dtype=lr.dtype)) if isinstance(lr, Tensor) else rate for lr, rate in rates]


def _set_learning_rates(scheduler: LambdaLR) -> None:
    """Follow the new schedule: a loaded optimizer carries the rate of the old one."""
    for group, rate in zip(scheduler.optimizer.param_groups, _scheduled_learning_rates(scheduler), strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _check_learning_rates(
    scheduler: LambdaLR, checkpoint: str, manifest: Mapping[str, Any] | None, *, total_steps: int
) -> None:
    """Raise `CheckpointError` if the new schedule has another learning rate at the next step than the old one."""
    longer = manifest is not None and manifest["schedule"] is not None and total_steps > manifest["max_steps"]
    for group, new in zip(scheduler.optimizer.param_groups, _scheduled_learning_rates(scheduler), strict=True):
        old = float(group["lr"])
        if old != new:
            extend = f", or extend the run: {extend_command(checkpoint, total_steps)}" if longer else ""
            raise CheckpointError(
                f"{checkpoint} is at step {scheduler.last_epoch} with learning rate {old:.6g}, but the schedule of "
                f"these arguments has {new:.6g} there. Resume with the flags the run was started with{extend}."
            )


# ---- Place in the data ----


def check_place_in_data(state: TrainerState, dataloader: Any, *, accumulation: int, checkpoint: str) -> None:
    """Refuse a position in the data that upstream cannot restore, and warn if the same step is now another position.

    Raises:
        CheckpointError: if the checkpoint is in a later epoch of data without a length: upstream counts the batches to
            skip from the beginning of the run, as if the data never ended.
    """
    if not state.epoch:
        return
    if not has_length(dataloader):
        if state.epoch > 1:
            raise CheckpointError(
                f"{checkpoint} is in epoch {math.ceil(state.epoch)} of a train_dataset without a length, where its "
                "place is unknown. Give the data a length, more data, or set ignore_data_skip to start it anew."
            )
        return
    batches = len(dataloader)
    now = epochs_after(state.global_step, batches_per_epoch=batches, accumulation=accumulation)
    if abs(now - state.epoch) > accumulation / batches:  # ranks fill up the last batch of an epoch
        _warn(
            f"{checkpoint} is at epoch {state.epoch:.4g}, but its {state.global_step} steps are {now:.4g} epochs with "
            "these arguments, and training continues there: some samples are skipped or repeated. To keep the place, "
            "keep per_device_train_batch_size * gradient_accumulation_steps * processes."
        )


def epochs_after(steps: int, *, batches_per_epoch: int, accumulation: int) -> float:
    """Return the epochs that `steps` steps are, which is where upstream resumes; the batches are those of one process.

    The last step of an epoch may have fewer than `accumulation` batches.
    """
    epochs, rest = divmod(steps, math.ceil(batches_per_epoch / accumulation))
    return epochs + rest * accumulation / batches_per_epoch


def _warn_of_changes(plan: ResumePlan, *, processes: int, ewa: bool) -> None:
    written = process_count(plan.checkpoint)
    if written is not None and written != processes:
        _warn(
            f"{plan.checkpoint} was written by {written} processes, and {processes} resume from it: random numbers, as "
            "for dropout, differ from those of an uninterrupted run."
        )
    if not ewa and plan.manifest is not None and plan.manifest["averaging"] is not None:
        _warn(f"{plan.checkpoint} has an average, and ewa is off: it ends here. Set --ewa to continue it.")


# ---- Average, best checkpoint, pins ----


def restore(trainer: Any, plan: ResumePlan, run: Path) -> None:
    """Restore the average of a checkpoint, its place in the data and what is found by its folder; collective."""
    args, state = trainer.args, trainer.state
    if not args.ignore_data_skip and state.global_step < state.max_steps:
        accumulation, dataloader = args.gradient_accumulation_steps, trainer.callback_handler.train_dataloader
        check_place_in_data(state, dataloader, accumulation=accumulation, checkpoint=plan.checkpoint)
    _warn_of_changes(plan, processes=args.world_size, ewa=args.ewa)
    if trainer.average is not None:
        restore_average(trainer.average, trainer._bare_model, plan, step=state.global_step)
    find_moved_best(state, plan.checkpoint)
    pinned_in = trainer._schedule.pinned_at(trainer._scheduled_steps) if trainer._schedule else None
    if pinned_in is not None:
        pin_resumed(plan.checkpoint, run, pinned_in, state.global_step)


def restore_average(average: WeightAverage, model: nn.Module, plan: ResumePlan, *, step: int) -> None:
    """Load the average of a checkpoint, or start one after `step` if it has none, with a warning.

    Raises:
        CheckpointError: if the checkpoint is corrupted, or its run had another `ewa_start_step`.
    """
    checkpoint, saved = plan.checkpoint, plan.manifest["averaging"] if plan.manifest else None
    if saved is None:
        average.start_step = max(step, average.start_step)
        average.last_step = step
        _warn(f"{checkpoint} has no average: averaging starts after step {average.start_step}.")
        return
    if average.start_step != saved["requested_start_step"]:
        raise CheckpointError(
            f"{checkpoint} was trained with ewa_start_step={saved['requested_start_step']}, the arguments say "
            f"{average.start_step}. Resume with the same."
        )
    window = {"decay": average.decay, "half_life_ratio": average.half_life_ratio, "every": average.every}
    changed = {name: (saved[name], value) for name, value in window.items() if saved[name] != value}
    if changed:
        _warn(f"{checkpoint}: the average continues with another window (old, new): {changed}.")
    averages: dict[str, Tensor] = {}
    if saved["num_averaged"]:
        folder = Path(checkpoint, evaluation_subfolder(EWA_FOLDER, model))
        if is_peft(model):
            trained = set(average.sharding.trained)
            averages = {name: value for name, value in read_parameters(model, folder).items() if name in trained}
        else:
            averages = read_optimizer_shards(folder, model, average.sharding)
    average.load_state_dict(saved | {"averages": averages})


def describe_average(average: WeightAverage | None, *, requested_start_step: int) -> dict[str, Any] | None:
    """Return what a manifest says of an average: its window, its counters and the `ewa_start_step` of the arguments."""
    if average is None:
        return None
    window = {"decay": average.decay, "half_life_ratio": average.half_life_ratio, "every": average.every}
    return {**window, "requested_start_step": requested_start_step, **average.counters()}


def find_moved_best(state: TrainerState, checkpoint: str) -> None:
    """Find the best checkpoint beside the one that is resumed: upstream forgets it if the run was moved; collective."""
    best = run_of(Path(checkpoint)) / f"{PREFIX}{state.best_global_step}"
    found = str(best) if state.best_global_step and best.is_dir() else None
    state.best_model_checkpoint = decide_on_rank0(lambda: state.best_model_checkpoint or found)


def pin_resumed(checkpoint: str, run: Path, pinned_in: str, step: int) -> None:
    """Pin the checkpoint that is resumed where this run would have pinned it and has not; collective."""
    place = Path(pinned_in, f"{PREFIX}{step}")

    def pin() -> None:
        manifests = [Path(folder, MANIFEST_NAME) for folder in (run / place, checkpoint)]
        linked = all(file.is_file() for file in manifests) and manifests[0].samefile(manifests[1])
        if linked or ((run / place).exists() and not verify_checkpoint(run / place)):
            return
        storage.recover_interrupted_save(run)
        storage.link_tree(Path(checkpoint), run / storage.STAGING / place)
        storage.commit(run, place)
        storage.remove_staging(run)

    decide_on_rank0(pin)
