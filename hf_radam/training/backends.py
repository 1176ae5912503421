"""What FSDP2 and DeepSpeed need from a trainer: refuse what would be wrong, set what would be missed."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from hf_radam.batch_norm import batch_norm_modules
from hf_radam.checkpoints.peft import is_peft
from hf_radam.names import OPTIMIZERS, OptimizerName
from hf_radam.optim import RAdamScheduleFree
from hf_radam.training.launched import check_launched

logger = logging.get_logger(__name__)


def is_sharded(trainer: Any) -> bool:
    """Whether a process holds only a part of the model, or of what trains it."""
    # The last is not in every transformers from 5.17 on: there, a model is not sharded at load time either.
    at_load = getattr(trainer, "is_distributed_loading_by_transformers", False)
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or at_load)


def is_sharded_in_forward(trainer: Any) -> bool:
    """Whether a process holds only a part of the model itself: under ZeRO-1 and 2 it holds all of it."""
    if trainer.is_deepspeed_enabled:
        return bool(trainer.deepspeed.zero_optimization_stage() == 3)
    return is_sharded(trainer)


def gathers_weights(trainer: Any) -> bool:
    """Whether a checkpoint holds whole weights: the back-end may be told to keep them sharded."""
    if trainer.is_fsdp_enabled:
        return "FULL" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    if trainer.is_deepspeed_enabled and trainer.deepspeed.zero_optimization_stage() == 3:
        return bool(trainer.deepspeed.zero_gather_16bit_weights_on_model_save())
    return True


def check_backend(trainer: Any) -> None:
    """Refuse what FSDP or DeepSpeed would make wrong without a word, and set what they would miss.

    Raises:
        ValueError: with the way out.
    """
    check_launched(trainer.args)
    limit_collectives(trainer.args.ddp_timeout)
    if not is_sharded(trainer):
        return
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer)
    if trainer.is_deepspeed_enabled:
        _check_deepspeed(trainer)
    if is_peft(trainer.model):
        raise ValueError(
            "A PEFT model under FSDP or DeepSpeed is not supported: an adapter fits every process, so train it under "
            "DDP."
        )
    if batch_norm_modules(trainer.model) and trainer.args.recalibrate_batch_norm_batches:
        raise ValueError(
            "The model has BatchNorm layers, whose statistics are not taken again under FSDP or DeepSpeed: set "
            "recalibrate_batch_norm_batches=0 to evaluate with those of the training weights, or use DDP."
        )


def _check_fsdp(trainer: Any) -> None:
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version} is not supported: FSDP1 is deprecated, and its sharded checkpoints "
            'lose the optimizer\'s state. Set fsdp_version: 2 (in fsdp_config: "version": 2).'
        )
    if "LOCAL" in str(plugin.state_dict_type):
        raise ValueError("LOCAL_STATE_DICT cannot be resumed: set FULL_STATE_DICT or SHARDED_STATE_DICT.")
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype in (torch.bfloat16, torch.float16):
        # The root would round the losses to three digits, and gradients would be summed in 16 bits.
        logger.info("FSDP2 leaves losses and sums of gradients in float32; layers compute in %s.", policy.param_dtype)
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def _check_deepspeed(trainer: Any) -> None:
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    optim = OptimizerName(trainer.args.optim).value
    ours = optim in OPTIMIZERS
    for section, asked in (("optimizer", f"optim={optim}"), ("scheduler", "the schedule")):
        if section in config:
            raise ValueError(
                f"The DeepSpeed configuration has a section {section!r}, which would take the place of {asked}: "
                "remove that section."
            )
    zero = config.get("zero_optimization", {})
    if not zero.get("stage", 0):
        raise ValueError(
            "DeepSpeed without ZeRO is not supported: set zero_optimization.stage to 1, 2 or 3, or use DDP."
        )
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section, {}).get("device") == "nvme":
            raise ValueError(f"{section} to nvme is not supported: the weights would not be at hand. Use device: cpu.")
    for name in ("zero_hpz_partition_size", "mics_shard_size"):
        if zero.get(name, 1) > 1:
            raise ValueError(f"{name}={zero[name]} is not supported: remove it from the DeepSpeed configuration.")
    for name in ("round_robin_gradients", "zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(name, False):
            # The first has DeepSpeed keep float32 weights in an order that its own `safe_get_full_fp32_param` misses
            # (0.19.8); the others have it gather other weights than it keeps.
            raise ValueError(f"{name}=true is not supported: remove it from the DeepSpeed configuration.")
    if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise ValueError("tensor_parallel.autotp_size above 1 is not supported: remove it from the configuration.")
    if ours and zero.get("offload_optimizer", {}).get("device", "none") != "none":
        if config.get("zero_force_ds_cpu_optimizer", False):
            raise ValueError(
                "zero_force_ds_cpu_optimizer=true would put DeepSpeed's CPU Adam in the place of "
                f"optim={optim}: remove it from the configuration, or set it to false."
            )
        config["zero_force_ds_cpu_optimizer"] = False  # absent means true


def check_evaluable(trainer: Any) -> None:
    """Refuse to evaluate before training where a model can only be prepared together with its optimizer.

    Raises:
        ValueError: under FSDP2, ZeRO-1 and ZeRO-2; with the way out.
    """
    sharded = any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    plugin = trainer.accelerator.state.deepspeed_plugin
    of_zero = trainer.is_deepspeed_enabled and trainer.deepspeed is None and plugin.zero_stage < 3
    if of_zero or (trainer.is_fsdp_enabled and not sharded):
        raise ValueError(
            f"evaluate() before train() is not possible under {'ZeRO-1 and 2' if of_zero else 'FSDP2'}, where a model "
            "is prepared together with its optimizer: train first (--eval_on_start true evaluates before the first "
            "update), or evaluate in one process or under DDP."
        )


def forget_evaluation(trainer: Any) -> None:
    """Let accelerate wrap a model for DDP that was evaluated before training; refuse one that DeepSpeed has prepared.

    Evaluating prepares it without a wrapper, and accelerate returns what it has prepared as it is: each process would
    then train alone (seen with transformers 5.23 and accelerate 1.15).

    Raises:
        ValueError: if DeepSpeed's engine around the model is of an earlier `train()` or `evaluate()`.
    """
    if trainer.is_deepspeed_enabled and trainer.model_wrapped is not trainer.model:
        raise ValueError(
            "DeepSpeed has prepared this model for an earlier train() or evaluate(), and cannot train it anew: make a "
            "new trainer and model, and go on with resume_from_checkpoint."
        )
    if trainer.args.world_size > 1 and trainer.model_wrapped is trainer.model and not is_sharded(trainer):
        trainer.accelerator._models = [model for model in trainer.accelerator._models if model is not trainer.model]
        trainer.model._is_accelerate_prepared = False


def check_prepared(trainer: Any) -> None:
    """Refuse to train with another optimizer than the one asked for, or without DDP; tell the optimizer of ZeRO-3.

    Raises:
        ValueError: with the way out.
    """
    optimizer = trainer._bare_optimizer
    name = OptimizerName(trainer.args.optim).value
    if name in OPTIMIZERS and not isinstance(optimizer, OPTIMIZERS[name][0]):
        raise ValueError(
            f"optim={name}, but {type(optimizer).__module__}.{type(optimizer).__name__} took its place when the model "
            "was prepared. With DeepSpeed, set zero_force_ds_cpu_optimizer to false."
        )
    alone = trainer.args.world_size > 1 and not is_sharded(trainer)
    if alone and not isinstance(trainer.model_wrapped, DistributedDataParallel):
        raise ValueError(
            "The model was not wrapped for DDP, so each process would train alone: make a new trainer with a model "
            "that nothing has prepared."
        )
    limit_collectives(trainer.args.ddp_timeout)  # DeepSpeed has made groups of its own by now
    if isinstance(optimizer, RAdamScheduleFree):
        # ZeRO-3 calls the optimizer once for each sub-group of the parameters.
        optimizer.steps_by_parts = any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters())


def limit_collectives(seconds: float) -> None:
    """Have every collective operation end with an error if it waits longer: of all groups there are by now.

    Upstream passes `ddp_timeout` on to GPUs only, and DeepSpeed makes groups of its own. Torch has no public function
    for it (seen in torch 2.13).
    """
    if dist.is_available() and dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
