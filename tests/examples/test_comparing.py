"""What a comparison trains, chooses and says, in a world whose losses are known; and one real comparison, made tiny.

Oracles: the best learning rate of each arm is put into that world; sums of updates are counted here by hand.
"""

import contextlib
import dataclasses
import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from compare_methods import alone, keep_settings, parse_arguments
from comparing import figures, jobs, planning, report, results
from comparing.jobs import Point
from comparing.reading import Curves, is_finished
from comparing.running import JobError, Runner
from comparing.settings import HORIZONS, Settings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = "--updates 20 --warmup 2 --sequences 2 --block 32 --vocabulary 300 --width 16 --layers 1".split()
TINY += "--evaluated 4 --seeds 0".split()
TINY += [word for arm in ("adamw", "radam", "radam_schedulefree") for word in ("--rates", arm, "1e-4", "1e-2", "10")]
SETTINGS = Settings(updates=400, warmup=20)
BEST_WARMUP = 40
BEST = {"adamw_torch_fused": 2.0**-9, "radam": 2.0**-5, "radam_schedulefree": 2.0**-6}
RATES = {name: (2.0**-7, 2.0**-6, 2.0**-5) for name in ("adamw", "radam", "radam_schedulefree")}


def loss(job, step, *, raw):
    """Parabola in the logarithm of the rate around a best one; less with more updates and more seed; raw is worse.

    AdamW has one in the logarithm of its warm-up too.
    """
    flags = dict(job.flags)
    away = math.log2(flags["learning_rate"] / BEST[flags["optim"]])
    if flags["optim"] == "adamw_torch_fused":
        away = math.hypot(away, math.log2(flags["warmup_steps"] / BEST_WARMUP))
    return 2 + 0.1 * away**2 + 40 / step + 0.01 * flags["seed"] + (0.2 if raw else 0)


def world(settings, *, diverges=lambda job: False, losses=loss):
    """Train in that world all that is needed; the batches of jobs in their order."""
    known, batches = {}, []
    while batch := planning.needed(settings, known):
        assert len(batches) < 50
        batches.append(batch)
        for job in batch:
            steps = range(job.begins + settings.interval, job.ends + 1, settings.interval)
            values = [
                {step: math.inf if diverges(job) else losses(job, step, raw=raw) for step in steps}
                for raw in (False, True)
            ]
            known[job.name] = Curves(*values, {}, {}, 1.0)
    return known, batches


@pytest.mark.parametrize("rates", [RATES, {name: (2.0**-5, 2.0**-4, 2.0**-3) for name in RATES}])
def test_every_grid_grows_until_its_best_is_inside(rates):
    settings = dataclasses.replace(SETTINGS, rates=rates)
    known, _ = world(settings)
    for arm in planning.arms(settings):
        grid = planning.grid(settings, arm, settings.updates, known)
        (optimizer,) = {dict(arm.reading(400, Point(0.1), 0).job.flags)["optim"]}
        cosine = optimizer == "adamw_torch_fused"
        assert grid.best == Point(BEST[optimizer], BEST_WARMUP if cosine else 0)
        assert min(grid.losses).rate < grid.best.rate < max(grid.losses).rate
        around = {Point(grid.best.rate * ratio, BEST_WARMUP) for ratio in (0.5, 2)}
        around |= {Point(grid.best.rate, warmup) for warmup in (20, 80)}
        assert not cosine or around < grid.losses.keys()
        for seed in settings.seeds:
            for horizon in settings.horizons:
                assert arm.reading(horizon, grid.best, seed).loss(known) is not None


def test_a_grid_that_does_not_end_is_an_error():
    settings = dataclasses.replace(SETTINGS, rates={name: (1e6, 2e6, 4e6) for name in RATES})
    with pytest.raises(planning.NoBestRate, match="AdamW, cosine: of 16 trainings with learning rates from 122.07 to"):
        world(settings)


def test_a_rate_that_diverges_is_the_worst():
    settings = dataclasses.replace(SETTINGS, rates=RATES)
    known, _ = world(settings, diverges=lambda job: dict(job.flags)["learning_rate"] > 2.0**-5)
    arm = next(arm for arm in planning.arms(settings) if arm.family == "radam")
    assert planning.grid(settings, arm, settings.updates, known).best == Point(2.0**-5)


