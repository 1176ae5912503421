"""A tiny supervised fine-tuning with TRL: trainer, tokenizer made on the spot, texts, and losses without a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_radam import RAdamTrainerMixin, RAdamTrainingArguments

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")

WORDS = "one two three four five six seven eight nine ten".split()


@dataclass
class SFTArguments(RAdamTrainingArguments, trl.SFTConfig):
    """What a user writes."""


class SFT(RAdamTrainerMixin, trl.SFTTrainer):
    """What a user writes."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<end>", *WORDS, "?"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="?")


def counting(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts and completions of different lengths: each word is mostly the one after the word before it."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        start, length, cut = (int(torch.randint(low, 10, (), generator=generator)) for low in (0, 4, 1))
        noise = torch.randint(0, 2, (length,), generator=generator).tolist()
        words = [WORDS[(start + place + more) % 10] for place, more in enumerate(noise)]
        cut = min(cut, length - 2)
        rows.append((" ".join(words[:cut]), " " + " ".join(words[cut:])))
    return rows


TRAIN, EVAL = counting(48, seed=1), counting(8, seed=2)


def dataset(rows: list[tuple[str, str]], *, completion: bool = False) -> Dataset:
    if completion:
        return Dataset.from_dict({"prompt": [p for p, _ in rows], "completion": [c for _, c in rows]})
    return Dataset.from_dict({"text": [p + c for p, c in rows]})


def arguments(folder: Path, kind: type = SFTArguments, **overrides: Any) -> Any:
    """20 steps of 4 texts on the CPU; one text in a batch of an evaluation."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 1,
        "learning_rate": 1e-2,
        "adam_beta2": 0.95,
        "seed": 3,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return kind(**options | overrides)


def llama() -> PreTrainedModel:
    return tiny.llama(vocab_size=len(tokenizer()))


def trainer(
    folder: Path,
    model: Any = None,
    *,
    completion: bool = False,
    peft_config: Any = None,
    kinds: tuple[type, type] = (SFT, SFTArguments),
    **overrides: Any,
) -> Any:
    return kinds[0](
        llama() if model is None else model,
        arguments(folder, kinds[1], **overrides),
        train_dataset=dataset(TRAIN, completion=completion),
        eval_dataset=dataset(EVAL, completion=completion),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


@torch.no_grad()
def measured(model: PreTrainedModel, *, completion: bool = False) -> dict[str, float]:
    """Loss, accuracy and entropy of a model by hand: means over texts of the means over what each has to predict."""
    model.eval()
    sums = dict.fromkeys(("loss", "mean_token_accuracy", "entropy"), 0.0)
    for prompt, rest in EVAL:
        ids = torch.tensor(tokenizer()(prompt + rest)["input_ids"] + [tokenizer().eos_token_id])
        first = len(tokenizer()(prompt)["input_ids"]) if completion else 1
        logits = model(input_ids=ids[None]).logits[0, first - 1 : -1].double()
        target, log_probs = ids[first:], logits.log_softmax(-1)
        sums["loss"] -= float(log_probs.gather(1, target[:, None]).mean())
        sums["mean_token_accuracy"] += float((logits.argmax(-1) == target).double().mean())
        sums["entropy"] -= float((log_probs.exp() * log_probs).sum(-1).mean())
    return {name: total / len(EVAL) for name, total in sums.items()}
