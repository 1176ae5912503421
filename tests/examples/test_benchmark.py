"""The benchmark measures what it says: rows in turns, ratios to the limit and to stock, memory, and what it writes.

Oracles: medians and ratios computed here from the rounds in the JSON file; bytes of the states that torch holds; the
names of the rows in the printed tables. No test says how fast anything is.
"""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch

import benchmark
from benchmarking import figure, memory, report, rows, timing, trainers

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler"
)
CPU = torch.device("cpu")
COMMITTED = Path(__file__).parents[2] / "docs" / "benchmark.json"


def middle(values):
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def check(data):
    """Compute every derived number anew from the rounds."""
    for table in data["tables"]:
        limit, *others = table["rows"]
        assert limit["bytes_per_parameter"] == 12 and limit["to_limit"] == pytest.approx(1) and len(others) >= 3
        for row in table["rows"]:
            assert len(row["rounds"]) == data["rounds"] and row["seconds"] == pytest.approx(middle(row["rounds"]))
            rounds = zip(row["rounds"], limit["rounds"], strict=True)
            times = middle([own * 12 / (bound * row["bytes_per_parameter"]) for own, bound in rounds])
            assert row["to_limit"] == pytest.approx(times)
    for row in data["every"]["rows"]:
        assert row["seconds"] == pytest.approx(middle(row["rounds"]))
    for measured in data["trainers"]:
        assert 0 < measured["optimizer_share"] < 1
        stock, *others = measured["rows"]
        assert stock["name"] == trainers.STOCK and len(others) == len(trainers.TRAINERS) - 1
        for row in measured["rows"]:
            assert row["updates_per_second"] == pytest.approx(1 / middle(row["seconds"]))
            for ratio, own, theirs in zip(row["to_stock"], row["seconds"], stock["seconds"], strict=True):
                assert ratio == pytest.approx(theirs / own)


@needs_compiler
def test_it_measures_and_writes_every_number(tmp_path, monkeypatch, capsys):
    file, drawn, document = tmp_path / "to" / "numbers.json", tmp_path / "to" / "figure.png", tmp_path / "text.md"
    document.write_text("Before\n<!-- benchmark: updates -->\nold\n<!-- end of benchmark -->\nafter\n")
    some = {"updates": ["hf_radam.RAdam, fused", "torch.optim.RAdam, foreach"], "averaging": ["hf_radam.WeightAverage"]}
    chosen = {what: [row for row in rows.ROWS[what]() if row.name in names] for what, names in some.items()}
    monkeypatch.setattr(memory, "ROWS", {what: lambda found=found: found for what, found in chosen.items()})
    words = ["--quick", "--json", file, "--figure", drawn, "--document", document]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, words)])
    assert benchmark.main() == 0
    printed, data = capsys.readouterr().out, json.loads(file.read_text())
    check(data)
    assert data["versions"]["torch"] == torch.__version__ and data["machine"]["threads"] == 1
    sizes = sorted({table["parameters"] for table in data["tables"]})
    assert len(sizes) == 2 and [t["what"] for t in data["tables"]] == ["updates", "averaging"] * 2
    assert [row["every"] for row in data["every"]["rows"]] == [1, 4]
    assert data["trainers"][0]["parameters"] == sizes[0]  # the same llama
    assert [len(row["seconds"]) for row in data["trainers"][0]["rows"]] == [3] * len(trainers.TRAINERS)
    for table in data["tables"][:2]:
        for row in table["rows"]:
            assert f"| {row['name']} | {report.milliseconds(row['seconds'])} | {row['to_limit']:.2f} |" in printed
    if memory.measurable(CPU):
        assert {m["what"]: [row["name"] for row in m["rows"]] for m in data["memory"]} == some
        held = data["memory"][1]["rows"][0]["held"]
        assert f"| {held:.1f} |" in next(line for line in printed.splitlines() if "| hf_radam.WeightAverage |" in line)
    assert drawn.read_bytes().startswith(b"\x89PNG") and drawn.stat().st_size > 20_000
    text = document.read_text()
    assert text.startswith("Before\n<!-- benchmark: updates -->\n") and "| hf_radam.RAdam, fused |" in text
    assert text.endswith("<!-- end of benchmark -->\nafter\n") and "old" not in text

    document.write_text("<!-- benchmark: every -->\n<!-- end of benchmark -->\n")
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--from_json", str(file), "--document", str(document)])
    assert benchmark.main() == 0 and printed.endswith(capsys.readouterr().out)
    assert report.every(data) in document.read_text()


@pytest.mark.skipif(not memory.measurable(CPU), reason="no /proc/self/clear_refs")
@pytest.mark.parametrize(
    ("name", "held", "peak"),
    [("torch.optim.AdamW, fused", 8, 8), ("torch.optim.AdamW, foreach", 8, 12)],  # two states; one temporary
)
def test_memory_is_that_of_the_states(name, held, peak, monkeypatch):
    (row,) = [row for row in rows.update_rows() if row.name == name]
    monkeypatch.setattr(memory, "ROWS", {"updates": lambda: [row]})
    ((measured,),) = [memory.table("updates", 8, CPU)["rows"]]
    assert measured["name"] == name
    # Rounded to pages, and the foreach kernels work on lists that need not hold all of the tensors.
    assert measured["held"] == pytest.approx(held, abs=0.4) and measured["peak"] == pytest.approx(peak, abs=0.6)


def test_gradients_that_are_taken_are_given_back():
    def make(model):
        def take():
            assert all(parameter.grad is not None for parameter in model)
            for parameter in model:
                parameter.grad = None

        return take

    running = timing.Running(rows.Row("greedy", make, takes_gradients=True), [(4, 4), (4,)], CPU)
    for _ in range(3):
        assert running.once() > 0


def test_intervals_are_whole_periods(capsys):
    with pytest.raises(ValueError, match="6 updates are not whole periods of 4: give divisors of the largest"):
        timing.intervals([(4, 4)], CPU, every=[4, 6], rounds=1)
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--every", "4", "6"])
    assert "the largest must be a multiple of each" in capsys.readouterr().err
    averaged = timing.intervals([(4, 4)], CPU, every=[1, 2, 6], rounds=2)
    assert averaged["updates_per_round"] == 6 and [row["every"] for row in averaged["rows"]] == [1, 2, 6]


@pytest.mark.parametrize("millions", [1, 8, 34, 100, 350])
def test_the_shapes_are_about_as_large_as_asked(millions):
    count = sum(torch.Size(size).numel() for size in rows.shapes(millions))
    assert 0.75 * millions < count / 1e6 < 1.25 * millions


def test_the_numbers_in_the_documents_hold_together(tmp_path):
    data = json.loads(COMMITTED.read_text(encoding="utf-8"))
    check(data)
    assert len({table["parameters"] for table in data["tables"]}) == 3
    assert [row["every"] for row in data["every"]["rows"]] == [1, 4, 16, 64]
    figure.draw(data, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    for measured in data["trainers"]:
        first = next(row for row in measured["rows"] if "EWA" in row["name"])
        assert f"{statistics.median(first['to_stock']):.3f} x stock" in report.summary(data)
