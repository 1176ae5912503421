"""What `hf-radam inspect` says of where a checkpoint stands and which weights it holds, x and y of stock Trainer too.

Oracles: the arguments of the run, the schedules' formula, and x and y computed from all z by their definition.
"""

from pathlib import Path

import pytest
import torch
from inspecting import inspect, stock
from tiny import METHODS, llama, trainer
from transformers import TrainerCallback

from hf_radam.checkpoints.weights import read_parameters
from hf_radam.inspection.checkpoint import inspect_checkpoint
from hf_radam.inspection.phases import phase
from hf_radam.schedules import wsd, wsd_s

# ---- Where it stands ----


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_named_with_its_place_and_its_learning_rate(made, name, capsys):
    facts = inspect_checkpoint(made / name / "checkpoint-12")
    args = trainer(made / "unused", **METHODS[name]).args
    assert (facts.state, facts.checked, facts.update, facts.max_steps) == ("whole", "checksums", 12, 20)
    assert (facts.optim, facts.lr_scheduler_type) == (args.optim.value, args.lr_scheduler_type.value)
    assert facts.ewa == args.ewa
    schedule = args.schedule(20)
    assert facts.learning_rates == [1e-2 * (1.0 if schedule is None else schedule.multiplier(12))]
    assert facts.phase == "stable"
    assert facts.root == ("y" if "schedule_free" in name else "training weights")
    assert facts.evaluation_folder == ("ewa" if "ewa" in name else "schedule_free" if "schedule_free" in name else "")
    code, text = inspect(facts.path, capsys)
    assert code == 0 and "update 12 of 20" in text and f"method {facts.optim}, {facts.lr_scheduler_type}" in text
    for folder in facts.beside:
        assert f"{folder}/: " in text
    if name == "schedule_free_ewa":
        assert facts.beside == ["ewa", "schedule_free"] and "ewa/: the averaged weights (float32), used for" in text
        assert "fixed window, decay 0.9 per update, every 3 updates after update 0; 4 averagings, the last" in text
        optimizer = torch.load(Path(facts.path, "optimizer.pt"), weights_only=True)["param_groups"][0]
        assert facts.schedule_free == {"train_mode": True, "weight_sum": optimizer["weight_sum"], "k": 12}
    if name == "ewa":
        assert "growing window, half-life 0.0625 of the updates since averaging began" in text


def test_learning_rate_of_a_checkpoint_without_its_schedule_file(run):
    checkpoint = run("wsd") / "checkpoint-18"
    (checkpoint / "scheduler.pt").unlink()
    assert inspect_checkpoint(checkpoint).learning_rates == [1e-2 * wsd(18, total_steps=20, decay_steps=8)]


WSD = {"warmup_steps": 3, "decay_type": "linear", "min_lr_ratio": 0.0, "total_steps": 20, "decay_steps": 8}
WSD_S = {**WSD, "budgets": [10, 20], "decay_steps": [4, 8]}
del WSD_S["total_steps"]


@pytest.mark.parametrize(
    ("schedule", "phases"),
    [
        (WSD, {0: "warm-up", 2: "warm-up", 3: "stable", 11: "stable", 12: "stable", 13: "decay", 19: "decay"}),
        (WSD_S, {2: "warm-up", 3: "stable", 6: "stable", 7: "decay", 9: "decay", 10: "budget", 11: "stable"}),
        (WSD_S, {12: "stable", 13: "decay", 19: "decay", 20: "finished"}),
    ],
)
def test_phases_change_where_the_multiplier_does(schedule, phases):
    def rate(step):
        return wsd_s(step, **schedule) if "budgets" in schedule else wsd(step, **schedule)

    for step, expected in phases.items():
        assert phase("wsd", schedule, step, finished=False) == expected, step
        # A rate below the peak for the next update is what a ramp or a decay that has begun means.
        below = rate(step) < 1 and step not in (schedule.get("budgets") or ())
        assert below == (expected in ("warm-up", "decay")), step
    assert phase("wsd", schedule, 19, finished=True) == "finished"


