"""Trainings whose writes fail in earnest: a limit on file sizes, a full disk, a folder that may not be written to."""

from __future__ import annotations

import codecs
import os
import resource
import signal
from pathlib import Path
from typing import Any

import attempts
from transformers import TrainerCallback

from hf_radam.checkpoints.runs import list_checkpoints
from hf_radam.trainer.session import CheckpointSaveError

NOBODY = 65534
codecs.lookup("latin1")  # imported now, as a random state needs it and the interpreter may lie where nobody can read


class Fault(TrainerCallback):
    """Makes writing impossible when a step is done, before it is saved.

    Args:
        at: the step.
        kind: ``"limit <bytes>"`` lets no file grow beyond that; ``"fill <bytes>"`` fills the run's file system until
            that is left; ``"read-only"`` takes the right to write from the run's folder.
        run: the run's folder.
    """

    def __init__(self, at: int, kind: str, run: Path):
        self.at, self.kind, self.run = at, kind, run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Upstream saves after this."""
        if state.global_step != self.at:
            return
        if self.kind.startswith("limit"):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.kind.split()[1]), resource.RLIM_INFINITY))
        elif self.kind.startswith("fill"):
            room = os.statvfs(self.run.parent)
            taken = max(0, room.f_bavail * room.f_frsize - int(self.kind.split()[1]))
            (self.run.parent / "filler").write_bytes(bytes(taken))
        else:
            self.run.chmod(0o555)


def train_into_fault(run: Path, options: dict[str, Any], at: int, kind: str, message: Path) -> None:
    """Train until writing fails, and write down what the trainer says then. Without special rights."""
    descriptor = os.open(message, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if os.geteuid() == 0:
        os.chown(run, NOBODY, NOBODY)
        for name in ("log", "run.saved"):
            run.with_name(name).touch()
            os.chown(run.with_name(name), NOBODY, NOBODY)
        os.chown(run.parent, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    trainer = attempts.make_trainer(run, options)
    trainer.add_callback(Fault(at, kind, run))
    try:
        trainer.train(resume_from_checkpoint=bool(list_checkpoints(run)) or None)
    except CheckpointSaveError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.write(descriptor, str(error).encode())
