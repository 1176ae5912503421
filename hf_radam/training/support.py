"""Refuse, when a trainer is made, set-ups in which the weights evaluated or saved would not be the right ones."""

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer

from hf_radam.checkpoints.peft import check_adapter, is_peft
from hf_radam.names import OPTIMIZERS, OptimizerName, SchedulerName
from hf_radam.optim import RAdamScheduleFree
from hf_radam.optim.radam import low_precision
from hf_radam.schedules import Schedule
from hf_radam.training.backends import check_backend
from hf_radam.training.collected import is_of_trl, keeps_metrics
from hf_radam.training_args import check_combinations


def given_optimizer_class(trainer: Any) -> type | None:
    """Class of the optimizer that was handed to the trainer, as an instance or as a class; else None."""
    if trainer.optimizer is not None:
        optimizer = trainer.optimizer
        return type(optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer)
    given = trainer.optimizer_cls_and_kwargs
    return given[0] if given is not None and isinstance(given[0], type) else None


def is_schedule_free(trainer: Any) -> bool:
    """Whether our schedule-free optimizer trains, or will, whichever way it was asked for."""
    given = given_optimizer_class(trainer)
    return trainer.args.optim == "radam_schedulefree" if given is None else issubclass(given, RAdamScheduleFree)


def check_supported(trainer: Any) -> None:
    """Raise `ValueError` for a combination of trainer, model, optimizer and back-end that is not supported."""
    _check_given_optimizer(trainer)
    args, schedule_free = trainer.args, is_schedule_free(trainer)
    if schedule_free:
        if not trainer.is_deepspeed_enabled:  # which has float32 master weights
            _check_precision(trainer)
        check_combinations(args)
    if args.uses_hf_radam or schedule_free:
        check_backend(trainer)
        if getattr(trainer.model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "An adapter that was put in with model.add_adapter() cannot be resumed by Trainer: use "
                "peft.get_peft_model."
            )
    own_weights = args.ewa or schedule_free or (args.uses_hf_radam and args.load_best_model_at_end)
    if own_weights and getattr(args, "use_vllm", False):  # TRL's GRPOTrainer and RLOOTrainer have it
        raise ValueError(
            "use_vllm with averaged weights: after an evaluation vLLM would go on generating with those, not with the "
            "weights that train. Leave use_vllm out."
        )
    if args.ewa_eval_raw and is_of_trl(trainer) and not keeps_metrics(trainer):
        raise ValueError(
            f"ewa_eval_raw with {type(trainer).__name__}: what this trainer of TRL measures of the training weights "
            "cannot be told from what it measures of the average. Leave ewa_eval_raw out."
        )
    if own_weights and is_peft(trainer.model):
        check_adapter(trainer.model)


def _check_precision(trainer: Any) -> None:
    """Refuse parameters in whose dtype the schedule-free optimizer would lose its updates, before any data is read."""
    for param in low_precision([p for p in trainer.model.parameters() if p.requires_grad]):
        raise ValueError(
            f"The model has {param.dtype} parameters, in which radam_schedulefree would lose every small update: keep "
            "float32 parameters and train with bf16=True (autocast) instead."
        )


def _check_given_optimizer(trainer: Any) -> None:
    """Check an optimizer or schedule handed to the trainer against the flags that ask for another."""
    args = trainer.args
    optim, schedule = OptimizerName(args.optim).value, SchedulerName(args.lr_scheduler_type).value
    given = given_optimizer_class(trainer)
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
    if trainer.lr_scheduler is not None and schedule in Schedule.registered():
        raise ValueError(f"lr_scheduler_type={schedule} and a schedule given to the trainer: drop one.")
