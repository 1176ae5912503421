"""Refuse combinations of trainer, model, optimizer and back-end that are not supported, and unwrap what back-ends wrap.

Each check exists because the combination would otherwise evaluate, save or train the wrong weights without an error.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, str_to_bool
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from transformers.trainer_utils import HPSearchBackend
from transformers.utils import logging

from hf_radam.batch_norm import batch_norm_modules
from hf_radam.checkpoints.peft import check_adapter, is_peft
from hf_radam.names import CONSTANT_SCHEDULES, OPTIMIZERS, OptimizerName, SchedulerName
from hf_radam.optim import RAdam, RAdamScheduleFree
from hf_radam.optim.radam import low_precision
from hf_radam.schedules import Schedule
from hf_radam.trainer import evaluation
from hf_radam.training_args import RAdamTrainingArguments, check_combinations

logger = logging.get_logger(__name__)

DEFAULT_DDP_TIMEOUT = TrainingArguments.__dataclass_fields__["ddp_timeout"].default
ZERO_REFUSED = (
    # DeepSpeed 0.19 then keeps float32 weights in an order that its own `safe_get_full_fp32_param` does not follow.
    "round_robin_gradients",
    # The forward pass then gathers other weights than those that are kept.
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_hpz_partition_size",
    "mics_shard_size",
)
"""Options of ZeRO that are refused unless they are off: false, or a size of -1, 0 or 1."""


# ---- Optimizers ----


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of accelerate and DeepSpeed (there are several); None stays None."""
    while isinstance(optimizer, AcceleratedOptimizer) or type(optimizer).__module__.startswith("deepspeed.runtime"):
        optimizer = optimizer.optimizer
    return optimizer


def given_optimizer_class(trainer: Any) -> type | None:
    """Return the class of the optimizer that was passed to the trainer, as an instance or a class, or that trains."""
    if trainer.optimizer is not None:
        return type(unwrap_optimizer(trainer.optimizer))
    given = trainer.optimizer_cls_and_kwargs
    return given[0] if given is not None and isinstance(given[0], type) else None


def is_schedule_free(trainer: Any) -> bool:
    """Return whether `RAdamScheduleFree` trains, or will, whichever way it was asked for."""
    given = given_optimizer_class(trainer)
    return trainer.args.optim == "radam_schedulefree" if given is None else issubclass(given, RAdamScheduleFree)


def optimizer_name(trainer: Any) -> str:
    """Return the name of the optimizer for manifest and model card: of `--optim`, or the class that was passed."""
    passed = trainer._passed_optimizer
    if passed is None:
        return str(OptimizerName(trainer.args.optim).value)
    own = next((name for name, (kind, _) in OPTIMIZERS.items() if issubclass(passed, kind)), None)
    return own or f"{passed.__module__}.{passed.__qualname__}"


def check_schedule_of_optimizer(trainer: Any) -> None:
    """Raise `ValueError` if a schedule-free optimizer would train under a decaying schedule."""
    name = SchedulerName(trainer.args.lr_scheduler_type).value
    if is_schedule_free(trainer) and name not in CONSTANT_SCHEDULES:
        raise ValueError(
            f"lr_scheduler_type={name} with RAdamScheduleFree: schedule-free averaging needs a constant learning rate. "
            "Use constant or constant_with_warmup."
        )
    if is_schedule_free(trainer) and not trainer._checked:
        raise ValueError("An overridden create_optimizer made a RAdamScheduleFree. Use --optim radam_schedulefree.")


# ---- When a trainer is made ----


def check_search(trainer: Any, trial: Any) -> None:
    """Raise `ValueError` for a trial of Ray Tune, which saves checkpoints of its own without the evaluation weights."""
    if trial is not None and trainer.hp_search_backend == HPSearchBackend.RAY:
        raise ValueError('hyperparameter_search with backend="ray" is not supported. Use backend="optuna".')


