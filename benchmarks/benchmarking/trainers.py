"""Whole updates of a training: stock `Trainer` with AdamW and `RAdamTrainer`, of one model on the same batches.

All train at the same time, each in a thread of its own, and take turns: one update of each, then the next of each, so
that what slows the machine down for a while slows all of them. What they do besides is the same and little: gradients
clipped at 1, a constant learning rate, no logging, evaluation or checkpoint. An update's seconds are those from the
beginning of its turn to its end, so the data, the average and the callbacks are in them.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
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


class Turns:
    """Lets one thread run at a time, each for an update.

    Args:
        count: of threads.
    """

    def __init__(self, count: int):
        self._batons = [threading.Semaphore(0) for _ in range(count)]
        self._left = set(range(count))
        self._next().release()

    def _next(self, after: int = -1) -> threading.Semaphore:
        number = min((n for n in self._left if n > after), default=min(self._left))
        return self._batons[number]

    def wait(self, number: int) -> None:
        """Wait for one's turn."""
        self._batons[number].acquire()

    def give(self, number: int, *, leave: bool = False) -> None:
        """Let the next one have its turn; `leave` takes none any more."""
        if leave:
            self._left.discard(number)
        if self._left:
            self._next(number).release()


class Clock(TrainerCallback):
    """Takes the time of every update, and of the optimizer's steps, and gives the turn away after it.

    Args:
        turns: with others.
        number: of this one among them.
        device: of the model; a GPU is waited for.
    """

    def __init__(self, turns: Turns, number: int, device: torch.device):
        self.turns = turns
        self.number = number
        self.device = device
        self.seconds: list[float] = []
        self.steps: list[float] = []
        self._begin = self._step = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first turn begins."""
        self._begin = self._now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the optimizer's step."""
        self._step = self._now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After it."""
        self.steps.append(self._now() - self._step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update has ended."""
        self.seconds.append(self._now() - self._begin)
        self.turns.give(self.number)
        self.turns.wait(self.number)
        self._begin = self._now()

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


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


def make(
    name: str, config: LlamaConfig, folder: str, *, batch: int, block: int, updates: int, device: torch.device
) -> Trainer:
    """One of them, with the same weights and the same random tokens as the others."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    tokens = torch.randint(config.vocab_size, (updates * batch, block))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments_class, trainer_class = (
        (TrainingArguments, Trainer) if name == STOCK else (RAdamTrainingArguments, RAdamTrainer)
    )
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
        **TRAINERS[name],
    )
    trainer = trainer_class(model, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def compare(millions: float, *, batch: int, block: int, updates: int, device: torch.device) -> dict[str, Any]:
    """Time each of `TRAINERS`.

    Args:
        millions: of parameters, at most.
        batch: sequences of an update.
        block: tokens of a sequence.
        updates: of each that count.
        device: where they train.

    Returns:
        For JSON: the shape of an update, which part of stock's the optimizer's step takes, and of each trainer the
        seconds of every update that counts, updates per second at their median, and the ratio of stock's seconds to
        its own for every update.

    Raises:
        Exception: whatever one of the trainings raises.
    """
    config, turns, failed = model_config(millions), Turns(len(TRAINERS)), []
    options: dict[str, Any] = {"batch": batch, "block": block, "updates": WARM_UP + updates, "device": device}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make(name, config, f"{folder}/{number}", **options) for number, name in enumerate(TRAINERS)}
        clocks = {name: Clock(turns, number, device) for number, name in enumerate(TRAINERS)}

        def run(name: str, number: int) -> None:
            turns.wait(number)
            try:
                trainers[name].train()
            except Exception as error:
                failed.append(error)
            finally:
                turns.give(number, leave=True)

        threads = []
        for number, name in enumerate(TRAINERS):
            trainers[name].add_callback(clocks[name])
            threads.append(threading.Thread(target=run, args=(name, number)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
    seconds = {name: clock.seconds[WARM_UP:] for name, clock in clocks.items()}
    stock = seconds[STOCK]
    return {
        "parameters": sum(parameter.numel() for parameter in trainers[STOCK].model.parameters()),
        "batch": batch,
        "block": block,
        "optimizer_share": statistics.median(clocks[STOCK].steps[WARM_UP:]) / statistics.median(stock),
        "rows": [
            {
                "name": name,
                "updates_per_second": 1 / statistics.median(own),
                "to_stock": [theirs / mine for theirs, mine in zip(stock, own, strict=True)],
                "seconds": own,
            }
            for name, own in seconds.items()
        ],
    }
