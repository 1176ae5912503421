"""The checkpoint of the best model is there, is named where it lies, and outlives rotation; the last one stays, too."""

import json
from pathlib import Path

import tiny

from hf_radam import RAdamTrainer, load_evaluation_model

SAVING = {"save_strategy": "steps", "save_steps": 5}
BEST = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


class Graded(RAdamTrainer):
    """Evaluations with given losses, by step."""

    losses: dict

    def _determine_best_metric(self, metrics, trial):
        return super()._determine_best_metric(metrics | {"eval_loss": self.losses[self.state.global_step]}, trial)


def graded(folder, losses, **options):
    args = tiny.arguments(folder, **tiny.METHODS["ewa"] | SAVING | BEST | options)
    trainer = Graded(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
    trainer.losses = losses
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
    losses = {5: 3.0, 10: 2.0, 15: 1.0, 20: 2.0}
    tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVING, learning_rate=1e-3).train()  # another run's checkpoint-15
    saves = []

    class Saved(tiny.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saves.append(state.global_step)

    trainer = graded(tmp_path, losses, save_steps=10)
    trainer.add_callback(Saved())
    trainer.train()
    assert saves == [5, 10, 15, 20]
    twin = tiny.trained(tmp_path / "twin", **tiny.METHODS["ewa"], max_steps=15)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-15")
    assert tiny.same(tiny.parameters(trainer.model), twin.average.averaged_state_dict())


def test_the_best_model_is_found_where_the_run_was_moved(tmp_path):
    losses = {5: 1.0, 10: 2.0, 15: 2.0, 20: 2.0}
    first = graded(tmp_path / "old", losses)
    first.add_callback(tiny.StopAfter(10))
    first.train()
    (tmp_path / "old").rename(tmp_path / "new")
    trainer = graded(tmp_path / "new", losses, save_strategy="best")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-5")
    shipped = load_evaluation_model(tmp_path / "new" / "checkpoint-5")
    assert tiny.same(tiny.parameters(trainer.model), tiny.parameters(shipped))


def test_the_best_checkpoint_is_kept_though_the_run_is_named_otherwise(tmp_path, monkeypatch):
    """The state of the first part names the best one by a relative path."""
    monkeypatch.chdir(tmp_path)
    options = tiny.METHODS["ewa"] | SAVING | {"eval_strategy": "steps", "eval_steps": 5, "greater_is_better": True}
    options |= {"metric_for_best_model": "loss", "save_total_limit": 2}
    tiny.trainer(Path("run"), **options, max_steps=10).train()
    tiny.trained(tmp_path / "run", **options, resume=True)
    assert names(tmp_path / "run") == ["checkpoint-20", "checkpoint-5"]