def check_arguments(trainer: Any) -> None:
    """Raise `TypeError` if the trainer's arguments are not a `RAdamTrainingArguments`."""
    if not isinstance(trainer.args, RAdamTrainingArguments):
        kind = type(trainer.args).__name__
        derived = "" if kind == "TrainingArguments" else f", or a dataclass derived from it and {kind}"
        raise TypeError(
            f"{type(trainer).__name__} has arguments of class {kind}. Make them with RAdamTrainingArguments, which has "
            f"every field of TrainingArguments{derived}."
        )


def check_argument_class(trainer: Any, error: TypeError | AttributeError) -> None:
    """Raise a clear `TypeError` where a trainer needs arguments of its own class."""
    of_trl = evaluation.is_trl(trainer) and "unexpected keyword argument" in str(error)
    if of_trl or "'RAdamTrainingArguments' object has no attribute" in str(error):
        raise TypeError(
            f"{type(trainer).__name__} needs arguments of a class of its own. Make them with a dataclass derived from "
            "RAdamTrainingArguments and that class."
        ) from error


def check_supported(trainer: Any) -> None:
    """Raise `ValueError` for a combination of trainer, model, optimizer and back-end that is not supported."""
    _check_given_optimizer(trainer)
    args, schedule_free = trainer.args, is_schedule_free(trainer)
    if schedule_free:
        check_combinations(args)
        if not trainer.is_deepspeed_enabled:  # which keeps float32 weights of its own
            _check_precision(trainer)
    if not (args.uses_hf_radam or schedule_free):
        return
    _check_backend(trainer)
    sharded_at_load = is_sharded(trainer) and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    if sharded_at_load and args.lr_scheduler_type in Schedule.registered():
        raise ValueError("wsd and wsd_s keep the optimizer, which a model sharded at load cannot save. Use FSDP2.")
    if getattr(trainer.model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "Trainer cannot resume an adapter that was added with model.add_adapter(). Use peft.get_peft_model."
        )
    own_weights = args.ewa or schedule_free or args.load_best_model_at_end
    if own_weights and getattr(args, "use_vllm", False):  # TRL's GRPOTrainer and RLOOTrainer
        raise ValueError(
            "use_vllm with averaged weights: after an evaluation vLLM would keep generating with those. Leave it out."
        )
    if own_weights and is_peft(trainer.model):
        check_adapter(trainer.model)


def _check_precision(trainer: Any) -> None:
    dtype = low_precision([p for p in trainer.model.parameters() if p.requires_grad])
    if dtype is not None:
        raise ValueError(
            f"The model has {dtype} parameters, in which radam_schedulefree would lose every small step. "
            "Keep float32 parameters and train with bf16=True (autocast)."
        )


def _check_given_optimizer(trainer: Any) -> None:
    args = trainer.args
    optim, schedule = OptimizerName(args.optim).value, SchedulerName(args.lr_scheduler_type).value
    given = given_optimizer_class(trainer)
    if given is not None and given.__module__.partition(".")[0] == "schedulefree":
        raise ValueError(
            f"{given.__module__}.{given.__name__} would be evaluated and saved at y, its gradient point. Use "
            "hf_radam.RAdamScheduleFree, which loads the same state."
        )
    if given is not None and optim in OPTIMIZERS and not issubclass(given, OPTIMIZERS[optim][0]):
        raise ValueError(f"optim={optim}, but an optimizer of class {given.__name__} was passed. Drop one of them.")
    if trainer.lr_scheduler is not None and schedule in Schedule.registered():
        raise ValueError(f"lr_scheduler_type={schedule}, but a scheduler was passed. Drop one of them.")


# ---- Back-ends ----


def is_sharded(trainer: Any) -> bool:
    """Return whether a rank holds only a part of the model, or of the optimizer's weights."""
    at_load = getattr(trainer, "is_distributed_loading_by_transformers", False)  # remove when transformers >= 5.20
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or at_load)


def is_sharded_in_forward(trainer: Any) -> bool:
    """Return whether a rank holds only a part of the model itself; under ZeRO-1 and 2 it holds all of it."""
    if trainer.is_deepspeed_enabled:
        return bool(trainer.deepspeed.zero_optimization_stage() == 3)
    return is_sharded(trainer)


