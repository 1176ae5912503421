"""`hf-radam schedule`: the learning rates and phases of a run before it, output and errors.

Oracles: the learning rates in the optimizer at each step of real tiny runs; phases and curves written down by hand.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

import limits
import pytest
import tiny
from transformers import TrainerCallback
from transformers.trainer_utils import SchedulerType

import clm_arguments
from hf_radam import cli
from hf_radam.checkpoints.runs import list_checkpoints
from hf_radam.cli.schedule import preview, sparkline
from hf_radam.optim.radam import rectification
from hf_radam.schedules import DECAY, STABLE, WARM_UP, Phase

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def printed(words, capsys, monkeypatch, columns=100):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["schedule", *words]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


UPSTREAM = {"optim": "adamw_torch"}
RUNS = {
    "wsd": {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": 0.4, "warmup_steps": 3},
    "wsd linear": {"optim": "radam", "decay_steps": 5, "decay_type": "linear", "min_lr_ratio": 0.1},
    "wsd_s": {"optim": "radam", "lr_scheduler_type": "wsd_s", "budgets": [0.3, 12], "warmup_steps": 0.1},
    "constant": {"optim": "radam", "ewa": True},
    "constant with warm-up": {"optim": "radam_schedulefree", "warmup_steps": 5},
    "linear": UPSTREAM | {"lr_scheduler_type": "linear", "warmup_steps": 0.25},
    "restarts": UPSTREAM | {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "inverse_sqrt": UPSTREAM | {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 4},
}


PHASES = {
    "wsd": [(WARM_UP, 0, 3), (STABLE, 3, 12), (DECAY, 12, 20)],
    "wsd linear": [(STABLE, 0, 15), (DECAY, 15, 20)],
    "wsd_s": [(WARM_UP, 0, 2), (STABLE, 2, 5), (DECAY, 5, 6), (STABLE, 6, 10), (DECAY, 10, 12)]
    + [(STABLE, 12, 18), (DECAY, 18, 20)],
    "constant": [(STABLE, 0, 20)],
    "constant with warm-up": [(WARM_UP, 0, 5), (STABLE, 5, 20)],
    "linear": [(WARM_UP, 0, 5), (DECAY, 5, 20)],
    "restarts": [(DECAY, 0, 10), (DECAY, 10, 20)],
    "inverse_sqrt": [(WARM_UP, 0, 4), (DECAY, 4, 20)],
}


class Rates(TrainerCallback):
    """Notes the learning rate that the optimizer has when it makes each step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("name", RUNS)
def test_rates_phases_and_pins_are_those_of_a_real_run(name, tmp_path):
    trainer = tiny.trainer(tmp_path, **RUNS[name])
    rates = Rates()
    trainer.add_callback(rates)
    trainer.train()
    found = preview(tiny.arguments(tmp_path, **RUNS[name]))
    assert [[rate] * len(groups) for rate, groups in zip(found.rates, rates.seen, strict=True)] == rates.seen
    assert found.phases == [Phase(*phase) for phase in PHASES[name]]
    pinned = [f"{ref.pinned_in}/checkpoint-{ref.step}" for ref in list_checkpoints(tmp_path) if ref.pinned_in]
    assert sorted(found.pinned.values()) == sorted(pinned)


def test_the_notes_on_factor_and_average(tmp_path):
    args = tiny.arguments(tmp_path, optim="radam", adam_beta2=0.99, max_steps=600, ewa=True, ewa_start_step=200)
    found = preview(args)
    assert found.factors == [rectification(n, beta2=0.99, threshold=5.0) for n in range(1, 601)]
    factor, average = found.notes.values()
    assert factor.startswith("undefined in steps 1-5, 0.082 at step 6") and "0.9 from step 277" in factor
    assert average == "from step 201 on, half-life 0.0625 of the steps so far: 25 at the end"
    fixed = {"ewa": True, "ewa_decay": 0.5 ** (1 / 70), "ewa_every": 3}
    found = preview(tiny.arguments(tmp_path, optim="radam_schedulefree", adam_beta2=0.999, max_steps=4, **fixed))
    assert [*found.notes.values()] == [
        "undefined in steps 1-4 (beta2 0.999)",
        "from step 3 on, decay 0.990147 per step: a half-life of 70 steps",
    ]
    found = preview(tiny.arguments(tmp_path, optim="adamw_torch", max_steps=4))
    assert found.factors is None and found.notes == {}


def test_upstreams_schedules_are_all_answered(tmp_path):
    """Each has a curve or is refused: none has been forgotten since upstream added it."""
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_prints_the_rates_of_its_run(path, capsys, monkeypatch):
    text = printed([str(path)], capsys, monkeypatch)
    found = preview(clm_arguments.parse_arguments([str(path)])[2])
    assert text.startswith(found.summary + "\n")
    rows = re.findall(r"^(warm-up|stable|decay) +(\d+)-(\d+) +([\d.]+) % +(\S+)(?: to (\S+))?", text, re.MULTILINE)
    assert [Phase(name, int(start), int(end)) for name, start, end, *_ in rows] == found.phases
    for (_, start, end, share, first, last), phase in zip(rows, found.phases, strict=True):
        assert float(share) == pytest.approx(100 * (phase.end - phase.start) / len(found.rates), abs=0.05)
        assert float(first) == pytest.approx(found.rates[int(start)], rel=1e-3)
        assert float(last or first) == pytest.approx(found.rates[int(end) - 1], rel=1e-3)
    others = {"block_size", "vocab_size", "max_eval_samples", "model_type", "config_overrides"}
    assert set(text.split("about training: ")[1].strip().split(", ")) == others


