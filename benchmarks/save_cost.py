"""What a durable save costs against stock `Trainer`'s: the same model, optimizer and run, saving in turns.

    python benchmarks/save_cost.py [--rounds 7] [--hidden 512] [--layers 8] [--folder DIR]

Each round saves once with each trainer, in another order each time, after everything written before has reached the
disk. Reported: medians over the rounds, the median of the ratios to stock within a round, bytes, and where the time of
a save goes. Stock leaves its bytes in the page cache for the system to write; ours are on the disk and have checksums.
So stock is also measured with every file flushed after the save, which is the least that makes it durable.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

from hf_radam import RAdam, RAdamTrainer, RAdamTrainingArguments
from hf_radam.checkpoints import storage
from hf_radam.checkpoints.models import model_folders

FLUSHED = "stock, flushed"
BLOCKS = [{"input_ids": row, "labels": row} for row in torch.randint(0, 1000, (16, 16)).tolist()]


def model(hidden: int, layers: int) -> LlamaForCausalLM:
    """A llama with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8000,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    )


def options(folder: Path) -> dict[str, Any]:
    """What the three runs have in common."""
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }


def trainers(folder: Path, make: Callable[[], LlamaForCausalLM]) -> dict[str, Trainer]:
    """The trainers compared, each after two updates with our RAdam."""
    stock_model = make()
    radam = RAdam(stock_model.parameters(), lr=1e-4)
    ours = {"optim": "radam", "adam_beta2": 0.99}
    made = {
        "stock": Trainer(
            stock_model,
            TrainingArguments(**options(folder / "stock"), lr_scheduler_type="constant"),
            train_dataset=BLOCKS,
            optimizers=(radam, None),
        ),
        "wsd": RAdamTrainer(
            make(),
            RAdamTrainingArguments(**options(folder / "wsd"), **ours, lr_scheduler_type="wsd", decay_steps=1),
            train_dataset=BLOCKS,
        ),
        "ewa": RAdamTrainer(
            make(), RAdamTrainingArguments(**options(folder / "ewa"), **ours, ewa=True), train_dataset=BLOCKS
        ),
    }
    for trainer in made.values():
        trainer.train()
    return made


@contextmanager
def timed(spent: dict[str, float], name: str):
    """Add the seconds inside to `spent[name]`."""
    began = time.perf_counter()
    try:
        yield
    finally:
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - began


def watch(spent: dict[str, float], owner: Any, attribute: str, name: str) -> None:
    """Let the calls of a function count as `name`. Those of threads add up and overlap with the rest."""
    original = getattr(owner, attribute)

    def counted(*args: Any, **kwargs: Any) -> Any:
        with timed(spent, name):
            return original(*args, **kwargs)

    setattr(owner, attribute, counted)


def size(folder: Path) -> int:
    """Bytes in the checkpoint of a run."""
    return sum(p.stat().st_size for p in folder.glob("checkpoint-*/**/*") if p.is_file())


def save(trainer: Trainer, *, flushed: bool = False) -> float:
    """Seconds of one save of a checkpoint that is not there yet; the disk is idle when it begins.

    Args:
        trainer: what saves.
        flushed: whether to bring the files to the disk afterwards, one after another, within the time.
    """
    run = Path(str(trainer.args.output_dir))
    for old in run.glob("*checkpoint-*"):
        shutil.rmtree(old)
    os.sync()
    began = time.perf_counter()
    trainer._save_checkpoint(trainer.model, None)
    if flushed:
        for file in run.glob("checkpoint-*/**/*"):
            storage.flush(file)
    return time.perf_counter() - began


def measure(made: dict[str, Trainer], rounds: int) -> dict[str, list[float]]:
    """Seconds of each save, by trainer, and of stock's with its files flushed; the first round only warms up."""
    names = [*made, FLUSHED]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = save(made["stock" if name == FLUSHED else name], flushed=name == FLUSHED)
            if turn:
                seconds[name].append(took)
    return seconds


def report(seconds: dict[str, list[float]], bytes_of: dict[str, int]) -> None:
    """Print medians, ranges and ratios."""
    print(f"{'':16} {'seconds':>8} {'range':>15} {'MB':>7} {'bytes':>6} {'time':>6} {'time, to ' + FLUSHED:>24}")
    for name, each in seconds.items():
        size_ = bytes_of.get(name, bytes_of["stock"])
        ratios = [
            statistics.median(a / b for a, b in zip(each, seconds[base], strict=True)) for base in ("stock", FLUSHED)
        ]
        spread = f"{min(each):.3f} to {max(each):.3f}"
        print(
            f"{name:16} {statistics.median(each):8.3f} {spread:>15} {size_ / 1e6:7.1f} "
            f"{size_ / bytes_of['stock']:5.2f}x {ratios[0]:5.2f}x {ratios[1]:23.2f}x"
        )


def parts(made: dict[str, Trainer], rounds: int) -> None:
    """Print where the time goes, by trainer, as means over further saves."""
    spent: dict[str, float] = {}
    watch(spent, storage, "sha256", "sha256 (threads)")
    watch(spent, storage, "flush", "fsync (threads)")
    watch(spent, storage.Sealing, "finish", "waiting for both")
    watch(spent, model_folders, "save_model_folder", "averaged model")
    for name, trainer in made.items():
        watch(spent, trainer, "_save_optimizer_and_scheduler", "optimizer")
        watch(spent, trainer, "_save", "model")
        spent.clear()
        total = sum(save(trainer) for _ in range(rounds)) / rounds
        print(f"{name}: {total:.3f} s, of which " + ", ".join(f"{k} {v / rounds:.3f}" for k, v in spent.items()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", help="where to save; by default a temporary folder")
    flags = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        made = trainers(Path(name), lambda: model(flags.hidden, flags.layers))
        count = sum(p.numel() for p in made["stock"].model.parameters())
        print(f"{count / 1e6:.1f} million parameters, {flags.rounds} rounds, {torch.get_num_threads()} threads")
        seconds = measure(made, flags.rounds)
        report(seconds, {name: size(Path(str(t.args.output_dir))) for name, t in made.items()})
        parts(made, flags.rounds)


if __name__ == "__main__":
    main()
