"""Refuse, when a trainer is made, set-ups in which the weights evaluated or saved would not be the right ones."""

from __future__ import annotations

from typing import Any

from transformers.utils import is_peft_available

from hf_radam.names import OPTIMIZERS, OUR_SCHEDULES, OptimizerName, SchedulerName
from hf_radam.optim import RAdamScheduleFree
from hf_radam.optim.checks import low_precision


def check_supported(trainer: Any) -> None:
    """Raise `ValueError` for a combination of trainer, model, optimizer and back-end that is not supported."""
    _check_given_optimizer(trainer)
    _check_precision(trainer)
    args = trainer.args
    if args.uses_hf_radam:
        # Not in every transformers from 5.17 on: there, a model is not sharded at load time either.
        sharded_at_load = getattr(trainer, "is_distributed_loading_by_transformers", False)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or sharded_at_load:
            raise ValueError(
                "FSDP, DeepSpeed and models sharded at load time are not supported by this version of hf_radam: the "
                "average and x would not be those of the whole model. Use one process or DDP."
            )
    averaging = args.ewa or args.optim == "radam_schedulefree" or isinstance(trainer.optimizer, RAdamScheduleFree)
    if averaging and _is_peft(trainer.model):
        raise ValueError(
            "PEFT models are not supported with ewa or radam_schedulefree by this version of hf_radam: their averaged "
            "adapter would not be saved. Use radam with wsd or wsd_s, or merge the adapter first."
        )


def _check_precision(trainer: Any) -> None:
    """Refuse parameters in whose dtype the schedule-free optimizer would lose its updates, before any data is read."""
    if trainer.args.optim != "radam_schedulefree" or trainer.model is None:
        return
    for param in low_precision([p for p in trainer.model.parameters() if p.requires_grad]):
        raise ValueError(
            f"The model has {param.dtype} parameters, in which radam_schedulefree would lose every small update: keep "
            "float32 parameters and train with bf16=True (autocast) instead."
        )


def _check_given_optimizer(trainer: Any) -> None:
    """Check an optimizer or schedule handed to the trainer against the flags that ask for another."""
    args, optimizer = trainer.args, trainer.optimizer
    optim, schedule = OptimizerName(args.optim).value, SchedulerName(args.lr_scheduler_type).value
    given = type(optimizer) if optimizer is not None else (trainer.optimizer_cls_and_kwargs or (None,))[0]
    if given is not None:
        if given.__module__.partition(".")[0] == "schedulefree":
            raise ValueError(
                f"{given.__module__}.{given.__name__} would be evaluated and saved at its gradient point: use "
                "hf_radam.RAdamScheduleFree (it loads the same state), or optim='radam_schedulefree'."
            )
        if optim in OPTIMIZERS and not issubclass(given, OPTIMIZERS[optim][0]):
            raise ValueError(
                f"optim={optim} and an optimizer of class {given.__name__} given to the trainer: drop one."
            )
    if trainer.lr_scheduler is not None and schedule in OUR_SCHEDULES:
        raise ValueError(f"lr_scheduler_type={schedule} and a schedule given to the trainer: drop one.")


def _is_peft(model: Any) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)
