"""The average is that of the weights after every step, and the best model is the best evaluation weights.

In combinations that users bring. The oracle records the weights from outside after every step, averages them (or takes
them from y and z) in float64 by its own arithmetic, and has their loss from a fresh model without a trainer.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
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
    "wsd": tiny.METHODS["wsd"],
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
    """Keeps the training and the evaluation weights after each step in float64, by names of the model that trains."""

    def __init__(self, method=None):
        self.method, self.path, self.evaluated = method, [], {}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        trained = {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters() if p.requires_grad}
        self.path.append({name: p.detach().double().clone() for name, p in trained.items()})
        now = self.path[-1]
        if self.method == "ewa":
            now = mean(self.path, [DECAY**age for age in range(len(self.path))][::-1])
        elif self.method == "schedule_free":
            now = {name: (p.double() - 0.1 * optimizer.state[p]["z"].double()) / 0.9 for name, p in trained.items()}
        self.evaluated[state.global_step] = now

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.last = tiny.parameters(model)


def mean(path, weights) -> dict[str, torch.Tensor]:
    pairs = list(zip(weights, path, strict=True))
    return {name: sum(w * point[name] for w, point in pairs) / sum(weights) for name in path[0]}


@pytest.mark.parametrize(
    ("build", "options"),
    [
        # Wide windows: an average shifted by one step, or with theta_0 in it, is far outside the tolerance.
        (tiny.llama, {"ewa_decay": 0.98}),
        (tiny.tied, {"ewa_decay": 0.98, "ewa_every": 3, "ewa_start_step": 4}),
        (tiny.bf16, {"ewa_half_life_ratio": 0.5}),
        (tiny.mixtral, {"ewa_half_life_ratio": 0.5}),
        (tiny.llama, {"ewa_half_life_ratio": 0.5, "ewa_every": 3, "ewa_device": "cpu"}),
    ],
)
def test_against_the_weighted_sum_of_recorded_weights(tmp_path, options, build):
    oracle = Oracle()
    options = options | {"save_strategy": "steps", "save_steps": 20, "gradient_accumulation_steps": 2}
    args = tiny.arguments(tmp_path, optim="adamw_torch", ewa=True, **options)
    trainer = RAdamTrainer(build(), args, train_dataset=tiny.TRAIN, callbacks=[oracle])
    trainer.train()
    assert tiny.same(oracle.last, tiny.parameters(trainer.model))  # no callback sees other weights
    every, start = options.get("ewa_every", 1), options.get("ewa_start_step", 0)
    times = [t for t in range(start + 1, 21) if (t - start) % every == 0]
    weights: list[float] = []
    for t in times:
        if "ewa_decay" in options:
            weights = [w * 0.98**every for w in weights] + [1.0]
        else:
            keep = 0.5 ** (every / (0.5 * (t - start))) if weights else 0.0
            weights = [w * keep for w in weights] + [1.0 - keep]
    written = load_file(tmp_path / "checkpoint-20" / "ewa" / "model.safetensors") if build is not tiny.mixtral else {}
    averages = trainer.average.averaged_state_dict()
    for name, expected in mean([oracle.path[t - 1] for t in times], weights).items():
        # 20 roundings in fp32 of weights below 1; one step moves a weight by up to 1e-2.
        torch.testing.assert_close(averages[name].double(), expected, rtol=0, atol=1e-6)
        assert not written or torch.equal(written[name], averages[name])
    assert averages.keys() == oracle.path[0].keys()


# ---- The best model ----


def loss_with(build, weights) -> float:
    """The loss of a fresh model that holds these weights in place of its own."""
    model = build()
    model.load_state_dict(weights, strict=False)
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


def trained(folder, method, build, *, resume=None, **options):
    oracle = Oracle(method)
    args = tiny.arguments(folder, **METHODS[method] | OPTIONS | options)
    trainer = RAdamTrainer(build(), args, train_dataset=FEW, eval_dataset=tiny.EVAL, callbacks=[oracle])
    trainer.train(resume_from_checkpoint=resume)
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
    with pytest.raises(RuntimeError, match="holds the best evaluation weights"):
        trainer.train()


@pytest.mark.parametrize("method", ["ewa", "schedule_free"])
def test_a_compiled_model_which_resumes_bitwise(tmp_path, method):
    """The compiled graph may round otherwise, so that its losses differ by a few 1e-6 from an uncompiled model's."""
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer, oracle = trained(tmp_path, method, tiny.llama, **compiled)
    check_best(trainer, oracle, tiny.llama, abs=2e-5)
    again, _ = trained(tmp_path / "again", method, tiny.llama, **compiled, resume=str(tmp_path / "checkpoint-8"))
    assert tiny.same(tiny.state(trainer), tiny.state(again))


def test_saving_only_the_model_of_the_best_checkpoint(tmp_path):
    options = {"save_strategy": "best", "save_total_limit": 1, "save_only_model": True}
    trainer, oracle = trained(tmp_path, "schedule_free", tiny.tied, **options)
    check_best(trainer, oracle, tiny.tied)
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [best]
    files = {p.name for p in Path(trainer.state.best_model_checkpoint).iterdir()}
    assert {"schedule_free", "model.safetensors", "hf_radam.json"} <= files and "optimizer.pt" not in files


@dataclass
class Arguments(RAdamTrainingArguments, Seq2SeqTrainingArguments):
    """As a user of another trainer derives them."""


class MyTrainer(RAdamTrainerMixin, Seq2SeqTrainer):
    """As a user of another trainer derives it."""


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def test_seq2seq_with_generation(tmp_path):
    """The model that ships generates the predictions again."""
    oracle = Oracle("schedule_free")
    options = METHODS["schedule_free"] | OPTIONS | {"max_steps": 32, "learning_rate": 0.3}
    options = tiny.arguments(tmp_path, **options).to_dict()
    args = Arguments(**options, predict_with_generate=True, generation_max_length=6, generation_num_beams=1)
    trainer = MyTrainer(t5(), args, train_dataset=FEW, eval_dataset=tiny.EVAL, callbacks=[oracle])
    trainer.train()
    check_best(trainer, oracle, t5, AutoModelForSeq2SeqLM)
    predicted = torch.as_tensor(trainer.predict(tiny.EVAL, max_length=6, num_beams=1).predictions)[:, :6]
    shipped = load_evaluation_model(trainer.state.best_model_checkpoint)
    inputs = torch.stack([row["input_ids"] for row in tiny.EVAL])
    options = {"max_length": 6, "num_beams": 1, "do_sample": False}
    generated = [model.generate(input_ids=inputs, **options) for model in (shipped, t5().eval())]
    assert torch.equal(predicted, generated[0]) and not torch.equal(predicted, generated[1])
