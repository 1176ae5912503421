"""With `load_best_model_at_end` the model is the best evaluation weights, in combinations that users bring.

The oracle records every evaluation from outside: a copy of the weights at that moment, averaged (or taken from y and z)
in float64 by its own arithmetic, and their loss from a fresh model without a trainer.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from hf_radam import RAdamTrainer, RAdamTrainerMixin, RAdamTrainingArguments, load_evaluation_model

DECAY = 0.8
METHODS = {
    "ewa": {"optim": "radam", "ewa": True, "ewa_decay": DECAY},
    "schedule_free": {"optim": "radam_schedulefree"},
}
FEW = tiny.TRAIN[:4]
"""So few sequences that they are soon known by heart: the best evaluation is neither the first nor the last."""
OPTIONS = {
    "learning_rate": 4e-2,
    "max_steps": 24,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "load_best_model_at_end": True,
}


class Oracle(TrainerCallback):
    """Averages the weights after each step in float64, and keeps what belongs to each evaluation."""

    def __init__(self, method):
        self.method, self.path, self.evaluated = method, [], {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        with torch.no_grad():
            if self.method == "ewa":
                trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
                self.path.append({name: p.detach().double().clone() for name, p in trained})
                weights = [DECAY**age for age in range(len(self.path))][::-1]
                pairs = list(zip(weights, self.path, strict=True))
                now = {name: sum(w * point[name] for w, point in pairs) / sum(weights) for name, _ in trained}
            else:
                z = {p: values["z"].double() for p, values in optimizer.state.items() if "z" in values}
                now = {n: (p.double() - 0.1 * z[p]) / 0.9 for n, p in model.named_parameters() if p in z}
        self.evaluated[state.global_step] = {name.removeprefix("_orig_mod."): value for name, value in now.items()}


def loss_with(build, weights) -> float:
    """The loss of a fresh model that holds these weights in place of its own."""
    model = build()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in weights:
                p.copy_(weights[name])
    return tiny.loss_of(model)


def check_best(trainer, oracle, build, load=AutoModelForCausalLM, **tolerance) -> None:
    """Compare the model, its logged losses, and the models saved and shipped with the oracle."""
    tolerance = {"abs": 5e-6} | tolerance
    best = trainer.state.best_global_step
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert best == min(losses, key=losses.get) and best not in (min(losses), max(losses)), losses
    expected = loss_with(build, oracle.evaluated[best])
    assert trainer.state.best_metric == pytest.approx(expected, **tolerance)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-7)
    bare = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    for name, value in oracle.evaluated[best].items():
        torch.testing.assert_close(bare.get_parameter(name).double(), value, rtol=0, atol=2e-6)
    folder = Path(trainer.args.output_dir, "shipped")
    trainer.save_model(str(folder))
    for shipped in (load.from_pretrained(folder), load_evaluation_model(trainer.state.best_model_checkpoint)):
        assert tiny.same(tiny.parameters(shipped), tiny.parameters(bare))
        assert tiny.loss_of(shipped) == pytest.approx(expected, **tolerance)


def trained(folder, method, build, **options):
    oracle = Oracle(method)
    args = tiny.arguments(folder, **METHODS[method] | OPTIONS | options)
    trainer = RAdamTrainer(build(), args, train_dataset=FEW, eval_dataset=tiny.EVAL, callbacks=[oracle])
    trainer.train()
    return trainer, oracle


def tied_and_frozen():
    model = tiny.tied()
    model.model.layers[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_tied_embeddings_and_frozen_parameters(tmp_path, method):
    trainer, oracle = trained(tmp_path, method, tied_and_frozen)
    check_best(trainer, oracle, tied_and_frozen)
    fresh = tied_and_frozen()
    for name, p in trainer.model.named_parameters():
        assert p.requires_grad or torch.equal(p, fresh.get_parameter(name))
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight


@pytest.mark.parametrize(("method", "backend"), [("ewa", "aot_eager"), ("schedule_free", "eager")])
def test_compiled_models(tmp_path, method, backend):
    """The compiled graph may round otherwise, so that its losses differ by a few 1e-6 from an uncompiled model's."""
    trainer, oracle = trained(tmp_path, method, tiny.llama, torch_compile=True, torch_compile_backend=backend)
    check_best(trainer, oracle, tiny.llama, abs=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_saving_only_the_model_of_the_best_checkpoint(tmp_path, method):
    options = {"save_strategy": "best", "save_total_limit": 1, "save_only_model": True}
    trainer, oracle = trained(tmp_path, method, tiny.tied, **options)
    check_best(trainer, oracle, tiny.tied)
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [best]
    files = {p.name for p in Path(trainer.state.best_model_checkpoint).iterdir()}
    assert {method, "model.safetensors", "hf_radam.json"} <= files and "optimizer.pt" not in files


@dataclass
class Arguments(RAdamTrainingArguments, Seq2SeqTrainingArguments):
    """As a user of another trainer derives them."""


class MyTrainer(RAdamTrainerMixin, Seq2SeqTrainer):
    """As a user of another trainer derives it."""


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


@pytest.mark.parametrize("method", METHODS)
def test_seq2seq_with_generation(tmp_path, method):
    """The model that ships generates the predictions again."""
    oracle = Oracle(method)
    options = tiny.arguments(tmp_path, **METHODS[method] | OPTIONS | {"max_steps": 32, "learning_rate": 0.3}).to_dict()
    args = Arguments(**options, predict_with_generate=True, generation_max_length=6, generation_num_beams=1)
    trainer = MyTrainer(t5(), args, train_dataset=FEW, eval_dataset=tiny.EVAL, callbacks=[oracle])
    trainer.train()
    check_best(trainer, oracle, t5, AutoModelForSeq2SeqLM)
    predicted = torch.as_tensor(trainer.predict(tiny.EVAL, max_length=6, num_beams=1).predictions)[:, :6]
    shipped = load_evaluation_model(trainer.state.best_model_checkpoint)
    inputs = torch.stack([row["input_ids"] for row in tiny.EVAL])
    generated = [
        model.generate(input_ids=inputs, max_length=6, num_beams=1, do_sample=False) for model in (shipped, t5().eval())
    ]
    assert torch.equal(predicted, generated[0]) and not torch.equal(predicted, generated[1])
