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
import benchmark_report as report
import benchmark_rows as rows
from benchmark_trainers import STOCK, TRAINERS

COMMITTED = Path(__file__).parents[2] / "docs" / "benchmark.json"


def check(data):
    """Compute every derived number again from the rounds."""
    for table in data["tables"]:
        limit, *others = table["rows"]
        assert limit["bytes_per_parameter"] == 12 and limit["to_limit"] == pytest.approx(1) and len(others) >= 3
        for row in table["rows"]:
            assert len(row["rounds"]) == data["rounds"]
            assert row["seconds"] == pytest.approx(statistics.median(row["rounds"]))
            pairs = zip(row["rounds"], limit["rounds"], strict=True)
            times = [own * 12 / (bound * row["bytes_per_parameter"]) for own, bound in pairs]
            assert row["to_limit"] == pytest.approx(statistics.median(times))
    for row in data["every"]["rows"]:
        assert row["seconds"] == pytest.approx(statistics.median(row["rounds"]))
    for measured in data["trainers"]:
        assert 0 < measured["optimizer_share"] < 1
        stock, *others = measured["rows"]
        assert stock["name"] == STOCK and len(others) == len(TRAINERS) - 1
        for row in measured["rows"]:
            assert row["steps_per_second"] == pytest.approx(1 / statistics.median(row["seconds"]))
            ratios = [b / a for a, b in zip(row["seconds"], stock["seconds"], strict=True)]
            assert row["to_stock"] == pytest.approx(ratios)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="fused steps need a C++ compiler")
def test_it_measures_and_writes_every_number(tmp_path, monkeypatch, capsys):
    file, drawn, document = tmp_path / "to" / "numbers.json", tmp_path / "to" / "figure.png", tmp_path / "text.md"
    document.write_text("Before\n<!-- benchmark: steps -->\nold\n<!-- end of benchmark -->\nafter\n")
    memory_table, all_rows = rows.memory_table, rows.ROWS

    def memory_of_one(what, width, device):
        with monkeypatch.context() as patch:
            chosen = [row for row in all_rows[what]() if row.name == "torch.optim.AdamW, foreach"]
            patch.setattr(rows, "ROWS", {what: lambda: chosen})
            return memory_table(what, 256, device)  # large enough to tell from the noise of a process

    monkeypatch.setattr(rows, "memory_table", memory_of_one)
    words = ["--quick", "--json", file, "--figure", drawn, "--document", document]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, words)])
    assert benchmark.main() == 0
    printed, data = capsys.readouterr().out, json.loads(file.read_text())
    check(data)
    assert data["versions"]["torch"] == torch.__version__ and data["machine"]["threads"] == torch.get_num_threads()
    sizes = sorted({table["parameters"] for table in data["tables"]})
    assert len(sizes) == 2 and [t["what"] for t in data["tables"]] == ["steps", "averaging"] * 2
    assert [row["every"] for row in data["every"]["rows"]] == [1, 4]
    assert data["trainers"][0]["parameters"] == sizes[0]  # the same llama
    assert [len(row["seconds"]) for row in data["trainers"][0]["rows"]] == [3] * len(TRAINERS)
    for table in data["tables"][:2]:
        for row in table["rows"]:
            assert f"| {row['name']} | {report.milliseconds(row['seconds'])} | {row['to_limit']:.2f} |" in printed
    if rows.has_memory(torch.device("cpu")):
        (row,) = [row for table in data["memory"] for row in table["rows"]]
        # Two states, and temporaries: the foreach kernels work on lists that need not hold all of the tensors.
        assert row["held"] == pytest.approx(8, abs=0.4) and row["peak"] == pytest.approx(12, abs=0.6)
        assert f"| {row['held']:.1f} | {row['peak']:.1f} |" in printed
    assert drawn.read_bytes().startswith(b"\x89PNG") and drawn.stat().st_size > 20_000
    text = document.read_text()
    assert text.startswith("Before\n<!-- benchmark: steps -->\n") and "| hf_radam.RAdam, fused |" in text
    assert text.endswith("<!-- end of benchmark -->\nafter\n") and "old" not in text
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--from_json", str(file)])
    assert benchmark.main() == 0 and printed.endswith(capsys.readouterr().out)


def test_the_committed_numbers_hold_together():
    data = json.loads(COMMITTED.read_text(encoding="utf-8"))
    check(data)
    assert len({table["parameters"] for table in data["tables"]}) == 3
    assert [row["every"] for row in data["every"]["rows"]] == [1, 4, 16, 64]
    for measured in data["trainers"]:
        first = next(row for row in measured["rows"] if "EWA" in row["name"])
        assert f"{statistics.median(first['to_stock']):.3f} x stock" in report.summary(data)
