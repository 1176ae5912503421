"""Schedules against transformers' own curves, closed forms written here, and levanter's golden values.

Needs no network and no accelerator. Tolerances: exact (==) wherever the arithmetic is meant to be upstream's; 1e-12
relative where the oracle is another form of the same function (a few float64 roundings).
"""

import doctest
import itertools
import json
import math
import pickle
from dataclasses import dataclass, replace
from functools import partial

import pytest
import tiny
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_wsd_schedule

from hf_radam import schedules
from hf_radam.schedules import (
    DECAY_TYPES,
    WSD,
    WSDS,
    Phase,
    Schedule,
    SchedulePast,
    count_from_ratio,
    decay_multiplier,
    describe_schedule,
    wsd,
    wsd_s,
)

NAN, INF = float("nan"), float("inf")
UPSTREAM_SHAPES = ["linear", "cosine", "1-sqrt"]
FLOOR_OF = {"linear": 0.0, "cosine": 0.0, "1-sqrt": 0.0, "exponential": 0.1, "inverse": 0.1}


def learning_rates(make_scheduler, steps):
    """Return the learning rate that each of `steps` steps really gets from a scheduler (base lr 1)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("decay_type", UPSTREAM_SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.1, 1 / 3, 0.9])
@pytest.mark.parametrize(
    ("total", "decay", "warmup"), [(300, 30, 0), (997, 101, 13), (10, 1, 1), (50, 50, 0), (64, 40, 24)]
)
def test_whole_curve_equals_transformers_after_the_warmup(total, decay, warmup, floor, decay_type):
    sizes = dict(decay_type=decay_type, min_lr_ratio=floor)
    upstream = learning_rates(
        partial(get_wsd_schedule, num_warmup_steps=warmup, num_decay_steps=decay, num_training_steps=total, **sizes),
        total + 5,
    )
    schedule = WSD(total_steps=total, decay_steps=decay, warmup_steps=warmup, **sizes)
    rates = learning_rates(partial(LambdaLR, lr_lambda=schedule.multiplier), total + 5)
    assert rates[warmup:] == upstream[warmup:]
    assert rates[:warmup] == [n / warmup for n in range(warmup)]
    if floor == 0.0:
        assert rates == upstream
    pure = partial(wsd, total_steps=total, decay_steps=decay, warmup_steps=warmup, **sizes)
    assert [pure(step) for step in range(total + 5)] == rates


@pytest.mark.parametrize("floor", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("decay", [1, 7, 40])
def test_exponential_is_minicpms_half_life_form_and_inverse_makes_one_over_lr_linear(floor, decay):
    half_life = decay * math.log(2) / -math.log(floor)
    for s in range(decay):
        f = partial(wsd, 60 + s, total_steps=60 + decay, decay_steps=decay, min_lr_ratio=floor)
        assert f(decay_type="exponential") == pytest.approx(0.5 ** (s / half_life), rel=1e-12)
        assert 1 / f(decay_type="inverse") == pytest.approx(1 + (1 / floor - 1) * s / decay, rel=1e-12)


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
def test_wsd_boundaries(decay_type):
    curve = [decay_multiplier(i / 1000, decay_type, 0.1) for i in range(1001)]
    assert curve[0] == 1.0 and curve[-1] == pytest.approx(0.1, rel=1e-15)
    assert all(a > b for a, b in itertools.pairwise(curve))
    floor = FLOOR_OF[decay_type]
    f = partial(wsd, total_steps=100, decay_steps=20, warmup_steps=10, decay_type=decay_type, min_lr_ratio=floor)
    assert [f(s) for s in (0, 1, 9, 10, 11)] == [0.0, 0.1, 0.9, 1.0, 1.0]  # n - 1 over w, whatever the floor
    assert [f(79), f(80)] == [1.0, 1.0] and f(81) < 1.0
    assert f(99) == decay_multiplier(19 / 20, decay_type, floor) > floor  # no step is spent at the floor
    assert [f(s) for s in (100, 101, 10**9)] == [floor] * 3


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
def test_wsd_s_decays_to_each_budget_and_jumps_back_or_warms_up_again(decay_type):
    shape = dict(decay_type=decay_type, min_lr_ratio=FLOOR_OF[decay_type])
    sizes = dict(budgets=(300, 700, 1000), decay_steps=(30, 40, 30)) | shape
    f, ramps = partial(wsd_s, **sizes), partial(wsd_s, **sizes, warmup_steps=5, rewarmup_steps=4)
    for budget, decay in ((300, 30), (700, 40), (1000, 30)):
        assert [f(budget - decay - 1), f(budget - decay)] == [1.0, 1.0]
        for step in range(budget - decay, budget):
            assert f(step) == ramps(step) == decay_multiplier((step - budget + decay) / decay, **shape)
    assert [f(s) for s in (0, 269, 300, 301, 659, 700, 701, 969)] == [1.0] * 8  # golden values of levanter
    assert all(f(s) < 1.0 for s in (271, 661, 971))
    assert [f(s) for s in (1000, 1001)] == [ramps(1000)] * 2 == [FLOOR_OF[decay_type]] * 2
    assert [ramps(s) for s in (0, 1, 4, 5)] == [0.0, 0.2, 0.8, 1.0]
    for budget in (300, 700):
        assert [ramps(budget + s) for s in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
@pytest.mark.parametrize(("total", "decay", "warmup"), [(300, 30, 0), (97, 11, 7), (50, 50, 0), (12, 5, 7)])
def test_one_budget_is_wsd_number_for_number(total, decay, warmup, decay_type):
    shape = dict(warmup_steps=warmup, decay_type=decay_type, min_lr_ratio=FLOOR_OF[decay_type])
    one = WSDS(budgets=[total], decay_steps=[decay], rewarmup_steps=3, **shape)
    for step in range(total + 3):
        assert one.multiplier(step) == wsd(step, total_steps=total, decay_steps=decay, **shape)
        assert one.multiplier(step) == wsd_s(step, **one.to_dict())


# Ratios and counts


def test_a_ratio_is_exact_for_every_total():
    """Oracle: integers only, ceil(a / b) is -(-a // b)."""
    for per_mille in range(1, 1000):
        for total in (1, 7, 100, 300, 700, 1000, 4096, 999_983):
            assert count_from_ratio(per_mille / 1000, total, name="x") == -(-per_mille * total // 1000)


def test_ratios_and_counts_follow_upstreams_rule_for_warmup_steps(tmp_path):
    for value in (0.1, 0.25, 0.013, 1e-15, 0.999999, 5, 1, 1.0, 40.0):
        upstream = TrainingArguments(output_dir=str(tmp_path), warmup_steps=value, report_to=[]).get_warmup_steps(640)
        count = count_from_ratio(value, 640, name="--warmup_steps")
        assert count == upstream and type(count) is int


@pytest.mark.parametrize("value", [0, 0.0, -1, -0.1, 1.5, 30.5, NAN, INF, -INF, True, "0.1", None])
def test_count_from_ratio_rejects(value):
    message = rf"^--decay_steps must be a whole number of steps.* or a ratio .*got {value!r}\."
    with pytest.raises(ValueError, match=message):
        count_from_ratio(value, 300, name="--decay_steps")


# Errors: at construction, and so in the pure functions

SIZES = dict(total_steps=100, decay_steps=10)
BUDGETS = dict(budgets=[50, 100], decay_steps=[5, 10])
NOT_A_COUNT = [NAN, INF, -1, 1.5, True, "7", None]


def expect(kind, pure, arguments, message):
    for call in (kind, partial(pure, 0)):
        with pytest.raises(ValueError, match=message):
            call(**arguments)


@pytest.mark.parametrize("value", NOT_A_COUNT)
def test_only_whole_numbers_are_counts(value):
    tail = f"must be a whole number of steps, [01] or more, got {value!r}"
    for name in ("total_steps", "decay_steps", "warmup_steps"):
        expect(WSD, wsd, {**SIZES, name: value}, f"^{name} {tail}")
    for name in ("warmup_steps", "rewarmup_steps"):
        expect(WSDS, wsd_s, {**BUDGETS, name: value}, f"^{name} {tail}")
    for name in ("budgets", "decay_steps"):
        expect(WSDS, wsd_s, {**BUDGETS, name: [value, 100]}, f"^each of {name} {tail}")
    for curve in (partial(wsd, **SIZES), partial(wsd_s, **BUDGETS)):
        with pytest.raises(ValueError, match=f"^step {tail}"):
            curve(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"min_lr_ratio": m}, rf"^min_lr_ratio must lie in \[0, 1\), got {m!r}") for m in (NAN, INF, -0.1, 1, True, "0")]
    + [({"decay_type": s}, f"^decay_type must be one of linear, .*inverse, got {s!r}") for s in ("Linear", None)]
    + [
        ({"decay_type": s}, rf"^decay_type='{s}' never reaches min_lr_ratio=0\.0\. Set --min_lr_ratio 0\.1")
        for s in ("exponential", "inverse")
    ],
)
def test_bad_shapes_and_floors_are_refused(changes, message):
    expect(WSD, wsd, SIZES | changes, message)
    expect(WSDS, wsd_s, BUDGETS | changes, message)


