"""Logs of the average and of the training weights (`ewa_eval_raw`), and the names that are refused.

Oracles: the formulas of the two windows, upstream's rule for the best model.
"""

import math

import numpy as np
import pytest
import tiny

from hf_radam import RAdamTrainer

BOTH = {"a": tiny.EVAL, "b": tiny.EVAL[:4]}
BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 10}


def score(prediction):
    return {"raw_score": float(np.abs(prediction.predictions).mean())}


def trainer(folder, datasets=tiny.EVAL, metrics=score, **options):
    options = tiny.METHODS["ewa"] | {"eval_strategy": "steps", "eval_steps": 10} | options
    args = tiny.arguments(folder, **options)
    data = {"train_dataset": tiny.TRAIN, "eval_dataset": datasets}
    return RAdamTrainer(tiny.llama(), args, **data, compute_metrics=metrics)


def half_life(step, *, ewa_decay=None, ewa_every=1, ewa_start_step=0):
    """By the formulas of the windows, from how much of the older weights an averaging keeps; None before the first."""
    count = (step - ewa_start_step) // ewa_every
    if count < 1:
        return None
    if count == 1:
        return 0.0
    if ewa_decay is None:
        return 0.0625 * count * ewa_every
    sums = [sum(ewa_decay ** (ewa_every * i) for i in range(n)) for n in (count - 1, count)]
    return ewa_every / -math.log2(ewa_decay**ewa_every * sums[0] / sums[1])


@pytest.mark.parametrize(
    "window", [{}, {"ewa_decay": 0.9}, {"ewa_decay": 0.9, "ewa_every": 3, "ewa_start_step": 5}], ids=str
)
def test_every_training_loss_comes_with_the_half_life_of_the_average(tmp_path, window):
    options = {"logging_strategy": "steps", "logging_steps": 1} | window
    twin = trainer(tmp_path, **options, save_strategy="steps", save_steps=7)
    twin.train()
    losses = [entry for entry in twin.state.log_history if "loss" in entry]
    expected = {step: half_life(step, **window) for step in range(1, 21)}
    expected = {step: value for step, value in expected.items() if value is not None}
    assert {e["step"]: e["ewa_half_life"] for e in losses if "ewa_half_life" in e} == pytest.approx(expected, rel=1e-9)
    assert [entry["step"] for entry in losses] == list(range(1, 21))
    assert not any("ewa_half_life" in entry for entry in twin.state.log_history if "loss" not in entry)

    again = trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert [entry for entry in again.state.log_history if "loss" in entry] == losses


def test_no_training_weights_are_evaluated_where_the_model_holds_the_evaluation_weights(tmp_path, caplog):
    run = trainer(tmp_path, ewa_eval_raw=True)
    run.train()
    outside = run.evaluate()
    with run.evaluation_weights():
        inside = run.evaluate()
    assert "The model holds the evaluation weights here: the training weights are not evaluated." in caplog.text
    assert inside["eval_loss"] == outside["eval_loss"] and inside["eval_raw_score"] == outside["eval_raw_score"]
    assert {"eval_raw_loss", "eval_raw_raw_score"} <= outside.keys() - inside.keys()
    best = trainer(tmp_path, ewa_eval_raw=True, **BEST, metric_for_best_model="loss")
    best.train()
    metrics = best.evaluate()
    assert metrics["eval_loss"] == pytest.approx(best.state.best_metric, abs=2e-6) and "eval_raw_loss" not in metrics


def test_metrics_and_data_sets_with_a_name_of_the_training_weights_are_refused(tmp_path):
    run = trainer(tmp_path, BOTH, metrics=lambda prediction: {"x": 1.0, "raw_x": 2.0}, ewa_eval_raw=True)
    with pytest.raises(ValueError, match="The metric eval_a_raw_x of compute_metrics has the name of a metric of the"):
        run.evaluate()
    run.args.ewa_eval_raw = False
    assert run.evaluate()["eval_a_raw_x"] == 2.0

    for names in (("a", "a_raw"), ("b", "raw")):
        datasets = dict.fromkeys(names, tiny.EVAL)
        refused = f"data set '{names[1]}', whose eval_{names[1]}_loss is the name of a loss of the training weights"
        with pytest.raises(ValueError, match=refused):
            trainer(tmp_path, datasets, ewa_eval_raw=True)
        with pytest.raises(ValueError, match=refused):
            trainer(tmp_path, ewa_eval_raw=True).evaluate(datasets)
        assert {f"eval_{name}_loss" for name in names} <= trainer(tmp_path, datasets).evaluate().keys()


def test_the_best_model_may_be_chosen_by_a_metric_called_raw_but_not_by_the_training_weights(tmp_path):
    options = BEST | {"ewa_eval_raw": True}
    for metric, datasets in (("raw_score", tiny.EVAL), ("eval_a_raw_score", BOTH)):
        run = trainer(tmp_path, datasets, **options, metric_for_best_model=metric)
        run.train()
        name = f"eval_{metric.removeprefix('eval_')}"
        assert run.state.best_metric == max(entry[name] for entry in run.state.log_history if name in entry)
    refused = "metric_for_best_model={} is of the training weights, but load_".format
    for metric, datasets in (("raw_loss", tiny.EVAL), ("eval_a_raw_loss", BOTH)):
        with pytest.raises(ValueError, match=refused(metric)):
            trainer(tmp_path, datasets, **options, metric_for_best_model=metric)
    late = trainer(tmp_path, **options, metric_for_best_model="raw_raw_score")  # known at the first evaluation
    with pytest.raises(ValueError, match=refused("raw_raw_score")):
        late.train()
