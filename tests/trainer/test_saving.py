"""Checkpoints have their name only when they are complete; what upstream says of them is true of the final place."""

import errno
import json
import os
import pickle
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
import tiny
import torch
from transformers import Trainer

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.manifest import CheckpointError, read_manifest
from hf_radam.checkpoints.storage import STAGING
from hf_radam.checkpoints.verify import verify_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 5}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a finished run with checkpoints after 5, 10, 15 and 20 steps."""
    folder = tmp_path_factory.mktemp("finished")
    tiny.trainer(folder, **tiny.METHODS["ewa"], **SAVING).train()
    return folder


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the names of open files are read in /proc")
def test_a_checkpoint_is_verified_and_flushed_when_it_gets_its_name(tmp_path, monkeypatch):
    """Also on a file system that cannot flush folders, and says so."""
    flushed, renamed = set(), []
    fsync, rename = os.fsync, Path.rename

    def flush(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed.add(path)
        if os.path.isdir(path):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    def look(path, target):
        if path.parent.name == STAGING and Path(target).parent == tmp_path:
            assert {str(path), *map(str, path.rglob("*"))} <= flushed
            assert verify_checkpoint(path) == {} and read_manifest(path) is not None
            renamed.append(Path(target).name)
            flushed.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", look)
    tiny.trainer(tmp_path, **tiny.METHODS["schedule_free_ewa"], **SAVING).train()
    assert renamed == [f"checkpoint-{n}" for n in (5, 10, 15, 20)] and names(tmp_path) == sorted(renamed)
    assert str(tmp_path) in flushed  # the name itself


def test_rotation_keeps_what_upstream_keeps_and_folders_of_the_users_own(tmp_path):
    """Oracle: stock `Trainer` with the same options; the first evaluation is the best."""
    best = {"eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "loss", "greater_is_better": True}
    options = SAVING | best | {"save_total_limit": 2}
    args = tiny.stock_arguments(tmp_path / "stock", **options)
    Trainer(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL).train()
    (tmp_path / "ours" / "checkpoint-best-of-all").mkdir(parents=True)
    tiny.trainer(tmp_path / "ours", **tiny.METHODS["ewa"], **options).train()
    assert names(tmp_path / "ours") == [*names(tmp_path / "stock"), "checkpoint-best-of-all"]


def test_what_is_being_uploaded_is_not_rotated_away(tmp_path, monkeypatch):
    uploads: dict[str, Future] = {}
    tiny.spy_on_hub(monkeypatch, lambda folder, path: uploads.setdefault(path, Future()) if path else None)
    hub = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True, "save_total_limit": 1}
    seen = []

    class Finish(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (11, 19):
                seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
                self.on_train_end()

        def on_train_end(self, *args, **kwargs):
            for job in uploads.values():
                job.done() or job.set_result(None)

    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING, **hub)
    trainer.add_callback(Finish())
    trainer.train()
    assert seen == [["checkpoint-10", "checkpoint-5"], ["checkpoint-15"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-20"]


def test_stock_trainer_continues_and_its_checkpoints_are_stock(tmp_path):
    """Stock `Trainer` keeps the mark of this package in the state, which must not mark its checkpoints."""
    common = {"optim": "adamw_torch", "lr_scheduler_type": "constant"} | SAVING
    tiny.trainer(tmp_path, **common, ewa=True, max_steps=10).train()
    args = tiny.stock_arguments(tmp_path, **common)
    Trainer(tiny.llama(), args, train_dataset=tiny.TRAIN).train(resume_from_checkpoint=True)
    assert read_manifest(tmp_path / "checkpoint-10") is not None and read_manifest(tmp_path / "checkpoint-15") is None


def test_a_run_that_begins_in_the_folder_of_another_is_logged(tmp_path, caplog):
    options = tiny.METHODS["wsd"] | {"decay_steps": 2, "max_steps": 3}
    tiny.trainer(tmp_path, **options).train()
    assert "earlier run" not in caplog.text
    tiny.trainer(tmp_path, **options).train()
    assert "_pre_decay/checkpoint-1 belongs to an earlier run. This run starts anew" in caplog.text


def test_save_only_model_is_evaluated_and_not_resumed(tmp_path, caplog):
    trainer = tiny.trained(tmp_path, **tiny.METHODS["ewa"], **SAVING, save_only_model=True)
    checkpoint = tmp_path / "checkpoint-20"
    assert verify_checkpoint(checkpoint) == {} and not (checkpoint / "optimizer.pt").exists()
    assert tiny.same(tiny.parameters(load_evaluation_model(tmp_path)), trainer.average.averaged_state_dict())
    with pytest.raises(CheckpointError, match="There is no complete checkpoint in .* to resume from"):
        tiny.trainer(tmp_path, **tiny.METHODS["ewa"]).train(resume_from_checkpoint=True)
    assert "checkpoint-20 has no optimizer.pt, so it cannot be resumed" in caplog.text


def test_nothing_is_unpickled(tmp_path, finished_run, monkeypatch):
    """Each file that torch loads goes through its restricted reader."""
    loads, load = [], torch.load

    def spy(*args, **kwargs):
        loads.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    monkeypatch.delattr(pickle, "load")
    monkeypatch.delattr(pickle, "loads")
    checkpoint = finished_run / "checkpoint-15"
    tiny.trainer(tmp_path, **tiny.METHODS["ewa"]).train(resume_from_checkpoint=str(checkpoint))
    load_evaluation_model(checkpoint)
    assert loads and all(loads)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"weight_decay": 0.3}, "trained with weight_decay=0.1"), ({"ewa_start_step": 90}, "leave no averaging")],
)
def test_a_refused_resume_is_refused_again(tmp_path, finished_run, changed, message):
    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"])
    for name, value in changed.items():
        setattr(trainer.args, name, value)
    checkpoint = str(finished_run / "checkpoint-10")
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=checkpoint)
    for again in (checkpoint, None):
        with pytest.raises(RuntimeError, match="Make a new trainer and model"):
            trainer.train(resume_from_checkpoint=again)


def test_an_earlier_checkpoint_may_be_resumed_by_name_or_as_the_newest(tmp_path, finished_run, caplog):
    run = shutil.copytree(finished_run, tmp_path / "run")
    tiny.trainer(run, **tiny.METHODS["ewa"]).train(resume_from_checkpoint=str(run / "checkpoint-10"))
    assert "checkpoint-20 is later than" in caplog.text and "from which this run resumes" in caplog.text
    shutil.rmtree(run / "checkpoint-20")
    trainer = tiny.trained(run, **tiny.METHODS["ewa"], resume="true")  # the text that the arguments may hold
    weights = load_evaluation_model(finished_run / "checkpoint-20")
    assert tiny.same(tiny.parameters(weights), trainer.average.averaged_state_dict())


# ---- The best model ----

BEST = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "metric_for_best_model": "grade"}


def graded(folder, grades, **options):
    """A trainer whose evaluations have given grades, by step; the lowest is the best."""
    trainer = tiny.trainer(folder, **tiny.METHODS["ewa"] | SAVING | BEST | {"greater_is_better": False} | options)
    trainer.compute_metrics = lambda prediction: {"grade": grades[trainer.state.global_step]}
    return trainer


def test_the_last_checkpoint_stays_beside_the_best_one(tmp_path):
    """Upstream ends a run with a limit of 1 by removing all but the best; then no run could be resumed from its end."""
    trainer = graded(tmp_path, {5: 1.0, 10: 2.0, 15: 3.0, 20: 4.0}, save_total_limit=1)
    trainer.train()
    best = str(tmp_path / "checkpoint-5")
    assert trainer.state.best_model_checkpoint == best and names(tmp_path) == ["checkpoint-20", "checkpoint-5"]
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"] == best
    assert trainer.args.save_total_limit == 1


def test_the_best_model_has_a_checkpoint_though_evaluations_are_more_frequent_than_saves(tmp_path):
    grades = {5: 3.0, 10: 2.0, 15: 1.0, 20: 2.0}
    tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING, learning_rate=1e-3).train()  # another run's checkpoint-15
    saves = []

    class Saved(tiny.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saves.append(state.global_step)

    trainer = graded(tmp_path, grades, save_steps=10)
    trainer.add_callback(Saved())
    trainer.train()
    assert saves == [5, 10, 15, 20]
    twin = tiny.trained(tmp_path / "twin", **tiny.METHODS["ewa"], max_steps=15)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-15")
    assert tiny.same(tiny.parameters(trainer.model), twin.average.averaged_state_dict())


@pytest.mark.parametrize("name", ["moved", "run"])
def test_the_best_checkpoint_is_found_and_kept_under_another_path(tmp_path, monkeypatch, name):
    """Where the run was moved, or is named by another path than in the state of its first part."""
    monkeypatch.chdir(tmp_path)
    grades = {5: 1.0, 10: 2.0, 15: 2.0, 20: 2.0}
    graded(Path("run"), grades, max_steps=10, load_best_model_at_end=False).train()
    Path("run").rename(name)
    trainer = graded(tmp_path / name, grades, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    assert names(name) == ["checkpoint-20", "checkpoint-5"]
    assert Path(trainer.state.best_model_checkpoint).resolve() == tmp_path / name / "checkpoint-5"
    shipped = load_evaluation_model(tmp_path / name / "checkpoint-5")
    assert tiny.same(tiny.parameters(trainer.model), tiny.parameters(shipped))
