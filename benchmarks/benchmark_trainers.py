"""Time whole steps of trainings: stock `Trainer` with AdamW and `RAdamTrainer`, with one model on the same batches.

All train at the same time, each in a thread, and take turns of one step, so that what slows the machine down slows all.
Gradients are clipped, the learning rate is constant, nothing is logged, evaluated or saved; data, average and callbacks
are in a step's seconds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmark_rows import llama, synchronize
from hf_radam import RAdamTrainer, RAdamTrainingArguments

STOCK = "Trainer, adamw_torch_fused"
TRAINERS: dict[str, dict[str, Any]] = {
    STOCK: {"optim": "adamw_torch_fused"},
    "RAdamTrainer, radam + EWA every step": {"optim": "radam", "ewa": True, "fused_optimizer": "true"},
    "RAdamTrainer, radam": {"optim": "radam", "fused_optimizer": "true"},
    "RAdamTrainer, radam_schedulefree": {"optim": "radam_schedulefree", "fused_optimizer": "true"},
}
"""Arguments of each besides those that all have."""
WARM_UP = 6
"""Steps of each training that do not count: RAdam's first phase."""


class Clock(TrainerCallback):
    """Times every step and its optimizer step; waits for `own` before a step and releases `following` after it."""

    def __init__(self, own: Semaphore, following: Semaphore, device: torch.device):
        self.own, self.following, self._device = own, following, device
        self.seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self._begin = self._optimizer_begin = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the first step."""
        self._begin = self._now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the optimizer step."""
        self._optimizer_begin = self._now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the optimizer step."""
        self.optimizer_seconds.append(self._now() - self._optimizer_begin)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the turn, and wait for the next."""
        self.seconds.append(self._now() - self._begin)
        self.following.release()
        self.own.acquire()
        self._begin = self._now()

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()


def _trainer(name: str, width: int, folder: str, *, batch: int, block: int, steps: int, cpu: bool) -> Trainer:
    """Make one of `TRAINERS`, with the same weights and random tokens as the others."""
    torch.manual_seed(0)
    model = llama(width)
    tokens = torch.randint(8192, (steps * batch, block))
    arguments = (TrainingArguments if name == STOCK else RAdamTrainingArguments)(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-4,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=cpu,
        **TRAINERS[name],
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = (Trainer if name == STOCK else RAdamTrainer)(model, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def time_trainers(width: int, *, batch: int, block: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Time `steps` steps of each of `TRAINERS`, with `batch` sequences of `block` tokens.

    Returns:
        For JSON: the shape of a step, the share of the optimizer step in stock's, and of each trainer the seconds of
        every step that counts, steps per second at their median, and the ratio of stock's seconds to its own.
    """
    options: dict[str, Any] = {"batch": batch, "block": block, "steps": WARM_UP + steps, "cpu": device.type == "cpu"}
    turns = [Semaphore(0) for _ in TRAINERS]
    clocks = [Clock(own, following, device) for own, following in zip(turns, turns[1:] + turns[:1], strict=True)]

    def run(trainer: Trainer, clock: Clock) -> None:
        trainer.add_callback(clock)
        clock.own.acquire()
        try:
            trainer.train()
            clock.following.release()
        except BaseException:
            for turn in turns:
                turn.release(2 * (WARM_UP + steps))  # the others end without it
            raise

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(TRAINERS)) as threads:
        trainers = [_trainer(name, width, f"{folder}/{number}", **options) for number, name in enumerate(TRAINERS)]
        running = [threads.submit(run, *pair) for pair in zip(trainers, clocks, strict=True)]
        turns[0].release()
        for training in running:
            training.result()
    stock = clocks[0].seconds[WARM_UP:]
    return {
        "parameters": trainers[0].model.num_parameters(),
        "batch": batch,
        "block": block,
        "optimizer_share": statistics.median(clocks[0].optimizer_seconds[WARM_UP:]) / statistics.median(stock),
        "rows": [
            {
                "name": name,
                "steps_per_second": 1 / statistics.median(clock.seconds[WARM_UP:]),
                "to_stock": [a / b for a, b in zip(stock, clock.seconds[WARM_UP:], strict=True)],
                "seconds": clock.seconds[WARM_UP:],
            }
            for name, clock in zip(TRAINERS, clocks, strict=True)
        ],
    }
