"""Models and optimizers that are refused before the first update, each with a way out."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from processes import harness
from processes.test_sharded_details import ODD, options
from torch import nn

from hf_radam import RAdamTrainer


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


REFUSED = {with_adapter: "PEFT model .* train it under DDP", Normalised: "recalibrate_batch_norm_batches=0"}


def said_to_each(folder, backend):
    said = []
    for model in REFUSED:
        try:
            tiny.trainer(folder, model(), **options(backend, optim="radam", ewa=True))
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("backend", ["fsdp2", "zero1", "zero2", "zero3"])
def test_models_that_are_refused_where_anything_is_sharded(tmp_path, backend):
    if harness.missing(backend):
        pytest.skip(harness.missing(backend))
    for said in harness.run(said_to_each, tmp_path, backend, backend=backend):
        assert len(said) == len(REFUSED)
        for pattern, words in zip(REFUSED.values(), said, strict=True):
            assert re.search(pattern, words), words


class PutsItsOwn(RAdamTrainer):
    """Somebody's trainer that makes another optimizer than the flags say."""

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        return self.optimizer


def test_an_optimizer_that_took_the_place_of_ours(tmp_path):
    args = tiny.arguments(tmp_path, optim="radam", ewa=True, max_steps=2)
    trainer = PutsItsOwn(tiny.llama(), args, train_dataset=tiny.TRAIN)
    with pytest.raises(ValueError, match="optim=radam, but torch.optim.adamw.AdamW took its place"):
        trainer.train()
    assert trainer.state.global_step == 0
