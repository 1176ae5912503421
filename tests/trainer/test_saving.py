"""Checkpoints have their name only when they are whole; what upstream says of them is true of the final place."""

import errno
import os
from concurrent.futures import Future
from pathlib import Path

import pytest
import tiny
from transformers import Trainer

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.manifest import CheckpointError, read_manifest
from hf_radam.checkpoints.storage import STAGING
from hf_radam.checkpoints.verify import verify_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 5}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_checkpoint_gets_its_name_last(tmp_path, monkeypatch):
    """At the rename it is whole and flushed: looked at from there."""
    seen = []
    rename = Path.rename

    def spy(path, target):
        if path.parent.name == STAGING and Path(target).parent == tmp_path:
            assert verify_checkpoint(path) == {} and read_manifest(path) is not None
            seen.append(Path(target).name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", spy)
    tiny.trainer(tmp_path, **tiny.METHODS["schedule_free_ewa"], **SAVING).train()
    assert seen == [f"checkpoint-{n}" for n in (5, 10, 15, 20)] == sorted(seen, key=lambda n: int(n[11:]))
    assert names(tmp_path) == sorted(seen)


def test_every_file_and_folder_is_flushed_before_the_rename(tmp_path, monkeypatch):
    flushed, at_rename = set(), []
    fsync, rename = os.fsync, Path.rename

    def spy(descriptor):
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        return fsync(descriptor)

    def renamed(path, target):
        if path.parent.name == STAGING and Path(target).parent == tmp_path:
            inside = {str(p) for p in path.rglob("*")} | {str(path)}
            at_rename.append(inside - flushed)
            flushed.clear()
        return rename(path, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("the names of open files are read in /proc")
    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(Path, "rename", renamed)
    tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING).train()
    assert at_rename == [set()] * 4
    assert str(tmp_path) in flushed  # the name itself


def test_rotation_keeps_what_upstream_keeps(tmp_path):
    """Oracle: stock `Trainer` with the same options."""
    options = SAVING | {
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "metric_for_best_model": "loss",
    }
    args = tiny.stock_arguments(tmp_path / "stock", **options)
    for greater in (True, False):
        args.greater_is_better = greater
        args.output_dir = str(tmp_path / f"stock{greater}")
        Trainer(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL).train()
        tiny.trainer(tmp_path / f"ours{greater}", **tiny.METHODS["ewa"], **options, greater_is_better=greater).train()
        assert names(tmp_path / f"stock{greater}") == names(tmp_path / f"ours{greater}")


def test_folders_of_the_users_own_are_not_rotated(tmp_path):
    (tmp_path / "checkpoint-best-of-all").mkdir()
    tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING, save_total_limit=1).train()
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-best-of-all"]


def test_what_is_being_uploaded_is_not_rotated_away(tmp_path, monkeypatch):
    uploads = []

    def keep(folder, path_in_repo):
        if path_in_repo is None:
            return None
        uploads.append((folder, Future()))
        return uploads[-1][1]

    tiny.spy_on_hub(monkeypatch, keep)
    hub = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True, "save_total_limit": 1}
    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING, **hub)
    seen = []

    class Finish(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (11, 19):  # the uploads so far come to their end
                seen.append([folder.is_dir() for folder, job in uploads if not job.done()])
                for _, job in uploads:
                    job.done() or job.set_result(None)

        def on_train_end(self, args, state, control, **kwargs):
            for _, job in uploads:
                job.done() or job.set_result(None)

    trainer.add_callback(Finish())
    trainer.train()
    assert seen == [[True, True], [True]]
    assert [name for name in names(tmp_path) if name.startswith("checkpoint")] == ["checkpoint-20"]


def test_save_only_model_is_evaluated_and_not_resumed(tmp_path, caplog):
    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING, save_only_model=True)
    trainer.train()
    assert (
        verify_checkpoint(tmp_path / "checkpoint-20") == {}
        and not (tmp_path / "checkpoint-20" / "optimizer.pt").exists()
    )
    shipped = load_evaluation_model(tmp_path)
    assert tiny.same(tiny.parameters(shipped), trainer.average.averaged_state_dict())
    with pytest.raises(CheckpointError, match="There is no whole checkpoint in .* to resume from"):
        tiny.trainer(tmp_path, **tiny.METHODS["ewa"]).train(resume_from_checkpoint=True)
    assert "checkpoint-20 has no optimizer.pt, so it cannot be resumed" in caplog.text


