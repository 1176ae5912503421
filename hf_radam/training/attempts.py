"""Begin training anew after an out-of-memory error, as if the attempts that failed had never been made.

With `auto_find_batch_size` upstream starts its training loop again with a smaller batch, but with the weights, the
optimizer and the random state that the failed attempt left behind. Here everything that an attempt changes is kept
before the first one and put back before each further one, so that the run which succeeds is bit for bit the run that
was started with its batch size. Each `_keep_*` returns a function that puts its part back, any number of times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerControl
from transformers.utils import logging

from hf_radam.checkpoints import storage
from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.checkpoints.runs import list_checkpoints
from hf_radam.random_state import keep_random_state

logger = logging.get_logger(__name__)

OF_THE_TRAINER = (
    *("optimizer", "lr_scheduler", "_created_lr_scheduler", "control", "current_flos"),
    *("average", "_evaluation", "_best_model_loaded"),
)
"""Attributes of the trainer that an attempt binds anew; upstream itself resets the others."""


class BeforeTheFirstAttempt:
    """A trainer's state before it tries to train. Weights and optimizer state are copied to the CPU.

    A callback's state is what it declares as an `ExportableState` (upstream's `EarlyStoppingCallback` does); one that
    counts otherwise should begin in `on_train_begin`, which each attempt calls. Data that draws from a generator of its
    own is not put back.

    Args:
        trainer: the trainer, its model loaded with the weights that training begins with.
        model: its model without wrappers.
        checkpoint: the folder that training resumes from, or None.
        folder: where this run writes its checkpoints.
    """

    def __init__(self, trainer: Any, model: nn.Module, *, checkpoint: str | None, folder: str):
        self._put_back = [
            _keep_checkpoints(Path(folder), checkpoint),
            _keep_attributes(trainer, OF_THE_TRAINER),
            _keep_weights(model),
            _keep_schedule(trainer.lr_scheduler),
            _keep_optimizer(trainer.optimizer),  # after the schedule, which may write a learning rate into it
            _keep_loss_scale(trainer.accelerator.scaler),
            _keep_callbacks(trainer.callback_handler, trainer.control),
            keep_random_state(),
        ]
        self._compiled = trainer.args.torch_compile

    def put_back(self) -> None:
        """Make the trainer what it was, and remove the checkpoints that have been written since.

        Raises:
            CheckpointError: if the checkpoint to resume from has been rotated away since.
            RuntimeError: if a parameter that was frozen has been made trainable since.
        """
        for put_back in self._put_back:
            put_back()
        if self._compiled:
            torch.compiler.reset()  # or a second batch size gets kernels for any size, which round otherwise


def _keep_checkpoints(folder: Path, checkpoint: str | None) -> Callable[[], None]:
    before = {place.path for place in list_checkpoints(folder)}

    def put_back() -> None:
        if checkpoint is not None and not Path(checkpoint).is_dir():
            raise CheckpointError(
                f"{checkpoint} was removed (save_total_limit) by an attempt that then ran out of memory, so training "
                "cannot begin there again: resume from another checkpoint with a smaller per_device_train_batch_size."
            )
        for written in [place.path for place in list_checkpoints(folder) if place.path not in before]:
            logger.warning(f"Removing {written}, which an attempt has written that ran out of memory.")
            storage.remove(folder, written)

    return put_back


def _keep_attributes(owner: Any, names: tuple[str, ...]) -> Callable[[], None]:
    values = {name: getattr(owner, name) for name in names}
    return lambda: vars(owner).update(values)


def _keep_weights(model: nn.Module) -> Callable[[], None]:
    """Keep trainable parameters and buffers; frozen parameters may be many, and no attempt changes them.

    Every module's own attributes too, by reference: autocast's `forward`, and accelerate's mark of a prepared model,
    with which it would leave a model to be compiled as it is in every further attempt.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    values = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in [*trainable, *model.buffers()]]
    modules = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]

    def put_back() -> None:
        thawed = [name for name, p in frozen if p.requires_grad]
        if thawed:
            raise RuntimeError(
                f"{thawed[0]} was frozen before training and trained in the attempt that ran out of memory: with "
                "auto_find_batch_size, what trains must be so from the beginning."
            )
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for parameter in trainable:
            parameter.requires_grad_(True)
            parameter.grad = None
        for module, attributes, buffers in modules:  # some models bind their buffers anew
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)

    return put_back


def _keep_schedule(schedule: Any) -> Callable[[], None]:
    if schedule is None:
        return lambda: None
    state = copy.deepcopy(schedule.state_dict())
    return lambda: schedule.load_state_dict(copy.deepcopy(state))


def _keep_optimizer(optimizer: Any) -> Callable[[], None]:
    """Keep an optimizer that exists already, given by the user or left by an earlier `train()`."""
    if optimizer is None:
        return lambda: None
    wrapper = optimizer if isinstance(optimizer, AcceleratedOptimizer) else None
    bare = optimizer if wrapper is None else wrapper.optimizer
    attributes = [(owner, dict(vars(owner))) for owner in (wrapper, bare) if owner is not None]
    state = [(key, _kept(values)) for key, values in bare.state.items()]
    groups = [
        (list(group["params"]), _kept({name: option for name, option in group.items() if name != "params"}))
        for group in bare.param_groups
    ]

    def put_back() -> None:
        for owner, values in attributes:
            vars(owner).clear()
            vars(owner).update(values)
        bare.state.clear()
        bare.state.update({key: values() for key, values in state})
        bare.param_groups[:] = [{"params": list(params)} | options() for params, options in groups]

    return put_back


def _kept(values: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """A copy of a dict with its tensors on the CPU; called, a copy of that with the tensors where they were."""
    tensors = {k: (v.device, v.detach().to("cpu", copy=True)) for k, v in values.items() if isinstance(v, Tensor)}
    others = copy.deepcopy({k: v for k, v in values.items() if k not in tensors})
    order = list(values)

    def again() -> dict[str, Any]:
        moved = {k: value.to(device, copy=True) for k, (device, value) in tensors.items()} | copy.deepcopy(others)
        return {k: moved[k] for k in order}

    return again


def _keep_loss_scale(scaler: torch.amp.GradScaler | None) -> Callable[[], None]:
    """Keep the whole of fp16's scaler: it also remembers how far an optimizer's step had come."""
    if scaler is None:
        return lambda: None
    attributes = copy.deepcopy(vars(scaler))
    return lambda: vars(scaler).update(copy.deepcopy(attributes))


def _keep_callbacks(handler: Any, control: TrainerControl) -> Callable[[], None]:
    callbacks, switches = list(handler.callbacks), dict(vars(control))
    stateful = [one for one in callbacks if isinstance(one, ExportableState)]
    states = [copy.deepcopy(one.state()["attributes"]) for one in stateful]

    def put_back() -> None:
        handler.callbacks[:] = callbacks
        vars(control).update(switches)
        for one, attributes in zip(stateful, states, strict=True):
            vars(one).update(copy.deepcopy(attributes))

    return put_back
