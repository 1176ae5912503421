"""In every layout a run goes on as it was, refuses other hyper-parameters, and can be extended; ZeRO does not move.

Oracles: the uninterrupted run, bit for bit; the numbers of the flags, in the messages; the schedule's own function.
"""

from __future__ import annotations

import pytest
import tiny
from processes import harness
from transformers import TrainerCallback

from hf_radam import RAdamTrainer
from hf_radam.schedules import wsd, wsd_s

LAYOUTS = ("one", "ddp", "fsdp2", "fsdp2_sharded", "zero1", "zero2", "zero3")
SAVED, UPDATES, LONGER = 3, 6, 12
WSD = {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": 3}  # the decay begins just after the save
WSD_S = {"lr_scheduler_type": "wsd_s", "decay_steps": 0.5}


class Rates(TrainerCallback):
    """Keeps the learning rate of every update."""

    def __init__(self):
        self.used = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.used[state.global_step] = float(optimizer.param_groups[0]["lr"])


def train(folder, layout, resume=None, **overrides):
    """Train; returns the training weights at the end, or what the refusal says, and the learning rates."""
    options = {"max_steps": UPDATES, "save_strategy": "steps", "save_steps": SAVED, "per_device_train_batch_size": 2}
    arguments = tiny.arguments(folder, **options | WSD | harness.arguments(layout) | overrides)
    rates = Rates()
    trainer = RAdamTrainer(tiny.llama(attention_dropout=0.0), arguments, train_dataset=tiny.TRAIN, callbacks=[rates])
    try:
        trainer.train(resume_from_checkpoint=resume and str(resume))
    except ValueError as error:
        return f"{type(error).__name__}: {error}", rates.used
    assert harness.is_really(trainer, layout)
    return end_of(trainer), rates.used


def end_of(trainer):
    sharding = trainer._evaluation.sharding
    return {name: sharding.gather_model(name).clone() for name in sharding.parameters}


def everything(root, layout):
    saved = root / layout / f"checkpoint-{SAVED}"
    again = root / f"{layout}_again"
    return {
        "whole": train(root / layout, layout),
        "resumed": train(again, layout, saved),
        "decay": train(again, layout, saved, weight_decay=0.2),
        "rate": train(again, layout, saved, learning_rate=2e-2),
        "schedule": train(again, layout, saved, max_steps=LONGER),
        "other": train(again, layout, saved, optim="adamw_torch"),
        "extended": train(root / f"{layout}_longer", layout, max_steps=LONGER, extend_from=str(root / layout)),
        "budget": train(root / f"{layout}_budget", layout, **WSD_S, budgets=[UPDATES]),
        "beyond": train(
            root / f"{layout}_beyond",
            layout,
            **WSD_S,
            budgets=[UPDATES, LONGER],
            max_steps=LONGER,
            extend_from=str(root / f"{layout}_budget"),
        ),
    }


def require(layout):
    if reason := harness.missing(layout):
        pytest.skip(reason)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_goes_on_as_it_was_refuses_other_numbers_and_extends(tmp_path, layout):
    require(layout)
    saved = tmp_path / layout / f"checkpoint-{SAVED}"
    for found in harness.run(everything, tmp_path, layout, backend=layout):
        assert tiny.same(found["resumed"][0], found["whole"][0])
        assert found["decay"][0].startswith(
            f"CheckpointError: {saved} was trained with weight_decay=0.1, the arguments say 0.2"
        )
        assert found["rate"][0].startswith(
            f"CheckpointError: {saved} was trained with learning_rate=0.01, the arguments say 0.02"
        )
        assert "was trained with optim=radam, the arguments say adamw_torch" in found["other"][0]
        # Before the decay both schedules are at the peak: nothing to refuse.
        assert isinstance(found["schedule"][0], dict)
        longer = {u: 1e-2 * wsd(u, total_steps=LONGER, decay_steps=3) for u in range(SAVED, LONGER)}
        assert found["extended"][1] == pytest.approx(longer, rel=1e-12)
        # The checkpoint has the rate at the end of its decay.
        both = {u: 1e-2 * wsd_s(u, budgets=[UPDATES, LONGER], decay_steps=[3, 6]) for u in range(UPDATES, LONGER)}
        assert found["beyond"][1] == pytest.approx(both, rel=1e-12) and both[UPDATES] == 1e-2
        short = {u: 1e-2 * wsd(u, total_steps=UPDATES, decay_steps=3) for u in range(UPDATES)}
        assert found["whole"][1] == pytest.approx(short, rel=1e-12)


def attempt(folder, layout, checkpoints):
    return [train(folder, layout, checkpoint)[0] for checkpoint in checkpoints]


def test_the_state_of_deepspeed_does_not_move(tmp_path):
    require("zero2")
    stages = {"zero1": "1 or 2", "zero2": "1 or 2", "zero3": "3"}
    for layout in ("ddp", *stages):
        harness.run(train, tmp_path / layout, layout, backend=layout)
    plain, *partitioned = (tmp_path / layout / f"checkpoint-{SAVED}" for layout in ("ddp", *stages))
    for layout, world, now in (
        ("one", 1, "without DeepSpeed with 1"),
        ("fsdp2", 2, "without DeepSpeed with 2"),
        ("zero3", 1, "with DeepSpeed (ZeRO-3) with 1"),
        ("zero2", 1, "with DeepSpeed (ZeRO-2) with 1"),
    ):
        each = harness.run(attempt, tmp_path / "new", layout, [plain, *partitioned], backend=layout, world=world)
        for of_plain, *of_zero in each:
            for said, checkpoint, stage in zip(of_zero, partitioned, stages.values(), strict=True):
                was = f"{checkpoint} was saved with DeepSpeed (ZeRO-{stage}, 2 processes), and this run goes on {now}: "
                assert said.startswith(f"CheckpointError: {was}") and "Resume with just that" in said
            if layout.startswith("zero"):
                assert f"{plain} was saved with one process or DDP (2 processes), and this run goes on" in of_plain
            else:
                assert isinstance(of_plain, dict)
    # In two processes again the stages 1 and 2, whose files are alike, go on from each other, and stage 3 does not.
    for layout, wrong in (("zero2", 2), ("zero1", 2), ("zero3", 0)):
        each = harness.run(attempt, tmp_path / "new", layout, partitioned, backend=layout)
        for outcome in each:
            assert "DeepSpeed (ZeRO-" in outcome[wrong] and "Resume with just that" in outcome[wrong]
            if layout != "zero3":
                assert tiny.same(outcome[0], outcome[1])