def test_lengths_that_do_not_fit_are_refused():
    for name in SIZES:
        expect(WSD, wsd, SIZES | {name: 0}, f"^{name} must be a whole number of steps, 1 or more, got 0")
    WSD(total_steps=100, decay_steps=60, warmup_steps=40)  # just fits
    message = r"^Warm-up and decay \(41 \+ 60 steps\) do not fit between steps 0 and 100\. Shorten"
    expect(WSD, wsd, dict(total_steps=100, decay_steps=60, warmup_steps=41), message)
    WSDS(budgets=(50, 100), decay_steps=(44, 47), warmup_steps=6, rewarmup_steps=3)
    for changes, message in (
        (dict(budgets=[], decay_steps=[]), r"^budgets=\[\] and decay_steps=\[\] must be lists of one length"),
        (dict(budgets="300", decay_steps="300"), "^budgets='300' and .* must be lists"),
        (dict(decay_steps=30), "and decay_steps=30 must be lists"),
        (dict(decay_steps=[30]), "must be lists of one length.* Give one decay per budget"),
        (dict(budgets=[0, 300]), "^each of budgets must be .* 1 or more, got 0"),
        (dict(decay_steps=[0, 1]), "^each of decay_steps must be .* 1 or more, got 0"),
        (dict(budgets=[300, 300]), r"^budgets must increase, got 300 after 300 in \[300, 300\]"),
        (dict(decay_steps=[45, 10], warmup_steps=6), r"\(6 \+ 45 steps\) .* steps 0 and 50\."),
        (dict(decay_steps=[5, 48], rewarmup_steps=3), r"\(3 \+ 48 steps\) .* steps 50 and 100\."),
    ):
        expect(WSDS, wsd_s, BUDGETS | changes, message)


