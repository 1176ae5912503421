"""What a comparison trains, chooses and says, in a world whose losses are known; and one real comparison, made tiny.

Oracles: the best learning rate of each arm is put into that world; sums of steps are counted here by hand.
"""

import contextlib
import dataclasses
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import limits
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

import clm_arguments
import compare_figures
import compare_plan as plan
import compare_results as results
import compare_run
import run_clm
from compare_methods import parse_arguments
from compare_plan import COSINE, EWA, FREE, RAW, WSD, WSD_S, Curves, Point, Settings
from compare_run import JobError, Runner

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare_methods.py"
BEST_WARMUP = 40
BEST = {"adamw_torch_fused": 2.0**-9, "radam": 2.0**-5, "radam_schedulefree": 2.0**-6}
RATES = {name: (2.0**-7, 2.0**-6, 2.0**-5) for name in ("adamw", "radam", "radam_schedulefree")}
SETTINGS = Settings(steps=400, warmup=20, rates=RATES)


def loss(job, step, *, raw):
    """Parabola in the logarithm of the rate around a best one; less with more steps and more seed; raw is worse.

    AdamW has one in the logarithm of its warm-up too.
    """
    away = math.log2(job.flags["learning_rate"] / BEST[job.flags["optim"]])
    if job.flags["optim"] == "adamw_torch_fused":
        away = math.hypot(away, math.log2(job.flags["warmup_steps"] / BEST_WARMUP))
    return 2 + 0.1 * away**2 + 40 / step + 0.01 * job.flags["seed"] + (0.2 if raw else 0)


def world(settings, losses=loss):
    """Train in that world all that is needed, until nothing is."""
    known = {}
    for _ in range(50):
        missing = [job for job in plan.jobs(settings, known) if job.name not in known]
        if not missing:
            return known
        for job in missing:
            assert job.trunk is None or job.trunk in known
            steps = range(job.begins + settings.interval, job.ends + 1, settings.interval)
            evaluated, raw = ({step: losses(job, step, raw=raw) for step in steps} for raw in (False, True))
            known[job.name] = Curves(evaluated, raw, {}, {}, 1.0)
    pytest.fail("it does not end")


@pytest.mark.parametrize("rates", [RATES, {name: (2.0**-5, 2.0**-4, 2.0**-3) for name in RATES}])
def test_every_grid_grows_until_its_best_is_inside(rates):
    settings = dataclasses.replace(SETTINGS, rates=rates)
    known = world(settings)
    for arm in plan.arms(settings):
        grid = plan.grid(settings, arm, settings.steps, known)
        optimizer = arm.reading(400, Point(0.1), 0).job.flags["optim"]
        cosine = optimizer == "adamw_torch_fused"
        assert grid.best == Point(BEST[optimizer], BEST_WARMUP if cosine else 0)
        assert min(grid.losses).rate < grid.best.rate < max(grid.losses).rate
        around = {Point(grid.best.rate * ratio, BEST_WARMUP) for ratio in (0.5, 2)}
        around |= {Point(grid.best.rate, warmup) for warmup in (20, 80)}
        assert not cosine or around < grid.losses.keys()
        for horizon in settings.horizons:
            assert all(arm.reading(horizon, grid.best, seed).loss(known) is not None for seed in settings.seeds)


def test_grids_that_do_not_end_or_diverge():
    settings = dataclasses.replace(SETTINGS, rates={name: (1e6, 2e6, 4e6) for name in RATES})
    with pytest.raises(plan.NoBestRate, match="AdamW, cosine: the best of 16 learning rates from 122.07 to"):
        world(settings)
    known = world(SETTINGS, lambda job, *a, **k: math.inf if job.point.rate > 2.0**-5 else loss(job, *a, **k))
    (arm,) = [arm for arm in plan.arms(SETTINGS) if arm.name == EWA]
    assert plan.grid(SETTINGS, arm, 400, known).best == Point(2.0**-5)


