"""Trainings of several processes, one of which may die or fail: after a step, or at a chosen operation on files."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import attempts
import crash_points
import tiny
import torch.distributed as dist
from processes import harness
from transformers import TrainerCallback

from hf_radam.checkpoints.runs import list_checkpoints

SCENARIOS = {
    # keeps _pre_decay/checkpoint-4
    "wsd+ewa": {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": 2, "ewa": True, "ewa_every": 2},
    "schedule_free+ewa": tiny.METHODS["schedule_free_ewa"] | {"gradient_accumulation_steps": 2},
}
COMMON = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


class Begins(TrainerCallback):
    """Notes the step that training resumes from."""

    at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the checkpoint was loaded."""
        self.at = state.global_step


class Dies(TrainerCallback):
    """Ends one process with a signal that it cannot catch, or has its writes fail.

    Args:
        rank: which one.
        step: after which step.
        where: ``"in training"`` at once; ``"limit 5000"`` in the middle of the next file that grows beyond so many
            bytes, which ``"fails 5000"`` has raise instead; ``"before open model.safetensors"`` before the next
            operation on files of which an audit event of the interpreter has these words in its name and path.
    """

    def __init__(self, rank: int, step: int, where: str):
        self.rank, self.step, self.where = rank, step, where

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The save comes after this."""
        if state.global_step != self.step or args.process_index != self.rank:
            return
        if self.where == "in training":
            kill_myself()
        if self.where.startswith(("limit", "fails")):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.where.startswith("limit") else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.where.split()[1]), resource.RLIM_INFINITY))
            return
        _, event, path = self.where.split()

        def hook(happens: str, arguments: tuple[Any, ...]) -> None:
            if happens == event and any(path in str(argument) for argument in arguments[:2]):
                if event != "open" or (isinstance(arguments[2], int) and arguments[2] & crash_points.WRITING):
                    kill_myself()

        sys.addaudithook(hook)


def kill_myself() -> None:
    """As the kernel does where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def train(run: Path, backend: str, options: dict[str, Any], dies: tuple[int, int, str] | None = None) -> dict:
    """Train to the end, from the newest checkpoint if there is one; returns what this rank ended with."""
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
    trainer, begins = tiny.trainer(run, **COMMON | sizes | options | harness.arguments(backend)), Begins()
    trainer.add_callback(begins)
    if dies is not None:
        trainer.add_callback(Dies(*dies))
    try:
        trainer.train(resume_from_checkpoint=bool(list_checkpoints(run)) or None)
    finally:  # so that what is raised can be written down
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert harness.is_really(trainer, backend)
    dist.barrier()
    return {"began at": begins.at} | attempts.outcome(trainer)