def test_flags_win_over_the_file(capsys, monkeypatch):
    flags = "--max_steps 5000 --decay_steps 0.1 --warmup_steps 50".split()
    text = printed([str(ROOT / "configs/radam_wsd.yaml"), *flags], capsys, monkeypatch)
    assert "wsd, 5000 steps: warm-up 50 steps, peak, 1-sqrt decay over steps 4500-5000" in text
    assert re.search(r"^stable +50-4500 +89.0 % +0.004 +_pre_decay/checkpoint-4500$", text, re.MULTILINE)


@pytest.mark.parametrize("budgets", [[], ["--budgets", "3", "10"]], ids=["wsd", "wsd_s"])
def test_a_decay_without_an_effect_is_warned_of_as_in_training(budgets, tmp_path, capsys, monkeypatch, caplog):
    kind = "wsd_s" if budgets else "wsd"
    flags = ["--optim", "radam", "--lr_scheduler_type", kind, "--max_steps", "20", *budgets, "--decay_steps"]
    text = printed([*flags, "0.01"], capsys, monkeypatch, columns=200)
    assert re.search(r"^decay +19-20 ", text, re.MULTILINE)
    (warning,) = re.findall(r"^Warning: (.*)$", text, re.MULTILINE)
    assert "Warning" not in printed([*flags, "2"], capsys, monkeypatch, columns=200)
    options = {"budgets": [3, 10]} if budgets else {}
    tiny.trainer(tmp_path, optim="radam", lr_scheduler_type=kind, decay_steps=0.01, **options).train()
    assert warning in [record.getMessage() for record in caplog.records]


def test_lists_json_files_and_a_gpus_configuration(capsys, monkeypatch, tmp_path):
    flags = ["--optim", "radam", "--lr_scheduler_type", "wsd_s", "--max_steps", "1000", "--budgets", "300", "700"]
    assert re.findall(r"_budgets/checkpoint-(\d+)", printed(flags, capsys, monkeypatch)) == ["300", "700", "1000"]
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"lr_scheduler_type": "cosine", "max_steps": 50, "block_size": 8}), encoding="utf-8")
    text = printed([str(path)], capsys, monkeypatch)
    assert text.startswith("cosine, 50 steps\n") and "not about training: block_size" in text
    flags = ["--max_steps", "50", "--bf16", "--tf32", "true", "--fsdp", "true", "--deepspeed", "nowhere.json"]
    assert printed(flags, capsys, monkeypatch).startswith("linear, 50 steps\n")


def test_a_run_that_is_extended_keeps_its_past(tmp_path, capsys, monkeypatch):
    options = {"optim": "radam", "lr_scheduler_type": "wsd_s", "decay_steps": 4, "warmup_steps": 0.1}
    tiny.trainer(tmp_path / "run", **options, save_strategy="steps", save_steps=10).train()
    for weights in (tmp_path / "run").rglob("checkpoint-20/model.safetensors"):
        weights.write_bytes(bytes(weights.stat().st_size))  # not noticed: manifests are enough, and nothing is hashed
    capsys.readouterr()
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    more = ["--extend_from", str(tmp_path / "run"), "--max_steps", "60", "--output_dir", str(tmp_path / "longer")]
    text = printed([*flags, *more], capsys, monkeypatch)
    assert "new: wsd_s, 60 steps: warm-up 2 steps, peak, 1-sqrt decay over steps 16-20, 56-60" in text
    assert re.findall(r"^warm-up +0-2 ", text, re.MULTILINE)


REFUSED = {
    "flag": (["--max_step", "5"], "unknown flag --max_step: did you mean --max_steps"),
    "no length": (
        ["--num_train_epochs", "2"],
        "max_steps is not set, and num_train_epochs=2 is a number of steps only",
    ),
    "too long": (
        ["--optim", "radam", "--max_steps", "9", "--decay_steps", "20"],
        "do not fit between steps 0 and 9.",
    ),
    "no file": (["nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
    "losses": (
        ["--max_steps", "9", "--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps"],
        "reduce_lr_on_plateau follows the losses",
    ),
    "options": (
        ["--max_steps", "9", "--lr_scheduler_type", "cosine_with_min_lr"],
        "transformers refuses its lr_scheduler_kwargs. One",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_sentence(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, sentence = REFUSED[name]
    with pytest.raises(SystemExit) as ended:
        cli.main(["schedule", *words])
    output = capsys.readouterr()
    assert (ended.value.code, output.out) == (2, "")
    line = output.err.splitlines()[-1]
    assert line.startswith("hf-radam schedule: error: ") and sentence in line
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_all_but_drawing_works(tmp_path):
    script = "import sys; sys.modules['matplotlib'] = None; from hf_radam.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "COLUMNS": "60"}

    def command(*words):
        call = [sys.executable, "-c", script, *words]
        return limits.run(call, cwd=tmp_path, env=environment)

    done = command("schedule", "--max_steps", "9")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.isascii() and "?????????" in done.stdout
    (tmp_path / "run").mkdir()
    done = command("plot", "run", "-o", "a.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].endswith("Drawing needs matplotlib. Install it: pip install 'hf_radam[plots]'")


def test_a_sparkline():
    assert sparkline([0.0, 0.5, 1.0, 1.0, 0.25], width=9) == "▁▅██▃"
    assert sparkline([1.0] * 500 + [0.0] + [1.0] * 499, width=20) == "██████████▁█████████"
    assert sparkline([1.0] * 40 + [0.0] * 40, width=8) == "████▁▁▁▁"
    assert sparkline([0.0, 0.0], width=30) == "▁▁"