def gathers_weights(trainer: Any) -> bool:
    """Return whether checkpoints hold full weights; the back-end may be told to keep them sharded."""
    if trainer.is_fsdp_enabled:
        return "FULL" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    if trainer.is_deepspeed_enabled and trainer.deepspeed.zero_optimization_stage() == 3:
        return bool(trainer.deepspeed.zero_gather_16bit_weights_on_model_save())
    return True


def zero_stage(trainer: Any) -> int | None:
    """Return the stage of ZeRO, None without DeepSpeed."""
    return trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None


def _check_backend(trainer: Any) -> None:
    check_launched(trainer.args)
    if not is_sharded(trainer):
        return
    if trainer.is_fsdp_enabled:
        check_fsdp(trainer.accelerator.state.fsdp_plugin)
    if trainer.is_deepspeed_enabled:
        _check_deepspeed(trainer)
    if is_peft(trainer.model):
        raise ValueError("A PEFT model under FSDP or DeepSpeed is not supported. Train it under DDP.")
    if batch_norm_modules(trainer.model) and trainer.args.recalibrate_batch_norm_batches:
        raise ValueError(
            "BatchNorm statistics cannot be recalibrated under FSDP or DeepSpeed. Set recalibrate_batch_norm_batches=0 "
            "to evaluate with those of the training weights, or use DDP."
        )


def check_launched(args: Any) -> None:
    """Refuse FSDP or DeepSpeed on CPUs, where accelerate trains without it and says nothing (seen in 1.15)."""
    asked = {"FSDP": (args.fsdp, "ACCELERATE_USE_FSDP"), "DeepSpeed": (args.deepspeed, "ACCELERATE_USE_DEEPSPEED")}
    state = args.distributed_state
    for name, (argument, variable) in asked.items():
        if state is None or not (argument or str_to_bool(os.environ.get(variable, "false"))):
            continue
        alone = state.num_processes < int(os.environ.get("WORLD_SIZE", "1"))
        if alone or state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
            raise ValueError(
                f"{name} was asked for, but it needs several GPUs, and this process runs on a {args.device.type}: "
                "accelerate would train without it. Use DDP on CPUs: configs/accelerate/ddp.yaml with use_cpu=true."
            )


def check_fsdp(plugin: Any) -> None:
    """Raise `ValueError` for options of accelerate's FSDP plugin that are not supported."""
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version} is not supported: FSDP1 is deprecated, and its sharded checkpoints "
            'lose the optimizer state. Set fsdp_version: 2 (in fsdp_config: "version": 2).'
        )
    if "LOCAL" in str(plugin.state_dict_type):
        raise ValueError("LOCAL_STATE_DICT cannot be resumed. Set FULL_STATE_DICT or SHARDED_STATE_DICT.")
    policy = plugin.mixed_precision_policy
    if policy is None or policy.output_dtype not in (torch.bfloat16, torch.float16):
        return
    if policy.param_dtype == policy.reduce_dtype == policy.output_dtype:
        # What accelerate makes of `bf16=True`. It would round every loss to three digits.
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)
    else:
        logger.warning(f"FSDP2's output_dtype={policy.output_dtype} rounds every loss that is logged to three digits.")


def _check_deepspeed(trainer: Any) -> None:
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(
                f"The DeepSpeed configuration has a section {section!r}, which would replace the trainer's. Remove it."
            )
    zero = config.get("zero_optimization", {})
    if not zero.get("stage", 0):
        raise ValueError("DeepSpeed without ZeRO is not supported. Set zero_optimization.stage to 1, 2 or 3.")
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section, {}).get("device") == "nvme":
            raise ValueError(f"{section} to nvme is not supported. Use device: cpu.")
    for name in ZERO_REFUSED:
        value = zero.get(name, False)
        if value is True or value not in (-1, 0, 1):
            raise ValueError(f"{name}={zero[name]} is not supported. Remove it from the DeepSpeed configuration.")
    if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise ValueError("tensor_parallel.autotp_size above 1 is not supported. Remove it from the configuration.")
    own = issubclass(given_optimizer_class(trainer) or object, (RAdam, RAdamScheduleFree))
    if (own or trainer.args.optim in OPTIMIZERS) and zero.get("offload_optimizer", {}).get("device", "none") != "none":
        if config.get("zero_force_ds_cpu_optimizer", False):
            raise ValueError(
                "zero_force_ds_cpu_optimizer=true would replace the optimizer by DeepSpeed's CPU Adam. Set it to false."
            )
        config["zero_force_ds_cpu_optimizer"] = False  # absent means true


