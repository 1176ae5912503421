"""Time a durable save against stock `Trainer`'s: the same model and optimizer, saving in turns.

    python benchmarks/save_cost.py [--rounds 7] [--hidden 512] [--layers 8] [--folder DIR]

Stock leaves its bytes in the page cache; hf_radam's are on the disk and have checksums. So stock is also timed with
every file flushed after the save, the least that makes it durable.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

from hf_radam import RAdam, RAdamTrainer, RAdamTrainingArguments
from hf_radam.checkpoints import storage

FLUSHED = "stock, flushed"
METHODS = {"wsd": {"lr_scheduler_type": "wsd", "decay_steps": 1}, "ewa": {"ewa": True}}


def trainers(folder: Path, hidden: int, layers: int) -> dict[str, Trainer]:
    """Make the trainers, each after two steps of RAdam."""
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 1000, (16, 16)).tolist()]
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    options: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 1e-4, "use_cpu": True}
    sizes = {"vocab_size": 8000, "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 8}
    made: dict[str, Trainer] = {}
    for name, flags in {"stock": {}, **METHODS}.items():
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, num_hidden_layers=layers))
        if name == "stock":
            arguments = TrainingArguments(str(folder / name), lr_scheduler_type="constant", **options, **quiet)
            radam = RAdam(model.parameters(), lr=1e-4)
            made[name] = Trainer(model, arguments, train_dataset=rows, optimizers=(radam, None))
        else:
            arguments = RAdamTrainingArguments(str(folder / name), optim="radam", **options, **quiet, **flags)
            made[name] = RAdamTrainer(model, arguments, train_dataset=rows)
        made[name].train()
    return made


def save(trainer: Trainer, *, flushed: bool) -> tuple[float, int]:
    """Save a checkpoint, with nothing left to write before; return its seconds and bytes."""
    run = Path(str(trainer.args.output_dir))
    for old in run.glob("*checkpoint-*"):
        shutil.rmtree(old)
    os.sync()
    began = time.perf_counter()
    trainer._save_checkpoint(trainer.model, None)
    files = [path for path in run.glob("checkpoint-*/**/*") if path.is_file()]
    if flushed:
        for file in files:
            storage.flush(file)
    return time.perf_counter() - began, sum(file.stat().st_size for file in files)


def main() -> None:
    """Measure and print medians, ranges, and medians of the ratios within a round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", help="where to save; default: a temporary folder")
    flags = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        made = trainers(Path(folder), flags.hidden, flags.layers)
        print(f"{made['stock'].model.num_parameters() / 1e6:.1f} million parameters, {flags.rounds} rounds")
        names = [*made, FLUSHED]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        size = {}
        for turn in range(flags.rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                took, size[name] = save(made["stock" if name == FLUSHED else name], flushed=name == FLUSHED)
                seconds[name] += [took] if turn else []  # the first round warms up
    for name, own in seconds.items():
        ratios = [statistics.median(a / b for a, b in zip(own, seconds[o], strict=True)) for o in ("stock", FLUSHED)]
        print(
            f"{name:16} {statistics.median(own):8.3f} s ({min(own):.3f} to {max(own):.3f}), {size[name] / 1e6:.1f} MB, "
            f"{ratios[0]:.2f} x stock, {ratios[1]:.2f} x {FLUSHED}"
        )


if __name__ == "__main__":
    main()
