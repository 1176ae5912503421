"""A new schedule is one class: defined here, it trains, previews, pins, resumes and extends like those of the package.

The oracle is the formula of the class, written out again.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny

from hf_radam.checkpoints.manifest import CheckpointError, read_manifest
from hf_radam.checkpoints.runs import list_checkpoints
from hf_radam.schedules import Phase, Schedule


@dataclass(frozen=True)
class Staircase(Schedule):
    """Constant, then one lower stair until the end; the state before the stair is pinned."""

    name: ClassVar[str] = "staircase"
    stair_steps: int = 5
    height: float = 0.25

    def multiplier(self, step: int) -> float:
        return 1.0 if step < self.total_steps - self.stair_steps else self.height

    def phases(self) -> list[Phase]:
        start = self.total_steps - self.stair_steps
        return [Phase("stable", 0, start), Phase("decay", start, self.total_steps)]


OPTIONS = {
    "optim": "radam",
    "lr_scheduler_type": "staircase",
    "lr_scheduler_kwargs": {"stair_steps": 6, "height": 0.5},
    "save_strategy": "steps",
    "save_steps": 8,
    "logging_strategy": "steps",
    "logging_steps": 1,
}


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_it_trains_pins_resumes_and_extends(tmp_path):
    run = tmp_path / "run"
    trainer = tiny.trained(run, **OPTIONS)
    assert rates(trainer) == [1e-2] * 14 + [5e-3] * 6
    manifest = read_manifest(run / "checkpoint-8")
    assert manifest["method"]["lr_scheduler_type"] == "staircase"
    assert Schedule.from_dict("staircase", manifest["schedule"]) == Staircase(
        total_steps=20, warmup_steps=0, stair_steps=6, height=0.5
    )
    assert [ref.path.name for ref in list_checkpoints(run) if ref.pinned_in == "_pre_decay"] == ["checkpoint-14"]

    resumed = tiny.trained(tmp_path / "again", **OPTIONS, resume=run / "checkpoint-16")
    assert tiny.same(tiny.parameters(trainer.model), tiny.parameters(resumed.model))

    with pytest.raises(CheckpointError, match="--extend_from .*run --max_steps 40"):
        tiny.trainer(tmp_path / "x", **OPTIONS, max_steps=40).train(resume_from_checkpoint=str(run / "checkpoint-16"))
    extended = tiny.trained(tmp_path / "longer", **OPTIONS, max_steps=40, extend_from=str(run))
    alone = tiny.trained(tmp_path / "alone", **OPTIONS, max_steps=40)
    assert tiny.same(tiny.parameters(extended.model), tiny.parameters(alone.model))
    assert rates(extended) == [1e-2] * 34 + [5e-3] * 6


def test_it_is_previewed(capsys):
    from hf_radam.cli import main

    flags = "--optim radam --lr_scheduler_type staircase --max_steps 20 --learning_rate 0.01".split()
    assert main(["schedule", *flags, "--lr_scheduler_kwargs", '{"stair_steps": 6, "height": 0.5}']) == 0
    printed = capsys.readouterr().out
    assert "staircase" in printed and "0-14" in printed and "14-20" in printed and "0.005" in printed
