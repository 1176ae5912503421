"""The command `hf-radam inspect` itself: exit codes, JSON, read-only folders."""

import json
import os
import shutil
import sys
from pathlib import Path

import limits
import pytest
from inspecting import flip, inspect, snapshot, truncate

from hf_radam import cli

ROOT = Path(__file__).parents[2]


def test_the_command_itself(run, tmp_path):
    folder = run("wsd")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}

    def command(*words):
        call = [sys.executable, "-W", "error", "-m", "hf_radam.cli", "inspect", *words]
        return limits.run(call, cwd=tmp_path, env=environment)

    flip(folder / "checkpoint-18/model.safetensors")
    done = command("wsd")
    assert (done.returncode, done.stderr) == (1, "")
    assert "damaged: checkpoint-18\n" in done.stdout
    assert "damaged; model.safetensors has another sha256 than when it was written" in done.stdout
    done = command("nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("hf-radam inspect: error: nowhere is no folder: give a checkpoint")


def test_a_path_that_is_neither(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no run", encoding="utf-8")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["inspect", str(path)])
        output = capsys.readouterr()
        assert ended.value.code == 2 and output.out == ""
        assert output.err.splitlines()[-1].startswith(f"hf-radam inspect: error: {path} is ")


def test_an_empty_folder_with_the_name_of_a_checkpoint_is_a_damaged_one(tmp_path, capsys):
    (tmp_path / "checkpoint-5").mkdir()
    assert inspect(tmp_path / "checkpoint-5", capsys)[0] == 1


def test_json_has_the_facts(run, capsys):
    folder = run("schedule_free_ewa")
    assert cli.main(["inspect", str(folder / "checkpoint-12"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["update"], facts["phase"], facts["root"]) == ("checkpoint", 12, "stable", "y")
    assert facts["uses"]["evaluate"]["possible"] and len(facts["files"]) == 15
    truncate(folder / "checkpoint-6/optimizer.pt")
    assert cli.main(["inspect", str(folder), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["damaged"] == ["checkpoint-6"] and facts["resumes"] == str(folder / "checkpoint-20")
    assert [entry["name"] for entry in facts["checkpoints"]] == [f"checkpoint-{n}" for n in (20, 18, 12, 6)]


def test_a_folder_is_inspected_from_inside(run, monkeypatch, capsys):
    folder = run("wsd")
    monkeypatch.chdir(folder / "checkpoint-18")
    text = inspect(".", capsys)[1]
    assert (
        f"--extend_from {folder} --max_steps N" in text and f'load_evaluation_model("{folder}/checkpoint-18")' in text
    )


def test_nothing_is_written(run, capsys):
    folder = run("wsd_s")
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        before = snapshot(folder)
        assert inspect(folder, capsys)[0] == 0
        assert snapshot(folder) == before
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_file_that_the_manifest_does_not_know_is_said_to_be_one(run, made_by_stock, capsys):
    checkpoint = run("wsd") / "checkpoint-12"
    assert "(not in the manifest)" not in inspect(checkpoint, capsys)[1]
    assert "(not in the manifest)" not in inspect(made_by_stock / "checkpoint-5", capsys)[1]
    (checkpoint / "notes.txt").write_text("mine", encoding="utf-8")
    code, text = inspect(checkpoint, capsys)
    assert code == 0 and "notes.txt ok (not in the manifest)" in text


def test_control_characters_do_not_reach_the_terminal(made_by_stock, tmp_path, capsys):
    checkpoint = Path(shutil.copytree(made_by_stock / "checkpoint-5", tmp_path / "checkpoint-5"))
    (checkpoint / "a\x1b[2Jb").write_text("x", encoding="utf-8")
    cli.main(["inspect", str(checkpoint)])
    output = capsys.readouterr().out
    assert "a?[2Jb" in output and "\x1b" not in output
