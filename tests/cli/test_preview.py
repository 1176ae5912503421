"""A schedule before the run: every learning rate and every phase.

Oracles: the learning rates in the optimizer at each update of real tiny runs; phases written down by hand.
"""

import math

import pytest
import tiny
from transformers import TrainerCallback

from hf_radam import RAdamTrainingArguments
from hf_radam.checkpoints.runs import list_checkpoints
from hf_radam.optim.radam import rectification
from hf_radam.preview import DECAY, STABLE, WARM_UP, describe_factors, phases_of_rates, phases_of_schedule, preview

UPSTREAM = {"optim": "adamw_torch"}
RUNS = {
    "wsd": {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": 0.4, "warmup_steps": 3},
    "wsd linear": {"optim": "radam", "decay_steps": 5, "decay_type": "linear", "min_lr_ratio": 0.1},
    "wsd_s": {"optim": "radam", "lr_scheduler_type": "wsd_s", "budgets": [0.3, 12], "warmup_steps": 0.1},
    "constant": {"optim": "radam", "ewa": True},
    "constant with warm-up": {"optim": "radam_schedulefree", "warmup_steps": 5},
    "linear": UPSTREAM | {"lr_scheduler_type": "linear", "warmup_steps": 0.25},
    "cosine": UPSTREAM | {"lr_scheduler_type": "cosine"},
    "restarts": UPSTREAM | {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "polynomial": UPSTREAM | {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
    "inverse_sqrt": UPSTREAM | {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 4},
    "min_lr": UPSTREAM | {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "stable": UPSTREAM | {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 6}},
}


class Rates(TrainerCallback):
    """Notes the learning rate that the optimizer has when it makes each update."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("name", RUNS)
def test_every_learning_rate_is_that_of_a_real_run(name, tmp_path):
    trainer = tiny.trainer(tmp_path, **RUNS[name])
    rates = Rates()
    trainer.add_callback(rates)
    trainer.train()
    found = preview(tiny.arguments(tmp_path, **RUNS[name]))
    assert [[rate] * len(groups) for rate, groups in zip(found.rates, rates.seen, strict=True)] == rates.seen
    covered = [update for phase in found.phases for update in range(phase.first, phase.last + 1)]
    assert covered == list(range(1, 21))
    for phase in found.phases:
        assert (phase.first_rate, phase.last_rate) == (rates.seen[phase.first - 1][0], rates.seen[phase.last - 1][0])
    pinned = {f"{place.pinned_in}/checkpoint-{place.step}" for place in list_checkpoints(tmp_path) if place.pinned_in}
    assert {phase.kept for phase in found.phases if phase.kept} == pinned


def parts(found):
    return [(phase.name, phase.first, phase.last) for phase in found]


PHASES = {
    "wsd": [(WARM_UP, 1, 3), (STABLE, 4, 12), (DECAY, 13, 20)],
    "wsd linear": [(STABLE, 1, 15), (DECAY, 16, 20)],
    "wsd_s": [(WARM_UP, 1, 2), (STABLE, 3, 5), (DECAY, 6, 6), (STABLE, 7, 10), (DECAY, 11, 12)]
    + [(STABLE, 13, 18), (DECAY, 19, 20)],
    "constant": [(STABLE, 1, 20)],
    "constant with warm-up": [(WARM_UP, 1, 5), (STABLE, 6, 20)],
    "linear": [(WARM_UP, 1, 5), (DECAY, 6, 20)],
    "cosine": [(DECAY, 1, 20)],
    "restarts": [(DECAY, 1, 10), (DECAY, 11, 20)],
    "polynomial": [(DECAY, 1, 20)],
    "inverse_sqrt": [(WARM_UP, 1, 4), (DECAY, 5, 20)],
    "min_lr": [(DECAY, 1, 20)],
    "stable": [(STABLE, 1, 14), (DECAY, 15, 20)],
}


@pytest.mark.parametrize("name", RUNS)
def test_the_phases_are_those_written_down(name, tmp_path):
    assert parts(preview(tiny.arguments(tmp_path, **RUNS[name])).phases) == PHASES[name]


@pytest.mark.parametrize("warmup", [0, 1, 2, 7])
@pytest.mark.parametrize("decay", [2, 3, 10])
@pytest.mark.parametrize("kind", ["wsd", "wsd_s"])
def test_the_curve_alone_tells_the_same_phases_as_the_keywords(tmp_path, kind, decay, warmup):
    options = {"optim": "radam", "lr_scheduler_type": kind, "decay_steps": decay, "warmup_steps": warmup}
    budgets = {"budgets": [30, 60]} if kind == "wsd_s" else {}
    args = tiny.arguments(tmp_path, max_steps=100, **options, **budgets)
    schedule = args.schedule(100)
    rates = [schedule.multiplier(step) for step in range(101)]
    assert parts(phases_of_schedule(schedule, rates)) == parts(phases_of_rates(rates))


def test_the_factor_and_its_words(tmp_path):
    args = tiny.arguments(tmp_path, optim="radam", adam_beta2=0.99, max_steps=600)
    found = preview(args)
    assert found.factors == [rectification(n, beta2=0.99, threshold=5.0) for n in range(1, 601)]
    words = describe_factors(found, args)
    # README: "Its factor reaches 0.9 after ... 277 at 0.99"
    assert words.startswith("plain momentum in updates 1-5, 0.082 at update 6") and "0.9 from update 277" in words
    args = tiny.arguments(tmp_path, optim="radam_schedulefree", adam_beta2=0.999, max_steps=4)
    assert describe_factors(preview(args), args) == "no step in updates 1-4, all of the run (beta2 0.999)"
    args = tiny.arguments(tmp_path, optim="adamw_torch", max_steps=4)
    assert preview(args).factors is None and describe_factors(preview(args), args) is None


def test_the_factor_is_what_the_optimizers_do(tmp_path):
    """One weight with the gradient 1: Adam's part of every update is then 1, and the update the learning rate alone."""
    import torch

    from hf_radam import RAdam, RAdamScheduleFree

    for kind, name in ((RAdam, "radam"), (RAdamScheduleFree, "radam_schedulefree")):
        factors = preview(tiny.arguments(tmp_path, optim=name, adam_beta2=0.9, max_steps=30)).factors
        weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = kind([weight], lr=0.1, betas=(0.9, 0.9), eps=1e-12, weight_decay=0)
        if name == "radam_schedulefree":
            optimizer.train()
        place = 0.0
        for factor in factors:
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            now = (optimizer.state[weight]["z"] if name == "radam_schedulefree" else weight).item()
            undefined = {"radam": 1.0, "radam_schedulefree": 0.0}[name]
            step = 0.1 * (undefined if factor is None else factor)
            assert place - now == pytest.approx(step, rel=1e-6, abs=1e-12)
            place = now


def test_the_window_of_the_average(tmp_path):
    words = preview(tiny.arguments(tmp_path, optim="radam", ewa=True, max_steps=1000, ewa_start_step=200)).average
    assert words == "from update 201 on, half-life 0.0625 of the updates so far: 50 updates at the end"
    words = preview(tiny.arguments(tmp_path, optim="radam", ewa=True, ewa_decay=0.5 ** (1 / 70), ewa_every=3)).average
    assert words.startswith("from update 3 on, decay 0.990147 per update: a half-life of 70 updates")
    assert preview(tiny.arguments(tmp_path, optim="radam")).average is None


REFUSED = {
    "no length": ({"max_steps": -1, "num_train_epochs": 2}, "max_steps is not set.*num_train_epochs=2.*--max_steps N"),
    "losses": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        "reduce_lr_on_plateau follows the losses of the training",
    ),
    "options": ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs=.* is refused by transformers: One"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_curve_is_refused(name, tmp_path):
    options, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        preview(RAdamTrainingArguments(str(tmp_path), **{"max_steps": 20, "use_cpu": True} | options))


def test_upstreams_schedules_are_all_answered(tmp_path):
    """Each is drawn or refused with a sentence of ours: none has been forgotten since upstream added it."""
    from transformers.trainer_utils import SchedulerType

    needed = {"cosine_with_min_lr": {"min_lr": 1e-4}, "cosine_warmup_with_min_lr": {"min_lr": 1e-4}}
    needed["warmup_stable_decay"] = {"num_decay_steps": 5}
    drawn = set()
    for kind in SchedulerType:
        options = {"lr_scheduler_type": kind.value, "lr_scheduler_kwargs": needed.get(kind.value)}
        args = tiny.arguments(tmp_path, eval_strategy="steps", **options)
        try:
            rates = preview(args).rates
        except ValueError as error:
            assert "follows the losses of the training" in str(error), kind
        else:
            assert len(rates) == 20 and all(math.isfinite(rate) for rate in rates)
            drawn.add(kind.value)
    assert {kind.value for kind in SchedulerType} - drawn == {"reduce_lr_on_plateau", "greedy"}
