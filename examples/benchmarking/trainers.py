"""Whole updates of a training: stock `Trainer` with AdamW and `RAdamTrainer`, of one model on the same batches.

Every round trains each of them anew from the same weights, in turns, the next round beginning with the next of them.
What they do besides is the same and little: gradients clipped at 1, a constant learning rate, no logging, evaluation
or checkpoint. An update's seconds are those from the end of the one before to its own end, so the data, the average
and the callbacks are in them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_radam import RAdamTrainer, RAdamTrainingArguments

from .rows import hidden_of, width_of
from .timing import synchronize

STOCK = "Trainer, adamw_torch_fused"
TRAINERS: dict[str, dict[str, Any]] = {
    STOCK: {"optim": "adamw_torch_fused"},
    "RAdamTrainer, radam + EWA every update": {"optim": "radam", "ewa": True, "fused_optimizer": "true"},
    "RAdamTrainer, radam + EWA in its pass": {
        "optim": "radam",
        "ewa": True,
        "ewa_folded": True,
        "fused_optimizer": "true",
    },
    "RAdamTrainer, radam": {"optim": "radam", "fused_optimizer": "true"},
    "RAdamTrainer, radam_schedulefree": {"optim": "radam_schedulefree", "fused_optimizer": "true"},
}
"""What is given to each besides the arguments that all have."""
WARM_UP = 6
"""Updates of each training that do not count: they are RAdam's first phase."""


class Clock(TrainerCallback):
    """Note the time at the end of every update.

    Args:
        device: of the model; a GPU is waited for.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note it."""
        synchronize(self.device)
        self.ends.append(time.perf_counter())

    def counted(self) -> list[float]:
        """Seconds of each update that counts."""
        return [end - begin for begin, end in pairwise(self.ends[WARM_UP - 1 :])]


class Share(Clock):
    """Note besides the seconds that each step of the optimizer takes."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.steps: list[float] = []
        self._begin = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before it."""
        synchronize(self.device)
        self._begin = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After it."""
        synchronize(self.device)
        self.steps.append(time.perf_counter() - self._begin)

    def share(self) -> float:
        """Part of an update that the step takes, by their medians."""
        return statistics.median(self.steps[WARM_UP:]) / statistics.median(self.counted())


def model_config(millions: float) -> LlamaConfig:
    """The llama whose shapes the other tables have."""
    width = width_of(millions)
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=hidden_of(width),
        num_hidden_layers=8,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )


def train(
    name: str, config: LlamaConfig, *, batch: int, block: int, updates: int, device: torch.device, watch: Any
) -> Trainer:
    """Train one of them from the same weights on the same random tokens; `watch` is a callback."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    tokens = torch.randint(config.vocab_size, (updates * batch, block))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    own = TRAINERS[name]
    arguments_class, trainer_class = (
        (TrainingArguments, Trainer) if name == STOCK else (RAdamTrainingArguments, RAdamTrainer)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_class(
            folder,
            max_steps=updates,
            per_device_train_batch_size=batch,
            learning_rate=1e-4,
            weight_decay=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            seed=0,
            **own,
        )
        trainer = trainer_class(model, arguments, train_dataset=rows, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def compare(
    millions: float, *, batch: int, block: int, updates: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Time each of `TRAINERS`.

    Args:
        millions: of parameters, at most.
        batch: sequences of an update.
        block: tokens of a sequence.
        updates: of each training that count.
        rounds: trainings of each.
        device: where they train.

    Returns:
        For JSON: the shape of an update, which part of stock's the optimizer's step takes, and of each trainer the
        seconds of each update of each round, updates per second at their median, and for each round the ratio of its
        updates per second to stock's of that round (medians): what slows all of a round down is not in it.
    """
    config = model_config(millions)

    def once(name: str, watch: Any, *, counted: int = updates) -> Trainer:
        return train(name, config, batch=batch, block=block, updates=WARM_UP + counted, device=device, watch=watch)

    for name in TRAINERS:  # compiles
        trainer = once(name, Clock(device), counted=0)
    seconds: dict[str, list[list[float]]] = {name: [] for name in TRAINERS}
    names = [*TRAINERS]
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            clock = Clock(device)
            once(name, clock)
            seconds[name].append(clock.counted())
    share = Share(device)
    once(STOCK, share)
    stock = [statistics.median(round_) for round_ in seconds[STOCK]]
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "batch": batch,
        "block": block,
        "optimizer_share": share.share(),
        "rows": [
            {
                "name": name,
                "updates_per_second": 1 / statistics.median(sum(rounds_, [])),
                "to_stock": [ours / statistics.median(own) for ours, own in zip(stock, rounds_, strict=True)],
                "rounds": rounds_,
            }
            for name, rounds_ in seconds.items()
        ],
    }