# What the objects know


def test_phases_decays_and_pins_of_wsd():
    schedule = WSD(total_steps=100, decay_steps=20, warmup_steps=10)
    assert schedule.phases() == [Phase("warm-up", 0, 10), Phase("stable", 10, 80), Phase("decay", 80, 100)]
    assert schedule.decays() == [(80, 100)]
    assert [schedule.decay_at(step) for step in (79, 80, 81, 99, 100, 101)] == [None] * 2 + [(80, 100)] * 3 + [None]
    assert [schedule.pinned_at(step) for step in (0, 79, 80, 81, 100)] == [None, None, "_pre_decay", None, None]
    assert not any(schedule.resets_to_peak(step) for step in range(102))
    assert schedule.warning() is None
    assert WSD(total_steps=9, decay_steps=1).warning().startswith("A decay of 1 step has no effect")
    assert WSD(total_steps=9, decay_steps=9).pinned_at(0) is None
    assert WSD(total_steps=9, decay_steps=9).phases() == [Phase("decay", 0, 9)]
    described = "wsd, 100 steps: warm-up 10 steps, peak, 1-sqrt decay over steps 80-100 to 0 of the peak"
    assert describe_schedule(schedule, name="wsd", total_steps=100) == described
    assert describe_schedule(None, name="cosine", total_steps=50) == "cosine, 50 steps"
    assert describe_schedule(None, name="cosine", total_steps=None) == "cosine"


