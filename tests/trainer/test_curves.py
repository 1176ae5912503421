"""What stands in the logs, and where tensorboard draws it: read with tensorboard's own reader from the event file.

Oracles: `state.log_history`, names written out here, the formulas of the two windows, upstream's trainer. For wandb and
trackio see `processes/test_reporting.py`.
"""

import math
import re

import numpy as np
import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from hf_radam import RAdamTrainer

LOGGED = {"logging_strategy": "steps", "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 10}
BOTH = {"a": tiny.EVAL, "b": tiny.EVAL[:4]}
NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "ewa_half_life": "train/ewa_half_life",
    "eval_a_loss": "eval/a_loss",
    "eval_a_raw_loss": "eval_raw/a_loss",
    "eval_b_loss": "eval/b_loss",
    "eval_b_raw_loss": "eval_raw/b_loss",
    "eval_a_raw_score": "eval/a_raw_score",  # a metric that the user called raw_score
    "eval_a_raw_raw_score": "eval_raw/a_raw_score",
    "eval_b_raw_score": "eval/b_raw_score",
    "eval_b_raw_raw_score": "eval_raw/b_raw_score",
}


def score(prediction):
    return {"raw_score": float(np.abs(prediction.predictions).mean())}


def trainer(folder, cls=RAdamTrainer, datasets=BOTH, callbacks=None, **options):
    make = tiny.stock_arguments if cls is Trainer else tiny.arguments
    args = make(folder, **LOGGED | options)
    return cls(
        tiny.llama(),
        args,
        train_dataset=tiny.TRAIN,
        eval_dataset=datasets,
        compute_metrics=score,
        callbacks=callbacks,
    )


def events(folder) -> dict[str, list[tuple[int, float]]]:
    """Every curve in a folder of tensorboard's, in the order of the updates."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events.*")):
        reader = EventAccumulator(str(file))
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            curves.setdefault(tag, []).extend((e.step, e.value) for e in reader.Scalars(tag))
    return {tag: sorted(points) for tag, points in curves.items()}


def recorded(trainer, key) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]


def close(points):
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in points]  # float32 in the file


def test_raw_and_averaged_curves_have_one_name_in_two_groups(tmp_path):
    ours = trainer(tmp_path, **tiny.METHODS["ewa"], ewa_eval_raw=True, report_to="tensorboard")
    ours.train()
    ours.evaluate()  # after on_train_end, which closes the writer
    curves = events(tmp_path)
    for key, name in NAMES.items():
        assert curves[name] == close(recorded(ours, key)), key
    assert len(curves["eval_raw/a_loss"]) == 3 and len(curves["train/loss"]) == 10
    assert {name for name in curves if "raw" in name} == {name for name in NAMES.values() if "raw" in name}


def test_callbacks_of_the_user_draw_the_same_and_see_the_names_of_the_history(tmp_path):
    """An instance with a writer of its own, one of a class derived from upstream's, and one that only looks."""

    class Derived(TensorBoardCallback):
        """As a user derives one."""

    class Looks(TrainerCallback):
        seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append({**logs, "step": state.global_step})

    writers = [SummaryWriter(str(tmp_path / "own")), SummaryWriter(str(tmp_path / "derived"))]
    given = [TensorBoardCallback(writers[0]), Derived(writers[1])]
    ours = trainer(tmp_path, **tiny.METHODS["ewa"], ewa_eval_raw=True, datasets=tiny.EVAL, callbacks=given[:1])
    ours.add_callback(given[1])
    ours.add_callback(Looks)
    ours.evaluate()
    assert [callback.tb_writer for callback in given] == writers and given[0]._SummaryWriter is SummaryWriter
    ours.train()
    seen = Looks.seen[1:-1]  # the history is begun anew by train(), and upstream's printer takes flos out of the last
    assert seen == ours.state.log_history[:-1] and len(seen) == 12
    told = [(entry["step"], entry["eval_raw_loss"]) for entry in Looks.seen if "eval_raw_loss" in entry]
    for folder in ("own", "derived"):
        curves = events(tmp_path / folder)
        assert curves["eval_raw/loss"] == close(told) and len(told) == 3
        assert "eval/raw_loss" not in curves


def test_without_our_methods_the_curves_are_upstreams(tmp_path):
    drawn = []
    for cls in (Trainer, RAdamTrainer):
        stock = trainer(tmp_path / cls.__name__, cls, report_to="tensorboard")
        stock.train()
        timed = re.compile("runtime|per_second")
        drawn.append({name: c for name, c in events(tmp_path / cls.__name__).items() if not timed.search(name)})
    assert drawn[0] == drawn[1]
    assert "eval/a_raw_score" in drawn[1] and "train/ewa_half_life" not in drawn[1]


WINDOWS = [
    {},
    {"ewa_every": 3, "ewa_start_step": 5},
    {"ewa_decay": 0.9},
    {"ewa_decay": 0.9, "ewa_every": 3, "ewa_start_step": 5},
]


