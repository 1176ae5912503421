"""`hyperparameter_search` with optuna: a trial is, bit for bit, the run that its values make alone.

The oracle is that run, by a trainer of its own with a `model_init`.
"""

import gc
import weakref
from pathlib import Path

import optuna
import pytest
import tiny
from transformers.trainer_utils import HPSearchBackend

from hf_radam import RAdamTrainer
from hf_radam.checkpoints.manifest import read_manifest

SAVED = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 4}


def trainer(folder, **options):
    args = tiny.arguments(folder, **options)
    return RAdamTrainer(args=args, model_init=lambda: tiny.llama(), train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)


def search(ours, choices, pruner=None, **keywords):
    """Try every combination of the choices; returns the values of each trial, and the best run."""
    keywords["pruner"] = pruner or optuna.pruners.NopPruner()
    tried = {}

    def hp_space(trial):
        tried[trial.number] = {name: trial.suggest_categorical(name, values) for name, values in choices.items()}
        return tried[trial.number]

    count = 1
    for values in choices.values():
        count *= len(values)
    sampler = optuna.samplers.GridSampler(choices, seed=0)
    best = ours.hyperparameter_search(hp_space, n_trials=count, backend="optuna", sampler=sampler, **keywords)
    assert len(tried) == count
    return tried, best


def same_files(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same weights, averages, optimizer, schedule and random states."""
    names = [
        {p.relative_to(folder) for p in folder.rglob("*") if p.suffix in (".safetensors", ".pt", ".pth")}
        for folder in (one, other)
    ]
    assert len(names[0]) >= 4
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


SEARCHES = {
    "optimizers": ({"ewa": True}, {"optim": ["radam", "schedule_free_radam", "adamw_torch"], "ewa_decay": [0.9]}),
    "schedules, with and without an average": (
        {"optim": "radam", "warmup_steps": 2},
        {"lr_scheduler_type": ["wsd", "wsd_s"], "ewa": [True, False]},
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_trial_is_the_run_of_its_values(tmp_path, name):
    options, choices = SEARCHES[name]
    ours = trainer(tmp_path, **options, **SAVED, **EVALUATED)
    tried, best = search(ours, choices)
    losses = {}
    for number, values in tried.items():
        folder = tmp_path / "alone" / str(number)
        alone = trainer(folder, **options | SAVED | EVALUATED | values)
        alone.train()
        losses[number] = alone.evaluate()["eval_loss"]
        for step in (4, 8):
            assert same_files(tmp_path / f"run-{number}" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        manifest = read_manifest(tmp_path / f"run-{number}" / "checkpoint-8")
        assert manifest["method"] == read_manifest(folder / "checkpoint-8")["method"]
    assert len(set(losses.values())) > 1
    assert best.objective == losses[int(best.run_id)] == min(losses.values())


@pytest.mark.parametrize("options", [{}, {**EVALUATED, "load_best_model_at_end": True}])
def test_the_objective_is_the_loss_of_the_evaluation_weights(tmp_path, options):
    """Upstream's default would take `eval_raw_loss`; the oracle reads the averages from the trial's last checkpoint."""
    ours = trainer(tmp_path, optim="radam", ewa=True, ewa_eval_raw=True, **SAVED, **options)
    _, best = search(ours, {"learning_rate": [1e-3, 2e-3]})
    folder = tmp_path / f"run-{best.run_id}" / "checkpoint-8"
    shipped, raw = tiny.LlamaForCausalLM.from_pretrained(folder / "ewa"), tiny.LlamaForCausalLM.from_pretrained(folder)
    assert best.objective == pytest.approx(tiny.loss_of(shipped), abs=2e-6)
    assert abs(best.objective - tiny.loss_of(raw)) > 1e-3


def test_the_objective_is_what_it_is_without_the_raw_evaluation(tmp_path):
    """Of several data sets it is upstream's sum; a metric of the user that is called raw counts."""
    choices, objectives = {"learning_rate": [1e-3]}, []
    for raw in (False, True):
        ours = trainer(tmp_path / str(raw), optim="radam", ewa=True, ewa_eval_raw=raw, max_steps=2)
        ours.eval_dataset = {"a": tiny.EVAL, "b": tiny.EVAL[:4]}
        ours.compute_metrics = lambda prediction: {"raw_score": float(abs(prediction.predictions).mean())}
        objectives.append(search(ours, choices)[1].objective)
    assert objectives[0] == objectives[1] > 0
    _, best = search(ours, choices, compute_objective=lambda metrics: metrics["eval_a_raw_loss"])
    assert best.objective > 0  # an objective of the user gets all metrics


def test_values_that_cannot_be_are_refused_in_the_trial(tmp_path):
    """Those that the arguments refuse when they are made, and a model that does not go with the trial's method."""
    ours = trainer(tmp_path, optim="radam", lr_scheduler_type="wsd")
    with pytest.raises(ValueError, match="lr_scheduler_type=wsd with radam_schedulefree"):
        search(ours, {"optim": ["radam_schedulefree"]})

    of_bf16 = RAdamTrainer(args=tiny.arguments(tmp_path), model_init=tiny.bf16, train_dataset=tiny.TRAIN)
    with pytest.raises(ValueError, match="Keep float32 parameters"):
        search(of_bf16, {"optim": ["radam_schedulefree"], "lr_scheduler_type": ["constant"]})


def test_each_training_starts_over_and_a_failed_start_leaves_nothing_of_the_last_model(tmp_path):
    """The new model is evaluated as it is, and the old average is gone from memory."""
    ours = trainer(tmp_path, optim="radam", ewa=True, max_steps=4)
    ours.train()
    first = tiny.state(ours), ours.evaluate()["eval_loss"]
    ours.train()
    assert tiny.same(first[0], tiny.state(ours)) and first[1] == ours.evaluate()["eval_loss"]
    average = weakref.ref(ours.average)
    ours.args.learning_rate = -1.0
    with pytest.raises(ValueError, match="learning_rate=-1.0 must be"):
        ours.train()
    assert ours.evaluate()["eval_loss"] == pytest.approx(tiny.loss_of(tiny.llama()), abs=2e-6)
    ours.callback_handler.optimizer = ours.callback_handler.model = None
    gc.collect()
    assert average() is None


def test_pruned_trials(tmp_path):
    options = {"ewa": True, "optim": "radam"} | SAVED | EVALUATED
    ours = trainer(tmp_path, **options)
    choices = {"learning_rate": [1e-2, 1e-4, 1e-5]}
    tried, best = search(ours, choices, pruner=optuna.pruners.MedianPruner(n_startup_trials=1), direction="maximize")
    whole = [number for number in tried if (tmp_path / f"run-{number}" / "checkpoint-8").exists()]
    assert int(best.run_id) in whole and len(whole) < len(tried)
    for number in whole:
        trainer(tmp_path / "alone" / str(number), **options | tried[number]).train()
        assert same_files(tmp_path / f"run-{number}/checkpoint-8", tmp_path / f"alone/{number}/checkpoint-8")


def test_a_trial_of_ray_is_refused(tmp_path):
    """Ray need not be installed: the trainer is as upstream's search leaves it before a trial."""
    ours = trainer(tmp_path, optim="radam", ewa=True)
    ours.hp_search_backend = HPSearchBackend.RAY
    with pytest.raises(ValueError, match='backend="ray" is not supported. Use backend="optuna"'):
        ours.train(trial={"learning_rate": 1e-3})