def test_wrong_settings_are_refused(capsys):
    for settings, reason in (
        ('{"steps": 401}', "steps=401 must be a positive multiple of 20"),
        ('{"rates": {"radam": [1e-3, 1e-3, 2e-3]}}', "at least three different positive numbers"),
        ('{"stepz": 40}', "unexpected keyword argument 'stepz'"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(["--settings", settings])
        assert reason in capsys.readouterr().err


# ---- Results ----


@pytest.fixture
def compared(tmp_path):
    """Results of that world, as they are in the file."""
    save_file({"one": np.zeros((4, 5)), "two": np.zeros(3)}, tmp_path / "model.safetensors")
    return json.loads(json.dumps(results.collect(SETTINGS, world(SETTINGS), tmp_path)))


def test_the_numbers_are_those_of_the_world(compared):
    """By hand: means over three seeds, 0.01 apart; raw weights are 0.2 worse; all are at their best rate."""
    assert compared["parameters"] == 23 and compared["horizons"] == [100, 200, 400]
    assert compared["tokens_per_parameter"][-1] == pytest.approx(400 * SETTINGS.sequences * SETTINGS.block / 23)
    arms = {arm["name"]: arm for arm in compared["arms"]}
    assert arms[EWA]["mean"] == pytest.approx([2.41, 2.21, 2.11])
    assert arms[RAW]["mean"] == arms[WSD]["mean"] == pytest.approx([2.61, 2.41, 2.31])
    assert arms[WSD]["losses"][0] == pytest.approx([2.6, 2.61, 2.62])
    assert arms[COSINE]["rates"] == [2.0**-9] * 3 and arms[EWA]["rates"] == [2.0**-5] * 3
    # Horizons 100, 200, 400 with decays of 20, 40, 80. Exponents tried: RAdam -7 to -4; schedule-free the first three;
    # cosine -5 to -10 with a warm-up of 20, -9 with 10, -8 to -10 with 40, and -9 with 80 but at 100, of which it is
    # more than half. WSD is tuned with its trunk up to the decay.
    tuned = {COSINE: 10 * 100 + 11 * 200 + 11 * 400, FREE: 3 * 400} | dict.fromkeys((RAW, EWA, WSD, WSD_S), 4 * 400)
    assert {name: arm["steps_to_tune"] for name, arm in arms.items()} == tuned
    served = {COSINE: 700, WSD: 320 + 20 + 40 + 80} | dict.fromkeys((RAW, EWA, WSD_S, FREE), 400)
    assert {name: arm["steps_to_serve"] for name, arm in arms.items()} == served
    claims = {claim["words"]: claim for claim in compared["claims"]}
    own = claims["The average is at least 2 % below its training weights"]
    assert own["differences"][0] == pytest.approx(100 * (2.41 - 2.61) / 2.61, abs=0.01) and all(own["holds"])
    assert own["by_seed"][0] == pytest.approx([100 * -0.2 / raw for raw in (2.6, 2.61, 2.62)])
    decay = claims["A decay ends at least 3 % below the constant run that it left"]
    assert decay["differences"] == [0, 0, 0] and not any(decay["holds"])
    longer = [(each["horizon"], each["loss"], each["ends"], each["rate"]) for each in compared["longer_cosines"]]
    assert longer == [(100, pytest.approx(2.4), 200, 2.0**-9), (200, pytest.approx(2.2), 400, 2.0**-9)]
    warmed = arms[FREE]["warmed"]  # at the best rate and its double, one factor of 2 from it
    assert [(tried["rate"], tried["warmup"], tried["beta2"]) for tried in warmed] == [
        (rate, warmup, beta2) for warmup, beta2 in ((20, None), (0, 0.98), (0, 0.99)) for rate in (2.0**-6, 2.0**-5)
    ]
    assert [t["losses"] for t in warmed[:2]] == [pytest.approx([2.4, 2.2, 2.1]), pytest.approx([2.5, 2.3, 2.2])]
    assert arms[COSINE]["warmups"] == [BEST_WARMUP] * 3 and not arms[WSD]["warmed"]


def test_weights_of_the_same_training_have_its_rate(tmp_path):
    """In a world where raw weights want a lower rate than their average. By hand: 2^-5 is one step from their best."""

    def lower(job, step, *, raw):
        return loss(job, step, raw=raw) + (0.1 * (3 + 2 * math.log2(job.point.rate / 2**-4)) if raw else 0)

    save_file({"one": np.zeros(5)}, tmp_path / "model.safetensors")
    arms = {arm["name"]: arm for arm in results.collect(SETTINGS, world(SETTINGS, lower), tmp_path)["arms"]}
    assert arms[EWA]["rates"] == [2.0**-5] * 3 and arms[RAW]["rates"] == [2.0**-6] * 3
    assert arms[EWA]["own_raw"][2][0] == pytest.approx(arms[RAW]["losses"][2][0] + 0.1)


def test_tables_and_figures_say_the_numbers(compared, tmp_path):
    printed = "\n".join(part(compared) for part in results.PARTS.values())
    for words in (
        "| RAdam + EWA | 2.410 ± 0.010 | 2.210 ± 0.010 | 2.110 ± 0.010 | 0.03125 | 0 | 400 | 1600 |",
        "| A decay ends at least 3 % below the constant run that it left | +0.00 % (+0.00 to +0.00) |",
        "| does not hold |",
        "| RAdamScheduleFree, 400 steps |  |  |  | 2.200 | **2.100** | 2.200 |  |",
        "| AdamW, cosine, 100 steps, warm-up 40 | 2.500 | **2.400** | 2.500 |",
        "| RAdam + EWA | 0.98 | 0 | 0.0625 | 2.500 | 2.300 | 2.200 |",
        "| 100 | 2.400 | 2.400 | 200 steps, learning rate 0.00195312, warm-up 40 |",
        "23 parameters",
    ):
        assert words in printed
    drawn = compare_figures.draw(compared, tmp_path / "figures")
    assert [path.stem for path in drawn] == ["losses", "learning_rates", "tuning", "steps_to_serve"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


# ---- Real trainings ----


@pytest.fixture
def flags(tmp_path):
    """Flags of a tiny comparison in a folder of its own."""
    draw = random.Random(0)
    words = [" ".join(draw.choices("def return class self value name".split(), k=12)) for _ in range(900)]
    (tmp_path / "text.txt").write_text("\n".join(words))
    tiny = {"steps": 20, "warmup": 2, "sequences": 2, "block": 32, "vocabulary": 300, "width": 16, "layers": 1}
    tiny |= {"evaluated": 4, "seeds": [0], "rates": {name: [1e-4, 1e-2, 10.0] for name in RATES}}
    tiny["flags"] = {"train_file": str(tmp_path / "text.txt"), "use_cpu": True}
    return ["--folder", str(tmp_path), "--settings", json.dumps(tiny), "--workers", "2"]


def running(folder):
    """Whether trainings of a comparison run."""
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return any("run_clm.py" in command and folder in command for command in commands)


@contextlib.contextmanager
def comparison(command, folder):
    """Start a comparison and wait until it trains; in the end it is killed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        limits.wait_until(lambda: running(folder), process)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_comparison_that_is_stopped_or_killed_leaves_nothing_running_and_is_resumed(flags, monkeypatch, capsys):
    """Only one trunk and its decay are trained to their ends here, the trunk in this process."""
    command, where = [sys.executable, str(SCRIPT), *flags], flags[1]
    with comparison(command, where) as process:
        other = subprocess.run(command, capture_output=True, text=True)
        assert other.returncode == 1 and "Another comparison runs in" in other.stderr
        process.terminate()
        _, said = limits.communicate(process)
        assert process.returncode == 130 and "The same command resumes with what is missing" in said
        assert not running(where)
    with comparison(command, where) as process:
        process.kill()
        limits.wait_until(lambda: not running(where))

    settings = parse_arguments(flags).settings
    folder = Path(where) / settings.digest
    decay, trunk = plan.wsd(settings, 20, Point(1e-2), 0), plan.trunk(settings, Point(1e-2), 0)
    monkeypatch.setattr("sys.argv", ["run_clm.py", *plan.command(trunk, settings, str(folder))])
    run_clm.run()
    monkeypatch.setattr(compare_run, "jobs", lambda settings, known: plan.with_trunk(settings, decay))
    runner = Runner(settings, folder, workers=2)
    assert [job.name for job in runner.needed()] == [decay.name]
    known = runner.run()
    assert f"{decay.name}: " in (said := capsys.readouterr().out) and f"after {20 - decay.begins} steps in" in said
    state = json.loads((folder / decay.name / "trainer_state.json").read_text())
    (last,) = [e["eval_raw_loss"] for e in state["log_history"] if "eval_raw_loss" in e and e["step"] == 20]
    assert plan.Reading(decay, True, 20).loss(known) == last
    # The first step of the decay still has the peak; the shape is 1 - sqrt.
    rate = 1e-2 * (1 - ((20 - 1 - decay.begins) / (20 - decay.begins)) ** 0.5)
    assert known[decay.name].rate[20] == pytest.approx(rate)
    for job in (plan.cosine(settings, 5, Point(1e-4, 2, 0.98), 0), plan.wsd_s(settings, Point(1e-4), 0)):
        clm_arguments.parse_arguments(plan.command(job, settings, str(folder)))


def test_a_training_that_fails_says_where_its_output_is(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text("raise SystemExit('none.txt does not exist')")
    monkeypatch.setattr(compare_run, "SCRIPT", tmp_path / "script.py")
    with pytest.raises(JobError, match=r"(?s)seed_0 failed \(exit code 1\). Output in .*log.txt:\nnone.txt does not"):
        Runner(SETTINGS, tmp_path, workers=1).run()