def test_decays_branch_from_the_checkpoints_of_their_trunk():
    known, batches = world(dataclasses.replace(SETTINGS, rates=RATES))
    seen = set()
    for job in [job for batch in batches for job in batch]:
        if job.trunk is not None:
            assert job.trunk in seen
            trunk = next(j for batch in batches for j in batch if j.name == job.trunk)
            flags = dict(trunk.flags)
            assert job.begins % flags["save_steps"] == 0 and job.begins + dict(job.flags)["decay_steps"] == job.ends
            words = jobs.command(job, SETTINGS, "folder")
            assert words[words.index("--extend_from") + 1] == f"folder/{job.trunk}/checkpoint-{job.begins}"
        seen.add(job.name)
    assert len(seen) == len(known) and not planning.needed(dataclasses.replace(SETTINGS, rates=RATES), known)


def test_what_it_takes_to_serve_all_horizons():
    """By hand, for 400 updates: horizons 100, 200, 400 and decays of 20, 40, 80."""
    counts = {arm.name: arm.to_serve() for arm in planning.arms(SETTINGS)}
    assert counts == {
        "AdamW, cosine": 700,
        "RAdam, constant, raw": 400,
        "RAdam + EWA": 400,
        "RAdam + WSD": 320 + 20 + 40 + 80,
        "RAdam + WSD-S": 400,
        "RAdamScheduleFree": 400,
    }
    assert SETTINGS.horizons == tuple(round(ratio * 400) for ratio in HORIZONS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"updates": 401}, "updates=401 must be a multiple of 20"),
        ({"width": 66}, "width=66 must be a multiple of 4"),
        ({"seeds": ()}, r"seeds=\(\) must be one or more"),
        ({"seeds": (1, 1)}, r"seeds=\(1, 1\) must be one or more, each once"),
        ({"warmup": 51}, "warmup=51 must be at most half of the first horizon, 100 updates"),
        ({"warmup": 0}, "warmup=0 must be at least 1"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"updates": -20}, "updates=-20 must be at least 1"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be 0 or more"),
        ({"rates": {"radam": (1e-3, 1e-3, 2e-3)}}, "at least three learning rates above 0, each once"),
        ({"rates": {"radam": (0.0, 1e-3, 2e-3)}}, "at least three learning rates above 0, each once"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(SETTINGS, **change)


# ---- What is told ----


@pytest.fixture
def compared(tmp_path):
    """Results of that world, as they are in the file, and their settings."""
    settings = dataclasses.replace(SETTINGS, rates=RATES)
    known, _ = world(settings)
    save_file({"one": np.zeros((4, 5)), "two": np.zeros(3)}, tmp_path / "model.safetensors")
    found = results.collect(settings, known, tmp_path)
    return json.loads(json.dumps(found)), settings


def test_the_numbers_are_those_of_the_world(compared):
    """By hand: means over three seeds, 0.01 apart; raw weights are 0.2 worse; all are at their best rate."""
    found, settings = compared
    assert found["parameters"] == 23 and found["horizons"] == [100, 200, 400]
    assert found["tokens_per_parameter"][-1] == pytest.approx(400 * settings.sequences * settings.block / 23)
    by_name = {arm["name"]: arm for arm in found["arms"]}
    assert by_name[results.EWA]["mean"] == pytest.approx([2.41, 2.21, 2.11])
    assert by_name[results.RAW]["mean"] == by_name[results.WSD]["mean"] == pytest.approx([2.61, 2.41, 2.31])
    assert by_name[results.WSD]["losses"][0] == pytest.approx([2.6, 2.61, 2.62])
    assert by_name[results.COSINE]["rates"] == [2.0**-9] * 3 and by_name[results.EWA]["rates"] == [2.0**-5] * 3
    # Exponents tried: RAdam -7 to -4; schedule-free the first three; cosine -5 to -10 with a warm-up of 20, -9 with 10,
    # -8 to -10 with 40, and -9 with 80 where that is not above half of the horizon, so not at 100.
    tuned = {name: arm["updates_to_tune"] for name, arm in by_name.items()}
    assert tuned == {
        results.COSINE: 10 * 100 + 11 * 200 + 11 * 400,
        results.RAW: 4 * 400,
        results.EWA: 4 * 400,
        results.WSD: 4 * 400,  # its trunk up to the decay, and the decay
        results.WSD_S: 4 * 400,
        results.FREE: 3 * 400,
    }
    claims = {claim["words"]: claim for claim in found["claims"]}
    own = claims["The average is at least 2 % below the weights that it is of"]
    assert own["differences"][0] == pytest.approx(100 * (2.41 - 2.61) / 2.61, abs=0.01) and all(own["holds"])
    assert own["by_seed"][0] == pytest.approx([100 * -0.2 / raw for raw in (2.6, 2.61, 2.62)])
    decay = claims["A decay ends at least 3 % below what its trunk has by then"]
    assert decay["differences"] == [0, 0, 0] and not any(decay["holds"])
    near = claims["WSD-S is not farther than 1 % from WSD"]  # here 0.2 below
    assert near["differences"][2] == pytest.approx(100 * -0.2 / 2.31, abs=0.01) and not any(near["holds"])
    longer = [(each["horizon"], each["loss"], each["ends"], each["rate"]) for each in found["longer_cosines"]]
    assert longer == [(100, pytest.approx(2.4), 200, 2.0**-9), (200, pytest.approx(2.2), 400, 2.0**-9)]
    warmed = by_name[results.FREE]["warmed"]  # at the best rate and its double, one step from it
    assert [(tried["rate"], tried["warmup"], tried["beta2"]) for tried in warmed] == [
        (rate, warmup, beta2) for warmup, beta2 in ((20, None), (0, 0.98), (0, 0.99)) for rate in (2.0**-6, 2.0**-5)
    ]
    assert [t["losses"] for t in warmed[:2]] == [pytest.approx([2.4, 2.2, 2.1]), pytest.approx([2.5, 2.3, 2.2])]
    assert by_name[results.COSINE]["warmups"] == [BEST_WARMUP] * 3 and not by_name[results.WSD]["warmed"]


def test_weights_of_the_same_training_have_its_rate(tmp_path):
    """In a world where raw weights want a lower rate than their average. By hand: 2^-5 is one step from their best."""

    def lower(job, step, *, raw):
        return loss(job, step, raw=raw) + (
            0.1 * (3 + 2 * math.log2(dict(job.flags)["learning_rate"] / 2**-4)) if raw else 0
        )

    settings = dataclasses.replace(SETTINGS, rates=RATES)
    known, _ = world(settings, losses=lower)
    save_file({"one": np.zeros(5)}, tmp_path / "model.safetensors")
    found = {arm["name"]: arm for arm in results.collect(settings, known, tmp_path)["arms"]}
    assert found[results.EWA]["rates"] == [2.0**-5] * 3 and found[results.RAW]["rates"] == [2.0**-6] * 3
    raw_at_its_best = found[results.RAW]["losses"][2][0]
    assert found[results.EWA]["own_raw"][2][0] == pytest.approx(raw_at_its_best + 0.1)


@pytest.mark.parametrize(
    ("holds", "for_every_seed", "words"),
    [
        ([True] * 3, [True] * 3, "holds"),
        ([True] * 3, [True, False, True], "holds, on the mean of the seeds"),
        ([True, False, False], [True, False, False], "holds at 1 of 3"),
        ([False] * 3, [False] * 3, "does not hold"),
    ],
)
def test_verdicts(holds, for_every_seed, words):
    assert report._verdict(holds, for_every_seed) == words


def test_what_diverged_and_what_has_one_seed_is_said():
    assert report._mean([2.0, math.inf]) == "diverged (1 of 2 seeds)" and report._mean([2.0]) == "2.000"
    assert report._difference(math.nan, [0.0, math.nan]) == "diverged" and report._difference(1.0, [1.0]) == "+1.00 %"


def test_tables_and_figures_say_the_numbers(compared, tmp_path):
    found, _ = compared
    printed = report.whole(found)
    assert "| RAdam + EWA | 2.410 ± 0.010 | 2.210 ± 0.010 | 2.110 ± 0.010 | 0.03125 | 0 | 400 | 1600 |" in printed
    decay = "| A decay ends at least 3 % below what its trunk has by then | +0.00 % (+0.00 to +0.00) |"
    assert decay in printed and "| does not hold |" in printed
    assert "| RAdamScheduleFree, 400 updates |  |  |  | 2.200 | **2.100** | 2.200 |  |" in printed
    assert re.search(r"\| AdamW, cosine, 100 updates, warm-up 40 \| 2.500 \| \*\*2.400\*\* \| 2.500 \|", printed)
    assert "| AdamW, cosine, 100 updates, warm-up 10 |  | 2.800 |" in printed
    assert "| RAdam + EWA | 0.95 | 20 | 0.0625 | 2.500 | 2.300 | 2.200 |" in printed
    assert "| RAdam + EWA | 0.98 | 0 | 0.0625 | 2.500 | 2.300 | 2.200 |" in printed
    assert "| 100 | 2.400 | 2.400 | 200 updates, learning rate 0.00195312, warm-up 40 |" in printed
    assert "23 parameters" in printed
    drawn = figures.draw(found, tmp_path / "figures")
    assert [path.stem for path in drawn] == ["losses", "learning_rates", "tuning", "updates_to_serve"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_folder_holds_one_comparison(tmp_path):
    keep_settings(SETTINGS, tmp_path)
    keep_settings(dataclasses.replace(SETTINGS, seeds=(0, 1, 2, 3), rates=RATES), tmp_path)
    with pytest.raises(ValueError, match="holds a comparison with weight_decay=0.1: give another --folder"):
        keep_settings(dataclasses.replace(SETTINGS, weight_decay=0.2), tmp_path)
    with alone(tmp_path), pytest.raises(ValueError, match="Another comparison is being made in"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--updates 401", "updates=401 must be a multiple of 20"),
        ("--device tpu", "device=tpu must be cpu or cuda"),
        ("--rates radam 1e-3 2e-3", "at least three learning rates"),
        ("--rates sgd 1 2 3", "--rates wants one of adamw, radam, radam_schedulefree"),
        ("--workers 0", "--workers and --threads must be at least 1"),
    ],
)
def test_flags_that_cannot_be_are_refused(words, reason, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(words.split())
    assert reason in capsys.readouterr().err


# ---- Real trainings ----


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "\n".join(" ".join(draw.choices("def return class self value name".split(), k=12)) for _ in range(900))
    )
    return path


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory):
    """The folder of a comparison that was asked to end after its first training, by the command line."""
    folder = tmp_path_factory.mktemp("compare")
    command = [sys.executable, "-u", BENCHMARKS / "compare_methods.py", "--folder", folder, "--train_file", text, *TINY]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    assert "adamw_cosine/5/warmup_2/rate_0.0001/seed_0" in first and "after 5 updates in" in first, (
        process.stderr.read()
    )
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "The same command goes on from there" in said
    return folder