def half_life(update, *, ewa_decay=None, ewa_every=1, ewa_start_step=0):
    """By the formulas of the windows, from how much of the older points an averaging keeps; None before the first."""
    count = (update - ewa_start_step) // ewa_every
    if count < 1:
        return None
    if count == 1:
        return 0.0
    if ewa_decay is None:
        return 0.0625 * count * ewa_every
    sums = [sum(ewa_decay ** (ewa_every * i) for i in range(n)) for n in (count - 1, count)]
    return ewa_every / -math.log2(ewa_decay**ewa_every * sums[0] / sums[1])


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_every_training_loss_says_how_far_back_the_average_looks(tmp_path, window):
    options = {"optim": "radam", "ewa": True, "logging_steps": 1, "datasets": tiny.EVAL} | window
    twin = trainer(tmp_path, **options, save_strategy="steps", save_steps=7)
    twin.train()
    losses = [entry for entry in twin.state.log_history if "loss" in entry]
    expected = {update: half_life(update, **window) for update in range(1, 21)}
    expected = {update: value for update, value in expected.items() if value is not None}
    assert {e["step"]: e["ewa_half_life"] for e in losses if "ewa_half_life" in e} == pytest.approx(expected, rel=1e-9)
    assert [entry["step"] for entry in losses] == list(range(1, 21))
    assert not any("ewa_half_life" in entry for entry in twin.state.log_history if "loss" not in entry)

    again = trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert [entry for entry in again.state.log_history if "loss" in entry] == losses


def test_the_best_model_has_no_training_weights_to_report(tmp_path, caplog):
    saved = {"save_strategy": "steps", "save_steps": 10, "load_best_model_at_end": True}
    saved |= {"metric_for_best_model": "loss", "report_to": "tensorboard"}
    ours = trainer(tmp_path, **tiny.METHODS["ewa"], ewa_eval_raw=True, datasets=tiny.EVAL, **saved)
    ours.train()
    metrics = ours.evaluate()
    assert metrics["eval_loss"] == pytest.approx(ours.state.best_metric, abs=2e-6) and "eval_raw_loss" not in metrics
    assert len(events(tmp_path)["eval_raw/loss"]) == 2 and len(events(tmp_path)["eval/loss"]) == 3


def test_inside_of_the_evaluation_weights_there_are_no_training_weights_to_report(tmp_path, caplog):
    ours = trainer(tmp_path, **tiny.METHODS["ewa"], ewa_eval_raw=True, datasets=tiny.EVAL)
    ours.train()
    outside = ours.evaluate()
    with ours.evaluation_weights():
        inside = ours.evaluate()
    assert "evaluate outside for the metrics of the training weights" in caplog.text
    assert inside["eval_loss"] == outside["eval_loss"] and inside["eval_raw_score"] == outside["eval_raw_score"]
    assert {"eval_raw_loss", "eval_raw_raw_score"} <= outside.keys() - inside.keys()


def test_a_metric_with_the_name_of_another_of_the_training_weights_is_refused(tmp_path):
    ours = trainer(tmp_path, **tiny.METHODS["ewa"], ewa_eval_raw=True)
    ours.compute_metrics = lambda prediction: {"x": 1.0, "raw_x": 2.0}
    with pytest.raises(
        ValueError, match="eval_a_raw_x is a metric of yours, .* of eval_a_x .*: rename yours, or leave"
    ):
        ours.evaluate()
    ours.args.ewa_eval_raw = False
    assert ours.evaluate()["eval_a_raw_x"] == 2.0


@pytest.mark.parametrize("names", [("a", "a_raw"), ("b", "raw")])
def test_a_data_set_with_the_name_of_losses_of_the_training_weights_is_refused(tmp_path, names):
    datasets = dict.fromkeys(names, tiny.EVAL)
    refused = f"data set '{names[1]}', whose eval_{names[1]}_loss would .*: call it otherwise, or leave ewa_eval_raw"
    with pytest.raises(ValueError, match=refused):
        trainer(tmp_path, **tiny.METHODS["ewa"], datasets=datasets, ewa_eval_raw=True)
    ours = trainer(tmp_path, **tiny.METHODS["ewa"], datasets=tiny.EVAL, ewa_eval_raw=True)
    for given in ((datasets,), {"eval_dataset": datasets}):
        with pytest.raises(ValueError, match=refused):
            ours.evaluate(**given) if isinstance(given, dict) else ours.evaluate(*given)
    ours.eval_dataset = datasets
    with pytest.raises(ValueError, match=refused):
        ours.evaluate()
    assert {"eval_a_loss", "eval_a_raw_loss"} <= ours.evaluate({"a": tiny.EVAL}).keys()
    plain = trainer(tmp_path, **tiny.METHODS["ewa"], datasets=datasets)
    assert {f"eval_{name}_loss" for name in names} <= plain.evaluate().keys()


BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 10}


@pytest.mark.parametrize("metric", ["raw_score", "eval_a_raw_score"])
def test_the_best_model_is_chosen_by_a_metric_of_the_users_that_is_called_raw(tmp_path, metric):
    datasets = tiny.EVAL if metric == "raw_score" else BOTH
    for both in (False, True):
        options = BEST | {"metric_for_best_model": metric, "ewa_eval_raw": both}
        ours = trainer(tmp_path / str(both), **tiny.METHODS["ewa"], datasets=datasets, **options)
        ours.train()
        name = f"eval_{metric.removeprefix('eval_')}"
        assert ours.state.best_metric == max(value for _, value in recorded(ours, name))


def test_the_best_model_is_not_chosen_by_the_training_weights(tmp_path):
    refused = "is of the training weights, and load_best_model_at_end loads the evaluation weights"
    for metric, datasets in (("raw_loss", tiny.EVAL), ("eval_a_raw_loss", BOTH)):
        options = BEST | {"metric_for_best_model": metric, "ewa_eval_raw": True}
        with pytest.raises(ValueError, match=f"metric_for_best_model={metric} {refused}"):
            trainer(tmp_path, **tiny.METHODS["ewa"], datasets=datasets, **options)
    options = BEST | {"metric_for_best_model": "raw_raw_score", "ewa_eval_raw": True}
    late = trainer(tmp_path, **tiny.METHODS["ewa"], datasets=tiny.EVAL, **options)
    with pytest.raises(ValueError, match=f"metric_for_best_model=raw_raw_score {refused}"):
        late.train()
