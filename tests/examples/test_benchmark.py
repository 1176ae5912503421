"""The benchmark measures what it says: every row in turns, ratios to the limit, and numbers that can be read again."""

import json
import shutil

import pytest
import torch

import benchmark


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_it_measures_and_writes_every_number(tmp_path, monkeypatch, capsys):
    file = tmp_path / "numbers.json"
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--parameters", "0.6", "--rounds", "3", "--json", str(file)])
    assert benchmark.main() == 0
    printed, tables = capsys.readouterr().out, json.loads(file.read_text())
    assert [table["what"] for table in tables] == ["update", "averaging"]
    for table in tables:
        limit, *rows = table["rows"]
        assert limit["to_limit"] == pytest.approx(1.0) and len(rows) >= 4
        for row in rows:
            assert len(row["rounds"]) == 3 and row["seconds"] == sorted(row["rounds"])[1]
            streams = 7 if table["what"] == "update" else 3
            assert row["to_limit"] == pytest.approx(row["seconds"] / limit["seconds"] * 3 / streams)
            assert f"| {row['name']} | {1e3 * row['seconds']:.1f} | {row['to_limit']:.2f} |" in printed


@pytest.mark.parametrize("millions", [1, 34, 350])
def test_the_shapes_are_about_as_large_as_asked(millions):
    count = sum(torch.Size(size).numel() for size in benchmark.shapes(millions))
    assert 0.5 * millions < count / 1e6 <= millions
