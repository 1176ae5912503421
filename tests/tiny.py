"""Tiny real models, data and arguments for the tests: seconds on one core, no network."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import accelerate.utils.imports
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from hf_radam import RAdamTrainer, RAdamTrainingArguments

# It reads a package's metadata again at each call: a sixth of the time of a training, a quarter of one that saves.
accelerate.utils.imports._is_package_available = functools.cache(accelerate.utils.imports._is_package_available)

VOCABULARY, LENGTH = 64, 16
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attention_dropout": 0.1,  # so that a random number drawn in the wrong place changes the run
}


def llama(**overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | overrides))


def mixtral() -> MixtralForCausalLM:
    """A model whose weights have other keys in a file than in its state dict."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def tied() -> LlamaForCausalLM:
    return llama(tie_word_embeddings=True)


def bf16() -> LlamaForCausalLM:
    return llama().to(torch.bfloat16)


def float64() -> LlamaForCausalLM:
    return llama().double()


def partly_frozen() -> LlamaForCausalLM:
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    return model


def tokens(count: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Sequences with structure to learn: each token is mostly the one before plus 3."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, VOCABULARY, (count, 1), generator=generator)
    noise = torch.randint(0, 2, (count, LENGTH), generator=generator)
    ids = (start + 3 * torch.arange(LENGTH) + noise) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in ids]


TRAIN, EVAL = tokens(64), tokens(16, seed=2)


def arguments(folder: Path, **overrides: Any) -> RAdamTrainingArguments:
    """20 steps of 4 sequences on the CPU, nothing evaluated, saved or reported unless asked for."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "seed": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    return RAdamTrainingArguments(**options | overrides)


def stock_arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    """The same arguments, as upstream's class."""
    ours = arguments(folder, **overrides).to_dict()
    return TrainingArguments(**{k: v for k, v in ours.items() if k in TrainingArguments.__dataclass_fields__})


def trainer(folder: Path, model: nn.Module | None = None, **overrides: Any) -> RAdamTrainer:
    model = llama() if model is None else model
    return RAdamTrainer(model, arguments(folder, **overrides), train_dataset=TRAIN, eval_dataset=EVAL)


def trained(
    folder: Path,
    model: nn.Module | None = None,
    *,
    resume: Path | str | bool | None = None,
    until: int | None = None,
    **overrides: Any,
) -> RAdamTrainer:
    """Train to the end, or until a step as if interrupted then; returns the trainer."""
    made = trainer(folder, model, **overrides)
    if until is not None:
        made.add_callback(StopAfter(until))
    made.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    return made


def state(trainer: RAdamTrainer) -> dict[str, torch.Tensor]:
    """Everything that training would continue with: weights, state and numbers of the optimizer, average."""
    optimizer = trainer.optimizer.state_dict()
    found = {f"{i}.{k}": v for i, entry in optimizer["state"].items() for k, v in entry.items()}
    for number, group in enumerate(optimizer["param_groups"]):
        numbers = {k: v for k, v in group.items() if isinstance(v, (int, float))}
        found |= {f"group {number}.{k}": torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
    if trainer.average is not None:
        found |= {f"average.{k}": v for k, v in trainer.average.averaged_state_dict().items()}
        found |= {f"average: {k}": torch.tensor(v, dtype=torch.float64) for k, v in trainer.average.counters().items()}
    weights = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return parameters(weights) | {k: torch.as_tensor(v) for k, v in found.items()}


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights have the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loss_of(model: PreTrainedModel) -> float:
    """Mean loss over the evaluation data in one batch, without a trainer: the oracle for `evaluate()`."""
    model.eval()
    with torch.no_grad():
        losses = [model(**{k: v[None] for k, v in row.items()}).loss.double() for row in EVAL]
    return float(torch.stack(losses).mean())


class StopAfter(TrainerCallback):
    """Ends the training after a step, as an interruption would: nothing is saved that is not due."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


def spy_on_hub(monkeypatch: Any, sent: Callable[[Path, str | None], Future | None]) -> None:
    """Give uploads at the edge of the hub's library to `sent(folder, path_in_repo)`, which may return their future."""
    from huggingface_hub import HfApi

    class Url(str):
        repo_id = "me/run"

    def upload_folder(self: Any, *, folder_path: Any, path_in_repo: str | None = None, **kwargs: Any) -> Future:
        job = sent(Path(folder_path), path_in_repo)
        if job is None:
            job = Future()
            job.set_result(None)
        return job

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: Url("me/run"))


METHODS: dict[str, dict[str, Any]] = {
    "wsd": {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": 8},
    "wsd_s": {"optim": "radam", "lr_scheduler_type": "wsd_s", "budgets": [10], "decay_steps": 0.4},
    "ewa": {"optim": "radam", "ewa": True},
    "schedule_free": {"optim": "radam_schedulefree"},
    "schedule_free_ewa": {"optim": "radam_schedulefree", "ewa": True, "ewa_decay": 0.9, "ewa_every": 3},
}
