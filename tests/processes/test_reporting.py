"""What two real processes report to wandb and trackio, tensorboard beside them, and who writes the model card.

Oracles: `state.log_history`, and names written out here. wandb runs offline and its file is read by its own messages,
trackio's database by its own functions. Each runs in a process of the harness, as both keep threads and services.
"""

from __future__ import annotations

import json
import os
import struct
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
    "eval_a_raw_loss": "eval_raw/a_loss",
    "eval_b_loss": "eval/b_loss",
    "eval_b_raw_loss": "eval_raw/b_loss",
}
OPTIONS = tiny.METHODS["ewa"] | {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "dataloader_pin_memory": False,
    "ewa_eval_raw": True,
    "ewa_every": 2,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
}


def report(folder: Path, backend: str) -> tuple[int, list[dict[str, Any]]]:
    """Rank and history of a training that reports to all three."""
    args = tiny.arguments(
        folder,
        **OPTIONS | harness.arguments(backend),
        report_to=["tensorboard", "wandb", "trackio"],
        run_name="run",
        project="project",
    )
    datasets = {"a": tiny.EVAL, "b": tiny.EVAL[:4]}
    trainer = RAdamTrainer(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=datasets)
    trainer.train()
    assert harness.is_really(trainer, backend)
    trainer.evaluate()
    if trainer.is_world_process_zero():
        import trackio
        import wandb

        trackio.finish()
        wandb.finish()
        wandb.teardown()  # waits for the service that writes the file
    return trainer.args.process_index, trainer.state.log_history


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a run: a LevelDB log of protobuf records, in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, content, rows = file.read_bytes(), 7, b"", []
    while at < len(data):
        if 32768 - at % 32768 < 7:  # too short for another header: filled up
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        content += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(content)
            content = b""
            if record.WhichOneof("record_type") == "history":
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


def trackio_rows() -> list[dict[str, Any]]:
    """The rows of the run in the database under TRACKIO_DIR."""
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs("project", "run")


def same(row: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether a row has what the history has, by its names, and nothing else of it."""
    found = {name: row[name] for name in row if name in NAMES.values() or "raw" in name or "loss" in name}
    expected = {NAMES[key]: pytest.approx(entry[key], rel=1e-12) for key in entry if key in NAMES}
    return found == expected and row["train/global_step"] == entry["step"]


def test_two_processes_report_once_and_by_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (rank, history), (other, same_history) = harness.run(report, tmp_path, "ddp", backend="ddp")
    assert (rank, other) == (0, 1)
    timed = ("runtime", "per_second")
    both = [[{k: v for k, v in e.items() if not k.endswith(timed)} for e in h] for h in (history, same_history)]
    assert both[0] == both[1]
    half_lives = {entry["step"]: entry["ewa_half_life"] for entry in history if "ewa_half_life" in entry}
    assert half_lives == pytest.approx({2: 0.0, 3: 0.0, 4: 0.25, 5: 0.25, 6: 0.375}, rel=1e-9)

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (stored,) = harness.run(trackio_rows, backend="one")
    assert len(list(tmp_path.rglob("events.*"))) == 2  # of the training, and of the evaluation after it
    for rows in (wandb_rows(file), stored):
        assert len(rows) == len(history) == 6 + 4 + 1 + 2  # losses, evaluations, the end, evaluations
        assert all(same(row, entry) for row, entry in zip(rows, history, strict=True))
        assert [sorted(set(row) & {"eval_raw/a_loss", "eval_raw/b_loss"}) for row in rows[-2:]] == [
            ["eval_raw/a_loss"],
            ["eval_raw/b_loss"],
        ]


def upload(folder: Path) -> None:
    """A training whose callback uploads the final model, and the weights before and after."""
    os.environ["WANDB_LOG_MODEL"] = "end"
    trainer = tiny.trainer(folder, **tiny.METHODS["schedule_free_ewa"], report_to="wandb", max_steps=6)
    trainer.train()
    assert not any("on_train_end" in vars(callback) for callback in trainer.callback_handler.callbacks)
    trainer.save_model(str(folder / "shipped"))
    trainer.model.save_pretrained(folder / "trained")
    import wandb

    wandb.finish()
    wandb.teardown()


def test_wandb_uploads_the_evaluation_weights_as_the_final_model(tmp_path, monkeypatch):
    """Offline, the files of an artifact stay where wandb stages them."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    harness.run(upload, tmp_path / "run", backend="one")
    weights = {name: load_file(tmp_path / "run" / name / "model.safetensors") for name in ("shipped", "trained")}
    assert not tiny.same(weights["shipped"], weights["trained"])
    staged = [found for file in (tmp_path / "wandb").rglob("*") if (found := weights_in(file)) is not None]
    assert len(staged) >= 1 and all(tiny.same(found, weights["shipped"]) for found in staged)


def weights_in(file: Path) -> dict[str, Any] | None:
    """What a file holds, if it is one of safetensors, whatever its name."""
    if not file.is_file() or not file.read_bytes()[8:].startswith(b'{"'):
        return None
    return load_file(file)


def write_card(folder: Path, backend: str) -> list[bool]:
    """Whether the card is there after each process has been asked to write it, the second one first."""
    options = OPTIONS | harness.arguments(backend) | {"save_strategy": "steps", "save_steps": 6}
    trainer = tiny.trainer(folder, **options)
    trainer.train()
    assert harness.is_really(trainer, backend)
    trainer.save_model()
    there = []
    for rank in (1, 0):
        if trainer.args.process_index == rank:
            trainer.create_model_card()
        dist.barrier()
        there.append((folder / "README.md").is_file())
        dist.barrier()
    return there


@pytest.mark.parametrize("backend", ["ddp", "fsdp2_sharded"])
def test_the_first_process_alone_writes_the_card(tmp_path, backend, monkeypatch):
    assert harness.run(write_card, tmp_path, backend, backend=backend) == [[False, True]] * 2
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "a half-life of 0.0625 of the updates since it began; 0.375 updates after update 6" in card
    assert "from transformers import AutoModelForCausalLM\n" in card  # FSDP2 gives the class another name
    assert ("`hf-radam consolidate checkpoint-6` puts together" in card) == (backend == "fsdp2_sharded")
    assert ('from_pretrained("checkpoint-6/ewa")' in card) == (backend == "ddp")
    assert 'load_evaluation_model("checkpoint-6")' in card
    shipped = load_evaluation_model(tmp_path)
    assert tiny.same(tiny.parameters(shipped), tiny.parameters(load_evaluation_model(tmp_path / "checkpoint-6")))