def test_phases_decays_and_pins_of_wsd_s():
    schedule = WSDS(budgets=[50, 100], decay_steps=[5, 10], warmup_steps=4, rewarmup_steps=3, min_lr_ratio=0.1)
    assert schedule.total_steps == 100
    assert schedule.phases() == [
        *(Phase("warm-up", 0, 4), Phase("stable", 4, 45), Phase("decay", 45, 50)),
        *(Phase("warm-up", 50, 53), Phase("stable", 53, 90), Phase("decay", 90, 100)),
    ]
    found = [schedule.decay_at(step) for step in (45, 46, 49, 50, 51, 91, 99, 100)]
    assert found == [None, (45, 50), (45, 50), None, None, (90, 100), (90, 100), None]
    assert [step for step in range(102) if schedule.pinned_at(step) == "_budgets"] == [50, 100]
    assert [step for step in range(102) if schedule.resets_to_peak(step)] == [50, 100]
    described = "wsd_s, 100 steps: warm-up 4 steps, peak, 1-sqrt decay over steps 45-50, 90-100 to 0.1 of the peak"
    assert schedule.describe() == described
    assert WSDS(budgets=(9, 19), decay_steps=(2, 1)).warning() is not None


@pytest.mark.parametrize(
    ("schedule", "manifest"), [(WSD(**SIZES), SIZES), (WSDS(**BUDGETS), BUDGETS | {"rewarmup_steps": 0})], ids=type
)
def test_a_schedule_survives_the_manifest_and_pickle(schedule, manifest):
    """The keywords are those of manifests of format 2."""
    manifest = manifest | {"warmup_steps": 0, "decay_type": "1-sqrt", "min_lr_ratio": 0.0}
    assert json.loads(json.dumps(schedule.to_dict())) == manifest
    read = Schedule.from_dict(schedule.name, manifest)
    assert read == schedule == pickle.loads(pickle.dumps(schedule)) and hash(read) == hash(schedule)
    assert read != replace(schedule, warmup_steps=1)


def test_what_is_no_schedule_is_refused():
    for name, mapping, message in (
        ("cosine", {}, "There is no schedule 'cosine'"),
        ("wsd", {"total_steps": 9}, "does not describe a schedule 'wsd'.*decay_steps"),
        ("wsd", SIZES | {"power": 2}, "does not describe a schedule 'wsd'.*power"),
    ):
        with pytest.raises(ValueError, match=message):
            Schedule.from_dict(name, mapping)
    with pytest.raises(ValueError, match="The schedule name 'wsd' is taken by WSD. Choose another name"):

        class Second(Schedule):
            name = "wsd"


# A new schedule: one class


@dataclass(frozen=True, kw_only=True)
class Halving(Schedule):
    """Half the learning rate after each `period` of the last `decay_steps` steps."""

    name = "halving"
    decay_steps: int
    period: int

    def multiplier(self, step):
        return 0.5 ** max(0, (step - self.total_steps + self.decay_steps) // self.period + 1)

    def phases(self):
        start = self.total_steps - self.decay_steps
        return [Phase("stable", 0, start), Phase("decay", start, self.total_steps)]


def test_the_flags_are_the_options_of_a_schedule_of_ones_own(tmp_path):
    """`trainer/test_new_schedule.py` trains with one."""
    options = {"lr_scheduler_type": "halving", "lr_scheduler_kwargs": {"period": 5}, "decay_steps": 0.1}
    args = tiny.arguments(tmp_path, **options, warmup_steps=3)
    schedule = args.schedule(100)
    assert schedule == Halving(total_steps=100, warmup_steps=3, decay_steps=10, period=5)
    assert schedule.describe() == "halving, 100 steps: stable over steps 0-90, decay over steps 90-100"
    longer = args.schedule(200, SchedulePast(90, schedule, warmup_steps=3))
    assert longer == Halving(total_steps=200, warmup_steps=3, decay_steps=20, period=5)
    for change, message in (
        ({"lr_scheduler_kwargs": None}, "does not describe a schedule .halving.: .*period"),
        ({"lr_scheduler_kwargs": {"periods": 5}}, "periods has no effect with halving. Use the flags, and here period"),
        ({"min_lr_ratio": 0.5}, "min_lr_ratio=0.5 has no effect with lr_scheduler_type=halving. Use wsd or wsd_s"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.arguments(tmp_path, **options | change)


def test_docstring_examples():
    result = doctest.testmod(schedules)
    assert result.failed == 0 and result.attempted >= 3
