"""Let a process die before each of its operations on files, one after another.

The interpreter's audit events tell of every operation before it happens: opening for writing (to flush a file, too),
making and removing folders and files, links, renames. Forked children do the same work in copies of a folder, and the
n-th child dies before its n-th operation, until one comes through. In a row of operations of one kind, such as a link
for every file of a checkpoint, only the first two count: none is done, some are, and (the next operation) all.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attempts
import tiny
import torch

from hf_radam import RAdamTrainer
from hf_radam.checkpoints.runs import list_checkpoints

DIED = 9
OPERATIONS = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die_before_operation(number: int, note: Path) -> None:
    """End this process at once before its operation of that number, and note down which that is."""
    counter, row = itertools.count(1), [""]
    note.touch()
    descriptor = os.open(note, os.O_WRONLY)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        there_already = event == "os.mkdir" and os.path.isdir(args[0])
        if not (writes or event in OPERATIONS) or there_already:
            return
        row[:] = [*row, event] if event == row[-1] else [event]
        if len(row) <= 2 and next(counter) == number:
            os.write(descriptor, f"{event} {args[0]}".encode())
            os._exit(DIED)

    sys.addaudithook(hook)


def die_at_every_operation(source: Path, copies: Path, work: Callable[[Path], None]) -> None:
    """Leave `copies/<n>/run`, the copy of `source` in which `work` died before its n-th operation, for every n.

    `copies/<n>/died` says before which; it is empty for the last, which came through.
    """
    for number in itertools.count(1):
        copy = copies / str(number) / "run"
        shutil.copytree(source, copy)
        child = os.fork()
        if child == 0:
            try:
                die_before_operation(number, copy.with_name("died"))
                work(copy)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        assert code == DIED, f"exit code {code} at operation {number}"


class ForkingTrainer(RAdamTrainer):
    """Before the save after one step it forks children that die in the middle of that save; it saves and trains on."""

    die_at: int
    copies: Path
    saved_already: bool
    """Whether the checkpoint is there when they begin, so that they save over it."""

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step != self.die_at:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        run, due = Path(self.args.output_dir), self.control.should_save
        if self.saved_already:
            super()._maybe_log_save_evaluate(*args, **kwargs)

        def save(copy: Path) -> None:
            self.control.should_save = due
            self.args.output_dir, self._session.run_dir = str(copy), copy
            super(ForkingTrainer, self)._maybe_log_save_evaluate(*args, **kwargs)

        die_at_every_operation(run, self.copies, save)
        if not self.saved_already:
            super()._maybe_log_save_evaluate(*args, **kwargs)


def train_forking(folder: Path, options: dict[str, Any], die_at: int, saved_already: bool) -> None:
    """Train in `folder/run` to the end, and leave `folder/outcome` and the copies of `ForkingTrainer`."""
    trainer = ForkingTrainer(
        tiny.llama(), tiny.arguments(folder / "run", **options), train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL
    )
    trainer.die_at, trainer.copies, trainer.saved_already = die_at, folder / "copies", saved_already
    trainer.train()
    torch.save(attempts.outcome(trainer), folder / "outcome")


def resume_forking(folder: Path, options: dict[str, Any], steps: set[int]) -> None:
    """Train as `train_forking` does, keep the checkpoints of some steps, none pinned, and have every resume die."""
    run = folder / "run"  # trained here, so that the children begin with everything loaded
    torch.save(attempts.train_until_killed(run, options | {"save_total_limit": None}), folder / "outcome")
    for place in list_checkpoints(run):
        if place.pinned_in or place.step not in steps:
            shutil.rmtree(place.path)
    resume = partial(attempts.train_until_killed, options=options | {"save_strategy": "no"})
    die_at_every_operation(run, folder / "copies", resume)