def test_what_is_pinned_can_be_resumed_whatever_save_only_model_says(tmp_path):
    options = tiny.METHODS["wsd"] | {"save_only_model": True, "save_strategy": "steps", "save_steps": 4}
    tiny.trainer(tmp_path, **options).train()
    has_optimizer = {p.parent.name: (p / "optimizer.pt").is_file() for p in tmp_path.glob("*/checkpoint-*")}
    assert has_optimizer == {"_pre_decay": True}
    assert [(tmp_path / f"checkpoint-{n}/optimizer.pt").is_file() for n in (8, 12, 16)] == [False, True, False]
    extended = tiny.trainer(tmp_path / "longer", **options, extend_from=str(tmp_path), max_steps=30)
    extended.train()
    planned = tiny.trainer(tmp_path / "planned", **options, max_steps=30)
    planned.train()
    assert tiny.same(tiny.parameters(extended.model), tiny.parameters(planned.model))


def test_stock_trainer_goes_on_and_its_checkpoints_are_stocks(tmp_path):
    """Our mark in the state is carried on by stock `Trainer`, and must not make its checkpoints ours."""
    common = {"optim": "adamw_torch", "lr_scheduler_type": "constant"} | SAVING
    tiny.trainer(tmp_path, **common, ewa=True, max_steps=10).train()
    args = tiny.stock_arguments(tmp_path, **common)
    Trainer(tiny.llama(), args, train_dataset=tiny.TRAIN).train(resume_from_checkpoint=True)
    assert read_manifest(tmp_path / "checkpoint-10") is not None and read_manifest(tmp_path / "checkpoint-15") is None
    again = tiny.trainer(tmp_path, **common, ewa=True, max_steps=25)
    again.train(resume_from_checkpoint=True)
    assert again.average.start_step == 20


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    """Every load of torch's goes through its restricted reader."""
    import pickle

    import torch

    options = tiny.METHODS["schedule_free_ewa"] | SAVING
    tiny.trainer(tmp_path, **options).train()
    loads = []
    load = torch.load

    def spy(*args, **kwargs):
        loads.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", spy)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    tiny.trainer(tmp_path, **options, max_steps=25).train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    load_evaluation_model(tmp_path / "checkpoint-15")
    assert loads and all(loads)


def test_a_run_that_begins_in_the_folder_of_another_is_told(tmp_path, caplog):
    options = tiny.METHODS["wsd"] | {"decay_steps": 5}
    tiny.trainer(tmp_path, **options).train()
    assert "of an earlier run" not in caplog.text
    tiny.trainer(tmp_path, **options).train()
    assert "_pre_decay/checkpoint-15 is of an earlier run. This one begins anew" in caplog.text


def test_a_refused_resume_is_refused_again(tmp_path):
    tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING).train()
    trainer = tiny.trainer(tmp_path / "x", **tiny.METHODS["ewa"], weight_decay=0.3)
    with pytest.raises(CheckpointError, match="trained with weight_decay=0.1"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for again in (str(tmp_path / "checkpoint-10"), None):
        with pytest.raises(RuntimeError, match="make a new trainer and model"):
            trainer.train(resume_from_checkpoint=again)


def test_a_resume_refused_for_its_length_is_refused_again(tmp_path):
    tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING).train()
    trainer = tiny.trainer(tmp_path / "x", **tiny.METHODS["ewa"])
    trainer.args.ewa_start_step, trainer.args.max_steps = 90, -1
    with pytest.raises(ValueError, match="leave no averaging"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    with pytest.raises(RuntimeError, match="make a new trainer and model"):
        trainer.train()


def test_going_back_to_an_earlier_checkpoint_is_told(tmp_path, caplog):
    tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING).train()
    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert "checkpoint-20 is later than" in caplog.text and "from which this run goes on" in caplog.text


def test_true_may_be_the_word_that_the_arguments_hold(tmp_path):
    tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING, max_steps=10).train()
    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"], resume_from_checkpoint="true")
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    twin = tiny.trainer(tmp_path / "twin", **tiny.METHODS["ewa"])
    twin.train()
    assert tiny.same(tiny.parameters(trainer.model), tiny.parameters(twin.model))


def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def of_files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING).train()
    assert verify_checkpoint(tmp_path / "checkpoint-20") == {}
