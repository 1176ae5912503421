"""The facts about a checkpoint that `hf_radam.inspection.checkpoint` finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WHOLE, DAMAGED, NOT_RESUMABLE, OTHER_FORMAT = "whole", "damaged", "not resumable", "another format"
TRAINING, Y, X = "training weights", "y", "x"


@dataclass(frozen=True)
class FileFacts:
    """One file: its path in the checkpoint, its bytes, what is wrong with it, and whether the manifest knows it."""

    name: str
    size: int | None
    problem: str | None
    in_manifest: bool | None


@dataclass(frozen=True)
class CheckpointFacts:
    """What is known of a checkpoint; None stands for what its files do not tell.

    Attributes:
        path: its folder.
        written_by: hf_radam with its version, or stock Trainer.
        state: `whole`, `damaged`, `not resumable` (whole, but without the optimizer or the schedule), or `another
            format` (of a newer or older hf_radam).
        checked: `checksums`, or `form` where there are none to compare with.
        problems: what is wrong with each bad file, by its path in the checkpoint.
        update: updates done. `max_steps`: updates of the whole run. `schedule_step`: updates the schedule has counted.
        optim, lr_scheduler_type, ewa: the method, as the flags name it.
        schedule: keywords of `wsd` or `wsd_s`. `schedule_words`: any schedule in a line.
        phase: one of those of `hf_radam.inspection.phases`.
        learning_rates: of the next update; several where the parameter groups differ.
        root: which weights lie at the root: `training weights`, or `y` or `x` of a schedule-free optimizer.
        evaluation_folder: the folder with the weights that evaluation uses, ``""`` for the root.
        beside: the folders of weights that lie beside the root.
        averaging: window and counters of the average.
        schedule_free: `train_mode`, `weight_sum` and `k` as a schedule-free optimizer saved them.
        layout: how weights and optimizer are kept, in words. `processes`: how many have written it.
        files: every file.
    """

    path: str
    written_by: str
    state: str
    checked: str
    problems: dict[str, str]
    update: int | None
    max_steps: int | None
    schedule_step: int | None
    optim: str | None
    lr_scheduler_type: str | None
    ewa: bool | None
    schedule: dict[str, Any] | None
    schedule_words: str | None
    phase: str | None
    learning_rates: list[float]
    root: str | None
    evaluation_folder: str | None
    beside: list[str]
    averaging: dict[str, Any] | None
    schedule_free: dict[str, Any] | None
    layout: str
    processes: int | None
    files: list[FileFacts] = field(repr=False)

    @property
    def ours(self) -> bool:
        """Whether hf_radam wrote it."""
        return self.written_by.startswith("hf_radam")

    @property
    def bad(self) -> bool:
        """Whether it cannot be trusted: damaged, or in a format that cannot be checked."""
        return self.state in (DAMAGED, OTHER_FORMAT)