def test_a_comparison_that_is_stopped_leaves_nothing_running(stopped):
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            assert str(stopped).encode() not in arguments.read_bytes()


def test_trainings_end_with_a_comparison_that_is_killed(text, tmp_path):
    command = [sys.executable, BENCHMARKS / "compare_methods.py", "--folder", tmp_path, "--train_file", text, *TINY]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)

    def running():
        for arguments in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = arguments.read_bytes()
                if b"run_clm.py" in words and str(tmp_path).encode() in words:
                    return True
        return False

    def wait_until(reached):
        end = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < end
            time.sleep(0.05)

    wait_until(running)
    process.kill()
    process.wait()
    wait_until(lambda: not running())


def test_it_goes_on_with_what_is_missing(stopped, text, monkeypatch):
    """Only WSD's arm with its best rate is trained here, told what the other rates gave."""
    arguments = parse_arguments(["--folder", str(stopped), "--train_file", str(text), *TINY])
    keep_settings(arguments.settings, stopped)  # the same
    arms = planning.arms(arguments.settings)
    first, wsd = arms[0].reading(5, Point(1e-4, 2), 0).job, arms[3]
    worse = {
        job.name: Curves({job.ends: 9.0}, {job.ends: 9.0}, {}, {}, 1.0)
        for rate in (1e-4, 10.0)
        for job in planning.with_trunk(arguments.settings, wsd.reading(20, Point(rate), 0).job)
    }
    runner = Runner(arguments.settings, stopped, workers=1, threads=1, known=worse)
    assert is_finished(stopped, first) and first.name not in [job.name for job in runner.wanted()]
    monkeypatch.setattr(planning, "arms", lambda settings: [wsd])
    known = runner.run()
    best = planning.grid(arguments.settings, wsd, 20, known).best
    assert best == Point(1e-2)
    for horizon in (5, 10, 20):
        reading = wsd.reading(horizon, best, 0)
        state = json.loads((stopped / reading.job.name / "trainer_state.json").read_text())
        (last,) = [e["eval_raw_loss"] for e in state["log_history"] if "eval_raw_loss" in e and e["step"] == horizon]
        assert reading.loss(known) == last
        rates = {e["step"]: e["learning_rate"] for e in state["log_history"] if "learning_rate" in e}
        begin = reading.job.begins  # its first update still has the peak; the decay is 1 - sqrt
        assert rates[horizon] == pytest.approx(best.rate * (1 - ((horizon - 1 - begin) / (horizon - begin)) ** 0.5))


def test_a_training_that_fails_says_where_its_output_is(tmp_path):
    arguments = parse_arguments(["--folder", str(tmp_path), "--train_file", str(tmp_path / "none.txt"), *TINY])
    with pytest.raises(JobError, match=r"(?s)seed_0 failed \(exit code \d\); its output is in .*log.txt:\n.*none.txt"):
        Runner(arguments.settings, tmp_path, workers=1, threads=1).run()
