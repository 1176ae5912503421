"""`hf-radam plot`: the numbers that are drawn, which file they come from, and what is refused.

Oracles: the `trainer_state.json` itself; smoothing as a sum written down here.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from inspecting import flip, stock
from test_schedule_command import check_layout

from hf_radam import cli
from hf_radam.plots import labels, runs_figure, save_figure
from hf_radam.training_logs import Series, TrainingLog, read_training_log, smoothed

OPTIONS = {"logging_strategy": "steps", "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 5}
OPTIONS |= {"save_strategy": "steps", "save_steps": 6}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with an average, one of WSD, and one by stock `Trainer` without evaluations."""
    root = tmp_path_factory.mktemp("runs")
    tiny.trainer(root / "ewa", optim="radam", ewa=True, ewa_eval_raw=True, **OPTIONS).train()
    tiny.trainer(root / "wsd", optim="radam", warmup_steps=3, **OPTIONS).train()
    stock(root / "stock", logging_steps=1).train()
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
def test_what_is_drawn_is_what_is_recorded(runs, tmp_path, logarithmic):
    logs = [read_training_log(runs / name) for name in ("ewa", "wsd", "stock")]
    figure = runs_figure(logs, logarithmic=logarithmic)
    lines = drawn(figure)
    files = {"ewa": 20, "wsd": 20, "stock": 10}
    for name, update in files.items():
        file = runs / name / f"checkpoint-{update}/trainer_state.json"
        for key in ("loss", "eval_loss", "eval_raw_loss", "learning_rate"):
            assert lines.get(f"{name}: {key}", []) == recorded(file, key), (name, key)
    assert len(lines["ewa: eval_raw_loss"]) == 4 and "wsd: eval_raw_loss" not in lines
    assert [axes.get_ylabel() for axes in figure.axes] == ["training loss", "evaluation loss", "learning rate"]
    assert figure.axes[-1].get_xscale() == ("log" if logarithmic else "linear")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ewa", "wsd", "stock"]
    save_figure(figure, tmp_path / "runs.png")
    check_layout(figure)


def test_the_smoothed_line(runs):
    figure = runs_figure([read_training_log(runs / "wsd")], half_life_ratio=0.2)
    points = np.array(recorded(runs / "wsd/checkpoint-20/trainer_state.json", "loss"))
    for index, (update, value) in enumerate(drawn(figure)["wsd: smoothed loss"]):
        past = points[: index + 1]
        rates = np.diff(past[:, 0]) / (0.2 * past[1:, 0])  # half-lives between one value and the next
        weights = np.array([0.5 ** rates[start:].sum() for start in range(index + 1)])
        assert update == past[-1, 0]
        assert value == pytest.approx((weights * past[:, 1]).sum() / weights.sum(), rel=1e-12)
    plain = drawn(runs_figure([read_training_log(runs / "wsd")], half_life_ratio=0))
    assert set(plain) == {"wsd: loss", "wsd: eval_loss", "wsd: learning_rate"}


def test_what_is_not_finite_is_left_out_of_the_mean():
    means = smoothed(Series([1, 2, 3], [math.nan, 4.0, math.inf]), half_life_ratio=0.5).values
    assert math.isnan(means[0]) and means[1:] == [4.0, 4.0]


def test_the_state_that_has_seen_most_is_taken(runs, tmp_path):
    run = tmp_path / "wsd"
    trainer = tiny.trainer(run, optim="radam", lr_scheduler_type="wsd", decay_steps=4, **OPTIONS)
    trainer.train()
    assert read_training_log(run).source == run / "checkpoint-20/trainer_state.json"
    trainer.save_state()
    assert read_training_log(run).source == run / "trainer_state.json"
    shutil.copyfile(run / "checkpoint-12/trainer_state.json", run / "trainer_state.json")
    assert read_training_log(run).source == run / "checkpoint-20/trainer_state.json"
    flip(run / "checkpoint-20/trainer_state.json")
    assert read_training_log(run).source.parent.name == "checkpoint-18"
    assert read_training_log(run / "checkpoint-12").update == 12


