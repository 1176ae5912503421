"""`hf-radam schedule`: what it prints and draws, and what it refuses.

Oracles: the learning rates that `preview` gives (its own tests compare those with real runs); the lines of the figure;
curves written down by hand.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from matplotlib.transforms import Bbox

import clm_arguments
from hf_radam import cli
from hf_radam.cli.drawing import curve, table
from hf_radam.plots import save_figure, schedule_figure
from hf_radam.preview import preview

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def printed(words, capsys, monkeypatch, columns=100):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["schedule", *words]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_prints_the_rates_of_its_run(path, capsys, monkeypatch):
    text = printed([str(path)], capsys, monkeypatch)
    found = preview(clm_arguments.parse_arguments([str(path)])[2])
    assert text.startswith(found.words + "\n")
    rows = re.findall(r"^(warm-up|stable|decay) +(\d+)-(\d+) +([\d.]+) % +(\S+)(?: to (\S+))?", text, re.MULTILINE)
    assert len(rows) == len(found.phases)
    for (name, first, last, share, start, end), phase in zip(rows, found.phases, strict=True):
        assert (name, int(first), int(last)) == (phase.name, phase.first, phase.last)
        assert float(share) == pytest.approx(100 * phase.updates / len(found.rates), abs=0.05)
        assert float(start) == pytest.approx(found.rates[int(first) - 1], rel=1e-3)
        assert float(end or start) == pytest.approx(found.rates[int(last) - 1], rel=1e-3)
    others = {"block_size", "vocab_size", "max_eval_samples", "model_type", "config_overrides"}
    assert set(text.split("passed over: ")[1].strip().split(", ")) == others


def test_flags_win_over_the_file(capsys, monkeypatch):
    words = [
        str(ROOT / "configs/radam_wsd.yaml"),
        "--max_steps",
        "5000",
        "--decay_steps",
        "0.1",
        "--warmup_steps",
        "50",
    ]
    text = printed(words, capsys, monkeypatch)
    assert "wsd, 5000 steps: warm-up 50 steps, peak, 1-sqrt decay over steps 4500-5000" in text
    assert re.search(r"^stable +51-4500 +89.0 % +0.004 +_pre_decay/checkpoint-4500$", text, re.MULTILINE)


@pytest.mark.parametrize("budgets", [[], ["--budgets", "3", "10"]], ids=["wsd", "wsd_s"])
def test_a_decay_without_an_effect_is_warned_of_as_in_training(budgets, tmp_path, capsys, monkeypatch, caplog):
    kind = "wsd_s" if budgets else "wsd"
    flags = ["--optim", "radam", "--lr_scheduler_type", kind, "--max_steps", "20", *budgets, "--decay_steps"]
    text = printed([*flags, "0.01"], capsys, monkeypatch, columns=200)
    assert re.search(r"^decay +20-20 ", text, re.MULTILINE)
    (warning,) = re.findall(r"^Warning: (.*)$", text, re.MULTILINE)
    assert "Warning" not in printed([*flags, "2"], capsys, monkeypatch, columns=200)
    options = {"budgets": [3, 10]} if budgets else {}
    tiny.trainer(tmp_path, optim="radam", lr_scheduler_type=kind, decay_steps=0.01, **options).train()
    assert warning in [record.getMessage() for record in caplog.records]


def test_several_values_and_no_file(capsys, monkeypatch):
    flags = ["--optim", "radam", "--lr_scheduler_type", "wsd_s", "--max_steps", "1000", "--budgets", "300", "700"]
    text = printed(flags, capsys, monkeypatch)
    kept = re.findall(r"_budgets/checkpoint-(\d+)", text)
    assert kept == ["300", "700", "1000"]


def test_a_json_file(capsys, monkeypatch, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"lr_scheduler_type": "cosine", "max_steps": 50, "block_size": 8}), encoding="utf-8")
    text = printed([str(path)], capsys, monkeypatch)
    assert text.startswith("cosine, 50 steps\n") and "passed over: block_size" in text


def test_a_gpus_configuration_is_answered_without_one(capsys, monkeypatch):
    flags = ["--max_steps", "50", "--bf16", "--tf32", "true", "--fsdp", "true", "--deepspeed", "nowhere.json"]
    assert printed(flags, capsys, monkeypatch).startswith("linear, 50 steps\n")


def test_a_run_that_is_extended_keeps_its_past(tmp_path, capsys, monkeypatch):
    options = {"optim": "radam", "lr_scheduler_type": "wsd_s", "decay_steps": 4, "warmup_steps": 0.1}
    tiny.trainer(tmp_path / "run", **options, save_strategy="steps", save_steps=10).train()
    capsys.readouterr()
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    more = ["--extend_from", str(tmp_path / "run"), "--max_steps", "60", "--output_dir", str(tmp_path / "longer")]
    text = printed([*flags, *more], capsys, monkeypatch)
    assert "new: wsd_s, 60 steps: warm-up 2 steps, peak, 1-sqrt decay over steps 16-20, 56-60" in text
    assert re.findall(r"^warm-up +1-2 ", text, re.MULTILINE)


REFUSED = {
    "flag": (["--max_step", "5"], "unknown flag --max_step: did you mean --max_steps"),
    "value": (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
    "no length": (["--optim", "radam"], "max_steps is not set"),
    "too long": (["--optim", "radam", "--max_steps", "9", "--decay_steps", "20"], "need 20 steps, but the run has 9"),
    "no file": (["nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
    "not a config": (["data.csv"], "'data.csv' is not a .yaml, .yml or .json file"),
    "picture": (["--max_steps", "9", "--png", "a.jpg"], "a.jpg must end in .png"),
    "folder": (["--max_steps", "9", "--png", "nowhere/a.png"], "a file cannot be read or written: "),
    "losses": (
        ["--max_steps", "9", "--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps"],
        "reduce_lr_on_plateau follows the losses",
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


def test_a_misspelt_key_is_refused_and_no_key_of_the_examples_is_taken_for_one(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("max_step: 5\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(["schedule", str(path)])
    assert "unknown key 'max_step': did you mean max_steps" in capsys.readouterr().err
    kinds = (clm_arguments.ModelArguments, clm_arguments.DataArguments)
    names = [name for kind in kinds for name in kind.__dataclass_fields__]
    path.write_text("max_steps: 5\n" + "".join(f"{name}: 1\n" for name in names), encoding="utf-8")
    assert cli.main(["schedule", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(", ".join(names))


def test_without_matplotlib_all_but_drawing_works(tmp_path):
    script = "import sys; sys.modules['matplotlib'] = None; from hf_radam.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "COLUMNS": "60"}

    def command(*words):
        call = [sys.executable, "-c", script, *words]
        return subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    done = command("schedule", "--max_steps", "9")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.isascii()  # as the terminal is
    (tmp_path / "run").mkdir()
    for words in (["schedule", "--max_steps", "9", "--png", "a.png"], ["plot", "run", "-o", "a.png"]):
        done = command(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1].endswith(
            "drawing needs matplotlib: pip install 'hf_radam[plots]', or pip install matplotlib"
        )


def test_the_figure_has_the_numbers(tmp_path):
    options = {"optim": "radam", "lr_scheduler_type": "wsd_s", "budgets": [30], "warmup_steps": 5, "max_steps": 80}
    found = preview(tiny.arguments(tmp_path, **options))
    figure = schedule_figure(found)
    (axes,) = figure.axes
    lines = {line.get_gid(): line for line in axes.lines}
    assert list(lines["learning rate"].get_xdata()) == list(range(1, 81))
    assert list(lines["learning rate"].get_ydata()) == found.rates
    for rate, factor, drawn in zip(found.rates, found.factors, lines["rectified"].get_ydata(), strict=True):
        assert math.isnan(drawn) if factor is None else drawn == rate * factor
    assert list(lines["kept"].get_xdata()) == [30, 80]
    save_figure(figure, tmp_path / "schedule.png")
    check_layout(figure)


@pytest.mark.parametrize(
    "options", [{"max_steps": 3}, {"max_steps": 10**6}, {"budgets": list(range(9, 190, 9))}], ids=str
)
def test_figures_of_any_length_are_readable(tmp_path, options):
    kind = "wsd_s" if "budgets" in options else "constant"
    decay = {"decay_steps": 4} if kind == "wsd_s" else {}
    args = {"optim": "radam", "lr_scheduler_type": kind, "max_steps": 200} | decay | options
    figure = schedule_figure(preview(tiny.arguments(tmp_path, **args)))
    save_figure(figure, tmp_path / "schedule.png")
    check_layout(figure)


def check_layout(figure):
    """No text is cut off at the edge of the figure, and none lies on another one."""
    boxes = []
    for axes in figure.axes:
        texts = [axes.title, axes._right_title, axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()]
        ticks = [(axes.yaxis, 1), *([(axes.xaxis, 0)] if axes is figure.axes[-1] else [])]
        for axis, coordinate in ticks:  # those beyond the ends of an axis are not drawn
            low, high = axis.get_view_interval()
            texts += [text for text in axis.get_ticklabels() if low <= text.get_position()[coordinate] <= high]
        if axes.get_legend():
            texts += axes.get_legend().get_texts()
            assert all(text.get_window_extent().y0 > axes.bbox.y1 for text in texts[-2:])  # above the curves
        boxes += [text.get_window_extent() for text in texts if text.get_text()]
    boxes += [text.get_window_extent() for legend in figure.legends for text in legend.get_texts()]
    inside = Bbox([[0, 0], [figure.bbox.width, figure.bbox.height]])
    shown = [box for box in boxes if box.width]
    assert len(shown) > 8
    for index, box in enumerate(shown):
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1, box
        assert not any(box.overlaps(other) for other in shown[:index]), box


def test_a_curve_in_the_terminal():
    assert curve([0.0, 0.5, 1.0, 1.0, 0.25] * 2, width=12, height=4) == [
        "1┤  ██   ██",
        " ┤  ██   ██",
        " ┤ ███  ███",
        " ┤ ████ ████",
        "0└──────────",
        "  1       10",
    ]
    assert curve([1.0] * 40 + [0.0] * 40, width=12, height=2, ascii_only=True)[:2] == ["1|#####", " |#####"]


def test_a_dip_that_is_narrower_than_a_column_shows():
    lines = curve([1.0] * 500 + [0.0] + [1.0] * 499, width=22, height=4)
    assert [line.count("░") for line in lines[:4]] == [1, 1, 1, 1]
    assert [line.count("█") for line in lines[:4]] == [19, 19, 19, 19]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 12345])
@pytest.mark.parametrize("width", [20, 60, 211])
def test_a_curve_fills_the_width_and_no_more(width, count):
    lines = curve([0.004] * count, width=width)
    assert {len(line) for line in lines[:-1]} == {width} and len(lines[-1]) <= width
    assert lines[-1].split()[0] == "1" and lines[-1].rstrip().endswith(str(count)) or count < 4


def test_a_rate_of_zero_is_drawn(capsys, monkeypatch):
    assert set("".join(curve([0.0, 0.0], width=30)[:3])) <= set("0┤ ")
    assert "learning rate" in printed(["--max_steps", "4", "--learning_rate", "0"], capsys, monkeypatch)


def test_a_table():
    rows = [["name", "count"], ["a", "1"], ["long name", "200"]]
    assert table(rows, right=(1,)) == ["name       count", "a              1", "long name    200"]
