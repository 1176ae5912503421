"""`hf-radam plot`: the data that is drawn, which file it comes from, and what is refused.

Oracles: the `trainer_state.json` itself; smoothing as a sum written down here.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from hf_radam import cli
from hf_radam.cli.plot import read_training_log, runs_figure, save_figure, smoothed

OPTIONS = {"logging_strategy": "steps", "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 5}
OPTIONS |= {"save_strategy": "steps", "save_steps": 6}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, made_by_stock):
    """A run with an average, one of WSD, and one by stock `Trainer` without evaluations."""
    root = tmp_path_factory.mktemp("runs")
    tiny.trainer(root / "ewa", optim="radam", ewa=True, ewa_eval_raw=True, **OPTIONS).train()
    tiny.trainer(root / "wsd", optim="radam", warmup_steps=3, **OPTIONS).train()
    shutil.copytree(made_by_stock, root / "stock")
    return root


def recorded(file, key):
    """(step, value) of each entry of the state's history that has the key."""
    history = json.loads(Path(file).read_text("utf-8"))["log_history"]
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def drawn(figure):
    """(x, y) of every point of the lines in a figure, by their names."""
    lines = [line for axes in figure.axes for line in axes.lines]
    found = {line.get_gid(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.mark.parametrize("logarithmic", [False, True])
def test_the_drawn_data_is_the_recorded_data(runs, tmp_path, monkeypatch, logarithmic):
    monkeypatch.chdir(runs)
    figure = runs_figure([read_training_log(name) for name in ("ewa", "wsd", "stock")], logarithmic=logarithmic)
    lines = drawn(figure)
    for name, step in {"ewa": 20, "wsd": 20, "stock": 10}.items():
        file = runs / name / f"checkpoint-{step}/trainer_state.json"
        for key in ("loss", "eval_loss", "eval_raw_loss", "learning_rate"):
            assert lines.get(f"{name}: {key}", []) == recorded(file, key), (name, key)
    assert len(lines["ewa: eval_raw_loss"]) == 4 and "wsd: eval_raw_loss" not in lines
    assert [axes.get_ylabel() for axes in figure.axes] == ["training loss", "evaluation loss", "learning rate"]
    assert figure.axes[-1].get_xscale() == ("log" if logarithmic else "linear")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["ewa", "wsd", "stock"]
    save_figure(figure, tmp_path / "runs.png")


def test_the_smoothed_line(runs, monkeypatch):
    monkeypatch.chdir(runs)
    figure = runs_figure([read_training_log("wsd")], half_life_ratio=0.2)
    points = np.array(recorded(runs / "wsd/checkpoint-20/trainer_state.json", "loss"))
    for index, (step, value) in enumerate(drawn(figure)["wsd: smoothed loss"]):
        past = points[: index + 1]
        rates = np.diff(past[:, 0]) / (0.2 * past[1:, 0])  # half-lives between one value and the next
        weights = np.array([0.5 ** rates[start:].sum() for start in range(index + 1)])
        assert step == past[-1, 0]
        assert value == pytest.approx((weights * past[:, 1]).sum() / weights.sum(), rel=1e-12)
    plain = drawn(runs_figure([read_training_log("wsd")], half_life_ratio=0))
    assert set(plain) == {"wsd: loss", "wsd: eval_loss", "wsd: learning_rate"}
    means = [value for _, value in smoothed([(1, math.nan), (2, 4.0), (3, math.inf)], half_life_ratio=0.5)]
    assert math.isnan(means[0]) and means[1:] == [4.0, 4.0]


def test_the_latest_state_is_taken(runs, tmp_path):
    run = Path(shutil.copytree(runs / "wsd", tmp_path / "wsd"))
    assert read_training_log(run).source == run / "checkpoint-20/trainer_state.json"
    shutil.copyfile(run / "checkpoint-20/trainer_state.json", run / "trainer_state.json")  # as save_state() does
    assert read_training_log(run).source == run / "trainer_state.json"
    shutil.copyfile(run / "checkpoint-12/trainer_state.json", run / "trainer_state.json")
    assert read_training_log(run).source == run / "checkpoint-20/trainer_state.json"
    (run / "checkpoint-20/trainer_state.json").write_text("{", encoding="utf-8")
    assert read_training_log(run).source.parent.name == "checkpoint-18"
    assert read_training_log(run / "checkpoint-12").step == 12


def written(folder, history):
    """A run with nothing in it but a state with this history."""
    folder.mkdir(parents=True)
    state = {"global_step": max(entry["step"] for entry in history), "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def test_several_data_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["eval_loss", *(f"eval_{name}_loss" for name in ("c4-en_raw", "c4-en", "wiki.v2", "a b", "$x$"))]
    others = ["eval_loss_scale", "eval_lossy", "eval_c4-en_accuracy", "test_c4-en_loss"]
    log = read_training_log(written(Path("a$b$"), [{"step": 4, name: 2.0} for name in names + others]))
    assert list(log.evaluations)[0] == "eval_loss" and log.evaluations == {name: [(4, 2.0)] for name in names}
    figure = runs_figure([log])
    lines = {line.get_gid(): line for line in figure.axes[0].lines}
    styles = [lines[f"a$b$: eval_c4-en{kind}_loss"].get_linestyle() for kind in ("_raw", "")]
    assert styles == ["--", "-"] and len({line.get_marker() for line in lines.values()}) == 6
    save_figure(figure, tmp_path / "sets.png")


def test_the_command(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    for file, magic in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        words = ["plot", "ewa", "wsd/checkpoint-12", "stock/", "-o", str(tmp_path / file), "--log_x"]
        assert cli.main(words) == 0
        assert (tmp_path / file).read_bytes().startswith(magic)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["run", "step", "training", "loss", "eval_loss", "eval_raw_loss", "from"]
    state = Path("ewa/checkpoint-20/trainer_state.json")
    last = [f"{recorded(state, key)[-1][1]:.4f}" for key in ("loss", "eval_loss", "eval_raw_loss")]
    assert rows[1] == ["ewa", "20", *last, str(state)]
    assert rows[2][:2] == ["wsd/checkpoint-12", "12"] and rows[2][-2] == "-"


def test_bad_input_is_one_sentence(runs, tmp_path, capsys):
    def refused(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(["plot", *map(str, words)])
        output = capsys.readouterr()
        assert (ended.value.code, output.out) == (2, "")
        return output.err.splitlines()[-1]

    out = ["-o", tmp_path / "a.png"]
    silent = written(tmp_path / "silent", [{"step": 20, "learning_rate": 1.0}])
    assert "silent/trainer_state.json has no loss in it. Train further" in refused(runs / "ewa", silent, *out)
    (tmp_path / "empty").mkdir()
    assert "has no readable trainer_state.json" in refused(tmp_path / "empty", *out)
    assert "nowhere is not a folder" in refused("nowhere", *out)
    assert "a.jpg must end in .png or .pdf or .svg" in refused(runs / "ewa", "-o", "a.jpg")
    assert "half_life=20.0 is not a ratio" in refused(runs / "ewa", *out, "--half_life", "20")
    for content in ('{"global_step": 5}', '{"global_step": 5, "log_history": [{"loss": 1.0}]}'):
        (silent / "trainer_state.json").write_text(content, encoding="utf-8")
        assert "is not the log of a Trainer" in refused(silent, *out)
    assert not (tmp_path / "a.png").exists()