@pytest.mark.parametrize(
    ("name", "step", "warmup", "expected"),
    [
        *[("linear", 3, 4, "warm-up"), ("linear", 4, 4, "decay"), ("cosine", 0, 0, "decay")],
        *[("constant", 3, 4, "stable"), ("constant_with_warmup", 3, 4, "warm-up")],
        *[("constant_with_warmup", 4, 4, "stable"), ("warmup_stable_decay", 9, 4, None), ("linear", 4, None, None)],
    ],
)
def test_phases_of_upstreams_schedules(name, step, warmup, expected):
    assert phase(name, None, step, finished=False, warmup_steps=warmup) == expected


# ---- Stock Trainer ----


def test_a_stock_checkpoint_is_told_from_its_files(made_by_stock, capsys):
    code, text = inspect(made_by_stock / "checkpoint-5", capsys)
    assert code == 0
    assert "a checkpoint of stock Trainer, whole as far as the form of its files tells" in text
    assert "method adamw_torch, linear, no ewa" in text or "method adamw_torch_fused, linear, no ewa" in text
    rate = torch.load(made_by_stock / "checkpoint-5/scheduler.pt", weights_only=True)["_last_lr"][0]
    assert f"update 5 of 10, in the warm-up; learning rate of the next update {rate:g} " in text
    assert "root training weights" in text and "files (without checksums to compare with" in text
    assert "extend no: linear" in text


class Iterates(TrainerCallback):
    """Computes x and y after every update from their definition: x is the weighted mean of all z, y lies before z."""

    def __init__(self):
        self.sums, self.weight, self.at = {}, 0.0, {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        group = optimizer.param_groups[0]
        weight, self.weight = group["weight_sum"] - self.weight, group["weight_sum"]
        x, y = {}, {}
        for name, parameter in model.named_parameters():
            z = optimizer.state[parameter]["z"].double()
            self.sums[name] = self.sums.get(name, 0) + weight * z
            x[name] = self.sums[name] / self.weight if self.weight else z
            y[name] = group["betas"][0] * x[name] + (1 - group["betas"][0]) * z
        self.at[state.global_step] = {"x": x, "y": y}


def distance(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in b)


@pytest.mark.parametrize(
    ("evaluations", "step", "expected"), [(None, 8, "y"), (None, 16, "y"), (8, 8, "x"), (5, 8, "y"), (5, 16, "x")]
)
def test_x_or_y_is_what_the_stock_file_holds(tmp_path, evaluations, step, expected, capsys):
    options = {"eval_strategy": "steps", "eval_steps": evaluations} if evaluations else {}
    options |= {"max_steps": 16, "save_steps": 8, "optim": "schedule_free_radam", "lr_scheduler_type": "constant"}
    model, truth = llama(), Iterates()
    upstream = stock(tmp_path, model, **options)
    upstream.add_callback(truth)
    upstream.train()
    checkpoint, other = tmp_path / f"checkpoint-{step}", "x" if expected == "y" else "y"
    saved = read_parameters(model, checkpoint)
    near = 1e-6  # float32 rounds weights of about 0.1 over 16 updates; x and y are 20 times as far apart, and more
    assert distance(saved, truth.at[step][expected]) < near < 0.05 * distance(saved, truth.at[step][other])

    facts = inspect_checkpoint(checkpoint)
    assert facts.root == expected and facts.schedule_free["k"] == step
    code, text = inspect(checkpoint, capsys)
    assert code == 0 and f"root {expected}, the " in text
    assert ("stock Trainer saves y unless it evaluated in the same step" in text) == (expected == "y")
    assert (f'load_evaluation_model("{checkpoint}") loads {expected}') in text

    # "RAdamTrainer, resumed from it, evaluates and saves x"
    ours = trainer(tmp_path, optim="radam_schedulefree", max_steps=step, weight_decay=0.0, adam_beta2=0.999)
    ours.train(resume_from_checkpoint=str(checkpoint))
    ours.save_model(tmp_path / "x")
    assert distance(read_parameters(model, tmp_path / "x"), truth.at[step]["x"]) < near


def test_x_and_y_before_the_first_weight(tmp_path, capsys):
    stock(tmp_path, optim="schedule_free_radam", lr_scheduler_type="constant", max_steps=2).train()
    assert "weight_sum 0: x and y are the same still" in inspect(tmp_path / "checkpoint-2", capsys)[1]
