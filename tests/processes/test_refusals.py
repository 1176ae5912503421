"""Models, optimizers and checkpoints that are refused before the first step, each with a way out."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from processes import harness
from processes.test_moving import ODD
from processes.test_sharded_details import error_of, options, zero
from torch import nn

from hf_radam import RAdamTrainer

SAVING = {
    "optim": "radam",
    "lr_scheduler_type": "constant",
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_strategy": "no",
}


class Normalised(nn.Module):
    """A model with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(67, 8), nn.BatchNorm1d(8), nn.Linear(8, 67)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def with_adapter():
    import peft

    return peft.get_peft_model(tiny.llama(**ODD), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


MODELS = {with_adapter: r"PEFT model .*\. Train it under DDP", Normalised: "recalibrate_batch_norm_batches=0"}


def refused(folder, backend, checkpoints=()):
    """Train and save, then offer every model and checkpoint; return what is said of each."""
    trainer = tiny.trainer(folder / backend, tiny.llama(**ODD), **options(backend, **SAVING))
    trainer.train()
    with_average = options(backend, optim="radam", ewa=True)
    models = [error_of(tiny.trainer, folder / "new", make(), **with_average) for make in MODELS]
    resumed = []
    for checkpoint in checkpoints:
        again = tiny.trainer(folder / "new", tiny.llama(**ODD), **options(backend, **SAVING | {"max_steps": 4}))
        resumed.append(error_of(again.train, resume_from_checkpoint=str(checkpoint)))
    return {"models": models, "checkpoints": resumed}


@zero
def test_what_is_refused_where_anything_is_sharded(tmp_path):
    """The state of DeepSpeed's optimizer stays with its stage (1 and 2 are alike) and its number of processes."""
    plain, first, second, third = (tmp_path / name / "checkpoint-3" for name in ("ddp", "zero1", "zero2", "zero3"))
    for backend, world, checkpoints, accepted in (
        ("ddp", 2, [], None),
        ("zero1", 2, [plain], None),
        ("zero2", 2, [plain, first], first),
        ("zero3", 2, [plain, first, second], None),
        ("fsdp2", 2, [plain, second, third], plain),
        ("zero2", 1, [plain, first, third], None),
    ):
        folder = tmp_path if world == 2 else tmp_path / "alone"
        each = harness.run(refused, folder, backend, checkpoints, backend=backend, world=world)
        for found in each:
            for pattern, said in zip(MODELS.values(), found["models"], strict=True):
                # one process and DDP take both
                assert (said is None) if backend == "ddp" else re.search(pattern, said), (backend, said)
            for checkpoint, said in zip(checkpoints, found["checkpoints"], strict=True):
                if checkpoint == accepted:
                    assert said is None, (backend, said)
                    continue
                was = {plain: "one process or DDP", third: "DeepSpeed (ZeRO-3"}.get(
                    checkpoint, "DeepSpeed (ZeRO-1 or 2"
                )
                now = "without DeepSpeed" if backend == "fsdp2" else f"DeepSpeed (ZeRO-{backend[-1]})"
                assert said.startswith(f"CheckpointError: {checkpoint} was saved with {was}"), (backend, said)
                assert f"{now} and {world} processes" in said and "Resume with" in said, (backend, said)


class OtherOptimizer(RAdamTrainer):
    """A user's trainer that makes another optimizer than the flags say."""

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        return self.optimizer


def test_another_optimizer_than_the_flags_say(tmp_path):
    args = tiny.arguments(tmp_path, optim="radam", ewa=True, max_steps=2)
    trainer = OtherOptimizer(tiny.llama(), args, train_dataset=tiny.TRAIN)
    with pytest.raises(ValueError, match="optim=radam was replaced by torch.optim.adamw.AdamW"):
        trainer.train()
    assert trainer.state.global_step == 0
