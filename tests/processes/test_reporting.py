"""What two real processes report to wandb, trackio and tensorboard, and who writes the model card.

Oracles: `state.log_history`, and names written out here. wandb runs offline, trackio's database is read by its own
functions. Each runs in a process of the harness, as both keep threads and services.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch.distributed as dist
from processes import harness
from safetensors.torch import load_file

from hf_radam import RAdamTrainer, load_evaluation_model

NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "ewa_half_life": "train/ewa_half_life",
    "eval_a_loss": "eval/a_loss",
    "eval_b_loss": "eval/b_loss",
}
OPTIONS = tiny.METHODS["ewa"] | {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "dataloader_pin_memory": False,
    "ewa_every": 2,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 6,
}


def train(folder: Path, backend: str, **options: Any) -> RAdamTrainer:
    args = tiny.arguments(folder, **OPTIONS | harness.arguments(backend) | options)
    datasets = {"a": tiny.EVAL, "b": tiny.EVAL[:4]}
    trainer = RAdamTrainer(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=datasets)
    trainer.train()
    assert harness.is_really(trainer, backend)
    return trainer


def report(folder: Path, backend: str) -> list[dict[str, Any]]:
    """The history of a training that reports to all three."""
    loggers = {"report_to": ["tensorboard", "wandb", "trackio"], "run_name": "run", "project": "project"}
    trainer = train(folder, backend, eval_strategy="steps", eval_steps=3, **loggers)
    trainer.evaluate()
    check_card(trainer)
    if trainer.is_world_process_zero():
        import trackio
        import wandb

        trackio.finish()
        wandb.finish()
        wandb.teardown()  # waits for the service that writes the file
    return trainer.state.log_history


def same(row: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether a row has what the history has, by its names, and nothing else of it."""
    found = {name: row[name] for name in row if name in NAMES.values() or "loss" in name}
    expected = {NAMES[key]: pytest.approx(entry[key], rel=1e-12) for key in entry if key in NAMES}
    return found == expected and row["train/global_step"] == entry["step"]


def test_two_processes_report_once_and_by_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    history, other = harness.run(report, tmp_path, "ddp", backend="ddp")
    timed = ("runtime", "per_second")
    first, second = ([{k: v for k, v in e.items() if not k.endswith(timed)} for e in h] for h in (history, other))
    assert first == second
    half_lives = {entry["step"]: entry["ewa_half_life"] for entry in history if "ewa_half_life" in entry}
    assert half_lives == pytest.approx({2: 0.0, 3: 0.0, 4: 0.25, 5: 0.25, 6: 0.375}, rel=1e-9)
    assert len([*tmp_path.glob("wandb/offline-run-*/run-*.wandb")]) == 1
    assert len(list(tmp_path.rglob("events.*"))) == 2  # of the training, and of the evaluation after it
    (rows,) = harness.run(upload_and_read, tmp_path / "run", backend="one")
    assert len(rows) == len(history) == 6 + 4 + 1 + 2  # losses, evaluations, the end, evaluations
    assert all(same(row, entry) for row, entry in zip(rows, history, strict=True))

    weights = {name: load_file(tmp_path / "run" / name / "model.safetensors") for name in ("shipped", "trained")}
    assert not tiny.same(weights["shipped"], weights["trained"])
    files = [file for file in (tmp_path / "artifacts").rglob("*") if file.is_file()]
    staged = [load_file(file) for file in files if file.read_bytes()[8:].startswith(b'{"')]
    assert staged and all(tiny.same(found, weights["shipped"]) for found in staged)


def upload_and_read(folder: Path) -> list[dict[str, Any]]:
    """Train with a callback that uploads the final model; return the rows of the run before in trackio's database.

    Offline, the files of an artifact stay where wandb stages them.
    """
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("project", "run")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ[name] = str(folder.with_name("artifacts"))
    os.environ["WANDB_LOG_MODEL"] = "end"
    trainer = tiny.trainer(folder, **tiny.METHODS["schedule_free_ewa"], report_to="wandb", max_steps=6)
    trainer.train()
    trainer.save_model(str(folder / "shipped"))
    trainer.model.save_pretrained(folder / "trained")
    import wandb

    wandb.finish()
    wandb.teardown()
    return rows


def check_card(trainer: RAdamTrainer) -> None:
    """The first process alone writes the model card, in either order of the calls."""
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    for rank in (1, 0):
        if trainer.args.process_index == rank:
            trainer.create_model_card()
        dist.barrier()
        assert (folder / "README.md").is_file() == (rank == 0)
        dist.barrier()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "from transformers import AutoModelForCausalLM\n" in card  # FSDP2 gives the class another name


def train_and_check_card(folder: Path) -> None:
    check_card(train(folder, "fsdp2_sharded"))


def test_the_first_process_alone_writes_the_card_of_a_sharded_model(tmp_path):
    harness.run(train_and_check_card, tmp_path, backend="fsdp2_sharded")
    shipped, saved = load_evaluation_model(tmp_path), load_evaluation_model(tmp_path / "checkpoint-6")
    assert tiny.same(tiny.parameters(shipped), tiny.parameters(saved))
