"""Training processes that may be killed at any moment, forked from one that has imported everything already.

Each is a process of its own, begun in milliseconds by the fork server of `multiprocessing`, and does what a user's
script does: make the model, the arguments and the trainer, and train.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from processes import harness
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from hf_radam import RAdamTrainer
from hf_radam.checkpoints.runs import list_checkpoints

COMMON = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
SCENARIOS: dict[str, dict[str, Any]] = {
    # keeps _pre_decay/checkpoint-7; steps 8 and 9 straddle the end of a round through the data
    "wsd+ewa": tiny.METHODS["wsd"]
    | {"decay_steps": 5, "ewa": True, "ewa_every": 3, "gradient_accumulation_steps": 2}
    | COMMON,
    "ewa, best": tiny.METHODS["ewa"]
    | COMMON
    | {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
    "schedule_free+ewa": tiny.METHODS["schedule_free_ewa"] | COMMON | {"eval_strategy": "steps", "eval_steps": 4},
    # keeps _budgets/checkpoint-7, which is no multiple of save_steps, and _budgets/checkpoint-12
    "wsd_s": tiny.METHODS["wsd_s"]
    | COMMON
    | {"budgets": [7], "save_steps": 2, "gradient_accumulation_steps": 2, "warmup_steps": 2},
}
"""Trainings of 12 steps, all with dropout, two with gradient accumulation, two with evaluation."""
PINS = {"wsd+ewa": [("_pre_decay", 7)], "wsd_s": [("_budgets", 7), ("_budgets", 12)]}


def finish(target: Callable[..., None], *args: Any, log: Path) -> None:
    """Run `target(*args)` in a process of its own to its end, which must be a good one; what it says goes to a file."""
    process = harness.context().Process(target=_logged, args=(target, args, log))
    process.start()
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}\n{log.read_text(errors='replace')[-3000:]}"


def _logged(target: Callable[..., None], args: tuple[Any, ...], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    drop_shared_locks()
    target(*args)


def drop_shared_locks() -> None:
    """Give this process a lock of tqdm's of its own: nobody takes the shared one back from a killed process."""
    logging.disable_progress_bar()
    tqdm.set_lock(threading.RLock())


class Diary(TrainerCallback):
    """Writes down every step whose checkpoint the trainer says is saved."""

    def __init__(self, file: Path):
        self.file = file

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One line, which outlives the process."""
        with self.file.open("a") as stream:
            stream.write(f"{state.global_step}\n")


def make_trainer(run: Path, options: dict[str, Any]) -> RAdamTrainer:
    """The trainer of a run: as `tiny.trainer`, with a diary beside the run's folder."""
    trainer = tiny.trainer(run, **options)
    trainer.add_callback(Diary(diary(run)))
    return trainer


def diary(run: Path) -> Path:
    """The file with the steps that were said to be saved."""
    return run.with_name(run.name + ".saved")


def train(run: Path, options: dict[str, Any], result: Path) -> None:
    """Train to the end, from the newest checkpoint if there is one, and write the outcome into a file."""
    torch.save(train_until_killed(run, options), result)


def train_until_killed(
    run: Path, options: dict[str, Any], resume: str | None = None, seconds: float = 0.0, rank: int = -1
) -> dict[str, Any]:
    """Train to the end: from the checkpoint named, else from the newest if there is one, else from the beginning.

    After so many seconds the kernel ends this process, if it is of that rank or the rank is -1, and not done before;
    nothing in Python takes part in it. With 0 it does not.
    """
    if rank in (-1, int(os.environ.get("RANK", "0"))):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    drop_shared_locks()
    trainer = make_trainer(run, options)
    trainer.train(resume_from_checkpoint=resume or (bool(list_checkpoints(run)) or None))
    signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome(trainer)


def outcome(trainer: RAdamTrainer) -> dict[str, Any]:
    """Everything that a run ends with on this rank and that its twin must end with, too."""
    average = trainer.average
    return on_this_rank(
        {
            "weights": tiny.parameters(trainer.model),
            "average": None if average is None else (average.counters(), average.averaged_state_dict()),
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": trainer.lr_scheduler.state_dict(),
            "steps": trainer.state.global_step,
            "losses": {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e},
            "best": (trainer.state.best_metric, trainer.state.best_global_step),
        }
    )


def on_this_rank(value: Any) -> Any:
    """The same with this rank's part of every sharded tensor."""
    if isinstance(value, DTensor):
        return value.to_local().clone()
    if isinstance(value, dict):
        return {key: on_this_rank(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_this_rank(inner) for inner in value)
    return value


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of what is not the same in two nested outcomes: tensors bit for bit, everything else by `==`."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [found for i in range(len(a)) for found in differences(a[i], b[i], f"{name}/{i}")]
    return [] if type(a) is type(b) and a == b else [name]