# ---- Before and after the model is prepared ----


def check_evaluable(trainer: Any) -> None:
    """Raise `ValueError` for an evaluation before training under FSDP2, ZeRO-1 or ZeRO-2.

    There a model can only be prepared together with its optimizer.
    """
    sharded = any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    of_zero = trainer.is_deepspeed_enabled and trainer.deepspeed is None and (zero_stage(trainer) or 0) < 3
    if of_zero or (trainer.is_fsdp_enabled and not sharded):
        raise ValueError(
            f"evaluate() before train() is not possible under {'ZeRO-1 and 2' if of_zero else 'FSDP2'}, which prepare "
            "a model together with its optimizer. Set --eval_on_start true, or evaluate in one process or under DDP."
        )


def undo_evaluation_wrapping(trainer: Any) -> None:
    """Let accelerate wrap a model for DDP that was evaluated before training; idempotent.

    Evaluating prepares a model without DDP, and accelerate returns what it has prepared unchanged, so that every rank
    would train alone (seen with transformers 5.24 and accelerate 1.15).

    Raises:
        ValueError: if the model has a DeepSpeed engine of an earlier `train()` or `evaluate()`.
    """
    if trainer.is_deepspeed_enabled and trainer.model_wrapped is not trainer.model:
        raise ValueError(
            "DeepSpeed has prepared this model for an earlier train() or evaluate(). Make a new trainer and model, and "
            "continue with resume_from_checkpoint."
        )
    if trainer.args.world_size > 1 and trainer.model_wrapped is trainer.model and not is_sharded(trainer):
        trainer.accelerator._models = [model for model in trainer.accelerator._models if model is not trainer.model]
        trainer.model._is_accelerate_prepared = False


def check_prepared(trainer: Any, optimizer: Any, model: nn.Module) -> None:
    """Refuse to train with another optimizer than the one asked for, or without DDP; tell the optimizer of ZeRO-3.

    Raises:
        ValueError: with the way out.
    """
    name = OptimizerName(trainer.args.optim).value
    if name in OPTIMIZERS and not isinstance(optimizer, OPTIMIZERS[name][0]):
        raise ValueError(
            f"optim={name} was replaced by {type(optimizer).__module__}.{type(optimizer).__name__} when the model was "
            "prepared. With DeepSpeed, set zero_force_ds_cpu_optimizer to false."
        )
    unsharded = trainer.args.world_size > 1 and not is_sharded(trainer)
    if unsharded and not isinstance(trainer.model_wrapped, DistributedDataParallel):
        raise ValueError(
            "The model was not wrapped for DDP, so every rank would train alone. Make a new trainer with a model that "
            "nothing has prepared."
        )
    if isinstance(optimizer, RAdamScheduleFree):
        # ZeRO-3 calls the optimizer once for each sub-group of the parameters.
        optimizer.steps_by_parts = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if trainer.args.ddp_timeout != DEFAULT_DDP_TIMEOUT and dist.is_available() and dist.is_initialized():
        # Upstream applies ddp_timeout on GPUs only, and DeepSpeed not to its own group. Torch has no public function.
        zero = getattr(trainer.deepspeed, "optimizer", None) if trainer.is_deepspeed_enabled else None
        for group in (dist.group.WORLD, getattr(zero, "dp_process_group", None)):
            if group is not None:
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=trainer.args.ddp_timeout), group)
