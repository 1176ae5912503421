"""Averaged weights are evaluated and saved with BatchNorm statistics of their own."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from hf_radam import RAdamTrainer


class ConvolutionalModel(nn.Module):
    """Embedding, convolution, BatchNorm, dropout, head: predicts each token from itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(tiny.VOCABULARY, 16)
        self.conv = nn.Conv1d(16, 16, 1)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, tiny.VOCABULARY)

    def forward(self, input_ids, labels):
        hidden = self.dropout(self.norm(self.conv(self.embed(input_ids).transpose(1, 2)))).transpose(1, 2)
        logits = self.head(torch.relu(hidden))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def make(tmp_path, dataset=tiny.TRAIN, **options) -> RAdamTrainer:
    args = tiny.arguments(tmp_path, **{"learning_rate": 0.05, "recalibrate_batch_norm_batches": 8} | options)
    return RAdamTrainer(ConvolutionalModel(), args, train_dataset=dataset, eval_dataset=tiny.EVAL)


def recalibrated(weights, seed) -> ConvolutionalModel:
    """A fresh model with these weights and torch's cumulative statistics of the first 8 batches of training data."""
    model = ConvolutionalModel()
    model.load_state_dict(weights, strict=False)
    model.norm.reset_running_stats()
    model.norm.momentum = None
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:32]
    for batch in torch.stack([tiny.TRAIN[i]["input_ids"] for i in order]).view(8, 4, -1):
        model(batch, batch)
    return model


def loss_of(model: nn.Module) -> float:
    model.eval()
    batch = {k: torch.stack([row[k] for row in tiny.EVAL]) for k in tiny.EVAL[0]}
    with torch.no_grad():
        return model(**batch)["loss"].item()


@pytest.mark.parametrize("method", ["ewa", "schedule_free"])
def test_saved_and_evaluated_with_the_same_recalibrated_statistics_which_change_nothing(tmp_path, method):
    every = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 7}
    trainer = make(tmp_path, **tiny.METHODS[method], **every)
    trainer.train()
    training_statistics = trainer.model.norm.running_mean.clone(), trainer.model.norm.running_var.clone()
    loss = trainer.evaluate()["eval_loss"]
    assert torch.equal(trainer.model.norm.running_mean, training_statistics[0])
    written = load_file(tmp_path / "checkpoint-20" / method / "model.safetensors")
    shipped = ConvolutionalModel()
    shipped.load_state_dict(written)
    assert loss_of(shipped) == pytest.approx(loss, abs=2e-6)  # fp32 means over other batch sizes
    root = load_file(tmp_path / "checkpoint-20" / "model.safetensors")
    assert torch.equal(root["norm.running_mean"], training_statistics[0])
    by_hand = recalibrated(written, trainer.args.seed)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(written[f"norm.{name}"], getattr(by_hand.norm, name), rtol=1e-5, atol=1e-6)
    # ... and stale ones are worse
    shipped.norm.running_mean.copy_(training_statistics[0])
    shipped.norm.running_var.copy_(training_statistics[1])
    assert loss_of(shipped) > loss + 1e-3
    # Neither a run that is never evaluated nor a resumed one differs
    for checkpoint in (None, str(tmp_path / "checkpoint-7")):
        other = make(tmp_path / "other", **tiny.METHODS[method])
        other.train(resume_from_checkpoint=checkpoint)
        assert tiny.same(trainer.model.state_dict(), other.model.state_dict())


def test_a_short_last_batch_is_left_out_and_all_can_be_switched_off(tmp_path):
    trainer = make(tmp_path, [*tiny.TRAIN, tiny.TRAIN[0]], **tiny.METHODS["ewa"], recalibrate_batch_norm_batches=50)
    trainer.args.dataloader_drop_last = True
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0  # a batch of one sequence at a time would raise
    off = make(tmp_path, **tiny.METHODS["ewa"], recalibrate_batch_norm_batches=0)
    off.train()
    with off.average.applied():
        stale = loss_of(off.model)
    assert off.evaluate()["eval_loss"] == pytest.approx(stale, abs=2e-6)


def test_streaming_data_is_refused_before_training(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tiny.TRAIN)

    with pytest.raises(ValueError, match="Set recalibrate_batch_norm_batches=0"):
        make(tmp_path, Stream(), **tiny.METHODS["ewa"]).train()
