"""Schedules against transformers' own curves, closed forms written here, and levanter's golden values.

Needs no network and no accelerator. Tolerances: exact (==) wherever the arithmetic is meant to be upstream's; 1e-12
relative where the oracle is another form of the same function (a few float64 roundings).
"""

import doctest
import math
from functools import partial

import pytest
import torch
from transformers import TrainingArguments, get_wsd_schedule

from hf_radam import schedules
from hf_radam.schedules import DECAY_TYPES, check_wsd, check_wsd_s, count_from_ratio, decay_multiplier, wsd, wsd_s

NAN, INF = float("nan"), float("inf")
UPSTREAM_SHAPES = ["linear", "cosine", "1-sqrt"]
FLOOR_OF = {"linear": 0.0, "cosine": 0.0, "1-sqrt": 0.0, "exponential": 0.1, "inverse": 0.1}


def learning_rates(make_scheduler, updates):
    """Return the learning rate that each of `updates` updates really gets from a scheduler (base lr 1)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer)
    seen = []
    for _ in range(updates):
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
    curve = partial(wsd, total_steps=total, decay_steps=decay, warmup_steps=warmup, **sizes)
    ours = learning_rates(partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=curve), total + 5)
    assert ours[warmup:] == upstream[warmup:]
    assert ours[:warmup] == [n / warmup for n in range(warmup)]
    if floor == 0.0:
        assert ours == upstream


@pytest.mark.parametrize("floor", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("decay", [1, 7, 40])
def test_exponential_is_minicpms_half_life_form(floor, decay):
    half_life = decay * math.log(2) / -math.log(floor)
    for s in range(decay):
        value = wsd(60 + s, total_steps=60 + decay, decay_steps=decay, decay_type="exponential", min_lr_ratio=floor)
        assert value == pytest.approx(0.5 ** (s / half_life), rel=1e-12)


@pytest.mark.parametrize("floor", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("decay", [1, 7, 40])
def test_inverse_makes_one_over_lr_linear(floor, decay):
    for s in range(decay):
        value = wsd(60 + s, total_steps=60 + decay, decay_steps=decay, decay_type="inverse", min_lr_ratio=floor)
        assert 1 / value == pytest.approx(1 + (1 / floor - 1) * s / decay, rel=1e-12)


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
def test_every_shape_falls_from_one_to_the_floor(decay_type):
    curve = [decay_multiplier(i / 1000, decay_type, 0.1) for i in range(1001)]
    assert curve[0] == 1.0
    assert curve[-1] == pytest.approx(0.1, rel=1e-15)
    assert all(a > b for a, b in zip(curve, curve[1:], strict=False))


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
def test_wsd_boundaries(decay_type):
    floor = FLOOR_OF[decay_type]
    f = partial(wsd, total_steps=100, decay_steps=20, warmup_steps=10, decay_type=decay_type, min_lr_ratio=floor)
    assert [f(s) for s in (0, 1, 9, 10, 11)] == [0.0, 0.1, 0.9, 1.0, 1.0]  # n - 1 over w, whatever the floor
    assert [f(79), f(80)] == [1.0, 1.0] and f(81) < 1.0
    assert f(99) == decay_multiplier(19 / 20, decay_type, floor) > floor  # no update is spent at the floor
    assert [f(s) for s in (100, 101, 10**9)] == [floor] * 3


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
def test_wsd_s_golden_values_of_levanter(decay_type):
    f = partial(
        wsd_s,
        budgets=[300, 700, 1000],
        decay_steps=[30, 40, 30],
        decay_type=decay_type,
        min_lr_ratio=FLOOR_OF[decay_type],
    )
    assert [f(s) for s in (0, 269, 300, 659, 701, 969)] == [1.0] * 6
    assert all(f(s) < 1.0 for s in (271, 661, 971))


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
def test_wsd_s_decays_to_each_budget_and_jumps_back(decay_type):
    floor = FLOOR_OF[decay_type]
    f = partial(wsd_s, budgets=(300, 700, 1000), decay_steps=(30, 70, 100), decay_type=decay_type, min_lr_ratio=floor)
    for budget, decay in ((300, 30), (700, 70), (1000, 100)):
        assert [f(budget - decay - 1), f(budget - decay)] == [1.0, 1.0]
        for s in range(decay):
            assert f(budget - decay + s) == decay_multiplier(s / decay, decay_type, floor)
    assert [f(s) for s in (300, 301, 700, 701)] == [1.0] * 4
    assert [f(s) for s in (1000, 1001)] == [floor] * 2


def test_wsd_s_warms_up_at_the_start_and_again_after_each_budget():
    f = partial(
        wsd_s, budgets=(50, 100, 150), decay_steps=(10, 10, 10), warmup_steps=5, rewarmup_steps=4, min_lr_ratio=0.2
    )
    assert [f(s) for s in (0, 1, 4, 5)] == [0.0, 0.2, 0.8, 1.0]
    for budget in (50, 100):
        assert f(budget - 1) == decay_multiplier(0.9, "1-sqrt", 0.2)
        assert [f(budget + s) for s in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert f(150) == 0.2


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
@pytest.mark.parametrize(("total", "decay", "warmup"), [(300, 30, 0), (97, 11, 7), (50, 50, 0), (12, 5, 7)])
def test_one_budget_is_wsd_number_for_number(total, decay, warmup, decay_type):
    shape = dict(warmup_steps=warmup, decay_type=decay_type, min_lr_ratio=FLOOR_OF[decay_type])
    for step in range(total + 3):
        one = wsd_s(step, budgets=[total], decay_steps=[decay], rewarmup_steps=3, **shape)
        assert one == wsd(step, total_steps=total, decay_steps=decay, **shape)


def test_wsd_and_wsd_s_agree_before_the_first_decay_of_a_longer_plan():
    longer = partial(wsd_s, budgets=[300, 700], decay_steps=[30, 70], warmup_steps=20)
    first = partial(wsd, total_steps=300, decay_steps=30, warmup_steps=20)
    assert [longer(s) for s in range(300)] == [first(s) for s in range(300)]


# Ratios and counts


@pytest.mark.parametrize(
    ("value", "total", "count"),
    [(0.1, 300, 30), (0.1, 700, 70), (0.1, 1000, 100), (0.07, 100, 7), (0.1, 1001, 101), (1e-9, 5, 1), (1e-15, 5, 1)]
    + [(0.999999, 10, 10), (1, 500, 1), (1.0, 500, 1), (40, 10, 40), (40.0, 300, 40)],
)
def test_count_from_ratio(value, total, count):
    converted = count_from_ratio(value, total, name="--decay_steps")
    assert converted == count and type(converted) is int


def test_ratios_in_per_mille_are_exact_for_every_total():
    # Oracle: integers only. ceil(a / b) is -(-a // b).
    for per_mille in range(1, 1000):
        for total in (1, 7, 100, 300, 700, 1000, 4096, 999_983):
            assert count_from_ratio(per_mille / 1000, total, name="x") == -(-per_mille * total // 1000)


@pytest.mark.parametrize("value", [0.1, 0.25, 0.013, 5, 1])
def test_count_from_ratio_is_upstreams_rule_for_warmup_steps(value, tmp_path):
    upstream = TrainingArguments(output_dir=str(tmp_path), warmup_steps=value, report_to=[]).get_warmup_steps(640)
    assert count_from_ratio(value, 640, name="--warmup_steps") == upstream


@pytest.mark.parametrize("value", [0, 0.0, -1, -0.1, 1.5, 30.5, NAN, INF, -INF, True, "0.1", None])
def test_count_from_ratio_rejects(value):
    with pytest.raises(
        ValueError, match=r"^--decay_steps must be a whole number of updates.* or a ratio .*got "
    ) as error:
        count_from_ratio(value, 300, name="--decay_steps")
    assert repr(value) in str(error.value)


# Errors: the check alone and the schedule itself say the same words

WSD = dict(total_steps=100, decay_steps=10)
WSD_S = dict(budgets=[50, 100], decay_steps=[5, 10])
NOT_A_COUNT = [NAN, INF, -1, 1.5, True, "7", None]


def expect(check, schedule, arguments, message):
    for call in (check, partial(schedule, 0)):
        with pytest.raises(ValueError, match=message):
            call(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [(name, value, 1) for name in ("total_steps", "decay_steps") for value in [*NOT_A_COUNT, 0]]
    + [("warmup_steps", value, 0) for value in NOT_A_COUNT],
)
def test_wsd_rejects_what_is_no_count(name, value, least):
    message = f"^{name} must be a whole number of updates, {least} or more, got {value!r}"
    expect(check_wsd, wsd, {**WSD, name: value}, message)


@pytest.mark.parametrize("value", NOT_A_COUNT)
def test_wsd_s_rejects_what_is_no_count(value):
    tail = f"must be a whole number of updates, [01] or more, got {value!r}"
    expect(check_wsd_s, wsd_s, {**WSD_S, "warmup_steps": value}, f"^warmup_steps {tail}")
    expect(check_wsd_s, wsd_s, {**WSD_S, "rewarmup_steps": value}, f"^rewarmup_steps {tail}")
    expect(check_wsd_s, wsd_s, {**WSD_S, "budgets": [50, value]}, f"^each of budgets {tail}")
    expect(check_wsd_s, wsd_s, {**WSD_S, "decay_steps": [value, 10]}, f"^each of decay_steps {tail}")


@pytest.mark.parametrize("step", NOT_A_COUNT)
def test_step_must_be_a_count(step):
    for curve in (partial(wsd, **WSD), partial(wsd_s, **WSD_S)):
        with pytest.raises(ValueError, match=f"^step must be a whole number of updates, 0 or more, got {step!r}"):
            curve(step)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_lr_ratio": m}, rf"^min_lr_ratio must lie in \[0, 1\), got {m!r}")
        for m in (NAN, INF, -0.1, 1, 1.0, 2.5, True, "0")
    ]
    + [
        ({"decay_type": shape}, rf"^decay_type must be one of linear, .*inverse, got {shape!r}")
        for shape in ("sqrt", "Linear", None)
    ]
    + [
        ({"decay_type": shape}, rf"^decay_type='{shape}' never reaches min_lr_ratio=0\.0: set --min_lr_ratio 0\.1")
        for shape in ("exponential", "inverse")
    ],
)
def test_bad_shapes_and_floors_are_rejected(changes, message):
    expect(check_wsd, wsd, {**WSD, **changes}, message)
    expect(check_wsd_s, wsd_s, {**WSD_S, **changes}, message)


def test_decay_and_warmup_longer_than_the_run_are_rejected():
    check_wsd(total_steps=100, decay_steps=60, warmup_steps=40)
    message = r"^warmup_steps=41 and decay_steps=60 need 101 updates, but the run has 100: .*--max_steps 101"
    expect(check_wsd, wsd, dict(total_steps=100, decay_steps=60, warmup_steps=41), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(budgets=[], decay_steps=[]), r"^budgets must be a list .*got \[\]"),
        (dict(budgets=300, decay_steps=[30]), r"^budgets must be a list .*got 300"),
        (dict(budgets="300", decay_steps=[30]), r"^budgets must be a list .*got '300'"),
        (dict(budgets=[300], decay_steps=30), r"^decay_steps must be a list .*got 30"),
        (dict(budgets=[300], decay_steps=[30, 40]), r"^decay_steps=\[30, 40\] has 2 lengths for 1 budgets"),
        (dict(budgets=[0, 300], decay_steps=[1, 1]), r"^each of budgets must be .* 1 or more, got 0"),
        (dict(budgets=[50, 100], decay_steps=[0, 1]), r"^each of decay_steps must be .* 1 or more, got 0"),
        (dict(budgets=[300, 300], decay_steps=[1, 1]), r"^budgets must increase, got 300 after 300 in \[300, 300\]"),
        (dict(budgets=[300, 200], decay_steps=[1, 1]), r"^budgets must increase, got 200 after 300"),
        (
            dict(budgets=[50, 100], decay_steps=[45, 10], warmup_steps=6),
            r"^the decay of 45 updates before budget 50 \(with warmup_steps=6\) .*past update 0, .*to 44 or less",
        ),
        (
            dict(budgets=[50, 100], decay_steps=[5, 51]),
            r"^the decay of 51 updates before budget 100 \(with rewarmup_steps=0\) .*past update 50, .*to 50 or less",
        ),
        (
            dict(budgets=[50, 100], decay_steps=[5, 48], rewarmup_steps=3),
            r"\(with rewarmup_steps=3\) reaches back past update 50, .*to 47 or less",
        ),
    ],
)
def test_bad_budgets_are_rejected(arguments, message):
    expect(check_wsd_s, wsd_s, arguments, message)


def test_decays_that_just_fit_are_accepted():
    check_wsd_s(budgets=(50, 100), decay_steps=(44, 47), warmup_steps=6, rewarmup_steps=3)


@pytest.mark.parametrize("progress", [-1e-9, 1.0000001, NAN])
def test_progress_outside_the_decay_is_rejected(progress):
    with pytest.raises(ValueError, match=r"^progress must lie in \[0, 1\], got"):
        decay_multiplier(progress, "linear", 0.0)


def test_docstring_examples():
    result = doctest.testmod(schedules)
    assert result.failed == 0 and result.attempted >= 5