def test_a_run_that_was_resumed_and_one_that_was_extended_are_drawn_as_recorded(tmp_path):
    options = {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": 4} | OPTIONS
    tiny.trainer(tmp_path / "run", **options).train()
    longer = tiny.trainer(tmp_path / "longer", extend_from=str(tmp_path / "run"), **options | {"max_steps": 30})
    longer.train()
    log = read_training_log(tmp_path / "longer")
    assert log.loss.updates == list(range(2, 31, 2))
    lines = drawn(runs_figure([log]))
    assert lines["longer: loss"] == recorded(tmp_path / "longer/checkpoint-30/trainer_state.json", "loss")


def written(folder, history):
    """A run of which nothing is there but a state with this history."""
    folder.mkdir(parents=True)
    update = max(entry["step"] for entry in history)
    state = {"global_step": update, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def test_data_sets_may_have_any_name(tmp_path):
    names = ["eval_loss", "eval_c4-en_raw_loss", "eval_c4-en_loss", "eval_wiki.v2_loss", "eval_a b_loss", "eval_é_loss"]
    others = ["eval_loss_scale", "eval_lossy", "eval_gloss", "eval_c4-en_accuracy", "test_c4-en_loss", "c4-en_loss"]
    history = [{"step": 4, name: 2.0} for name in names + others]
    log = read_training_log(written(tmp_path / "run", history))
    assert list(log.evaluations)[0] == "eval_loss" and set(log.evaluations) == set(names)
    assert all(series == Series([4], [2.0]) for series in log.evaluations.values())
    alone = read_training_log(written(tmp_path / "alone", [{"step": 4, "eval_wiki.v2_loss": 3.0}]))
    assert alone.evaluations == {"eval_wiki.v2_loss": Series([4], [3.0])}


def test_the_command(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    for file, magic in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        words = ["plot", "ewa", "wsd/checkpoint-12", "stock/", "-o", str(tmp_path / file), "--log_x"]
        assert cli.main(words) == 0
        assert (tmp_path / file).read_bytes().startswith(magic)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["run", "updates", "training", "loss", "eval_loss", "eval_raw_loss", "from"]
    state = Path("ewa/checkpoint-20/trainer_state.json")
    last = [f"{recorded(state, key)[-1][1]:.4f}" for key in ("loss", "eval_loss", "eval_raw_loss")]
    assert rows[1] == ["ewa", "20", *last, str(state)]
    assert rows[2][:2] == ["wsd/checkpoint-12", "12"] and rows[2][-2] == "-"
    assert rows[3][-3:] == ["-", "-", "stock/checkpoint-10/trainer_state.json"]


def test_names_tell_runs_apart():
    assert labels(["a/wsd", "a/ewa"]) == ["wsd", "ewa"]
    assert labels(["a/wsd", "b/wsd", "b/ewa"]) == ["a/wsd", "b/wsd", "b/ewa"]
    assert labels(["wsd", "wsd/checkpoint-5", "wsd/checkpoint-9"]) == ["wsd", "wsd/checkpoint-5", "wsd/checkpoint-9"]
    assert labels(["wsd", "wsd"]) == ["wsd", "wsd"]


def test_many_runs_fit(runs, tmp_path):
    log = read_training_log(runs / "ewa")
    logs = [type(log)(**vars(log) | {"path": f"sweep/learning_rate_{n}"}) for n in range(13)]
    figure = runs_figure(logs)
    colours = [line.get_color() for line in figure.axes[-1].lines]
    assert len(set(colours)) == 13
    save_figure(figure, tmp_path / "many.png")
    check_layout(figure)


def made_up(path, *, kinds=("eval_loss",), start=5, values=None):
    """A log of 100 training losses and some evaluations."""
    updates = list(range(5, 505, 5))
    losses = values or [3 + 30 / update for update in updates]
    at = [start, *range(50, 501, 50)]
    evaluations = {kind: Series(at, [3.0 + n + 1 / (u + 1) for u in at]) for n, kind in enumerate(kinds)}
    log = TrainingLog(path, Path(path), 500, Series(updates, losses), evaluations, Series(updates, [0.001] * 100))
    return log


@pytest.mark.parametrize("count", [4, 12])
def test_no_name_is_cut_off(tmp_path, count):
    for width in (8, 45, 300):
        logs = [made_up(f"{'n' * width}{number}", kinds=("eval_loss", "eval_raw_loss")) for number in range(count)]
        figure = runs_figure(logs)
        save_figure(figure, tmp_path / "runs.png")
        check_layout(figure)
        texts = [text.get_text().replace("\n", "") for text in figure.legends[0].get_texts()]
        assert texts == [log.path for log in logs]
        heights = [axes.bbox.height / figure.dpi for axes in figure.axes]
        assert min(heights) > 1.2  # inches: a long legend takes nothing from the panels


def test_a_name_is_no_formula(tmp_path):
    """What matplotlib would read as one, and one that it could not."""
    names = ["a$b$c", "a$\\frac$"]
    alone = [runs_figure([made_up(name, kinds=("eval_$x$_loss",))]) for name in names]
    several = runs_figure([made_up(name, kinds=("eval_loss", "eval_$x$_loss")) for name in names])
    for figure in (*alone, several):
        save_figure(figure, tmp_path / "names.png")
        assert [file.name for file in tmp_path.iterdir()] == ["names.png"]  # written aside, and put there whole
        texts = [*figure.legends[0].get_texts(), figure.axes[1].yaxis.label]
        texts += figure.axes[1].get_legend().get_texts() if figure is several else []
        shown = [text._preprocess_math(text.get_text()) for text in texts]
        assert not any(math for _, math in shown)
        wanted = [*names, "evaluation loss", "eval_loss", "eval_$x$_loss"]
        if figure is not several:
            wanted = [names[alone.index(figure)], "eval_$x$_loss"]
        assert [text for text, _ in shown] == wanted


def test_a_number_without_end_is_infinite(tmp_path):
    log = read_training_log(written(tmp_path / "run", [{"step": 1, "loss": 10**400}, {"step": 2, "loss": -(10**400)}]))
    assert log.loss.values == [math.inf, -math.inf]


def test_a_marker_is_a_data_set_and_a_dashed_line_the_training_weights(tmp_path):
    names = [f"set-{number}" for number in range(15)]
    kinds = [kind for name in names for kind in (f"eval_{name}_loss", f"eval_{name}_raw_loss")] + ["eval_only_raw_loss"]
    figure = runs_figure([made_up("a", kinds=kinds), made_up("b", kinds=kinds[:3])])
    lines = {line.get_gid(): line for line in figure.axes[1].lines}
    markers = {name: lines[f"a: eval_{name}_loss"].get_marker() for name in names}
    assert len(set(markers.values())) == 15
    for name in names:
        assert lines[f"a: eval_{name}_raw_loss"].get_marker() == markers[name]
        assert lines[f"a: eval_{name}_loss"].get_linestyle() == "-"
        assert lines[f"a: eval_{name}_raw_loss"].get_linestyle() == "--"
    assert lines["a: eval_only_raw_loss"].get_linestyle() == "-"  # a data set of this name
    assert lines["b: eval_set-0_loss"].get_marker() == markers["set-0"]
    texts = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    wanted = [f"eval_{name}_loss" for name in names] + ["eval_only_raw_loss"]
    assert sorted(texts[:-2]) == sorted(wanted)
    assert texts[-2:] == ["evaluation weights", "training weights (raw)"]
    save_figure(figure, tmp_path / "sets.png")
    check_layout(figure)


def test_a_logarithmic_axis_has_no_update_0():
    log = made_up("a", start=0)
    plain, logarithmic = (runs_figure([log], logarithmic=choice) for choice in (False, True))
    points = drawn(plain)["a: eval_loss"]
    assert points[0][0] == 0 and drawn(logarithmic)["a: eval_loss"] == points[1:]
    assert logarithmic.axes[-1].get_xlabel() == "update (logarithmic, without update 0)"
    assert runs_figure([made_up("a")], logarithmic=True).axes[-1].get_xlabel() == "update (logarithmic)"
    nothing = Series([], [])
    at_0 = TrainingLog("a", Path("a"), 0, nothing, {"eval_loss": Series([0], [5.0])}, nothing)
    with pytest.raises(ValueError, match="all was logged at update 0"):
        runs_figure([at_0], logarithmic=True)


def test_a_spike_does_not_flatten_the_rest(tmp_path):
    values = [11.0, 6.0] + [3 + 1 / n for n in range(1, 99)]
    calm = runs_figure([made_up("a", values=values)])
    assert calm.axes[0].get_ylim()[1] > 11 and "outside" not in calm.axes[0].get_title(loc="right")
    figure = runs_figure([made_up("a", values=[*values[:50], 1e6, *values[51:]]), made_up("b", values=values)])
    low, high = figure.axes[0].get_ylim()
    assert low < 3 and 11 < high < 12
    title = figure.axes[0].get_title(loc="right").splitlines()
    assert title[0].startswith("outside the panel, of 200 logged values: 1 above, up to 1e+06;")
    assert (255, 1e6) in drawn(figure)["a: loss"]  # drawn all the same, beyond the edge
    save_figure(figure, tmp_path / "spike.png")
    check_layout(figure)


def refused(words, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    output = capsys.readouterr()
    assert (ended.value.code, output.out) == (2, "")
    return output.err.splitlines()[-1]


def test_bad_input_is_one_sentence(runs, tmp_path, capsys):
    out = ["-o", str(tmp_path / "a.png")]
    tiny.trainer(tmp_path / "silent", optim="radam", save_strategy="steps", save_steps=10).train()
    line = refused(["plot", str(runs / "ewa"), str(tmp_path / "silent"), *out], capsys)
    assert "silent/checkpoint-20/trainer_state.json has no loss in it: the run had logged none by update 20" in line
    (tmp_path / "empty").mkdir()
    assert "has no trainer_state.json that can be read" in refused(["plot", str(tmp_path / "empty"), *out], capsys)
    assert "nowhere is no folder" in refused(["plot", "nowhere", *out], capsys)
    assert "a.jpg must end in .png or .pdf or .svg" in refused(["plot", str(runs / "ewa"), "-o", "a.jpg"], capsys)
    words = ["plot", str(runs / "ewa"), *out, "--half_life", "20"]
    assert "the half-life of the smoothed loss is a ratio of the updates, 0 to 1, not 20.0" in refused(words, capsys)
    damaged = tmp_path / "bad/checkpoint-5"
    damaged.mkdir(parents=True)
    contents = {
        "{": "cannot be read",
        '{"global_step": 5}': "log_history",
        '{"global_step": 5, "log_history": [1]}': "has not the form",
        '{"global_step": 5, "log_history": [{"loss": 1.0}]}': "step",
    }
    for text, words in contents.items():
        (damaged / "trainer_state.json").write_text(text, encoding="utf-8")
        assert words in refused(["plot", str(damaged), *out], capsys)
    assert not (tmp_path / "a.png").exists()
